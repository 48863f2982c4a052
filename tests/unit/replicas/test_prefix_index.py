"""Prefixes of requests, and the replica that each goes to."""

import json
from collections import Counter
from typing import Any

import pytest

from lowlat.replicas.prefix import MAX_PAGES, PAGE_BYTES, Prefix, prefix_of
from lowlat.replicas.prefix_index import OVERLOAD, PrefixIndex

IDLE = {"a": 0, "b": 0, "c": 0}


def prefix(**fields: Any) -> Prefix:
    return prefix_of(json.dumps(fields).encode())


def chat(*texts: str, system: str = "Be brief.") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *turns]


def test_a_longer_conversation_begins_with_the_pages_of_the_shorter_one() -> None:
    texts = [f"{number}" * 700 for number in range(5)]
    short, long = prefix(messages=chat(*texts[:3])), prefix(messages=chat(*texts))
    assert len(short.pages) == 2100 // PAGE_BYTES and len(long.pages) > len(short.pages)
    assert long.pages[: len(short.pages)] == short.pages
    assert long.home == short.home != prefix(messages=chat("other", *texts[1:])).home


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": chat("y" * 600)},
        {"messages": chat("x" * 600, system="Be long.")},
        {"model": "other"},
        {"tools": [{"type": "function"}]},
    ],
)
def test_what_the_prompt_begins_with_tells_prefixes_apart(changes: dict[str, Any]) -> None:
    fields = {"model": "m", "messages": chat("x" * 600)}
    one, other = prefix(**fields), prefix(**(fields | changes))
    assert one.home != other.home and not set(one.pages) & set(other.pages)


def test_api_keys_share_no_prefix() -> None:
    body = json.dumps({"messages": chat("x" * 600)}).encode()
    one, other = prefix_of(body, b"key one"), prefix_of(body, b"key two")
    assert one.home != other.home and not set(one.pages) & set(other.pages)


@pytest.mark.parametrize("field", ["prompt", "input"])
@pytest.mark.parametrize("unit", ["word ", [17, 4]])
def test_a_plain_prompt_that_grows_keeps_its_home(field: str, unit: Any) -> None:
    short, long = (prefix(**{field: unit * count}) for count in (200, 300))
    assert short.home == long.home and long.pages[: len(short.pages)] == short.pages


def test_other_bodies_have_no_prefix_and_long_ones_a_bounded_one() -> None:
    for body in (b"", b"\xff", b"[1]", b'{"model": "m"}', b'{"messages": []}', b'{"prompt": ""}'):
        assert prefix_of(body) == Prefix()
    assert len(prefix(prompt="x" * (MAX_PAGES + 9) * PAGE_BYTES).pages) == MAX_PAGES
    assert prefix_of(b'{"prompt": "\\ud800"}').home  # a lone surrogate is valid JSON


def test_a_conversation_returns_to_its_replica_and_others_spread() -> None:
    index = PrefixIndex()
    homes = Counter[str]()
    for number in range(60):
        texts = [f"{number} asks {turn}: " + "x" * 400 for turn in range(7)]
        replicas = set()
        for turn in (1, 3, 5, 7):
            wanted = prefix(messages=chat(*texts[:turn]))
            replica = index.rank(wanted, IDLE)[0]
            index.add(wanted, replica)
            replicas.add(replica)
        assert len(replicas) == 1
        homes[replicas.pop()] += 1
    assert set(homes) == set(IDLE) and max(homes.values()) < 40


def test_routers_agree_on_new_conversations_and_only_those_of_a_lost_replica_move() -> None:
    wanted = [prefix(messages=chat(f"question {number}")) for number in range(40)]
    before = [PrefixIndex().rank(each, IDLE)[0] for each in wanted]
    index = PrefixIndex()
    for each in wanted:
        index.add(each, "a")
    assert [index.rank(each, IDLE)[0] for each in wanted] == before, "too short for a page"
    after = [PrefixIndex().rank(each, {"a": 0, "c": 0})[0] for each in wanted]
    assert "b" in before
    assert all(new == old for new, old in zip(after, before, strict=True) if old != "b")


def test_an_overloaded_replica_leaves_its_prefix_to_the_least_loaded() -> None:
    index = PrefixIndex()
    wanted = prefix(prompt="x" * 1000)
    index.add(wanted, "b")
    assert index.rank(wanted, {"a": 2, "b": 2 + OVERLOAD, "c": 5}) == ["b", "a", "c"]
    assert index.rank(wanted, {"a": 2, "b": 3 + OVERLOAD, "c": 5}) == ["a", "c", "b"]
    index.add(wanted, "a")
    assert index.rank(wanted, {"a": 2, "b": 1, "c": 0})[0] == "b"
    assert index.rank(wanted, {"a": 1, "b": 2, "c": 0})[0] == "a"


def test_half_of_the_pages_decide() -> None:
    index = PrefixIndex()
    system = "s" * PAGE_BYTES * 8
    first = prefix(messages=chat("x" * 10, system=system))
    home = index.rank(first, IDLE)[0]
    other = next(name for name in IDLE if name != home)
    index.add(first, other)
    assert index.rank(first, IDLE)[0] == other
    short = prefix(messages=chat("y" * PAGE_BYTES * 7, system=system))
    assert index.rank(short, IDLE)[0] == other
    long = prefix(messages=chat("y" * PAGE_BYTES * 9, system=system))
    assert index.rank(long, IDLE)[0] == PrefixIndex().rank(long, IDLE)[0]


def test_a_lost_replica_and_the_oldest_pages_are_forgotten() -> None:
    index = PrefixIndex(capacity=6)
    one, two = prefix(prompt="x" * 1000), prefix(prompt="y" * 1000)
    assert len(one.pages) == len(two.pages) == 3
    index.add(one, "a")
    index.add(two, "b")
    index.add(one, "c")  # both have it; used last
    index.add(prefix(prompt="z" * 1000), "c")
    assert index._longest(two.pages) == set() and index._longest(one.pages) == {"a", "c"}
    index.keep({"a"})
    assert index._longest(one.pages) == {"a"} and len(index._holders) == 3


def test_without_a_prompt_the_least_loaded_replica_is_first() -> None:
    assert PrefixIndex().rank(Prefix(), {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]
