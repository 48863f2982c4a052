"""A cache of its own, and package tools that only know what a test gives them."""

import stat
import sys
from pathlib import Path

import pytest

TOOL = """#!{python}
import pathlib, shutil, sys
shelf = pathlib.Path({shelf!r})
{body}
"""
# npm pack --ignore-scripts --pack-destination DIR NAME@VERSION
NPM = """
name = sys.argv[-1].lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
if not (shelf / name).is_file():
    sys.exit("npm error code E404\\nnpm error 404 Not Found\\nnpm error A log is in /x")
shutil.copy(shelf / name, pathlib.Path(sys.argv[4]) / name)
"""
# apt-get download NAME[=VERSION]
APT = """
name, _, version = sys.argv[-1].partition("=")
found = sorted(shelf.glob(f"{name}_{version or '*'}_all.deb"))
if not found:
    sys.exit(f"Reading lists...\\nE: Version '{version}' for '{name}' was not found")
shutil.copy(found[-1], found[-1].name)
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of archives that the fake npm and apt-get, and pip itself, can find."""
    shelf, tools = tmp_path / "shelf", tmp_path / "tools"
    shelf.mkdir()
    tools.mkdir()
    for name, body in (("npm", NPM), ("apt-get", APT)):
        path = tools / name
        path.write_text(TOOL.format(python=sys.executable, shelf=str(shelf), body=body))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path / "cache"))
    return shelf
