"""The nastiest files, in a child process that may take little memory: an error line, quickly."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .builders import FAMILIES, edit_config, raw_safetensors, write_model
from .test_gguf_file import ARRAY, TEXT, gguf, info, key

MEGABYTES = 1500
"""More than torch takes to be imported, far less than what the files ask for."""

CHILD = """
import resource, sys, time
from pathlib import Path
from lowlat.checkpoint.load import load_model
from lowlat.utils.errors import UserError

limit = int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for path in sys.argv[2:]:
    start = time.process_time()
    try:
        load_model(Path(path))
        message = "loaded"
    except UserError as error:
        message = str(error)
    print(f"{time.process_time() - start:.3f}\\t{message}", flush=True)
"""


def folder(root: Path, content: bytes) -> Path:
    root.mkdir()
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(content)
    return root


def big_config(root: Path, **fields: int) -> Path:
    write_model(root, FAMILIES["deepseek_v3-mtp"])
    edit_config(root, **fields)
    return root


def gguf_at(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def sparse(path: Path, head: bytes, size: int) -> Path:
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def sparse_folder(root: Path) -> Path:
    folder(root, b"")
    sparse(root / "model.safetensors", struct.pack("<Q", 2**35), 2**36)
    return root


def parts(root: Path, numbers: tuple[int, ...], count: int) -> Path:
    """Parts of one model, sparse, with a huge tensor each; the path of the first."""
    root.mkdir()
    paths = [root / f"m-{number + 1:05d}-of-{count:05d}.gguf" for number in numbers]
    for number, path in zip(numbers, paths, strict=True):
        keys = (("split.no", number), ("split.count", count), ("split.tensors.count", 2**31 - 1))
        head = gguf(
            tuple(key(name, 4, struct.pack("<I", value)) for name, value in keys),
            (info(f"w{number}", dims=(2**16, 2**14)),),
        )
        sparse(path, head, 2**33)
    return paths[0]


MANY_TEXTS = key("k", ARRAY, struct.pack("<IQ", TEXT, 2**22))
MANY_NUMBERS = key("k", ARRAY, struct.pack("<IQ", 10, 2**27))
DEEP = b'{"a":' * 6_000_000

KINDS: dict[str, Callable[[Path], Path]] = {
    "30 MB of braces": lambda root: folder(root, raw_safetensors(DEEP)),
    "30 MB of brackets": lambda root: folder(root, raw_safetensors(b"[" * 30_000_000)),
    "a million entries": lambda root: folder(
        root, raw_safetensors(json.dumps({str(i): 1 for i in range(10**6)}).encode())
    ),
    "a shape of a million sizes": lambda root: folder(
        root,
        raw_safetensors({"w": {"dtype": "F32", "shape": [1] * 10**6, "data_offsets": [0, 4]}}),
    ),
    "a header of 32 GB": sparse_folder,
    "a billion experts": lambda root: big_config(root, n_routed_experts=2**30),
    "a hundred thousand layers": lambda root: big_config(root, num_hidden_layers=100_000),
    "a vocabulary of 2^31": lambda root: big_config(root, vocab_size=2**31 - 1),
    "heads of 2^31": lambda root: big_config(root, v_head_dim=2**31 - 1),
    "4 million texts": lambda root: sparse(root.with_suffix(".gguf"), gguf((MANY_TEXTS,)), 2**33),
    "a gigabyte of numbers": lambda root: sparse(
        root.with_suffix(".gguf"), gguf((MANY_NUMBERS,)), 2**31
    ),
    "a million tensors": lambda root: gguf_at(
        root.with_suffix(".gguf"), gguf(infos=(info(),), counts=(2**20, 0))
    ),
    "2^48 elements": lambda root: gguf_at(
        root.with_suffix(".gguf"), gguf(infos=(info(dims=(2**24, 2**24)),), data=b"x")
    ),
    "one of 65,535 parts": lambda root: parts(root, (0,), 2**16 - 1),
    "200 parts of 8 GB": lambda root: parts(root, tuple(range(200)), 200),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_hostile_files(tmp_path: Path) -> None:
    """No signal, no MemoryError, no traceback; every file is refused within 5 seconds of work."""
    paths = [make(tmp_path / str(number)) for number, make in enumerate(KINDS.values())]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(MEGABYTES), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(KINDS)
    for kind, path, line in zip(KINDS, paths, lines, strict=True):
        seconds, message = line.split("\t")
        # a missing part is named in place of the one that was opened
        named = path.parent if "part" in kind else path
        assert message.startswith(str(named)), (kind, message)
        assert float(seconds) < 5, (kind, seconds)
