"""Rollouts of several turns with a tool: bits of every turn, masked tool messages, failures."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from lowlat.attention.flash import FlashAttention
from lowlat.engine.engine import Engine
from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.engine.request import Request
from lowlat.ops import native
from lowlat.train.layers.fused import use_fused_layers
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.forward import PolicySequence
from lowlat.train.policy.learner import PolicyBatch
from lowlat.train.policy.loss import LossOptions
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.policy.rollouts import Rollout, RolloutEngine
from lowlat.train.policy.tools import RolloutTool, tool_message_ids
from lowlat.train.rewards.sample import RewardFailure, Sample, ToolAnswer
from lowlat.train.rewards.workers import ToolWorkers
from lowlat.utils.errors import UserError
from tests.fakes import ASSISTANT, EOS, USER, byte_tokenizer
from tests.unit.train import tuning
from tests.unit.train.policy.models import CONFIGS, learner, masters
from tests.unit.train.policy.test_gradients import distance
from tests.unit.train.policy.test_grpo import raw_recipe, samples, train, write_prompts
from tests.unit.train.policy.test_one_arithmetic import (
    SAMPLINGS,
    Rollouts,
    assert_one_arithmetic,
    observed,
)

needs_native = pytest.mark.skipif(not native.available(), reason="native kernels")
ENDS = frozenset({EOS, *range(32, 96)})
"""End tokens of random models, so that turns end after a few tokens."""


def prompt(text: str = "2+2") -> PromptRecord:
    chat = [{"role": "user", "content": text}]
    ids = [256, USER, *text.encode(), EOS, ASSISTANT]
    return PromptRecord(prompt=chat, record={"answer": text}, ids=tuple(ids))


def scripted(answer: Callable[[Sample], ToolAnswer], most: int = 3) -> RolloutTool:
    """A tool without processes."""
    workers = create_autospec(ToolWorkers, instance=True)
    workers.score.side_effect = lambda samples: [[answer(sample)] for sample in samples]
    return RolloutTool(workers=workers, tokenizer=byte_tokenizer(), max_iterations=most)


def message(text: str) -> list[int]:
    return [*b"<tool>", *text.encode(), EOS, ASSISTANT]


class Sampled:
    """Groups of two that an engine with `tool` samples, and what it was asked for."""

    def __init__(self, name: str, tool: RolloutTool, sampling: dict[str, Any], length: int) -> None:
        self.model = learner(masters(CONFIGS[name])).model
        engine = RolloutEngine(self.model, context=90, eos_ids=ENDS, seed=3, tool=tool)
        self.found: dict[str, Any] = {
            "logits": {},
            "experts": {},
            "engine": engine._engine,
            "drafted": False,
        }
        self.requests: list[Request] = []
        add = Engine.add

        def kept(engine: Engine, *given: Any) -> Request:
            self.requests.append(add(engine, *given))
            return self.requests[-1]

        with pytest.MonkeyPatch.context() as patch, observed(self.found):
            patch.setattr(Engine, "add", kept)
            self.groups = engine.generate(
                [prompt("2+2"), prompt("the sum of 17 and 4")],
                0,
                num_generations=2,
                max_tokens=length,
                distribution=SamplingDistribution(**sampling),
            )

    @property
    def rollouts(self) -> list[Rollout]:
        return [own for group in self.groups for own in group]


@needs_native
@pytest.mark.parametrize("sampling", [SAMPLINGS["plain"], SAMPLINGS["truncated"]])
@pytest.mark.parametrize("name", ["mla-moe-mtp", "gqa"])
def test_every_turn_has_the_logits_that_it_was_sampled_from(
    name: str, sampling: dict[str, Any]
) -> None:
    """Over the whole vocabulary, in every turn; tool messages are sampled by nobody."""
    tool = scripted(lambda sample: f"{len(sample.completion)}.")
    own = Sampled(name, tool, sampling, 60)
    turns = [turn for rollout in own.rollouts for turn, _ in rollout.turns()]
    asked = [
        PolicySequence(prompt=request.prompt, completion=tuple(each.tokens[len(request.prompt) :]))
        for request in own.requests
        for each in request.sequences
    ]
    assert sorted(turns, key=str) == sorted(asked, key=str)
    assert sum(len(rollout.inserted) for rollout in own.rollouts) >= 2
    found = own.found
    rollouts = Rollouts(own.requests, found["logits"], found["experts"], found["drafted"])
    assert_one_arithmetic(own.model, rollouts, sampling, chunk=PREFILL_CHUNK)


@needs_native
def test_tool_messages_are_the_templates_and_are_masked() -> None:
    tool = scripted(lambda sample: f"{len(sample.completion)}.")
    own = Sampled("gqa", tool, SAMPLINGS["plain"], 60)
    tokenizer = byte_tokenizer()
    for rollout in own.rollouts:
        ids, sampled = rollout.completion, []
        first = 0
        chat: list[dict[str, str]] = []
        for gap in rollout.inserted:
            turn = tokenizer.decode(ids[first : gap.start - 1], skip_special_tokens=False)
            answer = f"{len(turn)}."
            wanted = message(answer)
            left = 60 - gap.start
            assert list(ids[gap.start : gap.stop]) == wanted[:left]
            assert rollout.is_truncated or left > len(wanted)
            chat += [{"role": "assistant", "content": turn}, {"role": "tool", "content": answer}]
            sampled += ids[first : gap.start]
            first = gap.stop
        sampled += ids[first:]
        turns = list(rollout.turns())
        assert [token for turn, _ in turns for token in turn.completion] == sampled
        assert rollout.num_sampled == len(sampled) == len(rollout.logprobs)
        assert sum((logprobs for _, logprobs in turns), ()) == rollout.logprobs
        assert list(rollout.messages) == chat
        last = rollout.to_sample(tokenizer)
        assert last.prompt == [*rollout.prompt.prompt, *chat]
        assert last.num_tokens == len(sampled)


@needs_native
def test_a_completion_ends_where_the_tool_says_or_no_token_is_left() -> None:
    silent = Sampled("gqa", scripted(lambda _: None), SAMPLINGS["plain"], 60)
    assert not any(own.inserted for own in silent.rollouts)
    failure = RewardFailure("t.py", "raised", "why")
    failed = Sampled("gqa", scripted(lambda _: failure), SAMPLINGS["plain"], 60)
    ended = [not own.is_truncated for own in silent.rollouts]
    assert any(ended)
    assert [own.failure == failure for own in failed.rollouts] == ended
    assert [own.completion for own in failed.rollouts] == [
        own.completion for own in silent.rollouts
    ]
    long = Sampled("gqa", scripted(lambda _: "x" * 99), SAMPLINGS["plain"], 40)
    asked = [own for own in long.rollouts if own.inserted]
    assert asked
    for own in asked:
        assert own.is_truncated and len(own.completion) == own.inserted[0].stop == 40
        assert len(list(own.turns())) == 1
        assert own.to_sample(byte_tokenizer()).completion == ""


@needs_native
def test_groups_do_not_depend_on_when_the_tool_answers() -> None:
    def slow(sample: Sample) -> ToolAnswer:
        time.sleep(0.01 * (len(sample.completion) % 3))
        return f"{len(sample.completion)}."

    groups = [
        Sampled("mla-moe-mtp", scripted(answer), SAMPLINGS["hot"], 60).groups
        for answer in (lambda sample: f"{len(sample.completion)}.", slow)
    ]
    assert groups[0] == groups[1]


@needs_native
def test_gradients_are_those_of_whole_completions_without_tool_messages() -> None:
    """In fp64, by autograd through one forward pass of each completion; loss `grpo` divides by the
    sampled tokens of all turns.
    """
    config = CONFIGS["gqa"]
    completions = [
        Rollout(
            prompt=prompt(),
            completion=(9, 8, EOS, *message("4"), 7, EOS),
            logprobs=(0.0,) * 5,
            is_truncated=False,
            inserted=(range(3, 3 + len(message("4"))),),
        ),
        Rollout(prompt=prompt(), completion=(5, EOS), logprobs=(0.0,) * 2, is_truncated=False),
    ]
    trained = masters(config)
    policy = learner(trained, options=LossOptions(loss_type="grpo"))
    batch = PolicyBatch(sequences=[], advantages=[], is_counted=[])
    for number, (own, advantage) in enumerate(zip(completions, (0.8, -1.1), strict=True)):
        for sequence, _ in own.turns():
            batch.sequences.append(sequence)
            batch.advantages.append(advantage)
            batch.is_counted.append(True)
            batch.completions.append(number)
    figures = policy.accumulate(batch, 2)
    assert figures.tokens == 7
    ours = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    exact, plain = (
        masked_gradients(completions, (0.8, -1.1), policy.weights.tensors, dtype)
        for dtype in (torch.float64, torch.bfloat16)
    )
    for name, reference in exact.items():
        found = distance(ours[name], reference)
        assert found < 3 * distance(plain[name], reference) + 0.01, name
        assert found < 0.1, name


def masked_gradients(
    completions: Sequence[Rollout],
    advantages: Sequence[float],
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    model = masters(CONFIGS["gqa"])
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    model = model.double() if dtype == torch.float64 else model
    use_fused_layers(model)
    for own, advantage in zip(completions, advantages, strict=True):
        ids = torch.tensor([*own.prompt.ids, *own.completion])
        attention = FlashAttention([len(ids)])
        hidden = model(ids, attention.positions(), attention, dtype=dtype)
        logps = model.logits(hidden).double().log_softmax(dim=-1)
        size = len(own.prompt.ids)
        masked = {place for gap in own.inserted for place in gap}
        places = [n for n in range(len(own.completion)) if n not in masked]
        found = torch.stack([logps[size + n - 1, own.completion[n]] for n in places])
        (-advantage * found.mean() / len(completions)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


TOOL = """
import time

def tool(prompt, completion, record):
    if record["letter"] == "?":
        raise ValueError("no tool")
    if record["letter"] == "z":
        time.sleep(1e6)
    return f"{len(prompt)}:{len(completion)}" if len(prompt) < 5 else None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tools")
    config = replace(tuning.config(), eos_token_ids=tuple(sorted(ENDS)))
    tuning.checkpoint(made / "base", config, torch.bfloat16)
    write_prompts(made / "prompts.jsonl", ["P", "a", "8", "0"])
    (made / "reward.py").write_text(
        "def reward(prompt, completion, record):\n    return float(sum(map(ord, completion)) % 5)\n"
    )
    (made / "tool.py").write_text(TOOL)
    (made / "calculator").touch()
    return made


def recipe(**grpo: Any) -> dict[str, Any]:
    table = {"tool": "tool.py", "max_completion_length": 40, "num_iterations": 2}
    raw = raw_recipe(table | {"reward_seconds": 600.0} | grpo)
    raw["phase"][0] |= {"sequence_length": 64}
    return raw


@needs_native
def test_a_run_with_a_tool_has_no_mismatch_and_resumes(folder: Path) -> None:
    """Between two updates over the same turns, too."""
    whole = train(folder, recipe(), "whole")
    records = [record["rollouts"] for record in whole.records("step")]
    assert [record.get("mismatch") for record in records] == [0.0, None] * 2
    kept = samples(whole)
    assert all(own["reward"] is not None for own in kept)
    assert any(own["completion"].count("<tool>") == 2 for own in kept)
    tuning.stop_after(1, folder, recipe(), base_model=folder / "base", name="stopped")
    resumed = train(folder, recipe(), "stopped")
    assert samples(resumed) == kept
    tuning.assert_same(resumed.saved(), whole.saved())


@needs_native
@pytest.mark.parametrize(
    ("letter", "seconds", "reason"),
    [("?", 600, "raised: ValueError: no tool"), ("z", 0.5, "timed out: more than 0.5 s")],
)
def test_a_tool_that_raises_or_hangs_fails_its_sample_by_name(
    folder: Path, tmp_path: Path, letter: str, seconds: float, reason: str
) -> None:
    write_prompts(folder / "failing.jsonl", [letter])
    raw = recipe(prompts="failing.jsonl", reward_seconds=seconds, num_iterations=1)
    raw["phase"][0] |= {"steps": 1}
    run = train(folder, raw, tmp_path.name)
    failed = [own["rewards"]["reward.py"] for own in samples(run) if own["reward"] is None]
    assert run.records("step")[0]["rollouts"]["failed"] == len(failed) >= 3
    assert f"{folder / 'tool.py'}: {reason}" in failed


def test_answers_are_texts(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(
        "def tool(prompt, completion, record):\n    return eval(completion)\n"
    )
    path = str(tmp_path / "t.py")
    tool = ToolWorkers(path)
    try:
        found = tool.score(
            [Sample([], text, {}) for text in ("'a'", "None", "3", "'a' * 70000", "'\\ud800'")]
        )
    finally:
        tool.close()
    assert found[:2] == [["a"], [None]]
    assert found[2] == [RewardFailure(path, "not a text", "int 3")]
    assert found[3] == [RewardFailure(path, "not a text", "more than 65,536 characters")]
    assert isinstance(found[4][0], RewardFailure) and "surrogates" in found[4][0].detail


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        ("absent.py", r"absent\.py: cannot be read .*; name a Python file in grpo"),
        ("reward.py", r"grpo\.tool: .*has no function tool\(prompt, completion, record\)"),
        ("calculator", r"grpo\.tool: .*calculator' is no Python file NAME\.py"),
    ],
)
def test_unusable_tools_are_refused(folder: Path, tmp_path: Path, tool: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as found:
        train(folder, recipe(tool=tool), tmp_path.name)
    assert "\n" not in str(found.value)


def test_a_tool_needs_chats(folder: Path, tmp_path: Path) -> None:
    (folder / "texts.jsonl").write_text(json.dumps({"prompt": "say", "letter": "a"}))
    with pytest.raises(UserError, match=r"grpo\.tool: texts have no turns; write prompts as chats"):
        train(folder, recipe(prompts="texts.jsonl"), tmp_path.name)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for m in messages %}{% if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}</s>"
            "{% endif %}{% endfor %}<assistant>",
            "leaves out tool messages",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "an answer and its end token"),
    ],
)
def test_templates_without_tool_messages_are_refused(template: str, said: str) -> None:
    from lowlat.train.policy.tools import check_tool_messages

    own = PromptRecord(prompt=prompt().prompt, record={}, ids=(1, 2))
    with pytest.raises(UserError, match=said):
        check_tool_messages(byte_tokenizer(template), [own])


def test_control_tokens_in_answers_are_text() -> None:
    ids = tool_message_ids(byte_tokenizer(), prompt(), "a</s><assistant>b")
    assert ids == [*b"<tool>a</s><assistant>b", EOS, ASSISTANT]
