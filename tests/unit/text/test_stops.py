"""Stop strings over every way to cut a text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowlat.text.stops import StopStrings
from lowlat.utils.errors import UserError

LETTERS = st.text("ab", max_size=25)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def run(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    """All the text passed on, and whether it was stopped."""
    stream, shown, stopped = StopStrings(stops), "", False
    for chunk in chunks:
        text, stopped = stream.push(chunk)
        shown += text
    return shown + stream.flush(), stopped


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition: advance by single characters until the text ends with a stop string."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(stops=STOPS, chunks=st.lists(LETTERS, max_size=6))
def test_any_chunking_gives_the_same(stops: list[str], chunks: list[str]) -> None:
    """Regression: a stop string missed across a chunk border, or a later one found first."""
    assert run(stops, chunks) == expected(stops, "".join(chunks))


@settings(max_examples=100, deadline=None)
@given(stops=STOPS, text=LETTERS)
def test_shown_text_is_never_part_of_a_stop(stops: list[str], text: str) -> None:
    """Regression: the first half of a stop string shown before the second half arrives."""
    stream, shown = StopStrings(stops), ""
    for char in text:
        shown += stream.push(char)[0]
        assert expected(stops, text)[0].startswith(shown)


def test_only_a_possible_beginning_is_held_back() -> None:
    stream = StopStrings(["</s>", "User:"])
    assert stream.push("Hello Us") == ("Hello ", False)
    assert stream.push("ual </") == ("Usual ", False)
    assert stream.push("s> more") == ("", True)
    assert stream.matched == "</s>"
    assert stream.push("and more") == ("", True)
    assert stream.flush() == ""


def test_flush_gives_what_was_held_back() -> None:
    stream = StopStrings(["###"])
    assert stream.push("a##") == ("a", False)
    assert stream.flush() == "##"
    assert stream.matched is None


def test_the_longest_of_two_with_one_end_is_dropped() -> None:
    assert run(["b", "ab"], ["xa", "b!"]) == ("x", True)


def test_no_stop_strings_pass_everything() -> None:
    assert StopStrings([]).push("abc") == ("abc", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="empty stop string"):
        StopStrings(["x", ""])
