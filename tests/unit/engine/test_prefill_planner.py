"""Chunked prefill: grid, attention paths, chunks."""

import pytest

from lowlat.engine.prefill_planner import PrefillPlanner
from tests.configs import V3_MLA
from tests.fakes import gqa_config

READER = PrefillPlanner(V3_MLA, chunk=1024, page_size=64)


@pytest.mark.parametrize(
    ("position", "prompt", "path"),
    [
        (0, 20, "decode"),
        (19, 20, "decode"),
        (20, 20, "decode"),
        (0, 33, "absorbed"),
        (0, 170, "absorbed"),
        (0, 171, "expanded"),
        (1023, 1030, "expanded"),
        (1024, 1030, "decode"),
        (1024, 1100, "absorbed"),
        (1100, 1100, "decode"),
        (2047, 4000, "expanded"),
        (3967, 3975, "expanded"),
        (3968, 3975, "decode"),
        (3968, 3976, "expanded"),
        (19967, 20000, "expanded"),
        (19968, 20000, "decode"),
        (19968, 20001, "absorbed"),
        (3072, 3242, "absorbed"),
        (960, 961, "decode"),
        (960, 962, "expanded"),
    ],
)
def test_the_path_follows_from_the_position_and_the_prompt(
    position: int, prompt: int, path: str
) -> None:
    assert READER.path(position, prompt) == path


def test_prefill_chunks_cover_a_sequence_without_crossing_the_grid() -> None:
    """For any limits of the steps: every token once, each on its own path."""
    for limit in (1, 7, 100, 1000, 5000):
        start, prompt, length = 0, 3975, 4075
        while start < length:
            size, path = READER.next_chunk(start, prompt, length, limit)
            assert 1 <= size <= limit
            assert {READER.path(start + i, prompt) for i in range(size)} == {path}
            start += size
        assert start == length


def test_a_whole_grid_chunk_is_one_prefill_chunk() -> None:
    assert READER.next_chunk(1024, 2500, 2500, 4096) == (1024, "expanded")


def test_the_last_page_of_a_long_prompt_is_a_chunk_without_expansion() -> None:
    """All pages before it may come from a cache; the keys of the prompt are not built for it."""
    assert READER.next_chunk(19456, 20001, 20001, 4096) == (512, "expanded")
    assert READER.next_chunk(19968, 20001, 20001, 4096) == (33, "absorbed")
    assert READER.page_path(312, 20001) == "absorbed 33"
    assert READER.page_path(312, 20000) == "decode"


def test_gqa_has_no_keys_to_rebuild() -> None:
    planner = PrefillPlanner(gqa_config().attention, chunk=1024, page_size=64)
    assert planner.next_chunk(3072, 3975, 3975, 4096) == (903, "expanded")


def test_names_of_pages_that_mix_paths_include_the_position() -> None:
    """Regression: a page of prompt and output taken for a page of prompt."""
    assert READER.page_path(0, 200) == "expanded"
    assert READER.page_path(3, 200) == "expanded 8"
    assert READER.page_path(3, 201) == "expanded 9"
    assert READER.page_path(4, 200) == "decode"
    assert READER.page_path(0, 10) == "decode"
    assert READER.page_path(1, 128) == "absorbed"
    assert READER.page_path(2, 128) == "decode"


def test_chunks_are_whole_pages() -> None:
    assert PrefillPlanner(gqa_config().attention, chunk=100, page_size=64).chunk == 128
