"""Chat backend of `lowlat chat`: the interface, and its implementation by a local model.

`chat_client` implements it by a server.
"""

import abc
import threading
from collections.abc import Callable, Sequence

from rich.console import Console

from lowlat.checkpoint.fetch.model_names import MODEL_PRESETS
from lowlat.cli.tables import print_rows
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.model import ModelConfig
from lowlat.config.presets import load_preset
from lowlat.convert.report import describe_attention
from lowlat.generate.completion import Completion
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingOptions
from lowlat.model.quant import weight_format
from lowlat.utils.errors import UserError

Message = dict[str, str]


class ChatBackend(abc.ABC):
    """Answers chat messages."""

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """The model in one line."""

    @property
    @abc.abstractmethod
    def cache_bytes_per_token(self) -> int: ...

    @abc.abstractmethod
    def answer(
        self,
        messages: Sequence[Message],
        sampling: SamplingOptions,
        write: Callable[[str], None],
        interrupted: threading.Event,
    ) -> Completion:
        """Stream an answer through `write`; `interrupted` ends it early.

        Raises UserError if the context is full or the backend fails.
        """

    @abc.abstractmethod
    def report(self, completion: Completion, console: Console) -> None:
        """Print model, KV cache and throughput of an answer."""


class LocalChatBackend(ChatBackend):
    """A loaded model. Raises UserError for one without a chat template."""

    def __init__(self, model: Model) -> None:
        if model.tokenizer.chat_template is None:
            raise UserError(
                f"{model.name} has no chat template, so it cannot chat; use lowlat generate"
            )
        self._model = model

    @property
    def description(self) -> str:
        return repr(self._model)

    @property
    def cache_bytes_per_token(self) -> int:
        return self._model.cache_bytes_per_token

    def answer(
        self,
        messages: Sequence[Message],
        sampling: SamplingOptions,
        write: Callable[[str], None],
        interrupted: threading.Event,
    ) -> Completion:
        capacity = max(1, self._model.context - len(self._model.encode_prompt(messages)))
        max_tokens = min(sampling.get("max_tokens") or capacity, capacity)
        options: SamplingOptions = {**sampling, "max_tokens": max_tokens}
        with self._model.generate(messages, stream=True, **options) as stream:
            for piece in stream:
                write(piece)
                if interrupted.is_set():
                    break
        return stream.completion

    def report(self, completion: Completion, console: Console) -> None:
        print_answer_report(self._model, completion, console)


def print_answer_report(model: Model, completion: Completion, console: Console) -> None:
    """Model, attention before and after conversion, cache per token, speed."""
    usage = completion.usage
    is_preset = model.name in MODEL_PRESETS
    # The config that presets are converted from.
    source = load_preset("smollm2-135m") if is_preset else None
    label = MODEL_PRESETS[model.name].label if is_preset else model.name
    numbers = weight_format(model.transformer, model.transformer.embed_tokens.dtype)
    rows = {
        "model": f"{label}, {model.num_parameters / 1e6:.1f}M parameters, {numbers}",
        "attention": _attention(source, model.config),
        "cache per token": _cache(source, model),
        "speed": f"{usage.decode_tokens_per_second:.1f} tok/s "
        f"({usage.completion_tokens} tokens; prompt of {usage.prompt_tokens} "
        f"in {usage.prefill_seconds:.2f} s)",
    }
    print_rows(rows, console)


def _attention(source: ModelConfig | None, config: ModelConfig) -> str:
    after = describe_attention(config.attention)
    if source is None:
        return after
    return f"{describe_attention(source.attention)}\n->  {after}, exact"


def _cache(source: ModelConfig | None, model: Model) -> str:
    """Bytes before and after conversion, and those of MHA of the same width."""
    cost, dtype = kv_cache_size(model.config), model.cache_dtype
    full = cost.bytes_per_token(cost.mha, dtype)
    text = f"{model.cache_bytes_per_token:,} bytes"
    if source is not None:
        text = f"{kv_cache_size(source).own_bytes_per_token(dtype):,}  ->  {text}"
    return f"{text} (MHA of this width: {full:,})"
