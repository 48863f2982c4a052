"""Mistakes in the placement of experts and in the step model of serving."""

from .mutant import Mutant

EPLB = "tests/unit/ops/test_expert_placement.py::"
BALANCER = "tests/unit/engine/test_expert_balancer.py::"
ESTIMATE = "tests/unit/plan/serving/test_estimate.py::"
ROOFLINE = "tests/unit/bench/test_roofline.py::"

PLANNING = [
    Mutant(
        "EPLB: replicas for the largest load, not the largest load per replica",
        "ops/expert_placement.py",
        "busiest = int((loads / counts).argmax())",
        "busiest = int(loads.argmax())",
        EPLB + "test_the_published_example",
    ),
    Mutant(
        "EPLB: devices packed by the load of experts, not of replicas",
        "ops/expert_placement.py",
        "shares = (loads[experts] / torch.bincount(owners))[owners]",
        "shares = loads[experts][owners]",
        EPLB + "test_the_published_example",
    ),
    Mutant(
        "EPLB: groups of experts spread over nodes",
        "ops/expert_placement.py",
        "experts = [group * size + place for group in own_groups for place in range(size)]",
        "experts = [group + place * groups for group in own_groups for place in range(size)]",
        EPLB + "test_properties_on_random_loads",
    ),
    Mutant(
        "EPLB while serving: loads since the start, not since the last placement",
        "engine/expert_balancer.py",
        "loads = torch.stack([counts[n] - self._before.get(n, 0) for n in counts])",
        "loads = torch.stack([counts[n] for n in counts])",
        BALANCER + "test_experts_are_placed_by_their_new_loads_and_read_with_adapters",
    ),
    Mutant(
        "EPLB while serving: moved experts without LoRA adapters",
        "checkpoint/read_experts.py",
        "add_adapters(model, adapters)",
        "add_adapters(model, [])",
        BALANCER + "test_experts_are_placed_by_their_new_loads_and_read_with_adapters",
    ),
    Mutant(
        "EPLB while serving: places of a process in the order of their load",
        "model/share.py",
        ".sort(dim=2).values.flatten(1)",
        ".flatten(1)",
        "tests/unit/model/test_share.py::test_each_process_has_as_many_places_by_ascending_expert",
    ),
    Mutant(
        "EPLB while serving: every process has the experts of the first",
        "model/moe.py",
        "return self.places[self.rank * each : (self.rank + 1) * each]",
        "return self.places[:each]",
        BALANCER + "test_experts_are_placed_by_their_new_loads_and_read_with_adapters",
    ),
    Mutant(
        "step model: sparse attention reads no index keys",
        "plan/serving/step_cost.py",
        "total += number * (seen * (size - index) + scored * index)",
        "total += number * seen * (size - index)",
        ROOFLINE + "test_sparse_attention_reads_all_index_keys_and_the_chosen_entries",
    ),
    Mutant(
        "step model: tensor parallelism divides latents",
        "plan/serving/step_cost.py",
        "parts = tensor if isinstance(attention, GQAConfig) else 1",
        "parts = tensor",
        ESTIMATE + "test_memory_is_of_the_fullest_rank",
    ),
    Mutant(
        "step model: data-parallel attention divides a sequence",
        "plan/serving/step_cost.py",
        "return replace(self, sequences=-(-self.sequences // data))",
        "return replace(self, sequences=self.sequences / data)",
        ESTIMATE + "test_a_sequence_is_not_divided_by_data_parallel_attention",
    ),
    Mutant(
        "traffic: every rank sends the tokens of all ranks with other sequences",
        "plan/serving/estimate.py",
        "own = step.of_rank(data)",
        "own = step",
        ESTIMATE + "test_messages_are_of_a_rank_s_own_sequences",
    ),
    Mutant(
        "memory: a tied embedding is in no stage before the last",
        "plan/serving/estimate.py",
        "return weights.head * is_first",
        "return 0",
        ESTIMATE + "test_tied_embeddings_are_in_the_first_and_last_stage",
    ),
    Mutant(
        "step model: the mean rank, not the busiest",
        "plan/serving/expert_load.py",
        "used = ((per_expert > 0) @ members).max(axis=1).mean()",
        "used = ((per_expert > 0) @ members).mean()",
        ESTIMATE + "test_the_busiest_rank_has_more_than_the_mean",
    ),
]
