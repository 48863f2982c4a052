"""Embedding models in the layout of sentence-transformers: modules.json and the pooling config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object

MODULES_FILE = "modules.json"
MODES: dict[str, Literal["cls", "mean", "lasttoken"]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Field of the pooling config -> mode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooling:
    """How the final hidden states of a text become its embedding."""

    mode: Literal["cls", "mean", "lasttoken"]
    normalize: bool
    """Whether embeddings have length 1 (L2)."""


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling of the embedding model in `folder`; None without a modules.json.

    Raises UserError naming the file for modules other than Transformer, Pooling and Normalize, and
    for other kinds of pooling.
    """
    file = folder / MODULES_FILE
    if not folder.is_dir() or not file.exists():
        return None
    # modules.json is an array; strict parsing takes objects.
    modules = parse_object(b'{"modules":' + _read(file) + b"}", str(file))["modules"]
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{file}: must be an array of objects")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{file}: modules {', '.join(kinds)} are not supported; lowlat runs Transformer,"
            " Pooling and Normalize"
        )
    path = folder / str(modules[1].get("path")) / "config.json"
    return Pooling(mode=_mode(path), normalize=len(kinds) == 3)


def _mode(path: Path) -> Literal["cls", "mean", "lasttoken"]:
    fields = parse_object(_read(path), str(path))
    chosen = [name for name in fields if name.startswith("pooling_mode_") and fields[name]]
    if isinstance(fields.get("pooling_mode"), str):
        chosen.append(_field(fields))
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise UserError(
            f"{path}: pooling by {', '.join(chosen) or 'nothing'} is not supported; lowlat pools by"
            f" one of {', '.join(MODES)}"
        )
    return MODES[chosen[0]]


def _field(fields: dict[str, Any]) -> str:
    """The field that `pooling_mode`, of newer versions, stands for."""
    mode = fields["pooling_mode"]
    return next((name for name, known in MODES.items() if known == mode), mode)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {size} bytes are too many for a JSON file of a model")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
