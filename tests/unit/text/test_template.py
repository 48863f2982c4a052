"""Chat templates: what they may use, and that none of them can harm or hold up the program."""

import datetime
import threading
import time

import jinja2
import pytest

from lowlat.text.template import ChatTemplate
from lowlat.utils.errors import UserError

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict] = USER, **variables: object) -> str:
    return ChatTemplate(source, "model").render(messages, **variables)


def refused(source: str, match: str, **limits: float) -> None:
    with pytest.raises(UserError, match="^model: chat_template .*" + match) as caught:
        ChatTemplate(source, "model", **limits).render(USER)
    assert "\n" not in str(caught.value)


def test_blocks_leave_no_blank_lines() -> None:
    """Regression: trim_blocks or lstrip_blocks off, which puts stray newlines into every prompt."""
    source = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}!\n  {% endif %}\n{% endfor %}"
    )
    assert render(source) == "hi!\n"


def test_tojson_is_plain_json() -> None:
    """Regression: Jinja's own tojson, which escapes < and sorts the keys of tools."""
    tools = [{"type": "f", "a": "<é>"}]
    assert render("{{ tools | tojson }}", tools=tools) == '[{"type": "f", "a": "<é>"}]'
    assert render("{{ {'b': 1} | tojson(indent=2) }}") == '{\n  "b": 1\n}'


def test_html_in_messages_is_left_alone() -> None:
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "<b>&"}]) == "<b>&"


def test_loop_controls_generation_blocks_and_time() -> None:
    assert (
        render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert render("{% generation %}a{{ messages[0].content }}{% endgeneration %}") == "ahi"
    year = datetime.datetime.now().strftime("%Y")
    assert int(render("{{ strftime_now('%Y') }}")) - int(year) in (0, 1)


def test_tools_are_none_unless_given() -> None:
    """Regression: `tools` undefined, where templates ask `tools is not none`."""
    assert render("{{ tools is none }} {{ documents is none }}") == "True True"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"


def test_a_refusal_of_the_template_is_passed_on() -> None:
    refused("{{ raise_exception('roles must\n alternate') }}", "roles must alternate")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% if %}", "at line 1"),
        ("{{ messages[0].nothing.at_all }}", "nothing"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not callable|unsafe|safely callable"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10 ** 9) | list }}", "ange too big"),
    ],
)
def test_errors_name_the_template(source: str, match: str) -> None:
    refused(source, match)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) > 1 }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    ],
)
def test_a_runaway_template_is_stopped(source: str) -> None:
    """Regression: a limit that only looks between operations and never gets its turn."""
    start = time.monotonic()
    refused(source, r"needed more than 0.5 s", seconds=0.5)
    assert time.monotonic() - start < 60


def test_memory_is_bounded() -> None:
    refused("{{ ('x' * 9999999999) | length }}", "MemoryError")


def test_output_is_bounded() -> None:
    source = "{% for i in range(99) %}0123456789{% endfor %}"
    refused(source, "longer than 100 characters", output_characters=100)


def test_the_template_works_again_after_a_limit() -> None:
    """Regression: a killed process asked again."""
    source = (
        "{% if messages[0].role == 'bad' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    )
    source += "{% endfor %}{% endfor %}{% endif %}ok"
    template = ChatTemplate(source, "model", seconds=0.5)
    with pytest.raises(UserError, match="needed more"):
        template.render([{"role": "bad"}])
    assert template.render(USER) == "ok"


def test_threads_share_a_template() -> None:
    """Regression: two threads' answers mixed up on the one pipe."""
    template = ChatTemplate("{{ messages[0].content }}", "model")
    texts = {}

    def ask(name: str) -> None:
        texts[name] = template.render([{"role": "user", "content": name * 999}])

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcdefg"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {name: name * 999 for name in "abcdefg"}


def test_values_that_are_not_json_are_refused() -> None:
    with pytest.raises(UserError, match="JSON values"):
        render("", tools=object())


def test_jinja_is_new_enough() -> None:
    """3.1.6 closed the last known ways out of the sandbox."""
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)


def test_messages_too_deep_to_be_written_are_an_error() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="JSON values"):
        ChatTemplate("x", "y").render([{"role": "user", "content": deep}])
