"""`lowlat generate`: complete one prompt, as text or JSON."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowlat.cli import options
from lowlat.cli.options import SAMPLING
from lowlat.generate.params import SamplingOptions, SamplingParams, make_params
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.generate.completion import Completion
    from lowlat.generate.model import Model

STDIN = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSampling:
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of generated tokens, by default the rest of the context."
        ),
    ] = SAMPLING.max_tokens
    temperature: options.Temperature = SAMPLING.temperature
    top_k: options.TopK = SAMPLING.top_k
    top_p: options.TopP = SAMPLING.top_p
    min_p: options.MinP = SAMPLING.min_p
    repetition_penalty: options.RepetitionPenalty = SAMPLING.repetition_penalty
    presence_penalty: Annotated[
        float, typer.Option(help="Subtracted from the logit of every token that is in the answer.")
    ] = SAMPLING.presence_penalty
    frequency_penalty: Annotated[
        float,
        typer.Option(
            help="Subtracted from the logit of a token for each time it is in the answer."
        ),
    ] = SAMPLING.frequency_penalty
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN_ID=BIAS", help="Add to the logit of a token; may be repeated."),
    ] = None
    seed: options.Seed = SAMPLING.seed
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: log-probability of each token, and of this many alternatives."
        ),
    ] = SAMPLING.logprobs
    n: Annotated[int, typer.Option("-n", "--n", help="Number of independent completions.")] = (
        SAMPLING.n
    )
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop string that ends the answer; may be repeated.")
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue after the end-of-sequence token.")
    ] = SAMPLING.ignore_eos

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
        str, typer.Option("-p", "--prompt", help="The prompt; '-' reads standard input.")
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
    sampling: Annotated[GenerateSampling, "Sampling"],
    parallel: options.Parallel = None,
    machine: options.Machine,
) -> None:
    """Complete one prompt.

    A model with a chat template answers the prompt as a user message. Other models continue it.
    """
    from lowlat.cli.chat_terminal import printable
    from lowlat.cli.inputs import load_model, read_stdin
    from lowlat.cli.launch import one_process_per_node
    from lowlat.utils.process_group import quiet_followers

    parallel = one_process_per_node(parallel)
    settings = sampling.as_dict()
    # Checked before a model is downloaded or loaded.
    with quiet_followers():
        _check(make_params(settings), raw=raw, system=system, as_json=as_json)
    text = read_stdin() if prompt == STDIN else prompt
    loaded = load_model(model, parallel=parallel, **asdict(machine))
    start = as_prompt(loaded, text, raw=raw, system=system)
    if as_json:
        completions = map(completion_dict, loaded.generate_many([start], **settings)[0])
        report = {"model": loaded.name, "completions": list(completions)}
        print(json.dumps(report, ensure_ascii=False))
    elif sampling.n > 1:
        for number, completion in enumerate(loaded.generate_many([start], **settings)[0], 1):
            print(f"--- {number}\n{printable(completion.text)}")
    else:
        for piece in loaded.generate(start, stream=True, **settings):
            print(printable(piece), end="", flush=True)
        print()


def _check(params: SamplingParams, *, raw: bool, system: str | None, as_json: bool) -> None:
    if raw and system is not None:
        raise UserError("--raw uses no chat template; leave out --system or --raw")
    if params.logprobs is not None and not as_json:
        raise UserError("--logprobs is printed as JSON only; add --json")


def as_prompt(
    model: "Model", text: str, *, raw: bool, system: str | None
) -> str | list[dict[str, str]]:
    """The text itself, or messages if the model has a chat template and `raw` is false."""
    has_template = model.tokenizer.chat_template is not None
    if system is not None and not has_template:
        raise UserError(f"{model.name} has no chat template; leave --system out")
    if raw or not has_template:
        return text
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def completion_dict(completion: "Completion") -> dict[str, Any]:
    """Text, tokens, finish reason, requested log-probabilities, timing and throughput."""
    usage, logprobs = completion.usage, completion.logprobs
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "logprobs": None if logprobs is None else [asdict(entry) for entry in logprobs],
        "usage": {
            **asdict(usage),
            "prefill_tokens_per_second": usage.prefill_tokens_per_second,
            "decode_tokens_per_second": usage.decode_tokens_per_second,
        },
    }
