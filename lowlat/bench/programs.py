"""The programs that can be measured: lowlat and its peers, each a worker under its interpreter."""

from dataclasses import dataclass
from pathlib import Path

from lowlat.bench.plan import Peer, Plan
from lowlat.bench.worker import Worker

MODULES = {
    "lowlat": "lowlat.bench.run_lowlat",
    "transformers": "lowlat.bench.run_transformers",
    "llama.cpp": "lowlat.bench.run_llama",
    "vllm": "lowlat.bench.run_vllm",
}
GGUF_KINDS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_K_M", "fp8": "Q8_0"}
"""llama.cpp's format nearest to each dtype; it has no fp8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """lowlat or a peer, and the interpreter it runs under."""

    name: str
    python: str

    @classmethod
    def of(cls, peer: Peer) -> "Program":
        return cls(name=peer.name, python=peer.python)

    def start(self, plan: Plan, folder: Path) -> Worker:
        """A worker, nothing loaded yet; logs go into `folder`."""
        module = MODULES[self.name]
        return Worker(self.name, module, python=self.python, threads=plan.threads, folder=folder)

    def precision(self, dtype: str) -> str:
        """What the program calls weights of `dtype`."""
        return GGUF_KINDS[dtype] if self.name == "llama.cpp" else dtype
