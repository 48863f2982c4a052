"""A function's arguments one by one, for formats that write each of them apart, without JSON.

Owns which schemas such calls can be held to, and what types a schema leaves a value. A keyword that
would have to hold for the arguments together, or for text that stands without quotes, is refused
where calls are held to the schema; where nothing is promised, schemas are read as far as they go.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowlat.generate.json_schema import ANNOTATIONS, read_schema, subschemas
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.validation import MAX_MESSAGE, MAX_PARAM, one_line
from lowlat.utils.errors import UserError

Schema = Mapping[str, Any]
ANY: Schema = {}
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
ALL_KINDS = frozenset({*KINDS.values(), "array", "object"})
DEFINITIONS = ("$defs", "definitions")
SPLIT = frozenset(
    "$ref additionalProperties maxProperties minProperties properties required type".split()
)
"""Keywords of a whole object that can be held to argument by argument."""
TEXT = frozenset("const enum maxLength minLength".split())
"""Keywords that text without quotes can be held to."""
MAX_REFERENCES = 32
"""References that are followed one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Argument:
    """One argument of a function."""

    name: str
    schema: Schema
    is_required: bool
    place: str
    """Where its schema stands in the request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What the arguments of a function may be."""

    listed: Sequence[Argument]
    others: Argument | None
    """Any argument whose name is not listed; None: there is none."""
    root: Schema
    """The whole schema, to which references in the others refer."""


def read_arguments(schema: Schema, place: str) -> Arguments:
    """The arguments that a schema allows; `place` is where it stands in the request.

    Where names are listed, others come only if additionalProperties says so. Raises RequestError
    for what calls cannot be held to.
    """
    root = _followed(schema, place)
    for key in root:
        if key not in SPLIT and key not in ANNOTATIONS and key not in ("$schema", "$id"):
            raise refusal(f"{place}.{key}", "arguments that are written one by one")
    _check(root, place)
    additional = root.get("additionalProperties", True)
    properties = root.get("properties", {})
    required = list(dict.fromkeys(root.get("required", ())))
    nodes = properties | {name: additional for name in required if name not in properties}
    if refused := [name for name in required if nodes[name] is False]:
        raise fault(f"{place}.required", f"'{refused[0][:80]}' is not allowed; allow it")
    listed = [
        Argument(
            name=name,
            schema=_schema(node),
            is_required=name in required,
            place=f"{place}.properties.{name}",
        )
        for name, node in nodes.items()
        if node is not False
    ]
    others = None
    if additional is not False and ("additionalProperties" in root or "properties" not in root):
        inner = f"{place}.additionalProperties"
        others = Argument(name="", schema=_schema(additional), is_required=False, place=inner)
    _check_count(root, place, len(required), None if others else len(listed))
    return Arguments(listed=listed, others=others, root=root)


def _followed(schema: Schema, place: str) -> Schema:
    """The schema to which a reference at the root leads, with the root's definitions."""
    shared = {name: schema[name] for name in DEFINITIONS if name in schema}
    for _ in range(MAX_REFERENCES):
        if "$ref" not in schema:
            return {**schema, **shared}
        beside = set(schema) - {"$ref", "type", "$schema", "$id"} - ANNOTATIONS
        target = _target(shared, schema["$ref"])
        if beside or not isinstance(target, Mapping):
            break
        schema = target
    raise fault(f"{place}.$ref", "it has to lead to a schema under $defs, with nothing beside it")


def _check(root: Schema, place: str) -> None:
    """Refuse what no schema may hold, and references that the parts of the schema would miss."""
    if "object" not in kinds({"type": root.get("type", "object")}, root):
        raise fault(f"{place}.type", "arguments are an object; say object")
    try:
        read_schema(json.dumps(root), place)
        nodes = list(subschemas(dict(root), place))
    except UserError as error:
        raise RequestError(str(error), param=place) from error
    for pointer, node in nodes:
        if "$ref" in node and not str(node["$ref"]).startswith(("#/$defs/", "#/definitions/")):
            inside = pointer.removeprefix("#").replace("/", ".")
            raise fault(f"{place}{inside}.$ref", "put what it refers to under $defs")
    required = root.get("required", ())
    if not isinstance(required, list | tuple) or not all(isinstance(n, str) for n in required):
        raise fault(f"{place}.required", "it must be a list of names")


def _check_count(root: Schema, place: str, least: int, most: int | None) -> None:
    """Numbers of arguments are held to where the names alone see to them."""
    if (fewest := root.get("minProperties")) is not None and not _count(fewest) <= least:
        raise fault(f"{place}.minProperties", "say in required which there must be")
    largest = root.get("maxProperties")
    if largest is not None and (most is None or not most <= _count(largest)):
        raise fault(f"{place}.maxProperties", "list no more, and forbid additionalProperties")


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def argument_schema(schema: Schema, name: str) -> tuple[Schema, Schema]:
    """The schema of an argument, as far as there is one, and the root of its references."""
    root = schema
    for _ in range(MAX_REFERENCES):
        if not isinstance(target := _target(schema, root.get("$ref")), Mapping):
            break
        root = target
    properties = root.get("properties")
    listed = properties if isinstance(properties, Mapping) else {}
    return _schema(listed.get(name, root.get("additionalProperties", ANY))), schema


def is_free(schema: Schema) -> bool:
    """Whether a schema says nothing of values."""
    return all(key in ANNOTATIONS for key in schema)


def json_schema(schema: Schema, root: Schema) -> Schema:
    """The schema of an argument, whole without its root."""
    shared = {name: root[name] for name in DEFINITIONS if name in root}
    return {key: schema[key] for key in schema if key not in DEFINITIONS} | shared


def kinds(schema: object, root: Schema) -> frozenset[str]:
    """The types of JSON that a schema leaves a value; more than those where that is not clear."""
    return _kinds(schema, root, {}, MAX_REFERENCES)


def _kinds(
    schema: object, root: Schema, known: dict[str, frozenset[str]], depth: int
) -> frozenset[str]:
    """`known` has what was found of references, each of which is followed once."""
    if not isinstance(schema, Mapping):
        return frozenset() if schema is False else ALL_KINDS
    if depth == 0:
        return ALL_KINDS
    found = ALL_KINDS
    if isinstance(declared := schema.get("type"), str | list):
        found = frozenset([declared] if isinstance(declared, str) else map(str, declared))
        found |= {"integer"} if "number" in found else set()
    if isinstance(options := schema.get("enum"), list):
        found &= {kind_of(value) for value in options}
    if "const" in schema:
        found &= {kind_of(schema["const"])}
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(key), list):
            each = [_kinds(part, root, known, depth - 1) for part in parts]
            found &= ALL_KINDS.intersection(*each) if key == "allOf" else frozenset().union(*each)
    reference = schema.get("$ref")
    if isinstance(reference, str) and (target := _target(root, reference)) is not None:
        if reference not in known:
            known[reference] = ALL_KINDS
            known[reference] = _kinds(target, root, known, depth - 1)
        found &= known[reference]
    return found


def kind_of(value: object) -> str:
    return KINDS.get(type(value), "array" if isinstance(value, list) else "object")


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What a text that stands without quotes is held to."""

    options: Sequence[str] | None = None
    """None: any of these lengths."""
    shortest: int = 0
    longest: int | None = None


def read_texts(schema: Schema, root: Schema, place: str) -> list[Text]:
    """The texts that a schema of texts allows: of any of these forms.

    Raises RequestError for what text without quotes cannot be held to.
    """
    texts: list[Text] = []
    followed: set[str] = set()
    found: list[tuple[str, Schema]] = [(place, schema)]
    while found:
        place, node = found.pop()
        keys = [key for key in node if key not in ANNOTATIONS and key != "type"]
        key = keys[0] if len(keys) == 1 else ""
        if key == "$ref" and isinstance(target := _target(root, node[key]), Mapping):
            if node[key] not in followed:
                found.append((place, target))
            followed.add(node[key])
        elif key == "anyOf" or (key == "allOf" and len(node[key]) == 1):
            found += [(f"{place}.{key}", _schema(part)) for part in node[key]]
        elif others := [key for key in keys if key not in TEXT]:
            raise refusal(f"{place}.{others[0]}", "text that is written without quotes")
        else:
            texts.append(_text(node, place))
    return texts


def _text(schema: Schema, place: str) -> Text:
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength")
    if _count(shortest) < 0 or (longest is not None and _count(longest) < _count(shortest)):
        raise fault(f"{place}.minLength", "lengths must be whole numbers in order")
    options = schema.get("enum")
    if "const" in schema:
        options = [option for option in options or [schema["const"]] if option == schema["const"]]
    if options is None:
        return Text(shortest=shortest, longest=longest)
    fitting = [
        option
        for option in options
        if isinstance(option, str)
        and shortest <= len(option)
        and (longest is None or len(option) <= longest)
    ]
    if not fitting:
        raise fault(f"{place}.enum", "no text satisfies it; allow more")
    return Text(options=fitting)


def _schema(node: object) -> Schema:
    return node if isinstance(node, Mapping) else ANY


def _target(root: Schema, reference: object) -> object:
    """What a reference within `root` refers to; None: nothing, or no such reference."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    node: object = root
    for step in reference.removeprefix("#/").split("/"):
        if not isinstance(node, Mapping):
            return None
        node = node.get(step.replace("~1", "/").replace("~0", "~"))
    return node


def refusal(place: str, what: str) -> RequestError:
    """The error that the keyword at `place` cannot be enforced on `what`."""
    keyword = place.rpartition(".")[2]
    return fault(
        place,
        f"this model's format of calls cannot hold {what} to '{keyword}'; leave it out and check it"
        " in the answer",
    )


def fault(place: str, message: str) -> RequestError:
    """The error that says what is wrong at `place`, and what to do."""
    message = one_line(f"{place}: {message}", MAX_MESSAGE)
    return RequestError(message, param=one_line(place, MAX_PARAM))
