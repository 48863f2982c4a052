"""Quantize a GGUF file by llama.cpp, in a process of the interpreter that has llama-cpp-python.

    python benchmarks/llama_quantizer.py SOURCE.gguf FOLDER TYPE... --llama-python PYTHON

Writes FOLDER/SOURCE-TYPE.gguf for every TYPE, such as Q4_K_M or IQ2_XXS. All input channels count
as equally important: the types of one and two bits demand an importance matrix, and speed does not
depend on it.
"""

import argparse
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from gguf import GGUFReader, LlamaFileType

BF16 = 30
"""ggml's number of the type."""
PROGRAM = """
import ctypes, json, sys
import llama_cpp
import numpy as np
source, imatrix, jobs, settings = sys.argv[1], np.load(sys.argv[2]), *map(json.loads, sys.argv[3:])
entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix.files) + 1))()
kept = []
for entry, name in zip(entries, imatrix.files):
    data = np.ascontiguousarray(imatrix[name], dtype=np.float32)
    kept.append(data)
    entry.name, entry.size = name.encode(), data.size
    entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
for path, ftype in jobs:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.imatrix = ftype, entries
    for name, value in settings.items():
        setattr(params, name, value)
    if llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp cannot quantize {source} to {path}")
"""


def quantize(
    python: str,
    source: Path,
    imatrix: Mapping[str, np.ndarray],
    targets: Mapping[str, Path],
    **settings: int,
) -> None:
    """Write `source` in the types that are the keys of `targets`.

    imatrix: importance of the input channels by tensor. settings: fields of
    llama_model_quantize_params.
    """
    jobs = [(str(path), ftype(name)) for name, path in targets.items()]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "imatrix.npz"
        np.savez(file, **imatrix)  # pyright: ignore[reportArgumentType]
        arguments = [str(source), str(file), json.dumps(jobs), json.dumps(settings)]
        subprocess.run([python, "-c", PROGRAM, *arguments], check=True, stderr=subprocess.DEVNULL)


def ftype(name: str) -> int:
    """llama.cpp's number of the mixed type `name`."""
    return int(LlamaFileType[f"MOSTLY_{name}"])


def even_imatrix(source: Path) -> dict[str, np.ndarray]:
    """The same importance for all input channels of all matrices."""
    shapes = {t.name: [int(n) for n in t.shape] for t in GGUFReader(source).tensors}
    return {
        name: np.ones(shape[0] * (shape[2] if len(shape) == 3 else 1), np.float32)
        for name, shape in shapes.items()
        if len(shape) > 1
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("types", nargs="+")
    parser.add_argument("--llama-python", required=True, help="Python with llama-cpp-python")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    targets = {
        name: options.folder / f"{options.source.stem}-{name}.gguf" for name in options.types
    }
    quantize(options.llama_python, options.source, even_imatrix(options.source), targets)


if __name__ == "__main__":
    main()
