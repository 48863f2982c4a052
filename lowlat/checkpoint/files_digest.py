"""Digest of a checkpoint's files: whether processes that each load a share have the same one."""

from pathlib import Path

import xxhash

from lowlat.checkpoint.hf_folder import weight_files
from lowlat.checkpoint.mapped_file import MappedFile
from lowlat.utils.sampled_digest import SAMPLE_BYTES, sample_starts

SMALL_BYTES = 64 * 2**20
"""Files of up to this size are read whole, samples of larger ones."""


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
        for start in sample_starts(mapped.size):
            digest.update(mapped.bytes(start, start + SAMPLE_BYTES))
    return digest.hexdigest()
