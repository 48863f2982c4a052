"""Comparisons with transformers, the oracle; it is in the dev extras and nothing else needs it."""

import pytest

pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
