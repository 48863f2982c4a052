"""Models from the Hugging Face hub, through huggingface_hub: its cache, resuming and offline reuse,
its environment variables HF_TOKEN (gated models), HF_ENDPOINT (mirrors) and HF_HUB_OFFLINE.

Owns which files are downloaded and the wording of errors. `model_names` parses names,
`gguf_variants` chooses by quantization tag, `resumable_download` fetches large files.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowlat.checkpoint.fetch.cache_dir import cache_dir, cache_disk_errors
from lowlat.checkpoint.fetch.gguf_variants import choose_variant, gguf_variants
from lowlat.checkpoint.fetch.resumable_download import download_blobs, store_folder
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.txt",
    "merges.txt",
]
"""Files to download: no pickles, no code."""
IGNORED = ["*/*", "consolidated*"]
"""Subfolders hold other formats; consolidated files hold the same weights a second time."""
LISTING_SECONDS = 10
"""Timeout of the request that lists files."""


def fetch_hub(repo: str, revision: str | None, progress: Progress, tag: str | None = None) -> Path:
    """The snapshot folder of a hub model; or the first .gguf file of the model that `tag` names, or
    of its only one where it has no safetensors.
    """
    if tag is None:
        folder = _snapshot(repo, revision, FILES, progress, IGNORED)
        if any(folder.glob("*.safetensors")):
            return folder
    variants = gguf_variants(_file_sizes(repo, revision))
    if not variants:
        lack = "no GGUF weights" if tag else "neither safetensors nor GGUF weights"
        raise UserError(f"hub model '{repo}' holds {lack}")
    files = choose_variant(variants, repo, tag).files
    return _download(repo, revision, files, progress) / files[0]


def hub_cache() -> Path:
    """The folder of hub models: huggingface_hub's, which other programs share, unless LOWLAT_CACHE
    is set.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    return cache_dir() / "hub" if os.environ.get("LOWLAT_CACHE") else Path(HF_HUB_CACHE)


def _usable_cache() -> Path:
    """`hub_cache`, created where it is lowlat's own. Raises UserError if it cannot be."""
    folder = hub_cache()
    if os.environ.get("LOWLAT_CACHE"):
        with cache_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    return folder


def _download(repo: str, revision: str | None, files: Sequence[str], progress: Progress) -> Path:
    """The snapshot folder with the weight files `files`."""
    try:
        with _hub_errors(repo, revision):
            bars = _progress_bars(progress)
            download_blobs(repo, revision, files, _usable_cache(), progress, bars)
    except HubUnreachable:
        if not set(files) <= _cached_sizes(repo, revision).keys():
            raise
    return _snapshot(repo, revision, [glob.escape(file) for file in files], progress)


def _snapshot(
    repo: str,
    revision: str | None,
    files: list[str],
    progress: Progress,
    ignored: list[str] | None = None,
) -> Path:
    """Download the files that match, or find them in huggingface_hub's cache."""
    import huggingface_hub

    cache = _usable_cache()
    with _hub_errors(repo, revision), cache_disk_errors(cache):
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            allow_patterns=files,
            ignore_patterns=ignored,
            tqdm_class=_progress_bars(progress),
        )
    return Path(folder)


def _progress_bars(progress: Progress) -> Any:
    """The class of huggingface_hub's progress bars; None for its own."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return None if progress.shown else Silent


def _file_sizes(repo: str, revision: str | None) -> dict[str, int]:
    """Path and bytes of every file of a hub model, of those in the cache if the hub cannot be
    reached.
    """
    import huggingface_hub

    try:
        with _hub_errors(repo, revision):
            info = huggingface_hub.HfApi().model_info(
                repo, revision=revision, files_metadata=True, timeout=LISTING_SECONDS
            )
    except HubUnreachable:
        if cached := _cached_sizes(repo, revision):
            return cached
        raise
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}


def _cached_sizes(repo: str, revision: str | None) -> dict[str, int]:
    """Path and bytes of every file of the cached snapshot."""
    store = store_folder(hub_cache(), repo)
    ref = store / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision or "main"
    folder = store / "snapshots" / commit
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


class HubUnreachable(UserError):
    """The hub did not answer."""


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub into one line with the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"'{repo}' is not a valid hub id: {error}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"hub model '{repo}' has no revision '{revision}'") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no folder '{repo}' here, and no model of that name on the hub, or it is private or "
            "gated; check the spelling, or log in with: hf auth login"
        ) from error
    except (OSError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise _hub_unreachable(repo, error) from error


def _hub_unreachable(repo: str, error: Exception) -> HubUnreachable:
    reason = str(error).strip().partition("\n")[0]
    return HubUnreachable(
        f"no folder '{repo}' here, and the hub cannot be reached ({reason}); connect to the "
        "network, or give the path of a model folder or .gguf file"
    )
