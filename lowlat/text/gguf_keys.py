"""Write a tokenizer as GGUF metadata for llama.cpp; `text.gguf_vocab` reads it.

Byte-level vocabularies name their pre-tokenizer: the known one that splits the probe texts as the
tokenizer does. SentencePiece vocabularies have scores, made from the order of merges; the tokenizer
read back from them is compared on the same texts.
"""

import json
import logging
from collections.abc import Collection, Sequence
from typing import Any

import tokenizers
from gguf import TokenType

from lowlat.text.gguf_vocab import (
    ALL_ENDS,
    END_KEYS,
    SPECIAL_KEYS,
    TOOL_TEMPLATE,
    Metadata,
    named_ends,
    read_metadata,
)
from lowlat.text.parts import TokenizerParts, around
from lowlat.text.pretokenizers import splitting
from lowlat.text.token_bytes import BYTE_TOKEN
from lowlat.utils.errors import UserError

PRE_NAMES = (
    "llama-bpe",
    "deepseek-v3",
    "deepseek-llm",
    "deepseek-coder",
    "qwen2",
    "stablelm2",
    "smollm",
    "tekken",
    "glm4",
    "gpt-2",
)
"""Names of known pre-tokenizers, in the order they are tried."""
PROBES = (
    "I'll say: THEY'RE here, don't you?! 12345678 9.5e-3 x1y22z333\r\n\n\tdef f(a, b):\n    return",
    "Grüße aus Köln, naïve café — “quotes” … Привет, мир! ΑΒΓ αβγ 你好,世界",
    "東京タワー 안녕하세요 ٣٤٥  e\u0301\u0323 \u212b ﬁ   trailing   \n \n ",
    "camelCaseWORD HTTPServer foo_bar/baz  🙂 a\u00a0b\u200bc   ",
    "#include <x.h>\n\tif (a!=b) { c+=1; }  // ---- $%&*\n",
)
"""Probe texts that the known pre-tokenizers split differently."""
EDGES = (" hello", "  a  b ")
"""Texts before which SentencePiece vocabularies put a space, or none if there is one."""

_log = logging.getLogger(__name__)


def gguf_vocabulary(parts: TokenizerParts, rows: int) -> dict[str, Any]:
    """`tokenizer.*` keys of a model whose embedding has `rows`; ids without a token are unused.

    Raises UserError for a tokenizer that the format cannot express.
    """
    spec = json.loads(parts.backend.to_str())
    model = spec["model"]
    tokens, types = _tokens(parts, model, rows)
    keys: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": types}
    merges = [_pair(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        keys |= _sentencepiece(spec, tokens, merges)
    else:
        keys |= {
            "ggml.model": "gpt2",
            "ggml.pre": _pre_name(parts, model),
            "ggml.merges": [f"{left} {right}" for left, right in merges],
        }
    keys |= _special(parts) | _ends(parts, tokens, types)
    if parts.chat_template is not None:
        keys["chat_template"] = parts.chat_template
    if parts.tool_template is not None:
        keys |= {"chat_templates": ["tool_use"], TOOL_TEMPLATE: parts.tool_template}
    written = {f"tokenizer.{key}": value for key, value in keys.items()}
    if model.get("byte_fallback"):
        _compare(parts, read_metadata(Metadata(written.get, parts.origin)).backend)
    return written


def has_merges(parts: TokenizerParts) -> bool:
    """Whether the tokenizer has merges; llama.cpp requires them."""
    return bool(json.loads(parts.backend.to_str())["model"]["merges"])


def _tokens(parts: TokenizerParts, model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    vocabulary = parts.backend.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= rows:
        raise _error(parts, f"has ids up to {max(vocabulary.values())}, the embedding {rows} rows")
    tokens = [f"[UNUSED{index}]" for index in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    added = parts.backend.get_added_tokens_decoder()
    for token, index in vocabulary.items():
        tokens[index] = token
        types[index] = int(TokenType.NORMAL)
        if model.get("byte_fallback") and BYTE_TOKEN.fullmatch(token):
            types[index] = int(TokenType.BYTE)
        if index in added:
            special = added[index].special
            types[index] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        if token == model.get("unk_token"):
            types[index] = int(TokenType.UNKNOWN)
    return tokens, types


def _pair(merge: Any) -> tuple[str, str]:
    """A merge of tokenizer.json: a pair, or in old files a text with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _pre_name(parts: TokenizerParts, model: dict[str, Any]) -> str:
    """Name of the pre-tokenizer that splits all probe texts as the tokenizer does."""
    backend = parts.backend
    if backend.pre_tokenizer is None:
        raise _error(parts, "has no pre-tokenizer")
    wanted = [_cuts(backend.normalizer, backend.pre_tokenizer, probe) for probe in PROBES]
    for name in PRE_NAMES:
        steps = splitting(name, parts.origin)
        if steps.ignore_merges != bool(model.get("ignore_merges")):
            continue
        own = steps.normalizer(), steps.pre_tokenizer()
        if [_cuts(*own, probe) for probe in PROBES] == wanted:
            return name
    raise _error(parts, "has a pre-tokenizer without a name in GGUF files")


def _cuts(normalizer: Any, pre_tokenizer: Any, text: str) -> list[str]:
    """The splits of `text` within which tokens are merged."""
    normal = text if normalizer is None else normalizer.normalize_str(text)
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(normal)]


def _sentencepiece(
    spec: dict[str, Any], tokens: list[str], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    """Keys of a SentencePiece vocabulary: the earlier a token's first merge, the higher its
    score."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return {
        "ggml.model": "llama",
        "ggml.scores": [-float(ranks.get(token, len(merges))) for token in tokens],
        "ggml.add_space_prefix": _adds_space(spec),
    }


def _adds_space(spec: dict[str, Any]) -> bool:
    """Whether a space is put before a text: by the normalizer, or in newer files by the
    pre-tokenizer."""
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    scheme = (spec.get("pre_tokenizer") or {}).get("prepend_scheme", "never")
    return any(step.get("type") == "Prepend" for step in steps) or scheme != "never"


def _special(parts: TokenizerParts) -> dict[str, Any]:
    """Ids of special tokens but eos, and whether bos and eos are put around a text."""
    ids = {key: _id_of(parts, name) for name, key in SPECIAL_KEYS.items() if name != "eos_token"}
    keys: dict[str, Any] = {key: index for key, index in ids.items() if index is not None}
    before, after = around(parts.backend)
    bos, eos = parts.special_tokens.get("bos_token"), parts.special_tokens.get("eos_token")
    keys["ggml.add_bos_token"] = bos is not None and before == [bos]
    keys["ggml.add_eos_token"] = eos is not None and after == [eos]
    if before not in ([], [bos]) or after not in ([], [eos]):
        _log.warning(
            "%s: GGUF files cannot express that %s is put around a text; it is left out",
            parts.origin,
            " ".join([*before, *after]),
        )
    return keys


def end_keys(ends: Sequence[int], named: Collection[int] = ()) -> dict[str, Any]:
    """Keys of a model's end tokens, the first as eos. End tokens beyond llama.cpp's keys are
    written for lowlat alone, with a warning except for those `named`, which it knows by name.
    """
    keys: dict[str, Any] = dict(zip(END_KEYS, ends, strict=False))
    if len(ends) > len(END_KEYS):
        keys[ALL_ENDS] = list(ends)
    lost = [index for index in ends[len(END_KEYS) :] if index not in named]
    if lost:
        _log.warning(
            "llama.cpp has keys for %d end tokens; it will not stop at %s",
            len(END_KEYS),
            ", ".join(map(str, lost)),
        )
    return keys


def _ends(parts: TokenizerParts, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Keys of the ids after which generation ends; ids known by name come last."""
    eos, named = _id_of(parts, "eos_token"), named_ends(tokens, types)
    others = sorted(parts.eos_ids - {eos}, key=lambda index: (index in named, index))
    ends = others if eos is None else [eos, *others]
    keys = end_keys(ends, named)
    if not named <= parts.eos_ids:  # a name that is no end token of this model
        keys[ALL_ENDS] = ends
    return keys


def _compare(parts: TokenizerParts, read: tokenizers.Tokenizer) -> None:
    """Raise UserError unless `read`, made from the metadata alone, encodes plain texts as the
    tokenizer does; log a warning if they differ after a space or a special token.

    llama.cpp puts a space at the start and after every special token, also before another space.
    """

    def differs(text: str) -> bool:
        return read.encode(text).ids != parts.backend.encode(text).ids

    for text in PROBES:
        if differs(text):
            raise _error(parts, f"encodes {text[:20]!r} differently than GGUF files can express")
    added = [token.content for token in parts.backend.get_added_tokens_decoder().values()]
    texts = [*EDGES, *(f"hello {token}hello {token} hello" for token in added)]
    found = next(filter(differs, texts), None)
    if found is not None:
        _log.warning(
            "%s: llama.cpp puts spaces into texts where this tokenizer does not; its tokens "
            "will differ, for example of %r",
            parts.origin,
            found,
        )


def _id_of(parts: TokenizerParts, name: str) -> int | None:
    """The id of a special token; None if the model names none."""
    token = parts.special_tokens.get(name)
    return None if token is None else parts.backend.token_to_id(token)


def _error(parts: TokenizerParts, what: str) -> UserError:
    return UserError(f"{parts.origin}: the tokenizer {what}; use --format hf")
