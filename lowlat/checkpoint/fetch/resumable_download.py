"""Download large hub files into huggingface_hub's cache, resume a download that was interrupted,
and check the sha256.

huggingface_hub itself starts a file over when its process was interrupted, and checks sizes only.
Here the bytes received stay in `blobs/SHA256.lowlat.incomplete`, the next run requests the rest
(HTTP Range), and the file gets its name only if its sha256 is right. huggingface_hub then finds the
blob and links it into the snapshot.
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowlat.checkpoint.fetch.cache_dir import cache_disk_errors, locked, sha256_file
from lowlat.utils.atomic_files import sync_descriptor, sync_folder
from lowlat.utils.disk_errors import NO_PERMISSION, NO_SPACE
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

INCOMPLETE = ".lowlat.incomplete"


class _Blob(NamedTuple):
    """A file to download."""

    name: str
    url: str
    path: Path
    """Where it belongs; the name is its sha256."""
    size: int

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + INCOMPLETE)

    @property
    def received(self) -> int:
        """Bytes of an earlier run."""
        return self.part.stat().st_size if self.part.exists() else 0


def store_folder(cache: Path, repo: str) -> Path:
    """huggingface_hub's folder of a model in the cache."""
    return cache / f"models--{repo.replace('/', '--')}"


def download_blobs(
    repo: str,
    revision: str | None,
    names: Sequence[str],
    cache: Path,
    progress: Progress,
    tqdm_class: Any,
) -> None:
    """Download the files `names` of a hub model that are not in `cache` yet.

    Files whose sha256 the hub does not report are left to huggingface_hub. Raises UserError for a
    full disk, an interrupted connection or wrong content; errors of the hub as huggingface_hub.
    """
    blobs = [blob for name in names if (blob := _missing_blob(repo, revision, name, cache))]
    if not blobs:
        return
    with cache_disk_errors(cache):
        folder = blobs[0].path.parent
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(blobs, folder)
        locks = cache / ".locks" / store_folder(cache, repo).name
        locks.mkdir(parents=True, exist_ok=True)
        for blob in blobs:
            with locked(locks / f"{blob.path.name}.lowlat.lock", blob.name, progress):
                if not blob.path.exists():  # the previous holder of the lock may have fetched it
                    _receive(blob, tqdm_class)
                    _place(blob, progress)


def _missing_blob(repo: str, revision: str | None, name: str, cache: Path) -> _Blob | None:
    import huggingface_hub
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    url = huggingface_hub.hf_hub_url(repo, name, revision=revision)
    facts = huggingface_hub.get_hf_file_metadata(url)
    if facts.etag is None or not re.fullmatch("[0-9a-f]{64}", facts.etag) or facts.size is None:
        return None
    path = store_folder(cache, repo) / "blobs" / facts.etag
    # the hub sends larger files through its own protocol only
    if path.exists() or facts.size > MAX_HTTP_DOWNLOAD_SIZE:
        return None
    return _Blob(name, url, path, facts.size)


def _check_space(blobs: Sequence[_Blob], folder: Path) -> None:
    needed = sum(max(blob.size - blob.received, 0) for blob in blobs)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the download needs {needed / 1e9:,.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:,.1f} GB left; free some (lowlat models rm), or set LOWLAT_CACHE to a "
            "folder on another disk"
        )


def _receive(blob: _Blob, tqdm_class: Any) -> None:
    """Append the bytes that are missing to the partial file."""
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if blob.received > blob.size:
        blob.part.unlink()
    try:
        with blob.part.open("ab") as stream:
            http_get(
                blob.url,
                stream,
                resume_size=blob.received,
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                expected_size=blob.size,
                displayed_filename=blob.name,
                tqdm_class=tqdm_class,
            )
            stream.flush()
            sync_descriptor(stream.fileno())
    except errors.HfHubHTTPError:
        raise
    except (OSError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        if isinstance(error, OSError) and error.errno in NO_SPACE | NO_PERMISSION:
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the download of {blob.name} stopped at {blob.received / 1e9:,.2f} of "
            f"{blob.size / 1e9:,.2f} GB ({reason}); run the same command again to resume it"
        ) from error


def _place(blob: _Blob, progress: Progress) -> None:
    """Give the complete file its name, if its content is right."""
    with progress.task(f"checking {Path(blob.name).name}", blob.size, "bytes") as task:
        digest = sha256_file(blob.part, task.advance)
    if digest != blob.path.name:
        blob.part.unlink()
        raise UserError(
            f"{blob.name} is not the file expected: sha256 expected {blob.path.name}, got "
            f"{digest}; it was removed, try again"
        )
    os.replace(blob.part, blob.path)
    sync_folder(blob.path.parent)
