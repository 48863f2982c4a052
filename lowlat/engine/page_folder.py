"""Prefix cache on disk: KV cache pages (blocks in vLLM) as files, their format and verification.

One file per page, DIR/FINGERPRINT/NAMESPACE/KEY:

    header      magic, fingerprint, hash of the namespace, key, parent's key, depth, payload size,
                attention path, tokens
    checksum    XXH3-128 of header and payload
    payload     the page's KV cache entries, layer by layer

A reader knows the whole header that it expects: a file of another place, namespace or model, or
with other tokens, differs from it. The file system is the index, so servers that share a folder
need no protocol: files appear by atomic rename. Owns no threads and no limit (`disk_budget`).
"""

import hashlib
import os
import stat
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from lowlat.engine.prefix import PageContent
from lowlat.utils.errors import UserError

MAGIC = b"lowlatK1"
CHECKSUM_BYTES = 16
MAX_PATH_NAME = 32
"""Bytes of the name of an attention path."""
_FIELDS = struct.Struct(f"<8s32s32s32s32sIQ{MAX_PATH_NAME}s")
_NO_KEY = bytes(32)
_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

Damage = Literal["truncated", "foreign", "corrupt", "unreadable"]
"""Why a file is dropped: its size, its header or its checksum is wrong, or the system refused to
read it."""
ReadResult = Literal["read", "missing", "pending"] | Damage
"""pending: reading would wait for the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageFormat:
    """Sizes of the pages of one model, and the fingerprint of all that their bits depend on."""

    fingerprint: bytes
    """SHA-256, `cache_fingerprint.fingerprint_of`."""
    page_size: int
    """Tokens of a page."""
    payload_bytes: int

    @property
    def header_bytes(self) -> int:
        return _FIELDS.size + 4 * self.page_size

    @property
    def payload_start(self) -> int:
        return self.header_bytes + CHECKSUM_BYTES

    @property
    def file_bytes(self) -> int:
        return self.payload_start + self.payload_bytes

    def header(self, content: PageContent) -> bytes:
        path = content.path.encode()
        if len(path) > MAX_PATH_NAME or len(content.tokens) != 4 * self.page_size:
            raise AssertionError(f"a page of path {content.path} does not fit the format")
        fields = _FIELDS.pack(
            MAGIC,
            self.fingerprint,
            namespace_hash(content.cache_namespace),
            content.key,
            content.parent_key or _NO_KEY,
            content.depth,
            self.payload_bytes,
            path,
        )
        return fields + content.tokens

    def seal(self, content: PageContent, data: memoryview) -> None:
        """Write header and checksum before the payload, which `data` (a whole file) has already."""
        header = self.header(content)
        data[: self.header_bytes] = header
        data[self.header_bytes : self.payload_start] = self._checksum(data)

    def damage(self, content: PageContent, data: memoryview) -> Damage | None:
        """What is wrong with a whole file that should hold `content`; None if it is valid."""
        if data[: self.header_bytes] != self.header(content):
            return "foreign"
        if data[self.header_bytes : self.payload_start] != self._checksum(data):
            return "corrupt"
        return None

    def _checksum(self, data: memoryview) -> bytes:
        digest = xxhash.xxh3_128(data[: self.header_bytes])
        digest.update(data[self.payload_start :])
        return digest.digest()


def namespace_hash(cache_namespace: bytes) -> bytes:
    """Name of a cache namespace on disk, from which neither API key nor namespace follow."""
    return hashlib.sha256(b"lowlat prefix cache on disk" + cache_namespace).digest()


class PageFolder:
    """The page files of one model below `folder`. Thread-safe."""

    def __init__(self, folder: Path, page_format: PageFormat) -> None:
        self.folder = folder
        self.format = page_format
        self._root = os.path.join(folder, page_format.fingerprint.hex()[:32])

    def path(self, content: PageContent) -> str:
        namespace = namespace_hash(content.cache_namespace).hex()[:32]
        return os.path.join(self._root, namespace, content.key.hex())

    def has(self, content: PageContent) -> bool:
        """Whether a file with this name exists, valid or not."""
        return os.path.lexists(self.path(content))

    def prefetch(self, content: PageContent) -> None:
        """Ask the system to read a file into its page cache; returns at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError):
            descriptor = os.open(self.path(content), _OPEN_FLAGS)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def read(self, content: PageContent, data: memoryview, *, may_wait: bool = True) -> ReadResult:
        """Read and verify the file of `content` into `data`, of file_bytes. Without `may_wait`, a
        file that is not in the system's page cache is "pending".

        It is not memory-mapped: a process that accesses a mapping beyond the end of a file that
        another process has truncated gets SIGBUS.
        """
        try:
            descriptor = os.open(self.path(content), _OPEN_FLAGS)
        except FileNotFoundError:
            return "missing"
        except OSError:
            return "unreadable"
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return "unreadable"
            if status.st_size != self.format.file_bytes:
                return "truncated"
            result = _read_all(descriptor, data, may_wait=may_wait)
        except OSError:
            return "unreadable"
        finally:
            os.close(descriptor)
        return result or self.format.damage(content, data) or "read"

    def write(self, content: PageContent, data: memoryview, used_at: float) -> None:
        """Write the file of `content` from `data`, which has the payload in place; `used_at` (Unix
        time) becomes its time of last use. Raises OSError, leaving no file.

        No fsync: after a power cut a file may be torn, which its reader detects.
        """
        self.format.seal(content, data)
        path = self.path(content)
        partial = f"{path}.{os.getpid()}-{threading.get_ident()}.partial"
        _make_private(os.path.dirname(path))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(partial, flags | getattr(os, "O_BINARY", 0), 0o600)
        try:
            try:
                while data:
                    data = data[os.write(descriptor, data[: 1 << 20]) :]
            finally:
                os.close(descriptor)
            touch(partial, used_at)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise

    def remove(self, content: PageContent) -> bool:
        """Remove the file of `content`; whether there was one."""
        try:
            os.unlink(self.path(content))
        except OSError:  # missing, or not a file
            return False
        return True


def touch(path: str, used_at: float) -> None:
    """Set the time of last use (LRU) of a page file."""
    nanoseconds = int(used_at * 1e9)
    os.utime(path, ns=(nanoseconds, nanoseconds))


def open_folder(folder: Path) -> None:
    """Create the folder of a prefix cache, for this user alone. Raises UserError if it cannot be
    used, or if other users may write to it."""
    try:
        _make_private(os.fspath(folder))
        mode = os.stat(folder).st_mode
    except OSError as error:
        raise UserError(
            f"prefix_cache_dir '{folder}': {error.strerror}; choose a folder that you may write to"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"prefix_cache_dir '{folder}' may not be written to; choose another folder")
    if os.name == "posix" and mode & 0o022:
        raise UserError(
            f"prefix_cache_dir '{folder}': other users may write to it; run: chmod 700 {folder}"
        )


def _make_private(folder: str) -> None:
    """Create a folder and its missing parents, each for this user alone."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
    except FileNotFoundError:
        _make_private(os.path.dirname(folder))
        os.makedirs(folder, 0o700, exist_ok=True)


def _read_all(descriptor: int, data: memoryview, *, may_wait: bool) -> ReadResult | None:
    """Fill `data` from a file of its size; None, or why it is not filled."""
    if not may_wait and _NOWAIT:
        try:
            if os.preadv(descriptor, [data], 0, _NOWAIT) == len(data):
                return None
            return "pending"
        except BlockingIOError:
            return "pending"
        except OSError:  # a file system without RWF_NOWAIT
            pass
    while data:
        count = _read_some(descriptor, data)
        if count == 0:
            return "truncated"
        data = data[count:]
    return None


def _read_some(descriptor: int, data: memoryview) -> int:
    if hasattr(os, "readv"):
        return os.readv(descriptor, [data])
    piece = os.read(descriptor, min(len(data), 1 << 20))
    data[: len(piece)] = piece
    return len(piece)
