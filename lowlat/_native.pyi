"""Types of the native module that csrc/ builds. Tensors are passed by DLPack without a copy: on the
CPU, contiguous, without gradients, of exactly the dtype given here; anything else is a ValueError.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

def built_levels() -> list[str]:
    """Instruction-set levels of this build, best first."""

def usable_levels() -> list[str]:
    """Built levels that this machine can run, best first."""

def level() -> str:
    """The level in use."""

def set_level(level: str) -> None: ...
def set_threads(threads: int) -> None:
    """Size of the process-wide thread pool; a pool of another size ends when its jobs are done."""

def threads() -> int: ...
def time_phases(threads: int, phases: int, items: int, shrinking: bool) -> float:
    """Seconds of a phase of `items` empty items, in equal or shrinking chunks, in a pool of its
    own: barrier and distribution of work."""

def gguf_types() -> list[tuple[int, str, int, int, bool]]:
    """Number, name, columns and bytes of a block of every GGUF type that a Matrix can have, and
    whether it can be interleaved."""

class Matrix:
    """A weight matrix [rows, columns] in one of the storage formats; keeps its tensors alive.

    `occupied` uint8 [tiles]: 0 where all 16 rows of a tile are zero.
    """

    @staticmethod
    def bf16(weight: Tensor, *, occupied: Tensor | None = None) -> Matrix:
        """bf16 [rows, columns]; rows may have a stride."""

    @staticmethod
    def fp8(weight: Tensor, scale: Tensor, *, occupied: Tensor | None = None) -> Matrix:
        """e4m3 viewed as uint8 [rows, columns]; scale fp32 per block of 128 x 128."""

    @staticmethod
    def fp8_rows(weight: Tensor, scale: Tensor, *, occupied: Tensor | None = None) -> Matrix:
        """e4m3 viewed as uint8 [rows, columns], scale fp32 [rows]."""

    @staticmethod
    def int8_rows(weight: Tensor, scale: Tensor, *, occupied: Tensor | None = None) -> Matrix:
        """int8 [rows, columns], scale fp32 [rows]."""

    @staticmethod
    def int8(
        weight: Tensor, scale: Tensor, *, rows: int, columns: int, occupied: Tensor | None = None
    ) -> Matrix:
        """uint8 [tiles, groups, 8, 16, 2, 2], scale fp16 [tiles, groups, 16]."""

    @staticmethod
    def int4(
        weight: Tensor,
        scale: Tensor,
        minimum: Tensor,
        *,
        rows: int,
        columns: int,
        occupied: Tensor | None = None,
    ) -> Matrix:
        """uint8 [tiles, groups, 4, 16, 2, 2], scale and minimum fp16 [tiles, groups, 16]."""

    @staticmethod
    def gguf(
        weight: Tensor,
        *,
        type: int,
        interleaved_rows: int | None = None,
        occupied: Tensor | None = None,
    ) -> Matrix:
        """uint8 [rows, bytes of whole blocks] of the GGUF type with this number; rows may have a
        stride. With interleaved_rows: [rows rounded up to 16, bytes], made by `interleave`."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...

class Norm:
    """RMSNorm."""

    @staticmethod
    def make(weight: Tensor, eps: float) -> Norm:
        """weight fp32 [dim]."""

class LowRank:
    """The update of a projection [rows, columns] by a LoRA adapter."""

    @staticmethod
    def make(a: Tensor, b: Tensor) -> LowRank:
        """a bf16 [rank, columns padded to a multiple of 32]; b, B transposed, bf16
        [rank, at least rows + 32].
        """

class Projection:
    """A Matrix with or without a bias and updates by LoRA adapters."""

    @staticmethod
    def make(weight: Matrix, bias: Tensor | None, updates: Sequence[LowRank | None]) -> Projection:
        """bias fp32 [weight.rows]."""

class Mlp:
    """SwiGLU."""

    @staticmethod
    def make(gate: Projection, up: Projection, down: Projection) -> Mlp: ...

class Router:
    """The gate of a mixture of experts and its routing rule."""

    @staticmethod
    def make(
        weight: Matrix,
        bias: Tensor | None,
        *,
        chosen: int,
        groups: int,
        kept_groups: int,
        best_in_group: int,
        is_sigmoid: bool,
        normalizes: bool,
        scaling: float,
    ) -> Router:
        """bias fp32 [experts]."""

class Moe:
    """Routed experts; shared experts are the layer's mlp."""

    @staticmethod
    def make(router: Router, experts: Sequence[Mlp], places: Sequence[int]) -> Moe:
        """places: the expert of every place of all processes, equally many each, by ascending
        expert; experts: those of this process's places."""

class Indexer:
    """The lightning indexer of a layer with sparse attention (DSA). weights: bf16
    [heads, hidden]."""

    @staticmethod
    def make(
        *,
        heads: int,
        interleave: bool,
        q: Projection,
        k: Projection,
        k_norm: Norm,
        k_norm_bias: Tensor,
        weights: Matrix,
    ) -> Indexer: ...

class Attention:
    """MLA or GQA of a layer."""

    @staticmethod
    def mla(
        *,
        heads: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        scale: float,
        interleave: bool,
        q_a: Projection | None,
        q_a_norm: Norm | None,
        q: Projection,
        kv_a: Projection,
        kv_a_norms: Sequence[Norm],
        kv_b: Matrix,
        k_b: Matrix | None,
        o: Projection,
        kv_b_updates: Sequence[LowRank | None],
        topk: int = 0,
        indexer: Indexer | None = None,
    ) -> Attention:
        """topk: tokens that a query attends to, chosen by `indexer` or, without one, by the last
        layer that had one; 0: all tokens."""

    @staticmethod
    def gqa(
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        interleave: bool,
        window: int,
        q: Projection,
        k: Projection,
        v: Projection,
        o: Projection,
        q_norm: Norm | None,
        k_norm: Norm | None,
    ) -> Attention:
        """window 0: all keys."""

class Layer:
    """A decoder layer: mlp is the dense MLP, or with moe the shared experts."""

    @staticmethod
    def make(
        *,
        input_norm: Norm,
        post_attention_norm: Norm,
        attention: Attention,
        first_pair: int,
        mlp: Mlp | None,
        moe: Moe | None,
        post_mlp_norm: Norm | None = None,
    ) -> Layer:
        """first_pair: the layer's first column in a step's cos and sin. post_mlp_norm: of the
        output of MLP or experts.
        """

class MtpInput:
    """Input of an MTP module: the projection of a normalized embedding and hidden state."""

    @staticmethod
    def make(embedding_norm: Norm, hidden_norm: Norm, projection: Projection) -> MtpInput:
        """projection: [hidden, 2 hidden], the embedding first."""

class Cache:
    """The paged KV cache of all layers, in place."""

    @staticmethod
    def make(layers: Sequence[tuple[Tensor, int, int, Tensor | None, int]]) -> Cache:
        """(entries, entry_dim, quantized, index_keys, index_dim) of each layer: bf16
        [pages, page_size, entry_dim], or uint8 [pages, page_size, entry bytes] of which
        `quantized` channels are int8; index keys uint8 [pages, page_size, bytes of a key].
        """

class Model:
    """Decoder layers between an embedding (bf16 or gguf [vocab, hidden]) and a head; an MTP module
    if mtp_input is given. first_layer: the cache layer of layers[0]. A pipeline stage after the
    first has no embedding, one before the last no norm and no head.
    """

    def __init__(
        self,
        *,
        embedding: Matrix | None,
        mtp_input: MtpInput | None,
        layers: Sequence[Layer],
        first_layer: int,
        norm: Norm | None,
        head: Projection | None,
        is_larger_than_memory: bool,
        embedding_scale: float = 1.0,
        residual_scale: float = 1.0,
        division: tuple[int, int, int, int] = (1, 1, 0, 1),
    ) -> None:
        """Factors on the embedding, and on what a layer adds to the residual stream. division:
        sizes of tensor and expert parallelism, rank in the latter, processes that divide the
        head."""
    def step(
        self,
        *,
        ids: Tensor,
        previous: Tensor | None,
        slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        sequences: Sequence[tuple[Sequence[int], int, int, bool, int]],
        cache: Cache,
        hidden: Tensor,
        wanted: Sequence[int],
        logits: Tensor | None,
        is_decode: bool,
        query_scale: Tensor | None = None,
        exchange: Callable[[int, int, int, int], None] | None = None,
        residuals: Tensor | None = None,
        experts: Tensor | None = None,
        gates: Tensor | None = None,
    ) -> None:
        """Run one step; writes hidden bf16 [tokens, hidden] and logits fp32 [wanted, vocab].
        For a backward pass it also writes residuals bf16 [2 layers + 1, tokens, hidden], the
        residual stream before every attention and every MLP and after the last, and the routing:
        experts int32 and gates fp32 [layers, tokens, chosen].

        ids and slots int64 [tokens]. previous: for an MTP module, hidden states of the previous
        depth, bf16 [tokens, hidden]. cos and sin fp32 [tokens, pairs]: the tables of all layers.
        query_scale fp32 [tokens]: factors on the queries of MLA.
        sequences: (pages, entries cached before, new tokens, whether MLA takes the expanded path,
        index of the LoRA adapter or -1).
        is_decode: every sequence has at most 32 new tokens, so products take the GEMV path
        (lowlat.model.native).
        exchange: of a divided model: group (0 tensor, 1 expert), address and bytes to send, address
        of what all processes of the group send.
        """

    def count_expert_loads(self) -> None:
        """Count the rows of every expert from the next step on."""

    def expert_loads(self) -> list[list[int]]:
        """[layers, experts]: tokens of every expert in all counted steps; 0 in layers without
        experts. Empty if none was counted."""

    def place_experts(self, layer: int, moe: Moe) -> None:
        """Replace the experts of a layer between two steps."""

class RoutingRule:
    """The parameters of expert routing (group-limited top-k)."""

    def __init__(
        self,
        *,
        chosen: int,
        groups: int,
        kept_groups: int,
        best_in_group: int,
        is_sigmoid: bool,
        normalizes: bool,
        scaling: float,
    ) -> None: ...

class EntryLayout:
    """Where heads find keys and values in a KV cache entry: group g of the heads has its key at
    g * key_step and its value at value_offset + g * value_step.
    """

    def __init__(
        self, *, kv_heads: int, key_step: int, value_dim: int, value_step: int, value_offset: int
    ) -> None: ...

def linear(
    matrix: Matrix, x: Tensor, out: Tensor, is_decode: bool = False, level: str = ""
) -> None:
    """out fp32 [rows, matrix.rows] = x bf16 [rows, matrix.columns] times the matrix transposed."""

def pack(weights: Tensor, to: Matrix, level: str = "") -> None:
    """Quantize bf16 or fp32 [rows, columns] into the tensors of an int8 or int4 matrix."""

def search_int4(
    rows: Tensor,
    importance: Tensor,
    shrinks: list[float],
    refits: int,
    scale: Tensor,
    minimum: Tensor,
    level: str = "",
) -> None:
    """fp32 [rows, columns] of whole tiles, importance fp32 [columns]; fp16 [rows, groups] out. On
    the calling thread, as the next two.
    """

def search_int8(
    rows: Tensor,
    importance: Tensor,
    shrinks: list[float],
    refits: int,
    scale: Tensor,
    level: str = "",
) -> None:
    """The same with symmetric ranges."""

def feedback_int4(
    rows: Tensor,
    importance: Tensor,
    shrinks: list[float],
    refits: int,
    factor: Tensor,
    scale: Tensor,
    minimum: Tensor,
    q: Tensor,
    errors: Tensor,
    level: str = "",
) -> None:
    """At most 128 columns, with the rows and columns of an upper triangular factor that belong to
    them; q fp32 [rows, groups, 32], errors fp32 [rows, columns].
    """

def dequantize(matrix: Matrix, out: Tensor, level: str = "") -> None:
    """The weights of a Matrix in GGUF blocks; out fp32 or bf16 [rows, columns]."""

def interleave(rows: Matrix, out: Tensor) -> None:
    """Rows in GGUF blocks in tiles of 16; out uint8 [rows rounded up to 16, bytes of a row]."""

def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, level: str = "") -> None:
    """bf16 [rows, dim], weight fp32 [dim]."""

def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool, level: str = "") -> None:
    """bf16 [tokens, heads, dim] in place; cos and sin fp32 [tokens, dim / 2]."""

def swiglu(gate: Tensor, up: Tensor, out: Tensor, level: str = "") -> None:
    """bf16 [rows, inner]."""

def route(
    x: Tensor,
    gate: Matrix,
    bias: Tensor | None,
    choice: RoutingRule,
    experts: Tensor,
    weights: Tensor,
    scores: Tensor,
    level: str = "",
) -> None:
    """x bf16 [tokens, hidden]; experts int32 and weights fp32 [tokens, chosen], scores fp32
    [tokens, experts].
    """

def draw(
    logits: Tensor,
    number: float,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    level: str = "",
) -> int:
    """fp32 [vocab]."""

def store_entries(rows: Tensor, cache: Tensor, *, quantized: int, level: str = "") -> None:
    """bf16 [tokens, entry_dim] as the first rows of cache uint8 [pages, page_size, row_bytes]."""

def attention(
    q: Tensor,
    cache: Tensor,
    pages: Tensor,
    *,
    entry_dim: int,
    quantized: int,
    start: int,
    scale: float,
    window: int,
    layout: EntryLayout,
    out: Tensor,
    level: str = "",
) -> None:
    """q bf16 [queries, heads, key_dim]; cache uint8 [pages, page_size, row_bytes]; pages int32;
    out bf16 [queries, heads, value_dim]. window 0: all keys.
    """

def store_index_keys(keys: Tensor, cache: Tensor, *, level: str = "") -> None:
    """bf16 [tokens, dim] as the first keys of cache uint8 [pages, page_size, bytes of a key]."""

def choose_tokens(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    pages: Tensor,
    *,
    start: int,
    topk: int,
    scores: Tensor,
    chosen: Tensor,
    level: str = "",
) -> None:
    """q bf16 [queries, heads, dim]; weights fp32 [queries, heads], with the factor dim^-0.5; pages
    int32; writes scores fp32 [queries, keys rounded up to 64] and chosen int32 [queries, topk].
    """

def norm_pieces(rows: int) -> int:
    """Rows of norm_backward's `partial`."""

def norm_forward(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, inverse: Tensor, level: str = ""
) -> None:
    """x and out bf16 or fp32 [rows, dim]; weight fp32 [dim], inverse fp32 [rows]."""

def norm_backward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    inverse: Tensor,
    grad: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    partial: Tensor,
    level: str = "",
) -> None:
    """As norm_forward; grad and grad_x as x, grad_weight fp32 [dim], partial fp32
    [norm_pieces(rows), dim].
    """

def gated_forward(gate: Tensor, up: Tensor, inner: Tensor, level: str = "") -> None:
    """bf16 or fp32 [rows, inner]; gate and up may be columns of one wider matrix."""

def gated_backward(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    factors: Tensor | None,
    inner: Tensor | None,
    grad_gate: Tensor,
    grad_up: Tensor,
    grad_factors: Tensor | None,
    level: str = "",
) -> None:
    """As gated_forward; factors and grad_factors fp32 [rows]."""

def divergence(
    logits: Tensor,
    teacher: Tensor,
    targets: Tensor,
    counted: Tensor,
    nll_weight: float,
    wants_gradient: bool,
    kl: Tensor,
    nll: Tensor,
    level: str = "",
) -> None:
    """As entropy; teacher: logits of the teacher, shaped like logits, kl and nll fp32 [rows]."""

def rotation(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleave: bool,
    is_inverse: bool,
    out: Tensor,
    level: str = "",
) -> None:
    """x, out [tokens, heads, dim] bf16 or fp32; cos, sin fp32 [tokens, dim / 2]. Rows of x, cos and
    sin may be columns of something wider.
    """

def entropy(
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    z_weight: float,
    nll: Tensor,
    z: Tensor,
    level: str = "",
) -> None:
    """logits bf16 or fp32 [rows, vocab], in place; targets int64, counted uint8, nll and z fp32
    [rows].
    """

def combine(
    rows: Tensor, factors: Tensor | None, places: Tensor, out: Tensor, level: str = ""
) -> None:
    """rows and out bf16 or fp32 [any, dim], factors fp32 [any], places int64 [tokens, chosen]."""

def grouped(
    rows: Tensor,
    weight: Tensor,
    counts: Tensor,
    is_transposed: bool,
    products: Tensor,
    level: str = "",
) -> None:
    """rows and products bf16 [rows, width], weight bf16 or fp32 [experts, out, in], counts int64
    [experts], whose sum is the number of rows.
    """

def outer(left: Tensor, right: Tensor, counts: Tensor, sums: Tensor, level: str = "") -> None:
    """left and right bf16 [rows, width], counts int64 [experts], sums fp32 [experts, out, in]."""

def causal_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    scale: float,
    out: Tensor,
    log_total: Tensor,
    level: str = "",
) -> None:
    """q bf16 [tokens, heads, key_dim], k [tokens, kv_heads, key_dim], v and out [.., value_dim];
    ends int64 [sequences], log_total fp32 [tokens, heads].
    """

def causal_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    scale: float,
    out: Tensor,
    log_total: Tensor,
    grad: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    level: str = "",
) -> None:
    """As causal_forward; grad as out, the others as q, k and v."""

def indexer_loss(
    q: Tensor,
    k: Tensor,
    log_total: Tensor,
    ends: Tensor,
    scale: float,
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    topk: int,
    weight: float,
    kl: Tensor,
    recall: Tensor,
    grad_q: Tensor | None,
    grad_weights: Tensor | None,
    grad_k: Tensor | None,
    v: Tensor | None = None,
    out: Tensor | None = None,
    level: str = "",
) -> None:
    """q, k, v, out, log_total and ends as causal_forward; index_q bf16 [tokens, index_heads,
    index_dim], index_weights fp32 [tokens, index_heads], index_k bf16 [tokens, index_dim]; kl and
    recall fp32 [tokens]; gradients shaped like the outputs of the indexer, all or none. `out` is
    over the chosen tokens; with it, kl is NaN.
    """
