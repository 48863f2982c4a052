"""A report in sentences: what the terminal says below its table, and the plot in its title."""

from typing import Any

Object = dict[str, Any]


def headline(report: Object) -> str:
    """Equal, or where the first difference is."""
    first = report["first_difference"]
    if first is None:
        return f"equal within {report['tolerance']:g}"
    return (
        f"differ first at {first['place']}: "
        f"relative {figure(first['relative'])}, largest {figure(first['max_abs'])}"
    )


def verdicts(report: Object) -> list[str]:
    """What explains the difference, a line each."""
    mistakes = report["verdict"]["mistakes"]
    lines = [_mistake(found) for found in mistakes if _is_own(found)]
    if report["config_differences"] and (mistakes or not report["equal"]):
        listed = "; ".join(report["config_differences"][:6])
        lines.append(f"configs differ in {listed}{_seen([m for m in mistakes if not _is_own(m)])}")
    if report["verdict"]["mistakes"] or report["equal"]:
        return lines
    fixed, strays = report["with_experts_imposed"], report["verdict"]["unexplained"]
    # Imposed experts have a right gate's factors: they say nothing of a gate that follows no rule.
    odd = any(stray["place"].endswith(" router") for stray in strays)
    if fixed is not None and fixed["first_difference"] is None and not odd:
        lines.append("the choice of experts explains it: all else follows from other experts")
        return lines
    audited = report["verdict"]["audited"]
    checked = f"checked on both sides: {', '.join(audited)}" if audited else "nothing to check"
    lines.append(f"no known mistake explains it ({checked})")
    if strays:
        side, place = strays[0]["side"], strays[0]["place"]
        lines.append(f"{side} computes {place} neither as its config says nor by a known mistake")
    return lines


def _is_own(found: Object) -> bool:
    """Whether the side does not do what its own config says."""
    return found["judged_by_config_of"] == found["side"]


def _mistake(found: Object) -> str:
    return f"{found['name']}: {found['side']} {found['detail']}, at {_where(found['places'])}"


def _seen(crossed: list[Object]) -> str:
    """Where sides that each do what their own config says differ for it: said once, though each is
    judged by the other's, queries and keys apart.
    """
    if not crossed:
        return ""
    names = ", ".join(dict.fromkeys(found["name"] for found in crossed))
    places = list(dict.fromkeys(place for found in crossed for place in found["places"]))
    return f"; each side does what its own says: {names}, at {_where(places)}"


def _where(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


def choices(report: Object) -> list[str]:
    """Where the sides chose other experts, and what is left when they may not."""
    changed = [item for item in report["experts"] if item["changed"]]
    if not changed:
        return []
    first = changed[0]
    lines = [
        f"experts: first other choice at {first['block']}, {first['changed']:,} of "
        f"{first['chosen']:,}; {sum(i['changed'] for i in changed):,} of "
        f"{sum(i['chosen'] for i in report['experts']):,} in all"
    ]
    fixed = report["with_experts_imposed"]
    if fixed is not None:
        lines.append(f"with A's experts imposed on B: {_left(fixed, report['tolerance'])}")
    return lines


def _left(fixed: Object, tolerance: float) -> str:
    first = fixed["first_difference"]
    output = [item for item in fixed["parts"] if item["block"] == "output"]
    logits = next((item for item in output if item["part"] == "logits"), None)
    tail = "" if logits is None else f"; logits relative {figure(logits['relative'])}"
    if first is None:
        return f"equal within {tolerance:g}{tail}"
    return f"differ first at {first['place']}{tail}"


def notes(report: Object) -> list[str]:
    """What was not compared and why."""
    lines = [f"{side['name']}: {side['unseen']}" for side in (report["a"], report["b"])]
    lines = [line for line in lines if not line.endswith(": ")]
    by_reason: dict[str, list[str]] = {}
    for part, reasons in report["left_out"].items():
        for reason in reasons:
            by_reason.setdefault(reason, []).append(part)
    hidden = bool(lines)
    for reason, parts in by_reason.items():
        if hidden and reason.startswith("not seen"):
            continue  # said above, with the reason
        lines.append(f"not compared: {', '.join(parts)} ({reason})")
    return lines


def figure(value: float | None) -> str:
    """A small number as people compare them: 3.1e-07."""
    return "not finite" if value is None else "0" if value == 0 else f"{value:.1e}"
