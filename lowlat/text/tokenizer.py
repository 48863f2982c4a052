"""Tokenizer: text to ids, ids to bytes and text, chat messages to a prompt.

`text.folder` and `text.gguf_vocab` read and write files, `text.template` renders chat templates.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from gguf import GGUFReader
from tokenizers import decoders, models

from lowlat.text.folder import read_folder, write_folder
from lowlat.text.gguf_vocab import read_gguf
from lowlat.text.parts import TokenizerParts
from lowlat.text.template import ChatTemplate
from lowlat.text.token_bytes import TokenBytes
from lowlat.utils.errors import UserError

LONG_TEXT = 8192
"""Characters whose encoding takes about 10 ms."""


class Tokenizer:
    """A tokenizer with its special tokens and chat template; safe to use from several threads.

    That of a model without one (`absent`) raises UserError wherever text is needed.
    """

    def __init__(self, parts: TokenizerParts, *, missing: str | None = None) -> None:
        """missing: why text cannot be used; then `parts` have no tokens."""
        self._missing = missing
        self._parts = parts
        self._backend = parts.backend
        self._bytes = TokenBytes(parts.backend, parts.origin)
        self._templates: dict[str, ChatTemplate] = {}
        added = parts.backend.get_added_tokens_decoder()
        self.added_tokens = {index: token.content for index, token in added.items()}
        """Id -> text of the added tokens, which are matched before BPE."""
        self.has_blanks_in_added_tokens = any(
            token.lstrip
            or token.rstrip
            or (not token.content.isspace() and any(map(str.isspace, token.content)))
            for token in added.values()
        )
        """Whether an added token, unless it is white space, contains or takes some."""
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        """Ids of the special tokens, which decoded text leaves out."""
        self.strips_leading_space = self._bytes.strips_leading_space
        """Whether decoding drops one leading space of a text (SentencePiece)."""
        ids = parts.backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=-1)
        """One more than the highest id; a model's embedding may have more rows."""

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder. Raises UserError naming the bad file."""
        return cls(read_folder(Path(path)))

    @classmethod
    def from_gguf(cls, source: str | os.PathLike[str] | GGUFReader) -> "Tokenizer":
        """The tokenizer in a GGUF file's metadata. Raises UserError naming the bad field."""
        return cls(read_gguf(source))

    @classmethod
    def absent(cls, reason: str, eos_ids: frozenset[int] = frozenset()) -> "Tokenizer":
        """Placeholder for a model without a tokenizer: no id has bytes, and methods that need text
        raise `reason`.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        backend.decoder = decoders.ByteLevel()
        parts = TokenizerParts(
            backend=backend, special_tokens={}, eos_ids=eos_ids, chat_template=None, origin=reason
        )
        return cls(parts, missing=reason)

    def require(self) -> None:
        """Raise UserError if the model has no tokenizer."""
        if self._missing is not None:
            raise UserError(self._missing)

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, or None."""
        bos = self._parts.special_tokens.get("bos_token")
        return None if bos is None else self._backend.token_to_id(bos)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids after which generation ends."""
        return self._parts.eos_ids

    @property
    def chat_template(self) -> str | None:
        """The chat template's source, if the model has one."""
        return self._parts.chat_template

    def template_for(self, tools: object) -> str | None:
        """Source of the template for prompts with `tools` (None: without tools): with tools the one
        named tool_use, if the model has it.
        """
        tool_template = self._parts.tool_template
        return self.chat_template if tools is None or tool_template is None else tool_template

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """The token ids of `text`.

        add_special_tokens puts bos and eos around it as the tokenizer's files define; a prompt of
        apply_chat_template already has them. parse_special=True (as in transformers) turns the text
        of special tokens into their ids: a message with the text "<|im_end|>" ends itself.
        parse_special=False encodes special and all other added tokens as ordinary text; encode
        untrusted parts of a prompt this way, separately from the rest. Raises UserError for text
        that is no valid Unicode.
        """
        self.require()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"character {error.start} is half of a surrogate pair"
            raise UserError(f"text cannot be encoded: {what}; send valid Unicode") from error
        backend = self._backend if parse_special else self._plain_backend
        return _encode(backend, text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each of many texts, equal to `encode(..., add_special_tokens=False,
        parse_special=False)`; multi-threaded.
        """
        self.require()
        encodings = self._plain_backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def control_spans(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, end) of every added token in `text`, in characters."""
        self.require()
        backend = self._added_backend
        long = len(text) >= LONG_TEXT
        encoding = backend.encode_batch([text])[0] if long else backend.encode(text)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [(id, start, end) for id, (start, end) in spans if id in self.added_tokens]

    @cached_property
    def _added_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer with its added tokens alone: all text between two of them is one token."""
        vocab = {text: id for id, text in self.added_tokens.items()}
        other = next(text for text in ("other", "any other") if text not in vocab)
        vocab[other] = self.vocab_size
        backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=other))
        if self._backend.normalizer is not None:
            backend.normalizer = self._backend.normalizer
        backend.add_tokens(list(self._backend.get_added_tokens_decoder().values()))
        return backend

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer without its added tokens and without any merge that produces one."""
        spec = json.loads(self._backend.to_str())
        model = spec["model"]
        added = {token["content"] for token in spec["added_tokens"]}
        spec["added_tokens"] = []
        model["merges"] = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & added]
        added.discard(model["unk_token"])  # BPE needs it for unknown characters
        model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in added}
        return tokenizers.Tokenizer.from_str(json.dumps(spec))

    @cached_property
    def max_token_bytes(self) -> int:
        """Bytes of the longest token."""
        return max(len(self._bytes.of(index)) for index in range(self.vocab_size))

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes of `token_id`, possibly part of a character; empty for an unused id."""
        return self._bytes.of(token_id)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD."""
        self.require()
        skipped = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self._bytes.of(index) for index in ids if index not in skipped)
        text = data.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def has_text(self, ids: Iterable[int]) -> bool:
        """Whether any of `ids` is not a special token."""
        return any(index not in self.special_ids for index in ids)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **template_vars: Any,
    ) -> str:
        """The prompt for `messages` ({"role": ..., "content": ...}).

        Encode it with add_special_tokens=False: the template writes bos itself.

        The template's variables are `template_vars` (tools=[...], enable_thinking=False, ...) and
        the special tokens' texts. Raises UserError if the model has no chat template or the
        template fails.
        """
        variables = {**self._parts.special_tokens, **template_vars}
        source = self.template_for(template_vars.get("tools"))
        return self._template(source).render(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )

    def _template(self, source: str | None) -> ChatTemplate:
        """The ChatTemplate of a source; later prompts share its process."""
        self.require()
        if source is None:
            raise UserError(
                f"{self._parts.origin}: the model has no chat_template; give a plain prompt,"
                " or put the template of its instruct version into chat_template.jinja"
            )
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source, self._parts.origin)
        return self._templates[source]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that from_folder, and transformers' AutoTokenizer, read back."""
        self.require()
        write_folder(self._parts, Path(folder))


def _encode(
    backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool
) -> tokenizers.Encoding:
    """Encode one text. Only batches release the interpreter's lock, which a server's other requests
    need; short texts avoid their threads.
    """
    if len(text) < LONG_TEXT:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding
