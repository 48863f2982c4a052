"""Fingerprints and config of the checkpoints that a run reads: frozen base model and teacher.

A resumed run compares fingerprints, so that it continues with the weights it was trained with.
"""

import hashlib
from pathlib import Path

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.mapping import resolve_mtp_modules
from lowlat.config.model import ModelConfig

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
"""Samples hashed per file: training changes every weight, so samples tell checkpoints apart."""


def weights_fingerprint(model: Path) -> str:
    """SHA-256 of the sizes and of samples of the weight files of the checkpoint `model`."""
    digest = hashlib.sha256()
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def has_mtp_copies(base_model: Path) -> bool:
    """Whether the MTP modules of the checkpoint have their own copies of embedding and head."""
    source = open_checkpoint(base_model)
    return resolve_mtp_modules(read_config(source), source).mtp_copies


def teacher_config(path: Path) -> ModelConfig:
    """The config of the checkpoint `path`. Raises UserError naming file and field."""
    return read_config(open_checkpoint(path))


def teacher_fingerprint(path: Path) -> str:
    """SHA-256 of the config and of `weights_fingerprint` of the checkpoint `path`."""
    config = (path / "config.json").read_bytes() if path.is_dir() else b""
    return hashlib.sha256(config + weights_fingerprint(path).encode()).hexdigest()
