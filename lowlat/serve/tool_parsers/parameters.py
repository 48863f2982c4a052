"""Function parameters one by one, for tool-call formats that write each argument in its own tags.

Determines which schemas can be enforced on such calls, and which JSON types a value may have. Where
a schema is enforced, keywords about several arguments together, or about unquoted text, are
rejected; elsewhere they are ignored.
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
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
ALL_JSON_TYPES = frozenset({*JSON_TYPES.values(), "array", "object"})
DEFINITIONS = ("$defs", "definitions")
SPLIT = frozenset(
    "$ref additionalProperties maxProperties minProperties properties required type".split()
)
"""Keywords of an object that can be enforced argument by argument."""
TEXT = frozenset("const enum maxLength minLength".split())
"""Keywords that can be enforced on unquoted text."""
MAX_REFERENCES = 32
"""Longest chain of $ref that is followed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolParameter:
    """One argument of a function."""

    name: str
    schema: Schema
    is_required: bool
    path: str
    """Path of its schema in the request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolParameters:
    listed: Sequence[ToolParameter]
    others: ToolParameter | None
    """Any parameter whose name is not listed; None: not allowed."""
    root: Schema
    """The whole schema, which $ref in the others refers to."""


def read_parameters(schema: Schema, path: str) -> ToolParameters:
    """The parameters in a schema; `path` is its path in the request.

    If properties are listed, others are allowed only if additionalProperties allows them. Raises
    RequestError for keywords that cannot be enforced.
    """
    root = _followed(schema, path)
    for key in root:
        if key not in SPLIT and key not in ANNOTATIONS and key not in ("$schema", "$id"):
            raise not_enforceable(f"{path}.{key}", "arguments written one by one")
    _check(root, path)
    additional = root.get("additionalProperties", True)
    properties = root.get("properties", {})
    required = list(dict.fromkeys(root.get("required", ())))
    nodes = properties | {name: additional for name in required if name not in properties}
    if refused := [name for name in required if nodes[name] is False]:
        raise schema_error(f"{path}.required", f"'{refused[0][:80]}' is forbidden; allow it")
    listed = [
        ToolParameter(
            name=name,
            schema=_schema(node),
            is_required=name in required,
            path=f"{path}.properties.{name}",
        )
        for name, node in nodes.items()
        if node is not False
    ]
    others = None
    if additional is not False and ("additionalProperties" in root or "properties" not in root):
        inner = f"{path}.additionalProperties"
        others = ToolParameter(name="", schema=_schema(additional), is_required=False, path=inner)
    _check_count(root, path, len(required), None if others else len(listed))
    return ToolParameters(listed=listed, others=others, root=root)


def _followed(schema: Schema, path: str) -> Schema:
    """The schema that a $ref at the root leads to, with the root's definitions."""
    shared = {name: schema[name] for name in DEFINITIONS if name in schema}
    for _ in range(MAX_REFERENCES):
        if "$ref" not in schema:
            return {**schema, **shared}
        others = set(schema) - {"$ref", "type", "$schema", "$id"} - ANNOTATIONS
        target = _target(shared, schema["$ref"])
        if others or not isinstance(target, Mapping):
            break
        schema = target
    raise schema_error(
        f"{path}.$ref", "it must be the only keyword and refer to a schema under $defs"
    )


def _check(root: Schema, path: str) -> None:
    """Reject invalid schemas, and references that parts of the schema could not resolve."""
    if "object" not in json_types({"type": root.get("type", "object")}, root):
        raise schema_error(f"{path}.type", "arguments must be of type object")
    try:
        read_schema(json.dumps(root), path)
        nodes = list(subschemas(dict(root), path))
    except UserError as error:
        raise RequestError(str(error), param=path) from error
    for pointer, node in nodes:
        if "$ref" in node and not str(node["$ref"]).startswith(("#/$defs/", "#/definitions/")):
            inside = pointer.removeprefix("#").replace("/", ".")
            raise schema_error(f"{path}{inside}.$ref", "move its target under $defs")
    required = root.get("required", ())
    if not isinstance(required, list | tuple) or not all(isinstance(n, str) for n in required):
        raise schema_error(f"{path}.required", "must be a list of names")


def _check_count(root: Schema, path: str, least: int, most: int | None) -> None:
    """Reject minProperties and maxProperties unless the listed names already imply them."""
    if (fewest := root.get("minProperties")) is not None and not _count(fewest) <= least:
        raise schema_error(f"{path}.minProperties", "list the needed names in required instead")
    largest = root.get("maxProperties")
    if largest is not None and (most is None or not most <= _count(largest)):
        raise schema_error(
            f"{path}.maxProperties", "list fewer properties and set additionalProperties to false"
        )


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def argument_schema(schema: Schema, name: str) -> tuple[Schema, Schema]:
    """The schema of an argument (empty if unknown), and the root for its references."""
    root = schema
    for _ in range(MAX_REFERENCES):
        if not isinstance(target := _target(schema, root.get("$ref")), Mapping):
            break
        root = target
    properties = root.get("properties")
    listed = properties if isinstance(properties, Mapping) else {}
    return _schema(listed.get(name, root.get("additionalProperties", ANY))), schema


def is_free(schema: Schema) -> bool:
    """Whether a schema does not constrain values."""
    return all(key in ANNOTATIONS for key in schema)


def json_schema(schema: Schema, root: Schema) -> Schema:
    """The schema of an argument, self-contained with the root's definitions."""
    shared = {name: root[name] for name in DEFINITIONS if name in root}
    return {key: schema[key] for key in schema if key not in DEFINITIONS} | shared


def json_types(schema: object, root: Schema) -> frozenset[str]:
    """The JSON types that a schema allows, or a superset of them."""
    return _json_types(schema, root, {}, MAX_REFERENCES)


def _json_types(
    schema: object, root: Schema, known: dict[str, frozenset[str]], depth: int
) -> frozenset[str]:
    """`known` caches the types of references, so that each is followed once."""
    if not isinstance(schema, Mapping):
        return frozenset() if schema is False else ALL_JSON_TYPES
    if depth == 0:
        return ALL_JSON_TYPES
    found = ALL_JSON_TYPES
    if isinstance(declared := schema.get("type"), str | list):
        found = frozenset([declared] if isinstance(declared, str) else map(str, declared))
        found |= {"integer"} if "number" in found else set()
    if isinstance(options := schema.get("enum"), list):
        found &= {json_type_of(value) for value in options}
    if "const" in schema:
        found &= {json_type_of(schema["const"])}
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(key), list):
            each = [_json_types(part, root, known, depth - 1) for part in parts]
            found &= (
                ALL_JSON_TYPES.intersection(*each) if key == "allOf" else frozenset().union(*each)
            )
    reference = schema.get("$ref")
    if isinstance(reference, str) and (target := _target(root, reference)) is not None:
        if reference not in known:
            known[reference] = ALL_JSON_TYPES
            known[reference] = _json_types(target, root, known, depth - 1)
        found &= known[reference]
    return found


def json_type_of(value: object) -> str:
    return JSON_TYPES.get(type(value), "array" if isinstance(value, list) else "object")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConstraint:
    """The constraint on an unquoted text."""

    options: Sequence[str] | None = None
    """The allowed texts; None: any text of the allowed length."""
    shortest: int = 0
    longest: int | None = None


def read_text_constraints(schema: Schema, root: Schema, path: str) -> list[TextConstraint]:
    """The constraints of a string schema; a text must satisfy one of them.

    Raises RequestError for keywords that cannot be enforced on unquoted text.
    """
    texts: list[TextConstraint] = []
    followed: set[str] = set()
    found: list[tuple[str, Schema]] = [(path, schema)]
    while found:
        path, node = found.pop()
        keys = [key for key in node if key not in ANNOTATIONS and key != "type"]
        key = keys[0] if len(keys) == 1 else ""
        if key == "$ref" and isinstance(target := _target(root, node[key]), Mapping):
            if node[key] not in followed:
                found.append((path, target))
            followed.add(node[key])
        elif key == "anyOf" or (key == "allOf" and len(node[key]) == 1):
            found += [(f"{path}.{key}", _schema(part)) for part in node[key]]
        elif others := [key for key in keys if key not in TEXT]:
            raise not_enforceable(f"{path}.{others[0]}", "unquoted text")
        else:
            texts.append(_text(node, path))
    return texts


def _text(schema: Schema, path: str) -> TextConstraint:
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength")
    if _count(shortest) < 0 or (longest is not None and _count(longest) < _count(shortest)):
        raise schema_error(f"{path}.minLength", "lengths must be integers, minLength <= maxLength")
    options = schema.get("enum")
    if "const" in schema:
        options = [option for option in options or [schema["const"]] if option == schema["const"]]
    if options is None:
        return TextConstraint(shortest=shortest, longest=longest)
    fitting = [
        option
        for option in options
        if isinstance(option, str)
        and shortest <= len(option)
        and (longest is None or len(option) <= longest)
    ]
    if not fitting:
        raise schema_error(f"{path}.enum", "no text satisfies the schema; allow more")
    return TextConstraint(options=fitting)


def _schema(node: object) -> Schema:
    return node if isinstance(node, Mapping) else ANY


def _target(root: Schema, reference: object) -> object:
    """The target of a reference within `root`; None: there is none."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    node: object = root
    for step in reference.removeprefix("#/").split("/"):
        if not isinstance(node, Mapping):
            return None
        node = node.get(step.replace("~1", "/").replace("~0", "~"))
    return node


def not_enforceable(path: str, what: str) -> RequestError:
    """The error for a keyword at `path` that cannot be enforced on `what`."""
    keyword = path.rpartition(".")[2]
    return schema_error(
        path,
        f"'{keyword}' cannot be enforced on {what}, as this model writes tool calls; leave it out"
        " and validate the arguments yourself",
    )


def schema_error(path: str, message: str) -> RequestError:
    message = one_line(f"{path}: {message}", MAX_MESSAGE)
    return RequestError(message, param=one_line(path, MAX_PARAM))
