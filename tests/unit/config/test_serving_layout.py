"""`--parallel`: sizes by name, errors in one line."""

import pytest

from lowlat.config.serving_layout import ServingLayout
from lowlat.utils.errors import UserError


def test_sizes_by_name() -> None:
    layout = ServingLayout.parse("tensor=2,pipeline=3,expert=4")
    assert layout == ServingLayout(tensor=2, pipeline=3, expert=4)
    assert layout.stage_size == 4 and layout.processes == 12
    assert ServingLayout.parse(str(layout)) == layout


def test_prefill_groups_divide_the_model_like_the_first() -> None:
    layout = ServingLayout.parse("tensor=2,prefill=1")
    assert (layout.group_size, layout.processes) == (2, 4)
    alone = ServingLayout.parse("prefill=2")
    assert (alone.group_size, alone.processes, str(alone)) == (1, 3, "prefill=2")


@pytest.mark.parametrize(
    "text", ["", "pipeline", "pipeline=0", "pipeline=-1", "pipeline=2,x=1", "tensor=2,expert=3"]
)
def test_errors_name_the_option(text: str) -> None:
    with pytest.raises(UserError, match=r"--parallel '.*': ") as caught:
        ServingLayout.parse(text)
    assert "\n" not in str(caught.value)


def test_a_size_is_given_once() -> None:
    with pytest.raises(UserError, match="pipeline is given twice"):
        ServingLayout.parse("pipeline=2,pipeline=2")
