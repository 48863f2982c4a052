"""A small tokenizer that merges, as the files of a model folder."""

import json
from pathlib import Path

import tokenizers

from tests.fakes import trained_backend

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"


def write_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE of 300 tokens with <s> (0), </s> (1), <|user|> (2) and a chat template."""
    corpus = ["the cat sat on the mat, the dog on the log, 2024 it's"]
    backend = trained_backend(corpus, 300, ["<s>", "</s>", "<|user|>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend
