"""examples/nano_deepseek.py against the product and transformers: logits of drawn configs, MTP,
YaRN, FP8 shards, and the text of the bundled model.
"""

import importlib.util
import itertools
import json
import math
import shutil
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowlat
from lowlat.ops.fp8 import dequantize_blocks
from tests import forked

from .parameters import slow_except
from .parity.draw import COUNTS, Case, draw_case
from .parity.oracle import Oracle, build, save

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "nano_deepseek.py"
MINNOW = ROOT / "lowlat" / "models" / "minnow"
TOKENS = 23
TOLERANCE = 1e-5
PROMPTS = ("The capital of France", "Once upon a time", "In 1969")

spec = importlib.util.spec_from_file_location("nano_deepseek", SCRIPT)
assert spec is not None and spec.loader is not None
nano = importlib.util.module_from_spec(spec)
sys.modules["nano_deepseek"] = nano
spec.loader.exec_module(nano)

greedy = partial(nano.sample, temperature=0, top_p=1.0, generator=None)


def v3_case(index: int) -> Case:
    """A drawn case with what every DeepSeek-V3 has: no attention bias, interleaved RoPE."""
    case = draw_case("deepseek_v3", index)
    case.config.attention_bias = False
    case.config.rope_interleave = True
    return case


CASES = [v3_case(index) for index in range(COUNTS["deepseek_v3"])]
WITH_MTP = [case for case in CASES if case.mtp]


def saved(case: Case, folder: Path) -> Oracle:
    """transformers' model of `case`, saved in the released layout with a tokenizer next to it."""
    oracle = build(case)
    save(oracle, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINNOW / name, folder)
    return oracle


def drawn_ids(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.randint(0, case.config.vocab_size, (TOKENS,), generator=generator)


@torch.no_grad()
def nano_logits(model: nano.DeepseekV3, ids: Tensor, *sizes: int, absorbed: bool) -> Tensor:
    """Logits of `ids` [T, vocab], in forward passes of `sizes` tokens over one cache."""
    latents, outputs, start = nano.LatentCache(model, len(ids)), [], 0
    for part in ids.split(list(sizes)):
        outputs.append(model.logits(model(part, start, latents, absorbed)))
        start += len(part)
    return torch.cat(outputs)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest logit where that is above 1."""
    assert found.shape == expected.shape
    assert expected.abs().max() > 0.1
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()


@pytest.mark.parametrize("case", slow_except(CASES[:6], CASES), ids=lambda case: case.name)
def test_logits(case: Case, tmp_path: Path) -> None:
    """Equal to transformers and to the product; absorbed equal to expanded, cached to uncached."""
    oracle, ids = saved(case, tmp_path), drawn_ids(case)
    model = nano.load(tmp_path)
    found = nano_logits(model, ids, TOKENS, absorbed=False)
    assert difference(found, oracle.logits(ids, torch.arange(TOKENS))) < TOLERANCE
    product = lowlat.load(tmp_path, dtype="fp32").logits(ids.tolist())
    assert difference(found, product) < TOLERANCE
    for absorbed, sizes in itertools.product((False, True), ((23,), (11, 1, 1, 3, 7), (1,) * 23)):
        again = nano_logits(model, ids, *sizes, absorbed=absorbed)
        assert difference(again, found) < TOLERANCE, (absorbed, sizes)


@torch.no_grad()
@pytest.mark.parametrize("case", WITH_MTP, ids=lambda case: case.name)
def test_mtp_logits(case: Case, tmp_path: Path) -> None:
    """Every MTP depth, from checkpoints with and without copies of embedding and head."""
    oracle, ids = saved(case, tmp_path), drawn_ids(case)
    model = nano.load(tmp_path)
    latents = nano.LatentCache(model, TOKENS)
    hidden, found = model(ids, 0, latents, False), []
    for depth in range(case.mtp):
        hidden = model.mtp(hidden[:-1], ids[depth + 1 :], 0, latents, depth)
        found.append(model.logits(hidden))
    product = lowlat.load(tmp_path, dtype="fp32").mtp_logits(ids.tolist())
    reference = oracle.mtp_logits(ids, torch.arange(TOKENS))
    for ours, theirs, transformers in zip(found, product, reference, strict=True):
        assert difference(ours, theirs) < TOLERANCE
        assert difference(ours, transformers) < TOLERANCE


def test_the_draw_covers_every_rule() -> None:
    """YaRN of both kinds, negative biases, groups, both query projections."""
    seen: Counter[str] = Counter()
    for case in CASES:
        config, rope = case.config, case.config.rope_parameters
        seen[f"rope {rope['rope_type']}"] += 1
        seen[f"q_lora {config.q_lora_rank is not None}"] += 1
        seen[f"groups {config.n_group > config.topk_group}"] += 1
        seen[f"norm {config.norm_topk_prob}"] += 1
        seen[f"tied {config.tie_word_embeddings}"] += 1
        seen[f"mtp {case.mtp > 0}"] += 1
        if rope["rope_type"] == "yarn":
            assert rope["factor"] > 1
            seen[f"mscales equal {rope['mscale'] == rope.get('mscale_all_dim')}"] += 1
        if case.bias_shift < 0:
            seen["negative biases"] += 1
    claims = ("q_lora", "groups", "norm", "tied", "mtp", "mscales equal")
    expected = {f"{claim} {value}" for claim in claims for value in (False, True)}
    assert set(seen) == expected | {"rope default", "rope yarn", "negative biases"}
    assert min(seen.values()) >= 2, seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rotation_far_from_the_beginning(case: Case) -> None:
    """Frequencies of transformers to the bit; both YaRN corrections at position 59,999."""
    oracle = build(case).model.get_decoder()
    raw = case.config.to_dict()
    rope = raw["rope_parameters"]
    fields = nano.Config.__dataclass_fields__
    known = {name: value for name, value in raw.items() if name in fields}
    scaling = rope if rope["rope_type"] == "yarn" else None
    known |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    config = nano.Config(**known)
    assert torch.equal(nano.rope_frequencies(config), oracle.rotary_emb.inv_freq)
    scale = nano.yarn_corrections(config)[1] / math.sqrt(config.qk_nope_head_dim + rope_dim(config))
    assert scale == pytest.approx(oracle.layers[0].self_attn.scaling, rel=1e-12)
    # The first channel of a pair (1, 0) becomes the cosine, the second the sine.
    x = torch.tensor([1.0, 0.0]).repeat(1, 1, rope_dim(config) // 2)
    rotated = nano.rotate(x, 59_999, config)[0, 0]
    cos, sin = oracle.rotary_emb(torch.zeros(1), torch.tensor([[59_999]]))
    pairs = rope_dim(config) // 2
    torch.testing.assert_close(rotated[0::2], cos[0, 0, :pairs], rtol=0, atol=1e-6)
    torch.testing.assert_close(rotated[1::2], sin[0, 0, :pairs], rtol=0, atol=1e-6)


def rope_dim(config: nano.Config) -> int:
    return config.qk_rope_head_dim


def test_v3_corrections() -> None:
    """The released values: 1 on cos and sin, 1.874 on the softmax scale."""
    raw = json.loads((MINNOW / "config.json").read_text())
    raw["rope_scaling"] = {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }
    fields = nano.Config.__dataclass_fields__
    config = nano.Config(**{name: value for name, value in raw.items() if name in fields})
    rotation, softmax = nano.yarn_corrections(config)
    assert rotation == 1.0
    assert softmax == pytest.approx(1.874, abs=5e-4)


def test_ties_go_to_the_lowest_expert() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert nano.top(scores, 3).tolist() == [[1, 2, 4]]


def test_fp8_blocks_cut_at_the_edges() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(277, 131, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=generator)
    found = nano.dequantize(weight, scale, [128, 128])
    expected = dequantize_blocks(weight, scale, (128, 128), torch.float32)
    assert torch.equal(found, expected)


def test_shards(tmp_path: Path) -> None:
    """Weights and their FP8 scales in different shards, named by the index."""
    tensors = load_file(MINNOW / "model.safetensors")
    where = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        save_file(
            {name: tensors[name] for name in tensors if where[name] == shard}, tmp_path / shard
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    shutil.copy(MINNOW / "config.json", tmp_path)
    whole, sharded = nano.load(MINNOW).state_dict(), nano.load(tmp_path).state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in whole.items())


def test_routing_bias_stays_fp32() -> None:
    tensors = nano.load(MINNOW, torch.bfloat16).state_dict()
    biases = {name for name in tensors if name.endswith("e_score_correction_bias")}
    assert len(biases) == 8  # 7 MoE layers and the MTP module
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name in biases else torch.bfloat16), name


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "deepseek_v2"},
        {"attention_bias": True},
        {"rope_interleave": False},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_models_are_refused(changes: dict, tmp_path: Path) -> None:
    raw = json.loads((MINNOW / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="not a configuration of DeepSeek-V3"):
        nano.Config.from_folder(tmp_path)


@cache
def minnow() -> nano.DeepseekV3:
    return nano.load(MINNOW)


def test_bundled_model_logits() -> None:
    product = lowlat.load("minnow", dtype="fp32")
    ids = product.tokenizer.encode(" ".join(PROMPTS))
    found = nano_logits(minnow(), torch.tensor(ids), len(ids), absorbed=True)
    assert difference(found, product.logits(ids)) < TOLERANCE


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_mtp_decoding_gives_the_same_tokens(temperature: float) -> None:
    """Drafts change the number of forward passes alone, sampled with the same seed or greedy."""
    outputs = []
    for decode in (nano.generate, nano.speculate):
        generator = torch.Generator().manual_seed(3)
        choose = partial(nano.sample, temperature=temperature, top_p=0.9, generator=generator)
        outputs.append(list(decode(minnow(), [17, 300, 5, 1021], 41, choose)))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 41


def test_mtp_decoding_saves_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    forward = nano.DeepseekV3.forward

    def counted(self: nano.DeepseekV3, *arguments: object, **options: object) -> Tensor:
        calls["forward"] += 1
        return forward(self, *arguments, **options)

    monkeypatch.setattr(nano.DeepseekV3, "forward", counted)
    ids = lowlat.load("minnow").tokenizer.encode(PROMPTS[0])
    list(nano.speculate(minnow(), ids, 60, greedy))
    assert calls["forward"] < 50


def test_sampling() -> None:
    """Hand-computed: top-p keeps the fewest likeliest tokens that reach the mass."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    draws = Counter(nano.sample(logits, 1.0, 0.6, generator) for _ in range(800))
    assert set(draws) == {1, 2}
    assert draws[1] / 800 == pytest.approx(0.5 / 0.8, abs=0.05)
    assert {nano.sample(logits, 0.01, 1.0, generator) for _ in range(50)} == {1}
    assert greedy(logits) == 1


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_command_prints_the_text_of_lowlat_generate(prompt: str) -> None:
    """Greedy text of the bundled model: this file, with and without MTP, and the product."""
    options = ["--prompt", prompt, "--max-tokens", "40"]
    command = [sys.executable, str(SCRIPT), str(MINNOW), *options]
    texts = {run(command), run([*command, "--mtp"])}
    texts.add(run([sys.executable, "-m", "lowlat", "generate", "minnow", "--raw", *options]))
    assert len(texts) == 1, texts


@pytest.mark.slow
def test_command_takes_token_ids() -> None:
    command = [sys.executable, str(SCRIPT), str(MINNOW), "--ids", "17", "300", "--max-tokens", "5"]
    assert len(run(command).split()) == 5


def run(command: list[str]) -> str:
    done = forked.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_file_stays_short() -> None:
    """At most 500 lines, and nothing but PyTorch, safetensors and, for text, tokenizers."""
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 500
    assert "lowlat." not in text.replace("examples/nano_deepseek.py lowlat/models", "")
