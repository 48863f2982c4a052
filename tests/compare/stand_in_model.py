"""A model file of the public shape of DeepSeek's inference/model.py: the names of its classes,
fields and parameters, its `kernel` import, and its logits of the last token alone. What it computes
is reimplemented from the paper, for one process and batches of one.

`lowlat compare official:` runs it as it would run the real file; tests plant mistakes by replacing
lines of it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kernel import act_quant, fp8_gemm, weight_dequant  # noqa: F401
from torch import nn


@dataclass
class ModelArgs:
    max_batch_size: int = 8
    max_seq_len: int = 64
    dtype: str = "bf16"
    vocab_size: int = 97
    dim: int = 16
    inter_dim: int = 16
    moe_inter_dim: int = 16
    n_layers: int = 1
    n_dense_layers: int = 1
    n_heads: int = 2
    n_routed_experts: int = 4
    n_shared_experts: int = 1
    n_activated_experts: int = 2
    n_expert_groups: int = 1
    n_limited_groups: int = 1
    score_func: str = "softmax"
    route_scale: float = 1.0
    q_lora_rank: int = 0
    kv_lora_rank: int = 8
    qk_nope_head_dim: int = 8
    qk_rope_head_dim: int = 8
    v_head_dim: int = 8
    original_seq_len: int = 64
    rope_theta: float = 1e4
    rope_factor: float = 1.0
    beta_fast: int = 32
    beta_slow: int = 1
    mscale: float = 1.0


class Linear(nn.Module):
    dtype = torch.bfloat16

    def __init__(self, rows, columns, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns, rows, dtype=dtype or Linear.dtype))
        self.register_parameter("bias", None)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class ParallelEmbedding(nn.Module):
    def __init__(self, count, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def frequencies(args):
    """Turns per position as complex numbers [positions, pairs]."""
    dim, context = args.qk_rope_head_dim, args.original_seq_len
    inverse = 1.0 / args.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if args.max_seq_len > context:

        def pair(rotations):
            turns = context / (rotations * 2 * math.pi)
            return dim * math.log(turns) / (2 * math.log(args.rope_theta))

        low = max(math.floor(pair(args.beta_fast)), 0)
        high = min(math.ceil(pair(args.beta_slow)), dim - 1)
        high = high + 0.001 if high == low else high
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        inverse = inverse / args.rope_factor * ramp + inverse * (1 - ramp)
    angles = torch.arange(args.max_seq_len, dtype=torch.float32)[:, None] * inverse
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x, freqs_cis):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * freqs_cis[None, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class MLA(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_heads, self.q_lora_rank = args.n_heads, args.q_lora_rank
        self.kv_lora_rank = args.kv_lora_rank
        self.qk_nope_head_dim = args.qk_nope_head_dim
        self.qk_rope_head_dim = args.qk_rope_head_dim
        self.v_head_dim = args.v_head_dim
        width = args.qk_nope_head_dim + args.qk_rope_head_dim
        if args.q_lora_rank:
            self.wq_a = Linear(args.dim, args.q_lora_rank)
            self.q_norm = RMSNorm(args.q_lora_rank)
            self.wq_b = Linear(args.q_lora_rank, args.n_heads * width)
        else:
            self.wq = Linear(args.dim, args.n_heads * width)
        self.wkv_a = Linear(args.dim, args.kv_lora_rank + args.qk_rope_head_dim)
        self.kv_norm = RMSNorm(args.kv_lora_rank)
        both = args.qk_nope_head_dim + args.v_head_dim
        self.wkv_b = Linear(args.kv_lora_rank, args.n_heads * both)
        self.wo = Linear(args.n_heads * args.v_head_dim, args.dim)
        self.softmax_scale = width**-0.5
        if args.max_seq_len > args.original_seq_len:
            self.softmax_scale *= (0.1 * args.mscale * math.log(args.rope_factor) + 1.0) ** 2

    def forward(self, x, start_pos, freqs_cis, mask):
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.q_lora_rank else self.wq(x)
        q = q.unflatten(-1, (self.n_heads, -1))
        q_nope, q_pe = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q_pe = apply_rotary_emb(q_pe, freqs_cis)
        latent, k_pe = self.wkv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k_pe = apply_rotary_emb(k_pe[:, :, None], freqs_cis)[:, :, 0]
        latent = self.kv_norm(latent)
        up = self.wkv_b.weight.unflatten(0, (self.n_heads, -1))
        w_uk, w_uv = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        absorbed = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
        scores = torch.einsum("bshc,btc->bsht", absorbed, latent)
        scores = (scores + torch.einsum("bshr,btr->bsht", q_pe, k_pe)) * self.softmax_scale
        weights = (scores + mask[:, None]).softmax(dim=-1, dtype=torch.float32).type_as(x)
        mixed = torch.einsum("bsht,btc->bshc", weights, latent)
        return self.wo(torch.einsum("bshc,hdc->bshd", mixed, w_uv).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(dim, inner), Linear(inner, dim), Linear(dim, inner)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Gate(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim))
        # As in the public file, for its largest model alone.
        self.bias = nn.Parameter(torch.empty(args.n_routed_experts)) if args.dim == 7168 else None

    def forward(self, x):
        args, logits = self.args, F.linear(x, self.weight)
        if args.score_func == "softmax":
            scores = logits.softmax(dim=-1, dtype=torch.float32)
        else:
            scores = logits.sigmoid()
        ranked = scores if self.bias is None else scores + self.bias
        if args.n_expert_groups > 1:
            groups = ranked.unflatten(-1, (args.n_expert_groups, -1))
            best = groups.amax(-1) if self.bias is None else groups.topk(2, -1).values.sum(-1)
            kept = best.topk(args.n_limited_groups, -1).indices
            outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            ranked = groups.masked_fill(outside[..., None], float("-inf")).flatten(1)
        experts = ranked.topk(args.n_activated_experts, -1).indices
        weights = scores.gather(1, experts)
        if args.score_func == "sigmoid":
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights * args.route_scale).type_as(x), experts


class MoE(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.gate = Gate(args)
        inner = args.moe_inter_dim
        self.experts = nn.ModuleList(MLP(args.dim, inner) for _ in range(args.n_routed_experts))
        self.shared_experts = MLP(args.dim, args.n_shared_experts * inner)

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, experts = self.gate(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(experts == number)
            if len(rows):
                out[rows] += expert(flat[rows]) * weights[rows, places, None]
        return (out + self.shared_experts(flat)).view(x.shape)


class Block(nn.Module):
    def __init__(self, layer_id, args):
        super().__init__()
        self.attn = MLA(args)
        is_dense = layer_id < args.n_dense_layers
        self.ffn = MLP(args.dim, args.inter_dim) if is_dense else MoE(args)
        self.attn_norm, self.ffn_norm = RMSNorm(args.dim), RMSNorm(args.dim)

    def forward(self, x, start_pos, freqs_cis, mask):
        x = x + self.attn(self.attn_norm(x), start_pos, freqs_cis, mask)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed = ParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(n, args) for n in range(args.n_layers))
        self.norm = RMSNorm(args.dim)
        self.head = Linear(args.dim, args.vocab_size, dtype=torch.get_default_dtype())
        self.register_buffer("freqs_cis", frequencies(args), persistent=False)

    @torch.inference_mode()
    def forward(self, tokens, start_pos=0):
        length = tokens.shape[1]
        freqs_cis = self.freqs_cis[start_pos : start_pos + length]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, start_pos, freqs_cis, mask)
        return self.head(self.norm(x)[:, -1])
