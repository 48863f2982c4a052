"""Quality of int4 and int8 weights compared with llama.cpp's K-quants at equal bits per weight.

    python benchmarks/low_bit.py MODEL... --text TEXT --llama-python PYTHON [--bytes 60000]

MODEL is a folder with bf16 weights whose rows are multiples of 256. PYTHON is an interpreter with
llama-cpp-python; its quantizer gets the importance matrix that lowlat measures on its calibration
text, and keeps the embedding in bf16. lowlat loads every result as fp32, so all differ in their
weights only. Bits count the matrices of the decoder layers, without routers. KL is from the bf16
weights' next-token distribution, in nats per token. The last line of a model is the KL of
llama.cpp's K-quants at int4's bits, interpolated between Q4_K_M and Q5_K_M on a logarithmic scale.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from gguf import GGUFReader
from llama_quantizer import BF16, quantize
from torch import Tensor

import lowlat
from lowlat.checkpoint.gguf.metadata_writer import architecture_of
from lowlat.checkpoint.gguf.tensor_layout import gguf_tensor_mappings
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import load_model, read_config
from lowlat.checkpoint.save import save_model
from lowlat.convert.compression.calibration import read_calibration
from lowlat.convert.parameters.weights import SourceWeights, parameter_shapes
from lowlat.convert.quantization.activations import ActivationStatistics, activation_windows
from lowlat.convert.run import convert
from lowlat.model.linear import Linear
from lowlat.ops.calibrated_quantization import ActivationCovariance
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.progress import make_progress

WINDOW = 512
PACKED = ("int4", "int8")
K_TYPES = ("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")
ENDS = ("Q4_K_M", "Q5_K_M")


@dataclass
class Row:
    """One format of one model."""

    model: str
    weights: str
    bits: float
    divergence: float
    perplexity: float


def measure(folder: Path, text: str, python: str, work: Path) -> list[Row]:
    """All formats of the model in `folder`."""
    files = _packed_folders(folder, work) | _k_types(folder, python, work)
    exact = lowlat.load(folder, dtype="fp32")
    ids = exact.tokenizer.encode(text)
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - 1, WINDOW)]
    reference = [exact.logits(window)[:-1].log_softmax(-1) for window in windows]
    rows = [Row(folder.name, "bf16", 16.0, *_quality(reference, reference, windows))]
    for name, path in files.items():
        model = lowlat.load(path, dtype="fp32")
        found = [model.logits(window)[:-1].log_softmax(-1) for window in windows]
        rows.append(Row(folder.name, name, _bits(path), *_quality(found, reference, windows)))
    return rows


def _quality(
    found: list[Tensor], reference: list[Tensor], windows: list[list[int]]
) -> tuple[float, float]:
    """KL divergence from the reference in nats per token, and perplexity."""
    divergence = nll = 0.0
    tokens = 0
    for own, exact, ids in zip(found, reference, windows, strict=True):
        divergence += float((exact.exp() * (exact - own)).sum(dtype=torch.float64))
        nll -= float(own.gather(1, torch.tensor(ids[1:])[:, None]).sum(dtype=torch.float64))
        tokens += len(ids) - 1
    return divergence / tokens, math.exp(nll / tokens)


def _packed_folders(folder: Path, work: Path) -> dict[str, Path]:
    """lowlat's formats, with scales chosen on calibration text and by min-max."""
    result: dict[str, Path] = {}
    for dtype in PACKED:
        result[dtype] = work / dtype
        convert(folder, result[dtype], dtype=dtype, progress=make_progress())
        result[f"{dtype} min-max"] = work / f"{dtype}-min-max"
        loaded = load_model(folder, dtype=dtype)
        save_model(loaded.model, loaded.config, result[f"{dtype} min-max"], source=folder)
    return result


def _k_types(folder: Path, python: str, work: Path) -> dict[str, Path]:
    """llama.cpp's formats."""
    source, result = work / "bf16.gguf", {name: work / f"{name}.gguf" for name in K_TYPES}
    convert(folder, source, dtype="bf16")
    quantize(
        python,
        source,
        _imatrix(folder),
        result,
        nthread=1,
        token_embedding_type=BF16,
        output_tensor_type=BF16,
    )
    return result


def _imatrix(folder: Path) -> dict[str, np.ndarray]:
    """Mean squares of activations by GGUF tensor, experts and heads stacked."""
    source = open_checkpoint(folder)
    config = read_config(source)
    weights = SourceWeights(source, config, stored=config)
    context = config.max_position_embeddings
    calibration = read_calibration([], Tokenizer.from_folder(folder), context)
    windows = activation_windows(calibration.windows)
    statistics = ActivationStatistics(weights, windows)
    found: dict[str, np.ndarray] = {}
    for part in gguf_tensor_mappings(config, architecture_of(config), parameter_shapes(config)):
        own = _stacked(statistics, part.name, part.parameters, part.shape)
        if own is not None:
            found[part.name] = own
    return found


def _stacked(
    statistics: ActivationStatistics, name: str, parameters: tuple[str, ...], shape: tuple[int, ...]
) -> np.ndarray | None:
    """None for tensors without projection, and for transposed keys, whose columns are no input."""
    if not parameters[0].endswith("_proj.weight") or name.endswith("attn_k_b.weight"):
        return None
    parts: list[Tensor] = []
    for parameter in parameters:
        own = statistics.of(parameter, shape[-1])
        parts.append(own.matrix.diagonal() if isinstance(own, ActivationCovariance) else own)
    copies = shape[0] if len(shape) == 3 and len(parts) == 1 else 1
    return torch.cat(parts * copies).numpy()


def _bits(path: Path) -> float:
    """Bits per weight of the decoder layers' matrices."""
    bits = weights = 0
    if path.is_file():
        for tensor in GGUFReader(path).tensors:
            if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
                if "ffn_gate_inp" not in tensor.name:
                    bits += 8 * int(tensor.n_bytes)
                    weights += int(tensor.n_elements)
        return bits / weights
    for module in load_model(path).model.layers.modules():
        if isinstance(module, Linear):
            bits += 8 * sum(own.nbytes for own in module.parameters())
            weights += module.in_features * module.out_features
    return bits / weights


def interpolated(rows: list[Row], bits: float) -> float:
    """KL of llama.cpp's K-quants at `bits` per weight."""
    low, high = (next(row for row in rows if row.weights == name) for name in ENDS)
    share = (bits - low.bits) / (high.bits - low.bits)
    logs = math.log(low.divergence), math.log(high.divergence)
    return math.exp(logs[0] + share * (logs[1] - logs[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="folders with bf16 weights")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--bytes", type=int, default=60_000, help="length of the text to use")
    parser.add_argument("--llama-python", required=True, help="Python with llama-cpp-python")
    options = parser.parse_args()
    text = options.text.read_bytes()[: options.bytes].decode(errors="ignore")
    print("| model | weights | bits | KL | perplexity |", "|---|---|--:|--:|--:|", sep="\n")
    for folder in options.models:
        with TemporaryDirectory() as work:
            rows = measure(folder, text, options.llama_python, Path(work))
        for row in rows:
            cells = f"{row.bits:.2f} | {row.divergence:.5f} | {row.perplexity:.3f}"
            print(f"| {row.model} | {row.weights} | {cells} |")
        bits = next(row.bits for row in rows if row.weights == "int4")
        print(
            f"| {folder.name} | K-quants at int4's bits | {bits:.2f} | "
            f"{interpolated(rows, bits):.5f} | |",
            flush=True,
        )


if __name__ == "__main__":
    main()
