"""JSON schema validation for structured outputs: supported keywords, depth, references.

Owns these, the white space of generated JSON, and which objects take undeclared properties.
llguidance checks the values of supported keywords, and refuses what it cannot enforce.

A keyword outside the two sets below is an error: ignoring it would allow outputs that violate the
schema. Schemas are read as draft 2020-12, independent of `$schema`.
"""

import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import parse_object, quoted

MAX_DEPTH = 64
"""Levels of brackets in the schema's text: about 30 nested objects."""
MAX_PROPERTIES = 500
"""Per object. Each optional property multiplies the possible continuations."""

WHITESPACE = r"\n? {0,24}"
"""White space between two parts of a JSON text: enough to indent, too little for endless blanks."""

ENFORCED = frozenset(
    "$ref additionalProperties allOf anyOf const enum exclusiveMaximum exclusiveMinimum format"
    " items maxItems maxLength maxProperties maximum minItems minLength minProperties minimum"
    " multipleOf oneOf pattern patternProperties prefixItems properties required type".split()
)
ANNOTATIONS = frozenset(
    "$comment $defs contentEncoding contentMediaType default definitions deprecated"
    " description discriminator examples readOnly title writeOnly".split()
)
"""Keywords without an effect on which outputs are valid."""

_HOLD_SCHEMA = frozenset({"additionalProperties", "items"})
_HOLD_LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_HOLD_MAP = frozenset({"$defs", "definitions", "patternProperties", "properties"})


def read_schema(text: str, field: str) -> dict[str, Any]:
    """The schema in `text` as llguidance takes it, with its objects closed: without
    additionalProperties, those that declare properties have no others.

    Raises UserError, whose message begins with `field`, if it is no schema object, exceeds a limit,
    or uses a keyword or reference that is not supported.
    """
    schema = parse_object(text.encode(), field)
    for name in ("$schema", "$id"):
        # Names the draft and the schema itself, which only references from elsewhere would use.
        schema.pop(name, None)
    _check_values(schema, field)
    nodes = dict(subschemas(schema, field))
    for pointer, node in nodes.items():
        _check_keywords(node, pointer, field)
    for pointer, node in nodes.items():
        if "$ref" not in node:
            continue
        target = node["$ref"]
        if not isinstance(target, str) or unquote(target) not in nodes:
            raise UserError(
                f"{field}: $ref {quoted(str(target))} at {quoted(pointer)} is not a schema inside "
                "this one; nothing is fetched, so put it under $defs and refer to '#/$defs/...'"
            )
    _close_objects(nodes)
    return schema | {"x-guidance": {"whitespace_pattern": WHITESPACE}}


def _close_objects(nodes: dict[str, dict[str, Any]]) -> None:
    """Close the objects among the subschemas `nodes` (by pointer) that a schema leaves open.

    A small model otherwise invents one property after the other. Free-form objects (no properties)
    stay open, and so do parts of a composition such as allOf: closed ones exclude each other.
    """
    composed = _composed(nodes)
    for pointer, node in nodes.items():
        properties = node.get("properties")
        if not isinstance(properties, dict) or not properties or "additionalProperties" in node:
            continue
        # Names of no declared property, or more of them, could not be generated at all.
        required, least = node.get("required", []), node.get("minProperties", 0)
        has_names = isinstance(required, list) and properties.keys() >= set(map(str, required))
        has_count = isinstance(least, int | float) and least <= len(properties)
        if pointer not in composed and has_names and has_count:
            node["additionalProperties"] = False


def _composed(nodes: dict[str, dict[str, Any]]) -> set[str]:
    """Pointers of the subschemas that describe an object together with other subschemas."""
    found: set[str] = set()
    waiting = [pointer for pointer, node in nodes.items() if len(_parts(pointer, node)) > 1]
    while waiting:
        pointer = waiting.pop()
        if pointer in found:
            continue
        found.add(pointer)
        # Subschemas true and false are no nodes.
        for part in _parts(pointer, nodes[pointer]).values():
            waiting += [inner for inner in part if inner in nodes]
    return found


def _parts(pointer: str, node: dict[str, Any]) -> dict[str, list[str]]:
    """What in `node` may declare properties of one object, with the pointers to its subschemas."""
    parts: dict[str, list[str]] = {}
    for key in ("properties", "patternProperties"):
        if node.get(key):
            parts["own"] = []
    for key in ("anyOf", "oneOf"):
        if key in node:
            parts[key] = [f"{pointer}/{key}/{index}" for index in range(len(node[key]))]
    for index in range(len(node.get("allOf", ()))):
        parts[f"allOf/{index}"] = [f"{pointer}/allOf/{index}"]
    if "$ref" in node:
        parts["$ref"] = [unquote(node["$ref"])]
    return parts


def _check_values(schema: dict[str, Any], field: str) -> None:
    """Bounds the depth before anything descends into the schema."""
    layer: list[object] = [schema]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in layer:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{field}: a number is too large; use finite ones")
        layer = inner
    if layer:
        raise UserError(
            f"{field}: the schema is nested more than {MAX_DEPTH} levels deep; use $defs and $ref"
        )


def subschemas(schema: dict[str, Any], field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside `schema` that may hold keywords, with its JSON pointer."""
    found: list[tuple[str, object]] = [("#", schema)]
    while found:
        pointer, node = found.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            hint = "; use prefixItems" if pointer.endswith("/items") else ""
            what = f"a {type(node).__name__} stands at {quoted(pointer)}"
            raise UserError(f"{field}: {what}, where a schema must be{hint}")
        yield pointer, node
        for key, value in node.items():
            inner = f"{pointer}/{key}"
            if key in _HOLD_SCHEMA:
                found.append((inner, value))
            elif key in _HOLD_LIST and isinstance(value, list):
                found += [(f"{inner}/{index}", item) for index, item in enumerate(value)]
            elif key in _HOLD_MAP and isinstance(value, dict):
                found += [(f"{inner}/{_escape(name)}", item) for name, item in value.items()]
            elif key in _HOLD_LIST or key in _HOLD_MAP:
                raise UserError(f"{field}: {key} at {quoted(pointer)} must hold schemas")


def _check_keywords(node: dict[str, Any], pointer: str, field: str) -> None:
    for key in node:
        if key not in ENFORCED and key not in ANNOTATIONS:
            raise UserError(
                f"{field}: keyword {quoted(key)} at {quoted(pointer)} is not supported; leave it "
                "out and check it in the answer"
            )
    for key in ("properties", "patternProperties"):
        if len(node.get(key, ())) > MAX_PROPERTIES:
            raise UserError(
                f"{field}: {key} at {quoted(pointer)} has {len(node[key])} entries, at most "
                f"{MAX_PROPERTIES} are allowed"
            )


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
