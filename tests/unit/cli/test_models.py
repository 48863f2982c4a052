"""`lowlat models`, `pull` and `rm` as commands of a process, against a local hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked
from tests.unit.checkpoint.hub_server import HubServer, hub_server

PART = "UD-Q2_K/m-UD-Q2_K-0000{}-of-00002.gguf"
FILES = {PART.format(1): b"GGUF first", PART.format(2): b"GGUF second", "m-Q8_0.gguf": b"GGUF 8"}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with hub_server(FILES) as server:
        yield server


def run(hub: HubServer, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "LOWLAT_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
    }
    return forked.run(
        [sys.executable, "-m", "lowlat", "models", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_pull_list_remove(hub: HubServer, tmp_path: Path) -> None:
    assert "no models in" in run(hub, tmp_path).stdout
    pulled = run(hub, tmp_path, "pull", "org/name:UD-Q2_K")
    assert pulled.returncode == 0, pulled.stderr
    path = Path(pulled.stdout.strip())
    assert path.read_bytes() == FILES[PART.format(1)]
    assert (path.parent / Path(PART.format(2)).name).read_bytes() == FILES[PART.format(2)]
    listed = json.loads(run(hub, tmp_path, "--json").stdout)["models"]
    assert [(row["name"], row["size"]) for row in listed] == [("org/name:UD-Q2_K", 21)]
    assert "org/name:UD-Q2_K" in run(hub, tmp_path).stdout
    removed = run(hub, tmp_path, "rm", "org/name:UD-Q2_K")
    assert removed.stdout.startswith("removed org/name:UD-Q2_K"), removed.stderr
    assert json.loads(run(hub, tmp_path, "--json").stdout) == {"models": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rm", "org/absent"), "org/absent"),
        (("pull", "org/name"), "Q8_0"),
        (("pull", "org/name:Q5_K_M"), "Q8_0"),
    ],
)
def test_errors_are_one_line(
    hub: HubServer, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Without a tag, or with an absent one, the error lists the tags there are."""
    result = run(hub, tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
