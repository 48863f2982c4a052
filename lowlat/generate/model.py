"""Model: what `lowlat.load` returns. Text in, text out, over the engine's token ids.

Owns prompts and the sharing of one engine by several completions and streams. Not thread-safe.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

from jaxtyping import Float
from torch import Tensor

from lowlat.attention.cache import cache_bytes_per_token
from lowlat.config.attention_summary import entry_widths, short_name
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.engine import scoring
from lowlat.engine.cache_size import new_runner
from lowlat.engine.constraint import Constraint
from lowlat.engine.engine import Engine
from lowlat.engine.params import SamplingOptions, SamplingParams, integer_of, make_params
from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.engine.request import Request, RequestOptions
from lowlat.engine.scoring import Score
from lowlat.generate.completion import Completion, CompletionBuilder, Stream
from lowlat.generate.structured import StructuredOutput
from lowlat.model.quant import packed_type
from lowlat.model.transformer import Transformer
from lowlat.text.chat_prompt import encode_chat
from lowlat.text.pieces import encode_long
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.device import dtype_name
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from lowlat.generate.grammar import GrammarCompiler

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text to continue, token ids, or chat messages ({"role": ..., "content": ...})."""


class Model:
    """A loaded model and its tokenizer.

    `context` is the most tokens prompt and output may have together; None takes all the model
    allows. `cache` is the number type of the cache: auto (the activations'), bf16 or int8. With
    `max_cache_bytes` the cache never takes more ("auto": most of the memory that the weights
    leave); completions that find no room wait, or start again later. `speculates`: whether several
    tokens may be verified in a step; what comes out is the same.
    """

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: Tokenizer,
        *,
        name: str,
        context: int | None = None,
        cache: str = "auto",
        max_cache_bytes: int | Literal["auto"] | None = None,
        speculates: bool = True,
    ) -> None:
        config = transformer.config
        self.name = name
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.context = check_context(config, context)
        self.runner, limits = new_runner(transformer, cache, max_cache_bytes, self.context)
        self.engine = Engine(
            self.runner,
            context=self.context,
            eos_ids=frozenset(tokenizer.eos_ids) | frozenset(config.eos_token_ids),
            limits=limits,
            speculates=speculates,
        )
        self.context = self.engine.context
        self._compiler: GrammarCompiler | None = None
        self._builders: dict[tuple[int, int], CompletionBuilder] = {}

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def num_parameters(self) -> int:
        """Parameters held, MTP modules included."""
        count = count_parameters(self.config)
        return count.total + count.mtp + (count.mtp_copies if self.config.mtp_copies else 0)

    @property
    def cache_bytes_per_token(self) -> int:
        return cache_bytes_per_token(self.config, self.runner.cache.dtype)

    @property
    def cache_dtype(self) -> str:
        """Number type of the cache: int8, bf16, fp16, fp32 or fp64."""
        return dtype_name(self.runner.cache.dtype)

    def __repr__(self) -> str:
        attention = self.config.attention
        if isinstance(attention, MLAConfig | tuple):
            latent = " + ".join(entry_widths(attention))
            form = f"MLA {self.config.num_attention_heads} heads, latent {latent}"
        elif not isinstance(attention, GQAConfig):
            form = f"{short_name(attention)}, {attention.num_attention_heads} heads"
        else:
            groups = attention.num_key_value_heads
            form = f"GQA {attention.num_attention_heads} heads in {groups} groups"
        plain = str(self.transformer.embed_tokens.weight.dtype).removeprefix("torch.")
        return (
            f"<lowlat.Model {self.name}: {self.config.model_type}, "
            f"{self.num_parameters / 1e6:,.1f}M parameters, "
            f"{self.config.num_hidden_layers} layers, {form}, "
            f"{self.cache_bytes_per_token:,} bytes of cache per token, "
            f"{packed_type(self.transformer) or plain} "
            f"on {self.runner.device}, context {self.context:,}>"
        )

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[SamplingOptions]
    ) -> Stream: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[False] = False,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[SamplingOptions]
    ) -> Completion | list[Completion] | Stream:
        """Complete `prompt`; `options` are the fields of SamplingParams.

        Text and token ids are continued as they are, messages go through the chat template.
        Returns a Completion, or a list of them for n > 1; with stream=True an iterator of text
        pieces that carries the same fields. Raises UserError for a prompt that does not fit the
        context and for options that contradict each other.
        """
        if stream:
            return self._stream(prompt, make_params(options))
        completions = self._complete([prompt], [make_params(options)])[0]
        return completions[0] if len(completions) == 1 else completions

    def generate_many(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[list[Completion]]:
        """Complete several prompts with the same options in one batch: n completions for each."""
        params, prompts = make_params(options), as_prompts(prompts)
        return self._complete(prompts, [params] * len(prompts), progress)

    def generate_each(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Complete several prompts, each with its own options, in one batch. Raises UserError
        where there are not as many params as prompts."""
        prompts = as_prompts(prompts)
        each = params if isinstance(params, Sequence) else [params]
        if strange := [own for own in each if not isinstance(own, SamplingParams)]:
            raise UserError(f"params must be SamplingParams, or a list of them, not {strange[0]!r}")
        if len(params) != len(prompts):
            raise UserError(f"{len(prompts)} prompts need as many params, got {len(params)}")
        return self._complete(prompts, params, progress)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids the model reads for `prompt`. Raises UserError where it has no known form."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence):
            messages = [item for item in prompt if isinstance(item, Mapping)]
            if messages and len(messages) == len(prompt):
                return encode_chat(self.tokenizer, messages)
            if (ids := _plain_integers(prompt)) is not None:
                return ids
        raise UserError(
            "prompt must be text, a list of token ids, or a list of messages with role and content"
        )

    def logits(self, ids: Sequence[int]) -> Float[Tensor, "tokens vocab"]:
        """Raw logits after each of `ids`, fp32 (fp64 models: fp64); row i predicts token i + 1."""
        return scoring.logits(self.runner, self._check_ids(ids), chunk=PREFILL_CHUNK)

    def mtp_logits(self, ids: Sequence[int]) -> list[Float[Tensor, "rows vocab"]]:
        """Raw logits of every MTP depth k, fp32: [tokens - 1 - k, vocab].

        Row i of depth k predicts token i + 2 + k. Raises UserError for models without MTP modules.
        """
        if self.config.num_nextn_predict_layers == 0:
            raise UserError(f"{self.name} has no MTP modules (num_nextn_predict_layers is 0)")
        return scoring.mtp_logits(self.runner, self._check_ids(ids), chunk=PREFILL_CHUNK)

    def nll(self, ids: Sequence[int]) -> Float[Tensor, " predicted"]:
        """Negative log-likelihood in nats (fp64) of each of `ids` but the first."""
        return scoring.nll(self.runner, self._check_ids(ids), chunk=PREFILL_CHUNK)

    def perplexity(
        self, text: str, *, window: int | None = None, progress: Progress | None = None
    ) -> Score:
        """How well the model predicts `text`, in windows of `window` tokens without overlap: 1,024
        by default, or the context where that is less.

        The first token of a window is given, not predicted. Raises UserError for a window the
        context cannot hold and for a text of less than two tokens.
        """
        window = min(scoring.WINDOW, self.context) if window is None else window
        if not 2 <= window <= self.context:
            raise UserError(f"window must be from 2 to the context of {self.context}, got {window}")
        ids = encode_long(self.tokenizer, text)
        if len(ids) < 2:
            raise UserError("the text has less than two tokens; nothing can be predicted")
        tokens, num_bytes, total = 0, 0, 0.0
        with (progress or SilentProgress()).task("evaluating", len(ids), "tokens") as task:
            for start in range(0, len(ids), window):
                part = ids[start : start + window].tolist()
                if len(part) > 1:
                    total += float(self.nll(part).sum())
                    tokens += len(part) - 1
                    num_bytes += sum(len(self.tokenizer.id_to_bytes(id)) for id in part[1:])
                task.advance(len(part))
        return Score(window=window, tokens=tokens, bytes=num_bytes, nll=total)

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        if not 1 <= len(ids) <= self.context:
            raise UserError(f"ids must be 1 to {self.context} tokens (the context), got {len(ids)}")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise UserError(f"ids has a token outside the vocabulary of {self.config.vocab_size}")
        # Integers of numpy and torch become plain ones; anything else raises TypeError.
        return [operator.index(token) for token in ids]

    def _complete(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        encoded = [self._encode(prompt) for prompt in prompts]
        requests: list[Request] = []
        try:
            pairs = zip(encoded, params, strict=True)
            added = [self._add(each, own, requests, is_offline=True) for each, own in pairs]
            with (progress or SilentProgress()).task("generating", len(added), "items") as task:
                unfinished = list(range(len(added)))
                while unfinished:
                    self._step()
                    left = [i for i in unfinished if _is_unfinished(added[i])]
                    task.advance(len(unfinished) - len(left))
                    unfinished = left
        finally:
            for request in requests:
                self._abandon(request)
        return [[builder.result() for builder in group] for group in added]

    def _stream(self, prompt: Prompt, params: SamplingParams) -> Stream:
        if params.n > 1:
            raise UserError(f"n {params.n} cannot be streamed; set n to 1 or stream to False")
        requests: list[Request] = []
        (builder,) = self._add(self._encode(prompt), params, requests, is_offline=False)
        return Stream(builder, step=self._step, close=lambda: self._abandon(requests[0]))

    def _encode(self, prompt: Prompt) -> tuple[list[int], bool]:
        """The prompt's token ids, and whether what follows is a text of its own: an answer to
        messages, or after no text.
        """
        ids = self.encode_prompt(prompt)
        is_chat = not isinstance(prompt, str) and any(isinstance(item, Mapping) for item in prompt)
        return ids, is_chat or not self.tokenizer.has_text(ids)

    def _add(
        self,
        encoded: tuple[list[int], bool],
        params: SamplingParams,
        requests: list[Request],
        *,
        is_offline: bool,
    ) -> list[CompletionBuilder]:
        ids, begins_text = encoded
        grammar = self._grammar(params.structured, begins_text=begins_text)
        options = RequestOptions(grammar=grammar, is_offline=is_offline, begins_text=begins_text)
        request = self.engine.add(ids, params, options)
        requests.append(request)
        builders = [CompletionBuilder(self.tokenizer, request, i) for i in range(params.n)]
        self._builders.update({(request.id, builder.index): builder for builder in builders})
        return builders

    def _grammar(self, output: StructuredOutput | None, *, begins_text: bool) -> Constraint | None:
        """`output` compiled. Raises UserError where it cannot be, or without llguidance."""
        if output is None:
            return None
        if self._compiler is None:
            try:
                from lowlat.generate.grammar import GrammarCompiler
            except ModuleNotFoundError as error:
                raise UserError(
                    f"structured needs the package {error.name}; install it with: "
                    "pip install 'lowlat[serve]'"
                ) from error
            self._compiler = GrammarCompiler(self.tokenizer, self.config.vocab_size)
        return self._compiler.compile(output, begins_text=begins_text)

    def _step(self) -> None:
        """One step of the engine, for all completions under way; each event goes to its builder."""
        if not self.engine.has_work:
            # Whoever waits would ask for ever.
            raise RuntimeError("a completion has not ended, and the engine has nothing left to do")
        for event in self.engine.step():
            builder = self._builders.get((event.request_id, event.index))
            if builder is None:  # a stop string was found in what came before in this step
                continue
            builder.push(event)
            if builder.finish_reason is not None:
                del self._builders[event.request_id, event.index]
                self.engine.stop(event.request_id, event.index)

    def _abandon(self, request: Request) -> None:
        """Forget a request, finished or not, and give its pages back."""
        self.engine.abort(request.id)
        for index in range(request.params.n):
            self._builders.pop((request.id, index), None)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """`prompts`, or a list of one where they are a single prompt; a message alone is a chat."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return [[prompts]]
    first = next(iter(prompts), None)
    is_one = isinstance(first, Mapping) or integer_of(first) is not None
    return cast("Sequence[Prompt]", [prompts] if is_one else prompts)


def _plain_integers(items: Sequence[Any]) -> list[int] | None:
    """`items` as plain integers; None where one is no integer."""
    found = [integer_of(item) for item in items]
    return None if None in found else cast("list[int]", found)


def _is_unfinished(builders: list[CompletionBuilder]) -> bool:
    return any(builder.finish_reason is None for builder in builders)


def check_context(config: ModelConfig, context: int | None) -> int:
    """Most tokens of prompt and output: `context`, or all that the model allows where it is None.

    Raises UserError where the model allows fewer.
    """
    longest = config.max_position_embeddings
    if context is None:
        return longest
    wanted = integer_of(context)
    if wanted is None or not 2 <= wanted <= longest:
        raise UserError(
            "context must be an integer from 2 to the model's max_position_embeddings of "
            f"{longest}, got {context!r}"
        )
    return wanted
