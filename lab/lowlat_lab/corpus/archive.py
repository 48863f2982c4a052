"""Package archives (.whl, .zip, .tar.*, .deb): members read in memory, never unpacked.

No member is written to disk or run, so paths, links and scripts in a package have no effect. Size
limits are checked before a member is read.
"""

import fnmatch
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowlat.utils.errors import UserError
from lowlat_lab.corpus.document import Member

MAX_MEMBER = 64 << 20
"""Maximum bytes of a file; the largest text in the packages of the recipe has 16 million."""
MAX_TOTAL = 4 << 30
"""Maximum bytes of all files of an archive, decompressed, read or not."""
MAX_FILES = 500_000
"""Maximum number of files in an archive."""

AR_MAGIC = b"!<arch>\n"
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError)


def read_members(archive: Path, include: Sequence[str], exclude: Sequence[str]) -> list[Member]:
    """The files whose path matches a glob of `include` and none of `exclude`, sorted by path.

    '*' in a glob also matches '/'. Links and special files are skipped. Raises UserError for an
    archive that is damaged, of an unknown kind or over a limit, and for a glob of `include` without
    a match, so that a changed package does not silently give less text.
    """
    try:
        found = list(_matching(archive, include, exclude))
    except DAMAGED as error:
        raise UserError(f"{archive} is damaged ({error}); delete it to fetch it again") from error
    for glob in include:
        if not any(fnmatch.fnmatchcase(member.path, glob) for member in found):
            raise UserError(f"{archive.name} has no file '{glob}' that is not excluded")
    return sorted(found, key=lambda member: member.path)


def _matching(archive: Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Member]:
    def wanted(path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, glob) for glob in include) and not any(
            fnmatch.fnmatchcase(path, glob) for glob in exclude
        )

    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not info.is_dir()]
            _check_sizes(archive, len(infos), sum(info.file_size for info in infos))
            for info in infos:
                if wanted(info.filename):
                    _check_member(archive, info.filename, info.file_size)
                    yield Member(path=info.filename, data=opened.read(info))
    else:
        stream = _data_of_deb(archive) if archive.suffix == ".deb" else archive.open("rb")
        with stream, tarfile.open(fileobj=stream, mode="r|*") as opened:
            files = total = 0
            for entry in opened:
                files, total = files + 1, total + entry.size
                _check_sizes(archive, files, total)
                path = entry.name.removeprefix("./")
                if entry.isreg() and wanted(path):
                    _check_member(archive, path, entry.size)
                    content = opened.extractfile(entry)
                    assert content is not None  # it is a regular file
                    yield Member(path=path, data=content.read())


def _check_sizes(archive: Path, files: int, total: int) -> None:
    if files > MAX_FILES or total > MAX_TOTAL:
        raise UserError(
            f"{archive.name} is too large to be a package of text: over {MAX_FILES} files or "
            f"{MAX_TOTAL} bytes"
        )


def _check_member(archive: Path, path: str, size: int) -> None:
    if size > MAX_MEMBER:
        raise UserError(f"{path} in {archive.name} has {size} bytes; at most {MAX_MEMBER} are read")


def _data_of_deb(archive: Path) -> io.BytesIO:
    """The compressed tar of a Debian package's files: data.tar.* inside an `ar` archive.

    Layout: deb(5) and ar(5). Each entry has a header of 60 bytes and is padded to an even length.
    """
    with archive.open("rb") as stream:
        if stream.read(8) != AR_MAGIC:
            raise UserError(f"{archive} is not a Debian package; delete it to fetch it again")
        while len(header := stream.read(60)) == 60:
            name = header[:16].decode("ascii", "replace").rstrip().rstrip("/")
            try:
                size = int(header[48:58])
            except ValueError:
                break
            if name.startswith("data.tar"):
                if name.endswith(".zst"):
                    raise UserError(f"{archive.name} is compressed by zstd, which is not supported")
                data = stream.read(size)
                if len(data) != size:
                    break
                return io.BytesIO(data)
            stream.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{archive} is damaged (no complete data.tar); delete it to fetch it again")


def gunzip(member: Member) -> bytes:
    """Decompress a .gz or .dz member. Raises UserError if it is damaged or too large."""
    stream = zlib.decompressobj(31)
    try:
        data = stream.decompress(member.data, MAX_MEMBER)
    except zlib.error as error:
        raise UserError(f"{member.path} is not complete gzip data ({error})") from error
    if not stream.eof:
        raise UserError(f"{member.path} is cut short, or over {MAX_MEMBER} bytes decompressed")
    return data
