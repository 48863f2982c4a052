"""Mistakes of reinforcement learning: activations, losses, and the weights of rollouts."""

from .mutant import Mutant

POLICY = "tests/unit/train/policy/"
NEAR_FP64 = "test_gradients_are_as_near_to_fp64_as_those_of_pytorch"
GRADIENTS = f"{POLICY}test_gradients.py::{NEAR_FP64}[mla-moe-mtp]"
LOSSES = POLICY + "test_loss.py::test_losses_equal_trl"
EVALUATED = POLICY + "test_evaluation.py::"
SHARES = POLICY + "test_data_parallel.py::"
WHOLE = POLICY + "test_grpo.py::test_a_run_logs_and_exports"

REINFORCING = [
    Mutant(
        "policy: an MLP's gradient at the input of the attention",
        "train/policy/backward.py",
        "(residuals[2 * number + 1],)",
        "(residuals[2 * number],)",
        GRADIENTS,
    ),
    Mutant(
        "policy: gradient without the temperature",
        "train/policy/distribution.py",
        "return grad.div_(self.temperature)",
        "return grad",
        GRADIENTS,
    ),
    Mutant(
        "policy: factors of experts have no gradient",
        "train/policy/backward.py",
        "weights=substituted(gates, routing.weights)",
        "weights=gates",
        GRADIENTS,
    ),
    Mutant(
        "policy: prompts computed on the decode path",
        "train/policy/forward.py",
        "length, path = self._planner.next_chunk(start, size, size, chunk)",
        'length, path = self._planner.next_chunk(start, size, size, chunk)[0], "decode"',
        POLICY + "test_one_arithmetic.py::"
        "test_trainer_and_sampler_have_equal_logits_and_experts[mla-moe-mtp-plain]",
    ),
    Mutant(
        "loss: the better of clipped and unclipped",
        "train/policy/loss.py",
        "-torch.min(bounded * advantages, clipped * advantages)",
        "-torch.max(bounded * advantages, clipped * advantages)",
        LOSSES + "[all-{}-dapo]",
    ),
    Mutant(
        "policy: every process learns the whole batch",
        "train/policy/learner.py",
        "own = self._mesh.share(len(batch.sequences))",
        "own = range(len(batch.sequences))",
        SHARES + "test_gradients_and_figures_are_those_of_one_process",
    ),
    Mutant(
        "policy: sequences are balanced together",
        "train/policy/balance.py",
        "routing.scores.split(list(self.lengths))",
        "(routing.scores,)",
        POLICY + "test_balance.py::test_the_loss_is_that_of_pretraining",
    ),
    Mutant(
        "policy: MTP modules learn the token before their target",
        "train/policy/mtp.py",
        "targets += tokens[depth + 2 : depth + 2 + size]",
        "targets += tokens[depth + 1 : depth + 1 + size]",
        POLICY + "test_mtp.py::test_modules_have_the_gradients_of_fp64",
    ),
    Mutant(
        "rollouts: processes sample the same draws",
        "train/policy/generation.py",
        "self._scored(self.draws + own.start, len(own))",
        "self._scored(self.draws, len(own))",
        SHARES + "test_batches_are_those_of_one_process",
    ),
    Mutant(
        "rollouts: tool messages are trained",
        "train/policy/rollouts.py",
        "first, used = gap.stop, used",
        "first, used = gap.start, used",
        POLICY + "test_tools.py::test_tool_messages_are_the_templates_and_are_masked",
    ),
    Mutant(
        "loss: every turn counts as a completion",
        "train/policy/learner.py",
        "numbers = self.completions or range(len(self.sequences))",
        "numbers = range(len(self.sequences))",
        POLICY + "test_tools.py::"
        "test_gradients_are_those_of_whole_completions_without_tool_messages",
    ),
    Mutant(
        "rollouts: sampled with the weights before the update",
        "train/policy/phase.py",
        "            self._engine.refresh()\n",
        "",
        WHOLE,
    ),
    Mutant(
        "rollouts: rounded weights stay those before the update",
        "train/policy/weights.py",
        "self.tensors[name].copy_(value)",
        "pass",
        POLICY + "test_weights.py::test_an_update_is_rounded_into_the_same_tensors",
    ),
    Mutant(
        "evaluation: pass@k as if samples were drawn with replacement",
        "train/policy/evaluation.py",
        "1.0 - math.comb(n - c, k) / math.comb(n, k)",
        "1.0 - (1.0 - c / n) ** k",
        EVALUATED + "test_pass_at_k_is_the_share_of_subsets_with_a_pass[5]",
    ),
    Mutant(
        "evaluation: held-out prompts have the random numbers of training",
        "train/policy/rollouts.py",
        "partial(draw_seed, self._seed, purpose=purpose)",
        "partial(draw_seed, self._seed)",
        EVALUATED + "test_a_run_and_lowlat_eval_of_its_model_agree",
    ),
]
