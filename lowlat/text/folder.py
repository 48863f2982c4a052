"""Read and write the tokenizer of a Hugging Face folder: tokenizer.json, tokenizer_config.json and
related files. The model's weights and config are not read here.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from lowlat.text.parts import NoTokenizer, TokenizerParts, around, set_around
from lowlat.utils.bounded_read import read_bounded, read_bounded_text
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import parse_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
TOKENIZER_FILE = "tokenizer.json"
TIKTOKEN_FILE = "tiktoken.model"
"""The only tokenizer file of Kimi-K2 and Moonlight, whose pre-tokenizer is in Python code."""
TEMPLATE_FILE = "chat_template.jinja"
TOOL_TEMPLATE = "tool_use"
"""Name of the template for prompts with tools, in lists and as a file."""
TOOL_TEMPLATE_FILE = f"additional_chat_templates/{TOOL_TEMPLATE}.jinja"
MAX_TOKENIZER_BYTES = 256 * 2**20
"""Largest tokenizer.json read; vocabularies of 256,000 tokens take 34 MB."""


def read_folder(folder: Path) -> TokenizerParts:
    """The tokenizer in `folder`. Raises UserError naming an absent or broken file."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise NoTokenizer(f"{path}: not found; {how_to_get_tokenizer(folder)}")
    backend = _read_backend(path)
    config = _read_object(folder / "tokenizer_config.json")
    _add_missing_tokens(backend, config, folder)
    special = _special_tokens(folder, config)
    _mark_special(backend, special, folder)
    _override_bos_eos(backend, config, special)
    template, tool_template = _chat_templates(config, folder)
    return TokenizerParts(
        backend=backend,
        special_tokens=special,
        eos_ids=_eos_ids(backend, special, folder),
        chat_template=template,
        origin=str(folder),
        tool_template=tool_template,
    )


def how_to_get_tokenizer(folder: Path) -> str:
    """Remedy for a `folder` without tokenizer.json, for an error message."""
    if (folder / TIKTOKEN_FILE).is_file():
        return (
            f"the folder has {TIKTOKEN_FILE}, of which transformers and the original model's code "
            "make it: convert_tiktoken_to_fast(AutoTokenizer.from_pretrained(ORIGINAL, "
            f"trust_remote_code=True).model, {str(folder)!r}), "
            "of transformers.integrations.tiktoken (pip install tiktoken blobfile)"
        )
    return (
        "copy it from the original model (a folder with only tokenizer.model needs it made with "
        "transformers' save_pretrained)"
    )


def write_folder(parts: TokenizerParts, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if absent, generation_config.json.

    tokenizer.json holds whether bos and eos are added; tokenizer_config.json does not repeat it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **parts.special_tokens,
    }
    if parts.chat_template is not None:
        config["chat_template"] = parts.chat_template
    if parts.tool_template is not None:
        named = {"default": parts.chat_template, TOOL_TEMPLATE: parts.tool_template}
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in named.items()
        ]
    _write_json(folder / TOKENIZER_FILE, json.loads(parts.backend.to_str()))
    _write_json(folder / "tokenizer_config.json", config)
    generation = folder / "generation_config.json"
    if parts.eos_ids and not generation.exists():
        # The only standard place for more than one end token.
        _write_json(generation, {"eos_token_id": sorted(parts.eos_ids)})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return read_bounded_text(path, MAX_TOKENIZER_BYTES, str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; get the file again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty without the file, as all but tokenizer.json are optional."""
    if not path.is_file():
        return {}
    data = _read_text(path).encode()
    try:
        return parse_object(data, str(path), limit=MAX_TOKENIZER_BYTES)
    except UserError as error:
        raise UserError(f"{error}; get the file again") from error


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    _read_object(path)  # its errors name the line
    try:
        # not from_file, which takes no path that is not UTF-8
        data = read_bounded(path, MAX_TOKENIZER_BYTES, str(path))
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exceptions
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a usable tokenizer ({reason}); get the file again") from error
    if not isinstance(backend.model, models.BPE):
        kind = type(backend.model).__name__
        raise NoTokenizer(f"{path}: model type {kind} is not supported; BPE tokenizers are")
    # The caller bounds lengths; some files carry settings from training.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _config_error(folder: Path, what: str) -> UserError:
    return UserError(f"{folder / 'tokenizer_config.json'}: {what}")


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens' texts, each written as a string or as an object with `content`."""
    fallback = _read_object(folder / "special_tokens_map.json")
    special = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name, fallback.get(name))
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
        elif text is not None:
            raise _config_error(folder, f"{name} should be a string; get the file again")
    return special


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path
) -> None:
    """Add the tokens that only tokenizer_config.json lists, in the order of their ids."""
    declared = config.get("added_tokens_decoder", {})
    try:
        tokens = [(int(index), _added_token(entry)) for index, entry in declared.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = "added_tokens_decoder should map ids to tokens; get the file again"
        raise _config_error(folder, what) from error
    for index, token in sorted(tokens, key=lambda pair: pair[0]):
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise _config_error(
                folder,
                f"added_tokens_decoder gives {token.content!r} id {index}, tokenizer.json another;"
                " take both files from one model",
            )


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(entry["content"], **{name: entry[name] for name in flags if name in entry})


def _mark_special(backend: tokenizers.Tokenizer, special: dict[str, str], folder: Path) -> None:
    """Make the named special tokens match whole and be skipped when decoding."""
    known = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for name, token in special.items():
        if backend.token_to_id(token) is not None:
            if token not in known:
                backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif name in ("bos_token", "eos_token"):
            raise _config_error(
                folder, f"{name} {token!r} is not in tokenizer.json; take both files from one model"
            )


def _override_bos_eos(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str]
) -> None:
    """Apply add_bos_token and add_eos_token: each, if not null, replaces what tokenizer.json puts
    at that end of a text.

    DeepSeek's tokenizer.json adds no bos; its tokenizer_config.json requires one.
    """
    before, after = around(backend)
    first = _end(before, config.get("add_bos_token"), special.get("bos_token"))
    last = _end(after, config.get("add_eos_token"), special.get("eos_token"))
    if (first, last) != (before, after):
        set_around(backend, first, last)


def _end(found: list[str], adds: object, token: str | None) -> list[str]:
    """The tokens at one end of a text: `found`, unless the config sets whether `token` is added."""
    if adds is None:
        return found
    return [token] if adds and token is not None else []


def _eos_ids(
    backend: tokenizers.Tokenizer, special: dict[str, str], folder: Path
) -> frozenset[int]:
    """The eos token and `declared_eos_ids`."""
    ids = declared_eos_ids(folder)
    eos = special.get("eos_token")
    index = None if eos is None else backend.token_to_id(eos)
    return ids if index is None else ids | {index}


def declared_eos_ids(folder: Path) -> frozenset[int]:
    """The end tokens in generation_config.json, or config.json without that file. Raises UserError
    for anything but ids.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        path = folder / "config.json"
    declared = _read_object(path).get("eos_token_id")
    if declared is None:
        return frozenset()
    listed = declared if isinstance(declared, list) else [declared]
    if not all(type(index) is int and index >= 0 for index in listed):
        raise UserError(f"{path}: eos_token_id should be one token id or a list of them")
    return frozenset(listed)


def _chat_templates(config: dict[str, Any], folder: Path) -> tuple[str | None, str | None]:
    """The chat template, and the one for prompts with tools if that is another.

    Template files take precedence over tokenizer_config.json, which may hold a list of templates.
    """
    if (folder / TEMPLATE_FILE).is_file():
        tool_file = folder / TOOL_TEMPLATE_FILE
        tools = _read_text(tool_file) if tool_file.is_file() else None
        return _read_text(folder / TEMPLATE_FILE), tools
    template = config.get("chat_template")
    named: dict[str, Any] = {"default": template}
    if isinstance(template, list):
        named = {str(e.get("name")): e.get("template") for e in template if isinstance(e, dict)}
        if "default" not in named:
            what = f"chat_template has no 'default' among {', '.join(named)}"
            raise _config_error(folder, f"{what}; put the one to use into {TEMPLATE_FILE}")
    used = named["default"], named.get(TOOL_TEMPLATE)
    if not all(text is None or isinstance(text, str) for text in used):
        raise _config_error(folder, "chat_template should be text; get the file again")
    return used
