"""A tokenizer as the metadata of a GGUF file, so that llama.cpp reads and writes text with it.

`gguf_vocab` is the other direction. Byte-level vocabularies name how text is cut before merging:
the name is that of the known way which cuts some telling texts as the tokenizer does. Sentencepiece
vocabularies have scores, which are made of the order of merges; what a reader makes of them is
compared on the same texts.
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
    "smollm",
    "tekken",
    "glm4",
    "gpt-2",
)
"""Ways of cutting, in the order they are tried."""
PROBES = (
    "I'll say: THEY'RE here, don't you?! 12345678 9.5e-3 x1y22z333\r\n\n\tdef f(a, b):\n    return",
    "Grüße aus Köln, naïve café — “quotes” … Привет, мир! ΑΒΓ αβγ 你好,世界",
    "東京タワー 안녕하세요 ٣٤٥  e\u0301\u0323 \u212b ﬁ   trailing   \n \n ",
    "camelCaseWORD HTTPServer foo_bar/baz  🙂 a\u00a0b\u200bc   ",
    "#include <x.h>\n\tif (a!=b) { c+=1; }  // ---- $%&*\n",
)
"""Texts that the known ways cut differently."""
EDGES = (" hello", "  a  b ")
"""Texts in front of which sentencepiece vocabularies put a space, or none as one is there."""

_log = logging.getLogger(__name__)


def gguf_vocabulary(parts: TokenizerParts, rows: int) -> dict[str, Any]:
    """`tokenizer.*` keys of a model whose embedding has `rows`; ids without a token are unused.

    Raises UserError for a tokenizer that the format cannot say.
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
    """Whether the tokenizer merges anything; llama.cpp takes no other."""
    return bool(json.loads(parts.backend.to_str())["model"]["merges"])


def _tokens(parts: TokenizerParts, model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    vocabulary = parts.backend.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= rows:
        raise _fault(parts, f"has ids up to {max(vocabulary.values())}, the embedding {rows} rows")
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
    """A merge as tokenizer.json holds it: a pair, or in old files a text with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _pre_name(parts: TokenizerParts, model: dict[str, Any]) -> str:
    """The way of cutting that cuts all probes as the tokenizer does."""
    backend = parts.backend
    if backend.pre_tokenizer is None:
        raise _fault(parts, "does not cut text before merging")
    wanted = [_cuts(backend.normalizer, backend.pre_tokenizer, probe) for probe in PROBES]
    for name in PRE_NAMES:
        steps = splitting(name, parts.origin)
        if steps.ignore_merges != bool(model.get("ignore_merges")):
            continue
        own = steps.normalizer(), steps.pre_tokenizer()
        if [_cuts(*own, probe) for probe in PROBES] == wanted:
            return name
    raise _fault(parts, "cuts text in a way that has no name in GGUF files")


def _cuts(normalizer: Any, pre_tokenizer: Any, text: str) -> list[str]:
    """The pieces of `text` within which tokens are merged."""
    normal = text if normalizer is None else normalizer.normalize_str(text)
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(normal)]


def _sentencepiece(
    spec: dict[str, Any], tokens: list[str], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    """A token's score is the higher, the earlier the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return {
        "ggml.model": "llama",
        "ggml.scores": [-float(ranks.get(token, len(merges))) for token in tokens],
        "ggml.add_space_prefix": _adds_space(spec),
    }


def _adds_space(spec: dict[str, Any]) -> bool:
    """Whether a space is put before a text: by the normalizer, or by the cutting of newer files."""
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    scheme = (spec.get("pre_tokenizer") or {}).get("prepend_scheme", "never")
    return any(step.get("type") == "Prepend" for step in steps) or scheme != "never"


def _special(parts: TokenizerParts) -> dict[str, Any]:
    """Ids of special tokens but eos, and whether bos and eos are put around a text."""
    names = {
        "bos_token": "ggml.bos_token_id",
        "unk_token": "ggml.unknown_token_id",
        "pad_token": "ggml.padding_token_id",
    }
    ids = {key: _id_of(parts, name) for name, key in names.items()}
    keys: dict[str, Any] = {key: index for key, index in ids.items() if index is not None}
    before, after = around(parts.backend)
    bos, eos = parts.special_tokens.get("bos_token"), parts.special_tokens.get("eos_token")
    keys["ggml.add_bos_token"] = bos is not None and before == [bos]
    keys["ggml.add_eos_token"] = eos is not None and after == [eos]
    if before not in ([], [bos]) or after not in ([], [eos]):
        _log.warning(
            "%s: GGUF files cannot say that %s is put around a text, so it is left out",
            parts.origin,
            " ".join([*before, *after]),
        )
    return keys


def end_keys(ends: Sequence[int], named: Collection[int] = ()) -> dict[str, Any]:
    """Keys for a model's ends, the first as eos. Further ones than llama.cpp has keys for are
    written for lowlat alone, with a warning but for those `named`, which it knows by their names.
    """
    keys: dict[str, Any] = dict(zip(END_KEYS, ends, strict=False))
    if len(ends) > len(END_KEYS):
        keys[ALL_ENDS] = list(ends)
    lost = [index for index in ends[len(END_KEYS) :] if index not in named]
    if lost:
        _log.warning(
            "llama.cpp knows %d tokens that end a text, so it will not end at %s",
            len(END_KEYS),
            ", ".join(map(str, lost)),
        )
    return keys


def _ends(parts: TokenizerParts, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """The ids after which generation ends, those that are known by their names last."""
    eos, named = _id_of(parts, "eos_token"), named_ends(tokens, types)
    others = sorted(parts.eos_ids - {eos}, key=lambda index: (index in named, index))
    ends = others if eos is None else [eos, *others]
    keys = end_keys(ends, named)
    if not named <= parts.eos_ids:  # a name that ends nothing in this model
        keys[ALL_ENDS] = ends
    return keys


def _compare(parts: TokenizerParts, read: tokenizers.Tokenizer) -> None:
    """UserError unless `read`, which is made of the metadata alone, makes the tokenizer's tokens of
    plain texts; a warning where they differ behind a space or a special token.

    llama.cpp puts a space at the start and behind every special token, whatever is there already.
    """

    def differs(text: str) -> bool:
        return read.encode(text).ids != parts.backend.encode(text).ids

    for text in PROBES:
        if differs(text):
            raise _fault(parts, f"makes other tokens of {text[:20]!r} than GGUF files can say")
    added = [token.content for token in parts.backend.get_added_tokens_decoder().values()]
    texts = [*EDGES, *(f"hello {token}hello {token} hello" for token in added)]
    found = next(filter(differs, texts), None)
    if found is not None:
        _log.warning(
            "%s: llama.cpp puts spaces into texts where this tokenizer does not, so its tokens "
            "will differ, as of %r",
            parts.origin,
            found,
        )


def _id_of(parts: TokenizerParts, name: str) -> int | None:
    """The id of a special token; None where the model names none."""
    token = parts.special_tokens.get(name)
    return None if token is None else parts.backend.token_to_id(token)


def _fault(parts: TokenizerParts, what: str) -> UserError:
    return UserError(f"{parts.origin}: the tokenizer {what}; use --format hf")
