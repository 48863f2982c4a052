"""Mistakes about weights that other programs quantized, and about GGUF metadata."""

from .mutant import Mutant

VALUES = "tests/unit/checkpoint/test_vendors.py::test_values_are_those_of_the_oracle"
STACKED = (
    "tests/unit/checkpoint/test_vendor_experts.py::test_stacked_in_fp8_with_a_scale_per_matrix"
)
INT4 = "checkpoint/vendors/int4.py"

VENDORS = [
    Mutant(
        "AWQ: columns of a word in order",
        INT4,
        "codes = codes[..., torch.tensor(AWQ_ORDER).argsort()]",
        "pass",
        VALUES + "[awq]",
    ),
    Mutant(
        "AWQ: order of a word's columns inverted",
        INT4,
        "torch.tensor(AWQ_ORDER).argsort()",
        "torch.tensor(AWQ_ORDER)",
        VALUES + "[awq]",
    ),
    Mutant(
        "GPTQ v1: zero points as stored",
        INT4,
        "zeros = zeros + 1",
        "pass",
        VALUES + "[gptq]",
    ),
    Mutant(
        "GPTQ: zero points of v2 moved as those of v1",
        INT4,
        'if self.scheme.layout == "gptq":',
        'if self.scheme.layout != "awq":',
        VALUES + "[gptq-v2]",
    ),
    Mutant(
        "int4: zero points of compressed-tensors ignored",
        INT4,
        "codes -= SYMMETRIC_ZERO if zero is None else zero.float()[:, index]",
        "codes -= SYMMETRIC_ZERO",
        VALUES + "[int4-asymmetric]",
    ),
    Mutant(
        "int4 blocks: adjacent columns in a byte",
        "ops/int4_blocks.py",
        "codes = halves_apart(pairs.view(*scale.shape, width // 32, 16)).flatten(2)",
        "codes = pairs.view(*scale.shape, width // 2)",
        VALUES + "[int4]",
    ),
    Mutant(
        "MXFP4: the second column in the low half",
        "ops/int4_blocks.py",
        "even, odd = first & _LOW |",
        "odd, even = first & _LOW |",
        VALUES + "[mxfp4]",
    ),
    Mutant(
        "fp8 rows: the first row's scale for all",
        "checkpoint/vendors/float_weights.py",
        "return scale.flatten().expand(self.shape[0]).contiguous()",
        "return scale.flatten()[:1].expand(self.shape[0]).contiguous()",
        VALUES + "[fp8-channel]",
    ),
    Mutant(
        "stacked fp8 experts: gate and up exchanged",
        "checkpoint/vendors/stacked_experts.py",
        "0 if is_shared else number * size",
        "0 if is_shared else (len(projections) - 1 - number) * size",
        STACKED + "[2-activation_scale]",
    ),
]

GRAPHS = "tests/unit/convert/test_gguf.py::test_families_with_graphs_of_their_own"
GGUF = [
    Mutant(
        "minicpm3 in GGUF: factors of long and short contexts exchanged",
        "checkpoint/gguf/metadata_reader.py",
        "for name in (SHORT_FACTORS, LONG_FACTORS)]",
        "for name in (LONG_FACTORS, SHORT_FACTORS)]",
        GRAPHS + "[minicpm3-longrope]",
    ),
    Mutant(
        "mistral4 in GGUF: queries not scaled",
        "checkpoint/gguf/metadata_reader.py",
        "if not beta:",
        "if beta:",
        GRAPHS + "[mistral4-yarn]",
    ),
]
