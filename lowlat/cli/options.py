"""Options that several verbs share: types, help texts, groups, and checks beyond typer's.

A group is a dataclass of options. `with_option_groups` expands it in a verb's signature, so that a
verb takes one argument per group; `Annotated[Group, "Title"]` shows it in a panel of --help.
Defaults come from the records that the options end up in.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_args, get_type_hints

import typer

from lowlat.generate.params import SamplingParams
from lowlat.utils.errors import UserError

DEFAULT_MODEL = "default"
DEFAULT_DEVICE = "cpu"
DEFAULT_DTYPE = "bf16"
DEFAULT_CACHE = "auto"
SAMPLING = SamplingParams()

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder, .gguf file, hub id, pypi:PACKAGE==VERSION/FILE, or 'default' "
        "(SmolLM2-135M-Instruct converted to MLA).",
        show_default=False,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL...",
        help="Folder, .gguf file, hub id, pypi:PACKAGE==VERSION/FILE, or 'default' "
        "(SmolLM2-135M-Instruct converted to MLA), used if none is given.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Data type of weights and computation: bf16 (stored int8 or int4 weights stay, fp8 "
        "blocks are dequantized), int8 or int4 (quantize on load, compute in bf16), fp16, fp32, "
        "fp64, or auto (as stored, fp8 blocks too)."
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        help="Data type of the KV cache: bf16, int8 (one scale per 64 channels), or auto (same "
        "as the computation)."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads, by default one per core.", rich_help_panel="Machine"),
]

PrefixCacheDir = Annotated[
    Path | None,
    typer.Option(help="Folder for the prefix cache on disk, which outlives the process."),
]
PrefixCacheDisk = Annotated[
    float | None,
    typer.Option(min=0.000001, help="GiB that the prefix cache may take on disk; 10 by default."),
]

Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")]
TopK = Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 disables top-k.")]
TopP = Annotated[
    float, typer.Option(help="Sample from the smallest set of tokens with this total probability.")
]
MinP = Annotated[
    float, typer.Option(help="Minimum probability of a token, relative to the most likely one.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, penalize tokens of prompt and answer.")
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the random number generator; makes sampling repeatable.")
]

Parallel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=SIZE,...",
        help="Divide the model among the processes of torchrun: tensor=T, pipeline=P, expert=E; "
        "prefill=N: N more groups for prompts (disaggregated prefill). auto starts one process "
        "per NUMA node.",
        rich_help_panel="Machine",
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineOptions:
    """How a model is loaded, and what it runs on."""

    device: Device = DEFAULT_DEVICE
    dtype: Dtype = DEFAULT_DTYPE
    cache: Cache = DEFAULT_CACHE
    threads: Threads = None


Machine = Annotated[MachineOptions, "Machine"]


class DiskCacheArguments(TypedDict, total=False):
    """Arguments of `lowlat.load` for a prefix cache on disk."""

    prefix_cache_dir: Path
    prefix_cache_disk_bytes: int


def disk_cache(folder: Path | None, gib: float | None) -> DiskCacheArguments:
    """--prefix-cache-dir and --prefix-cache-disk. Raises UserError for a size without a folder."""
    if folder is None:
        if gib is not None:
            raise UserError("--prefix-cache-disk needs --prefix-cache-dir DIR; give both")
        return {}
    if gib is None:
        return {"prefix_cache_dir": folder}
    if not gib < 2**30:
        raise UserError(f"--prefix-cache-disk must be a number of GiB, got {gib}")
    return {"prefix_cache_dir": folder, "prefix_cache_disk_bytes": int(gib * 2**30)}


def with_option_groups(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb`, whose parameters are keyword-only, with each group of options expanded."""
    groups: dict[str, Any] = {}
    expanded: list[inspect.Parameter] = []
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        kind, *panel = get_args(hints[name]) or (hints[name],)
        if is_dataclass(kind):
            groups[name] = kind
            expanded += _options_of(kind, *panel)
        else:
            expanded.append(parameter.replace(annotation=hints[name]))

    @functools.wraps(verb)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{item.name: values.pop(item.name) for item in fields(kind)})
        verb(**values)

    call.__signature__ = inspect.Signature(expanded)  # pyright: ignore
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in expanded}
    del call.__wrapped__
    return call


def _options_of(group: Any, panel: str | None = None) -> Iterator[inspect.Parameter]:
    """The options of a group; those without a panel of their own go to `panel`."""
    hints = get_type_hints(group, include_extras=True)
    for item in fields(group):
        kind, shared = get_args(hints[item.name])
        option = copy.copy(shared)
        option.rich_help_panel = option.rich_help_panel or panel
        yield inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if item.default is MISSING else item.default,
            annotation=Annotated[kind, option],
        )


def parse_logit_bias(pairs: list[str] | None) -> dict[int, float]:
    """`["13=-100", "7=1.5"]` -> `{13: -100.0, 7: 1.5}`. Raises UserError on anything else."""
    biases: dict[int, float] = {}
    for pair in pairs or []:
        token, _, bias = pair.partition("=")
        try:
            number, value = int(token), float(bias)
        except ValueError as error:
            raise UserError(
                f"--logit-bias '{pair}': write TOKEN_ID=BIAS, such as 13=-9.5"
            ) from error
        if number in biases:
            raise UserError(f"--logit-bias names token {number} twice; give it once")
        biases[number] = value
    return biases


def parse_count(text: str, option: str) -> int:
    """`500000`, `500K`, `2M`, `1.5B` as a number above 0. Raises UserError on anything else."""
    sizes = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    number = 0 if match is None else round(float(match[1]) * sizes[match[2]])
    if number < 1:
        raise UserError(f"{option} '{text}': write a number such as 500000, 500K or 2M")
    return number
