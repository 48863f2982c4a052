"""Model: the Python API that `lowlat.load` returns, text in and text out.

Owns prompts, structured outputs and scoring for Python callers; `generate.session` drives the
engine. Not thread-safe.
"""

import operator
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Unpack, overload

from jaxtyping import Float
from torch import Tensor

from lowlat.attention.cache import cache_bytes_per_token
from lowlat.config.attention import entry_widths, short_name
from lowlat.config.hf.sentence_transformers import Pooling
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig
from lowlat.config.parameter_count import num_stored_parameters
from lowlat.engine import scoring
from lowlat.engine.constraint import Constraint
from lowlat.engine.disk_cache import DEFAULT_DISK_BYTES, disk_cache_options
from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.engine.prompt_logprobs import PromptLogprob
from lowlat.engine.request import LoRARequest, RequestOptions
from lowlat.engine.scoring import Score
from lowlat.generate.completion import Completion, Stream
from lowlat.generate.context import check_context
from lowlat.generate.lora import LoadedAdapters, LoraNames
from lowlat.generate.new_engine import ServingGroup, new_engine
from lowlat.generate.params import SamplingOptions, SamplingParams, check_each, make_params
from lowlat.generate.prompt import Prompt, as_prompts, begins_text, encode_prompt
from lowlat.generate.session import GenerationSession, TextRequest
from lowlat.generate.structured import StructuredOutput
from lowlat.model.lora import SelectedAdapter
from lowlat.model.quant import weight_format
from lowlat.model.transformer import Transformer
from lowlat.text.pieces import encode_long
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.device import dtype_name
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from lowlat.generate.grammar import GrammarCompiler


class Model:
    """A loaded model and its tokenizer.

    context: the most tokens that prompt and output may have together (max_model_len in vLLM);
    None takes all the model allows. cache: dtype of the KV cache, auto (that of the activations),
    bf16 or int8. max_cache_bytes: bound of the KV cache ("auto": most of the memory left after the
    weights); completions without free pages wait, or are preempted and recomputed.
    prefix_cache_dir: folder of the prefix cache on disk, of up to prefix_cache_disk_bytes, which
    processes may share. speculates: whether speculative decoding runs. pooling: of an embedding
    model. adapters: LoRA adapters that requests may name. run: processes that divide the model;
    except in process 0, the constructor serves it until it ends, and raises SystemExit.
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
        prefix_cache_dir: str | os.PathLike[str] | None = None,
        prefix_cache_disk_bytes: int = DEFAULT_DISK_BYTES,
        speculates: bool = True,
        pooling: Pooling | None = None,
        adapters: LoadedAdapters | None = None,
        run: ServingGroup | None = None,
    ) -> None:
        config = transformer.config
        self.name = name
        self.transformer = transformer
        self.pooling = pooling
        """How an embedding model makes embeddings; None: the model generates text."""
        self.tokenizer = tokenizer
        self.context = check_context(config, context)
        transformer.set_context(self.context)
        self.adapters = adapters or LoadedAdapters({}, SelectedAdapter())
        self._run = run
        self.engine = new_engine(
            transformer,
            self.context,
            name=name,
            eos_ids=frozenset(tokenizer.eos_ids) | frozenset(config.eos_token_ids),
            cache=cache,
            max_cache_bytes=max_cache_bytes,
            disk=disk_cache_options(prefix_cache_dir, prefix_cache_disk_bytes),
            speculates=speculates,
            adapters=self.adapters,
            run=run,
        )
        self.runner = self.engine.runner
        self.context = self.engine.context
        self.session = GenerationSession(self.engine, tokenizer)
        self._compiler: GrammarCompiler | None = None

    def lose(self, reason: str) -> None:
        """End all processes of the group, because this one cannot continue."""
        if self._run is not None:
            self._run.group.heartbeat.lose(reason)

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Call `on_lost` with the reason, on another thread, before the group ends by an error."""
        if self._run is not None:
            self._run.group.heartbeat.on_lost = on_lost

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def num_parameters(self) -> int:
        """Stored parameters, MTP modules included."""
        return num_stored_parameters(self.transformer.stored_config)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the KV cache per token, all layers together."""
        return cache_bytes_per_token(self.config, self.runner.cache.dtype)

    @property
    def cache_dtype(self) -> str:
        """dtype of the KV cache: int8, bf16, fp16, fp32 or fp64."""
        return dtype_name(self.runner.cache.dtype)

    def __repr__(self) -> str:
        attention = self.config.attention
        if isinstance(attention, MLAConfig | tuple):
            latent = " + ".join(entry_widths(attention))
            form = "DSA" if self.config.is_sparse else "MLA"
            attention_text = f"{form} {self.config.num_attention_heads} heads, latent {latent}"
        elif not isinstance(attention, GQAConfig):
            attention_text = f"{short_name(attention)}, {attention.num_attention_heads} heads"
        else:
            groups = attention.num_key_value_heads
            attention_text = f"GQA {attention.num_attention_heads} heads in {groups} groups"
        numbers = weight_format(self.transformer, self.transformer.embed_tokens.dtype)
        return (
            f"<lowlat.Model {self.name}: {self.config.model_type}, "
            f"{self.num_parameters / 1e6:,.1f}M parameters, "
            f"{self.config.num_hidden_layers} layers, {attention_text}, "
            f"{self.cache_bytes_per_token:,} bytes of KV cache per token, "
            f"{numbers} "
            f"on {self.runner.device}, context {self.context:,}>"
        )

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[True],
        lora: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[False] = False,
        lora: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        stream: bool = False,
        lora: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion] | Stream:
        """Complete `prompt` with the adapter `lora`; `options` are the fields of SamplingParams.

        Text and token ids are continued as they are, messages go through the chat template.
        Returns a Completion, or a list of them for n > 1; with stream=True an iterator over the
        text with the same fields. Raises UserError for a prompt that does not fit the context and
        for contradicting options.
        """
        if stream:
            return self._stream(prompt, make_params(options), self.adapters.get(lora))
        completions = self._complete([prompt], [make_params(options)], lora=lora)[0]
        return completions[0] if len(completions) == 1 else completions

    def generate_many(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        progress: Progress | None = None,
        lora: LoraNames = None,
        **options: Unpack[SamplingOptions],
    ) -> list[list[Completion]]:
        """Complete several prompts with the same options in one batch: n completions for each."""
        params, prompts = make_params(options), as_prompts(prompts)
        return self._complete(prompts, [params] * len(prompts), progress, lora=lora)

    def generate_each(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        progress: Progress | None = None,
        lora: LoraNames = None,
    ) -> list[list[Completion]]:
        """Complete several prompts, each with its own options and adapter, in one batch. Raises
        UserError unless there are as many params as prompts."""
        prompts = as_prompts(prompts)
        check_each(params, len(prompts))
        return self._complete(prompts, params, progress, lora=lora)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of `prompt`. Raises UserError for anything but text, token ids and messages."""
        return encode_prompt(self.tokenizer, prompt)

    def logits(
        self, ids: Sequence[int], *, lora: str | None = None
    ) -> Float[Tensor, "tokens vocab"]:
        """Raw logits after each of `ids`, fp32 (fp64 models: fp64); row i predicts token i + 1."""
        number = self.adapters.number(lora)
        checked = self._check_ids(ids)
        return scoring.logits(self.runner, checked, chunk=PREFILL_CHUNK, lora_int_id=number)

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

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], *, top: int = 0
    ) -> list[Sequence[PromptLogprob]]:
        """Log-probabilities of each prompt's token ids but the first, and of the `top` likeliest
        tokens at each place, in one batch. A prompt may have one token less than the context.
        """
        options = RequestOptions(prompt_logprobs=top, is_offline=True)
        params = SamplingParams(max_tokens=1)
        added: list[TextRequest] = []
        try:
            for ids in prompts:
                added.append(self.session.add(self._check_ids(ids), params, options))
            while not all(request.is_finished for request in added):
                self._step()
        finally:
            for request in added:
                self.session.abort(request)
        for request in added:
            request.builders[0].result()  # raises if it failed
        return [request.request.prompt_logprobs for request in added]

    def perplexity(
        self,
        text: str | Sequence[int],
        *,
        window: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """Perplexity of `text` or token ids in windows of `window` tokens without overlap: 1,024 by
        default, or the context if that is less.

        The first token of a window is given, not predicted. Without a tokenizer bits_per_byte is
        NaN. Raises UserError for a window longer than the context and for a text of less than two
        tokens.
        """
        window = min(scoring.WINDOW, self.context) if window is None else window
        if not 2 <= window <= self.context:
            raise UserError(f"window must be from 2 to the context of {self.context}, got {window}")
        ids = encode_long(self.tokenizer, text) if isinstance(text, str) else text
        if len(ids) < 2:
            raise UserError("the text has less than two tokens; nothing can be predicted")
        tokens, num_bytes, total = 0, 0, 0.0
        with (progress or SilentProgress()).task("evaluating", len(ids), "tokens") as task:
            for start in range(0, len(ids), window):
                part = [operator.index(token) for token in ids[start : start + window]]
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
        *,
        lora: LoraNames,
    ) -> list[list[Completion]]:
        adapters = self.adapters.for_each(lora, len(prompts))
        encoded = [self._encode(prompt) for prompt in prompts]
        added: list[TextRequest] = []
        try:
            for each, own, adapter in zip(encoded, params, adapters, strict=True):
                added.append(self._add(each, own, adapter, is_offline=True))
            with (progress or SilentProgress()).task("generating", len(added), "items") as task:
                unfinished = added
                while unfinished:
                    self._step()
                    left = [request for request in unfinished if not request.is_finished]
                    task.advance(len(unfinished) - len(left))
                    unfinished = left
        finally:
            for request in added:
                self.session.abort(request)
            self.engine.copy_all()
        return [[builder.result() for builder in request.builders] for request in added]

    def _stream(self, prompt: Prompt, params: SamplingParams, lora: LoRARequest | None) -> Stream:
        if params.n > 1:
            raise UserError(f"n {params.n} cannot be streamed; set n to 1 or stream to False")
        self.tokenizer.require()  # a stream gives text
        request = self._add(self._encode(prompt), params, lora, is_offline=False)

        def close() -> None:
            self.session.abort(request)
            self.engine.copy_all()

        return Stream(request.builders[0], step=self._step, close=close)

    def _encode(self, prompt: Prompt) -> tuple[list[int], bool]:
        """The prompt's token ids, and whether the output is a text of its own."""
        ids = self.encode_prompt(prompt)
        return ids, begins_text(self.tokenizer, prompt, ids)

    def _add(
        self,
        encoded: tuple[list[int], bool],
        params: SamplingParams,
        lora: LoRARequest | None,
        *,
        is_offline: bool,
    ) -> TextRequest:
        if self.pooling is not None:
            raise UserError(
                f"{self.name} is an embedding model and generates no text; serve it, and use"
                " /v1/embeddings"
            )
        ids, begins = encoded
        constraint = self._compile(params.structured, begins_text=begins)
        options = RequestOptions(constraint=constraint, lora=lora, is_offline=is_offline)
        return self.session.add(ids, params, options, begins_text=begins)

    def _compile(self, output: StructuredOutput | None, *, begins_text: bool) -> Constraint | None:
        """The compiled grammar of `output`. Raises UserError if it is invalid or llguidance is not
        installed."""
        if output is None:
            return None
        if self._compiler is None:
            self.tokenizer.require()
            try:
                from lowlat.generate.grammar import GrammarCompiler
            except ModuleNotFoundError as error:
                raise UserError(
                    f"structured needs the package {error.name}; install it with: "
                    "pip install 'lowlat[serve]'"
                ) from error
            self._compiler = GrammarCompiler(self.tokenizer, self.config.vocab_size)
        return self._compiler.compile(output, begins_text=begins_text)

    def close(self) -> None:
        """Finish writing the prefix cache to disk; the model cannot be used afterwards."""
        self.engine.close()

    def free(self) -> None:
        """Free the memory of weights and KV cache, whatever still refers to the model, which
        cannot be used afterwards. Call `close` first."""
        if self.engine.connector is not None:
            self.engine.connector.end()
        self.runner.free()

    def _step(self) -> None:
        """Run one engine step for all unfinished completions."""
        if not self.engine.has_work:
            # Without this error the caller would wait forever.
            raise RuntimeError("a completion has not ended, and the engine has nothing left to do")
        self.session.step()
