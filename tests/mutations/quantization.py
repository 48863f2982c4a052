"""Mistakes in int8 and int4 weights: storage, search of scales, activation statistics."""

from .mutant import Mutant

MODEL = "tests/unit/model/"
OPS = "tests/unit/ops/"

QUANTIZED = [
    Mutant(
        "int4: low and high halves swapped",
        "ops/quantized.py",
        "halves[0] | halves[1] << 4",
        "halves[1] | halves[0] << 4",
        OPS + "test_quantized.py::test_int4_layout_by_hand",
    ),
    Mutant(
        "int4: sixteen steps instead of fifteen",
        "ops/quantized.py",
        "return ((high - low) / INT4_MAX).to(torch.float16), low.to(torch.float16)",
        "return ((high - low) / 16).to(torch.float16), low.to(torch.float16)",
        OPS + "test_quantized.py::test_values_of_gguf_files_are_kept[int4]",
    ),
    Mutant(
        "int4: padding enters the minimum",
        "ops/quantized.py",
        "rows[:, -1:].expand(-1, missing)",
        "rows.new_zeros(len(rows), missing)",
        OPS + "test_quantized.py::test_what_fills_the_last_group_enters_no_minimum",
    ),
    Mutant(
        "packed: fp8 blocks rounded to bf16 before they are packed",
        "checkpoint/load.py",
        "torch.float32 if form or wanted is None else wanted",
        "wanted",
        "tests/unit/checkpoint/test_packing.py::test_packed_from_exact_values[deepseek_v3-fp8-int8]",
    ),
    Mutant(
        "packed: kv_b_proj in tiles",
        "model/quant.py",
        '"int8": {"kv_b_proj": "int8_rows"},',
        '"int8": {},',
        MODEL + "test_quant.py::test_which_projections_are_packed[int8]",
    ),
    Mutant(
        "weighted scales: the last candidate instead of the best",
        "ops/weighted_quantization.py",
        "is_better = (error < least) &",
        "is_better = (error == error) &",
        OPS + "test_weighted_quantization.py::test_no_group_is_worse_than_min_max[int4]",
    ),
    Mutant(
        "weighted scales: error without weights",
        "ops/weighted_quantization.py",
        "return ((dequantized - groups).square_() * weights).sum(-1)",
        "return (dequantized - groups).square_().sum(-1)",
        OPS + "test_weighted_quantization.py::test_no_group_is_worse_than_min_max[int4]",
    ),
    Mutant(
        "weighted scales: ends of the range unused",
        "ops/weighted_quantization.py",
        " & (used[..., 0] == 0) & (used[..., 1] == INT4_MAX)",
        "",
        OPS + "test_weighted_quantization.py::test_quantized_values_lose_nothing[int4]",
    ),
    Mutant(
        "error feedback: only within the group",
        "ops/calibrated_quantization.py",
        "rows[:, last:] -= errors @ factor[first:last, last:]",
        "pass",
        OPS + "test_calibrated_quantization.py::test_feedback_beats_the_diagonal",
    ),
    Mutant(
        "error feedback: of the wrong sign",
        "ops/calibrated_quantization.py",
        "left[:, column + 1 :] -= missed * factor[column, column + 1 :]",
        "left[:, column + 1 :] += missed * factor[column, column + 1 :]",
        OPS + "test_calibrated_quantization.py::test_feedback_beats_the_diagonal",
    ),
    Mutant(
        "importance: every expert gets the tokens of all",
        "convert/quantization/activations.py",
        "tokens, places = (chosen == expert).nonzero(as_tuple=True)",
        "tokens, places = (chosen >= 0).nonzero(as_tuple=True)",
        "tests/unit/convert/test_activations.py::test_statistics_are_those_of_the_whole_model",
    ),
    Mutant(
        "importance: kv_b_proj gets the rotary key",
        "convert/quantization/activations.py",
        "self._record(name, out[..., :rank])",
        "self._record(name, out[..., -rank:])",
        "tests/unit/convert/test_activations.py::test_statistics_are_those_of_the_whole_model",
    ),
    Mutant(
        "error feedback: only within the block",
        "ops/calibrated_quantization.py",
        "rows[:, last:].sub_(errors @ factor[first:last, last:])",
        "pass",
        OPS + "test_calibrated_quantization.py::test_feedback_crosses_blocks",
    ),
]
