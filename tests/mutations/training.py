"""Mistakes of the trainer: losses, balancing, optimisers, states, and what they compute with."""

from .mutant import Mutant

MODEL, ATTENTION = "tests/unit/model/", "tests/unit/attention/"
TRAIN = "tests/unit/train/"

LOSSES = [
    Mutant(
        "loss: mean of every micro-batch",
        "train/step/passes.py",
        "                targets=targets,\n",
        "                targets=[int(part.loss_mask.sum())] * num_ahead,\n",
        TRAIN + "test_loss.py::test_micro_batches_change_nothing",
    ),
    Mutant(
        "loss: what fills a row of chats is learned",
        "data/packing.py",
        "loss_mask = np.zeros((count, self._length), np.bool_)",
        "loss_mask = np.ones((count, self._length), np.bool_)",
        "tests/unit/data/test_chat_packing.py::test_every_chat_is_whole_in_one_row[0-False]",
    ),
    Mutant(
        "loss: lambda left out",
        "train/step/loss.py",
        "weight = mtp_weight / (num_ahead - 1) if depth else 1.0",
        "weight = 1.0 / (num_ahead - 1) if depth else 1.0",
        TRAIN + "test_loss.py::test_a_weight_of_zero_takes_a_loss_out",
    ),
    Mutant(
        "loss: MTP losses summed over depths",
        "train/step/loss.py",
        "weight = mtp_weight / (num_ahead - 1) if depth else 1.0",
        "weight = mtp_weight if depth else 1.0",
        TRAIN + "test_loss.py::test_a_weight_of_zero_takes_a_loss_out",
    ),
    Mutant(
        "loss: an MTP module predicts across the border of a document",
        "train/step/loss.py",
        "result = result & batch.loss_mask[:, further : length + further]",
        "result = batch.loss_mask[:, further : length + further]",
        TRAIN + "test_loss.py::test_which_targets_count",
    ),
    Mutant(
        "loss: an MTP module embeds the token it is at",
        "train/step/loss.py",
        "ahead = tokens[:, depth : length + depth].flatten()",
        "ahead = tokens[:, depth - 1 : length + depth - 1].flatten()",
        TRAIN + "test_loss.py::test_losses_and_gradients[two MTP modules-False]",
    ),
    Mutant(
        "loss: an MTP module predicts the next token",
        "train/step/loss.py",
        "following = tokens[:, depth + 1 : length + depth + 1].flatten()",
        "following = tokens[:, 1 : length + 1].flatten()",
        TRAIN + "test_loss.py::test_losses_and_gradients[two MTP modules-False]",
    ),
    Mutant(
        "loss: z of the MTP modules too",
        "train/step/loss.py",
        "z_weight=0.0 if depth else z_weight",
        "z_weight=z_weight",
        TRAIN + "test_loss.py::test_a_weight_of_zero_takes_a_loss_out",
    ),
    Mutant(
        "z-loss: subtracted",
        "ops/cross_entropy.py",
        "return nll + z_weight * z, nll, z",
        "return nll - z_weight * z, nll, z",
        TRAIN + "test_loss.py::test_a_weight_of_zero_takes_a_loss_out",
    ),
    Mutant(
        "z-loss: gradient of the other sign",
        "ops/cross_entropy.py",
        "1 + 2 * z_weight * denominator",
        "1 - 2 * z_weight * denominator",
        TRAIN + "test_loss.py::test_losses_and_gradients[no MTP-False]",
    ),
]

BALANCING = [
    Mutant(
        "balance: bias moved with the load",
        "train/step/balance.py",
        "(load.mean() - load).sign()",
        "(load - load.mean()).sign()",
        TRAIN + "test_balance.py::test_bias_moves_against_the_load",
    ),
    Mutant(
        "balance: loads of the last micro-batch alone",
        "train/step/balance.py",
        "observed.counters += torch.bincount(",
        "observed.counters = torch.bincount(",
        TRAIN + "test_balance.py::test_loads_of_the_whole_batch[2-False]",
    ),
    Mutant(
        "balance: recomputed layers counted again",
        "train/step/balance.py",
        "            if not _in_backward():\n                self._count(observed, routing)",
        "            if True:\n                self._count(observed, routing)",
        TRAIN + "test_balance.py::test_loads_of_the_whole_batch[2-True]",
    ),
    Mutant(
        "balance: evaluations counted",
        "train/step/balance.py",
        "if not self._enabled:",
        "if False:",
        TRAIN + "test_balance.py::test_only_observed_passes_count",
    ),
    Mutant(
        "balance: counters kept from the batch before",
        "train/step/balance.py",
        "            observed.counters.zero_()\n",
        "            pass\n",
        TRAIN + "test_balance.py::test_the_load_balancer_drops_the_previous_batch",
    ),
    Mutant(
        "balance: bias moved after a step that was none",
        "train/step/step.py",
        "    if result.is_finite and result.has_targets and trains_gates",
        "    if trains_gates",
        TRAIN + "test_step.py::test_a_step_that_is_not_finite_moves_nothing[gradient-nan]",
    ),
    Mutant(
        "sequence-wise loss: one sequence of the whole micro-batch",
        "train/step/balance.py",
        "routing.scores.unflatten(0, (-1, self._sequence_length // parts))",
        "routing.scores[None]",
        TRAIN + "test_balance.py::test_loads_of_the_whole_batch[2-False]",
    ),
    Mutant(
        "sequence-wise loss: sum over sequences",
        "train/step/balance.py",
        "self.sequence_weight / self._num_sequences * losses.sum()",
        "self.sequence_weight * losses.sum()",
        TRAIN + "test_balance.py::test_loads_of_the_whole_batch[2-False]",
    ),
    Mutant(
        "sequence-wise loss: f without N / K",
        "train/step/balance.py",
        "return counts * (num_experts / (chosen * length))",
        "return counts / length",
        TRAIN + "test_balance.py::test_sequence_loss_by_hand",
    ),
    Mutant(
        "sequence-wise loss: shares not normalised",
        "train/step/balance.py",
        "return (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)",
        "return scores.mean(dim=1)",
        TRAIN + "test_balance.py::test_sequence_loss_by_hand",
    ),
    Mutant(
        "sequence-wise loss: no gradient",
        "train/step/balance.py",
        "return grad, torch.ones_like(ctx.like)",
        "return grad, torch.zeros_like(ctx.like)",
        TRAIN + "test_loss.py::test_losses_and_gradients[no MTP-False]",
    ),
]

OPTIMISING = [
    Mutant(
        "AdamW: norms decay",
        "train/step/optim.py",
        '{"params": [p for _, p in plain], "weight_decay": 0.0}',
        '{"params": [p for _, p in plain], "weight_decay": table.weight_decay}',
        TRAIN + "test_optim.py::test_adamw_by_hand",
    ),
    Mutant(
        "AdamW: gradients not clipped",
        "train/step/optim.py",
        "if 0 < self.max_grad_norm < norm:",
        "if False:",
        TRAIN + "test_optim.py::test_adamw_by_hand",
    ),
    Mutant(
        "optimiser: gradients that are not finite applied",
        "train/step/optim.py",
        "if norm.isfinite():",
        "if True:",
        TRAIN + "test_optim.py::test_gradients_that_are_not_finite_move_nothing[adamw-nan]",
    ),
    Mutant(
        "step: losses that are not finite applied",
        "train/step/step.py",
        "if num_heads and means.isfinite().all():",
        "if num_heads:",
        TRAIN + "test_step.py::test_a_step_that_is_not_finite_moves_nothing[0-nan]",
    ),
    Mutant(
        "Muon: one norm for all experts",
        "train/step/muon.py",
        "x.norm(dim=(-2, -1), keepdim=True)",
        "x.norm()",
        TRAIN + "test_muon.py::test_stacks_are_treated_matrix_by_matrix[dtype1]",
    ),
    Mutant(
        "Muon: gate and up as one matrix",
        "train/step/muon.py",
        "whole.shape[-2] // self._blocks[id(parameter)]",
        "whole.shape[-2]",
        TRAIN + "test_muon.py::test_blocks_are_matrices_of_their_own",
    ),
    Mutant(
        "Muon: no Nesterov momentum",
        "train/step/muon.py",
        'nesterov = parameter.grad.add(momentum, alpha=group["momentum"])',
        "nesterov = momentum",
        TRAIN + "test_muon.py::test_updates_by_hand[shape0]",
    ),
    Mutant(
        "schedule: warm-up begins with nothing",
        "train/recipe/schedule.py",
        "(step - first + 1) / length",
        "(step - first) / length",
        TRAIN + "test_schedule.py::test_warm_up_starts_above_zero_and_arrives_at_its_last_step",
    ),
    Mutant(
        "schedule: every batch begins with the first row",
        "train/recipe/schedule.py",
        "self._before[index][within],",
        "0,",
        TRAIN + "test_schedule.py::test_phases_follow_one_another",
    ),
    Mutant(
        "schedule: every phase reads its data from the first row",
        "train/recipe/schedule.py",
        "first_row=self._first[index] + ",
        "first_row=",
        TRAIN + "test_schedule.py::test_a_phase_continues_in_the_data_of_the_one_before",
    ),
]

STATES = [
    Mutant(
        "resume: optimiser begins anew",
        "train/run/trainer.py",
        "        self.optimizer.load(moments)\n",
        "        pass\n",
        TRAIN + "test_trainer.py::test_a_stopped_run_resumes_exactly[fp32-adamw-none]",
    ),
    Mutant(
        "resume: random numbers begin anew",
        "train/run/trainer.py",
        "torch.set_rng_state(random)",
        "pass",
        TRAIN + "test_trainer.py::test_a_stopped_run_resumes_exactly[fp32-adamw-none]",
    ),
    Mutant(
        "resume: another recipe taken",
        "train/run/state.py",
        "    if differences:\n",
        "    if False:\n",
        TRAIN + "test_state.py::test_what_differs_is_said",
    ),
    Mutant(
        "resume: another config taken",
        "train/run/state.py",
        "    if changes:\n",
        "    if False:\n",
        TRAIN + "test_state.py::test_a_model_of_another_config_is_not_resumed",
    ),
    Mutant(
        "save: tensors that training changes",
        "train/run/state.py",
        'tensor.detach().to("cpu", copy=True)',
        "tensor.detach()",
        TRAIN + "test_state.py::test_a_snapshot_does_not_change",
    ),
    Mutant(
        "export: routing bias in the model's type",
        "train/run/export.py",
        "tensor if name.endswith(ROUTER_BIAS) else tensor.to(stored)",
        "tensor.to(stored)",
        TRAIN + "test_export.py::test_bf16_models_keep_routing_biases",
    ),
    Mutant(
        "stacking: up rows before gate rows",
        "train/layers/stacked_experts.py",
        "gate, up = matrix.chunk(2)",
        "up, gate = matrix.chunk(2)",
        TRAIN + "layers/test_stacked_experts.py::test_there_and_back[dtype0]",
    ),
    Mutant(
        "fused attention: window one key too wide",
        "attention/flash.py",
        "(behind < window)",
        "(behind <= window)",
        ATTENTION + "test_flash.py::test_gqa[1-2-ragged-dtype0]",
    ),
]

DIVERGENCE = "tests/unit/ops/test_divergence.py::test_values_and_gradients_whatever_the_pieces"
DISTILLATION = TRAIN + "test_distillation.py::"

DISTILLING = [
    Mutant(
        "distillation: the student's surprise in place of the teacher's",
        "ops/divergence.py",
        "kl = torch.bmm(p[:, None], surplus[:, :, None])",
        "kl = torch.bmm(log_q.exp()[:, None], surplus[:, :, None])",
        DIVERGENCE,
    ),
    Mutant(
        "distillation: gradient of another function",
        "ops/divergence.py",
        "torch.sub(log_q.exp_(), p, out=p)",
        "torch.mul(log_q.exp_(), p, out=p)",
        DIVERGENCE,
    ),
    Mutant(
        "distillation: layers get what the layers before made",
        "train/step/layerwise.py",
        "given = taught.given.to(dtype)",
        "given = taught.given.to(dtype) if number == 0 else given + made.detach()",
        DISTILLATION + "test_errors_of_layers_by_definition[layers-3]",
    ),
    Mutant(
        "distillation: everything moves",
        "train/run/build.py",
        "        freeze_all_but_attention(model)\n",
        "        pass\n",
        DISTILLATION + "test_only_attention_moves",
    ),
    Mutant(
        "resume: another teacher taken",
        "train/run/state.py",
        'if saved.get("teacher") != inputs.teacher_fingerprint:',
        "if False:",
        DISTILLATION + "test_a_teacher_that_changed_is_refused",
    ),
]

REWARDS = [
    Mutant(
        "rewards: reasoning counts as the answer",
        "train/rewards/functions.py",
        'return "" if is_opened and not is_closed else answer.strip()',
        "return completion",
        TRAIN + "rewards/test_functions.py::test_accuracy",
    ),
    Mutant(
        "rewards: reasoning may end twice",
        "train/rewards/functions.py",
        "text.count(closed) != 1",
        "closed not in text",
        TRAIN + "rewards/test_functions.py::test_think_format",
    ),
    Mutant(
        "rewards: the first tagged answer",
        "train/rewards/functions.py",
        "return found[-1] if found",
        "return found[0] if found",
        TRAIN + "rewards/test_functions.py::test_accuracy",
    ),
]

TRAINING = [*LOSSES, *BALANCING, *OPTIMISING, *STATES, *DISTILLING, *REWARDS]
