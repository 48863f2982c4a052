"""Python entry points: `load` and `LLM`, from a model's name to a loaded Model.

Owns loading, and the one-time conversion of presets into the cache folder.
`checkpoint.fetch.model_names` resolves names. Only `load` affects the whole process: it limits
PyTorch to one thread.
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch

from lowlat.checkpoint.adapter import Adapter
from lowlat.checkpoint.fetch.cache_dir import cache_disk_errors, locked
from lowlat.checkpoint.fetch.model_names import ModelPreset, resolve
from lowlat.checkpoint.fetch.pypi import fetch_pypi
from lowlat.checkpoint.files_digest import files_digest
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import load_model, read_config
from lowlat.checkpoint.read_experts import read_experts
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.hf.sentence_transformers import read_pooling
from lowlat.config.model import ModelConfig
from lowlat.config.serving_layout import AUTO, EPLBConfig, ServingLayout
from lowlat.convert.run import convert
from lowlat.engine.cache_fingerprint import code_digest
from lowlat.engine.cache_size import check_cache_limit
from lowlat.engine.disk_cache import DEFAULT_DISK_BYTES
from lowlat.engine.expert_balancer import ExpertBalancing
from lowlat.engine.page_folder import open_folder
from lowlat.generate.completion import Completion
from lowlat.generate.lora import LoraFolders, LoraNames, load_adapters, read_adapters
from lowlat.generate.model import Model, check_context
from lowlat.generate.new_engine import ServingGroup
from lowlat.generate.params import SamplingOptions, SamplingParams, make_params
from lowlat.generate.prompt import Prompt, as_prompts
from lowlat.model.native import supports_native
from lowlat.model.share import ModelShare
from lowlat.ops import native
from lowlat.text.folder import declared_eos_ids
from lowlat.text.parts import NoTokenizer
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.device import parse_cache, parse_device
from lowlat.utils.errors import UserError
from lowlat.utils.process_group import (
    ProcessGroup,
    is_follower,
    join_group,
    local_processes,
    quiet_followers,
    started_processes,
)
from lowlat.utils.progress import Progress, SilentProgress, make_progress

PYTORCH_DTYPES = ("fp64", "fp32", "fp16")
"""Data types without native kernels."""


class LoadOptions(TypedDict, total=False):
    """The keyword arguments of `load`."""

    dtype: str
    device: str
    context: int | None
    cache: str
    max_cache_bytes: int | Literal["auto"] | None
    prefix_cache_dir: str | os.PathLike[str] | None
    prefix_cache_disk_bytes: int
    speculates: bool
    lora: LoraFolders | None
    parallel: str | None
    eplb: EPLBConfig | None
    tokenizer: Tokenizer | None
    progress: Progress | None


def load(
    name: str | os.PathLike[str] = "default",
    *,
    dtype: str = "bf16",
    device: str = "cpu",
    context: int | None = None,
    cache: str = "auto",
    max_cache_bytes: int | Literal["auto"] | None = None,
    prefix_cache_dir: str | os.PathLike[str] | None = None,
    prefix_cache_disk_bytes: int = DEFAULT_DISK_BYTES,
    speculates: bool = True,
    lora: LoraFolders | None = None,
    parallel: str | None = None,
    eplb: EPLBConfig | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model by preset, folder, .gguf file, hub id or pypi: name; a Path is never a preset.

    dtype: bf16, int8, int4, fp32, fp16, fp64, or auto (as stored); with bf16, weights stored in
    int8, int4 or GGUF blocks stay quantized. context: most tokens of prompt and output together,
    None for all the model allows. cache: dtype of the KV cache, bf16, int8, or auto (the dtype of
    the activations). max_cache_bytes: bound of the KV cache, at most the machine's memory; "auto"
    takes most of the memory left after the weights. prefix_cache_dir: folder for the prefix cache
    on disk, within prefix_cache_disk_bytes; processes may share it, and loading then reads all
    weights once, to identify them. speculates: whether speculative decoding runs; it does not
    change the output. lora: folders of LoRA adapters in PEFT's layout, by name. parallel: layout of
    the processes that torchrun has started, such as "pipeline=2", "prefill=1" or "auto"; `load`
    returns in process 0, and raises SystemExit in the others when process 0 ends; max_cache_bytes
    is per process. eplb: places the experts that the layout divides, by their loads. tokenizer: the
    model's own, read before; a model without one takes and gives token ids. Raises UserError naming
    what cannot be found, read or served, and when text is used without a tokenizer.

    A model on the native kernels applies `torch.set_num_threads(1)` to the whole process: idle
    PyTorch threads slow the kernels' own thread pool.
    """
    settings: ModelSettings = {
        "context": context,
        "cache": cache,
        "max_cache_bytes": max_cache_bytes,
        "prefix_cache_dir": prefix_cache_dir,
        "prefix_cache_disk_bytes": prefix_cache_disk_bytes,
        "speculates": speculates,
    }
    with _joined(parallel, eplb, device) as run:
        checked = _check(name, settings, dtype, device, lora, run, progress or SilentProgress())
        return checked.load(settings, tokenizer)


class ModelSettings(TypedDict):
    """The keyword arguments of `load` that are those of `Model`."""

    context: int | None
    cache: str
    max_cache_bytes: int | Literal["auto"] | None
    prefix_cache_dir: str | os.PathLike[str] | None
    prefix_cache_disk_bytes: int
    speculates: bool


def _check(
    name: str | os.PathLike[str],
    settings: ModelSettings,
    dtype: str,
    device: str,
    lora: LoraFolders | None,
    run: "ParallelRun | None",
    progress: Progress,
) -> "CheckedModel":
    """Everything that can be refused before the weights are read. Raises UserError."""
    parse_cache(settings["cache"])
    check_cache_limit(settings["max_cache_bytes"], parse_device(device))
    folder = settings["prefix_cache_dir"]
    if folder is not None and not is_follower():
        open_folder(Path(folder))
    native.available()  # a wrong LOWLAT_ISA is an error before minutes of loading
    path = prepare(name, progress=progress)
    source = open_checkpoint(path)
    config = read_config(source)
    check_context(config, settings["context"])
    adapters = read_adapters(lora, config)
    if run is not None:
        options = {**settings, "prefix_cache_dir": folder is not None, "dtype": dtype}
        layout = run.layout(config, dtype)
        run.group.agree(_facts(path, adapters, f"{layout} {options} {run.eplb}"))
    # paths need not be UTF-8, but the API and JSON results show the name
    shown = os.fsencode(name).decode("utf-8", "replace")
    return CheckedModel(shown, source, adapters, dtype, device, run, progress)


class CheckedModel(NamedTuple):
    """A model whose files and options are checked."""

    name: str
    source: TensorSource
    adapters: dict[str, Adapter]
    dtype: str
    device: str
    run: "ParallelRun | None"
    progress: Progress

    def load(self, settings: ModelSettings, tokenizer: Tokenizer | None) -> Model:
        """Read the weights of this process, and serve them as `load` documents."""
        path, run = self.source.path, self.run
        tokenizer, pooling = tokenizer or read_tokenizer(path), read_pooling(path)
        divide = None if run is None else partial(run.share, dtype=self.dtype)
        loaded = load_model(
            self.source,
            dtype=self.dtype,
            device=self.device,
            keeps_blocks=True,
            divide=divide,
            progress=self.progress,
        )
        if supports_native(loaded.model):
            native.keep_torch_single_threaded()
        return Model(
            loaded.model,
            tokenizer,
            name=self.name,
            pooling=pooling,
            adapters=load_adapters(loaded.model, self.adapters),
            run=run and run.serving(loaded.config, self),
            **settings,
        )


class ParallelRun(NamedTuple):
    """The processes that serve one model."""

    parallel: str
    """Their layout, as `load` takes it."""
    group: ProcessGroup
    eplb: EPLBConfig | None

    def layout(self, config: ModelConfig, dtype: str) -> ServingLayout:
        """Sizes for a model in `dtype`. Raises UserError."""
        from lowlat.plan.serving_stages import requested_layout

        return requested_layout(
            self.parallel,
            config,
            processes=self.group.world_size,
            local=local_processes(),
            is_native=native.available() and dtype not in PYTORCH_DTYPES,
        )

    def share(self, config: ModelConfig, dtype: str) -> ModelShare:
        """What this process holds of a model. Raises UserError if the layout does not divide it."""
        from lowlat.plan.serving_stages import share_of

        return share_of(config, self.layout(config, dtype), self.group.rank, eplb=self.eplb)

    def serving(self, config: ModelConfig, model: CheckedModel) -> ServingGroup:
        """How they serve a model."""
        balancing = None
        if self.eplb is not None:
            updates = [adapter.updates for adapter in model.adapters.values()]
            balancing = ExpertBalancing(
                step_interval=self.eplb.step_interval,
                load=partial(read_experts, model.source, updates, dtype=model.dtype),
            )
        return ServingGroup(self.group, self.layout(config, model.dtype).prefill, balancing)


@contextmanager
def _joined(
    parallel: str | None, eplb: EPLBConfig | None, device: str
) -> Iterator[ParallelRun | None]:
    """The run that `parallel` describes, within which a common error is printed once."""
    if parallel is None or (parallel == AUTO and started_processes() == 1):
        if eplb is not None:
            raise UserError("--enable-eplb places the experts of --parallel expert=E; give both")
        yield None
        return
    with quiet_followers():
        is_auto = parallel == AUTO
        processes = started_processes() if is_auto else ServingLayout.parse(parallel).processes
        if device != "cpu":
            raise UserError(f"--parallel {parallel} divides a model among CPUs; use --device cpu")
        group = join_group(processes, f"--parallel {parallel}")
    with group.reporting_once():
        yield ParallelRun(parallel, group, eplb)


def _facts(path: Path, adapters: Mapping[str, Adapter], options: str) -> dict[str, str]:
    """What must be equal in all processes of a run."""
    level = native.level() if native.available() else torch.backends.cpu.get_cpu_capability()
    return {
        "version": f"{version('lowlat')} ({code_digest()[:12]})",
        "PyTorch version": torch.__version__,
        "kernel level": f"{level} on {platform.machine()}",
        "options": options,
        "weights": files_digest(path),
        "LoRA adapters": str({name: own.digest.hex() for name, own in adapters.items()}),
    }


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the model at `path`; without a usable one, one that raises when text is
    used.
    """
    is_folder = path.is_dir()
    try:
        return Tokenizer.from_folder(path) if is_folder else Tokenizer.from_gguf(path)
    except NoTokenizer as error:
        eos_ids = declared_eos_ids(path) if is_folder else frozenset()
        return Tokenizer.absent(str(error), eos_ids)


class LLM:
    """Offline batch inference: many prompts at once, each with its own options.

    Takes the arguments of `load`. The prompts run in one continuous batch; a common prefix is
    computed once.
    """

    def __init__(
        self, model: str | os.PathLike[str] = "default", **options: Unpack[LoadOptions]
    ) -> None:
        self.model = load(model, **options)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
        lora: LoraNames = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion | list[Completion]]:
        """Complete all `prompts` (texts, lists of token ids or of messages); returns their
        completions in order. A single prompt counts as a list of one.

        Options are those of SamplingParams: `params` for all prompts or for each, or as keyword
        arguments. `lora` names an adapter for all prompts or for each, None the base model. With n
        above 1, a prompt's completions are a list. `progress` shows a progress bar, by default on a
        terminal. Raises UserError, generating nothing, for a prompt or an option that cannot be
        served.
        """
        if params is not None and options:
            raise UserError(f"give {next(iter(options))} in params or as a keyword, not both")
        if params is None:
            params = make_params(options)
        prompts = as_prompts(prompts)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        bar = make_progress() if progress is None else progress
        found = self.model.generate_each(prompts, each, progress=bar, lora=lora)
        return [
            completions[0] if own.n == 1 else completions
            for completions, own in zip(found, each, strict=True)
        ]


def prepare(name: str | os.PathLike[str] = "default", *, progress: Progress | None = None) -> Path:
    """The folder or .gguf file of `name`, fetched and converted on first use.

    Raises UserError for an unknown name, or for a config without weights.
    """
    progress = progress or SilentProgress()
    # With a leading folder a path cannot be mistaken for a preset or a hub id.
    name = name if isinstance(name, str) else os.path.join(".", name)
    found = resolve(name, progress=progress)
    if isinstance(found, ModelPreset):
        return _convert_preset(found, progress)
    if not isinstance(found, Path):
        raise UserError(
            f"'{name}' is known by its config only (lowlat info {name}); to load it, give the "
            "folder that holds its weights"
        )
    return found


def _convert_preset(preset: ModelPreset, progress: Progress) -> Path:
    """The preset's folder, converted once. It appears only when complete; other processes wait."""
    folder = preset.folder()
    with cache_disk_errors(folder):
        if folder.exists():
            return folder
    source = fetch_pypi(preset.source, progress=progress)
    with cache_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock")
        with locked(lock, preset.label, progress):
            if not folder.exists():
                convert(source, folder, to="mla", progress=progress)
    return folder
