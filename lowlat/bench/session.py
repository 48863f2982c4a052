"""Benchmark session: programs, their model files, and loaded workers.

Converts the checkpoint to GGUF for llama.cpp and to fp8 blocks for lowlat, once per precision, and
caches the files. llama.cpp's fp32 file, the largest, is removed after the agreement check. A GGUF
file with quantized weights is timed as it is by both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowlat.bench.benchmark_plan import GGUF_KINDS, STORED, Program
from lowlat.bench.inputs import BenchmarkInputs
from lowlat.checkpoint.fetch.cache_dir import cache_disk_errors, derived_dir
from lowlat.checkpoint.hf_folder import weight_files
from lowlat.convert.run import convert
from lowlat.peers.worker import PeerError, Worker
from lowlat.utils.atomic_files import rename_new
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

MODULES = {
    "lowlat": "lowlat.bench.lowlat_worker",
    "transformers": "lowlat.peers.transformers_model",
    "llama.cpp": "lowlat.peers.llama_cpp_model",
    "vllm": "lowlat.peers.vllm_model",
    "calibration": "lowlat.bench.calibration",
}
"""Worker module by program."""
EXPORTED = {"F32": "fp32", "BF16": "bf16"}
"""Formats that lowlat exports without rounding; llama.cpp quantizes the others from BF16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedWorker:
    """A worker that has loaded its model."""

    worker: Worker
    facts: dict[str, Any]
    """Version and settings that the program reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSession:
    """The inputs and the folders of one run."""

    inputs: BenchmarkInputs
    folder: Path
    """Folder for logs; removed after the run."""
    progress: Progress

    def start(self, program: Program) -> Worker:
        """Start a worker without a model; its log goes into the session's folder."""
        return Worker(
            program.name,
            MODULES[program.name],
            python=program.python,
            threads=self.inputs.plan.threads,
            folder=self.folder,
        )

    def load(self, program: Program, *, dtype: str, cache: str, context: int) -> LoadedWorker:
        """A worker with the model in `dtype` and capacity for `context` cached tokens.

        Raises PeerError if the program does not support that, UserError as `Worker.ask`.
        """
        model = self._file(program, dtype)
        worker = self.start(program)
        try:
            facts = worker.ask(
                "load",
                model=str(model),
                precision=dtype,
                cache=cache,
                threads=self.inputs.plan.threads,
                context=context,
            )
            return LoadedWorker(worker=worker, facts=facts)
        except BaseException:
            worker.close()
            raise

    def remove_gguf(self, dtype: str) -> None:
        """Remove llama.cpp's file of `dtype`, if it exists."""
        self._gguf_path(GGUF_KINDS[dtype]).unlink(missing_ok=True)

    def _file(self, program: Program, dtype: str) -> Path:
        """The file or folder that `program` loads for `dtype`, converted if necessary."""
        if program.name == "transformers" and self.inputs.model.is_file():
            raise PeerError("loads folders, not .gguf files")
        if program.name == "llama.cpp":
            return self._llama_file(program, dtype)
        if program.name == "lowlat" and dtype == "fp8":
            return self._fp8_blocks()
        return self.inputs.model

    def _llama_file(self, program: Program, dtype: str) -> Path:
        if dtype != STORED:
            return self._gguf(program, GGUF_KINDS[dtype])
        if self.inputs.model.is_dir():
            raise PeerError("has no type for these quantized weights")
        return self.inputs.model

    def _fp8_blocks(self) -> Path:
        """The model with its projections in fp8 blocks."""
        if self.inputs.config.quantization is not None:
            return self.inputs.model
        path = self._derived() / "fp8"
        if not path.exists():
            with cache_disk_errors(path.parent), self.progress.task("writing fp8 blocks"):
                path.parent.mkdir(parents=True, exist_ok=True)
                convert(self.inputs.model, path, dtype="fp8")
        return path

    def _gguf_path(self, kind: str) -> Path:
        return self._derived() / f"{kind.lower()}.gguf"

    def _derived(self) -> Path:
        """Folder of the files converted from this checkpoint."""
        key = [str(self.inputs.model.resolve())]
        for file in weight_files(self.inputs.model):
            stat = file.stat()
            key.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
        return derived_dir(f"bench-{self.inputs.model.name}", key)

    def _gguf(self, program: Program, kind: str) -> Path:
        path = self._gguf_path(kind)
        if path.exists():
            return path
        source = None if kind in EXPORTED else self._gguf(program, "BF16")
        with cache_disk_errors(path.parent), self.progress.task(f"writing {path.name}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if source is None:
                self._export(path, kind)
            else:
                self._quantize(program, source, path, kind)
        return path

    def _export(self, path: Path, kind: str) -> None:
        try:
            convert(self.inputs.model, path, dtype=EXPORTED[kind])
        except UserError as error:
            raise UserError(f"{error} (or leave llama.cpp out of --peers)") from error

    def _quantize(self, program: Program, source: Path, path: Path, kind: str) -> None:
        partial = path.with_name(f".{path.name}.partial")
        arguments: dict[str, Any] = {"source": str(source), "target": str(partial), "kind": kind}
        try:
            with self.start(program) as worker:
                worker.ask("quantize", **arguments, threads=self.inputs.plan.threads)
            rename_new(partial, path)
        except PeerError as error:
            raise UserError(f"{path}: llama.cpp could not write it ({error})") from error
        finally:
            partial.unlink(missing_ok=True)
