"""Signals as wishes: the first is noted, a second SIGINT ends at once, and nothing stays caught."""

import os
import signal

import pytest

from lowlat.train.run.signals import StopSignals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish(number: signal.Signals) -> None:
    with StopSignals() as stop:
        assert not stop.asked
        send(number)
        assert stop.asked


def test_a_second_interrupt_ends_at_once() -> None:
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.asked
        send(signal.SIGINT)


def test_handlers_come_back() -> None:
    """However the block ends."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    with pytest.raises(RuntimeError), StopSignals():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before
