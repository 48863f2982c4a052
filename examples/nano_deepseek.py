"""DeepSeek-V3 inference in one file: plain PyTorch, no framework, to be read with the paper.

Sections and equations are those of the DeepSeek-V3 technical report (arXiv 2412.19437); "V2" is
the DeepSeek-V2 paper (arXiv 2405.04434).

Modules and parameters have the names of the released checkpoint. One sequence at a time. Shapes:

    T   new tokens of this call            S   all tokens so far, cached ones included
    D   hidden_size                        H   num_attention_heads
    C   kv_lora_rank, the KV latent        R   qk_rope_head_dim
    N   qk_nope_head_dim                   V   v_head_dim
    E   n_routed_experts                   K   num_experts_per_tok

Run it: python examples/nano_deepseek.py lowlat/models/minnow --prompt "The capital of France"
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn


# ---- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of config.json that inference needs; comments give DeepSeek-V3's values."""

    vocab_size: int  # 129280
    hidden_size: int  # 7168
    num_hidden_layers: int  # 61
    rms_norm_eps: float  # 1e-6
    num_attention_heads: int  # 128
    q_lora_rank: int | None  # 1536; null (V2-Lite, Moonlight): queries are not compressed
    kv_lora_rank: int  # 512
    qk_nope_head_dim: int  # 128
    qk_rope_head_dim: int  # 64
    v_head_dim: int  # 128
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # YaRN
    intermediate_size: int  # 18432, of the dense layers
    first_k_dense_replace: int  # 3: the first layers are dense
    moe_intermediate_size: int  # 2048, of one expert
    n_routed_experts: int  # 256
    n_shared_experts: int  # 1
    num_experts_per_tok: int  # 8
    n_group: int  # 8
    topk_group: int  # 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float  # 2.5
    num_nextn_predict_layers: int = 0  # 1
    tie_word_embeddings: bool = False
    quantization_config: dict | None = None  # FP8: {"weight_block_size": [128, 128], ...}

    @staticmethod
    def from_folder(folder: Path) -> "Config":
        raw = json.loads((folder / "config.json").read_text())
        # Released files have rope_theta and rope_scaling, newer ones both in rope_parameters.
        rope = raw | (raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        raw |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope if kind == "yarn" else None}
        is_v3 = raw["model_type"] == "deepseek_v3" and kind in ("default", "yarn")
        if not is_v3 or raw.get("attention_bias") or not raw.get("rope_interleave", True):
            raise ValueError(f"{folder}/config.json: not a configuration of DeepSeek-V3")
        known = {field.name for field in fields(Config)}
        return Config(**{name: value for name, value in raw.items() if name in known})


# ---- Normalization and positions ----------------------------------------------------------------
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


def rope_frequencies(config: Config) -> Tensor:  # [R/2]
    """Radians per position of each pair of channels, after YaRN (arXiv 2309.00071, section 3.2).

    Fast pairs turn many times within the original context and keep their frequency. Slow pairs are
    interpolated: divided by `factor`. A linear ramp connects the two.
    """
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    period = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return 1.0 / period

    def pair_with(rotations: float) -> float:
        # The pair that turns this many times within the original context.
        context = yarn["original_max_position_embeddings"]
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.get("beta_fast", 32.0))), 0)
    high = min(math.ceil(pair_with(yarn.get("beta_slow", 1.0))), dim - 1)
    ramp = (torch.arange(dim // 2) - low) / (high - low if high > low else 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (yarn["factor"] * period) * (1 - keep) + 1.0 / period * keep


def yarn_corrections(config: Config) -> tuple[float, float]:
    """YaRN's two corrections (section 4.3): factors on cos and sin, and on the softmax scale.

    DeepSeek-V3 with mscale = mscale_all_dim = 1 and factor = 40: 1 and (0.1 ln 40 + 1)^2 = 1.874.
    """
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0, 1.0

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn["factor"]) + 1.0

    mscale, all_dim = yarn.get("mscale"), yarn.get("mscale_all_dim")
    rotation = temperature(mscale) / temperature(all_dim) if mscale and all_dim else temperature(1)
    return rotation, temperature(all_dim or 0) ** 2


def rotate(x: Tensor, start: int, config: Config) -> Tensor:
    """RoPE: rotate the pairs of channels (2i, 2i + 1) of x [T, heads, R] by their position."""
    positions = torch.arange(start, start + len(x))
    angles = positions[:, None, None] * rope_frequencies(config)  # [T, 1, R/2]
    magnitude, _ = yarn_corrections(config)
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


# ---- Multi-head Latent Attention (section 2.1.1) ------------------------------------------------
class LatentCache:
    """The KV cache of MLA: per layer and token one entry [c_KV ; k_R] of C + R numbers.

    For DeepSeek-V3 that is 576 numbers; keys and values of its 128 heads would be 40,960.
    """

    def __init__(self, model: "DeepseekV3", context: int) -> None:
        config = model.config
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        entry_dim = config.kv_lora_rank + config.qk_rope_head_dim
        self.entries = model.norm.weight.new_zeros(layers, context, entry_dim)

    def append(self, layer: int, start: int, new: Tensor) -> Tensor:
        """Write `new` [T, C + R] from position `start`; return all entries so far [S, C + R]."""
        self.entries[layer, start : start + len(new)] = new
        return self.entries[layer, : start + len(new)]


class MLA(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * (N + R), bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=False)  # W_DQ
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * (N + R), bias=False)  # W_UQ, W_QR
        self.kv_a_proj_with_mqa = nn.Linear(D, C + R, bias=False)  # W_DKV, W_KR
        self.kv_a_layernorm = RMSNorm(C, eps=1e-6)
        self.kv_b_proj = nn.Linear(C, H * (N + V), bias=False)  # W_UK, W_UV
        self.o_proj = nn.Linear(H * V, D, bias=False)  # W_O
        self.scale = (N + R) ** -0.5 * yarn_corrections(config)[1]
        self.dims = H, C, N, R, V

    def forward(self, x: Tensor, start: int, cache: LatentCache, absorbed: bool) -> Tensor:
        """x [T, D] at positions start, start + 1, ... -> [T, D]."""
        H, C, N, R, V = self.dims
        # Queries, compressed and expanded again: (6), (7), (8).
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (H, N + R)).split([N, R], dim=-1)  # [T, H, N], [T, H, R]
        q_rope = rotate(q_rope, start, self.config)
        # The cache entry: normalized latent (1) and one rotated key for all heads (3).
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([C, R], dim=-1)
        k_rope = rotate(k_rope[:, None], start, self.config)[:, 0]
        entry = torch.cat([self.kv_a_layernorm(latent), k_rope], dim=-1)
        latent, k_rope = cache.append(self.layer, start, entry).split([C, R], dim=-1)  # [S, ...]
        # Attention, then the output projection (11). kv_b_proj holds per head W_UK, then W_UV.
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (H, N + V)).split([N, V], dim=1)
        attend = self.absorbed if absorbed else self.expanded
        return self.o_proj(attend(q_nope, q_rope, latent, k_rope, w_uk, w_uv).flatten(1))

    def expanded(self, q_nope, q_rope, latent, k_rope, w_uk, w_uv) -> Tensor:
        """Attention as the paper defines it: keys and values of every head from the latents.

        Expanding costs C(N + V) products per head and cached token, a query-key pair N + R + V.
        For prefill, where T is large. Arguments as in `forward`: [T, H, N], [T, H, R], [S, C], ...
        """
        k_nope = torch.einsum("sc,hnc->shn", latent, w_uk)  # (2)
        v = torch.einsum("sc,hvc->shv", latent, w_uv)  # (5)
        scores = torch.einsum("thn,shn->hts", q_nope, k_nope)  # (4), (9), (10)
        scores = scores + torch.einsum("thr,sr->hts", q_rope, k_rope)
        return torch.einsum("hts,shv->thv", self.softmax(scores), v)  # [T, H, V]

    def absorbed(self, q_nope, q_rope, latent, k_rope, w_uk, w_uv) -> Tensor:
        """The same result on the latents themselves: W_UK moves into the query, W_UV into the
        output (V2 section 2.1.2), because q . (W_UK c) = (W_UK^T q) . c.

        A query-key pair costs 2C + R products per head, but nothing is expanded. All heads read the
        same entries, as in multi-query attention. For decode, where T is small.
        """
        q_latent = torch.einsum("thn,hnc->thc", q_nope, w_uk)
        scores = torch.einsum("thc,sc->hts", q_latent, latent)
        scores = scores + torch.einsum("thr,sr->hts", q_rope, k_rope)
        out_latent = torch.einsum("hts,sc->thc", self.softmax(scores), latent)
        return torch.einsum("thc,hvc->thv", out_latent, w_uv)  # [T, H, V]

    def softmax(self, scores: Tensor) -> Tensor:
        """scores [H, T, S] -> causal attention weights. The queries are the last T of S tokens."""
        _, T, S = scores.shape
        future = torch.ones(T, S, dtype=torch.bool).triu(diagonal=S - T + 1)
        scores = (scores.float() * self.scale).masked_fill(future, -math.inf)
        return scores.softmax(dim=-1).to(self.o_proj.weight.dtype)


# ---- DeepSeekMoE (section 2.1.2) ----------------------------------------------------------------
class MLP(nn.Module):
    """SwiGLU: the dense layers, one routed expert, or all shared experts side by side."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Sigmoid router with auxiliary-loss-free load balancing and group-limited top-k."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        E, D = config.n_routed_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(E, D))  # the centroids e_i
        self.e_score_correction_bias = nn.Parameter(torch.empty(E))  # b_i, always fp32

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> expert ids [T, K] and their weights [T, K], in fp32 throughout."""
        scores = (x.float() @ self.weight.float().T).sigmoid()  # (15), [T, E]
        # The bias moves the choice of experts only, (16). Their weights use the plain scores.
        experts = self.select(scores + self.e_score_correction_bias)
        weights = scores.gather(1, experts)  # (14)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # (13)
        return experts, weights * self.config.routed_scaling_factor

    def select(self, biased: Tensor) -> Tensor:
        """Top-k experts [T, K] within the `topk_group` best groups, by the sum of a group's best
        two. The other groups get -inf, not 0: biased scores can be negative, and 0 would win.
        """
        groups = biased.unflatten(-1, (self.config.n_group, -1))  # [T, groups, E / groups]
        best_two = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)  # [T, groups]
        chosen = torch.zeros_like(best_two, dtype=torch.bool)
        chosen.scatter_(1, top(best_two, self.config.topk_group), True)
        limited = groups.masked_fill(~chosen[..., None], -math.inf).flatten(-2)  # [T, E]
        return top(limited, self.config.num_experts_per_tok)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest per row; of equal ones the lowest (topk leaves that open)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


class MoE(nn.Module):
    """Routed experts weighted by the gate, plus the shared experts that see every token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = nn.ModuleList(MLP(D, inner) for _ in range(config.n_routed_experts))
        self.shared_experts = MLP(D, inner * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        experts, weights = self.gate(x)  # [T, K] each
        routed = torch.zeros_like(x, dtype=torch.float32)
        for expert in experts.unique().tolist():
            tokens, slots = (experts == expert).nonzero(as_tuple=True)
            output = self.experts[expert](x[tokens]).float()
            routed[tokens] += weights[tokens, slots, None] * output
        return self.shared_experts(x) + routed.to(x.dtype)  # (12), without the residual


# ---- The model ----------------------------------------------------------------------------------
class DecoderLayer(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = MLA(config, layer)
        self.post_attention_layernorm = RMSNorm(D, eps)
        is_dense = layer < config.first_k_dense_replace
        self.mlp = MLP(D, config.intermediate_size) if is_dense else MoE(config)

    def forward(self, x: Tensor, start: int, cache: LatentCache, absorbed: bool) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), start, cache, absorbed)
        return x + self.mlp(self.post_attention_layernorm(x))


class MTPModule(DecoderLayer):
    """Multi-Token Prediction (section 2.2): a decoder layer behind a projection; see `mtp`."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.hnorm, self.enorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)  # M_k
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(D, eps)})


class DeepseekV3(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        for _ in range(config.num_nextn_predict_layers):  # numbered after the decoder layers
            self.layers.append(MTPModule(config, len(self.layers)))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, start: int, cache: LatentCache, absorbed: bool) -> Tensor:
        """ids [T] at positions start, start + 1, ... -> normalized hidden states [T, D]."""
        x = self.embed_tokens(ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, start, cache, absorbed)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, vocab]: of the next token, and of MTP for the token it predicts (23)."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight).float()

    def mtp(
        self, hidden: Tensor, ahead: Tensor, start: int, cache: LatentCache, depth: int = 0
    ) -> Tensor:
        """Hidden states [T, D] of MTP module `depth`, input of `logits` and of the next depth.

        It joins hidden[i], an output of `forward` (or of depth - 1) at position start + i, with the
        embedding of ahead[i], the token depth + 1 places later, and predicts the one after that.
        """
        module = self.layers[self.config.num_hidden_layers + depth]
        # (21). Released weights take the embedding first; the paper writes it second.
        joined = [module.enorm(self.embed_tokens(ahead)), module.hnorm(hidden)]
        x = module.eh_proj(torch.cat(joined, dim=-1))
        return module.shared_head["norm"](module(x, start, cache, absorbed=start > 0))  # (22)


# ---- Checkpoints in the released layout ---------------------------------------------------------
def load(folder: Path, dtype: torch.dtype = torch.float32) -> DeepseekV3:
    """The model in `folder`: config.json and model.safetensors, or its shards with an index."""
    config = Config.from_folder(folder)
    with torch.device("meta"):  # no memory until the tensors are there
        model = DeepseekV3(config)
    wanted, tensors = model.state_dict().keys(), {}
    for name, tensor in read_tensors(folder, config):
        name = name.removeprefix("model.")
        if name in wanted:  # MTP modules bring copies of the embedding and the head along
            is_bias = name.endswith("e_score_correction_bias")
            tensors[name] = tensor.to(torch.float32 if is_bias else dtype)
    model.load_state_dict(tensors, assign=True)  # strict: nothing may be missing
    return model.requires_grad_(False)


def read_tensors(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight. FP8 matrices are multiplied by their scales."""
    index, shards = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = [safe_open(folder / shard, "pt") for shard in shards]
    file_of = {name: file for file in files for name in file.keys()}
    for name, file in file_of.items():
        scale = f"{name}_scale_inv"
        if scale in file_of:
            block = config.quantization_config["weight_block_size"]
            yield name, dequantize(file.get_tensor(name), file_of[scale].get_tensor(scale), block)
        elif not name.endswith("_scale_inv"):
            yield name, file.get_tensor(name)


def dequantize(weight: Tensor, scale_inv: Tensor, block: list[int]) -> Tensor:
    """fp8 (E4M3) [out, in] times one fp32 scale per 128x128 block; edge blocks may be cut off."""
    rows, columns = weight.shape
    scale = scale_inv.repeat_interleave(block[0], dim=0)[:rows]
    scale = scale.repeat_interleave(block[1], dim=1)[:, :columns]
    return weight.float() * scale


# ---- Decoding -----------------------------------------------------------------------------------
Chooser = Callable[[Tensor], int]  # logits [vocab] -> token id


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token id from logits [vocab]: greedy at temperature 0, else nucleus (top-p) sampling."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


@torch.no_grad()
def generate(model: DeepseekV3, prompt: list[int], count: int, choose: Chooser) -> Iterator[int]:
    """Yield `count` tokens after `prompt`, one per forward pass."""
    cache = LatentCache(model, len(prompt) + count)
    ids, start = prompt, 0
    for _ in range(count):
        hidden = model(torch.tensor(ids), start, cache, absorbed=start > 0)  # prefill, then decode
        start, ids = start + len(ids), [choose(model.logits(hidden[-1]))]
        yield ids[0]


@torch.no_grad()
def speculate(model: DeepseekV3, prompt: list[int], count: int, choose: Chooser) -> Iterator[int]:
    """The tokens of `generate`, one or two per forward pass: speculative decoding with MTP.

    MTP drafts the token after next, and the next forward pass verifies it: the draft is accepted
    if it is the token that the main model chooses at its place.
    """
    cache = LatentCache(model, len(prompt) + count + 1)
    hidden = model(torch.tensor(prompt), 0, cache, absorbed=False)
    token = choose(model.logits(hidden[-1]))
    yield token
    start, ahead, made = 0, [*prompt[1:], token], 1  # ahead[i] follows the token of hidden[i]
    while made < count:
        drafted = model.mtp(hidden, torch.tensor(ahead), start, cache)
        draft = int(model.logits(drafted[-1]).argmax())
        start += len(ahead)
        hidden = model(torch.tensor([ahead[-1], draft]), start, cache, absorbed=True)
        ahead = [choose(model.logits(hidden[0]))]
        if ahead[0] == draft:  # accepted; the cache entry of a rejected draft is overwritten
            ahead.append(choose(model.logits(hidden[1])))
        hidden = hidden[: len(ahead)]
        yield from ahead[: count - made]
        made += len(ahead)


def main() -> None:
    parser = argparse.ArgumentParser(description="DeepSeek-V3 inference in one file.")
    parser.add_argument("folder", type=Path, help="config.json, *.safetensors, tokenizer.json")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="text to continue")
    given.add_argument("--ids", type=int, nargs="+", help="token ids to continue")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mtp", action="store_true", help="speculative decoding with MTP")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()

    model = load(options.folder, getattr(torch, options.dtype))
    if options.mtp and model.config.num_nextn_predict_layers == 0:
        parser.error("--mtp: the model has no MTP module (num_nextn_predict_layers is 0)")
    generator = torch.Generator().manual_seed(options.seed)
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    choose = partial(sample, generator=generator, **sampling)
    decode = speculate if options.mtp else generate
    if options.ids:
        print(*decode(model, options.ids, options.max_tokens, choose))
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    raw = json.loads((options.folder / "generation_config.json").read_text())
    prompt, answer = tokenizer.encode(options.prompt).ids, []
    for token in decode(model, prompt, options.max_tokens, choose):
        if token in torch.tensor(raw["eos_token_id"]):  # one id or a list
            break
        answer.append(token)
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    main()
