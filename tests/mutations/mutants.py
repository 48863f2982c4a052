"""The mistakes: each is one exact replacement in one file, and the test that holds it shut.

A text that is not found exactly once is an error of the list: whoever changes the line updates it.
"""

from .attention import ATTENTION_PATHS, ATTENTION_VARIANTS, INT8_CACHE
from .lora import LORA
from .mutant import Mutant
from .planning import PLANNING
from .policy import REINFORCING
from .positions import QUERIES, ROPE, YARN
from .quantization import QUANTIZED
from .routing import ROUTING
from .sampling import SAMPLING
from .sparse import SPARSE
from .training import TRAINING
from .vendors import GGUF, VENDORS

OPS, MODEL = "tests/unit/ops/", "tests/unit/model/"
POOL = "tests/unit/engine/test_pooling.py::"
LOAD = "tests/unit/checkpoint/test_load.py"


FP8 = [
    Mutant(
        "fp8: floor grid while quantising",
        "ops/fp8.py",
        "grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))",
        "grid = (math.floor(rows / block[0]), math.floor(columns / block[1]))",
        OPS + "test_fp8.py::test_576_rows_are_four_and_a_half_blocks",
    ),
    Mutant(
        "fp8: floor grid of the scales",
        "model/linear.py",
        "return -(-rows // block[0]), -(-columns // block[1])",
        "return rows // block[0], columns // block[1]",
        MODEL + "test_quant.py::test_block_grid_is_a_ceil_grid",
    ),
    Mutant(
        "fp8: padding enters the largest magnitude",
        "ops/fp8.py",
        "padded = torch.zeros(",
        "padded = torch.ones(",
        OPS + "test_fp8.py::test_padding_enters_no_maximum",
    ),
    Mutant(
        "fp8: zero blocks divide by zero",
        "ops/fp8.py",
        "scale = torch.where(scale == 0, 1.0, scale).clamp_min(torch.finfo(torch.float32).tiny)",
        "pass",
        OPS + "test_fp8.py::test_zero_block",
    ),
    Mutant(
        "fp8: ue8m0 scales rounded down",
        "ops/fp8.py",
        "torch.where(mantissa > 0.5, 1.0, 0.5)",
        "torch.full_like(scale, 0.5)",
        OPS + "test_fp8.py::test_ue8m0_scales_are_powers_of_two_rounded_up",
    ),
    Mutant(
        "fp8: scale rounded before the multiply",
        "ops/fp8.py",
        "(weight.to(torch.float32) * scale).to(dtype)",
        "weight.to(dtype) * scale.to(dtype)",
        OPS + "test_fp8.py::test_rounds_once_to_a_narrow_type",
    ),
]

MTP = [
    Mutant(
        "MTP: hidden state first in eh_proj",
        "model/mtp.py",
        "[self.enorm(embedded), self.hnorm(hidden)]",
        "[self.hnorm(hidden), self.enorm(embedded)]",
        MODEL + "test_mtp.py::test_written_out",
    ),
    Mutant(
        "MTP: hidden state joined without its norm",
        "model/mtp.py",
        "self.hnorm(hidden)",
        "hidden",
        MODEL + "test_mtp.py::test_written_out",
    ),
    Mutant(
        "MTP: main hidden state before the final norm",
        "model/transformer.py",
        "return self.norm(x)",
        "return x",
        MODEL + "test_mtp.py::test_main_hidden_states_come_after_the_final_norm",
    ),
    Mutant(
        "MTP: next depth gets the state before the norm",
        "model/mtp.py",
        "return self.norm(self.block(self.eh_proj(joined), rope, attention))",
        "return self.block(self.eh_proj(joined), rope, attention)",
        MODEL + "test_mtp.py::test_second_depth_takes_the_first_ones_output",
    ),
    Mutant(
        "MTP: literal layer number in the model",
        "model/mtp.py",
        "config.num_hidden_layers + depth",
        "61 + depth",
        MODEL + "test_mtp.py::test_layer_numbers_follow_the_decoder_layers",
    ),
    Mutant(
        "MTP: literal layer number in files",
        "checkpoint/mapping.py",
        "model.layers.{config.num_hidden_layers + depth}.",
        "model.layers.{61 + depth}.",
        "tests/unit/checkpoint/test_roundtrip.py::test_names_in_files",
    ),
    Mutant(
        "MTP: embedding at position 0 set to zero",
        "model/transformer.py",
        "embedded = embedding(ahead_ids).to(hidden.dtype)",
        "embedded = embedding(ahead_ids).masked_fill(positions[:, None] == 0, 0.0)",
        MODEL + "test_mtp.py::test_position_zero_keeps_its_embedding",
    ),
    Mutant(
        "MTP: own embedding ignored",
        "model/transformer.py",
        "embedding = self.embed_tokens if module.embed_tokens is None else module.embed_tokens",
        "embedding = self.embed_tokens",
        MODEL + "test_mtp.py::test_own_copies_are_used",
    ),
]

DIFFER = MODEL + "test_layers_differ.py::"
LAYERS = [
    Mutant(
        "layers: all rotate by the first one's frequencies",
        "model/rotary.py",
        "first = self._first[layer]",
        "first = self._first[0]",
        DIFFER + "test_logits_are_those_of_the_equations",
    ),
    Mutant(
        "layers: pairs lie as in the first one",
        "model/mla.py",
        "config.rope_of(layer).rope_interleave",
        "config.rope_of(0).rope_interleave",
        DIFFER + "test_logits_are_those_of_the_equations",
    ),
    Mutant(
        "layers: scores scaled by the first one's head width",
        "config/model.py",
        "attention, rope = self.attention_of(layer), self.rope_of(layer)",
        "attention, rope = self.attention_of(0), self.rope_of(layer)",
        DIFFER + "test_logits_are_those_of_the_equations",
    ),
    Mutant(
        "layers: MTP modules begin again with the first one's rotation",
        "config/model.py",
        "return self.rope[min(layer, self.num_hidden_layers - 1)]",
        "return self.rope[layer % self.num_hidden_layers]",
        DIFFER + "test_every_layer_uses_its_own_config",
    ),
    Mutant(
        "layers: the widest entry counted for all",
        "config/kv_cache_size.py",
        "return sum(entry.num_bytes(dtype) for entry in self.entries)",
        "return len(self.entries) * max(entry.num_bytes(dtype) for entry in self.entries)",
        DIFFER + "test_the_cache_is_the_sum_of_the_layers",
    ),
]

POOLING = [
    Mutant(
        "pooling: the mean over chunks, not tokens",
        "engine/pooling.py",
        "self._count += len(hidden)",
        "self._count += 1",
        POOL + "test_chunks_change_no_bit",
    ),
    Mutant(
        "pooling: the first token of the last chunk",
        "engine/pooling.py",
        "states[0] if self._pooled is None else self._pooled",
        "states[0]",
        POOL + "test_chunks_change_no_bit",
    ),
    Mutant(
        "pooling: a prompt that begins again is added to what it had",
        "engine/pooling.py",
        "self._pooled, self._count = None, 0\n        # A",
        "pass\n        # A",
        POOL + "test_a_prompt_that_begins_again_is_pooled_once",
    ),
    Mutant(
        "pooling: hidden states of cached tokens left out",
        "engine/kv_cache_manager.py",
        "if self.prefix is None or not sequence.request.reads_prefix_cache:",
        "if self.prefix is None:",
        POOL + "test_the_engine_pools_every_token",
    ),
    Mutant(
        "pooling: hidden states of tokens cached on disk left out",
        "engine/kv_cache_manager.py",
        "if not sequence.request.reads_prefix_cache:\n            return False\n        if seq",
        "if seq",
        POOL + "test_no_token_comes_from_the_cache_on_disk",
    ),
]
APART = "tests/unit/engine/test_disaggregated_prefill.py::"
DISAGGREGATED = [
    Mutant(
        "disaggregated prefill: a damaged page is used",
        "engine/kv_connector.py",
        "if damage is not None or not self._can_continue(load):",
        "if not self._can_continue(load):",
        APART + "test_a_damaged_page_is_computed_again",
    ),
    Mutant(
        "disaggregated prefill: pages that process 0 has are sent",
        "engine/prefill_worker.py",
        "if job.next >= job.first:",
        "if True:",
        APART + "test_a_prefix_on_disk_is_not_sent",
    ),
    Mutant(
        "disaggregated prefill: a page is sent for each request that needs it",
        "engine/kv_connector.py",
        "if load.has_ended or load.contents[load.next].key in coming:",
        "if load.has_ended:",
        APART + "test_pages_for_two_requests_are_sent_once",
    ),
]

MUTANTS = [
    *DISAGGREGATED,
    *YARN,
    *QUERIES,
    *ROPE,
    *ROUTING,
    *SAMPLING,
    *SPARSE,
    *PLANNING,
    *ATTENTION_PATHS,
    *ATTENTION_VARIANTS,
    *LAYERS,
    *FP8,
    *QUANTIZED,
    *INT8_CACHE,
    *MTP,
    *POOLING,
    *LORA,
    *REINFORCING,
    *TRAINING,
    *VENDORS,
    *GGUF,
]
