"""Read a tokenizer from GGUF metadata: vocabulary and merges of byte-level BPE and SentencePiece.

Split patterns are `text.pretokenizers`'s; tensors and the model's config are read elsewhere.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, decoders, models, normalizers

from lowlat.text.parts import NoTokenizer, TokenizerParts, set_bos_eos
from lowlat.text.pretokenizers import splitting
from lowlat.text.token_bytes import SPACE_MARK
from lowlat.utils.errors import UserError
from lowlat.utils.gguf_parts import first_part

# Control tokens that end a turn or a text in every vocabulary that has them. Many files name only
# the end of a document as eos; generation would not stop after a chat turn.
END_NAMES = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


END_KEYS = ("ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id")
"""llama.cpp's keys for end tokens: of the text, of a turn, of a message."""
ALL_ENDS = "lowlat.eos_token_ids"
"""All end tokens, in lowlat's own files, if the other keys and the names do not give exactly
them."""
SPECIAL_KEYS = {
    "bos_token": "ggml.bos_token_id",
    "eos_token": "ggml.eos_token_id",
    "unk_token": "ggml.unknown_token_id",
    "pad_token": "ggml.padding_token_id",
}
TOOL_TEMPLATE = "chat_template.tool_use"


class Metadata:
    """Checked access to the `tokenizer.*` fields; errors are UserErrors naming file and field."""

    def __init__(self, lookup: Callable[[str], Any], origin: str) -> None:
        """lookup: the value of a field by its full name, or None."""
        self._lookup = lookup
        self.origin = origin

    def get(self, key: str, kind: type) -> Any:
        """The value of `tokenizer.<key>`, or None if the file has no such field."""
        try:
            value = self._lookup(f"tokenizer.{key}")
        except UnicodeDecodeError as error:
            raise self.error(key, "is not UTF-8 text") from error
        if value is None:
            return None
        if not isinstance(value, kind):
            raise self.error(key, f"should be of type {kind.__name__}")
        return value

    def need(self, key: str, kind: type) -> Any:
        """The value of `tokenizer.<key>`; its absence is an error."""
        value = self.get(key, kind)
        if value is None:
            raise self.error(key, "is missing; the file holds no complete tokenizer")
        return value

    def error(self, key: str, what: str) -> UserError:
        """A UserError: `what` is wrong with `tokenizer.<key>`."""
        return UserError(f"{self.origin}: tokenizer.{key} {what}; get or convert the file again")


def read_gguf(source: str | os.PathLike[str] | GGUFReader) -> TokenizerParts:
    """The tokenizer in the GGUF file `source`. Raises UserError naming what it cannot use."""
    reader = source if isinstance(source, GGUFReader) else _open(source)
    origin = os.fspath(reader.data.filename)  # type: ignore[attr-defined]
    return read_metadata(Metadata(_contents(reader), origin))


def read_metadata(meta: Metadata) -> TokenizerParts:
    """The tokenizer that the fields `meta` describe. Raises UserError naming what it cannot use."""
    if meta.get("ggml.model", str) == "none":
        raise NoTokenizer(
            f"{meta.origin}: holds no vocabulary; use the folder it was converted from, or convert "
            "a model whose tokenizer GGUF can express"
        )
    tokens = _tokens(meta)
    types = _token_types(meta, len(tokens))
    model = meta.need("ggml.model", str)
    if model == "gpt2":
        backend, adds_bos = _byte_level(meta, tokens, types)
    elif model == "llama":
        backend, adds_bos = _sentencepiece(meta, tokens, types), True
    else:
        error = meta.error("ggml.model", f"'{model}' is not supported (gpt2 and llama are)")
        raise NoTokenizer(str(error))
    _add_tokens(backend, tokens, types)
    special = _special_tokens(meta, tokens)
    for name, token in special.items():
        if backend.token_to_id(token) is None:
            raise meta.error("ggml.token_type", f"marks the {name} {token!r} as unused")
    bos, eos = special.get("bos_token"), special.get("eos_token")
    add_bos = _flag(meta, "ggml.add_bos_token", adds_bos)
    add_eos = _flag(meta, "ggml.add_eos_token", False)
    set_bos_eos(backend, bos if add_bos else None, eos if add_eos else None)
    return TokenizerParts(
        backend=backend,
        special_tokens=special,
        eos_ids=_eos_ids(meta, tokens, types),
        chat_template=meta.get("chat_template", str),
        origin=meta.origin,
        tool_template=meta.get(TOOL_TEMPLATE, str),
    )


def has_vocabulary(path: str | os.PathLike[str]) -> bool:
    """Whether the GGUF file `path` is meant to hold a tokenizer."""
    return Metadata(_contents(_open(path)), os.fspath(path)).get("ggml.model", str) != "none"


def _contents(reader: GGUFReader) -> Callable[[str], Any]:
    def lookup(name: str) -> Any:
        field = reader.fields.get(name)
        return None if field is None else field.contents()

    return lookup


def _open(path: str | os.PathLike[str]) -> GGUFReader:
    try:
        return GGUFReader(first_part(Path(path)))
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror}") from error
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path}: is not a whole GGUF file ({error}); get it again") from error


def _flag(meta: Metadata, key: str, default: bool) -> bool:
    value = meta.get(key, bool)
    return default if value is None else value


def _tokens(meta: Metadata) -> list[str]:
    tokens = meta.need("ggml.tokens", list)
    seen = set()
    for token in tokens:
        if not isinstance(token, str):
            raise meta.error("ggml.tokens", "should be a list of strings")
        if token in seen:
            raise meta.error("ggml.tokens", f"holds {token!r} twice")
        seen.add(token)
    return tokens


def _token_types(meta: Metadata, count: int) -> list[int]:
    types = meta.need("ggml.token_type", list)
    if len(types) != count:
        raise meta.error("ggml.token_type", f"has {len(types)} entries for {count} tokens")
    return types


def _vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
    """Token -> id, without the unused ids that only pad the model's embedding."""
    return {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != TokenType.UNUSED
    }


def _byte_level(
    meta: Metadata, tokens: list[str], types: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """The backend, and whether bos is added by default."""
    steps = splitting(meta.need("ggml.pre", str), meta.origin)
    vocabulary = _vocabulary(tokens, types)
    merges = _merges(meta, vocabulary)
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=steps.ignore_merges)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = steps.pre_tokenizer()
    if (normalizer := steps.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    return backend, steps.adds_bos


def _merges(meta: Metadata, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for index, merge in enumerate(meta.need("ggml.merges", list)):
        left, _, right = str(merge).partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise meta.error("ggml.merges", f"entry {index} ({merge!r}) is not made of tokens")
        pairs.append((left, right))
    return pairs


def _sentencepiece(meta: Metadata, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """The backend: scores become merge ranks, uncovered characters fall back to byte tokens.

    A space is put before the text and after every special token, as llama.cpp does and as the
    tokenizer.json files of Llama 2 and Mistral 7B do.
    """
    vocabulary = _vocabulary(tokens, types)
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_from_scores(meta, tokens, types),
        unk_token=_special_tokens(meta, tokens).get("unk_token"),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    prefix = _flag(meta, "ggml.add_space_prefix", True)
    mark_spaces = normalizers.Replace(" ", SPACE_MARK)
    steps = [normalizers.Prepend(SPACE_MARK), mark_spaces] if prefix else [mark_spaces]
    backend.normalizer = normalizers.Sequence(steps)
    decode = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(decode + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend


def _merges_from_scores(
    meta: Metadata, tokens: list[str], types: list[int]
) -> list[tuple[str, str]]:
    """Every way to make an ordinary token of two others, best score of the result first.

    Among equal scores the longer left part goes first, the order in which tokenizer.json files list
    them.
    """
    scores = meta.need("ggml.scores", list)
    if len(scores) != len(tokens):
        raise meta.error("ggml.scores", f"has {len(scores)} entries for {len(tokens)} tokens")
    ids = {t: i for i, t in enumerate(tokens) if types[i] == TokenType.NORMAL}
    ranked = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                rank = (-scores[index], -len(left), -len(right), index)
                ranked.append((*rank, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens become special added tokens, user-defined ones plain added tokens."""
    added = [
        AddedToken(token, special=kind != TokenType.USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    ]
    backend.add_tokens(added)


def _token_at(meta: Metadata, tokens: list[str], key: str, index: int) -> str:
    if not 0 <= index < len(tokens):
        raise meta.error(key, f"is {index}, outside the {len(tokens)} tokens")
    return tokens[index]


def _special_tokens(meta: Metadata, tokens: list[str]) -> dict[str, str]:
    return {
        name: _token_at(meta, tokens, key, index)
        for name, key in SPECIAL_KEYS.items()
        if (index := meta.get(key, int)) is not None
    }


def _eos_ids(meta: Metadata, tokens: list[str], types: list[int]) -> frozenset[int]:
    listed = meta.get(ALL_ENDS, list)
    if listed is not None:
        if not all(type(index) is int for index in listed):
            raise meta.error(ALL_ENDS, "should be a list of token ids")
        for index in listed:
            _token_at(meta, tokens, ALL_ENDS, index)
        return frozenset(listed)
    ids = named_ends(tokens, types)
    for key in END_KEYS:
        index = meta.get(key, int)
        if index is not None:
            _token_at(meta, tokens, key, index)
            ids.add(index)
    return frozenset(ids)


def named_ends(tokens: list[str], types: list[int]) -> set[int]:
    """Ids of the end tokens that every reader knows by name."""
    return {
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == TokenType.CONTROL and token in END_NAMES
    }
