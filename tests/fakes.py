"""Small models for tests of the engine and the layers above it: no files, milliseconds."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from lowlat.config.model import ModelConfig, RopeConfig
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from lowlat.text.parts import TokenizerParts
from lowlat.text.token_bytes import byte_alphabet
from lowlat.text.tokenizer import Tokenizer
from tests import configs

BOS, EOS, USER, ASSISTANT = 256, 257, 258, 259
TEMPLATE = (
    "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_backend(special: Sequence[str], model: models.BPE | None = None) -> tokenizers.Tokenizer:
    """Ids 0 to 255 are bytes, or the tokens of a byte-level `model`; then the special tokens."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=byte_alphabet(), merges=[]) if model is None else model
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return backend


def trained_backend(corpus: list[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on `corpus`: the special tokens first, and <think> the last."""
    backend = byte_backend((), models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return backend


def wrapped(
    backend: tokenizers.Tokenizer,
    *,
    bos: str = "<s>",
    eos: Sequence[str] = ("</s>",),
    chat_template: str | None = None,
) -> Tokenizer:
    """The tokenizer of a backend, with the first of `eos` as its end token."""
    return Tokenizer(
        TokenizerParts(
            backend=backend,
            special_tokens={"bos_token": bos, "eos_token": eos[0]} if eos else {},
            eos_ids=frozenset(backend.token_to_id(token) for token in eos),
            chat_template=chat_template,
            origin="fake",
        )
    )


def byte_tokenizer(chat_template: str | None = TEMPLATE) -> Tokenizer:
    """Ids 0 to 255 are bytes; then <s>, </s>, <user>, <assistant>. Nothing is put around a text."""
    backend = byte_backend(["<s>", "</s>", "<user>", "<assistant>"])
    return wrapped(backend, chat_template=chat_template)


MLA = replace(
    configs.MLA,
    num_attention_heads=5,
    kv_lora_rank=11,
    q_lora_rank=13,
    qk_nope_head_dim=7,
    v_head_dim=3,
)


def gqa_config(**changes: object) -> ModelConfig:
    """A llama with prime sizes; `changes` replace fields."""
    attention = replace(configs.GQA, num_key_value_heads=3)
    config = configs.byte_model_config("llama", attention)
    return replace(config, **changes)  # pyright: ignore[reportArgumentType]


def mla_config(**changes: object) -> ModelConfig:
    """A dense deepseek_v3 with prime sizes and two MTP modules; `changes` replace fields."""
    config = gqa_config(
        model_type="deepseek_v3",
        attention=MLA,
        rope=RopeConfig(rope_theta=100.0, rope_interleave=True),
        num_nextn_predict_layers=2,
    )
    return replace(config, **changes)  # pyright: ignore[reportArgumentType]


def tiny_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    """A real model with random weights, whose logits change with every token before."""
    model = Transformer(config, dtype=dtype)
    init_weights(model, seed=7)
    return model


class ScriptedModel(Transformer):
    """A model whose likeliest next token is `successor(token)`; all others tie at 0."""

    def __init__(self, config: ModelConfig, successor: Callable[[int], int]) -> None:
        super().__init__(config, dtype=torch.float32)
        self.successor = successor

    def forward(self, ids: Tensor, positions: Tensor, attention: object, **_: object) -> Tensor:
        return torch.tensor([[float(self.successor(int(token)))] for token in ids])

    def logits(self, hidden: Tensor) -> Tensor:
        scores = torch.zeros(hidden.shape[0], self.config.vocab_size)
        for row, token in enumerate(hidden[:, 0].tolist()):
            scores[row, int(token) % self.config.vocab_size] = 5.0
        return scores
