"""Result of a comparison as text: tables for the terminal, and summary lines."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Object = dict[str, Any]


def show(result: Object, console: Console | None = None, *, every_part: bool = False) -> None:
    """Print layers, the parts of the first layer that differs, logits and diagnosis.

    With `every_part`, list all parts of all blocks instead.
    """
    console = Console() if console is None else console
    for line in heading(result):
        console.print(line, highlight=False, markup=False)
    tables = [parts(result, result["parts"])] if every_part else _summary(result)
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    good = result["equal"]
    console.print(headline(result), style="bold green" if good else "bold red", highlight=False)
    for lines in (diagnosis_lines, weight_lines, choice_lines, routing_lines, notes):
        for line in lines(result):
            console.print(line, highlight=False, markup=False)


def heading(result: Object) -> list[str]:
    """Both implementations and their input tokens."""
    a, b = result["a"], result["b"]
    windows = f" in {result['windows']} windows" if result["windows"] > 1 else ""
    imposed = ", A's experts imposed on B" if result["experts_imposed"] else ""
    return [
        f"A  {a['name']} ({_precision(a)})",
        f"B  {b['name']} ({_precision(b)})",
        f"{result['tokens']:,} tokens{windows} from position {result['start']:,}, "
        f"tolerance {result['tolerance']:g}{imposed}",
    ]


def _precision(implementation: Object) -> str:
    cache = "" if implementation["cache"] is None else f", {implementation['cache']} KV cache"
    return f"{implementation['precision']}{cache}"


def _summary(result: Object) -> list[Table]:
    tables = [layers(result)] if any(p["stage"] == "layer" for p in result["parts"]) else []
    first = result["first_difference"]
    if first is not None:
        own = [item for item in result["parts"] if item["block"] == first["block"]]
        tables.append(parts(result, own))
    return [*tables, logits(result)]


def layers(result: Object) -> Table:
    """A line per layer: its output, and the part with the largest difference."""
    changed = {item["block"]: item for item in result["experts"]}
    columns = ("", "residual", "cosine", "worst part", "relative")
    table = _table(*columns, *(["experts changed"] if changed else []))
    blocks: dict[str, list[Object]] = {}
    for item in result["parts"]:
        if item["stage"] in ("layer", "mtp"):
            blocks.setdefault(item["block"], []).append(item)
    for block, own in blocks.items():
        residual = next((item for item in own if item["part"] == "residual"), None)
        worst = max(own, key=lambda item: _size(item["relative"]))
        experts = changed.get(block)
        table.add_row(
            block,
            *(["-", "-"] if residual is None else _figures(residual, result)[:2]),
            worst["part"],
            _marked(worst["relative"], result),
            *([] if experts is None else [f"{experts['changed']:,} of {experts['chosen']:,}"]),
        )
    return table


def parts(result: Object, listed: list[Object]) -> Table:
    """A line per part, in order of computation."""
    table = _table("", "part", "relative", "max abs", "cosine")
    last = ""
    for item in listed:
        relative, cosine = _figures(item, result)
        name = item["block"] if item["block"] != last else ""
        table.add_row(name, item["part"], relative, figure(item["max_abs"]), cosine)
        last = item["block"]
    return table


def logits(result: Object) -> Table:
    """A line per LM head: the model's and those of MTP modules."""
    table = _table("logits", "relative", "max abs", "cosine", "KL", "top-1 agreement")
    found = {item["block"]: item for item in result["parts"] if item["part"] == "logits"}
    for item in result["logits"]:
        own = found[item["block"]]
        relative, cosine = _figures(own, result)
        name = "model" if item["block"] == "output" else item["block"]
        kl, same = figure(item["kl"]), f"{item['top1_agreement']:.1%}"
        table.add_row(name, relative, figure(own["max_abs"]), cosine, kl, same)
    return table


def _figures(item: Object, result: Object) -> tuple[str, str]:
    cosine = item["cosine"]
    return _marked(item["relative"], result), "-" if cosine is None else f"{cosine:.6f}"


def _marked(relative: float | None, result: Object) -> str:
    beyond = _size(relative) > result["tolerance"]
    return f"[red]{figure(relative)}[/red]" if beyond else figure(relative)


def _size(relative: float | None) -> float:
    return float("inf") if relative is None else relative


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold cyan")
    words = ("", "part", "worst part", "logits")
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    return table


# Summary lines: first difference, diagnosis, routing, parts left out


def headline(result: Object) -> str:
    """One line: equal, or the first difference."""
    first = result["first_difference"]
    if first is None:
        return f"equal within {result['tolerance']:g}"
    return (
        f"first difference at {first['place']}: "
        f"relative {figure(first['relative'])}, max abs {figure(first['max_abs'])}"
    )


def diagnosis_lines(result: Object) -> list[str]:
    """Causes of the difference, one per line."""
    mistakes = result["diagnosis"]["mistakes"]
    lines = [_mistake(found) for found in mistakes if _is_own(found)]
    if result["config_differences"] and (mistakes or not result["equal"]):
        listed = "; ".join(result["config_differences"][:6])
        lines.append(f"configs differ: {listed}{_seen([m for m in mistakes if not _is_own(m)])}")
    if mistakes or result["equal"] or _is_explained_by_weights(result):
        return lines
    imposed, unexplained = result["with_experts_imposed"], result["diagnosis"]["unexplained"]
    # Imposed experts get correct routing weights, so equality then says nothing about a router
    # whose weights follow no known rule.
    is_odd = any(each["place"].endswith(" routing_weights") for each in unexplained)
    if imposed is not None and imposed["first_difference"] is None and not is_odd:
        return [*lines, "expert selection: the only cause of the difference"]
    audited = result["diagnosis"]["audited"]
    lines.append(f"no known mistake; checked in A and B: {', '.join(audited) or 'nothing'}")
    if unexplained:
        label, place = unexplained[0]["implementation"], unexplained[0]["place"]
        lines.append(f"unexplained: {label} at {place} matches neither its config nor a mistake")
    return lines


def _is_explained_by_weights(result: Object) -> bool:
    """Whether weights have a known mistake; rounding is none."""
    found = [] if result["weights"] is None else result["weights"]["findings"]
    return any(each["kind"] not in ("rounding", "unexplained") for each in found)


def _is_own(found: Object) -> bool:
    """Whether an implementation deviates from its own config."""
    return found["judged_by_config_of"] == found["implementation"]


def _mistake(found: Object) -> str:
    where = _where(found["places"])
    return f"{found['name']}: {found['implementation']} {found['detail']}, at {where}"


def _seen(crossed: list[Object]) -> str:
    """Places where differing configs take effect, if both implementations follow their own."""
    if not crossed:
        return ""
    names = ", ".join(dict.fromkeys(found["name"] for found in crossed))
    places = list(dict.fromkeys(place for found in crossed for place in found["places"]))
    return f"; each follows its own: {names}, at {_where(places)}"


def _where(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


def choice_lines(result: Object) -> list[str]:
    """Differences in the tokens that sparse attention (DSA) chooses."""
    changed = [item for item in result["chosen_tokens"] if item["changed"]]
    if not changed:
        return []
    ties = ", all at near ties: B attends to the tokens of A"
    return [
        f"other tokens: first at {changed[0]['block']}; {sum(i['changed'] for i in changed):,} of "
        f"{sum(i['chosen'] for i in result['chosen_tokens']):,} in total"
        f"{ties if all(item['near_ties'] for item in changed) else ''}"
    ]


def routing_lines(result: Object) -> list[str]:
    """Differences in expert selection, and the remaining difference with A's imposed on B."""
    changed = [item for item in result["experts"] if item["changed"]]
    if not changed:
        return []
    first = changed[0]
    lines = [
        f"other experts: first at {first['block']}, {first['changed']:,} of "
        f"{first['chosen']:,}; {sum(i['changed'] for i in changed):,} of "
        f"{sum(i['chosen'] for i in result['experts']):,} in total"
    ]
    imposed = result["with_experts_imposed"]
    if imposed is not None:
        lines.append(f"with A's experts imposed on B: {_remaining(imposed, result['tolerance'])}")
    return lines


def _remaining(imposed: Object, tolerance: float) -> str:
    first = imposed["first_difference"]
    output = [item for item in imposed["parts"] if item["block"] == "output"]
    logits = next((item for item in output if item["part"] == "logits"), None)
    tail = "" if logits is None else f"; logits relative {figure(logits['relative'])}"
    if first is None:
        return f"equal within {tolerance:g}{tail}"
    return f"first difference at {first['place']}{tail}"


def weight_lines(result: Object) -> list[str]:
    """Weights that differ, one line per explanation; nothing for one checkpoint."""
    weights = result["weights"]
    if weights is None:
        return []
    equal, compared = weights["equal"], weights["compared"]
    if equal == compared:
        lines = [f"weights: all {compared:,} tensors equal"]
    else:
        lines = [f"weights differ: {compared - equal:,} of {compared:,} tensors"]
    lines += [
        f"{_mistake(each)}; relative {figure(each['relative'])}" for each in weights["findings"]
    ]
    for label, names in weights["not_compared"].items():
        if names:
            lines.append(f"weights not compared: only in {label.upper()}: {_where(names)}")
    return lines


def notes(result: Object) -> list[str]:
    """Parts that were not compared, with reasons."""
    lines = [f"{each['name']}: {each['unseen']}" for each in (result["a"], result["b"])]
    lines = [line for line in lines if not line.endswith(": ")]
    by_reason: dict[str, list[str]] = {}
    for part, reasons in result["left_out"].items():
        for reason in reasons:
            by_reason.setdefault(reason, []).append(part)
    has_unseen = bool(lines)
    for reason, parts in by_reason.items():
        if has_unseen and reason.startswith("not seen"):
            continue  # the lines above give the reason
        lines.append(f"not compared: {', '.join(parts)} ({reason})")
    return lines


def figure(value: float | None) -> str:
    """A difference with two digits: 3.1e-07."""
    return "not finite" if value is None else "0" if value == 0 else f"{value:.1e}"
