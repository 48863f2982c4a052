"""Models that `lowlat serve` loads on demand: checks of their files, memory, and loaders."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lowlat import api
from lowlat.checkpoint.fetch.model_names import needs_fetch
from lowlat.cli.info import memory_of, open_subject
from lowlat.cli.inputs import load_model
from lowlat.cli.options import DiskCacheArguments
from lowlat.cli.serve_models import ModelTable
from lowlat.config.hf.sentence_transformers import read_pooling
from lowlat.engine.cache_size import CACHE_SHARE, check_cache_bytes
from lowlat.engine.page_folder import open_folder
from lowlat.generate.lora import read_adapters
from lowlat.generate.model import Model, check_context
from lowlat.ops import native
from lowlat.serve.model_info import ModelInfo
from lowlat.serve.served_model import PreparedModel, ServedModel
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.device import parse_device
from lowlat.utils.errors import UserError
from lowlat.utils.memory import RESERVE, memory_limit
from lowlat.utils.progress import Progress, make_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Options that all models share."""

    device: str
    threads: int | None
    """None: one per core."""
    memory: int
    """Bytes for weights and KV caches of all models in memory."""
    disk: DiskCacheArguments
    """The prefix cache on disk; the models' pages have folders of their own in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """What is read of a model before it is loaded, and kept while it is not.

    Reading a tokenizer holds the interpreter's lock for some tenths of a second.
    """

    info: ModelInfo
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShares:
    """Sizes in bytes of KV caches without `cache_memory`."""

    each: int
    """Of a model whose files are read at the start."""
    least: int
    with_weights: int
    """Of weights and KV cache of a model whose weights are not known at the start."""

    @classmethod
    def of(
        cls, tables: Sequence[ModelTable], weights: dict[str, int], memory: int
    ) -> "CacheShares":
        """Equal shares of what `memory` leaves besides the known weights, by name, and the caches
        with `cache_memory`."""
        given = sum(_given_cache(table) or 0 for table in tables)
        free = memory - sum(weights.values()) - given
        automatic = [table.name for table in tables if table.cache_memory is None]
        part = CACHE_SHARE / max(1, len(automatic))
        each = int(part * max(free, memory // 10))
        left = free - each * sum(name in weights for name in automatic)
        num_late = len(tables) - len(weights)
        return cls(
            each=each,
            least=int(part * (memory // 10)),
            with_weights=int(CACHE_SHARE * left / max(1, num_late)),
        )

    def late(self, weights: int) -> int:
        """Of a model whose weights were not known at the start: the models that are loaded fit the
        memory together if theirs are no larger than their part."""
        return min(self.each, max(self.least, self.with_weights - weights))


def memory_bytes(gib: float | None, device: str) -> int:
    """--memory in bytes; by default all of the device's memory but a reserve. Raises UserError if
    the device has less."""
    place = parse_device(device)
    if gib is None:
        there = torch.cuda.mem_get_info(place)[1] if place.type == "cuda" else memory_limit()
        return there - RESERVE
    if not math.isfinite(gib):
        raise UserError(f"--memory must be a number of GiB, got {gib}")
    size = int(gib * 2**30)
    check_cache_bytes(size, place, f"--memory {gib:g}")
    return size


def served_models(
    tables: Sequence[ModelTable], machine: Machine, *, max_queue: int
) -> list[ServedModel]:
    """The models of `tables`, whose own options are set. Files on this machine are checked; models
    that must be fetched first are checked when they are used.

    A KV cache without `cache_memory` has the size that `CacheShares` gives it.
    Raises UserError for a model that cannot be served, or does not fit the memory.
    """
    native.available()  # a wrong LOWLAT_ISA is an error at the start
    if machine.threads is not None:
        native.use_threads(machine.threads)
    if "prefix_cache_dir" in machine.disk:
        open_folder(machine.disk["prefix_cache_dir"])
    progress = make_progress()
    files: dict[str, ModelFiles] = {}
    for table in tables:
        try:
            if not needs_fetch(table.path):
                files[table.name] = read_files(table, progress)
        except UserError as error:
            raise UserError(f"model '{table.name}': {error}") from error
    weights = {name: found.info.weights_bytes for name, found in files.items()}
    shares = CacheShares.of(tables, weights, machine.memory)
    models: list[ServedModel] = []
    for table in tables:
        prepare = _preparer(table, machine, shares)
        found = files.get(table.name)
        models.append(
            ServedModel(
                name=table.name,
                aliases=tuple(table.aliases),
                adapters=tuple(table.lora),
                prepare=prepare,
                prepared=None if found is None else _prepared(table, found, machine, shares.each),
                info=None if found is None else found.info,
                max_queue=max_queue,
            )
        )
    return models


def read_files(table: ModelTable, progress: Progress) -> ModelFiles:
    """Read the headers of a model's files, its tokenizer and its chat template. Raises
    UserError."""
    path = api.prepare(table.path, progress=progress)
    subject = open_subject(table.name, path)
    adapters = read_adapters(table.lora, subject.config).values()
    updates = sum(update.nbytes for each in adapters for update in each.updates.values())
    tokenizer = api.read_tokenizer(path)
    tokenizer.require()
    dtype = None if table.dtype == "auto" else table.dtype
    context = check_context(subject.config, table.max_context)
    info = ModelInfo.of_files(
        subject.config,
        tokenizer,
        context=context,
        weights_bytes=memory_of(subject, 1, dtype, "bf16")["weights_bytes"] + updates,
        pooling=read_pooling(path),
    )
    return ModelFiles(info=info, tokenizer=tokenizer)


def _preparer(
    table: ModelTable, machine: Machine, shares: CacheShares
) -> Callable[[Progress], PreparedModel]:
    def prepare(progress: Progress) -> PreparedModel:
        files = read_files(table, progress)
        return _prepared(table, files, machine, shares.late(files.info.weights_bytes))

    return prepare


def _given_cache(table: ModelTable) -> int | None:
    """`cache_memory` in bytes."""
    return None if table.cache_memory is None else int(table.cache_memory * 2**30)


def _prepared(table: ModelTable, files: ModelFiles, machine: Machine, share: int) -> PreparedModel:
    """Raises UserError if the model does not fit the memory."""
    info = files.info
    given = _given_cache(table)
    left = machine.memory - info.weights_bytes
    cache = min(share, left) if given is None else given
    if left <= 0 or cache > left:
        raise UserError(
            f"model '{table.name}': {info.weights_bytes / 2**30:.2f} GiB of weights"
            f"{'' if given is None else f' and cache_memory {table.cache_memory:g}'} exceed"
            f" {machine.memory / 2**30:.2f} GiB of memory (--memory); serve it with a smaller dtype"
        )

    def load(progress: Progress) -> Model:
        return load_model(
            table.path,
            threads=None,
            device=machine.device,
            dtype=table.dtype or "bf16",
            cache=table.cache or "auto",
            context=table.max_context,
            max_cache_bytes=cache,
            speculates=table.speculate is not False,
            lora=table.lora,
            tokenizer=files.tokenizer,
            progress=progress,
            **machine.disk,
        )

    return PreparedModel(info=info, num_bytes=info.weights_bytes + cache, load=load)
