"""Mistakes in what the filters keep, in the draw, and in log-probabilities of prompts."""

from .mutant import Mutant

TEST = "tests/unit/ops/test_sampling.py::"
PROMPTS = "tests/unit/serve/test_prompt_logprobs.py::"
BANS = "tests/unit/engine/test_token_bans.py::"

SAMPLING = [
    Mutant(
        "sampling: ends banned for one token too long",
        "engine/token_bans.py",
        "self._num_outputs < self._min_tokens",
        "self._num_outputs <= self._min_tokens",
        BANS + "test_min_tokens_bans_the_ends_up_to_its_count",
    ),
    Mutant(
        "sampling: the first token of a bad word banned",
        "engine/token_bans.py",
        "word[-1] for word",
        "word[0] for word",
        BANS + "test_bad_words_ban_their_last_token_after_the_others",
    ),
    Mutant(
        "sampling: the token that crosses top_p dropped",
        "ops/sampling.py",
        "weights[ranking[1:][is_enough[:-1]]] = 0.0",
        "weights[ranking[is_enough]] = 0.0",
        TEST + "test_top_p_keeps_the_shortest_prefix_that_reaches_it",
    ),
    Mutant(
        "sampling: one token more than reaches top_p",
        "ops/sampling.py",
        "reached >= top_p * reached[-1]",
        "reached > top_p * reached[-1]",
        TEST + "test_top_p_reached_exactly_is_reached",
    ),
    Mutant(
        "sampling: top_p of all tokens, not of those top_k left",
        "ops/sampling.py",
        "top_p * reached[-1]",
        "top_p * (scores - largest).div(temperature).exp().sum()",
        TEST + "test_top_p_counts_probabilities_renormalised_after_top_k",
    ),
    Mutant(
        "sampling: equal logits ranked in any order",
        "ops/sampling.py",
        "logits.sort(descending=True, stable=True).indices",
        "logits.flip(0).sort(descending=True, stable=True).indices.neg() + len(logits) - 1",
        TEST + "test_top_k_keeps_exactly_k_lowest_ids_first",
    ),
    Mutant(
        "sampling: min_p of the whole in place of the largest",
        "ops/sampling.py",
        "weights[weights < min_p] = 0.0",
        "weights[weights < min_p * weights.sum()] = 0.0",
        TEST + "test_min_p_is_relative_to_the_likeliest",
    ),
    Mutant(
        "sampling: filters before temperature",
        "ops/sampling.py",
        "weights = ((scores - largest) / temperature).exp()",
        "weights = (scores - largest).exp()",
        TEST + "test_temperature_is_applied_before_the_filters",
    ),
    Mutant(
        "prompt log-probabilities: about the token itself, not the next one",
        "engine/engine.py",
        "request.prompt[chunk.start + 1 : chunk.start + 1 + chunk.length]",
        "request.prompt[chunk.start : chunk.start + chunk.length]",
        PROMPTS + "test_the_engine_scores_prompts",
    ),
    Mutant(
        "prompt log-probabilities: ranks counted from 0",
        "engine/sampler.py",
        "ranks = (logprobs > chosen).sum(dim=1) + 1",
        "ranks = (logprobs > chosen).sum(dim=1)",
        PROMPTS + "test_the_engine_scores_prompts",
    ),
    Mutant(
        "prompt log-probabilities: of a preempted prompt twice",
        "engine/engine.py",
        "request.prompt_logprobs.truncate(chunk.start)",
        "pass",
        PROMPTS + "test_preempted_prompts_are_scored_again",
    ),
    Mutant(
        "prompt log-probabilities: none of tokens found in the prefix cache",
        "engine/kv_cache_manager.py",
        "if self.prefix is None or not sequence.request.reads_prefix_cache:",
        "if self.prefix is None:",
        PROMPTS + "test_the_engine_scores_prompts",
    ),
]
