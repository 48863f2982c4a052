"""LoRA adapters of a loaded model by name, from folders in PEFT's layout."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowlat.checkpoint.adapter import Adapter, read_adapter
from lowlat.config.model import ModelConfig
from lowlat.engine.request import LoRARequest
from lowlat.model.lora import NO_ADAPTER, SelectedAdapter, add_adapters
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError

LoraFolders = Mapping[str, str | os.PathLike[str]]
"""Folders of adapters by the name that requests give."""
LoraNames = str | Sequence[str | None] | None
"""One adapter for all prompts or one for each; None is the base model."""


@dataclass(frozen=True, slots=True)
class LoadedAdapters:
    """The adapters of a model."""

    requests: Mapping[str, LoRARequest]
    selected: SelectedAdapter

    def get(self, name: str | None) -> LoRARequest | None:
        """The adapter `name`, None for None. Raises UserError for an unknown name."""
        if name is None:
            return None
        if name not in self.requests:
            known = f"it has {', '.join(self.requests)}" if self.requests else "it has none"
            raise UserError(f"lora: the model has no adapter {name!r}; {known}")
        return self.requests[name]

    def number(self, name: str | None) -> int:
        """lora_int_id of the adapter `name`. Raises UserError as `get`."""
        request = self.get(name)
        return NO_ADAPTER if request is None else request.lora_int_id

    def for_each(self, names: LoraNames, count: int) -> list[LoRARequest | None]:
        """The adapters of `count` prompts. Raises UserError for another number of names."""
        each = [names] * count if names is None or isinstance(names, str) else list(names)
        if len(each) != count:
            raise UserError(f"lora: {count} prompts need one name or as many, got {len(each)}")
        return [self.get(name) for name in each]


def read_adapters(folders: LoraFolders | None, config: ModelConfig) -> dict[str, Adapter]:
    """The adapters in `folders` for a model of `config`. Raises UserError as `read_adapter`, and
    for an empty name.
    """
    found: dict[str, Adapter] = {}
    for name, folder in (folders or {}).items():
        if not isinstance(name, str) or not name:
            raise UserError(f"lora: the name of {folder} is empty; name every adapter")
        found[name] = read_adapter(Path(folder), config)
    return found


def load_adapters(model: Transformer, adapters: Mapping[str, Adapter]) -> LoadedAdapters:
    """Add `adapters` to a loaded model."""
    selected = add_adapters(model, [adapter.updates for adapter in adapters.values()])
    requests = {
        name: LoRARequest(
            lora_name=name,
            lora_int_id=number,
            lora_path=str(adapter.folder),
            digest=adapter.digest,
        )
        for number, (name, adapter) in enumerate(adapters.items(), start=1)
    }
    return LoadedAdapters(requests, selected)
