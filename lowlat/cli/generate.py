"""`lowlat generate`: complete one prompt, as text or JSON."""

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from lowlat.cli import options
from lowlat.cli.options import SAMPLING
from lowlat.generate.params import SamplingOptions, SamplingParams, make_params
from lowlat.utils.errors import UserError

STDIN = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSampling:
    """All sampling options."""

    max_tokens: options.MaxTokens = SAMPLING.max_tokens
    temperature: options.Temperature = SAMPLING.temperature
    top_k: options.TopK = SAMPLING.top_k
    top_p: options.TopP = SAMPLING.top_p
    min_p: options.MinP = SAMPLING.min_p
    repetition_penalty: options.RepetitionPenalty = SAMPLING.repetition_penalty
    presence_penalty: options.PresencePenalty = SAMPLING.presence_penalty
    frequency_penalty: options.FrequencyPenalty = SAMPLING.frequency_penalty
    logit_bias: options.LogitBias = None
    seed: options.Seed = SAMPLING.seed
    logprobs: options.Logprobs = SAMPLING.logprobs
    n: options.N = SAMPLING.n
    stop: options.Stop = None
    ignore_eos: options.IgnoreEos = SAMPLING.ignore_eos

    def as_dict(self) -> SamplingOptions:
        """Arguments of SamplingParams. Raises UserError for a malformed --logit-bias."""
        parsed = {
            "logit_bias": options.parse_logit_bias(self.logit_bias),
            "stop": self.stop or [],
        }
        return {**asdict(self), **parsed}  # pyright: ignore[reportReturnType]


@options.with_option_groups
def generate(
    *,
    prompt: Annotated[
        str,
        typer.Option(
            "-p", "--prompt", help="The prompt; '-' reads standard input.", show_default=False
        ),
    ],
    model: options.Model = options.DEFAULT_MODEL,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the prompt text, without the chat template."),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System message for the chat template.")
    ] = None,
    as_json: options.Json = False,
    sampling: GenerateSampling,
    machine: options.MachineOptions,
) -> None:
    """Complete one prompt.

    A model with a chat template answers the prompt as a user message. Other models continue it.
    """
    from lowlat.cli.chat_terminal import printable
    from lowlat.cli.generate_output import as_prompt, print_json, print_numbered
    from lowlat.cli.inputs import load_model, read_stdin

    settings = sampling.as_dict()
    # Checked before a model is downloaded or loaded.
    _check(make_params(settings), raw=raw, system=system, as_json=as_json)
    text = read_stdin() if prompt == STDIN else prompt
    loaded = load_model(model, **asdict(machine))
    start = as_prompt(loaded, text, raw=raw, system=system)
    if as_json:
        print_json(loaded, loaded.generate_many([start], **settings)[0])
    elif sampling.n > 1:
        print_numbered(loaded.generate_many([start], **settings)[0])
    else:
        for piece in loaded.generate(start, stream=True, **settings):
            print(printable(piece), end="", flush=True)
        print()


def _check(params: SamplingParams, *, raw: bool, system: str | None, as_json: bool) -> None:
    if raw and system is not None:
        raise UserError("--raw uses no chat template; leave out --system or --raw")
    if params.logprobs is not None and not as_json:
        raise UserError("--logprobs is printed as JSON only; add --json")
