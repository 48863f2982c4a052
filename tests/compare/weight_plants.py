"""Planted defects of weights: what they change, and how they must be reported."""

from collections.abc import Callable

import torch

from .weight_defects import (
    ATTENTION,
    MLP,
    Defect,
    WeightPlant,
    all_of,
    changes,
    exchange,
    experts,
    fp8_blocks,
    halves,
    int8_blocks,
    of_heads,
    pairs,
    parts_of_heads,
    rows,
    transposed,
    truncated,
)

PAIRS = "has RoPE rows in pairs (i, i + d/2) where A has (2i, 2i+1)"
HALVES = "has RoPE rows in pairs (2i, 2i+1) where A has (i, i + d/2)"
KV_B, Q_B, KV_A = (
    f"{ATTENTION}{name}.weight" for name in ("kv_b_proj", "q_b_proj", "kv_a_proj_with_mqa")
)
O_PROJ, GATE, BIAS = (
    f"{ATTENTION}o_proj.weight",
    f"{MLP}gate.weight",
    f"{MLP}gate.e_score_correction_bias",
)
DOWN = "model.layers.0.mlp.down_proj.weight"
NOPE, ROPE, LATENT, V = 7, 10, 13, 5
HEADS = 3


def plant(
    name: str, defect: Defect, kind: str, says: str, *places: str, label: str = "B"
) -> WeightPlant:
    return WeightPlant(name=name, defect=defect, kind=kind, says=says, places=places, label=label)


def tensor(
    name: str, change: Callable, kind: str, says: str, at: str, label: str = "B"
) -> WeightPlant:
    return plant(name, changes(at, change), kind, says, at, label=label)


def low(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


V3 = [
    tensor("bias in bf16", low, "rounding", "has A's values rounded to bf16", BIAS),
    tensor("bias truncated", truncated, "rounding", "has A's values truncated to bf16", BIAS),
    tensor(
        "bias in fp16",
        lambda x: x.half().float(),
        "rounding",
        "has A's values rounded to fp16",
        BIAS,
    ),
    tensor(
        "bias in fp8",
        lambda x: x.to(torch.float8_e4m3fn).float(),
        "rounding",
        "has A's values rounded to fp8 (e4m3)",
        BIAS,
    ),
    tensor(
        "matrix stored as bf16",
        lambda x: x.bfloat16(),
        "rounding",
        "has A's values rounded to bf16",
        Q_B,
    ),
    plant(
        "experts exchanged",
        experts({3: 4, 4: 3}),
        "experts",
        "exchanges experts 3 and 4",
        f"{MLP}experts",
    ),
    plant(
        "experts in a cycle",
        experts({0: 1, 1: 2, 2: 0}),
        "experts",
        "has A's experts 1, 2 and 0 in experts 0, 1 and 2",
        f"{MLP}experts",
    ),
    plant(
        "expert doubled",
        experts({5: 2}),
        "experts",
        "has A's expert 2 in expert 5",
        f"{MLP}experts",
    ),
    tensor(
        "router rows exchanged",
        rows([0, 1, 2, 4, 3, *range(5, 12)]),
        "experts",
        "exchanges the router rows of experts 3 and 4",
        GATE,
    ),
    tensor(
        "bias entries exchanged",
        rows([1, 0, *range(2, 12)]),
        "experts",
        "exchanges experts 0 and 1",
        BIAS,
    ),
    plant(
        "gate and up of an expert",
        exchange(f"{MLP}experts.5.gate_proj.weight", f"{MLP}experts.5.up_proj.weight"),
        "gate_up",
        "exchanges gate_proj and up_proj",
        f"{MLP}experts.5",
    ),
    plant(
        "gate and up of shared experts",
        exchange(f"{MLP}shared_experts.gate_proj.weight", f"{MLP}shared_experts.up_proj.weight"),
        "gate_up",
        "exchanges gate_proj and up_proj",
        f"{MLP}shared_experts",
    ),
    tensor(
        "rope rows of q",
        of_heads(HEADS, slice(NOPE, None), halves),
        "rope_rows",
        f"{PAIRS}, in all heads",
        Q_B,
    ),
    tensor(
        "rope rows of one head",
        of_heads(HEADS, slice(NOPE, None), halves, (1,)),
        "rope_rows",
        f"{PAIRS}, in head 1",
        Q_B,
    ),
    tensor(
        "rope rows of two heads, twice",
        of_heads(HEADS, slice(NOPE, None), lambda x: halves(halves(x)), (0, 2)),
        "rope_rows",
        "has RoPE rows reordered twice, in heads 0 and 2",
        Q_B,
    ),
    tensor(
        "rope rows of the key", of_heads(1, slice(LATENT, None), halves), "rope_rows", PAIRS, KV_A
    ),
    tensor(
        "rope rows first",
        lambda x: torch.cat([x[LATENT:], x[:LATENT]]),
        "parts",
        "has RoPE rows before latent rows",
        KV_A,
    ),
    tensor(
        "k of a head transposed",
        of_heads(HEADS, slice(NOPE), transposed, (1,)),
        "transposed",
        "has the k rows of head 1 transposed",
        KV_B,
    ),
    tensor(
        "v of all heads transposed",
        of_heads(HEADS, slice(NOPE, None), transposed),
        "transposed",
        "has the v rows of all heads transposed",
        KV_B,
    ),
    tensor(
        "a head transposed",
        of_heads(HEADS, slice(None), transposed, (2,)),
        "transposed",
        "has the rows of head 2 transposed",
        KV_B,
    ),
    tensor(
        "v before k",
        of_heads(HEADS, slice(None), lambda x: torch.cat([x[NOPE:], x[:NOPE]])),
        "parts",
        "has v rows before k rows in all heads",
        KV_B,
    ),
    tensor(
        "all k before all v",
        lambda x: torch.cat(
            [
                x.unflatten(0, (HEADS, -1))[:, part].flatten(0, 1)
                for part in (slice(NOPE), slice(NOPE, None))
            ]
        ),
        "parts",
        "has the k rows of all heads before the v rows",
        KV_B,
    ),
    tensor(
        "heads exchanged",
        parts_of_heads(HEADS, slice(None), [2, 1, 0]),
        "heads",
        "exchanges heads 0 and 2",
        KV_B,
    ),
    tensor(
        "k of heads exchanged",
        parts_of_heads(HEADS, slice(NOPE), [1, 0, 2]),
        "heads",
        "exchanges the k rows of heads 0 and 1",
        KV_B,
    ),
    tensor(
        "columns of heads exchanged",
        lambda x: parts_of_heads(HEADS, slice(None), [0, 2, 1])(x.T).T,
        "heads",
        "exchanges heads 1 and 2",
        O_PROJ,
    ),
    tensor(
        "head-minor order",
        lambda x: x.unflatten(0, (HEADS, -1)).transpose(0, 1).flatten(0, 1),
        "heads",
        "has rows in the order (channel, head), not (head, channel)",
        KV_B,
    ),
    tensor(
        "a head without values",
        of_heads(HEADS, slice(NOPE), torch.zeros_like, (2,)),
        "constant",
        "has zeros in the k rows of head 2",
        KV_B,
    ),
    tensor("scaled", lambda x: x * 0.25, "scale", "scales the weight by 0.25", O_PROJ),
    tensor(
        "a head scaled",
        of_heads(HEADS, slice(NOPE, None), lambda x: x * 3, (0,)),
        "scale",
        "scales the RoPE rows of head 0 by 3",
        Q_B,
    ),
    tensor(
        "norm scaled by column",
        lambda x: x * torch.linspace(1, 2, 11),
        "scale",
        "scales every column by its own factor",
        Q_B,
    ),
    tensor(
        "norm around zero", lambda x: x - 1, "offset", "adds -1 to the weight", "model.norm.weight"
    ),
    plant(
        "another layer's",
        lambda w: w.update({O_PROJ: w["model.layers.0.self_attn.o_proj.weight"]}),
        "other_layer",
        "has the weights of A's layer 0 in layer 1",
        O_PROJ,
    ),
    plant(
        "another layer's norm in the last MTP module",
        lambda w: w.update({"model.layers.3.enorm.weight": w["model.layers.2.enorm.weight"]}),
        "other_layer",
        "has the weights of A's layer 2 in layer 3",
        "model.layers.3.enorm.weight",
    ),
    plant(
        "the head's in place of the embedding",
        lambda w: w.update({"model.embed_tokens.weight": w["lm_head.weight"]}),
        "other_tensor",
        "has A's lm_head.weight in this place",
        "model.embed_tokens.weight",
    ),
    tensor(
        "a row perturbed",
        lambda x: x + 0.1 * (torch.arange(len(x)) == 3)[:, None],
        "unexplained",
        "differs in 1 of 34 rows, first in row 3",
        DOWN,
    ),
    tensor(
        "a head perturbed",
        of_heads(
            HEADS, slice(NOPE), lambda x: x + torch.linspace(-1, 1, x.numel()).view(x.shape), (1,)
        ),
        "unexplained",
        "differs in the k rows of head 1",
        KV_B,
    ),
]
Q = f"{ATTENTION}q_proj.weight"
DIRECT = [
    tensor(
        "rope rows of q_proj",
        of_heads(HEADS, slice(NOPE, None), halves, (0, 1)),
        "rope_rows",
        f"{PAIRS}, in heads 0 and 1",
        Q,
    ),
]
UP = f"{MLP}up_proj.weight"


def in_blocks(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Changes the columns that are whole blocks."""
    return lambda x: torch.cat([change(x[:, :64]), x[:, 64:]], dim=1)


K = f"{ATTENTION}k_proj.weight"
LLAMA = [
    plant(
        "permuted as in GGUF",
        all_of(
            changes(Q, of_heads(6, slice(None), pairs)), changes(K, of_heads(3, slice(None), pairs))
        ),
        "rope_rows",
        f"{HALVES}, in all heads",
        Q,
        K,
    ),
    tensor(
        "keys permuted as one head", pairs, "rope_rows", f"{HALVES}, as for 1 head instead of 3", K
    ),
    tensor(
        "heads of values exchanged",
        parts_of_heads(3, slice(None), [1, 0, 2]),
        "heads",
        "exchanges heads 0 and 1",
        f"{ATTENTION}v_proj.weight",
    ),
    tensor(
        "int8 blocks",
        in_blocks(lambda x: int8_blocks(x, 32)),
        "rounding",
        "has A's values rounded to int8 blocks of 32",
        UP,
    ),
    tensor(
        "fp8 blocks",
        in_blocks(fp8_blocks),
        "rounding",
        "has A's values rounded to fp8 (e4m3) blocks",
        UP,
    ),
    tensor(
        "fp8 blocks as bf16",
        in_blocks(lambda x: low(fp8_blocks(x))),
        "rounding",
        "has A's values rounded to fp8 (e4m3) blocks",
        UP,
    ),
    plant(
        "gate and up of an MLP",
        exchange(UP, f"{MLP}gate_proj.weight"),
        "gate_up",
        "exchanges gate_proj and up_proj",
        MLP.rstrip("."),
    ),
]
PLANTS = (
    [("v3", each) for each in V3]
    + [("direct", each) for each in DIRECT]
    + [("llama", each) for each in LLAMA]
)
