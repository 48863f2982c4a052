"""Mistakes in sparse attention (DSA): known ones of public implementations among them."""

from .mutant import Mutant

OPS, MODEL = "tests/unit/ops/test_sparse_attention.py::", "tests/unit/model/"
INDEXER, LAYERS = MODEL + "test_indexer.py::", MODEL + "test_sparse_mla.py::"
FILE = "ops/sparse_attention.py"

SPARSE = [
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
