"""What a conversion with healing or evaluation is asked for, and what distinguishes it from others.

Owns the options and which of them go together; those of the conversion alone are `convert`'s.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lowlat.convert.compression import Compression
from lowlat.convert.run import Job
from lowlat.data.documents import ReadOptions
from lowlat.data.sources import DATASETS, files_of
from lowlat.utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Beside the conversion itself."""

    tokens: int | None = None
    """Training tokens to heal on; None for no healing."""
    texts: tuple[str, ...] = ()
    """What to heal on: files, folders, datasets:NAME."""
    evaluate: Path | None = None
    """A text file to measure perplexity on."""

    @property
    def is_plain(self) -> bool:
        """Whether a conversion is all."""
        return self.tokens is None and self.evaluate is None


def check_wanted(wanted: Wanted, compression: Compression | None) -> None:
    """Raises UserError for options that have no effect, do not go together, or name the evaluation
    text as one that the model is to be made with.
    """
    if wanted.texts and wanted.tokens is None:
        raise UserError("--text belongs to --heal TOKENS, how many tokens to train on")
    if wanted.tokens is not None and compression is None:
        raise UserError("--heal mends a model whose cache was made smaller; add --cache SHARE")
    if wanted.tokens is not None and not wanted.texts:
        raise UserError("--heal trains on text; add --text FILE_OR_FOLDER")
    if wanted.evaluate is None:
        return
    if compression is None:
        raise UserError("--evaluate belongs to --cache SHARE, the share of the cache to keep")
    own = wanted.evaluate.resolve()
    given = {"--text": wanted.texts, "--calibrate": compression.calibrate}
    for option, names in given.items():
        for path in (Path(name).resolve() for name in names):
            if own == path or path in own.parents:
                raise UserError(
                    f"--evaluate {wanted.evaluate}: is given as {option} too; evaluate on text "
                    "that the model is not made with"
                )


def identity(job: Job, wanted: Wanted, evaluated: str | None) -> dict[str, str]:
    """What distinguishes the work on `job` from others with the same destination, each in words.
    `evaluated` is the content of the evaluation text.
    """
    facts = job.identity()
    facts["healing"] = "none" if wanted.tokens is None else f"{wanted.tokens} tokens"
    facts["healing text"] = ", ".join(_fingerprint(text) for text in wanted.texts) or "none"
    facts["evaluation text"] = "none"
    if evaluated is not None:
        digest = hashlib.sha256(evaluated.encode()).hexdigest()[:12]
        facts["evaluation text"] = f"{wanted.evaluate} {digest}"
    return facts


def _fingerprint(text: str) -> str:
    """A source by name, and what would change with its files."""
    if text.startswith(DATASETS):
        return text
    digest = hashlib.sha256()
    for file in text_files(text):
        stat = file.stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{Path(text).resolve()} {digest.hexdigest()[:12]}"


def text_files(text: str) -> list[Path]:
    """The files of a source of healing text. Raises UserError where there are none."""
    try:
        return files_of(text, ReadOptions())
    except UserError as error:
        raise UserError(f"--text: {str(error).removesuffix(' or --only')}") from error
