"""deploy/: files and options it names exist, and its balancer passes tokens as they come."""

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from lowlat.cli.main import app

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PATIENCE = 60.0
"""Seconds after which something that should happen at once has not."""


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def serve_options() -> set[str]:
    """Option names of `lowlat serve`."""
    help_text = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "--help"]).output
    return set(re.findall(r"--[a-z][a-z-]+", help_text))


def test_the_container_file_copies_what_exists_and_gives_known_options() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
    entry = json.loads(text.split("ENTRYPOINT ")[1].splitlines()[0])
    assert {part for part in entry if part.startswith("--")} <= serve_options()
    needed = {"pyproject.toml", "CMakeLists.txt", "cmake", "csrc", "lowlat"}
    assert needed <= set(" ".join(copied).split())
    assert re.search(r"^USER lowlat$", text, re.MULTILINE)


def test_compose_names_files_services_and_options_that_exist() -> None:
    found = compose()
    services = set(found["services"])
    options = serve_options()
    for name, service in found["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in found["volumes"] or (DEPLOY / source).is_file(), volume
        assert set(service.get("secrets", ())) <= set(found["secrets"])
        assert set(service.get("depends_on", ())) <= services
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} would be open to other machines"
        if name.startswith("lowlat"):
            assert {p for p in service["command"] if str(p).startswith("--")} <= options
            # Prometheus asks it by this name.
            place = service["command"].index("--allowed-host")
            assert service["command"][place + 1] == name
    replicas = re.findall(r"server (\S+):8000", (DEPLOY / "nginx/replicas.conf").read_text())
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = [target.split(":")[0] for target in scrape[0]["static_configs"][0]["targets"]]
    assert replicas == targets == [name for name in found["services"] if name in replicas]


def test_the_service_gives_known_options() -> None:
    text = (DEPLOY / "lowlat.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)
    assert set(re.findall(r"--[a-z-]+", command)) <= serve_options()


def expressions() -> list[str]:
    board = json.loads((DEPLOY / "grafana/lowlat.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    board = json.loads((DEPLOY / "grafana/lowlat.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


class Backend:
    """An HTTP server that answers what it is told, and notes what it was asked."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.goes_on = asyncio.Event()
        """Set by the client when the first piece has come."""
        self.left = asyncio.Event()
        """Set when the client's connection is gone."""
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        self.bodies.append(await reader.readexactly(int(length[1]) if length else 0))
        if self.status == 200:
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
            )
            writer.write(b"data: first\n\n")
            await writer.drain()
            going, gone = (
                asyncio.ensure_future(self.goes_on.wait()),
                asyncio.ensure_future(reader.read()),
            )
            await asyncio.wait({going, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.left.set()
            going.cancel()
            gone.cancel()
            writer.write(b"data: last\n\n")
        else:
            writer.write(b"HTTP/1.1 %d No\r\ncontent-length: 0\r\n\r\n" % self.status)
        writer.close()


@asynccontextmanager
async def running(*backends: Backend) -> AsyncIterator[None]:
    servers = [await asyncio.start_server(one.serve, "127.0.0.1", 0) for one in backends]
    for backend, server in zip(backends, servers, strict=True):
        backend.port = server.sockets[0].getsockname()[1]
    try:
        yield
    finally:
        for server in servers:
            server.close()


@contextmanager
def nginx(name: str, hosts: dict[str, int], folder: Path) -> Iterator[str]:
    """nginx with deploy/nginx/NAME, `hosts` being ports on this machine; its URL."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if program is None:
        pytest.skip("nginx is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = (DEPLOY / "nginx" / name).read_text().replace("listen 8080", f"listen 127.0.0.1:{port}")
    for host, at in hosts.items():
        assert f"server {host}:8000" in text
        text = text.replace(f"server {host}:8000", f"server 127.0.0.1:{at}")
    (folder / "site.conf").write_text(text)
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid; daemon off; error_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n"
        + "".join(
            f"{kind}_temp_path {folder}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f"include {folder}/site.conf;\n}}\n"
    )
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)


def wait_for(port: int) -> None:
    for _ in range(1000):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
            return
        except ConnectionRefusedError:
            subprocess.run(["sleep", "0.01"], check=True)
    raise AssertionError("nginx does not listen")


def test_the_balancer_passes_the_first_token_before_the_last_is_made(tmp_path: Path) -> None:
    """A balancer that collects the answer looks fine, and makes every stream useless."""

    async def check() -> None:
        first, second = Backend(), Backend()
        async with running(first, second):
            hosts = {"lowlat-a": first.port, "lowlat-b": second.port}
            with nginx("replicas.conf", hosts, tmp_path) as url:
                async with (
                    httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
                    client.stream(
                        "POST",
                        "/v1/completions",
                        json={"a": 1},
                        headers={"Authorization": "Bearer k"},
                    ) as response,
                ):
                    lines = response.aiter_lines()
                    assert await anext(lines) == "data: first"
                    for backend in (first, second):
                        backend.goes_on.set()
                    assert [line async for line in lines if line] == ["data: last"]
        (head,) = first.heads + second.heads
        assert "Authorization: Bearer k" in head and f"Host: {url[7:]}" in head
        assert re.search(r"X-Request-Id: \w+", head)
        assert first.bodies + second.bodies == [b'{"a":1}']

    asyncio.run(check())


def test_a_client_that_leaves_frees_the_server(tmp_path: Path) -> None:
    async def check() -> None:
        backend = Backend()
        async with running(backend):
            hosts = {"lowlat-a": backend.port, "lowlat-b": backend.port}
            with nginx("replicas.conf", hosts, tmp_path) as url:
                async with (
                    httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
                    client.stream("POST", "/v1/completions", json={}) as response,
                ):
                    assert await anext(response.aiter_lines()) == "data: first"
                await asyncio.wait_for(backend.left.wait(), PATIENCE)

    asyncio.run(check())


@pytest.mark.parametrize("status", [429, 503])
def test_a_full_or_draining_server_leaves_the_request_to_the_other(
    tmp_path: Path, status: int
) -> None:
    async def check() -> None:
        full, free = Backend(status), Backend()
        free.goes_on.set()
        async with running(full, free):
            hosts = {"lowlat-a": full.port, "lowlat-b": free.port}
            with nginx("replicas.conf", hosts, tmp_path) as url:
                async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                    for _ in range(4):
                        response = await client.post("/v1/completions", json={"prompt": "a"})
                        assert response.status_code == 200
        assert full.heads and len(free.heads) == 4
        assert set(free.bodies) == {b'{"prompt":"a"}'}

    asyncio.run(check())


def test_models_by_path(tmp_path: Path) -> None:
    async def check() -> None:
        small, large = Backend(), Backend()
        small.goes_on.set()
        large.goes_on.set()
        async with running(small, large):
            hosts = {"lowlat-small": small.port, "lowlat-large": large.port}
            with nginx("models.conf", hosts, tmp_path) as url:
                async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                    await client.post("/large/v1/completions", json={})
                    await client.post("/small/v1/chat/completions", json={})
        assert [head.split()[1] for head in large.heads] == ["/v1/completions"]
        assert [head.split()[1] for head in small.heads] == ["/v1/chat/completions"]

    asyncio.run(check())
