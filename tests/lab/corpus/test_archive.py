"""Reading packages: what matches, in order, and nothing that could harm."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from lowlat_lab.corpus import archive as module
from lowlat_lab.corpus.archive import gunzip, read_members
from lowlat_lab.corpus.document import Member

from lowlat.utils.errors import UserError

from .builders import make_deb, make_tgz, make_wheel

FILES = {"usr/b.txt": b"bee", "usr/a.txt": b"ay", "usr/deep/c.txt": b"sea", "usr/d.bin": b"\0"}


@pytest.mark.parametrize(
    ("make", "name"), [(make_deb, "x.deb"), (make_tgz, "x.tgz"), (make_wheel, "x.whl")]
)
def test_members_that_match_come_sorted(tmp_path: Path, make, name: str) -> None:
    path = make(tmp_path / name, FILES)
    found = read_members(path, ["usr/*.txt"], ["*/b.txt"])
    assert [(member.path, member.data) for member in found] == [
        ("usr/a.txt", b"ay"),
        ("usr/deep/c.txt", b"sea"),
    ]


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    """Regression: a package that has changed quietly gives less text."""
    path = make_tgz(tmp_path / "x.tgz", FILES)
    with pytest.raises(UserError, match=r"x\.tgz has no file '\*\.rst'"):
        read_members(path, ["*.txt", "*.rst"], [])


def test_links_are_passed_over_and_odd_paths_reach_no_disk(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        odd = tarfile.TarInfo("../../outside.txt")
        odd.size = 3
        archive.addfile(odd, io.BytesIO(b"out"))
    path = tmp_path / "inner" / "x.tgz"
    path.parent.mkdir()
    path.write_bytes(out.getvalue())
    found = read_members(path, ["*.txt"], [])
    assert [member.path for member in found] == ["../../outside.txt"]
    assert [entry.name for entry in tmp_path.rglob("*")] == ["inner", "x.tgz"]


def test_sizes_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tgz(tmp_path / "x.tgz", {"big.txt": bytes(1013)})
    monkeypatch.setattr(module, "MAX_MEMBER", 1009)
    with pytest.raises(UserError, match=r"big\.txt in x\.tgz has 1013 bytes; at most 1009"):
        read_members(path, ["*"], [])
    monkeypatch.setattr(module, "MAX_TOTAL", 1009)
    with pytest.raises(UserError, match="too large"):
        read_members(path, ["*"], [])
    with pytest.raises(UserError, match="over 1009 bytes decompressed"):
        gunzip(Member(path="big.gz", data=gzip.compress(bytes(1013))))


@pytest.mark.parametrize("name", ["x.deb", "x.tgz", "x.whl"])
def test_damage_is_an_error_with_a_remedy(tmp_path: Path, name: str) -> None:
    make = {"x.deb": make_deb, "x.tgz": make_tgz, "x.whl": make_wheel}[name]
    whole = make(tmp_path / name, {"a.txt": bytes(range(256)) * 29}).read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"no archive at all" * 7):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError, match="delete it to fetch it again"):
            read_members(path, ["*.txt"], [])


def test_a_deb_of_unread_compression_says_so(tmp_path: Path) -> None:
    path = make_deb(tmp_path / "x.deb", FILES, data_name="data.tar.zst")
    with pytest.raises(UserError, match="zstd"):
        read_members(path, ["*"], [])
