"""Records as lines of JSON that give back what was written."""

import json
import math

import pytest

from lowlat.train.metrics.lines import decode, encode
from lowlat.train.metrics.record import NoteRecord, Record
from lowlat.utils.errors import UserError
from tests.unit.train.metrics.records import evaluation, experts, held_out, layer, start, step

LAYER = layer(11, [1, 3], bias=(-0.1, 1 / 3))


@pytest.mark.parametrize(
    "record",
    [
        start(5),
        step(3, experts=(LAYER, LAYER)),
        step(3, mfu=None, mtp_losses=(), loss=0.1 + 0.2, experts=()),
        step(7, grad_norm=math.inf, learning_rate=-math.inf, experts=()),
        step(3, divergence=0.25, experts=()),
        step(3, loss=None, mtp_losses=(), layer_error=0.5, experts=()),
        evaluation(3, divergence=0.0),
        evaluation(3),
        evaluation(3, bits_per_byte=None, split="dérivé"),
        evaluation(3, bits_per_byte=None, targets="answer token"),
        held_out(3, 0.25),
        NoteRecord(step=2, text='a "note"\u2028'),
    ],
)
def test_lines_give_back_the_record(record: Record) -> None:
    line = encode(record)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode(line, "x") == record


def test_lines_without_a_teacher_know_nothing_of_one() -> None:
    """Logs of runs that have none stay readable by and for versions that knew of none."""
    for record in (step(3), evaluation(3)):
        assert not {"divergence", "layer_error"} & json.loads(encode(record)).keys()


def test_not_finite_is_strict_json() -> None:
    line = encode(step(1, loss=math.nan, mtp_losses=(math.inf,), experts=experts(1)))
    raw = json.loads(line, parse_constant=pytest.fail)
    assert (raw["loss"], raw["mtp_losses"]) == ("NaN", ["Infinity"])
    read = decode(line, "x")
    assert math.isnan(read.loss) and read.mtp_losses == (math.inf,)  # type: ignore[union-attr]


def test_loads_keep_four_digits_and_scalars_all() -> None:
    uneven = layer(1, [1, 2, 4])
    read = decode(encode(step(1, loss=1 / 3, experts=(uneven,))), "x")
    assert read.loss == 1 / 3  # type: ignore[union-attr]
    assert read.experts[0].load == (0.1429, 0.2857, 0.5714)  # type: ignore[union-attr]
    assert read.experts[0].max_violation == uneven.max_violation  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (b'"loss"', b'"lost"', "'loss' is missing"),
        (b'"kind":"step"', b'"kind":"leap"', "kind is 'leap'"),
        (b'"step":3', b'"step":3.5', "'step' is no integer"),
        (b'"step":3', b'"step":true', "'step' is no integer"),
        (b'"loss":', b'"loss":null,"lossy":', "'lossy' is unknown"),
        (b'"loss":', b'"loss":"nan","x":', "'x' is unknown"),
        (b'"mfu":0.43', b'"mfu":"0.43"', "'mfu' is no number"),
        (b'"mfu":0.43', b'"mfu":NaN', "NaN is not a JSON number"),
        (b'"mtp_losses":[', b'"mtp_losses":[{},', "'mtp_losses' is no number"),
        (b'"layer":1,', b"", "'layer' is missing"),
        (b"{", b"[{", "not valid JSON"),
    ],
)
def test_faults_in_a_line_are_named(old: bytes, new: bytes, fault: str) -> None:
    line = encode(step(3)).replace(old, new, 1)
    with pytest.raises(UserError, match=r"^log: .*" + fault):
        decode(line, "log")
