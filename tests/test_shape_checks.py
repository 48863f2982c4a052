"""The suite's run-time checks of shapes and types reject what the annotations exclude."""

from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.config.model import RopeConfig
from lowlat.ops.norm import rms_norm
from tests import shape_checks


def test_functions_of_lowlat_are_checked() -> None:
    rms_norm(torch.ones(2, 3), torch.ones(3), 1e-6)
    with pytest.raises(TypeError):
        rms_norm(torch.ones(2, 3), torch.ones(2), 1e-6)


def test_dataclasses_of_lowlat_are_checked() -> None:
    with pytest.raises(TypeError):
        RopeConfig(rope_theta="10000")  # pyright: ignore[reportArgumentType]


def test_axes_of_one_call_agree_and_calls_do_not_share_them() -> None:
    def join(a: Float[Tensor, "rows in"], b: Float[Tensor, "rows out"]) -> Float[Tensor, "rows *"]:
        return torch.cat([a, b], dim=1)

    checked = shape_checks.checked(join)
    for rows in (2, 3):
        checked(torch.ones(rows, 1), torch.ones(rows, 4))
    with pytest.raises(TypeError):
        checked(torch.ones(2, 1), torch.ones(3, 4))


def test_results_are_checked() -> None:
    @shape_checks.checked
    def broken(a: Float[Tensor, "rows in"]) -> Float[Tensor, "in rows"]:
        return a

    with pytest.raises(TypeError):
        broken(torch.ones(2, 3))


def test_fields_with_shapes_agree() -> None:
    @shape_checks.checked
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Pair:
        one: Float[Tensor, " rows"]
        other: Float[Tensor, " rows"]

    Pair(one=torch.ones(2), other=torch.ones(2))
    with pytest.raises(TypeError):
        Pair(one=torch.ones(2), other=torch.ones(3))


def test_first_calls_of_a_test_and_some_later_ones_are_checked() -> None:
    @shape_checks.checked
    def head(a: Float[Tensor, "rows in"]) -> Float[Tensor, " in"]:
        return a[0] if len(a) > 1 else a

    def is_checked() -> bool:
        try:
            head(torch.ones(1, 3))
        except TypeError:
            return True
        return False

    for _ in range(2):
        shape_checks.new_test()
        found = [number for number in range(1, 40) if is_checked()]
        assert set(found) >= {1, 2, 3, 4, 8, 16, 32}
        assert len(found) == (7 if shape_checks.FIRST == 4 else 39)
