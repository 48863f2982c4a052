"""The language model inside a multimodal checkpoint: its tensors without their prefix.

Vision tower and projector are never read.
"""

from dataclasses import replace

from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.hf.families import MULTIMODAL_FAMILIES
from lowlat.config.hf.reader import config_from_hf

PREFIXES = {"language_model.": "", "model.language_model.": "model."}
"""Prefixes of the language model's tensors, in released files and in those of transformers, and
what a file without a vision tower has instead."""
VISION = ("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector.")


def language_part(source: TensorSource) -> TensorSource:
    """`source`, for a multimodal model with the tensors and the config of its language model alone.

    Raises UserError naming the field of a config that is not supported.
    """
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
