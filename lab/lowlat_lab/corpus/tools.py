"""Downloads of single archives with pip, npm and apt-get, and their error messages.

The tools bring their own registries, proxies, credentials and signatures: no address is known here.
An archive is downloaded and never installed, built or run. Owns no cache (`corpus.fetch`).
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
    """Puts the archive of `source` into the folder `work`; `watch` is called ten times a second.

    newest: of a Debian package, the version its archive has now. Raises UserError with a remedy,
    OSError for a full disk.
    """
    if source.sdist:
        return _download_link(_sdist_link(source), work, watch)
    name, version = source.package_name, source.version
    # pip fills a temporary folder first; put here, its growth is seen and it is on the same disk.
    env = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    if source.kind == "pypi":
        command = [*_pip("download"), "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
        command += ["--dest", str(work), f"{name}=={version}"]
    elif source.kind == "npm":
        command = [_tool("npm", source), "pack", "--ignore-scripts", "--pack-destination"]
        command += [str(work), f"{name}@{version}"]
    else:
        # apt-get downloads into the current folder, which is another one for this command alone.
        command = ["env", f"--chdir={work}", _tool("apt-get", source), "download"]
        command += [name if newest else f"{name}={version}"]
    code, output = run_pip(command, env, watch)
    if code != 0:
        if "No space left on device" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
        raise UserError(_failure(source, output))


def _pip(verb: str) -> list[str]:
    # -P: a pip.py in the current folder is not the pip that is meant.
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
    """Where pip's own index has the source archive.

    `pip download` would run the archive's setup code to learn what it needs; so pip is only asked
    which links it finds.
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
    """A project's name as indexes normalise it."""
    return re.sub(r"[-_.]+", "-", text).lower()


def _file_of(link: str) -> str:
    return unquote(urlsplit(link).path).rsplit("/", 1)[-1]


def _download_link(link: str, work: Path, watch: Callable[[], None]) -> None:
    target = work / _file_of(link)
    if link.startswith("file:"):  # pip's find-links may be a folder
        shutil.copyfile(url2pathname(urlsplit(link).path), target)
        return
    # The system's certificates, as package tools are usually told to use.
    context = ssl.create_default_context()
    try:
        with (
            httpx.stream(
                "GET",
                link,
                headers={"Accept-Encoding": "identity"},  # the archive as it is, for its sha256
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
    """One line from what a tool printed, with the remedy that fits."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["nothing"]
    errors = [ERROR_LINE.sub("", line) for line in lines if ERROR_LINE.match(line)]
    errors = [line for line in errors if line] or lines[-1:]
    # npm tells the reason first and where its log is last; the others end with the reason.
    said = errors[0] if source.kind == "npm" else errors[-1]
    return (
        f"cannot fetch {source.package}: '{said}'; {REMEDIES[source.kind]}, or leave the source "
        f"out with --without {source.name}"
    )
