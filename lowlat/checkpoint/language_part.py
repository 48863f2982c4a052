"""The language model of a checkpoint, from multimodal models and embedding models.

Multimodal models: the tensors of the language model without their prefix; vision tower and
projector are never read. Embedding models are base models (Qwen3Model, ...) without an LM head:
they become the family's causal language model with tied embeddings, whose head is never used.
"""

from dataclasses import replace

from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.hf.families import ARCHITECTURES, MULTIMODAL_FAMILIES
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.sentence_transformers import MODULES_FILE

PREFIXES = {"language_model.": "", "model.language_model.": "model."}
"""Prefixes of the language model's tensors, in released files and in those of transformers, and
what a file without a vision tower has instead."""
VISION = ("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector.")
HEAD = "lm_head.weight"
EMBEDDING_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def language_part(source: TensorSource) -> TensorSource:
    """`source` with the names and the config of a causal language model.

    Raises UserError naming the field of a config that is not supported.
    """
    return _with_language_head(_without_vision(source))


def _without_vision(source: TensorSource) -> TensorSource:
    if source.hf_config.get("model_type") not in MULTIMODAL_FAMILIES:
        return source
    config_from_hf(source.hf_config, source=str(source.path / "config.json"))
    tensors = {
        _without_prefix(name): tensor
        for name, tensor in source.tensors.items()
        if not name.startswith(VISION)
    }
    return replace(source, hf_config=source.hf_config["text_config"], tensors=tensors)


def _without_prefix(name: str) -> str:
    for prefix, instead in PREFIXES.items():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name


def _with_language_head(source: TensorSource) -> TensorSource:
    config = source.hf_config
    family = config.get("model_type")
    is_embedding = (source.path / MODULES_FILE).exists()
    if family not in EMBEDDING_FAMILIES or HEAD in source.tensors or not is_embedding:
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
