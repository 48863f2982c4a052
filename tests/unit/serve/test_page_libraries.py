"""The bundled libraries of the chat page: what the lock file pins, their licences, the rebuild."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lowlat.serve.http.pages import FOLDER

WEB = Path(__file__).parents[3] / "web"
VENDOR = FOLDER / "vendor"
LIBRARIES = ("dompurify", "highlight.js", "katex", "markdown-it")


def test_licences() -> None:
    """Each library is pinned by integrity, without a registry's address, and has its licence."""
    lock = json.loads((WEB / "package-lock.json").read_text())["packages"]
    wanted = json.loads((WEB / "package.json").read_text())["devDependencies"]
    licences = (VENDOR / "LICENSES.txt").read_text()
    for name in LIBRARIES:
        entry = lock[f"node_modules/{name}"]
        assert entry["version"] == wanted[name]
        assert f"{name} {entry['version']}, {entry['license']}\n" in licences
    pinned = [entry for path, entry in lock.items() if path]
    assert all(entry["integrity"].startswith("sha512-") for entry in pinned)
    assert not any("resolved" in entry for entry in pinned)


@pytest.mark.network
@pytest.mark.slow
def test_rebuild(tmp_path: Path) -> None:
    """npm's packages give the committed files byte for byte."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not here: install Node.js to rebuild the page's libraries")
    for name in ("package.json", "package-lock.json", "build.js"):
        shutil.copy(WEB / name, tmp_path)
    options = ["--ignore-scripts", "--no-audit", "--no-fund"]
    environment = {**os.environ, "npm_config_cache": str(tmp_path / "cache")}
    subprocess.run(
        [npm, "ci", *options], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    built = tmp_path / "vendor"
    subprocess.run(["node", "build.js", str(built)], cwd=tmp_path, check=True, capture_output=True)
    assert {path.name for path in built.iterdir()} == {path.name for path in VENDOR.iterdir()}
    for path in sorted(VENDOR.iterdir()):
        assert (built / path.name).read_bytes() == path.read_bytes(), path.name
