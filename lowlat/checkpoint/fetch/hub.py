"""Models from the Hugging Face hub, through huggingface_hub: its cache, resuming and offline reuse.

Owns which files are downloaded and the wording of errors. `model_names` parses names.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowlat.checkpoint.fetch.cache_dir import cache_dir, cache_disk_errors
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


def fetch_hub(repo: str, revision: str | None, progress: Progress) -> Path:
    """The snapshot folder of a hub model, or its only .gguf file where it has no safetensors."""
    folder = _snapshot(repo, revision, FILES, progress)
    if any(folder.glob("*.safetensors")):
        return folder
    ggufs = sorted(path.name for path in folder.glob("*.gguf")) or _hub_ggufs(repo, revision)
    if not ggufs:
        raise UserError(f"hub model '{repo}' holds neither safetensors nor GGUF weights")
    if len(ggufs) > 1:
        raise UserError(
            f"hub model '{repo}' holds {len(ggufs)} GGUF files ({', '.join(ggufs[:4])}, ...); "
            "download the one you want and give its path"
        )
    return _snapshot(repo, revision, [*FILES, ggufs[0]], progress) / ggufs[0]


def _snapshot(repo: str, revision: str | None, files: list[str], progress: Progress) -> Path:
    """Download the files that match, or find them in huggingface_hub's cache."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    cache = _cache_folder()
    with _hub_errors(repo, revision), cache_disk_errors(cache or Path(HF_HUB_CACHE)):
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            allow_patterns=files,
            ignore_patterns=IGNORED,
            tqdm_class=None if progress.shown else Silent,
        )
    return Path(folder)


def _cache_folder() -> Path | None:
    """The hub's folder in lowlat's cache if the user moved it; None shares models with other
    programs. Raises UserError if it cannot be created.
    """
    if not os.environ.get("LOWLAT_CACHE"):
        return None
    folder = cache_dir() / "hub"
    with cache_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _hub_ggufs(repo: str, revision: str | None) -> list[str]:
    """Names of the GGUF files at the top of a hub repository."""
    import huggingface_hub

    with _hub_errors(repo, revision):
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    return sorted(name for name in names if name.endswith(".gguf") and "/" not in name)


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
        raise UserError(_hub_unreachable(repo, error)) from error


def _hub_unreachable(repo: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"no folder '{repo}' here, and the hub cannot be reached ({reason}); connect to the "
        "network, or give the path of a model folder or .gguf file"
    )
