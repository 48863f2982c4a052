"""Weights of embedding models, which are base models (Qwen3Model, ...) without an LM head.

They become checkpoints of the family's causal language model, with the prefix `model.` and tied
embeddings, so that one loader reads both. The head is never used.
"""

from dataclasses import replace

from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.hf.families import ARCHITECTURES
from lowlat.config.hf.sentence_transformers import MODULES_FILE

HEAD = "lm_head.weight"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def with_language_head(source: TensorSource) -> TensorSource:
    """`source` with the names and the config of a causal language model, if it is an embedding
    model without a head; else unchanged.
    """
    config = source.hf_config
    family = config.get("model_type")
    is_embedding = (source.path / MODULES_FILE).exists()
    if family not in FAMILIES or HEAD in source.tensors or not is_embedding:
        return source
    causal = ARCHITECTURES[family]
    base = causal.removesuffix("ForCausalLM") + "Model"
    if config.get("architectures") not in ([base], [causal]):
        return source
    tensors = source.tensors
    if not any(name.startswith("model.") for name in tensors):
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    changes = {"architectures": [causal], "tie_word_embeddings": True}
    return replace(source, hf_config={**config, **changes}, tensors=tensors)
