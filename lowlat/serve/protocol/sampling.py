"""Sampling fields shared by chat and completions requests, and their conversion to SamplingParams.

Applies OpenAI's defaults where they differ from the engine's. Ranges are in `engine.params`
and `generate.params`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowlat.engine import params
from lowlat.generate.params import (
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    SamplingOptions,
    SamplingParams,
    make_params,
)
from lowlat.generate.structured import StructuredOutput
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import (
    GenerationRequest,
    JsonSchemaObject,
    StrictModel,
    check_entries,
)
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.hints import Hint, Ignored
from lowlat.serve.protocol.structured_outputs import GUIDED, StructuredOutputs, guided_output

DEFAULT_TEMPERATURE = 1.0
LOWEST_TEMPERATURE = 1e-4
"""Lower temperatures count as 0 (greedy)."""

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
TokenBias = Annotated[float, Field(ge=-100.0, le=100.0)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], TokenBias],
    Field(max_length=params.MAX_LOGIT_BIAS),
    check_entries(params.MAX_LOGIT_BIAS),
]
MaxTokens = Annotated[int, Field(ge=1, le=params.MAX_TOKENS)]
UnlimitedTokens = MaxTokens | Literal[-1]
"""-1, as in llama.cpp: up to the end of the context."""
VocabularyId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]
TopLogprobs = Annotated[int, Field(ge=0, le=params.MAX_LOGPROBS)]
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=limits.MAX_NAME)],
        Annotated[str, Field(max_length=limits.MAX_METADATA_VALUE)],
    ],
    Field(max_length=limits.MAX_METADATA),
    check_entries(limits.MAX_METADATA),
]


HintText = Annotated[str, Field(max_length=limits.MAX_ID)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    """Whether a last chunk without choices reports the usage."""
    include_obfuscation: Hint[bool | None] = None


class HintedRequest(GenerationRequest):
    """Hints that chat and completions requests share: fields of OpenAI's, vLLM's and llama.cpp's
    servers that do not change the answer."""

    user: Hint[HintText | None] = None
    metadata: Hint[Metadata | None] = None
    safety_identifier: Hint[HintText | None] = None
    store: Annotated[bool | None, Ignored(when=lambda request: request.store)] = None
    """Chats and completions are not stored."""
    service_tier: Hint[HintText | None] = None
    verbosity: Hint[HintText | None] = None
    prediction: Hint[dict[str, object] | None] = None
    prompt_cache_key: Hint[HintText | None] = None
    prompt_cache_retention: Hint[HintText | None] = None
    client_metadata: Hint[dict[str, object] | None] = None
    guided_decoding_backend: Hint[HintText | None] = None
    request_id: Hint[HintText | None] = None
    """The header X-Request-Id sets the id."""
    cache_prompt: Hint[bool | None] = None
    """Prompts are always cached."""
    id_slot: Hint[int | None] = None


class SamplingRequest(HintedRequest):
    """Fields that chat and completions requests share. Null means the default."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"guided_whitespace_pattern"})

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    """Divides the logits; 0 means greedy decoding. Default 1."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Nucleus sampling: keep the fewest most likely tokens of this total probability."""
    top_k: Annotated[int, Field(ge=-1, le=params.MAX_TOP_K)] | None = None
    """Keep the k most likely tokens; 0 and -1 keep all."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Keep tokens of at least this probability relative to the most likely one."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    logit_bias: LogitBias | None = None
    """Token id, as a string -> value added to its logit."""
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=params.MAX_N)] | None = None
    """Completions per prompt; at temperature 0 they are equal."""
    stop: Stop | None = None
    ignore_eos: bool | None = None
    """Continue after the end-of-sequence token; not with structured outputs."""
    prompt_logprobs: TopLogprobs | None = None
    """Return the log-probability of each prompt token and of this many of the most likely ones;
    not in a stream."""
    min_tokens: Annotated[int, Field(ge=0, le=params.MAX_TOKENS)] | None = None
    """No end-of-sequence or stop token before this many tokens; not with structured outputs."""
    stop_token_ids: (
        Annotated[list[VocabularyId], Field(max_length=params.MAX_STOP_TOKEN_IDS)] | None
    ) = None
    """Token ids that end the completion."""
    allowed_token_ids: (
        Annotated[
            list[VocabularyId],
            Field(fail_fast=True, min_length=1, max_length=params.MAX_ALLOWED_TOKEN_IDS),
        ]
        | None
    ) = None
    """The only token ids that may be generated; not with structured outputs or bad_words."""
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    """Texts that the output must not contain as tokens; not with structured outputs."""
    structured_outputs: StructuredOutputs | None = None
    """Constraint on the output, as in vLLM."""
    guided_json: JsonSchemaObject | str | None = None
    """Older spelling of structured_outputs.json; the schema may also be a JSON text."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool | None = None
    """Whether to return the token ids of prompt and output."""
    stream_options: StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def guided_fields(self) -> list[str]:
        """The fields that set a constraint in vLLM's spellings."""
        names = ("structured_outputs", *GUIDED)
        return [name for name in names if getattr(self, name) is not None]

    def guided_output(self) -> StructuredOutput | None:
        """The constraint that they set. Raises UserError above a limit."""
        match self.guided_fields:
            case []:
                return None
            case ["structured_outputs"] if self.structured_outputs is not None:
                return self.structured_outputs.to_output()
            case [name, *_]:
                return guided_output(name, getattr(self, name))

    def check_guided(self, *others: str) -> None:
        """Raise RequestError for two constraints; `others`: further fields that set one."""
        names = [*others, *self.guided_fields]
        if len(names) > 1:
            raise RequestError(
                f"{names[0]} and {names[1]} exclude each other; set one", param=names[1]
            )

    def check_stream(self) -> None:
        """Raise RequestError for stream_options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options requires stream true; leave it out",
                param="stream_options",
            )

    def check_prompt_logprobs(self) -> None:
        """Raise RequestError for prompt_logprobs in a stream."""
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs cannot be streamed; leave stream out", param="prompt_logprobs"
            )

    def check_end(self) -> None:
        """Raise RequestError for fields that contradict a structured output."""
        for name in ("min_tokens", "allowed_token_ids", "bad_words"):
            if getattr(self, name):
                raise RequestError(
                    f"{name} cannot be combined with structured outputs or tools; leave it out",
                    param=name,
                )
        if self.ignore_eos:
            raise RequestError(
                "ignore_eos cannot be combined with structured outputs; leave it out",
                param="ignore_eos",
            )

    def check_logprobs(self, top: int, *, completions: int, param: str) -> None:
        """Raise RequestError if `top` log-probabilities per position are too many."""
        if completions * (top + 1) > limits.MAX_LOGPROBS:
            raise RequestError(
                f"{param}: completions times ({param} + 1) exceed {limits.MAX_LOGPROBS}; "
                "reduce either",
                param=param,
            )

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's sampling params. For greedy decoding, filters are dropped, as in OpenAI's
        API.
        """
        shared = SamplingRequest.model_fields.keys() & SamplingParams.__dataclass_fields__.keys()
        options: dict[str, Any] = {"temperature": DEFAULT_TEMPERATURE}
        options |= self.model_dump(include=set(shared), exclude_none=True)
        if self.top_k == -1:
            options["top_k"] = 0
        if self.logit_bias is not None:
            options["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        if options["temperature"] < LOWEST_TEMPERATURE:
            for name in ("temperature", "top_k", "top_p", "min_p"):
                options.pop(name, None)
            if (self.n or 1) > 1:
                # The engine rejects n > 1 with greedy decoding; top_k 1 is equivalent.
                options |= {"temperature": 1.0, "top_k": 1}
        options |= {"max_tokens": max_tokens, "logprobs": logprobs}
        return make_params(SamplingOptions(**options))
