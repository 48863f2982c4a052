"""Conversion to sparse attention: indexers distilled on text, resumed, evaluated, and refused."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.attention.flash import FlashAttention
from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.attention import sparse_topk
from lowlat.config.hf.writer import config_to_hf
from lowlat.convert.options import ConversionOptions, RecoveryOptions
from lowlat.convert.parameters.indexer import (
    IndexerOptions,
    init_indexer,
    measure_inputs,
    sparse_config,
)
from lowlat.convert.report import ConversionReport
from lowlat.model.mla import MLA
from lowlat.model.transformer import Transformer
from lowlat.ops.sparse_attention import index_scores
from lowlat.recovery import sparse
from lowlat.recovery.evaluation import read_evaluation_text
from lowlat.recovery.sparse_evaluation import (
    CODES,
    WINDOWS,
    SparseEvaluation,
    draw_needles,
    plan_evaluation,
    plant,
)
from lowlat.recovery.work_folder import work_folder_path
from lowlat.utils.errors import UserError
from tests import configs
from tests.configs import GQA
from tests.fakes import byte_tokenizer, gqa_config, mla_config
from tests.lowlat_configs import lowlat_config, random_model
from tests.unit.train.runs import stopped_after

from . import tiny

CONTEXT, TOPK = 160, 20
INDEXER = IndexerOptions(index_n_heads=3, index_head_dim=40, warmup=12 * CONTEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A GQA model, texts, and `whole`, its conversion without interruption."""
    path = tmp_path_factory.mktemp("sparse")
    attention = replace(GQA, head_dim=16)
    config = gqa_config(hidden_size=64, attention=attention, max_position_embeddings=CONTEXT)
    save_model(random_model(config, torch.float32), config, path / "source", source=None)
    byte_tokenizer().save(path / "source")
    (path / "train.txt").write_text(tiny.prose(500, seed=1))
    (path / "evaluate.txt").write_text(tiny.prose(60, seed=3))
    with pytest.MonkeyPatch.context() as patch:
        scale_down(patch)
        call(path, path / "whole")
        yield path


def scale_down(patch: pytest.MonkeyPatch) -> None:
    tiny.scale_down(patch)
    patch.setattr(sparse, "SEQUENCE_LENGTH", CONTEXT)


def call(folder: Path, dst: Path, **changes: Any) -> ConversionReport:
    recovery = RecoveryOptions(
        tokens=4 * CONTEXT, texts=(str(folder / "train.txt"),), evaluate=folder / "evaluate.txt"
    )
    own = {name: changes.pop(name) for name in list(changes) if hasattr(recovery, name)}
    sizes = {name: changes.pop(name) for name in list(changes) if hasattr(INDEXER, name)}
    return sparse.convert_to_sparse(
        changes.pop("src", folder / "source"),
        dst,
        indexer=replace(INDEXER, **sizes),
        recovery=replace(recovery, **own),
        **changes,
    )


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "conversion.json").read_text())


def test_a_converted_model(folder: Path) -> None:
    """Its indexers learned; weights outside of attention are the source's."""
    found, figures = load_model(folder / "whole"), report(folder / "whole")
    assert found.config.model_type == figures["model_type"] == "lowlat"
    assert "cannot express" in figures["model_type_reason"]
    assert sparse_topk(found.config.attention) == figures["indexer"]["index_topk"] == TOPK
    source, made = load_model(folder / "source").model.state_dict(), found.model.state_dict()
    kept = [name for name in source if ".self_attn." not in name]
    assert len(kept) > 8 and all(torch.equal(source[name], made[name]) for name in kept)
    layers = figures["warmup"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert all(layer["kl_last"] < layer["kl_first"] for layer in layers)
    assert figures["warmup"]["tokens"] == INDEXER.warmup
    assert figures["recovery"]["tokens"] == 4 * CONTEXT
    assert not work_folder_path(folder / "whole").exists()


def test_the_evaluation_is_of_original_and_written_model(folder: Path) -> None:
    """The original's perplexity does not move with recovery training; ratios are to it."""
    found = report(folder / "whole")["evaluation"]
    text = read_evaluation_text(folder / "evaluate.txt", byte_tokenizer())
    original, made = (load_model(folder / name, dtype="bf16") for name in ("source", "whole"))
    windows = [text.ids[place * CONTEXT :][: CONTEXT + 1] for place in range(WINDOWS)]
    assert (found["windows"], found["context"]) == (WINDOWS, CONTEXT)
    before = perplexity(original.model, windows)
    assert found["original"]["perplexity"] == pytest.approx(before, rel=5e-3)
    (row,) = found["index_topk"]
    assert row["index_topk"] == TOPK
    assert row["perplexity"] == pytest.approx(perplexity(made.model, windows), rel=5e-3)
    for each in (row, found["dense"]):
        assert each["ratio"] == each["perplexity"] / found["original"]["perplexity"]
        assert each["ratio_range"][0] < each["ratio"] < each["ratio_range"][1]
    assert row["ratio"] != found["dense"]["ratio"] != 1
    assert all(0 < recall < 1 for recall in row["recall"]) and len(row["recall"]) == 2
    assert [place["depth"] for place in found["needle"]] == [0, 0.25, 0.5, 0.75, 1]
    for place in found["needle"]:
        losses = [place[name]["loss"] for name in ("original", "dense", "sparse")]
        assert len(set(losses)) == 3


@pytest.mark.slow
def test_quantized_weights_are_evaluated_as_written(folder: Path, tmp_path: Path) -> None:
    call(folder, tmp_path / "dsa", dtype="int4", tokens=None)
    found = report(tmp_path / "dsa")["evaluation"]
    whole = report(folder / "whole")["evaluation"]
    assert found["original"] == whole["original"]
    assert abs(found["dense"]["ratio"] - 1) > 1e-3


@torch.no_grad()
def perplexity(model: Transformer, windows: list[Any]) -> float:
    losses = []
    for window in windows:
        ids = torch.from_numpy(window)
        attention = FlashAttention([CONTEXT])
        logits = model.logits(model(ids[:-1], attention.positions(), attention))
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[1:]))
    return float(torch.stack(losses).mean().exp())


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "reached"), [(6, "start"), (2, "recovered")])
def test_a_stopped_training_resumes(folder: Path, tmp_path: Path, steps: int, reached: str) -> None:
    """SIGINT within the warm-up, which saves every third step, and within recovery training, which
    saves each; the same call ends with the same bytes.
    """
    with stopped_after(steps, signal.SIGINT):
        call(folder, tmp_path / "dsa")
    assert (work_folder_path(tmp_path / "dsa") / reached).exists()
    call(folder, tmp_path / "dsa")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "dsa" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    again, whole = report(tmp_path / "dsa"), report(folder / "whole")
    assert again["evaluation"] == whole["evaluation"]
    assert again["warmup"]["layers"] == whole["warmup"]["layers"]


def test_other_options_are_not_resumed(folder: Path, tmp_path: Path) -> None:
    with stopped_after(6, signal.SIGINT):
        call(folder, tmp_path / "dsa")
    with pytest.raises(UserError, match=r"differs in its indexer .*index_topk None.*index_topk 9"):
        call(folder, tmp_path / "dsa", index_topk=9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warmup": 31}, "--warmup 31: is less than a sequence of 160 tokens"),
        ({"index_head_dim": 6, "index_rope_head_dim": 8}, "--index-rope-head-dim 8: must be even"),
        ({"index_rope_head_dim": 7}, "--index-rope-head-dim 7: must be even"),
        ({"index_rope_head_dim": 34}, "--index-rope-head-dim 34: .* qk_rope_head_dim 32"),
        ({"index_topk": 0}, "--index-topk 0: must be 1 to"),
        ({"index_n_heads": 10**11}, "--index-n-heads 100000000000: must be 1 to 1,024"),
        ({"index_head_dim": 1025}, "--index-head-dim 1025: must be 1 to 1,024"),
        ({"tokens": 31}, "--heal 31: is less than a sequence of 160 tokens"),
        ({"index_topk": 159, "evaluate": "short.txt"}, "short.txt: 150 tokens are no more than"),
        ({"texts": ()}, "--to dsa trains indexers on text; add --text"),
        ({"texts": ("nowhere",)}, "--text: source 'nowhere' does not exist"),
        ({"dtype": "int2"}, "--dtype 'int2' is unknown"),
    ],
)
def test_what_cannot_be_asked(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    if "evaluate" in changes:
        (tmp_path / "short.txt").write_text(tiny.prose(20, seed=3)[:150])
        changes = changes | {"evaluate": tmp_path / changes["evaluate"]}
    with pytest.raises(UserError, match=words) as caught:
        call(folder, tmp_path / "dsa", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "dsa").exists() and not work_folder_path(tmp_path / "dsa").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "dsa", "experts": 4}, "--to dsa does not support --experts"),
        ({"to": "dsa", "file_format": "gguf"}, "--to dsa does not support GGUF files"),
        ({"to": "mla", "indexer": IndexerOptions(warmup=5)}, "add --to dsa"),
        ({"to": "gqa"}, "--to 'gqa' is unknown; choose mla or dsa"),
    ],
)
def test_options_that_exclude_each_other(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    dst = tmp_path / ("x.gguf" if options.get("file_format") == "gguf" else "x")
    with pytest.raises(UserError, match=words):
        ConversionOptions(recovery=RecoveryOptions(texts=("a",)), **options).check(dst)


def test_gguf_files_are_refused_by_name(tmp_path: Path) -> None:
    options = ConversionOptions(to="dsa", recovery=RecoveryOptions(texts=("a",)))
    with pytest.raises(UserError, match="--to dsa does not support GGUF files"):
        options.check(tmp_path / "x.gguf")


def test_a_released_family_where_it_can_be_expressed() -> None:
    """With query latent and one rotary width; else lowlat's own, whose export is refused."""
    base = mla_config(num_nextn_predict_layers=0)
    found, reason = sparse_config(base, IndexerOptions(index_head_dim=16))
    assert found.model_type == "deepseek_v32" and reason == ""
    assert config_to_hf(found)["index_topk"] == sparse_topk(found.attention)
    attention = replace(configs.MLA, q_lora_rank=None)
    found, reason = sparse_config(replace(base, attention=attention), IndexerOptions())
    assert found.model_type == "lowlat" and "an indexer without query latent" in reason
    with pytest.raises(UserError, match=r"deepseek_v32.* cannot express an indexer without query"):
        config_to_hf(replace(found, model_type="deepseek_v32"))
    found, reason = sparse_config(base, IndexerOptions(index_head_dim=16, index_rope_head_dim=4))
    assert found.model_type == "lowlat" and "index_rope_head_dim 4" in reason


def test_models_without_indexers_to_add() -> None:
    flat = lowlat_config(replace(configs.MLA, qk_rope_head_dim=0))
    with pytest.raises(UserError, match=r"needs rotary channels .* has qk_rope_head_dim 0"):
        sparse_config(flat, IndexerOptions())
    with pytest.raises(UserError, match="--to dsa needs an MLA model; this one has GQA"):
        sparse_config(gqa_config(), IndexerOptions())
    sparse_model, _ = sparse_config(mla_config(), IndexerOptions())
    with pytest.raises(UserError, match="has indexers already"):
        sparse_config(sparse_model, IndexerOptions())


@pytest.mark.parametrize("kind", ["latent", "converted"])
def test_initial_indexers_find_attention(kind: str) -> None:
    """The index scores of an initial indexer follow the mean attention logits of the layer, of
    decoupled RoPE and of a shared key of several groups.
    """
    torch.manual_seed(2)
    attention = replace(configs.MLA, q_lora_rank=None, num_attention_heads=4, kv_lora_rank=17)
    if kind == "converted":
        attention = replace(attention, qk_nope_head_dim=0, qk_rope_head_dim=12)
    config = lowlat_config(attention, hidden_size=48)
    if kind == "converted":
        factors = (1.0, 3.0, 9.0)
        rope = replace(config.rope, rope_type="longrope", pair_factors=factors * 2)
        config = replace(config, rope=replace(rope, original_max_position_embeddings=512))
    dense = random_model(config, torch.float32)
    dense.embed_tokens.weight.data += torch.randn(48)  # as trained models have a mean
    made, _ = sparse_config(config, IndexerOptions(index_n_heads=4, index_head_dim=16))
    model = Transformer(made).requires_grad_(False)
    model.load_state_dict(dense.state_dict(), strict=False)
    ids = torch.randint(config.vocab_size, (4, 64))
    inputs = measure_inputs(dense.requires_grad_(False), ids)
    layer = next(module for module in model.modules() if isinstance(module, MLA))
    assert layer.indexer is not None
    init_indexer(layer.indexer, layer, inputs[0], seed=0)
    x = model.layers[0].input_layernorm(model.embed_tokens(ids[0]))
    rope_table = model.rotary.of(0, model.rotary(torch.arange(64)))
    q_nope, q_rope = layer.queries(x, rope_table)
    entries = layer.latent_entries(x, rope_table)
    w_uk, _ = layer.up_projections(torch.float32)
    latent, k_rope = entries.split([17, entries.shape[1] - 17], dim=-1)
    logits = torch.einsum("qhn,hnc,kc->hqk", q_nope, w_uk, latent)
    logits = layer.scale * (logits + torch.einsum("qhr,kr->hqk", q_rope, k_rope))
    found = index_scores(layer.indexer.queries(x, x, rope_table), layer.indexer.keys(x, rope_table))
    seen = torch.ones(64, 64).tril().bool()
    pair = torch.stack([found[seen], logits.relu().mean(dim=0)[seen]])
    assert torch.corrcoef(pair)[0, 1] > 0.5


def test_needles_are_planted_at_their_depths() -> None:
    tokenizer = byte_tokenizer()
    needles = draw_needles(tokenizer)
    answers = {tokenizer.decode(needle.answer.tolist()) for needle in needles}
    assert len(answers) == CODES and all(re.fullmatch("( [0-9]){6}", one) for one in answers)
    filler = torch.arange(100).numpy() % 7
    for needle, depth in zip(needles, (0.0, 0.5, 1.0), strict=True):
        ids = plant(filler, needle, depth, 400)
        text, answer = tokenizer.decode(ids.tolist()), tokenizer.decode(needle.answer.tolist())
        assert len(ids) == 400 and text.count(f"The secret code of the vault is{answer}") == 2
        assert text.endswith(f"The secret code of the vault is{answer}")
        place = text.index("\nThe secret code")
        assert place == round(depth * (400 - sum(map(len, needle))))
    with pytest.raises(UserError, match="a context of 40 tokens has no room for the needle"):
        plant(filler, needles[0], 0.5, 40)


def test_evaluations_of_what_a_text_allows(tmp_path: Path) -> None:
    """A top-k of the whole context is valid: its row is dense. A text may be shorter than it."""
    (tmp_path / "text").write_text(tiny.prose(60, seed=3)[:1000])
    tokenizer = byte_tokenizer()
    text = read_evaluation_text(tmp_path / "text", tokenizer)
    base = mla_config(max_position_embeddings=256)

    def plan(context: int, **options: Any) -> SparseEvaluation:
        config = replace(base, max_position_embeddings=context)
        return plan_evaluation(text, sparse_config(config, IndexerOptions(**options))[0], tokenizer)

    found = plan(256, index_topk=256)
    assert found.all_topk == [256] and found.windows.shape == (3, 257)
    assert (found.windows[1:, 0] == found.windows[:-1, -1]).all()
    assert plan(4096, index_topk=300).all_topk == [256, 300, 512]
    assert plan(4096, index_topk=300).windows.shape == (1, 1000)
    with pytest.raises(UserError, match="1000 tokens are no more than index_topk 999; give more"):
        plan(4096, index_topk=999)
    with pytest.raises(UserError, match="a context of 60 tokens has no room for the needle"):
        plan(60)
