"""Mistakes in sparse attention (DSA): known ones of public implementations among them."""

from .mutant import Mutant

OPS, MODEL = "tests/unit/ops/test_sparse_attention.py::", "tests/unit/model/"
INDEXER, LAYERS = MODEL + "test_indexer.py::", MODEL + "test_sparse_mla.py::"
NATIVE = "tests/native/test_sparse_attention.py::"
FILE = "ops/sparse_attention.py"

LOSS = "ops/indexer_loss.py"
TRAINING = "tests/unit/train/test_sparse_training.py::"
WRITTEN = TRAINING + "test_gradients_written_out"
SPARSE = [
    Mutant(
        "DSA training: KL with the arguments exchanged",
        LOSS,
        "return (torch.xlogy(target, target) - cross).sum()",
        "own = log_shares.masked_fill(~mask, 0.0)\n"
        "    return (own.exp() * mask * (own - target.clamp(min=1e-30).log())).sum()",
        WRITTEN,
    ),
    Mutant(
        "DSA training: target of one head",
        LOSS,
        "return out, shares.detach().sum(dim=0), mass",
        "return out, shares.detach()[0], mass",
        WRITTEN,
    ),
    Mutant(
        "DSA training: KL over all tokens in the sparse stage",
        LOSS,
        "kl = index_divergence(scores, target, mask)",
        "kl = index_divergence(scores, target, visible)",
        WRITTEN,
    ),
    Mutant(
        "DSA training: recall of sparse attention",
        LOSS,
        "whole = scores.masked_fill(~visible, -torch.inf)",
        "whole = masked",
        WRITTEN,
    ),
    Mutant(
        "DSA training: dense attention in the sparse stage",
        LOSS,
        "mask = visible if objective.is_dense else picked",
        "mask = visible",
        WRITTEN,
    ),
    Mutant(
        "DSA training: input of the indexer not detached",
        "train/layers/sparse_mla.py",
        "given = x.detach()",
        "given = x",
        WRITTEN,
    ),
    Mutant(
        "DSA training: query latent of the indexer not detached",
        "train/layers/sparse_mla.py",
        "self.indexer.queries(given, q_latent.detach(), rope)",
        "self.indexer.queries(given, q_latent, rope)",
        WRITTEN,
    ),
    Mutant(
        "DSA training: shared choices count as layers of their own",
        "train/layers/sparse_mla.py",
        "self.kl_weight / self.served",
        "self.kl_weight",
        WRITTEN + "[sparse-sharing]",
    ),
    Mutant(
        "DSA training: recomputed layers are counted twice",
        "train/layers/sparse_mla.py",
        "if weight is not None and torch._C._current_graph_task_id() == -1:",
        "if weight is not None:",
        TRAINING + "test_blocks_and_recomputation_change_nothing",
    ),
    Mutant(
        "DSA training: gradients of later keys of a block are dropped",
        LOSS,
        "key_gradient += of_keys",
        "key_gradient[: len(q)] += of_keys[: len(q)]",
        TRAINING + "test_blocks_and_recomputation_change_nothing",
    ),
    Mutant(
        "DSA training: the warm-up moves routing biases",
        "train/step/step.py",
        'match != "attention" and not plan.phase.is_warmup',
        'match != "attention"',
        TRAINING + "test_warm_up_lowers_the_divergence_and_moves_nothing_else",
    ),
    Mutant(
        "DSA: index scores without ReLU",
        FILE,
        "torch.relu(products * keys.shape[-1] ** -0.5)",
        "products * keys.shape[-1] ** -0.5",
        OPS + "test_scores_by_hand",
    ),
    Mutant(
        "DSA: index scores without d_I^-0.5",
        FILE,
        "torch.relu(products * keys.shape[-1] ** -0.5)",
        "torch.relu(products)",
        OPS + "test_scores_by_hand",
    ),
    Mutant(
        "DSA: index scores in the activation dtype",
        FILE,
        "index.q.to(wide), keys.to(wide))",
        "index.q, keys.to(index.q.dtype)).to(wide)",
        OPS + "test_scores_of_narrow_inputs_are_fp32",
    ),
    Mutant(
        "DSA: top-k before the causal mask",
        FILE,
        "    scores = scores.masked_fill(~visible, -torch.inf)\n",
        "",
        OPS + "test_later_tokens_are_masked_before_the_choice",
    ),
    Mutant(
        "DSA: ties to the highest position",
        FILE,
        "equal.cumsum(dim=-1) <= missing",
        "equal.flip(-1).cumsum(dim=-1).flip(-1) <= missing",
        OPS + "test_ties_go_to_the_lowest_positions",
    ),
    Mutant(
        "DSA: -0 below 0",
        FILE,
        "better, equal = scores > last, scores == last",
        "better = scores > last\n    equal = (1 / scores) == (1 / last)",
        OPS + "test_ties_go_to_the_lowest_positions",
    ),
    Mutant(
        "DSA: one token too many is dense",
        FILE,
        "max(topk - start, 0)",
        "max(topk + 1 - start, 0)",
        OPS + "test_queries_that_see_at_most_topk_tokens",
    ),
    Mutant(
        "DSA: native scores and the reference differ in ReLU",
        FILE,
        "torch.relu(products * keys.shape[-1] ** -0.5)",
        "products * keys.shape[-1] ** -0.5",
        NATIVE + "test_scores_are_near_to_the_reference",
    ),
    Mutant(
        "DSA: native choice and the reference differ in ties",
        FILE,
        "equal.cumsum(dim=-1) <= missing",
        "equal.flip(-1).cumsum(dim=-1).flip(-1) <= missing",
        NATIVE + "test_scores_and_choice_are_exact",
    ),
    Mutant(
        "DSA: native choice and the reference differ by one token",
        FILE,
        "missing = topk - better.sum",
        "missing = topk - 1 - better.sum",
        NATIVE + "test_the_choice_is_that_of_the_scores",
    ),
    Mutant(
        "DSA: index keys in a wrong lane of their tile",
        "attention/index_tiles.py",
        "slots % TOKENS] =",
        "(slots + 1) % TOKENS] =",
        NATIVE + "test_keys_are_stored_as_in_python",
    ),
    Mutant(
        "DSA: index keys of a wrong page",
        "attention/index_tiles.py",
        "tiles[slots // TOKENS,",
        "tiles[slots // TOKENS - 1,",
        NATIVE + "test_keys_are_stored_as_in_python",
    ),
    Mutant(
        "DSA: head weights without H_I^-0.5",
        "model/indexer.py",
        " * len(self.weight) ** -0.5",
        "",
        INDEXER + "test_queries_by_hand",
    ),
    Mutant(
        "DSA: head weights in the activation dtype",
        "model/indexer.py",
        "F.linear(x.to(wide), self.weight.to(wide))",
        "F.linear(x, self.weight.to(x.dtype))",
        INDEXER + "test_weights_are_fp32_in_a_narrow_model",
    ),
    Mutant(
        "DSA: LayerNorm of index keys without bias",
        "ops/norm.py",
        "F.layer_norm(wide, weight.shape, weight, bias, eps)",
        "F.layer_norm(wide, weight.shape, weight, None, eps)",
        INDEXER + "test_keys_by_hand",
    ),
    Mutant(
        "DSA: indexer in the other RoPE layout",
        "model/indexer.py",
        "interleave=self.dims.rope_interleave",
        "interleave=not self.dims.rope_interleave",
        INDEXER + "test_keys_by_hand",
    ),
    Mutant(
        "DSA: the last channels rotate",
        "model/indexer.py",
        "rotary, rest = x.split([self.rope_dim, x.shape[-1] - self.rope_dim], dim=-1)",
        "rest, rotary = x.split([x.shape[-1] - self.rope_dim, self.rope_dim], dim=-1)",
        INDEXER + "test_queries_by_hand",
    ),
    Mutant(
        "DSA: index queries from the layer's input",
        "model/mla.py",
        "own.queries(x, q_latent, rope)",
        "own.queries(x, x[:, : q_latent.shape[1]], rope)",
        LAYERS + "test_the_choice_by_hand",
    ),
    Mutant(
        "DSA: a sequence of a batch takes the choice of the first",
        "attention/cached.py",
        "self._chosen[number],",
        "self._chosen[0],",
        LAYERS + "test_sequences_of_a_batch_choose_among_their_own_tokens",
    ),
    Mutant(
        "DSA: MTP modules share the last layer's choice",
        "config/model.py",
        "replace(last.indexer, is_shared=False)",
        "last.indexer",
        LAYERS + "test_mtp_modules_have_an_indexer_of_their_own",
    ),
    Mutant(
        "DSA: indexer left out of long contexts",
        "config/attention.py",
        "context <= self.indexer.index_topk",
        "context >= self.indexer.index_topk",
        LAYERS + "test_a_served_context_up_to_topk_is_dense",
    ),
]
