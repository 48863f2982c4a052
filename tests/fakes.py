"""Small models for tests of the engine and the layers above it: no files, milliseconds."""

from collections.abc import Callable
from dataclasses import replace

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from lowlat.text.parts import TokenizerParts
from lowlat.text.token_bytes import byte_alphabet
from lowlat.text.tokenizer import Tokenizer

BOS, EOS, USER, ASSISTANT = 256, 257, 258, 259
TEMPLATE = (
    "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = TEMPLATE) -> Tokenizer:
    """Ids 0 to 255 are bytes; then <s>, </s>, <user>, <assistant>. Nothing is put around a text."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<user>", "<assistant>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return Tokenizer(
        TokenizerParts(
            backend=backend,
            special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
            eos_ids=frozenset({EOS}),
            chat_template=chat_template,
            origin="fake",
        )
    )


def gqa_config(**changes: object) -> ModelConfig:
    """A llama with prime sizes; `changes` replace fields."""
    config = ModelConfig(
        model_type="llama",
        hidden_size=23,
        intermediate_size=31,
        num_hidden_layers=2,
        vocab_size=263,
        max_position_embeddings=97,
        rms_norm_eps=1e-5,
        attention=GQAConfig(num_attention_heads=6, num_key_value_heads=3, head_dim=10),
        rope=RopeConfig(rope_theta=100.0),
        initializer_range=0.4,
    )
    return replace(config, **changes)  # pyright: ignore[reportArgumentType]


def mla_config(**changes: object) -> ModelConfig:
    """A dense deepseek_v3 with prime sizes and two MTP modules; `changes` replace fields."""
    config = gqa_config(
        model_type="deepseek_v3",
        attention=MLAConfig(
            num_attention_heads=5,
            kv_lora_rank=11,
            q_lora_rank=13,
            qk_nope_head_dim=7,
            qk_rope_head_dim=6,
            v_head_dim=3,
        ),
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

    def forward(self, ids: Tensor, positions: Tensor, attention: object) -> Tensor:
        return torch.tensor([[float(self.successor(int(token)))] for token in ids])

    def logits(self, hidden: Tensor) -> Tensor:
        scores = torch.zeros(hidden.shape[0], self.config.vocab_size)
        for row, token in enumerate(hidden[:, 0].tolist()):
            scores[row, int(token) % self.config.vocab_size] = 5.0
        return scores
