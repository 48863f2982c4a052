"""Request records of the engine: a Request per prompt, a Sequence per completion, a TokenEvent per
token. Token ids only; imports no torch.

Owns the records and their states, no decisions: `engine.scheduler` chooses what runs,
`engine.engine` changes states.
"""

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from lowlat.attention.path import AttentionPath
from lowlat.engine.constraint import Constraint
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.prompt_logprobs import PromptLogprobs

PoolingMode = Literal["cls", "mean", "lasttoken"]
"""Hidden state of the first token, mean over all tokens, hidden state of the last token."""
FinishReason = Literal["stop", "length", "abort", "deadline", "error"]
"""stop: end-of-sequence token or stop string; length: max_tokens or context reached; abort: the
caller cancelled; deadline: the request's deadline passed; error: the model, the sampler or the
grammar failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRARequest:
    """A loaded LoRA adapter, with the names of vLLM's class."""

    lora_name: str
    lora_int_id: int
    """Its number in the model, from 1."""
    lora_path: str
    digest: bytes
    """SHA-256 of its updates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOptions:
    """What a request asks of the engine besides its tokens and sampling parameters."""

    priority: int = 0
    """Lower values run first: see Scheduler."""
    deadline: float | None = None
    """Clock (time.perf_counter) in seconds at which unfinished completions end."""
    cache_namespace: bytes = b""
    """Requests of one namespace (one API key) share prefix cache pages and one share of fair
    scheduling; nothing is shared across namespaces."""
    lora: LoRARequest | None = None
    """The adapter that computes the request; None: the base model."""
    stop_token_ids: frozenset[int] = frozenset()
    """Stop tokens: each ends a completion, as the model's own end-of-sequence tokens do."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of token ids that outputs do not contain."""
    constraint: Constraint | None = None
    """The compiled grammar of a structured output."""
    pooling: PoolingMode | None = None
    """How the final hidden states of the prompt become an embedding; no token is generated then.
    None: tokens are generated."""
    prompt_logprobs: int | None = None
    """Compute the log-probability of each prompt token and of this many of the likeliest ones.
    Needs the logits of all of them, so no prefix cache page is used."""
    is_offline: bool = False
    """Whether no client streams its tokens: its decoding does not reduce the prefill budget."""

    @property
    def prefix_namespace(self) -> bytes:
        """Namespace of its pages in the prefix cache, in memory and on disk: entries depend on the
        adapter, so adapters share none."""
        if self.lora is None:
            return self.cache_namespace
        return _adapter_namespace(self.cache_namespace, self.lora.digest)

    @property
    def lora_int_id(self) -> int:
        """Number of its adapter in the model; 0: the base model."""
        return 0 if self.lora is None else self.lora.lora_int_id


@lru_cache(maxsize=1024)
def _adapter_namespace(cache_namespace: bytes, digest: bytes) -> bytes:
    return hashlib.sha256(b"lowlat LoRA adapter" + digest + cache_namespace).digest()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One completion: waiting (no pages), running, or finished (a `finish_reason`, no pages)."""

    request: "Request"
    index: int
    """Which of the request's n completions."""
    tokens: list[int]
    """Prompt and output."""
    num_cached: int = 0
    """Leading tokens whose entries are in the KV cache."""
    pages: list[int] = field(default_factory=list)
    """KV cache pages in order (vLLM: the block table); they cover at least num_cached entries."""
    num_indexed: int = 0
    """Leading pages that the prefix cache has indexed."""
    draft_tokens: list[int] = field(default_factory=list)
    """Drafts of the next tokens, verified in the next step (speculative decoding)."""
    was_preempted: bool = False
    """Whether it has lost its pages after it ran."""
    finish_reason: FinishReason | None = None
    first_token_at: float | None = None
    """Clock in seconds when the first token was sampled."""
    last_token_at: float | None = None
    """Clock in seconds when the latest token was sampled."""

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_pending(self) -> int:
        """Tokens without KV cache entries; 1 while decoding."""
        return len(self.tokens) - self.num_cached

    @property
    def awaits_first_token(self) -> bool:
        return self.num_outputs == 0

    @property
    def is_prefilling(self) -> bool:
        """Whether known tokens lack KV cache entries: the prompt, or all tokens after a
        preemption."""
        return self.awaits_first_token or self.num_pending > 1


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and how to complete it n times."""

    id: int
    prompt: tuple[int, ...]
    params: TokenSamplingParams
    options: RequestOptions
    max_outputs: int
    """Tokens after which a completion ends: max_tokens, or the context minus the prompt."""
    arrived_at: float
    """Clock in seconds when it was queued."""
    sequences: list[Sequence] = field(default_factory=list)
    """Completion 0 alone until the prompt is cached, then all n, which share the prompt's pages."""
    started_at: float | None = None
    """Clock in seconds when the first step of the prompt began."""
    num_matched: int = 0
    """Tokens of the prompt found in the prefix cache when it started."""
    prompt_logprobs: PromptLogprobs = field(default_factory=PromptLogprobs)
    """Of all prompt tokens computed so far but the first; with options.prompt_logprobs."""

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether the logits of prompt tokens are still needed."""
        wants = self.options.prompt_logprobs is not None
        return wants and len(self.prompt_logprobs) < len(self.prompt) - 1

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached tokens need not be computed: neither pooled nor scored."""
        return self.options.pooling is None and not self.needs_prompt_logprobs


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of one completion, or its end."""

    request_id: int
    index: int
    token: int | None
    """The sampled token; None if a completion ends without one."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    is_text: bool = True
    """False for a token that only ends the completion."""
    error: str | None = None
    """With finish_reason "error": what failed, in one line."""
    is_grammar_error: bool = False
    """With an error: whether the requested grammar caused it, not the server."""
    embedding: tuple[float, ...] | None = None
    """With pooling: the pooled hidden states of the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Model input for one sequence in a step: consecutive tokens (chunked prefill, or decode)."""

    tokens: SequenceOf[int]
    start: int
    """Position of the first token, the number of KV cache entries before it."""
    pages: tuple[int, ...]
    """Pages of the sequence, covering start + len(tokens) entries."""
    num_logits: int
    """Logits are returned for this many of the last tokens."""
    path: AttentionPath
    """The attention path that computes their KV cache entries."""
    lora_int_id: int = 0
    """The LoRA adapter that computes them; 0: the base model."""
