"""A wanted compression: its options and its scratch folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lowlat.checkpoint.fetch.cache_dir import sha256_file
from lowlat.config.model import ModelConfig
from lowlat.convert.budget import STEP, row_budget
from lowlat.convert.calibration import Calibration, read_calibration
from lowlat.convert.compress import CompressionReport, compress
from lowlat.convert.exact import check_exact
from lowlat.convert.planning import Layout
from lowlat.convert.recipes import RECIPES
from lowlat.convert.weights import Weights
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.disk_errors import NO_SPACE
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import lock_for_writing
from lowlat.utils.progress import Progress

DEFAULT_RECIPE = "weighted"
LAYOUTS: tuple[Layout, ...] = ("standard", "free")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """What a conversion to a smaller cache is asked for."""

    share: float
    """Of the channels a token leaves in the cache."""
    recipe: str = DEFAULT_RECIPE
    """A name of `RECIPES`."""
    layout: Layout = "standard"
    """standard: a deepseek_v3 that other programs load; free: widths and frequencies by layer."""
    calibrate: tuple[Path, ...] = ()
    """Text files; without any, text that comes with lowlat."""
    calibration: Calibration | None = field(default=None, compare=False)
    """Instead of text files, windows that are there already."""

    def words(self) -> dict[str, Any]:
        """What distinguishes it from others, for the journal of a conversion. Raises UserError for
        a file that is not there.
        """
        try:
            texts = [] if self.calibration is None else [self.calibration.digest()]
            texts += [f"{path.resolve()} {sha256_file(path)[:12]}" for path in self.calibrate]
        except OSError as error:
            where = f"--calibrate {error.filename}"
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        return {"cache": self.share, "recipe": self.recipe, "layout": self.layout, "text": texts}


def asked_compression(
    share: float | None, recipe: str | None, layout: str | None, calibrate: tuple[Path, ...]
) -> Compression | None:
    """What options of a command line mean, None those that were not given; None for an exact
    conversion.

    Raises UserError for options that have no effect or do not exist.
    """
    if share is not None:
        if recipe == "exact":
            raise UserError("--recipe exact keeps the cache as it is; leave out --cache")
        layout = layout or LAYOUTS[0]
        if layout not in LAYOUTS:
            raise UserError(f"--layout '{layout}' is unknown; choose {' or '.join(LAYOUTS)}")
        recipe = recipe or DEFAULT_RECIPE
        return Compression(share=share, recipe=recipe, layout=layout, calibrate=calibrate)
    given = {"--recipe": recipe not in (None, "exact"), "--layout": layout is not None}
    given |= {"--calibrate": bool(calibrate)}
    for option, is_given in given.items():
        if is_given:
            raise UserError(f"{option} belongs to --cache SHARE, the share of the cache to keep")
    return None


def check_compression(compression: Compression, to: str | None) -> None:
    """Raises UserError for options that do not go together or do not exist."""
    if to != "mla":
        raise UserError("--cache compresses into Multi-head Latent Attention; add --to mla")
    if compression.recipe not in RECIPES:
        raise UserError(
            f"--recipe '{compression.recipe}' is unknown; choose one of "
            f"{', '.join((*RECIPES, 'exact'))}"
        )


def check_reach(compression: Compression, config: ModelConfig) -> None:
    """Raises UserError where a model of `config` cannot be compressed, or not so far."""
    source = check_exact(config)
    if config.num_nextn_predict_layers:
        raise UserError(
            "--cache: the model has MTP modules, whose attention is not calibrated; leave out "
            "--cache, and they are converted exactly with all else"
        )
    rotary, row = RECIPES[compression.recipe].rotary, source.entry_dim

    def turning(budget: int) -> int:
        if rotary is None:
            return 0
        return rotary(source.head_dim, source.num_key_value_heads, budget)

    budgets = range(2 * STEP, row, STEP)
    least = next((each for each in budgets if turning(each) + STEP <= each), row)
    why = (
        f" (--recipe {compression.recipe}: {turning(least)} for rotation and {STEP} more, in "
        f"multiples of {STEP})"
    )
    row_budget(compression.share, row, least, why if turning(least) else "")


def compressed_weights(
    base: Weights,
    src: Path,
    compression: Compression,
    scratch: Path,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[Weights, CompressionReport]:
    """The model at `src`, whose weights are `base`, compressed. Raises UserError as `compress` and
    for unfit text.
    """
    tokenizer = Tokenizer.from_folder(src) if src.is_dir() else Tokenizer.from_gguf(src)
    context, rows = base.config.max_position_embeddings, base.config.vocab_size
    calibration = compression.calibration
    calibration = calibration or read_calibration(compression.calibrate, tokenizer, context)
    most = max(int(part.max()) for part in (calibration.windows, calibration.held_out))
    if most >= rows:
        raise UserError(
            f"{src}: its tokenizer writes token {most}, and the model has {rows} tokens; put back "
            "the tokenizer that belongs to it"
        )
    return compress(
        base,
        calibration,
        share=compression.share,
        recipe=compression.recipe,
        layout=compression.layout,
        scratch=scratch,
        dtype=dtype,
        progress=progress,
    )


@contextmanager
def scratch_folder(dst: Path) -> Iterator[Path]:
    """An empty folder beside `dst` that goes when it is done with; what a killed process left in it
    goes first. Raises UserError where another process is at work in it.
    """
    folder = dst.with_name(f".{dst.name}.calibration")
    try:
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("ab") as lock:
            lock_for_writing(lock, dst)
            for file in folder.glob("*.safetensors"):
                file.unlink()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        is_full = error.errno in NO_SPACE
        remedy = "make room and give the same command again"
        raise UserError(
            f"{dst}: cannot be written ({error.strerror}); "
            f"{remedy if is_full else 'choose another destination'}"
        ) from error
    except SafetensorError as error:  # what that library makes of a full disk
        raise UserError(
            f"{dst}: cannot be written ({error}); make room and give the same command again"
        ) from error
