"""Mistakes in LoRA adapters: which update a row gets, its scaling, and whose pages it reads."""

from .mutant import Mutant

MODEL = "tests/unit/model/test_lora.py::"
ENGINE = "tests/unit/engine/test_lora.py::"
FILES = "tests/unit/checkpoint/test_adapter.py::"

LORA = [
    Mutant(
        "LoRA: the update of the adapter before",
        "model/lora.py",
        "self.updates[number - 1]",
        "self.updates[number - 2]",
        MODEL + "test_products_by_hand",
    ),
    Mutant(
        "LoRA: up-projections of MLA without the update",
        "model/lora.py",
        "return weight + (update.b @ update.a).to(dtype)",
        "return weight",
        MODEL + "test_up_projections_have_the_update_of_kv_b_proj",
    ),
    Mutant(
        "LoRA: the base model computes with the last adapter",
        "model/lora.py",
        "return None if number == NO_ADAPTER else",
        "return",
        MODEL + "test_products_by_hand",
    ),
    Mutant(
        "LoRA: all sequences of a step use the adapter of the first",
        "engine/runner.py",
        "len({chunk.lora_int_id for chunk in chunks}) > 1",
        "len({chunk.lora_int_id for chunk in chunks}) > 99",
        ENGINE + "test_a_batch_of_adapters_gives_the_tokens_of_each_alone",
    ),
    Mutant(
        "LoRA: adapters share pages of the prefix cache",
        "engine/request.py",
        "if self.lora is None:\n            return self.cache_namespace",
        "if True:\n            return self.cache_namespace",
        ENGINE + "test_pages_belong_to_an_adapter_and_a_namespace",
    ),
    Mutant(
        "LoRA: API keys share the pages of an adapter",
        "engine/request.py",
        'b"lowlat LoRA adapter" + digest + cache_namespace',
        'b"lowlat LoRA adapter" + digest',
        ENGINE + "test_pages_belong_to_an_adapter_and_a_namespace",
    ),
    Mutant(
        "LoRA: alpha not divided by the rank",
        "config/hf/adapter.py",
        "math.sqrt(rank) if self.use_rslora else rank\n",
        "math.sqrt(rank) if self.use_rslora else 1\n",
        FILES + "test_scaling",
    ),
    Mutant(
        "LoRA: alpha divided by the rank in rank-stabilized LoRA",
        "config/hf/adapter.py",
        "math.sqrt(rank) if self.use_rslora else rank\n",
        "rank\n",
        FILES + "test_scaling",
    ),
    Mutant(
        "LoRA: the scaling missing from the digest",
        "checkpoint/adapter.py",
        "for tensor in (updates[path].a, updates[path].b):",
        "for tensor in (updates[path].a,):",
        FILES + "test_the_digest_identifies_what_an_adapter_computes",
    ),
]
