"""Where the cache folder is and how folders in it are named."""

from pathlib import Path

import pytest

from lowlat.checkpoint.fetch import cache_dir as cache_folder
from lowlat.checkpoint.fetch.cache_dir import cache_dir, derived_dir
from lowlat.utils.errors import UserError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LOWLAT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_order_of_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / ".cache" / "lowlat"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert cache_dir() == Path("/var/xdg/lowlat")
    monkeypatch.setenv("LOWLAT_CACHE", "/var/models")
    assert cache_dir() == Path("/var/models")


def test_odd_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("LOWLAT_CACHE", "")
    assert cache_dir() == tmp_path / ".cache" / "lowlat"
    monkeypatch.setenv("LOWLAT_CACHE", "~/models")
    assert cache_dir() == tmp_path / "models"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWLAT_CACHE", "here")
    assert cache_dir() == tmp_path / "here"


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWLAT_CACHE", "~no-such-user-at-all/x")
    with pytest.raises(UserError, match="LOWLAT_CACHE"):
        cache_dir()


def test_derived_folder_depends_on_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    first = derived_dir("Tiny model: v1/MLA", ["ab12", "mla-exact"])
    assert first == derived_dir("Tiny model: v1/MLA", ["ab12", "mla-exact"])
    assert first.parent == cache_dir() / "converted"
    assert first.name.startswith("Tiny-model-v1-MLA-")
    assert len(first.name.removeprefix("Tiny-model-v1-MLA-")) == 12
    others = {
        derived_dir("Tiny model: v1/MLA", parts)
        for parts in (["ab12", "mla-exact", "bf16"], ["ab13", "mla-exact"], ["ab12mla-exact"], [])
    }
    assert len(others | {first}) == 5
    monkeypatch.setattr(cache_folder, "CONVERTED_FORMAT", 2)
    assert derived_dir("Tiny model: v1/MLA", ["ab12", "mla-exact"]) != first
