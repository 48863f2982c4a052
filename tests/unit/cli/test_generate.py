"""lowlat generate: what the model is given and what is printed."""

import json
from collections.abc import Callable

import pytest
from typer.testing import Result

from lowlat.cli.generate import as_prompt
from lowlat.cli.options import parse_logit_bias
from lowlat.generate.model import Model
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

Invoke = Callable[..., Result]


def test_answer_goes_to_stdout(lowlat: Invoke) -> None:
    result = lowlat("generate", "tiny", "-p", "hi", "--max-tokens", "5")
    assert result.exit_code == 0
    assert result.stdout == "abcde\n"


def test_raw_continues_the_prompt(lowlat: Invoke) -> None:
    result = lowlat("generate", "tiny", "--raw", "-p", "mno", "--max-tokens", "3")
    assert result.stdout == "pqr\n"


def test_dash_reads_standard_input_without_its_last_line_end(lowlat: Invoke) -> None:
    result = lowlat("generate", "tiny", "--raw", "-p", "-", "--max-tokens", "2", stdin="mno\n")
    assert result.stdout == "pq\n"


def test_stop_string_ends_the_answer(lowlat: Invoke) -> None:
    assert lowlat("generate", "tiny", "-p", "hi", "--stop", "de").stdout == "abc\n"


def test_json_has_tokens_reason_and_logprobs(lowlat: Invoke) -> None:
    result = lowlat(
        "generate", "tiny", "-p", "hi", "--max-tokens", "3", "--json", "--logprobs", "2"
    )
    report = json.loads(result.stdout)
    assert report["model"] == "tiny"
    (completion,) = report["completions"]
    assert completion["text"] == "abc"
    assert completion["token_ids"] == [97, 98, 99]
    assert completion["finish_reason"] == "length"
    assert [entry["token"] for entry in completion["logprobs"]] == [97, 98, 99]
    assert all(len(entry["top"]) == 2 for entry in completion["logprobs"])
    assert completion["usage"]["completion_tokens"] == 3
    assert completion["usage"]["decode_tokens_per_second"] > 0


def test_n_completions_are_numbered(lowlat: Invoke) -> None:
    result = lowlat(
        *("generate", "tiny", "-p", "hi", "--max-tokens", "2", "-n", "2"),
        *("--temperature", "0.01", "--seed", "1"),
    )
    assert result.stdout == "--- 1\nab\n--- 2\nab\n"


def test_logit_bias_reaches_the_sampler(lowlat: Invoke) -> None:
    result = lowlat("generate", "tiny", "-p", "hi", "--max-tokens", "2", "--logit-bias", "97=-100")
    assert not result.stdout.startswith("a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--top-p", "0.5"), "top_p has no effect with temperature 0"),
        (("--logprobs", "1"), "--logprobs"),
        (("--raw", "--system", "x"), "--system"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--logit-bias", "13"), "TOKEN_ID=BIAS"),
    ],
)
def test_contradictions_are_named_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, lowlat: Invoke, arguments: tuple[str, ...], words: str
) -> None:
    """Regression: minutes of loading, then an error that the options alone could tell."""

    def load(name: str, **options: object) -> Model:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lowlat.api.load", load)
    result = lowlat("generate", "tiny", "-p", "hi", *arguments)
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)


def test_system_message_needs_a_template(
    alphabet_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "chat_template", None)
    assert as_prompt(alphabet_model, "x", raw=False, system=None) == "x"
    with pytest.raises(UserError, match="no chat template"):
        as_prompt(alphabet_model, "x", raw=False, system="y")


def test_input_that_is_no_utf8_is_refused(lowlat: Invoke) -> None:
    result = lowlat("generate", "tiny", "-p", "-", stdin=b"ab\xff")
    assert isinstance(result.exception, UserError)
    assert "byte 2" in str(result.exception)


def test_logit_bias_pairs() -> None:
    assert parse_logit_bias(None) == {}
    assert parse_logit_bias(["13=-100", "7=1.5"]) == {13: -100.0, 7: 1.5}
    with pytest.raises(UserError, match="token 7 twice"):
        parse_logit_bias(["7=1", "7=2"])
