"""What every part of a run needs: the plan, the model's files, a folder for logs; loaded workers.

Owns the converted files, GGUF for llama.cpp and fp8 blocks for lowlat, which are made once per
checkpoint and precision and kept in the cache folder; llama.cpp's in fp32, the largest, only until
it has been compared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowlat.bench.plan import Plan
from lowlat.bench.programs import GGUF_KINDS, Program
from lowlat.bench.worker import Refused, Worker
from lowlat.checkpoint.fetch.cache_dir import derived_dir, disk_faults
from lowlat.config.model import ModelConfig
from lowlat.convert.run import convert
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

EXPORTED = {"F32": "fp32", "BF16": "bf16"}
"""Formats that lowlat writes itself, so that they hold the numbers of the checkpoint; llama.cpp
makes the others of them.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A worker that has its model."""

    worker: Worker
    facts: dict[str, Any]
    """What the program says about itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One run's surroundings."""

    plan: Plan
    model: Path
    """The checkpoint folder."""
    config: ModelConfig
    folder: Path
    """For logs; removed after the run."""
    progress: Progress

    def load(self, program: Program, *, dtype: str, cache: str, context: int) -> Loaded:
        """A worker with the model in `dtype`, ready for `context` cached tokens.

        Raises Refused where the program does not serve that, UserError as `Worker.ask`.
        """
        model = self._file(program, dtype)
        worker = program.start(self.plan, self.folder)
        try:
            facts = worker.ask(
                "load",
                model=str(model),
                precision=dtype,
                cache=cache,
                threads=self.plan.threads,
                context=context,
            )
            return Loaded(worker=worker, facts=facts)
        except BaseException:
            worker.close()
            raise

    def forget(self, dtype: str) -> None:
        """Remove the converted file of `dtype`, if there is one."""
        self._gguf_path(GGUF_KINDS[dtype]).unlink(missing_ok=True)

    def _file(self, program: Program, dtype: str) -> Path:
        """What `program` loads for weights of `dtype`, made if need be."""
        if program.name == "llama.cpp":
            return self._gguf(program, GGUF_KINDS[dtype])
        return self._fp8_blocks() if program.name == "lowlat" and dtype == "fp8" else self.model

    def _fp8_blocks(self) -> Path:
        """The model with its projections in fp8 blocks."""
        if self.config.quantization is not None:
            return self.model
        path = self._derived() / "fp8"
        if not path.exists():
            with disk_faults(path.parent), self.progress.task("writing fp8 blocks"):
                path.parent.mkdir(parents=True, exist_ok=True)
                convert(self.model, path, dtype="fp8")
        return path

    def _gguf_path(self, kind: str) -> Path:
        return self._derived() / f"{kind.lower()}.gguf"

    def _derived(self) -> Path:
        """Where what is made of the checkpoint lies."""
        key = [str(self.model.resolve())]
        for file in sorted(self.model.glob("*.safetensors")):
            stat = file.stat()
            key.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
        return derived_dir(f"bench-{self.model.name}", key)

    def _gguf(self, program: Program, kind: str) -> Path:
        path = self._gguf_path(kind)
        if path.exists():
            return path
        source = None if kind in EXPORTED else self._gguf(program, "BF16")
        with disk_faults(path.parent), self.progress.task(f"writing {path.name}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if source is None:
                self._export(path, kind)
            else:
                self._quantize(program, source, path, kind)
        return path

    def _export(self, path: Path, kind: str) -> None:
        try:
            convert(self.model, path, dtype=EXPORTED[kind])
        except UserError as error:
            raise UserError(f"{error} (or leave llama.cpp out of --peers)") from error

    def _quantize(self, program: Program, source: Path, path: Path, kind: str) -> None:
        partial = path.with_name(f".{path.name}.partial")
        arguments: dict[str, Any] = {"source": str(source), "target": str(partial), "kind": kind}
        try:
            with program.start(self.plan, self.folder) as worker:
                worker.ask("quantize", **arguments, threads=self.plan.threads)
            partial.rename(path)
        except Refused as refused:
            raise UserError(f"{path}: llama.cpp could not write it ({refused})") from refused
        finally:
            partial.unlink(missing_ok=True)
