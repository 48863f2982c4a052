"""Out-of-bounds arguments are refused at the binding."""

import pytest
import torch
from torch import Tensor

from lowlat.ops import native

from .inputs import needs_native

pytestmark = needs_native

WRONG: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "a negative offset": ({}, {"value_offset": -(1 << 40)}),
    "a negative step": ({}, {"key_step": -64}),
    "a negative window": ({"window": -5}, {}),
    "a start beyond all pages": ({"start": 64}, {}),
    "a start that overflows": ({"start": 2**63 - 1}, {}),
    "a negative start": ({"start": -1}, {}),
    "rows of another width": ({"entry_dim": -4}, {}),
}


@pytest.mark.parametrize(("options", "layout"), WRONG.values(), ids=WRONG)
def test_places_outside_the_cache_are_refused(
    options: dict[str, int], layout: dict[str, int]
) -> None:
    """Regression: reads of memory that is not the cache's."""
    cache = torch.zeros(1, 64, 8, dtype=torch.uint8)
    with pytest.raises(ValueError):
        attention_over(cache, options, layout)


def test_pages_without_entries_are_refused() -> None:
    """Regression: a division by the size of a page."""
    with pytest.raises(ValueError, match="do not fit"):
        attention_over(torch.zeros(1, 0, 8, dtype=torch.uint8), {}, {})


def attention_over(cache: Tensor, options: dict[str, int], layout: dict[str, int]) -> None:
    """One query of one head over rows of 4 bf16 channels."""
    module = native.module()
    sizes = {"kv_heads": 1, "key_step": 0, "value_dim": 4, "value_step": 0, "value_offset": 0}
    given = {"entry_dim": 4, "quantized": 0, "start": 0, "window": 0} | options
    q, out = torch.zeros(2, 1, 1, 4, dtype=torch.bfloat16)
    pages = torch.zeros(1, dtype=torch.int32)
    row_layout = module.EntryLayout(**(sizes | layout))
    module.attention(q, cache, pages, scale=1.0, layout=row_layout, out=out, **given)
