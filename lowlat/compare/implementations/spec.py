"""Parse the name of an implementation on the command line.

    NAME[@OPTION,...]                     a model in lowlat
    transformers:NAME[@OPTION]            in transformers
    official:FILE:NAME[@OPTION]           in DeepSeek's inference/model.py
    gguf:FILE                             in llama.cpp

A hub id may contain an @. Text after the last @ is a list of options if its first word is one.
"""

import os
from dataclasses import dataclass
from typing import Literal

from lowlat.attention.path import AttentionPath
from lowlat.utils.errors import UserError

Backend = Literal["lowlat", "transformers", "official", "gguf"]

DTYPES = ("fp64", "fp32", "bf16", "fp16", "int8", "int4", "fp8", "auto")
PLAIN = ("fp64", "fp32", "bf16", "fp16")
PATHS: tuple[AttentionPath, ...] = ("absorbed", "expanded", "decode")
NATIVE = "native"
CACHES = {"cache-int8": "int8", "cache-bf16": "bf16"}
OPTIONS = (*DTYPES, *PATHS, NATIVE, *CACHES)
USAGE = "NAME[@OPTION,...], transformers:NAME, official:MODEL.PY:NAME or gguf:FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImplementationSpec:
    """A parsed name; nothing is loaded."""

    text: str
    """The name on the command line."""
    backend: Backend = "lowlat"
    model: str
    """A name that `lowlat` resolves, or the path of a GGUF file."""
    script: str = ""
    """Path of model.py."""
    dtype: str = "fp32"
    form: AttentionPath | None = None
    native: bool = False
    cache: str | None = None


def parse(text: str) -> ImplementationSpec:
    """Parse `text`. Raises UserError if an option does not exist or does not apply."""
    name, options = _options(text)
    backend, model, script = _backend(name, text)
    if not model:
        raise UserError(f"'{text}' names no model; write {USAGE}")
    unknown = [option for option in options if option not in OPTIONS]
    if unknown:
        raise UserError(
            f"'{text}': option '{unknown[0]}' is unknown; choose from {', '.join(OPTIONS)}"
        )
    spec = ImplementationSpec(
        text=text,
        backend=backend,
        model=model,
        script=script,
        native=NATIVE in options,
        dtype=_one(text, options, DTYPES) or ("bf16" if NATIVE in options else "fp32"),
        form=next((form for form in PATHS if form == _one(text, options, PATHS)), None),
        cache=CACHES.get(_one(text, options, tuple(CACHES)) or ""),
    )
    _check(spec, options)
    return spec


def _options(text: str) -> tuple[str, list[str]]:
    name, mark, tail = text.rpartition("@")
    words = tail.split(",")
    # Text after @ may be a hub revision. It is a misspelt option next to a known one, or after the
    # name of a local file.
    if mark and name and (any(word in OPTIONS for word in words) or _is_here(name)):
        return name, words
    return text, []


def _is_here(name: str) -> bool:
    """Whether the model in `name` is a local folder or file."""
    return os.path.exists(os.path.expanduser(_backend(name, name)[1]))


def _backend(name: str, text: str) -> tuple[Backend, str, str]:
    kind, mark, rest = name.partition(":")
    if mark and kind == "transformers":
        return "transformers", rest, ""
    if mark and kind == "gguf":
        return "gguf", rest, ""
    if mark and kind == "official":
        script, found, model = rest.partition(":")
        if not found:
            raise UserError(f"'{text}' is not of the form official:MODEL.PY:NAME")
        return "official", model, script
    return "lowlat", name, ""


def _one(text: str, options: list[str], kind: tuple[str, ...]) -> str | None:
    found = [option for option in options if option in kind]
    if len(found) > 1:
        raise UserError(f"'{text}': {found[0]} and {found[1]} exclude each other; choose one")
    return found[0] if found else None


def _check(spec: ImplementationSpec, options: list[str]) -> None:
    if spec.backend == "gguf" and options:
        raise UserError(f"'{spec.text}': llama.cpp takes no options; leave out @ and what follows")
    if spec.backend in ("transformers", "official"):
        wrong = [option for option in options if option not in PLAIN]
        if wrong:
            raise UserError(
                f"'{spec.text}': '{wrong[0]}' is an option of lowlat's own models; "
                f"choose from {', '.join(PLAIN)}"
            )
    if spec.native and spec.dtype not in ("bf16", "int8", "int4", "fp8", "auto"):
        raise UserError(
            f"'{spec.text}': the native kernels do not compute in {spec.dtype}; "
            "choose bf16, int8 or int4"
        )
