"""Pydantic's errors become one line with a path."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from lowlat.serve.protocol.base import StrictModel
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.validation import MAX_MESSAGE, MAX_PARAM, validate
from lowlat.serve.routes.endpoint import Post
from lowlat.serve.routes.operations import POSTS


class Leaf(StrictModel):
    kind: Literal["leaf"]
    size: Annotated[int, Field(ge=1)]


class Twig(StrictModel):
    kind: Literal["twig"]
    leaves: list[Leaf]


class Namesake(StrictModel):
    """Its `type` is the name of a field of its own."""

    type: Literal["leaf"]
    leaf: Leaf | None = None


class Plain(StrictModel):
    type: Literal["plain"]


class Tree(StrictModel):
    name: str | list[Leaf]
    parts: Annotated[list[Annotated[Leaf | Twig, Field(discriminator="kind")]], Field()] | None = (
        None
    )
    form: Annotated[Namesake | Plain, Field(discriminator="type")] | None = None
    weight: float | None = None


LEAF = {"kind": "leaf", "size": 1}


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        ({}, "name", "name is missing"),
        ({"name": 3}, "name", "name: input should be a valid string"),
        ({"name": [{**LEAF, "size": 0}]}, "name[0].size", "greater than or equal to 1"),
        ({"name": [{"kind": "leaf"}]}, "name[0].size", "is missing"),
        ({"name": "x", "age": 3}, "age", "age is not supported; leave it out"),
        ({"name": "x", "parts": [{"kind": "root"}]}, "parts[0].kind", "'leaf', 'twig'"),
        (
            {"name": "x", "parts": [LEAF, {"kind": "twig", "leaves": [{**LEAF, "size": True}]}]},
            "parts[1].leaves[0].size",
            "valid integer",
        ),
        ({"name": "x", "parts": [{}]}, "parts[0].kind", "is missing"),
        ({"name": "x", "form": {"type": "leaf", "age": 3}}, "form.age", "form.age is not"),
        ({"name": "x", "form": {"type": "leaf", "leaf": 3}}, "form.leaf", "valid dictionary"),
        ({"name": "x", "form": {"type": "leaf", "leaf": {"size": 3}}}, "form.leaf.kind", "missing"),
        ({"name": "x", "weight": True}, "weight", "valid number"),
        ({"name": "x", "weight": "1"}, "weight", "valid number"),
    ],
)
def test_the_field_is_named(value: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        validate(Tree, value)
    assert caught.value.param == param
    assert words in caught.value.message


def test_long_and_strange_names_stay_short_and_on_one_line() -> None:
    """Regression: an answer or a log line whose length or number of lines a request controls."""
    for value in (
        {"name": "x", "a\nb" * 100_000: 1},
        {"name": "x", "parts": [{"kind": "y\n" * 100_000}]},
    ):
        with pytest.raises(RequestError) as caught:
            validate(Tree, value)
        assert len(caught.value.message) <= MAX_MESSAGE
        assert len(caught.value.param or "") <= MAX_PARAM
        assert "\n" not in caught.value.message + (caught.value.param or "")


def test_good_values_pass() -> None:
    tree = validate(Tree, {"name": "x", "parts": [LEAF], "weight": 1})
    assert tree.weight == 1.0


class Wide(Tree):
    UNSUPPORTED = frozenset({"height"})


def test_null_for_what_is_not_supported_is_nothing() -> None:
    """Clients send the defaults of all fields they know; a value, or another name, is refused."""
    assert validate(Wide, {"name": "x", "height": None}) == validate(Wide, {"name": "x"})
    for value in ({"height": 1}, {"height": False}, {"width": None}):
        with pytest.raises(RequestError, match="not supported"):
            validate(Wide, {"name": "x", **value})


@pytest.mark.parametrize("post", POSTS, ids=lambda post: post.path)
def test_no_field_is_both_supported_and_not(post: Post) -> None:
    assert not post.request.UNSUPPORTED & set(post.request.model_fields)
