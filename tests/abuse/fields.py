"""Bad requests derived from the request models: each field, of the wrong type or out of its range.

Fields are found by walking the models' JSON schemas, so that a new field is covered when it is
added. Rules between fields are not in the schemas; they are in contradictions.py.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lowlat.serve.routes.operations import POSTS
from tests.server.tiny_server import NAME

from .cases import Case, bad_body, bad_value

Json = dict[str, Any]
Wrap = Callable[[Any], Any]

VALUES: dict[str, Any] = {
    "null": None,
    "boolean": True,
    "integer": 7,
    "number": 0.5,
    "string": "word",
    "array": [],
    "object": {},
}
"""A value of each JSON type."""
SPELLINGS = ("NaN", "Infinity", "-Infinity", "1e999", "1" * 40)
"""Numbers that are none, or too large for anything."""
LONGEST = 1 << 21
"""Characters or items of the largest bodies sent; a field that allows more is not overfilled."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One place in a body."""

    path: str
    """As `param` names it."""
    schemas: list[Json]
    """What may stand there: the branches, references resolved."""
    wrap: Wrap
    """The whole body with a value at this place, minimal elsewhere."""


class Walk:
    """All places of one request model's bodies."""

    def __init__(self, schema: Json) -> None:
        self._definitions: Json = schema.get("$defs", {})
        self.root = Node(path="", schemas=[schema], wrap=lambda value: value)

    def nodes(self, node: Node | None = None) -> Iterator[Node]:
        """`node` (the body by default) and every place inside it."""
        node = node or self.root
        yield node
        for schema in node.schemas:
            for child in self._members(node, schema):
                yield from self.nodes(child)
        items = [s["items"] for s in node.schemas if s.get("items") and s.get("maxItems") != 0]
        if items:
            schemas = [branch for each in items for branch in self.branches(each)]
            first = Node(
                path=f"{node.path}[0]", schemas=schemas, wrap=lambda value: node.wrap([value])
            )
            yield from self.nodes(first)

    def branches(self, schema: Json) -> list[Json]:
        """`schema` without references and unions."""
        if "$ref" in schema:
            return self.branches(self._definitions[schema["$ref"].rpartition("/")[2]])
        inner = schema.get("anyOf") or schema.get("oneOf")
        return [one for each in inner for one in self.branches(each)] if inner else [schema]

    def example(self, schema: Json) -> Any:
        """A value that `schema` allows, with required parts alone."""
        schema = self.branches(schema)[0]
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return schema["enum"][0]
        match schema.get("type"):
            case "object":
                required = schema.get("required", [])
                return {name: self.example(schema["properties"][name]) for name in required}
            case "array":
                return [self.example(schema["items"])] * schema.get("minItems", 0)
            case "string":
                return NAME if schema.get("title") == "Model" else "x"
            case "integer" | "number":
                return max(1, schema.get("minimum", 1))
            case kind:
                return VALUES[kind or "object"]

    def _members(self, node: Node, schema: Json) -> Iterator[Node]:
        dot = f"{node.path}." if node.path else ""
        for name, inner in schema.get("properties", {}).items():
            rest = self.example(schema)

            def wrap(value: Any, name: str = name, rest: Json = rest) -> Any:
                return node.wrap({**rest, name: value})

            schemas = self.branches(inner)
            if _is_closed(schemas):
                # What tells the branches of a union apart: the words of all of them may stand here.
                others = [other["properties"] for other in node.schemas if "properties" in other]
                schemas = [s for o in others if name in o for s in self.branches(o[name])]
            yield Node(path=dot + name, schemas=schemas, wrap=wrap)
        values = [schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()]
        for inner in values:
            if isinstance(inner, dict):
                yield Node(
                    path=f"{dot}1",
                    schemas=self.branches(inner),
                    wrap=lambda value: node.wrap({"1": value}),
                )


def field_cases() -> Iterator[Case]:
    """Every place of every request model, with everything that does not belong there."""
    for post in POSTS:
        walk = Walk(post.request.model_json_schema())
        seen: set[tuple[str, str]] = set()
        for node in walk.nodes():
            for case in _cases(walk, post.path, node):
                key = (case.name, str(case.param))
                if key not in seen:
                    seen.add(key)
                    yield case


def _cases(walk: Walk, route: str, node: Node) -> Iterator[Case]:
    name = f"{route} {node.path or 'body'}"
    if node.path:
        yield from _wrong_types(route, name, node)
        yield from _out_of_range(route, name, node)
    for schema in node.schemas:
        if schema.get("type") == "object" and "properties" in schema:
            yield from _wrong_members(walk, route, name, node, schema)


def _wrong_types(route: str, name: str, node: Node) -> Iterator[Case]:
    allowed = {kind for schema in node.schemas for kind in _types(schema)}
    for kind, value in VALUES.items():
        if kind not in allowed:
            yield _case(f"{name}: {kind}", route, node, value)
    if allowed & {"integer", "number"}:
        for text in ("1", "0x10", ""):
            if "string" not in allowed:
                yield _case(f"{name}: the text {text!r}", route, node, text)
        for spelling in SPELLINGS:
            yield _spelled(f"{name}: {spelling[:9]}", route, node, spelling)
    if "boolean" in allowed:
        for value in (0, 1, 0.0, "true", "false", ""):
            if _type_of(value) not in allowed:
                yield _case(f"{name}: {value!r} for true or false", route, node, value)
    if _is_closed(node.schemas):
        words = {word for schema in node.schemas for word in schema.get("enum", ())}
        for text in {"no-such-thing", "", "\u0000", "x" * 5000} - words:
            yield _case(f"{name}: unknown word {text[:14]!r}", route, node, text)
    if any(schema.get("const") is False for schema in node.schemas):
        yield _case(f"{name}: true", route, node, True)


def _is_closed(schemas: list[Json]) -> bool:
    """Whether of all texts only certain words are allowed."""
    texts = [schema for schema in schemas if "string" in _types(schema)]
    return bool(texts) and all({"const", "enum"} & set(schema) for schema in texts)


def _out_of_range(route: str, name: str, node: Node) -> Iterator[Case]:
    for schema in node.schemas:
        for keyword, value in _beyond(schema):
            yield _case(f"{name}: beyond {keyword}", route, node, value)


def _beyond(schema: Json) -> Iterator[tuple[str, Any]]:
    """Values one step outside each limit of `schema`, with the keyword that sets it."""
    step = 1 if schema.get("type") == "integer" else 1e-3
    for keyword, sign in (("minimum", -1), ("maximum", 1)):
        if keyword in schema:
            yield keyword, schema[keyword] + sign * step
            yield f"{keyword} by far", schema[keyword] + sign * 10**12
    if "exclusiveMinimum" in schema:
        yield "exclusiveMinimum", schema["exclusiveMinimum"]
    if schema.get("minLength"):
        yield "minLength", ""
    if "maxLength" in schema:
        yield "maxLength", "x" * (schema["maxLength"] + 1)
    if "pattern" in schema:
        for text in ("", "a b", "é", "a\n", "x" * 129):
            yield f"pattern {text[:3]!r}", text
    if schema.get("minItems"):
        yield "minItems", []
    if schema.get("maxItems", LONGEST) < LONGEST // 2:
        item = schema["items"]
        filler = 1 if item.get("type") == "integer" or "TokenId" in str(item) else "x"
        filler = item.get("enum", [item.get("const", filler)])[0]
        if item.get("type") in ("string", "integer") or item.get("$ref", "").endswith("TokenId"):
            yield "maxItems", [filler] * (schema["maxItems"] + 1)


def _wrong_members(walk: Walk, route: str, name: str, node: Node, schema: Json) -> Iterator[Case]:
    rest = walk.example(schema)
    dot = f"{node.path}." if node.path else ""
    mark = f" ({schema['title']})"
    for missing in schema.get("required", []):
        # Where it is missing, another branch may be meant.
        if any(
            missing not in s["required"] for s in node.schemas if missing in s.get("properties", {})
        ):
            continue
        without = {key: value for key, value in rest.items() if key != missing}
        yield _case(f"{name}{mark}: without {missing}", route, node, without, param=dot + missing)
    if schema.get("additionalProperties") is False:
        for extra in ("no_such_field", "model_", "__class__", "$ref"):
            if extra not in schema["properties"]:
                value = {**rest, extra: 1}
                yield _case(f"{name}{mark}: with {extra}", route, node, value, param=dot + extra)


def _case(name: str, route: str, node: Node, value: Any, *, param: str | None = None) -> Case:
    expected = node.path if param is None else param
    return bad_value(name, route, lambda: node.wrap(value), param=expected)


def _spelled(name: str, route: str, node: Node, text: str) -> Case:
    """A number that json.dumps would not write."""
    mark = "@number@"

    def body() -> bytes:
        return json.dumps(node.wrap(mark)).replace(f'"{mark}"', text).encode()

    return bad_body(name, route, body, words=text[:9])


def _types(schema: Json) -> set[str]:
    """JSON types of the values that `schema` allows."""
    literals = [schema["const"]] if "const" in schema else schema.get("enum", [])
    if literals:
        return {_type_of(value) for value in literals}
    kind = schema.get("type")
    if kind is None:
        return set(VALUES)
    return {"integer", "number"} if kind == "number" else {kind}


def _type_of(value: Any) -> str:
    return next(kind for kind, example in VALUES.items() if type(example) is type(value))
