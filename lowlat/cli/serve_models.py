"""Models of `lowlat serve`: --model NAME=MODEL@KEY=VALUE, and the TOML file of --config.

Every model is checked before one is loaded; errors are one line that names the option or the file
and its key.
"""

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowlat.utils.bounded_read import read_bounded_text
from lowlat.utils.errors import UserError

MAX_CONFIG_BYTES = 2**20
FORM = "NAME=MODEL or NAME=MODEL@KEY=VALUE,..."
TABLES = "model"
"""Key of the models in the file."""
NOT_IN_FILE = ("models", TABLES, "config")
"""Parameters of the command that are no keys of the file."""

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]


class ModelTable(BaseModel):
    """A model and how it is loaded; None: as the server's option of the same name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    name: Name
    """Name in the API."""
    path: Annotated[str, Field(min_length=1)]
    """As MODEL of the command line; in a file, relative to the file's folder if it is there."""
    aliases: list[Name] = []
    """Further names in the API."""
    dtype: Literal["auto", "bf16", "int8", "int4", "fp16", "fp32", "fp64"] | None = None
    cache: Literal["auto", "bf16", "int8"] | None = None
    max_context: Annotated[int, Field(ge=2)] | None = None
    cache_memory: Annotated[float, Field(ge=0.001, allow_inf_nan=False)] | None = None
    """GiB."""
    speculate: bool | None = None
    lora: dict[Name, Annotated[str, Field(min_length=1)]] = {}
    """Folders of LoRA adapters by their names in the API; in a file, as `path`."""

    def with_defaults(self, **defaults: Any) -> "ModelTable":
        """The same with the server's options where it has none. Raises UserError for an invalid
        one."""
        given = {name: value for name, value in self if value is not None}
        return _table({**defaults, **given}, f"model '{self.name}'")


def parse_model(text: str) -> ModelTable:
    """The model of `--model NAME=MODEL@KEY=VALUE,...`; `alias` may be repeated. Raises
    UserError."""
    origin = f"--model '{text}'"
    name, equals, path = text.partition("=")
    if not equals or not name or not path or "@" in name:
        raise UserError(f"{origin}: write {FORM}")
    values: dict[str, Any] = {}
    before, mark, tail = path.rpartition("@")
    if mark and "=" in tail:  # revisions of the hub have none
        path, values = before, _options(tail, origin)
    return _table({**values, "name": name, "path": path}, origin)


def _options(text: str, origin: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if not equals or not value:
            raise UserError(f"{origin}: '{pair}' is not of the form KEY=VALUE")
        if key == "alias":
            values.setdefault("aliases", []).append(value)
        elif key.startswith("lora."):
            values.setdefault("lora", {})[key.removeprefix("lora.")] = value
        elif key in values or key in ("name", "path", "aliases", "lora"):
            raise UserError(f"{origin}: {key} is given twice, or not an option")
        else:
            values[key] = _toml_value(value)
    return values


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _table(values: Any, origin: str) -> ModelTable:
    try:
        return ModelTable.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """The first error: its key and what is valid."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{key} is not a key of a model; keys are {', '.join(ModelTable.model_fields)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {first['msg'].removeprefix('Input ')}"


def apply_config(context: Any, path: Path | None) -> Path | None:
    """Callback of --config: the file's keys become the defaults of the other options."""
    if path is None:
        return None
    values = _read(path)
    values.pop(TABLES, None)
    known = {item.name: item for item in context.command.params if item.name not in NOT_IN_FILE}
    for key, value in values.items():
        item = known.get(key)
        if item is None:
            near = difflib.get_close_matches(key, [*map(str, known), TABLES], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{path}: {key} is not a key of the server{hint}")
        if isinstance(value, dict) or (isinstance(value, bool) != getattr(item, "is_flag", False)):
            raise UserError(f"{path}: {key}: has a value of the wrong type, {value!r}")
        try:
            item.process_value(context, value)
        except (typer.BadParameter, TypeError) as error:
            raise UserError(f"{path}: {key}: {error}") from error
    context.default_map = values
    return path


def config_tables(path: Path | None) -> Iterator[ModelTable]:
    """The models of a file. Raises UserError."""
    if path is None:
        return
    tables = _read(path).get(TABLES, [])
    if not isinstance(tables, list):
        raise UserError(f"{path}: {TABLES} must be tables; write [[{TABLES}]]")
    for number, values in enumerate(tables, 1):
        table = _table(values, f"{path}: [[{TABLES}]] {number}")
        lora = {name: _beside(path, folder) for name, folder in table.lora.items()}
        yield table.model_copy(update={"path": _beside(path, table.path), "lora": lora})


def _beside(file: Path, path: str) -> str:
    """`path` relative to the folder of `file`, if it is there."""
    there = file.parent / Path(path).expanduser()
    return str(there) if there.exists() else path


def parse_lora(texts: Sequence[str]) -> dict[str, str]:
    """The adapters of `--lora NAME=FOLDER`. Raises UserError."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"--lora '{text}': write NAME=FOLDER")
        if name in found:
            raise UserError(f"--lora '{text}': the name {name} is given twice; choose another")
        found[name] = str(Path(folder).expanduser())
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bounded_text(path, MAX_CONFIG_BYTES, f"--config '{path}'"))
    except OSError as error:
        raise UserError(f"--config '{path}': {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not TOML ({error})") from error


def check_names(tables: Sequence[ModelTable]) -> None:
    """Raise UserError if two models share a name."""
    seen: set[str] = set()
    for table in tables:
        for name in (table.name, *table.aliases, *table.lora):
            if name in seen:
                raise UserError(
                    f"two models have the name '{name}'; give one another by --model"
                    " NAME=MODEL or --lora NAME=FOLDER"
                )
            seen.add(name)
