"""How sequences are read: grid, forms, pieces."""

import pytest

from lowlat.config.model import MLAConfig
from lowlat.engine.reading import Piece, Reader
from tests.fakes import gqa_config

V3 = MLAConfig(
    num_attention_heads=128,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
READER = Reader(V3, chunk=1024, page_size=64)


@pytest.mark.parametrize(
    ("position", "prompt", "form"),
    [
        (0, 20, "stream"),
        (19, 20, "stream"),
        (20, 20, "stream"),
        (0, 33, "absorbed"),
        (0, 170, "absorbed"),
        (0, 171, "expanded"),
        (1023, 1030, "expanded"),
        (1024, 1030, "stream"),
        (1024, 1100, "absorbed"),
        (1100, 1100, "stream"),
        (2047, 4000, "expanded"),
    ],
)
def test_the_form_follows_from_the_position_and_the_prompt(
    position: int, prompt: int, form: str
) -> None:
    assert READER.form(position, prompt) == form


def test_pieces_cover_a_sequence_without_crossing_chunks() -> None:
    """Whatever the limits of the steps: every token once, each in its own form."""
    for limit in (1, 7, 100, 1000, 5000):
        start, prompt, length = 0, 2500, 2600
        while start < length:
            piece = READER.next_piece(start, prompt, length, limit)
            assert 1 <= piece.length <= limit
            forms = {READER.form(start + i, prompt) for i in range(piece.length)}
            assert forms == {piece.form}
            start += piece.length
        assert start == length


def test_a_whole_chunk_is_one_piece() -> None:
    assert READER.next_piece(1024, 2500, 2500, 4096) == Piece(1024, "expanded")


def test_pages_that_mix_forms_say_where() -> None:
    """Holds shut: a page of prompt and output taken for a page of prompt."""
    assert READER.page_form(0, 200) == "expanded"
    assert READER.page_form(3, 200) == "expanded 8"
    assert READER.page_form(3, 201) == "expanded 9"
    assert READER.page_form(4, 200) == "stream"
    assert READER.page_form(0, 10) == "stream"
    assert READER.page_form(1, 128) == "absorbed"
    assert READER.page_form(2, 128) == "stream"


def test_chunks_are_whole_pages() -> None:
    assert Reader(gqa_config().attention, chunk=100, page_size=64).chunk == 128
