"""Summary lines of a comparison: first difference, diagnosis, routing, parts left out."""

from typing import Any

Object = dict[str, Any]


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
    if mistakes or result["equal"]:
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
