"""Whole models of every family against transformers: same logits, same experts, in any form of
attention.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.attention.cache import PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.checkpoint.load import LoadedModel, load_model
from lowlat.model.moe import Gate
from lowlat.model.transformer import Transformer
from tests.packed_attention import PackedAttention

from .draw import MTP_FAMILIES, SPARSE_FAMILIES, Case, all_cases
from .oracle import Oracle, build, save

TOKENS = 23
TOLERANCE = 1e-4
CASES = all_cases()


@pytest.fixture
def pair(case: Case, tmp_path: Path) -> tuple[Oracle, LoadedModel]:
    """The oracle and what lowlat loads from the files it saved."""
    oracle = build(case)
    save(oracle, tmp_path)
    loaded = load_model(tmp_path)
    # transformers decides between longrope's factors by the last position of a call
    loaded.model.set_context(case.start + TOKENS)
    return oracle, loaded


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed + 1)
    ids = torch.randint(0, case.config.vocab_size, (TOKENS,), generator=generator)
    return ids, torch.arange(case.start, case.start + TOKENS)


def difference(mine: Tensor, reference: Tensor) -> float:
    assert mine.shape == reference.shape and mine.dtype == torch.float32
    assert reference.abs().max() > 0.1
    return (mine - reference).abs().max().item()


@contextmanager
def chosen_experts(model: nn.Module, kind: str, field: int) -> Iterator[dict[str, list[list[int]]]]:
    """What every gate of class `kind` chooses, sorted: the order within a token is nobody's
    contract.
    """
    chosen: dict[str, list[list[int]]] = {}
    hooks = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith(kind):

            def note(_: nn.Module, __: object, out: tuple, name: str = name) -> None:
                chosen[name.removeprefix("model.")] = out[field].sort(dim=-1).values.tolist()

            hooks.append(module.register_forward_hook(note))
    yield chosen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def packed_logits(model: Transformer, ids: Tensor, positions: Tensor) -> Tensor:
    return model.logits(model(ids, positions, PackedAttention([len(ids)])))


@torch.no_grad()
def cached_logits(
    model: Transformer, ids: Tensor, positions: Tensor, *, seed: int, break_even: float
) -> Tensor:
    """Random chunks over scattered pages of random size."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 3, 64])
    pages = list(range(30))
    rng.shuffle(pages)
    cache = PagedCache(model.config, num_pages=30, page_size=page_size, dtype=torch.float32)
    outputs, start = [], 0
    while start < len(ids):
        length = min(rng.choice([1, 1, 2, 5, 11]), len(ids) - start)
        form = "expanded" if length > break_even else "absorbed"
        item = SequenceSlice(pages=tuple(pages), start=start, length=length, path=form)
        batch = AttentionBatch.build([item], page_size=page_size)
        own = slice(start, start + length)
        backend = CachedAttention(cache, batch)
        outputs.append(model.logits(model(ids[own], positions[own], backend)))
        start += length
    return torch.cat(outputs)


def mtp_logits(model: Transformer, ids: Tensor, positions: Tensor) -> list[Tensor]:
    def backend(count: int) -> AttentionBackend:
        return PackedAttention([count])

    out = []
    with torch.no_grad():
        hidden = model(ids, positions, backend(len(ids)))
        for depth in range(model.config.num_nextn_predict_layers):
            count = len(ids) - depth - 1
            ahead = slice(depth + 1, None)
            # The oracle rotates by the position of the token ahead. Only distances count, but in
            # fp32 they are the same to the last bit only from the same positions.
            hidden = model.mtp_hidden(
                depth, hidden[:count], ids[ahead], positions[ahead], backend(count)
            )
            out.append(model.mtp_logits(depth, hidden))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_and_experts(case: Case, pair: tuple[Oracle, LoadedModel]) -> None:
    oracle, loaded = pair
    model, (ids, positions) = loaded.model, inputs(case)
    with chosen_experts(oracle.model, "TopkRouter", 2) as theirs:
        reference = oracle.logits(ids, positions)
    with chosen_experts(model, Gate.__name__, 0) as ours:
        mine = packed_logits(model, ids, positions)
    assert ours == theirs
    worst = difference(mine, reference)
    for break_even in (0.0, 2.0, math.inf):
        out = cached_logits(model, ids, positions, seed=case.seed, break_even=break_even)
        worst = max(worst, difference(out, reference))
    print(f"{case.name}: largest difference {worst:.2e}")  # shown by pytest -rP
    assert worst < TOLERANCE


WITH_MTP = [case for case in CASES if case.mtp]


@pytest.mark.parametrize("case", WITH_MTP, ids=lambda case: case.name)
def test_mtp_logits(case: Case, pair: tuple[Oracle, LoadedModel]) -> None:
    """Every depth, from weights in the released layout, with and without own embedding and head."""
    oracle, loaded = pair
    ids, positions = inputs(case)
    assert loaded.config.num_nextn_predict_layers == case.mtp
    assert loaded.config.mtp_copies == case.mtp_copies
    references = oracle.mtp_logits(ids, positions)
    mine = mtp_logits(loaded.model, ids, positions)
    worst = max(difference(a, b) for a, b in zip(mine, references, strict=True))
    print(f"{case.name}: largest difference {worst:.2e}")  # shown by pytest -rP
    assert worst < TOLERANCE


def test_the_draw_covers_every_rule() -> None:
    """Nobody's change of a seed may lose a feature from the comparison."""
    seen: Counter[str] = Counter()
    for case in CASES:
        config = case.config
        rope = config.rope_parameters
        seen[f"rope {rope['rope_type']}"] += 1
        seen[f"tied {config.tie_word_embeddings}"] += 1
        seen[f"start {case.start}"] += 1
        if rope["rope_type"] == "longrope":
            is_long = case.start + TOKENS > rope["original_max_position_embeddings"]
            seen[f"long factors {is_long}"] += 1
        if hasattr(config, "kv_lora_rank"):
            seen[f"q_lora {config.q_lora_rank is not None}"] += 1
            seen[f"mla bias {config.attention_bias}"] += 1
            if hasattr(config, "n_group"):
                seen[f"groups {config.n_group > 1}"] += 1
            seen[f"mtp {case.mtp} {case.mtp_copies if case.mtp else ''}"] += 1
            seen[f"odd hidden {config.hidden_size % 2}"] += 1
            seen[f"shift {case.bias_shift}"] += 1
            types = getattr(config, "mlp_layer_types", None) or []
            seen["dense after sparse"] += types[:2] == ["sparse", "dense"]
            if case.family in SPARSE_FAMILIES:
                topk = config.index_topk
                seen["top-k " + ("below" if topk < TOKENS else "above")] += topk != TOKENS
                seen["top-k at"] += topk == TOKENS
                seen["ties"] += config.index_n_heads < 3
                seen["shared choice"] += "shared" in getattr(config, "indexer_types", ())
            elif case.family in MTP_FAMILIES:
                seen[f"norm {config.norm_topk_prob}"] += 1
                seen[f"interleave {config.rope_interleave}"] += 1
            if rope["rope_type"] == "yarn":
                seen[f"equal {rope['mscale'] == rope.get('mscale_all_dim')}"] += 1
        else:
            seen[f"groups of heads {config.num_attention_heads > config.num_key_value_heads}"] += 1
            seen[f"window {getattr(config, 'sliding_window', None) is not None}"] += 1
    assert len(CASES) >= 50
    expected = {
        *(f"rope {kind}" for kind in ("default", "linear", "llama3", "yarn", "longrope")),
        *(f"start {start}" for start in (0, 1, 7001, 59999)),
        *(f"shift {shift}" for shift in (0.0, -0.2, -2.0)),
        "dense after sparse",
        *("top-k below", "top-k at", "top-k above", "ties", "shared choice"),
        *("mtp 0 ", "mtp 1 True", "mtp 1 False", "mtp 2 True", "mtp 2 False"),
        *("odd hidden 0", "odd hidden 1"),
    }
    for claim in (
        "long factors",
        "tied",
        "q_lora",
        "mla bias",
        "groups",
        "norm",
        "interleave",
        "equal",
        "groups of heads",
        "window",
    ):
        expected |= {f"{claim} True", f"{claim} False"}
    assert expected == set(seen), expected ^ set(seen)
    assert min(seen.values()) >= 2, seen
