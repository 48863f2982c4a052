"""Digest of a checkpoint's files: whether processes that each load a share have the same one."""

from pathlib import Path

import xxhash

from lowlat.checkpoint.hf_folder import weight_files
from lowlat.checkpoint.mapped_file import MappedFile

SMALL_BYTES = 64 * 2**20
"""Files of up to this size are read whole."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Samples of larger files. Trained weights differ everywhere."""


def files_digest(path: Path) -> str:
    """XXH3-128 of config and weight files at `path`: names, sizes and samples of their content."""
    config = [path / "config.json"] if path.is_dir() else []
    digest = xxhash.xxh3_128()
    for file in [*config, *weight_files(path)]:
        mapped = MappedFile(file)
        # a lone file may have another name on each machine
        digest.update(f"{file.name if path.is_dir() else ''} {mapped.size} ".encode())
        if mapped.size <= SMALL_BYTES:
            digest.update(mapped.bytes(0, mapped.size))
            continue
        for sample in range(SAMPLES):
            start = (mapped.size - SAMPLE_BYTES) * sample // (SAMPLES - 1)
            digest.update(mapped.bytes(start, start + SAMPLE_BYTES))
    return digest.hexdigest()
