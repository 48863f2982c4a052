"""Calibration data (text): windows of tokens for compression statistics and held-out loss."""

import gzip
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lowlat.text.pieces import encode_long
from lowlat.text.plain import read_plain_text
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

WINDOW = 1024
"""Tokens of a window, or the model's context if that is shorter."""
SHORTEST = 2
"""Minimum tokens of a window: one to predict, after another."""
WINDOWS = 64
"""Windows for statistics."""
HELD_OUT = 4
"""Held-out windows for the loss before and after."""
MINIMUM = 8
"""Minimum number of windows for statistics."""
BUNDLED_TEXT = "calibration.txt.gz"
"""Books, speeches and reference works in the public domain, listed in lab/recipes/corpus.toml."""
BUNDLED_ORIGIN = "lowlat's own text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Windows of calibration text."""

    windows: Int[Tensor, "windows length"]
    """Windows for statistics."""
    held_out: Int[Tensor, "held_out length"]
    """Windows for the loss."""
    origin: str
    """Origin of the text, for the report."""

    def digest(self) -> str:
        """A short hash of the windows."""
        held = (self.windows, self.held_out)
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in held)).hexdigest()[:12]


def read_calibration(paths: Sequence[Path], tokenizer: Tokenizer, context: int) -> Calibration:
    """Windows spread evenly over the text files `paths`, by default over the bundled calibration
    text and Python's documentation. Texts shorter than a window are joined.

    Raises UserError naming a file that is not plain text, and for a context or text that is too
    short.
    """
    texts = [read_plain_text(path, "--calibrate") for path in paths] or _default_texts()
    origin = ", ".join(path.name for path in paths) or BUNDLED_ORIGIN
    length = _window_length(context)
    parts = [torch.from_numpy(encode_long(tokenizer, text)) for text in texts]
    found, short = sum(map(len, parts)), [part for part in parts if len(part) < length]
    parts = [part for part in parts if len(part) >= length]
    parts += [torch.cat(short)] if short else []
    windows = torch.cat([part[: len(part) // length * length].view(-1, length) for part in parts])
    if len(windows) < MINIMUM + HELD_OUT:
        raise UserError(
            f"--calibrate {origin}: {found} tokens are too few, at least "
            f"{(MINIMUM + HELD_OUT) * length} are needed (windows of {length}); add text"
        )
    return _divided(windows[_spread(len(windows))].long(), origin)


def calibration_from_tokens(
    tokens: Callable[[Int[np.ndarray, "windows length"]], Int[np.ndarray, "windows length"]],
    count: int,
    context: int,
    origin: str,
) -> Calibration | None:
    """Windows spread evenly over `count` tokens, or None if these are too few.

    tokens: returns the ids at given positions. context: the model's context length, in tokens.
    Raises UserError if that is too short.
    """
    length = _window_length(context)
    available = count // length
    if available < MINIMUM + HELD_OUT:
        return None
    starts = np.array(_spread(available)) * length
    return _divided(torch.from_numpy(tokens(starts[:, None] + np.arange(length))), origin)


def _window_length(context: int) -> int:
    if context < SHORTEST:
        raise UserError(
            f"--cache: max_position_embeddings {context} leaves nothing to predict in calibration "
            f"text; set it to {SHORTEST} or more in config.json, or leave out --cache"
        )
    return min(WINDOW, context)


def _spread(available: int) -> list[int]:
    """Indices of the windows to use, of `available`."""
    count = min(available, WINDOWS + HELD_OUT)
    return [i * available // count for i in range(count)]


def _divided(chosen: Int[Tensor, "windows length"], origin: str) -> Calibration:
    """Hold out HELD_OUT windows at even distances."""
    count = len(chosen)
    every = count // HELD_OUT
    is_held_out = torch.tensor([i % every == every - 1 for i in range(count)])
    return Calibration(windows=chosen[~is_held_out], held_out=chosen[is_held_out], origin=origin)


def bundled_text() -> str:
    """The bundled calibration text; compressed, so that searches in the source skip it."""
    packed = (files("lowlat.convert.compression") / BUNDLED_TEXT).read_bytes()
    return gzip.decompress(packed).decode("utf-8")


def _default_texts() -> list[str]:
    """The bundled text, and a third of its length of Python's documentation."""
    prose = bundled_text()
    documentation = "\n\n".join(topics[key] for key in sorted(topics))
    return [prose, documentation[: len(prose) // 3]]
