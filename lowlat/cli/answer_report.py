"""Short report of an answer: model, attention, KV cache per token, throughput."""

from rich.console import Console
from rich.table import Table

from lowlat.checkpoint.fetch.model_names import MODEL_PRESETS
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.model import ModelConfig
from lowlat.config.presets import load_preset
from lowlat.convert.report import describe_attention
from lowlat.generate.completion import Completion
from lowlat.generate.model import Model
from lowlat.model.quant import weight_format


def print_answer_report(model: Model, completion: Completion, console: Console) -> None:
    """Model, attention before and after conversion, cache per token, speed."""
    usage = completion.usage
    source = source_config(model.name)
    label = MODEL_PRESETS[model.name].label if model.name in MODEL_PRESETS else model.name
    numbers = weight_format(model.transformer, model.transformer.embed_tokens.dtype)
    rows = {
        "model": f"{label}, {model.num_parameters / 1e6:.1f}M parameters, {numbers}",
        "attention": _attention(source, model.config),
        "cache per token": _cache(source, model),
        "speed": f"{usage.decode_tokens_per_second:.1f} tok/s "
        f"({usage.completion_tokens} tokens; prompt of {usage.prompt_tokens} "
        f"in {usage.prefill_seconds:.2f} s)",
    }
    print_rows(rows, console)


def source_config(name: str) -> ModelConfig | None:
    """The config that the preset `name` was converted from; None for other models."""
    return load_preset("smollm2-135m") if name in MODEL_PRESETS else None


def _attention(source: ModelConfig | None, config: ModelConfig) -> str:
    after = describe_attention(config.attention)
    if source is None:
        return after
    return f"{describe_attention(source.attention)}\n->  {after}, exact"


def _cache(source: ModelConfig | None, model: Model) -> str:
    """Bytes before and after conversion, and those of MHA of the same width."""
    cost, dtype = kv_cache_size(model.config), model.cache_dtype
    full = cost.bytes_per_token(cost.mha, dtype)
    text = f"{model.cache_bytes_per_token:,} bytes"
    if source is not None:
        text = f"{kv_cache_size(source).own_bytes_per_token(dtype):,}  ->  {text}"
    return f"{text} (MHA of this width: {full:,})"


def print_rows(rows: dict[str, str], console: Console) -> None:
    """Names and values as a table without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)
