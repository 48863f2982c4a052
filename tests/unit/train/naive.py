"""DeepSeek-V3's losses written out from the paper, in plain fp64 operations: whole logits, one
expert after the other, one document after the other. What the trainer's tests compare with.

Owns no trick: everything is autograd's. Only deepseek_v3's attention and default RoPE are known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowlat.config.model import MLAConfig, ModelConfig, MoEConfig
from lowlat.data.batch import Batch

Scores = list[Tensor]
"""Of every MoE layer in turn, [tokens, experts]."""


@dataclass(frozen=True, kw_only=True)
class NaiveLosses:
    """Means over a batch, as the paper defines them."""

    heads: list[Tensor]
    z: Tensor
    sequence: Tensor
    """Sum over layers, mean over sequences, alpha included."""
    total: Tensor
    loads: list[Tensor]
    """Choices per expert of every MoE layer."""


class NaiveModel:
    """Parameters by the names of a model with stacked experts, as leaves in fp64."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Tensor]) -> None:
        self.config = config
        self.leaves = {
            name: tensor.detach().double().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in parameters.items()
        }

    def losses(
        self, batch: Batch, *, mtp_weight: float, z_weight: float, alpha: float
    ) -> NaiveLosses:
        ahead = 1 + self.config.num_nextn_predict_layers
        length = batch.tokens.shape[1] - ahead
        nll: list[list[Tensor]] = [[] for _ in range(ahead)]
        z: list[Tensor] = []
        balance: list[Tensor] = []
        loads: list[Tensor] = []
        for row in range(batch.rows):
            documents = (length,) if batch.documents is None else batch.documents[row]
            hidden, scores, chosen = self._row(batch.tokens[row], documents)
            for depth, states in enumerate(hidden):
                logits = states @ self._head(depth).T
                for t in range(length):
                    if not all(batch.loss_mask[row, t + 1 + i] for i in range(depth + 1)):
                        continue
                    denominator = logits[t].exp().sum().log()
                    nll[depth].append(denominator - logits[t, batch.tokens[row, t + depth + 1]])
                    if depth == 0:
                        z.append(denominator**2)
            balance.append(sum((self._balance(s) for s in scores), torch.zeros(())))
            loads = [a + b for a, b in zip(loads, chosen, strict=True)] if loads else chosen
        means = [torch.stack(own).mean() for own in nll]
        sequence = alpha * torch.stack(balance).mean()
        z_mean = torch.stack(z).mean()
        mtp = sum(means[1:], torch.zeros(())) / max(1, ahead - 1)
        total = means[0] + mtp_weight * mtp + z_weight * z_mean + sequence
        return NaiveLosses(heads=means, z=z_mean, sequence=sequence, total=total, loads=loads)

    def _row(
        self, tokens: Tensor, documents: Sequence[int]
    ) -> tuple[list[Tensor], Scores, list[Tensor]]:
        """Hidden states of every head, scores and loads of every gate."""
        scores: Scores = []
        loads: list[Tensor] = []
        length = sum(documents)
        embedding = self.leaves["embed_tokens.weight"]
        x = embedding[tokens[:length]]
        for layer in range(self.config.num_hidden_layers):
            x = self._layer(f"layers.{layer}.", layer, x, documents, scores, loads)
        hidden = [self._norm("norm.weight", x)]
        for depth in range(self.config.num_nextn_predict_layers):
            prefix = f"mtp.{depth}."
            embedded = self.leaves.get(f"{prefix}embed_tokens.weight", embedding)
            embedded = embedded[tokens[depth + 1 : length + depth + 1]]
            joined = torch.cat(
                [
                    self._norm(f"{prefix}enorm.weight", embedded),
                    self._norm(f"{prefix}hnorm.weight", hidden[-1]),
                ],
                dim=1,
            )
            x = joined @ self.leaves[f"{prefix}eh_proj.weight"].T
            layer = self.config.num_hidden_layers + depth
            x = self._layer(f"{prefix}block.", layer, x, documents, scores, loads)
            hidden.append(self._norm(f"{prefix}norm.weight", x))
        return hidden, scores, loads

    def _layer(
        self,
        prefix: str,
        layer: int,
        x: Tensor,
        documents: Sequence[int],
        scores: Scores,
        loads: list[Tensor],
    ) -> Tensor:
        normed = self._norm(f"{prefix}input_layernorm.weight", x)
        parts = [self._attention(f"{prefix}self_attn.", part) for part in normed.split(documents)]
        x = x + torch.cat(parts)
        normed = self._norm(f"{prefix}post_attention_layernorm.weight", x)
        if not self.config.is_moe_layer(layer):
            return x + self._mlp(f"{prefix}mlp.", normed)
        assert self.config.moe is not None
        out, own_scores, load = self._experts(f"{prefix}mlp.", normed, self.config.moe)
        scores.append(own_scores)
        loads.append(load)
        return x + out

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        """Equations 1 to 11, every head's keys and values written out."""
        dims = self.config.attention
        assert isinstance(dims, MLAConfig)
        p = {n.removeprefix(prefix): t for n, t in self.leaves.items() if n.startswith(prefix)}
        heads, nope, rank = dims.num_attention_heads, dims.qk_nope_head_dim, dims.kv_lora_rank
        q = self._norm(f"{prefix}q_a_layernorm.weight", x @ p["q_a_proj.weight"].T, 1e-6)
        q = (q @ p["q_b_proj.weight"].T).view(len(x), heads, -1)
        latent, k_rope = (x @ p["kv_a_proj_with_mqa.weight"].T).split(
            [rank, dims.qk_rope_head_dim], dim=1
        )
        latent = self._norm(f"{prefix}kv_a_layernorm.weight", latent, 1e-6)
        kv = (latent @ p["kv_b_proj.weight"].T).view(len(x), heads, -1)
        q_rope, k_rope = self._rotated(q[..., nope:]), self._rotated(k_rope[:, None])
        outputs = []
        for head in range(heads):
            scores = q[:, head, :nope] @ kv[:, head, :nope].T + q_rope[:, head] @ k_rope[:, 0].T
            scores = scores / (nope + dims.qk_rope_head_dim) ** 0.5
            later = torch.ones_like(scores).triu(1).bool()
            outputs.append(scores.masked_fill(later, -torch.inf).softmax(1) @ kv[:, head, nope:])
        return torch.cat(outputs, dim=1) @ p["o_proj.weight"].T

    def _rotated(self, x: Tensor) -> Tensor:
        """Interleaved pairs as complex numbers; angles in fp32 as every runtime has them."""
        dim = x.shape[-1]
        inverse = 1.0 / self.config.rope.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
        angles = (torch.arange(len(x)).float()[:, None] * inverse)[:, None]
        turn = torch.complex(angles.cos().double(), angles.sin().double())
        pairs = torch.complex(x[..., 0::2], x[..., 1::2])
        return torch.view_as_real(pairs * turn).flatten(-2)

    def _experts(self, prefix: str, x: Tensor, moe: MoEConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Equations 12 to 16 and the limit to groups, one token at a time."""
        scores = (x @ self.leaves[f"{prefix}gate.weight"].T).sigmoid()
        biased = (scores + self.leaves[f"{prefix}gate.e_score_correction_bias"]).detach()
        gate_up = self.leaves[f"{prefix}experts.gate_up_proj"]
        down = self.leaves[f"{prefix}experts.down_proj"]
        load = torch.zeros(moe.n_routed_experts, dtype=torch.float64)
        outputs = []
        for t, token in enumerate(x):
            groups = biased[t].view(moe.n_group, -1)
            best = groups.sort(dim=1, descending=True).values[:, :2].sum(dim=1)
            kept = set(best.sort(descending=True).indices[: moe.topk_group].tolist())
            size = groups.shape[1]
            candidates = [e for e in range(moe.n_routed_experts) if e // size in kept]
            candidates.sort(key=lambda e, t=t: -biased[t, e].item())
            chosen = candidates[: moe.num_experts_per_tok]
            load[chosen] += 1
            total = sum(scores[t, e] for e in chosen)
            out = torch.zeros_like(token)
            for e in chosen:
                gate, up = (gate_up[e] @ token).chunk(2)
                value = down[e] @ (gate * gate.sigmoid() * up)
                out = out + moe.routed_scaling_factor * scores[t, e] / total * value
            outputs.append(out)
        shared = self._mlp(f"{prefix}shared_experts.", x)
        return torch.stack(outputs) + shared, scores, load

    def _balance(self, scores: Tensor) -> Tensor:
        """Equations 17 to 20 of one sequence, without alpha."""
        moe = self.config.moe
        assert moe is not None
        length = len(scores)
        result = torch.zeros((), dtype=torch.float64)
        for expert in range(moe.n_routed_experts):
            counted = 0
            for t in range(length):
                better = (scores[t] > scores[t, expert]).sum().item()
                counted += better < moe.num_experts_per_tok
            f = moe.n_routed_experts / (moe.num_experts_per_tok * length) * counted
            share = sum(scores[t, expert] / scores[t].sum() for t in range(length)) / length
            result = result + f * share
        return result

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate = x @ self.leaves[f"{prefix}gate_proj.weight"].T
        up = x @ self.leaves[f"{prefix}up_proj.weight"].T
        return (gate * gate.sigmoid() * up) @ self.leaves[f"{prefix}down_proj.weight"].T

    def _norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        mean = (x * x).sum(dim=-1, keepdim=True) / x.shape[-1]
        eps = self.config.rms_norm_eps if eps is None else eps
        return x / (mean + eps) ** 0.5 * self.leaves[name]

    def _head(self, depth: int) -> Tensor:
        names = [f"mtp.{depth - 1}.head.weight", "lm_head.weight", "embed_tokens.weight"]
        return next(self.leaves[name] for name in names if name in self.leaves)
