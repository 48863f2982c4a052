"""Mean squares of the activations that enter every projection: the importance matrix (imatrix) of
int8 and int4 quantization.

The model runs layer by layer on calibration text, with the attention, shared experts and one routed
expert per thread in memory. Windows of text and experts are computed by single-threaded workers and
summed in order, so the results do not depend on the number of threads.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from lowlat.attention.flash import FlashAttention
from lowlat.convert.compression.layer_runner import fast_dtype
from lowlat.convert.parameters.weights import Weights
from lowlat.model.block import DecoderLayer
from lowlat.model.linear import Linear, RMSNorm, scaled
from lowlat.model.mla import MLA
from lowlat.model.moe import MLP, MoE
from lowlat.model.rotary import RotaryEmbeddings
from lowlat.ops.rope import RotaryTable
from lowlat.ops.routing import Routing
from lowlat.utils.progress import Progress

WINDOWS = 16
"""Windows of text to measure on."""
EXPERTS = "mlp.experts."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Importance = Mapping[str, Float32[Tensor, " in"]]
"""E[x^2] per input channel, by the name of a projection's weight; projections that no token of the
calibration text reached are missing.
"""


def activation_windows(windows: Int[Tensor, "windows length"]) -> Int[Tensor, "few length"]:
    """WINDOWS of the calibration windows, evenly spread."""
    return windows[:: -(-len(windows) // WINDOWS)]


def importance_digest(importance: Importance) -> str:
    """A short hash, to resume a conversion only with the same importance."""
    digest = hashlib.sha256()
    for name in sorted(importance):
        digest.update(name.encode() + importance[name].numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def measure_activations(
    weights: Weights,
    windows: Int[Tensor, "windows length"],
    progress: Progress,
    dtype: torch.dtype | None = None,
) -> Importance:
    """The importance of all projections of the decoder layers and of the LM head.

    dtype: of matrix products (default: the CPU's fastest). MTP modules are not measured.
    """
    config, dtype = weights.config, dtype or fast_dtype()
    embedding = weights.read("embed_tokens.weight")[windows].float()
    weights.release("embed_tokens.weight")
    streams = [scaled(window, config.scale_emb) for window in embedding]
    rotary = RotaryEmbeddings(config)
    table = rotary(torch.arange(windows.shape[1]))
    sums = _Sums()
    with (
        progress.task("Measuring activations", config.num_hidden_layers, "items") as task,
        _workers() as pool,
    ):
        for number in range(config.num_hidden_layers):
            layer = _Layer(weights, number, dtype, rotary.of(number, table), sums, pool)
            streams = layer.advance(streams)
            task.advance(1)
    norm = RMSNorm(
        config.hidden_size, config.rms_norm_eps, dtype=torch.float32, factor=config.output_scale
    )
    norm.weight.data = weights.read("norm.weight").float()
    for x in streams:
        sums.add(_squares({"lm_head.weight": norm(x)}))
    return sums.means()


Squares = dict[str, tuple[Tensor, int]]
"""By weight: the sum of squares per channel, and the number of tokens."""


def _squares(inputs: Mapping[str, Float[Tensor, "tokens in"]]) -> Squares:
    return {name: (x.float().square().sum(0).double(), len(x)) for name, x in inputs.items()}


@final
class _Sums:
    """Sums of squares over all windows."""

    def __init__(self) -> None:
        self._sums: Squares = {}

    def add(self, found: Squares) -> None:
        for name, (squares, tokens) in found.items():
            if name in self._sums:
                before, count = self._sums[name]
                squares, tokens = before + squares, count + tokens
            self._sums[name] = squares, tokens

    def means(self) -> dict[str, Float32[Tensor, " in"]]:
        return {name: (total / count).float() for name, (total, count) in self._sums.items()}


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
        self._inputs = _RecordedInputs(self._layer, self._prefix)

    def advance(self, streams: list[Tensor]) -> list[Tensor]:
        """The residual streams after the layer; adds the squares of its projections' inputs."""
        middle = self._measured(self._attend, streams)
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

    def _attend(self, x: Float[Tensor, "length hidden"]) -> Float[Tensor, "length hidden"]:
        layer = self._layer
        normed = layer.input_layernorm(x).to(self._dtype)
        added = layer.self_attn(normed, self._rope, FlashAttention([len(x)]))
        return x + scaled(added.float(), layer.residual_scale)

    def _measured(
        self, function: Callable[[Tensor], Tensor], windows: list[Tensor]
    ) -> list[Tensor]:
        """The function of every window; adds the squares of the inputs that it records."""

        def run(x: Tensor) -> tuple[Tensor, Squares]:
            return self._inputs.during(lambda: function(x))

        outputs: list[Tensor] = []
        for out, squares in self._pool.map(run, windows):
            outputs.append(out)
            self._sums.add(squares)
        return outputs

    def _routed(
        self, x: Float[Tensor, "tokens hidden"], routings: list[Routing]
    ) -> Float32[Tensor, "tokens hidden"]:
        """Weighted sum of the routed experts' outputs, in order of expert id."""
        chosen = torch.cat([routing.experts for routing in routings])
        factors = torch.cat([routing.weights for routing in routings])

        def run(expert: int) -> tuple[Tensor, Tensor, Squares]:
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            out, squares = self._expert(expert, x[tokens])
            return tokens, out.float() * factors[tokens, places, None], squares

        added = torch.zeros(x.shape, dtype=torch.float32)
        for tokens, out, squares in self._pool.map(run, chosen.unique().tolist()):
            added.index_add_(0, tokens, out)
            self._sums.add(squares)
        return added

    def _expert(self, expert: int, rows: Tensor) -> tuple[Tensor, Squares]:
        config, name = self._weights.config, f"{EXPERTS}{expert}."
        assert config.moe is not None
        with torch.device("meta"):
            mlp = MLP(config.hidden_size, config.moe.moe_intermediate_size, dtype=self._dtype)
        names = [f"{each}.weight" for each in PROJECTIONS]
        mlp.load_state_dict({each: self._read(name + each) for each in names}, assign=True)
        return _RecordedInputs(mlp, self._prefix + name).during(lambda: mlp(rows))

    def _read(self, name: str) -> Tensor:
        """A tensor in the dtype of products; norms, routers and biases in fp32."""
        dtype = self._dtype if name.endswith("_proj.weight") else torch.float32
        tensor = self._weights.read(self._prefix + name).to(dtype, copy=True)
        self._weights.release(self._prefix + name)
        return tensor


@final
class _RecordedInputs:
    """Hooks that record the inputs of all projections below a module, per thread."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self._local = threading.local()
        for path, child in module.named_modules():
            name = f"{prefix}{path}.weight"
            if isinstance(child, Linear):
                child.register_forward_pre_hook(self._recorder(name))
            elif isinstance(child, MLA):
                self._record_latent(child, f"{prefix}{path}.kv_b_proj.weight")

    def during(self, function: Callable[[], Tensor]) -> tuple[Tensor, Squares]:
        """The result of `function`, and the squares of the inputs while it ran."""
        self._local.found = {}
        return function(), self._local.found

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._local.found |= _squares({name: args[0].flatten(0, -2)})

        return record

    def _record_latent(self, attention: MLA, name: str) -> None:
        """kv_b_proj is not called: it is absorbed. Its input is the latent of the cache entries."""
        rank, normed = attention.dims.kv_lora_rank, attention.dims.kv_a_layernorm

        def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self._local.found |= _squares({name: out[..., :rank]})

        source = attention.kv_a_layernorm if normed else attention.kv_a_proj_with_mqa
        source.register_forward_hook(record)
