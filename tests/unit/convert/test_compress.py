"""Compression to a smaller cache: its algebra is exact where nothing is dropped, its statistics and
predicted costs are what they say, its budget is kept and well spent.
"""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig
from lowlat.convert.compression.budget import STEP, EntryWidths
from lowlat.convert.compression.components import components, decouple
from lowlat.convert.compression.low_rank import (
    attention_tensors,
    factorize,
    rank_errors,
    weighted_target,
)
from lowlat.convert.compression.methods import METHODS, CompressionMethod, best_fold
from lowlat.convert.compression.plan import compressed_config
from lowlat.convert.compression.scratch import LayerScratch
from lowlat.convert.compression.statistics import LayerStatistics, read_attention, run_layers
from lowlat.convert.parameters.weights import Weights
from lowlat.model.gqa import GQA
from lowlat.model.mla import MLA
from lowlat.model.transformer import Transformer
from lowlat.ops.rope import RotaryEmbedding, apply_rope
from lowlat.utils.progress import SilentProgress
from tests.fakes import tiny_model
from tests.packed_attention import PackedAttention

from .models import CASES, IDS, LENGTH, compressed_model, model_config, weights_of, windows


def statistics_of(weights: Weights) -> list[LayerStatistics]:
    with SilentProgress().task("", 3, "items") as task:
        return list(run_layers(weights, windows(), torch.float32, task))


def outputs(attention: GQA | MLA, config: ModelConfig, x: Tensor, *, moves: bool = True) -> Tensor:
    width = config.attention_of(0).rope_dim
    rope = RotaryEmbedding(config.rope_of(0), width)(torch.arange(len(x)) * moves)
    return attention(x, rope, PackedAttention([len(x)]))


def original(weights: Weights) -> GQA:
    config = weights.config
    assert isinstance(config.attention, GQAConfig)
    module = GQA(config, config.attention, 0, dtype=torch.float64)
    prefix = "layers.0.self_attn."
    module.load_state_dict({n: weights.read(prefix + n) for n in module.state_dict()})
    return module


def compressed(
    weights: Weights, method: str | CompressionMethod, rotary: int
) -> tuple[MLA, ModelConfig]:
    """Layer 0 in fp64 with `rotary` channels that turn, all of the latent."""
    method = METHODS[method] if isinstance(method, str) else method
    own, statistics = read_attention(weights, 0), statistics_of(weights)[0]
    parts = method.components(own, statistics)
    rope = parts.priority.flatten().argsort(descending=True)[: rotary // 2]
    keys = decouple(parts, own, statistics, rope)
    rank = len(keys.nope) + own.v.shape[0] * own.v.shape[1]
    factors = factorize(method.target(own, statistics, keys), rank)
    source = weights.config.attention
    assert isinstance(source, GQAConfig)
    widths = [EntryWidths(latent=len(factors.down), rotary=rotary)] * 3
    config = compressed_config(weights.config, source, widths, [keys.frequencies] * 3, "standard")
    assert isinstance(config.attention, MLAConfig)
    padding = config.attention.qk_nope_head_dim - source.head_dim
    has_bias = source.qkv_bias
    tensors = attention_tensors(own, keys, factors, padding=padding, has_bias=has_bias)
    tensors["o_proj.weight"] = weights.read("layers.0.self_attn.o_proj.weight")
    if source.qkv_bias:
        tensors["o_proj.bias"] = torch.zeros(61, dtype=torch.float64)
    module = MLA(config, config.attention, 0, dtype=torch.float64)
    module.load_state_dict(tensors)
    return module, config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_nothing_dropped_is_nothing_changed(config: ModelConfig, method: str) -> None:
    """All components rope, every latent channel kept: the same attention, in another basis."""
    weights = weights_of(config)
    assert isinstance(config.attention, GQAConfig)
    module, new = compressed(weights, method, 16 * config.attention.num_key_value_heads)
    x = torch.randn(LENGTH, 61, dtype=torch.float64)
    expected = outputs(original(weights), config, x)
    torch.testing.assert_close(outputs(module, new, x), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_equal_frequencies_fold_without_loss(place: int, bias: bool) -> None:
    """One rotation for all of a fold is exact where its frequencies are the same."""
    weights = weights_of(model_config(bias=bias, rope=RopeConfig(rope_theta=1.0)))
    method = folds(16, 3, 48)[place]
    assert method.fold == 2**place
    module, new = compressed(weights, method, 48)
    x = torch.randn(LENGTH, 61, dtype=torch.float64)
    expected = outputs(original(weights), weights.config, x)
    torch.testing.assert_close(outputs(module, new, x), expected, rtol=2e-5, atol=2e-6)


def test_folds_gather_keys_in_fewer_components() -> None:
    """The wider the fold, the more of the keys its RoPE components hold. Each component has another
    of its fold's frequencies; with stride 2, every second one.
    """
    weights = weights_of(model_config())
    own, statistics = read_attention(weights, 0), statistics_of(weights)[0]
    held: list[float] = []
    for method in folds(16, 3, 48):
        parts = method.components(own, statistics)
        rope = parts.priority.flatten().argsort(descending=True, stable=True)[:8]
        frequencies = parts.frequencies.flatten()[rope].sort(descending=True).values
        torch.testing.assert_close(frequencies, own.frequencies)
        keys = parts.keys.flatten(0, 1)[rope]
        moments = torch.einsum("jx,xy,jy->j", keys, statistics.covariance.to(keys), keys.conj())
        held.append(float(moments.real.sum()))
    assert len(held) == 4 and held == sorted(held) and held[0] < 0.99 * held[-1]
    halved = folds(16, 3, 40)
    assert [method.fold for method in halved] == [2, 4, 8] and halved[0].stride == 2
    parts = halved[1].components(own, statistics)
    rope = parts.priority.flatten().argsort(descending=True, stable=True)[:4]
    found = parts.frequencies.flatten()[rope].sort(descending=True).values
    torch.testing.assert_close(found, own.frequencies[::2])


def folds(head_dim: int, groups: int, budget: int) -> list[CompressionMethod]:
    made = METHODS["transmla"].folded
    assert made is not None
    return made(head_dim, groups, budget)


@pytest.mark.parametrize(
    ("perplexities", "fold"), [((9, 8, 7, 6), 8), ((9, 8, 8.5, 6), 2), ((9, 9.5, 3, 3), 1)]
)
def test_folds_grow_until_one_is_worse(perplexities: tuple[float, ...], fold: int) -> None:
    found = iter(perplexities)
    with SilentProgress().task("", 4, "items") as task:
        best = best_fold(folds(16, 3, 48), lambda _: next(found), task)
    assert best.fold == fold


@pytest.mark.parametrize("method", ["transmla", "mha2mla"])
@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_what_stands_still_has_no_position(config: ModelConfig, method: str) -> None:
    """One pair turns; at position 0 it does not, and neither does the original."""
    weights = weights_of(config)
    module, new = compressed(weights, method, 2)
    x = torch.randn(LENGTH, 61, dtype=torch.float64)
    expected = outputs(original(weights), config, x, moves=False)
    found = outputs(module, new, x, moves=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_statistics_by_hand(config: ModelConfig) -> None:
    """One layer's averages, query by query and key by key, in fp64."""
    weights, ids = weights_of(config), windows()
    found = statistics_of(weights)[0]
    module, dims = original(weights), config.attention
    assert isinstance(dims, GQAConfig)
    norm = weights.read("layers.0.input_layernorm.weight")
    order = torch.arange(16)
    if config.rope_of(0).rope_interleave:
        order = order.view(8, 2).T.flatten()
    per_group = 6 // dims.num_key_value_heads
    frequencies = read_attention(weights, 0).frequencies
    inputs = 61 + dims.qkv_bias
    covariance, attended = torch.zeros(2, inputs, inputs, dtype=torch.float64)
    sensitivity = torch.zeros(6, dtype=torch.float64)
    queries = torch.zeros(6, 16, 16, dtype=torch.float64)
    rotation = torch.zeros(6, 8, dtype=torch.complex128)
    tables = RotaryEmbedding(config.rope_of(0), 16)(torch.arange(LENGTH))
    for window in ids:
        x = weights.read("embed_tokens.weight")[window]
        x = x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * norm
        q, k, v = (getattr(module, f"{n}_proj")(x).view(LENGTH, -1, 16).detach() for n in "qkv")
        x = torch.cat([x, x.new_ones(LENGTH, inputs - 61)], dim=1)
        covariance += x.T @ x
        turned = [
            apply_rope(part, tables, interleave=config.rope_of(0).rope_interleave)
            for part in (q, k)
        ]
        for head in range(6):
            group = head // per_group
            scores = turned[0][:, head] @ turned[1][:, group].T / 4
            scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
            attends = scores.softmax(-1)
            w_o = module.o_proj.weight[:, 16 * head : 16 * head + 16].detach()
            for n in range(LENGTH):
                moved = (v[:, group] - attends[n] @ v[:, group]) @ w_o.T
                own = attends[n] * moved.square().sum(-1)
                sensitivity[head] += own.sum()
                query = q[n, head][order]
                queries[head] += own.sum() * torch.outer(query, query)
                turned_by = torch.outer(n - torch.arange(LENGTH), frequencies)
                rotation[head] += attends[n].to(torch.complex128) @ torch.exp(1j * turned_by)
                attended += (x.T * attends[n]) @ x / 6
    tokens = ids.numel()
    close = {"rtol": 2e-4, "atol": 1e-5}
    torch.testing.assert_close(found.covariance, covariance / tokens, **close)
    torch.testing.assert_close(found.attended, attended / tokens, **close)
    torch.testing.assert_close(found.sensitivity, sensitivity / tokens, **close)
    torch.testing.assert_close(
        found.queries, queries / sensitivity[:, None, None], rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(found.rotation, rotation / tokens, **close)


@pytest.mark.parametrize("config", CASES[:2], ids=IDS[:2])
def test_what_writes_a_channel_is_as_large_as_what_reads_it(config: ModelConfig) -> None:
    """So that training moves both alike. Heads of 28 channels are padded to 32."""
    module, _ = compressed(weights_of(config), "weighted", 12)
    rows = module.kv_a_proj_with_mqa.weight.detach()
    latent = len(rows) - 12
    read = module.kv_b_proj.weight.detach().unflatten(0, (6, -1))
    queries = module.q_proj.weight.detach().unflatten(0, (6, -1))
    assert not read[:, 16:20].any() and not queries[:, 16:20].any()
    torch.testing.assert_close(
        _size(rows[:latent].T), _size(torch.cat([read[:, :16], read[:, 20:]], dim=1).flatten(0, 1))
    )
    queries = queries[:, 20:].transpose(0, 1)
    wider = (1 + 16 / 16) ** 0.5
    for pair in range(6):
        own = rows[latent:][[pair, pair + 6]], queries[[pair, pair + 6]] / wider
        torch.testing.assert_close(*(part.square().mean() for part in own))


def _size(columns: Tensor) -> Tensor:
    return columns.square().mean(0).sqrt()


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("inputs", [2, 3])
def test_statistics_come_back_from_a_file(tmp_path: Path, heads: int, inputs: int) -> None:
    """Wherever they lie in it: also at places that are no multiple of a complex number's size."""
    wide = torch.float64
    saved = LayerStatistics(
        covariance=torch.rand(inputs, inputs, dtype=wide),
        attended=torch.rand(inputs, inputs, dtype=wide),
        queries=torch.rand(heads, 2, 2, dtype=wide),
        sensitivity=torch.rand(heads, dtype=wide),
        rotation=torch.rand(heads, 1, dtype=torch.complex128),
        norms=torch.rand(heads, 1, dtype=wide),
        residual=0.3,
    )
    scratch = LayerScratch(tmp_path)
    scratch.save_statistics(3, saved)
    found = scratch.statistics(3)
    assert found.rotation.data_ptr() % 16 == 0
    for name, value in asdict(saved).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(found, name), value)
    assert found.residual == saved.residual


def test_factors_are_the_best_and_cost_what_they_say() -> None:
    weights = weights_of(model_config(bias=True))
    own, statistics = read_attention(weights, 0), statistics_of(weights)[0]
    method = METHODS["weighted"]
    parts = components(own, statistics, method.basis, method.priority, uses_mean_rotation=True)
    keys = decouple(parts, own, statistics, torch.tensor([1, 7, 20]))
    target = weighted_target(own, statistics, keys)

    def cost(approximation: Tensor) -> float:
        error = target.maps - approximation
        return float(torch.trace(target.metric @ error @ target.inputs @ error.T))

    generator = torch.Generator().manual_seed(3)
    costs = rank_errors(target)
    for rank in (1, 9, 30):
        factors = factorize(target, rank)
        best = cost(factors.up @ factors.down)
        assert best == pytest.approx(float(costs[rank]), rel=1e-6)
        size = torch.einsum("rx,xy,ry->r", factors.down, target.inputs, factors.down)
        torch.testing.assert_close(size, torch.ones_like(size))
        for part in ("up", "down"):
            changed = getattr(factors, part)
            noise = torch.randn(changed.shape, generator=generator, dtype=torch.float64)
            moved = {part: changed + 0.01 * changed.abs().mean() * noise}
            other = {"up": factors.up, "down": factors.down} | moved
            assert cost(other["up"] @ other["down"]) > best
    assert float(costs[0]) == pytest.approx(cost(torch.zeros_like(target.maps)))


def test_components_that_keep_their_mean_cost_less() -> None:
    """And those of a frequency that hardly turns cost next to nothing."""
    slow = model_config(rope=RopeConfig(rope_theta=1e9))
    weights = weights_of(slow)
    own, statistics = read_attention(weights, 0), statistics_of(weights)[0]
    method = METHODS["weighted"]
    with_mean, without = (
        components(
            own, statistics, method.basis, method.priority, uses_mean_rotation=keeps
        ).nope_error
        for keeps in (True, False)
    )
    assert (with_mean <= without + 1e-12).all()
    assert (with_mean[-1] < 1e-6 * without[-1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["standard", "free"])
@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_a_model(tmp_path: Path, config: ModelConfig, layout: str, method: str) -> None:
    """The cache keeps its budget, and the model made of the weights has the reported perplexity."""
    weights = weights_of(config)
    assert isinstance(config.attention, GQAConfig)
    row = config.attention.entry_dim
    if method == "mha2mla" and row // 2 < 2 * config.attention.num_key_value_heads + STEP:
        pytest.skip("every group needs a pair of channels that turn")
    new, report = compressed_model(weights, tmp_path, layout, method)
    attention = [new.config.attention_of(i) for i in range(3)]
    assert sum(a.entry_dim for a in attention) <= 3 * row // 2
    assert report.channels_before == row
    assert report.channels_after == sum(a.entry_dim for a in attention) / 3
    assert [layer.latent + layer.rotary for layer in report.layers] == [
        a.entry_dim for a in attention
    ]
    assert (new.config.model_type == "deepseek_v3") == (layout == "standard")
    model = Transformer(new.config, dtype=torch.float32)
    model.load_state_dict({name: new.read(name).float() for name in model.state_dict()})
    before = tiny_model(config, torch.float32)
    before.load_state_dict({n: weights.read(n).float() for n in before.state_dict()})
    for side, expected in ((before, report.perplexity_before), (model, report.perplexity_after)):
        backend = PackedAttention([LENGTH] * 4)
        ids = windows(4)
        with torch.no_grad():
            logits = side.logits(side(ids.flatten(), backend.positions(), backend))
        logits = logits.unflatten(0, (4, LENGTH))[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        assert float(loss.exp()) == pytest.approx(expected, rel=1e-4)
    assert all(layer.measured_deviation > 0 for layer in report.layers)
    is_weighed = layout == "free" and method == "weighted"
    assert all((layer.predicted_divergence is not None) == is_weighed for layer in report.layers)


def test_it_is_deterministic(tmp_path: Path) -> None:
    weights = weights_of(model_config())
    found = []
    for name in "ab":
        (tmp_path / name).mkdir()
        new, report = compressed_model(weights, tmp_path / name, "free")
        found.append((report, {n: new.read(n) for n in _names(new.config)}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


def _names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return list(Transformer(config).state_dict())


@pytest.mark.slow
def test_weighted_loses_least(tmp_path: Path) -> None:
    """On inputs of low rank, as those of trained models are."""
    weights = weights_of(model_config())
    embedding = weights.read("embed_tokens.weight")
    left, values, right = torch.linalg.svd(embedding, full_matrices=False)
    scales = 0.8 ** torch.arange(len(values), dtype=torch.float64)
    embedding.copy_(left @ (values * scales).diag() @ right)
    found: dict[str, float] = {}
    for method in METHODS:
        (tmp_path / method).mkdir()
        _, report = compressed_model(weights, tmp_path / method, "standard", method)
        found[method] = report.layers[0].measured_deviation
    assert min(found, key=lambda name: found[name]) == "weighted"
