"""Activation statistics of every projection on calibration text, for calibrated int8 and int4
quantization: E[x^2] (importance matrix) or E[x x^T].

The model runs layer by layer, as its weights are written. Memory holds a layer's attention, shared
experts and statistics, and one routed expert per thread. Windows of text and experts are computed
by single-threaded workers and summed in order, so results do not depend on the number of threads.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from lowlat.attention.flash import FlashAttention
from lowlat.config.model import ModelConfig
from lowlat.convert.compression.layer_runner import fast_dtype
from lowlat.convert.parameters.weights import Weights
from lowlat.model.block import DecoderLayer
from lowlat.model.linear import Linear, RMSNorm, scaled
from lowlat.model.mla import MLA
from lowlat.model.moe import MLP, MoE
from lowlat.model.rotary import RotaryEmbeddings
from lowlat.ops.calibrated_quantization import ActivationCovariance, Importance
from lowlat.ops.rope import RotaryTable
from lowlat.ops.routing import Routing
from lowlat.utils.progress import Task

WINDOWS = 16
"""Windows of text to measure on."""
MAX_COVARIANCE = 4096
"""Widest input whose covariance is measured; wider ones get mean squares. Its factorization takes
seconds, and grows with the third power.
"""
MAX_EXPERT_BYTES = 2**31
"""Most bytes of the covariances of a layer's routed experts; more experts get mean squares."""
EXPERTS = "mlp.experts."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
HEAD = "lm_head.weight"


def activation_windows(windows: Int[Tensor, "windows length"]) -> Int[Tensor, "few length"]:
    """WINDOWS of the calibration windows, evenly spread."""
    return windows[:: -(-len(windows) // WINDOWS)]


@final
class ActivationStatistics:
    """Statistics of the inputs of `weights`' projections on `windows` of text; one layer at a time
    is in memory, so ask for parameters in the order of layers.

    windows: None without calibration text. task: is advanced by the layers. dtype: of matrix
    products (default: the CPU's fastest). with_covariance: int8 needs mean squares only.
    """

    def __init__(
        self,
        weights: Weights,
        windows: Int[Tensor, "windows length"] | None,
        task: Task | None = None,
        dtype: torch.dtype | None = None,
        with_covariance: bool = True,
    ) -> None:
        self._weights, self._windows = weights, windows
        self._task, self._dtype = task, dtype or fast_dtype()
        self._with_covariance = with_covariance
        self._next, self._streams = 0, list[Tensor]()
        self._backends: list[FlashAttention] = []
        """Of each window: layers may share a choice of tokens (DSA)."""
        self._found: dict[str, Importance] = {}

    @torch.no_grad()
    def of(self, parameter: str, columns: int) -> Importance:
        """The importance of a projection's input channels. All 1 if it is not measured: without
        text, in MTP modules, and for experts that no token of the text reached.
        """
        wanted = self._layer_of(parameter)
        if self._windows is not None and wanted is not None:
            if wanted < self._next - 1:
                self._next = 0
            while self._next <= wanted:
                self._advance()
        return self._found.get(parameter, torch.ones(columns))

    def _layer_of(self, parameter: str) -> int | None:
        """The layer; the LM head is measured after the last one."""
        if parameter == HEAD:
            return self._weights.config.num_hidden_layers
        return int(parameter.split(".")[1]) if parameter.startswith("layers.") else None

    def _advance(self) -> None:
        assert self._windows is not None
        config, number, sums = self._weights.config, self._next, _Sums()
        if number == 0:
            embedding = self._weights.read("embed_tokens.weight")[self._windows].float()
            self._weights.release("embed_tokens.weight")
            self._streams = [scaled(window, config.scale_emb) for window in embedding]
            self._backends = [FlashAttention([len(window)]) for window in embedding]
        if number == config.num_hidden_layers:
            norm, with_covariance = self._final_norm(), self._with_covariance
            with _workers() as pool:
                for found in pool.map(
                    lambda x: _Moments.of(HEAD, norm(x), with_covariance=with_covariance),
                    self._streams,
                ):
                    sums.add({HEAD: found})
        else:
            rotary = RotaryEmbeddings(config)
            rope = rotary.of(number, rotary(torch.arange(self._windows.shape[1])))
            with _workers() as pool:
                layer = _Layer(
                    self._weights,
                    number,
                    self._dtype,
                    rope,
                    sums,
                    pool,
                    with_covariance=self._with_covariance,
                )
                self._streams = layer.advance(self._streams, self._backends)
            if self._task is not None:
                self._task.advance(1)
        self._next, self._found = number + 1, sums.statistics()

    def _final_norm(self) -> RMSNorm:
        config = self._weights.config
        norm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=torch.float32, factor=config.output_scale
        )
        norm.weight.data = self._weights.read("norm.weight").float()
        return norm


@dataclass(slots=True)
class _Moments:
    """Sums over tokens of one input."""

    names: list[str]
    """Weights of the projections that share it."""
    total: Tensor
    """Sums of x x^T, or of x^2."""
    tokens: int

    @classmethod
    def of(cls, name: str, x: Float[Tensor, "tokens in"], *, with_covariance: bool) -> "_Moments":
        wide = x.float()
        if with_covariance and wide.shape[1] <= MAX_COVARIANCE:
            return cls([name], wide.T @ wide, len(x))
        return cls([name], wide.square().sum(0), len(x))


Found = dict[str, _Moments]
"""By the first of the names."""


@final
class _Sums:
    """Sums over all windows."""

    def __init__(self) -> None:
        self._sums: Found = {}

    def add(self, found: Found) -> None:
        for name, moments in found.items():
            if name in self._sums:
                self._sums[name].total += moments.total
                self._sums[name].tokens += moments.tokens
            else:
                self._sums[name] = moments

    def statistics(self) -> dict[str, Importance]:
        """By weight. Inputs that are not finite are left out: scales cannot depend on them."""
        result: dict[str, Importance] = {}
        for moments in self._sums.values():
            mean = moments.total / moments.tokens
            if bool(mean.isfinite().all()):
                own = mean if mean.dim() == 1 else ActivationCovariance(mean)
                result |= dict.fromkeys(moments.names, own)
        return result


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as PyTorch has, each of which splits no operation."""
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)  # also the default of threads that start later


@final
class _Layer:
    """Decoder layer `number`; routed experts are read when they run."""

    def __init__(
        self,
        weights: Weights,
        number: int,
        dtype: torch.dtype,
        rope: RotaryTable,
        sums: _Sums,
        pool: ThreadPoolExecutor,
        *,
        with_covariance: bool,
    ) -> None:
        self._weights, self._prefix, self._dtype = weights, f"layers.{number}.", dtype
        self._rope, self._sums, self._pool = rope, sums, pool
        with torch.device("meta"):
            self._layer = DecoderLayer(weights.config, number, dtype=dtype)
        own = [name for name in self._layer.state_dict() if not name.startswith(EXPERTS)]
        state = {name: self._read(name) for name in own}
        if isinstance(self._layer.mlp, MoE):
            self._layer.mlp.experts = nn.Module()
        self._layer.load_state_dict(state, assign=True)
        self._layer.requires_grad_(False)
        self._inputs = _RecordedInputs(self._layer, self._prefix, with_covariance=with_covariance)
        self._of_experts = with_covariance and _expert_bytes(weights.config) <= MAX_EXPERT_BYTES

    def advance(self, streams: list[Tensor], backends: list[FlashAttention]) -> list[Tensor]:
        """The residual streams after the layer; adds the statistics of its projections."""
        middle = self._measured(self._attend, streams, backends)
        mlp = self._layer.mlp
        normed = [self._layer.post_attention_layernorm(x).to(self._dtype) for x in middle]
        if isinstance(mlp, MoE):
            routings = list(self._pool.map(mlp.gate, normed))
            added = self._routed(torch.cat(normed), routings)
            if mlp.shared_experts is not None:
                shared = self._measured(mlp.shared_experts, normed)
                added = added + torch.cat(shared).float()
            if mlp.post_mlp_layernorm is not None:
                added = mlp.post_mlp_layernorm(added)
            outputs = list(added.split(len(middle[0])))
        else:
            outputs = self._measured(mlp, normed)
        factor = self._layer.residual_scale
        return [x + scaled(out.float(), factor) for x, out in zip(middle, outputs, strict=True)]

    def _attend(
        self, x: Float[Tensor, "length hidden"], backend: FlashAttention
    ) -> Float[Tensor, "length hidden"]:
        layer = self._layer
        normed = layer.input_layernorm(x).to(self._dtype)
        added = layer.self_attn(normed, self._rope, backend)
        return x + scaled(added.float(), layer.residual_scale)

    def _measured(
        self, function: Callable[..., Tensor], windows: list[Tensor], *further: list[Any]
    ) -> list[Tensor]:
        """The function of every window and of what `further` lists have for it; adds the statistics
        of the inputs that it records.
        """

        def run(*inputs: Any) -> tuple[Tensor, Found]:
            return self._inputs.during(lambda: function(*inputs))

        outputs: list[Tensor] = []
        for out, found in self._pool.map(run, windows, *further):
            outputs.append(out)
            self._sums.add(found)
        return outputs

    def _routed(
        self, x: Float[Tensor, "tokens hidden"], routings: list[Routing]
    ) -> Float32[Tensor, "tokens hidden"]:
        """Weighted sum of the routed experts' outputs, in order of expert id."""
        chosen = torch.cat([routing.experts for routing in routings])
        factors = torch.cat([routing.weights for routing in routings])

        def run(expert: int) -> tuple[Tensor, Tensor, Found]:
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            out, found = self._expert(expert, x[tokens])
            return tokens, out.float() * factors[tokens, places, None], found

        added = torch.zeros(x.shape, dtype=torch.float32)
        for tokens, out, found in self._pool.map(run, chosen.unique().tolist()):
            added.index_add_(0, tokens, out)
            self._sums.add(found)
        return added

    def _expert(self, expert: int, rows: Tensor) -> tuple[Tensor, Found]:
        config, name = self._weights.config, f"{EXPERTS}{expert}."
        assert config.moe is not None
        with torch.device("meta"):
            mlp = MLP(config.hidden_size, config.moe.moe_intermediate_size, dtype=self._dtype)
        names = [f"{each}.weight" for each in PROJECTIONS]
        mlp.load_state_dict({each: self._read(name + each) for each in names}, assign=True)
        mlp.requires_grad_(False)  # no_grad does not reach other threads
        recorded = _RecordedInputs(mlp, self._prefix + name, with_covariance=self._of_experts)
        return recorded.during(lambda: mlp(rows))

    def _read(self, name: str) -> Tensor:
        """A tensor in the dtype of products; norms, routers and biases in fp32."""
        dtype = self._dtype if name.endswith("_proj.weight") else torch.float32
        tensor = self._weights.read(self._prefix + name).to(dtype, copy=True)
        self._weights.release(self._prefix + name)
        return tensor


def _expert_bytes(config: ModelConfig) -> int:
    """Bytes of the covariances of a layer's routed experts."""
    if config.moe is None:
        return 0
    widths = config.hidden_size, config.moe.moe_intermediate_size
    return 4 * config.moe.n_routed_experts * sum(width**2 for width in widths)


@final
class _RecordedInputs:
    """Hooks that record the inputs of all projections below a module, per thread."""

    def __init__(self, module: nn.Module, prefix: str, *, with_covariance: bool) -> None:
        self._local = threading.local()
        self._with_covariance = with_covariance
        for path, child in module.named_modules():
            name = f"{prefix}{path}.weight"
            if isinstance(child, Linear):
                child.register_forward_pre_hook(self._recorder(name))
            elif isinstance(child, MLA):
                self._record_latent(child, f"{prefix}{path}.kv_b_proj.weight")

    def during(self, function: Callable[[], Tensor]) -> tuple[Tensor, Found]:
        """The result of `function`, and the statistics of the inputs while it ran."""
        self._local.found, self._local.last = {}, (None, None)
        return function(), self._local.found

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._record(name, args[0])

        return record

    def _record_latent(self, attention: MLA, name: str) -> None:
        """kv_b_proj is not called: it is absorbed. Its input is the latent of the cache entries."""
        rank, normed = attention.dims.kv_lora_rank, attention.dims.kv_a_layernorm

        def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self._record(name, out[..., :rank])

        source = attention.kv_a_layernorm if normed else attention.kv_a_proj_with_mqa
        source.register_forward_hook(record)

    def _record(self, name: str, x: Float[Tensor, "*tokens in"]) -> None:
        local = self._local
        before, moments = local.last
        if x is before:  # q, k and v, gate and up share their input
            moments.names.append(name)
            return
        moments = _Moments.of(name, x.flatten(0, -2), with_covariance=self._with_covariance)
        local.found[name], local.last = moments, (x, moments)
