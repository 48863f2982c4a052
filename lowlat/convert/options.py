"""Conversion options: one record of all options of `lowlat convert`, and their validation.

Checks here need only the options; `convert.conversion` checks them against the source model.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from lowlat.checkpoint.fetch.cache_dir import sha256_file
from lowlat.convert.compression.calibration import Calibration
from lowlat.convert.compression.methods import DEFAULT_METHOD, METHODS
from lowlat.convert.compression.plan import CacheLayout
from lowlat.convert.parameters.indexer import IndexerOptions
from lowlat.convert.storage.folder import StorageType
from lowlat.convert.storage.gguf import GGUF_TYPES
from lowlat.utils.atomic_files import refuse_existing
from lowlat.utils.errors import UserError

LAYOUTS: tuple[CacheLayout, ...] = ("standard", "free")
STORAGE_TYPES: dict[str, StorageType] = {name: name for name in get_args(StorageType)}
CALIBRATED: tuple[StorageType, ...] = ("int8", "int4")
"""Storage types that choose scales on calibration text."""
FORMATS = ("auto", "hf", "gguf")
GGUF_SUFFIX = ".gguf"
MAX_OPTION = 10**12
"""Largest number of an option."""
INDEXER_SIZES = ("index_n_heads", "index_head_dim", "index_rope_head_dim")
MAX_INDEXER_SIZE = 1024
"""Largest number of heads and channels of an indexer: V3.2 has 64 and 128."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionOptions:
    """Options of a conversion to a smaller cache."""

    share: float
    """Share of a KV cache entry's channels to keep."""
    method: str = DEFAULT_METHOD
    """A name in `METHODS`."""
    layout: CacheLayout = "standard"
    """standard: a deepseek_v3 that other programs load; free: widths and frequencies by layer."""
    calibrate: tuple[Path, ...] = ()
    """Calibration text files; the bundled text if empty."""
    calibration: Calibration | None = field(default=None, compare=False)
    """Windows of calibration text, instead of files."""

    def fingerprint(self) -> dict[str, Any]:
        """The options and hashes of the calibration text, to resume only the same conversion.

        Raises UserError for a file that cannot be read.
        """
        try:
            texts = [] if self.calibration is None else [self.calibration.digest()]
            texts += [f"{path.resolve()} {sha256_file(path)[:12]}" for path in self.calibrate]
        except OSError as error:
            where = f"--calibrate {error.filename}"
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        return {"cache": self.share, "method": self.method, "layout": self.layout, "text": texts}


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryOptions:
    """Options of recovery training and evaluation after a compression."""

    tokens: int | None = None
    """Training tokens; None for no recovery training."""
    texts: tuple[str, ...] = ()
    """Training text: files, folders, datasets:NAME."""
    evaluate: Path | None = None
    """Text file to measure perplexity on."""

    @property
    def is_empty(self) -> bool:
        """Whether there is neither recovery training nor evaluation."""
        return self.tokens is None and self.evaluate is None


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """All options of a conversion; values are those of the command line."""

    to: str | None = None
    """Attention: "mla", "dsa" (sparse attention), or None to keep the source's."""
    dtype: str = "auto"
    """A storage type, or auto to keep the type of every tensor."""
    file_format: str = "auto"
    """hf, gguf, or auto to decide by the destination's name."""
    compression: CompressionOptions | None = None
    """To a smaller cache; None for an exact conversion."""
    experts: int | None = None
    """Routed experts to make of every dense layer; None to keep layers dense."""
    calibrate: tuple[Path, ...] = ()
    """Calibration text files of quantization; the bundled text if empty."""
    recovery: RecoveryOptions = RecoveryOptions()
    """Recovery training and evaluation."""
    indexer: IndexerOptions = field(default_factory=IndexerOptions)
    """Indexers of a conversion to sparse attention."""

    @property
    def storage_type(self) -> StorageType | None:
        """The storage type; None keeps the type of every tensor."""
        return None if self.dtype == "auto" else STORAGE_TYPES[self.dtype]

    @property
    def trains(self) -> bool:
        """Whether the conversion needs training or evaluation (`lowlat.recovery`)."""
        return self.to == "dsa" or not self.recovery.is_empty

    def writes_gguf(self, dst: Path) -> bool:
        """Whether `dst` is to be a GGUF file."""
        return self.file_format == "gguf" or (self.file_format == "auto" and is_gguf(dst))

    def check(self, dst: Path) -> None:
        """Raises UserError for unknown values, options that exclude each other or have no effect,
        and an existing `dst`.
        """
        if self.to not in (None, "mla", "dsa"):
            raise UserError(f"--to '{self.to}' is unknown; choose mla or dsa")
        if self.dtype not in (*STORAGE_TYPES, "auto"):
            types = ", ".join(STORAGE_TYPES)
            raise UserError(f"--dtype '{self.dtype}' is unknown; choose {types} or auto")
        if self.file_format not in FORMATS:
            formats = ", ".join(FORMATS)
            raise UserError(f"--format '{self.file_format}' is unknown; choose {formats}")
        writes_gguf = self.writes_gguf(dst)
        if writes_gguf != is_gguf(dst):
            rule = (
                "needs a file name that ends" if writes_gguf else "needs a folder that does not end"
            )
            raise UserError(f"{dst}: --format {self.file_format} {rule} in {GGUF_SUFFIX}")
        if writes_gguf and self.dtype not in (*GGUF_TYPES, "auto"):
            raise UserError(
                f"--dtype {self.dtype} does not exist in GGUF files; choose "
                f"{', '.join(GGUF_TYPES)} or auto"
            )
        if self.compression is not None:
            _check_compression(self.compression, self.to)
        _check_texts(self.calibrate)
        if self.to == "dsa":
            _check_sparse(self, writes_gguf=writes_gguf)
        else:
            if self.indexer != IndexerOptions():
                raise UserError("--warmup and --index-... are options of indexers; add --to dsa")
            _check_recovery(self.recovery, self.compression)
        refuse_existing(dst.absolute())


def compression_options(
    share: float | None,
    method: str | None,
    layout: str | None,
    calibrate: tuple[Path, ...],
    *,
    to: str | None,
    dtype: str = "auto",
) -> CompressionOptions | None:
    """The compression options of the command line, None for each one not given, as a record; None
    for an exact conversion.

    Raises UserError for options that have no effect or unknown values.
    """
    for option, value in (("--cache", share), ("--method", method)):
        if value is not None and to is None:
            raise UserError(f"{option} compresses into Multi-head Latent Attention; add --to mla")
    if share is not None:
        if method == "exact":
            raise UserError("--method exact does not compress the KV cache; leave out --cache")
        layout = layout or LAYOUTS[0]
        if layout not in LAYOUTS:
            raise UserError(f"--layout '{layout}' is unknown; choose {' or '.join(LAYOUTS)}")
        method = method or DEFAULT_METHOD
        return CompressionOptions(share=share, method=method, layout=layout, calibrate=calibrate)
    given = {"--method": method not in (None, "exact"), "--layout": layout is not None}
    for option, is_given in given.items():
        if is_given:
            raise UserError(f"{option} needs --cache SHARE, the share of the cache to keep")
    if calibrate and dtype not in CALIBRATED:
        raise UserError("--calibrate needs --cache SHARE, or --dtype int8 or int4")
    return None


def is_gguf(path: Path) -> bool:
    """Whether `path` has the suffix of a GGUF file and is not a folder."""
    return path.suffix.lower() == GGUF_SUFFIX and not path.is_dir()


def _check_compression(compression: CompressionOptions, to: str | None) -> None:
    if to != "mla":
        raise UserError("--cache compresses into Multi-head Latent Attention; add --to mla")
    if compression.method not in METHODS:
        raise UserError(
            f"--method '{compression.method}' is unknown; choose one of "
            f"{', '.join((*METHODS, 'exact'))}"
        )
    _check_texts(compression.calibrate)
    if not 0 < compression.share < 1:
        raise UserError(
            f"--cache {compression.share:g}: give the share of the cache to keep, above 0 and "
            "below 1; without --cache the conversion is exact"
        )


def _check_sparse(options: ConversionOptions, *, writes_gguf: bool) -> None:
    """Raises UserError for options that --to dsa excludes, and for no text to learn from."""
    excluded = {
        "--cache": options.compression is not None,
        "--experts": options.experts is not None,
        "--calibrate": bool(options.calibrate),
        "GGUF files": writes_gguf,
    }
    for option, is_given in excluded.items():
        if is_given:
            raise UserError(f"--to dsa does not support {option}; convert in two steps")
    for name, value in asdict(options.indexer).items():
        most = MAX_INDEXER_SIZE if name in INDEXER_SIZES else MAX_OPTION
        if value is not None and not 1 <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 to {most:,}")
    if not options.recovery.texts:
        raise UserError("--to dsa trains indexers on text; add --text FILE_OR_FOLDER")
    _check_evaluation_text(options.recovery, ())


def _check_texts(texts: tuple[Path, ...]) -> None:
    for path in texts:  # read twice, so no pipe either
        if path.exists() and not path.is_file():
            raise UserError(f"--calibrate {path}: is not a regular file; give a text file")


def _check_recovery(recovery: RecoveryOptions, compression: CompressionOptions | None) -> None:
    """Raises UserError for options without effect, and for evaluation text that is also calibration
    or training text.
    """
    if recovery.texts and recovery.tokens is None:
        raise UserError("--text needs --heal TOKENS, the number of tokens to train on")
    if recovery.tokens is not None and compression is None:
        raise UserError("--heal trains a model whose cache was compressed; add --cache SHARE")
    if recovery.tokens is not None and not recovery.texts:
        raise UserError("--heal trains on text; add --text FILE_OR_FOLDER")
    if recovery.evaluate is None:
        return
    if compression is None:
        raise UserError("--evaluate needs --cache SHARE, the share of the cache to keep")
    _check_evaluation_text(recovery, compression.calibrate)


def _check_evaluation_text(recovery: RecoveryOptions, calibrate: tuple[Path, ...]) -> None:
    """Raises UserError if the evaluation text is also training or calibration text."""
    if recovery.evaluate is None:
        return
    own = recovery.evaluate.resolve()
    given = {"--text": recovery.texts, "--calibrate": calibrate}
    for option, names in given.items():
        for path in (Path(name).resolve() for name in names):
            if own == path or path in own.parents:
                raise UserError(
                    f"--evaluate {recovery.evaluate}: is also given as {option}; give text that is "
                    "neither calibration nor training text"
                )
