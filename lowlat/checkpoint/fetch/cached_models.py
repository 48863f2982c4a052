"""Models in the cache folders: list them, and remove them safely.

Hub models lie in huggingface_hub's layout (models--ORG--NAME/snapshots/REVISION/FILE ->
../../blobs/HASH), the others as `cache_dir` describes. Downloads nothing.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lowlat.checkpoint.fetch.cache_dir import RECORD_SUFFIX, cache_dir, cache_disk_errors
from lowlat.checkpoint.fetch.gguf_variants import gguf_variants
from lowlat.checkpoint.fetch.hub import hub_cache
from lowlat.checkpoint.fetch.model_names import MODEL_PRESETS
from lowlat.checkpoint.fetch.resumable_download import INCOMPLETE
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import try_lock

REMOVED = ".removed-"
"""Prefix of converted models that are being deleted."""


class CachedModel(NamedTuple):
    """A model in the cache."""

    name: str
    """As commands take it."""
    source: str
    """hub, pypi, converted, or incomplete: a download to be resumed."""
    size: int
    """Bytes on disk."""
    last_used: float
    """Seconds since 1970, as the file system records accesses."""
    paths: tuple[Path, ...]
    """Its files or links, or its folder."""


def cached_models() -> list[CachedModel]:
    """Every model in the cache, most recently used first."""
    with cache_disk_errors(cache_dir()):
        found = [*_hub_models(), *_pypi_models(), *_converted_models()]
    return sorted(found, key=lambda model: (-model.last_used, model.name))


def remove_models(name: str) -> list[CachedModel]:
    """Remove the model `name` from the cache; ORG/NAME without a tag removes all of a hub model.

    Programs that have it open keep their files. Raises UserError if it is not in the cache, or
    while it is downloaded.
    """
    models = cached_models()
    chosen = [model for model in models if _means(name, model)]
    if not chosen:
        names = ", ".join(dict.fromkeys(model.name for model in models)) or "nothing"
        raise UserError(f"'{name}' is not in the cache, which holds: {names}")
    with cache_disk_errors(cache_dir()):
        for model in chosen:
            _check_idle(model)
        for model in chosen:
            _remove(model)
    return chosen


def _means(name: str, model: CachedModel) -> bool:
    if model.source in ("hub", "incomplete"):
        own, given = model.name.lower(), name.lower()
        return own == given or own.startswith((f"{given}:", f"{given}@"))
    return model.name == name


def _model(name: str, source: str, paths: Iterable[Path]) -> CachedModel:
    files = [file for path in paths for file in _files(path)]
    stats = {(stat.st_dev, stat.st_ino): stat for stat in map(os.stat, files)}.values()
    size, used = sum(s.st_size for s in stats), max((s.st_atime for s in stats), default=0.0)
    return CachedModel(name, source, size, used, tuple(paths))


def _files(path: Path) -> list[Path]:
    """The files of a folder, without broken links; of a file, itself."""
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in paths if file.is_file()]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir())


# Where models lie


def _hub_models() -> Iterator[CachedModel]:
    for store in sorted(hub_cache().glob("models--*--*")):
        repo = store.name.removeprefix("models--").replace("--", "/", 1)
        refs = {path.read_text().strip(): path.name for path in _files(store / "refs")}
        for snapshot in _folders(store / "snapshots"):
            ref = refs.get(snapshot.name, snapshot.name)
            yield from _snapshot_models(repo if ref == "main" else f"{repo}@{ref}", snapshot)
        for part in sorted((store / "blobs").glob(f"*{INCOMPLETE}")):
            yield _model(repo, "incomplete", [part])


def _snapshot_models(name: str, snapshot: Path) -> Iterator[CachedModel]:
    """GGUF models by tag, then everything else as one."""
    files = {path.relative_to(snapshot).as_posix(): path for path in _files(snapshot)}
    for variant in gguf_variants({key: path.stat().st_size for key, path in files.items()}):
        paths = [files.pop(file) for file in variant.files]
        yield _model(f"{name}:{variant.tag}", "hub", paths)
    if files:
        yield _model(name, "hub", files.values())


def _pypi_models() -> Iterator[CachedModel]:
    for package in _folders(cache_dir() / "pypi"):
        for version in _folders(package) if package.name != ".work" else []:
            for path in _files(version):
                if not path.name.startswith(".") and not path.name.endswith(RECORD_SUFFIX):
                    member = path.relative_to(version).as_posix()
                    yield _model(f"pypi:{package.name}=={version.name}/{member}", "pypi", [path])


def _converted_models() -> Iterator[CachedModel]:
    presets = {preset.folder(): name for name, preset in reversed(MODEL_PRESETS.items())}
    for folder in _folders(cache_dir() / "converted"):
        if folder.name.startswith(REMOVED):
            shutil.rmtree(folder, ignore_errors=True)  # of a removal that was interrupted
        elif not folder.name.startswith("."):
            yield _model(presets.get(folder, str(folder)), "converted", [folder])


# Removal


def _check_idle(model: CachedModel) -> None:
    """Raise UserError if another process downloads the model."""
    for path in model.paths if model.source == "incomplete" else ():
        store = path.parent.parent
        blob = path.name.removesuffix(INCOMPLETE)
        lock = store.parent / ".locks" / store.name / f"{blob}.lowlat.lock"
        if lock.exists():
            with lock.open("a") as handle:
                if not try_lock(handle.fileno()):
                    raise UserError(
                        f"'{model.name}' is being downloaded by another process; wait for it or "
                        "end it first"
                    )


def _remove(model: CachedModel) -> None:
    """Links before blobs and names before contents: what is left always is a complete model."""
    for path in model.paths:
        if model.source == "hub":
            _remove_linked(path)
        elif model.source == "converted":
            aside = path.with_name(f"{REMOVED}{path.name}")
            os.replace(path, aside)
            shutil.rmtree(aside)
        else:
            path.unlink(missing_ok=True)
            path.with_name(path.name + RECORD_SUFFIX).unlink(missing_ok=True)


def _remove_linked(link: Path) -> None:
    """Remove a file of a snapshot, and its blob unless another snapshot links it."""
    blob = Path(os.path.realpath(link))
    snapshots = next(parent for parent in link.parents if parent.name == "snapshots")
    link.unlink(missing_ok=True)
    others = (Path(os.path.realpath(path)) for path in _files(snapshots))
    if blob.parent == snapshots.parent / "blobs" and blob not in others:
        blob.unlink(missing_ok=True)
    for folder in link.parents:
        if folder == snapshots or any(folder.iterdir()):
            break
        folder.rmdir()
