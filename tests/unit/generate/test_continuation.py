"""Continuations of a prompt, with a tokenizer that drops the first space of a text."""

from lowlat.generate.model import Model
from lowlat.generate.structured import Choice
from tests.fakes import ScriptedModel, gqa_config

from .grammar_walk import stripping_tokenizer
from .test_model import one

STRIPPING = stripping_tokenizer()
SPACED = STRIPPING.vocab_size - 5
"""The token of " a"."""


def spaced() -> Model:
    """Generates " a" after every token."""
    config = gqa_config(vocab_size=STRIPPING.vocab_size)
    return Model(ScriptedModel(config, lambda token: SPACED), STRIPPING, name="spaced")


def test_a_continuation_keeps_the_space_between_it_and_its_prompt() -> None:
    """Regression: sentencepiece's first space dropped in the middle of a text."""
    model = spaced()
    for prompt in ("b", STRIPPING.encode("b")):
        assert one(model.generate(prompt, max_tokens=2)).text == " a a"
    begin = STRIPPING.bos_id
    assert begin is not None
    assert one(model.generate([begin], max_tokens=2)).text == "a a"
    assert "".join(model.generate("b", max_tokens=2, stream=True)) == " a a"


def test_a_grammar_applies_to_the_exact_text_of_a_continuation() -> None:
    """Regression: a space required in addition to the grammar, where none is dropped."""
    form = Choice(options=("b", " a b"))
    bias = {SPACED: 5.0}
    assert one(spaced().generate("b", structured=form, logit_bias=bias)).text == " a b"
    begin = STRIPPING.bos_id
    assert begin is not None
    assert one(spaced().generate([begin], structured=form, logit_bias=bias)).text in form.options
