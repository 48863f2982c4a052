"""Tables of `lowlat info`: parameters, KV cache per token, memory."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowlat.cli.tables import number_table, print_block
from lowlat.config.attention import short_name
from lowlat.config.kv_cache_size import KVCacheSize, kv_cache_size
from lowlat.config.model import GLAConfig, MLAConfig, ModelConfig
from lowlat.config.parameter_count import ParameterCount, count_parameters


def show(
    name: str,
    config: ModelConfig,
    memory: dict[str, int] | None,
    dtype: str | None,
    console: Console | None = None,
    *,
    cache: str = "bf16",
    machine: dict[str, int | bool] | None = None,
) -> None:
    """Print the tables of the model `name`; `dtype` None is weights as stored."""
    console = Console() if console is None else console
    count, cost = count_parameters(config), kv_cache_size(config)
    print_block(_title(name, config), console)
    print_block(_parameters(config, count), console)
    print_block(_cache(config, cost, cache), console)
    if memory is not None:
        print_block(_memory(config, memory, dtype, cache), console)
    if machine is not None:
        print_block(_expectation(config, machine, dtype), console)
    console.print()


def _title(name: str, config: ModelConfig) -> Text:
    facts = (
        config.model_type,
        f"{config.num_hidden_layers} layers of width {config.hidden_size:,}",
        f"context {config.max_position_embeddings:,}",
    )
    return Text.assemble((name, "bold"), "\n", (" · ".join(facts), "dim"), overflow="fold")


def _parameters(config: ModelConfig, count: ParameterCount) -> Table:
    table = number_table("Parameters", "count", "share")
    for part, value, note in _parts(config, count):
        if value:
            table.add_row(part, _amount(value), f"{value / count.total:.1%}", note)
    table.add_section()
    table.add_row("total", _amount(count.total), "", "main model", style="bold")
    for value, note in (
        (count.active_without_embedding, "without the input embedding"),
        (count.active, "with the input embedding"),
    ):
        if value < count.total:
            share = f"{value / count.total:.1%}"
            table.add_row("active per token", _amount(value, digits=2), share, note)
    if count.mtp:
        copies = count.mtp + count.mtp_copies
        table.add_section()
        modules = config.num_nextn_predict_layers
        depth = "1 module" if modules == 1 else f"{modules} modules"
        table.add_row("MTP", _amount(count.mtp), "", f"{depth} in addition to the main model")
        table.add_row("", _amount(copies), "", "with copies of embedding and LM head")
        table.add_row("", _amount(count.total + copies, digits=2), "", "total with MTP")
    return table


def _parts(config: ModelConfig, count: ParameterCount) -> list[tuple[str, int, str]]:
    layers, moe = config.num_hidden_layers, config.moe
    sparse = sum(config.is_moe_layer(layer) for layer in range(layers))
    tied = ", also the LM head" if config.tie_word_embeddings else ""
    routed = shared = ""
    if moe is not None:
        routed = f"{sparse} x {moe.n_routed_experts} of width {moe.moe_intermediate_size:,}"
        routed += f", {moe.num_experts_per_tok} per token"
        shared = f"{sparse} x {moe.n_shared_experts}, used by every token"
    return [
        ("embedding", count.embedding, f"{config.vocab_size:,} tokens{tied}"),
        ("LM head", count.head, ""),
        ("attention", count.attention, f"{layers} layers, {_attention(config)}"),
        ("dense MLP", count.dense_mlp, f"{layers - sparse} of width {config.intermediate_size:,}"),
        ("routed experts", count.routed_experts, routed),
        ("shared experts", count.shared_experts, shared),
        ("router", count.gate, ""),
        ("norms", count.norms, ""),
    ]


def _attention(config: ModelConfig) -> str:
    attention, heads = config.attention, config.num_attention_heads
    if isinstance(attention, MLAConfig | GLAConfig | tuple):
        layers = [config.attention_of(layer) for layer in range(config.num_hidden_layers)]
        own = sum(isinstance(one, MLAConfig) and one.index_key_dim > 0 for one in layers)
        return f"{heads} heads" + f", indexers in {own}" * (own > 0)
    return f"{heads} heads of {attention.head_dim}"


def _cache(config: ModelConfig, cost: KVCacheSize, dtype: str) -> Table:
    table = number_table(f"KV cache per token ({dtype})", "bytes", "per layer", "ratio")
    own, own_size = cost.elements_per_token_layer, cost.own_bytes_per_token(dtype)
    heads = config.num_attention_heads
    groups = min(8, heads)
    rows = [
        (f"this model: {short_name(config.attention)}", own, own_size),
        ("MQA, 1 group", cost.mqa, cost.bytes_per_token(cost.mqa, dtype)),
        (f"GQA, {groups} groups", cost.gqa8, cost.bytes_per_token(cost.gqa8, dtype)),
        (f"MHA, {heads} heads", cost.mha, cost.bytes_per_token(cost.mha, dtype)),
    ]
    for index, (name, elements, size) in enumerate(rows):
        style = "" if index else "bold green"
        ratio = f"{size / own_size:.2f}"
        table.add_row(name, f"{size:,}", f"{round(elements, 1):,}", ratio, style=style)
    table.add_section()
    note = "entry size / (2 head_dim)"
    table.add_row("equivalent GQA groups", f"{cost.gqa_groups_equivalent:.4g}", "", "", note)
    return table


def _memory(
    config: ModelConfig, memory: dict[str, int], dtype: str | None, cache_dtype: str
) -> Table:
    tokens = memory["context"]
    table = number_table(f"Memory at {tokens:,} tokens", "bytes")
    weights, cache = memory["weights_bytes"], memory["cache_bytes"]
    with_mtp = ", MTP included" if config.num_nextn_predict_layers else ""
    table.add_row("weights", _bytes(weights), f"{dtype or 'dtype auto'}{with_mtp}")
    table.add_row("KV cache", _bytes(cache), f"{cache_dtype}, one sequence{with_mtp}")
    table.add_section()
    beyond = ""
    if tokens > config.max_position_embeddings:
        beyond = f"beyond the model's {config.max_position_embeddings:,} tokens"
    table.add_row("total", _bytes(weights + cache), beyond, style="bold")
    return table


def _expectation(config: ModelConfig, machine: dict[str, int | bool], dtype: str | None) -> Text:
    """Whether weights and KV cache fit in this machine's memory, and what happens if not."""
    weights, memory = _bytes(machine["weights_bytes"]), _bytes(machine["memory_bytes"])
    text = f"On this machine: weights {weights}, memory {memory}"
    if machine["fits_in_memory"] and not machine.get("fits_with_cache", True):
        return Text(
            f"{text}: the weights fit, but not together with this KV cache; use --cache int8, a "
            "coarser --dtype or a shorter context.",
            style="yellow",
        )
    if machine["fits_in_memory"]:
        return Text(f"{text}: the weights fit.", style="dim")
    if not machine["read_in_place"]:
        return Text(
            f"{text}: too small for {dtype}, which is converted in memory; use --dtype auto, which "
            "memory-maps the checkpoint.",
            style="yellow",
        )
    active = _bytes(machine["active_bytes"])
    how = f"at every step, {active} per token"
    if config.moe is not None:
        how = f"by selected experts, up to {active} per token"
    return Text(f"{text}: weights are read from disk {how}.", style="yellow")


def _amount(count: int, digits: int = 3) -> str:
    """671.026B, 134.515M, 24.576K: a count with its magnitude."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.{digits}f}{unit}"
    return str(count)


def _bytes(size: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 10**3:.2f} kB"
