"""A tiny chat model in place of whatever the command line is told to load."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from lowlat.cli.main import app
from lowlat.generate.model import Model
from tests.fakes import ScriptedModel, byte_tokenizer, gqa_config


@pytest.fixture
def alphabet_model() -> Model:
    """After any byte comes the next one, after a special token `a`: answers start abc."""

    def successor(token: int) -> int:
        return ord("a") if token >= 256 else token + 1

    config = gqa_config(max_position_embeddings=199)
    return Model(ScriptedModel(config, successor), byte_tokenizer(), name="tiny")


@pytest.fixture
def lowlat(monkeypatch: pytest.MonkeyPatch, alphabet_model: Model) -> Callable[..., Result]:
    """Run `lowlat ARGUMENTS` with `stdin`; every model name loads the tiny model."""
    monkeypatch.setattr("lowlat.api.load", lambda name, **options: alphabet_model)

    def invoke(*arguments: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(app, list(arguments), input=stdin)

    return invoke
