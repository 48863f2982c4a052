"""The native step against the PyTorch modules: whole models, drawn configs, mixed batches.

Batch invariance of its bits: test_step_batch_invariance.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowlat.attention.cache import PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import DECODE_TOKENS, AttentionPath
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.model import ModelConfig
from lowlat.model.linear import Linear
from lowlat.model.native import NativeModel, supports_native
from lowlat.model.quant import store_packed
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from tests.parameters import slow_except
from tests.parity.draw import SPARSE_FAMILIES, Case, all_cases

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

PAGE_SIZE = 16
TABLES = (tuple(range(20, 0, -2)), tuple(range(21, 41, 3)), tuple(range(1, 20, 2)))
"""Pages of three sequences, scattered and out of order."""
STEPS = (
    ((0, 0, 29), (1, 0, 5)),
    ((0, 29, 1), (2, 0, 70)),
    ((0, 30, 7), (2, 70, 1), (1, 5, 1)),
    ((2, 71, 19),),
)
"""(sequence, start, length) of each step: prompts, decoding and several tokens at once, mixed."""
Steps = Sequence[tuple[int, int, int]]
DENSE = [case for case in all_cases() if case.family not in SPARSE_FAMILIES]
SPARSE = [
    case
    for case in all_cases()
    if case.name in ("deepseek_v32-3", "deepseek_v32-6", "glm_moe_dsa-2", "glm_moe_dsa-8")
]
"""With choices of 23 and 40 tokens: near ties of fewer fall either way. The last two share them."""
CASES = {case.name: case for case in [*DENSE[::3], *SPARSE]}
FEW = [CASES[name] for name in ("deepseek_v3-9", "deepseek_v2-5", "mistral-4", "glm_moe_dsa-2")]
"""MLA and a mixture, DeepSeek-V2's router, GQA with a window, DSA: what every level runs."""
RUNS = [(case, native.levels()[0]) for case in CASES.values()] + [
    (case, level) for level in native.levels()[1:] for case in FEW
]


def drawn_config(case: Case) -> ModelConfig:
    fields = case.config.to_dict() | {"model_type": case.family}
    for name in ("mtp_mlp_layer_types", "mtp_layer_types", "num_mtp_layers"):  # the oracle's own
        fields.pop(name, None)
    return replace(config_from_hf(fields, source=case.name), num_nextn_predict_layers=0)


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """bf16 weights of such size that every part of a layer counts."""
    model = Transformer(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * drawn)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * drawn)
            else:
                # Routers that decide firmly: near ties would fall either way.
                gain = 5.0 if name.endswith("gate.weight") else 1.2
                width = 1.0 if "embed" in name else gain / math.sqrt(parameter.shape[-1])
                parameter.copy_(width * drawn)
    return model


def new_cache(config: ModelConfig, dtype: torch.dtype) -> PagedCache:
    return PagedCache(config, num_pages=48, page_size=PAGE_SIZE, dtype=dtype)


def form_for(length: int, break_even: float) -> AttentionPath:
    """All three attention paths occur: decode, absorbed and expanded chunks."""
    if length > break_even:
        return "expanded"
    return "decode" if length <= DECODE_TOKENS else "absorbed"


def batch_of(step: Sequence[tuple[int, int, int]], break_even: float) -> AttentionBatch:
    slices = [
        SequenceSlice(pages=TABLES[s], start=start, length=n, path=form_for(n, break_even))
        for s, start, n in step
    ]
    return AttentionBatch.build(slices, page_size=PAGE_SIZE)


def ids_of(config: ModelConfig, step: Sequence[tuple[int, int, int]]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (3, 100), generator=generator)
    return torch.cat([ids[s, start : start + n] for s, start, n in step])


def plain_logits(model: Transformer, break_even: float) -> Tensor:
    cache = new_cache(model.config, model.embed_tokens.weight.dtype)
    rows = []
    for step in STEPS:
        batch = batch_of(step, break_even)
        backend = CachedAttention(cache, batch)
        rows.append(model.logits(model(ids_of(model.config, step), batch.positions, backend)))
    return torch.cat(rows).float()


def native_logits(
    model: NativeModel, break_even: float, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Of all tokens of STEPS, over a cache of `dtype`."""
    cache = new_cache(model.config, dtype)
    rows = []
    for step in STEPS:
        ids = ids_of(model.config, step)
        batch = batch_of(step, break_even)
        rows.append(model.step(ids, batch, cache, list(range(len(ids))))[1])
    return torch.cat(rows)


def check_near_to_fp32(
    model: Transformer,
    plain_of: Callable[[Transformer, float], Tensor],
    native_of: Callable[[NativeModel, float], Tensor],
    break_evens: Sequence[float],
) -> None:
    """Rounding moves both by the same amount from fp32; a token whose router has a near tie may
    jump in either, so typical tokens are compared in mixtures and all tokens in dense models."""
    assert supports_native(model)
    exact = Transformer(model.config, dtype=torch.float32)
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    compiled = NativeModel(model)
    for break_even in break_evens:
        reference = plain_of(exact, break_even)
        plain = distances(plain_of(model, break_even), reference)
        ours = distances(native_of(compiled, break_even), reference)
        assert ours.median() <= 1.4 * plain.median()
        assert ours.median() < 0.03
        if model.config.moe is None:
            assert ours.max() <= 2 * plain.max()


def distances(logits: Tensor, reference: Tensor) -> Tensor:
    """Per token, relative to the reference."""
    return (logits - reference).norm(dim=-1) / reference.norm(dim=-1)


every_level = pytest.mark.parametrize("level", native.levels(), indirect=True)
few_cases = pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "level"),
    RUNS,
    indirect=["level"],
    ids=[f"{level}-{case.name}" for case, level in RUNS],
)
@torch.inference_mode()
def test_logits_are_as_near_to_fp32_as_plain_bf16(case: Case, level: str) -> None:
    model = random_model(drawn_config(case), case.seed)
    check_near_to_fp32(model, plain_logits, native_logits, (0.0, 2.0, math.inf))


def with_modules(case: Case, *, has_copies: bool) -> ModelConfig:
    """Two MTP modules, each with its own embedding and head or with the model's."""
    return replace(drawn_config(case), num_nextn_predict_layers=2, mtp_copies=has_copies)


def ahead_of(config: ModelConfig, step: Sequence[tuple[int, int, int]], depth: int) -> Tensor:
    """Ids depth + 1 places after those of the step."""
    return ids_of(config, [(s, start + depth + 1, n) for s, start, n in step])


def drawn_states(config: ModelConfig, step: Sequence[tuple[int, int, int]], depth: int) -> Tensor:
    """Hidden states of the previous depth at the step's positions."""
    generator = torch.Generator().manual_seed(depth)
    states = torch.randn(3, 100, config.hidden_size, generator=generator)
    return torch.cat([states[s, start : start + n] for s, start, n in step]).bfloat16()


def plain_modules(model: Transformer, break_even: float) -> Tensor:
    """Logits of all modules in all steps."""
    config, dtype = model.config, model.embed_tokens.weight.dtype
    cache = new_cache(config, dtype)
    rows = []
    for step in STEPS:
        batch = batch_of(step, break_even)
        backend = CachedAttention(cache, batch)
        for depth in range(config.num_nextn_predict_layers):
            states = drawn_states(config, step, depth).to(dtype)
            ids = ahead_of(config, step, depth)
            hidden = model.mtp_hidden(depth, states, ids, batch.positions, backend)
            rows.append(model.mtp_logits(depth, hidden))
    return torch.cat(rows).float()


def native_modules(model: NativeModel, break_even: float, steps: Sequence[Steps] = STEPS) -> Tensor:
    config = model.config
    cache = new_cache(config, torch.bfloat16)
    rows = []
    for step in steps:
        batch = batch_of(step, break_even)
        for depth in range(config.num_nextn_predict_layers):
            states, ids = drawn_states(config, step, depth), ahead_of(config, step, depth)
            every = list(range(len(ids)))
            rows.append(model.step(ids, batch, cache, every, depth=depth, previous=states)[1])
    return torch.cat(rows)


@pytest.mark.slow
@every_level
@few_cases
@pytest.mark.parametrize("has_copies", [False, True])
@torch.inference_mode()
def test_modules_are_as_near_to_fp32_as_plain_bf16(
    case: Case, level: str, has_copies: bool
) -> None:
    model = random_model(with_modules(case, has_copies=has_copies), case.seed)
    check_near_to_fp32(model, plain_modules, native_modules, (0.0, 2.0))


@torch.inference_mode()
def test_only_mtp_modules_continue_from_hidden_states() -> None:
    """Regression: a step that reads uninitialized memory."""
    config = with_modules(FEW[0], has_copies=False)
    model = NativeModel(random_model(config, FEW[0].seed))
    batch, cache = batch_of(STEPS[0], 2.0), new_cache(config, torch.bfloat16)
    ids = ids_of(config, STEPS[0])
    hidden, _ = model.step(ids, batch, cache, [])
    for wrong in (hidden[:-1], hidden[:, :-1], hidden.float()):
        with pytest.raises((ValueError, TypeError)):
            model.step(ids, batch, cache, [], depth=0, previous=wrong.contiguous())


@every_level
@few_cases
@pytest.mark.parametrize("form", ["decode", "absorbed", "expanded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_bits_do_not_depend_on_how_a_text_is_cut(
    case: Case, level: str, form: AttentionPath, dtype: torch.dtype
) -> None:
    """Prefix caching, speculation and recomputation rest on this: cache entries and logits of one
    attention path are equal whether tokens come one by one, in chunks, or in one step."""
    config = drawn_config(case)
    model = NativeModel(random_model(config, case.seed))
    pages, length = tuple(range(7, 0, -1)), 90
    ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(2))

    def read(cuts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Logits and cache after steps of slices that end at the cuts."""
        cache, rows, start = new_cache(config, dtype), [], 0
        for step in cuts:
            starts = [start, *step[:-1]]
            slices = [
                SequenceSlice(pages=pages, start=first, length=last - first, path=form)
                for first, last in zip(starts, step, strict=True)
            ]
            batch = AttentionBatch.build(slices, page_size=PAGE_SIZE)
            wanted = list(range(step[-1] - start))
            rows.append(model.step(ids[start : step[-1]], batch, cache, wanted)[1])
            start = step[-1]
        return torch.cat(rows), torch.cat([each.flatten() for each in cache.tensors])

    logits, rows = read([[length]])
    for cuts in (
        [[end] for end in range(1, length + 1)],
        [[1], [3, 34], [61], [90]],
        [[33, 66, 90]],
        [[64], [65], [90]],
    ):
        own_logits, own_rows = read(cuts)
        assert torch.equal(own_rows, rows)
        assert torch.equal(own_logits, logits)


@torch.inference_mode()
def test_wanted_logits_are_in_the_requested_order() -> None:
    """A step of two calls: one decoded token, and a chunk of 70."""
    config = drawn_config(FEW[0])
    model = NativeModel(random_model(config, FEW[0].seed))
    step = STEPS[1]
    ids, batch = ids_of(config, step), batch_of(step, 80.0)
    wanted = [70, 0, 69, 3]

    def run(rows: list[int]) -> tuple[Tensor, Tensor]:
        return model.step(ids, batch, new_cache(config, torch.bfloat16), rows)

    (hidden, every_row), (same, some), (_, none) = run(list(range(71))), run(wanted), run([])
    assert torch.equal(same, hidden) and torch.equal(some, every_row[wanted])
    assert none.shape == (0, config.vocab_size)


def packed_and_plain(config: ModelConfig, seed: int, dtype: str) -> tuple[Transformer, Transformer]:
    """A random model packed as int8 or int4, and the bf16 model of its values.

    Scales of kv_b_proj are powers of two: it is multiplied before its scales are.
    """
    packed, plain = random_model(config, seed), random_model(config, seed)
    for model in (packed, plain):
        model.add_head()
    plain_linears = {name: m for name, m in plain.named_modules() if isinstance(m, Linear)}
    for name, linear in store_packed(packed, dtype).items():
        reference = plain_linears[name.removesuffix(".weight")]
        drawn = plain.embed_tokens.weight if name == "lm_head.weight" else reference.weight
        if linear.storage == "int8_rows":
            drawn = torch.randint(-127, 128, drawn.shape) / 256
            drawn[:, 0] = 127 / 256
            drawn[::3] /= 4
        for part, value in linear.pack(drawn.float()).items():
            setattr(linear, part, nn.Parameter(value, requires_grad=False))
        reference.weight.copy_(linear.dense_weight(torch.bfloat16))
    return packed, plain


@every_level
@few_cases
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@torch.inference_mode()
def test_packed_chunks_give_the_bits_of_bf16(case: Case, dtype: str, level: str) -> None:
    """Long chunks multiply by the values rounded to bf16, whatever they are stored in."""
    packed, plain = packed_and_plain(drawn_config(case), case.seed, dtype)
    assert supports_native(packed)
    logits = native_logits(NativeModel(packed), 0.0)
    assert logits.isfinite().all()
    assert torch.equal(logits, native_logits(NativeModel(plain), 0.0))


@every_level
@few_cases
@pytest.mark.parametrize("dtype", slow_except(["int4"], ["int8", "int4"]))
@torch.inference_mode()
def test_packed_logits_are_as_near_to_fp32_as_bf16(case: Case, dtype: str, level: str) -> None:
    """The GEMV path does not round the values to bf16."""
    config = drawn_config(case)
    packed, plain = packed_and_plain(config, case.seed, dtype)
    exact = Transformer(config, dtype=torch.float32)
    exact.add_head()
    state = {name: value.float() for name, value in plain.state_dict().items()}
    for name, linear in packed.named_modules():
        if isinstance(linear, Linear):
            state[f"{name}.weight"] = linear.dense_weight(torch.float32)
    exact.load_state_dict(state)
    reference = plain_logits(exact, 2.0)
    bf16 = distances(native_logits(NativeModel(plain), 2.0), reference)
    ours = distances(native_logits(NativeModel(packed), 2.0), reference)
    assert ours.median() <= 1.2 * bf16.median()
    assert ours.median() < 0.03
