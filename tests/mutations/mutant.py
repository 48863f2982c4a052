"""What a mistake is: one replacement in one file, and the test that holds it shut."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake."""

    name: str
    file: str
    """Below lowlat/."""
    old: str
    new: str
    test: str
    """Node id of a test that fails with `new` and passes with `old`."""
