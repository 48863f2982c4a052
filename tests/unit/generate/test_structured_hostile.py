"""Hostile grammars that take time, memory or stack: refused while the program continues."""

import json
import threading
from pathlib import Path

import pytest
import torch

from lowlat.generate import grammar as grammar_module
from lowlat.generate.grammar import GrammarCompiler, GrammarError, GrammarState
from lowlat.generate.structured import Choice, Grammar, JsonSchema, Regex, StructuredOutput
from lowlat.utils.errors import UserError

from .grammar_walk import Walker, uneven_tokenizer

UNEVEN = uneven_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(UNEVEN, UNEVEN.vocab_size)


def schema(value: object) -> JsonSchema:
    return JsonSchema(schema=json.dumps(value))


def chain(count: int) -> Grammar:
    rules = "\n".join(f"a{index}: a{index + 1}" for index in range(count))
    return Grammar(lark=f'start: a0\n{rules}\na{count}: "x"')


def doubling(name: str) -> Grammar:
    rules = "\n".join(f"{name}{i}: {name}{i + 1} {name}{i + 1}" for i in range(60))
    return Grammar(lark=f'start: {name}0\n{rules}\n{name}60: "x"')


def intersection(count: int) -> Grammar:
    parts = " & ".join(f"/(.|\\n)*{chr(97 + i % 26)}.{{{i}}}/" for i in range(count))
    return Grammar(lark=f"start: T\nT: {parts}")


REFUSED = {
    "chain of rules": chain(3000),
    "conjunction of patterns": schema(
        {"allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(1, 20)]}
    ),
    "conjunction of terminals": intersection(1000),
    "doubling terminals": doubling("T"),
    "product of alternatives": schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(4)]}
                for i in range(10)
            ]
        }
    ),
    "large factor": schema({"type": "integer", "multipleOf": 999999937}),
    "ambiguous objects": schema(
        {
            "anyOf": [
                {"type": "object", "properties": {"a": {}}, "additionalProperties": True}
                for _ in range(500)
            ]
        }
    ),
    "deep groups": Regex(pattern="(" * 500 + "a" + ")" * 500),
    "deep brackets": Grammar(lark="start: " + "(" * 5000 + '"a"' + ")" * 5000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runaway_grammars_are_refused(compiler: GrammarCompiler, name: str) -> None:
    """Regression: compiling that hangs, eats the memory, or ends the program."""
    field = {JsonSchema: "json_schema", Regex: "regex", Grammar: "grammar"}[type(REFUSED[name])]
    with pytest.raises(UserError, match=f"^{field}: "):
        compiler.compile(REFUSED[name])
    assert compiler.compile(Choice(options=("a", "b"))).start().mask().sum() == 2


def test_a_worker_that_takes_too_long_is_killed(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Regression: a hang that uses no processor time, and so no limit of the system's."""
    script = tmp_path / "sleeper.py"
    script.write_text(
        "import time\nfor _ in range(2): print('\"\"', flush=True)\ntime.sleep(600)\n"
    )
    stuck = GrammarCompiler(UNEVEN, UNEVEN.vocab_size)
    monkeypatch.setattr(grammar_module, "WORKER", script)
    monkeypatch.setattr(grammar_module, "TRIAL_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"^regex: too complex"):
        stuck.compile(Regex(pattern="a"))


HARMLESS = {
    "ambiguous stars": Regex(pattern="(a|a)*b"),
    "nested stars": Regex(pattern="(a+)+b"),
    "long class": Regex(pattern="[a-z]{1,100000}"),
    "long repeat": Regex(pattern="a{1000000000}"),
    "look back": Regex(pattern="(a|b)*a(a|b){30}"),
    "endless minimum": schema({"type": "string", "minLength": 10**9}),
    "endless items": schema({"type": "array", "items": {"type": "null"}, "minItems": 10**9}),
    "many choices": Choice(options=tuple(f"choice number {i}" for i in range(1000))),
    "references doubling": schema(
        {
            "$defs": {
                **{
                    f"d{i}": {
                        "type": "object",
                        "properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"},
                        "required": ["a", "b"],
                    }
                    for i in range(40)
                },
                "d40": {"type": "null"},
            },
            "$ref": "#/$defs/d0",
        }
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_dangerous_works(compiler: GrammarCompiler, name: str) -> None:
    Walker(UNEVEN, 1).walk(compiler.compile(HARMLESS[name]), limit=300)


def until_fault(state: GrammarState) -> str:
    """The error that ends a long output such as xxxx."""
    with pytest.raises(GrammarError) as caught:
        for _ in range(20_000):
            tokens = torch.nonzero(state.mask()).flatten().tolist()
            state.accept(next(token for token in tokens if token not in UNEVEN.eos_ids))
    return str(caught.value)


@pytest.mark.parametrize("pattern", ["(x{1,1000}){1,1000}", "((x{1,100}){1,100}){1,100}"])
def test_a_limit_reached_half_way_ends_that_output(compiler: GrammarCompiler, pattern: str) -> None:
    """Regression: one output's error that ends others."""
    wild = compiler.compile(Regex(pattern=pattern)).start()
    tame = compiler.compile(Regex(pattern="x{1,1000}")).start()
    assert until_fault(wild).startswith("regex: ")
    with pytest.raises(GrammarError):
        wild.mask()
    with pytest.raises(GrammarError):
        wild.accept(ord("x"))
    assert not wild.is_done
    tame.accept(ord("x"))
    assert tame.mask()[ord("x")]


def test_slow_masks_end_their_output(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: an output that stays below every limit, and still stops all others."""
    monkeypatch.setattr(grammar_module, "MASK_SECONDS", 0.0)
    monkeypatch.setattr(grammar_module, "MASK_SECONDS_PER_TOKEN", 0.0)
    state = compiler.compile(Grammar(lark='start: a\na: a a | "x" | ""')).start()
    with pytest.raises(GrammarError, match=r"^grammar: its masks"):
        state.mask()


def test_a_tried_grammar_is_not_tried_again(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: repeated requests that wait for other requests' trials."""
    monkeypatch.setattr(grammar_module, "MAX_KNOWN", 2)
    known, other, third = (Regex(pattern=pattern) for pattern in ("kn*", "ot*", "th*"))
    fresh = GrammarCompiler(UNEVEN, UNEVEN.vocab_size)
    fresh.compile(known)
    fresh.compile(other)
    with monkeypatch.context() as broken:
        broken.setattr(fresh, "_worker", None)
        fresh.compile(known)
        fresh.compile(other)
    fresh.compile(third)  # forgets the first
    monkeypatch.setattr(fresh, "_worker", None)
    fresh.compile(other)
    with pytest.raises(TypeError):
        fresh.compile(known)


def test_threads_share_a_compiler(compiler: GrammarCompiler) -> None:
    """Regression: two threads' trials mixed up on the one pipe."""
    outputs: list[StructuredOutput] = [Regex(pattern=f"{letter}(") for letter in "abcdef"]
    faults: dict[int, str] = {}

    def attempt(index: int) -> None:
        try:
            compiler.compile(outputs[index])
        except UserError as error:
            faults[index] = str(error)

    threads = [threading.Thread(target=attempt, args=(index,)) for index in range(len(outputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f'"{letter}("' in faults[index] for index, letter in enumerate("abcdef")] == [True] * 6
