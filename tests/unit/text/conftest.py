"""A small byte-level BPE trained here, and the same vocabulary as a folder and as a GGUF file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter, TokenType

from lowlat.text.tokenizer import Tokenizer
from tests.fakes import trained_backend

CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "user assistant system hello world 2024 print(x) return",
    "größe naïve 日本語 日本 привет мир 🙂 🙃",
] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trained() -> tokenizers.Tokenizer:
    """Byte-level BPE: 3 control tokens (ids 0..2) and one plain added token, <think>, the last."""
    return trained_backend(CORPUS, 331, SPECIAL)


@pytest.fixture(scope="session")
def backend() -> tokenizers.Tokenizer:
    """The trained tokenizer; tests do not change it."""
    return trained()


@pytest.fixture
def make_folder(tmp_path: Path, backend: tokenizers.Tokenizer) -> Callable[..., Path]:
    """Writes a Hugging Face folder; keywords are fields of tokenizer_config.json."""

    def make(files: dict[str, str] | None = None, **config: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        backend.save(str(folder / "tokenizer.json"))
        config = {"eos_token": "<|im_end|>", "chat_template": CHATML, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        return folder

    return make


@pytest.fixture
def tokenizer(make_folder: Callable[..., Path]) -> Tokenizer:
    """The trained tokenizer with a ChatML template."""
    return Tokenizer.from_folder(make_folder())


def write_gguf(path: Path, fields: dict[str, Any]) -> Path:
    """A GGUF file without tensors, with `tokenizer.<key>` fields; None leaves a field out."""
    writer = GGUFWriter(path, "llama")
    for key, value in fields.items():
        name = f"tokenizer.{key}"
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture
def make_gguf(tmp_path: Path, backend: tokenizers.Tokenizer) -> Callable[..., Path]:
    """Writes the trained vocabulary as GGUF; keywords change fields (__ stands for a dot)."""
    spec = json.loads(backend.to_str())
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [int(TokenType.NORMAL)] * len(tokens)
    for token in SPECIAL:
        types[vocabulary[token]] = int(TokenType.CONTROL)
    types[vocabulary["<think>"]] = int(TokenType.USER_DEFINED)
    fields = {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "chat_template": CHATML,
    }

    def make(**changes: Any) -> Path:
        changed = {name.replace("__", "."): value for name, value in changes.items()}
        return write_gguf(tmp_path / "model.gguf", {**fields, **changed})

    return make


# A sentencepiece vocabulary: unknown, bos, eos, the 256 bytes, then pieces with their scores.
PIECES = {
    "\u2581": -9.0,
    "a": -9.1,
    "b": -9.2,
    "c": -9.3,
    "\u2581a": -1.0,
    "bc": -2.0,
    "\u2581abc": -3.0,
    "ab": -4.0,
}


@pytest.fixture
def make_sentencepiece(tmp_path: Path) -> Callable[..., Path]:
    """Writes PIECES as a GGUF file of the 'llama' kind."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(PIECES)
    fields = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.token_type": [int(kind) for kind in kinds],
        "ggml.scores": [0.0] * 259 + list(PIECES.values()),
        "ggml.unknown_token_id": 0,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
    }

    def make(**changes: Any) -> Path:
        changed = {name.replace("__", "."): value for name, value in changes.items()}
        return write_gguf(tmp_path / "model.gguf", {**fields, **changed})

    return make
