"""Configurations of released models by name, without weights: `config/presets/NAME.json`.

The files hold the values of the released config.json, which `config.hf` parses (rope_scaling:
`config.hf.rope`). Left out, as no figure follows from them:
rope_scaling of minicpm3-4b, and the fields of kimi-k2.5's vision tower and of its int4 experts.
"""

import json
from importlib.resources import files

from lowlat.config.hf.reader import config_from_hf
from lowlat.config.model import ModelConfig
from lowlat.utils.errors import UserError

_FOLDER = files("lowlat.config") / "presets"


def preset_names() -> tuple[str, ...]:
    """Names of all presets, sorted."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def load_preset(name: str) -> ModelConfig:
    """The configuration called `name`. Raises UserError for any other name."""
    if name not in preset_names():
        raise UserError(f"preset '{name}' is unknown; choose one of {', '.join(preset_names())}")
    raw = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return config_from_hf(raw, source=f"{name}.json")
