"""Multimodal checkpoints: the language model is read as if it were alone."""

import json
from pathlib import Path

import pytest
import torch

from lowlat.checkpoint.load import load_model

from .builders import FAMILIES, assert_refused, assert_same_bits, edit_config, rewrite, write_model


@pytest.mark.parametrize("prefixes", [("language_model.", "language_model."), ("", "")])
def test_reads_the_language_model_alone(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    """In the released layout and in that of transformers; vision tensors are ignored."""
    tmp_path = tmp_path / "m"
    written = write_model(tmp_path, FAMILIES["kimi_k2"])
    nested = "model.language_model." if not prefixes[0] else f"{prefixes[0]}model."

    def add_vision(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors[nested + name.removeprefix("model.")] = tensors.pop(name)
            else:
                tensors[prefixes[1] + name] = tensors.pop(name)
        for name in ("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.bias"):
            tensors[name] = torch.ones(3)

    rewrite(tmp_path, add_vision)
    text = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "kimi_k25", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    loaded = load_model(tmp_path)
    assert loaded.config.model_type == "kimi_k2"
    assert_same_bits(loaded.model, written)


def test_a_foreign_tensor_is_no_vision_tensor(tmp_path: Path) -> None:
    tmp_path = tmp_path / "m"
    write_model(tmp_path, FAMILIES["kimi_k2"])
    text = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "kimi_k25", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    rewrite(tmp_path, lambda tensors: tensors.update({"audio_tower.x": torch.ones(2)}))
    assert_refused(lambda: load_model(tmp_path), tmp_path, "audio_tower.x")
    edit_config(tmp_path, text_config=None)
    assert_refused(lambda: load_model(tmp_path), tmp_path, "text_config")
