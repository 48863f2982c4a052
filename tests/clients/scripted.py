"""A server whose model follows a script: a function from the prompt's text to the answer.

All but the engine is real: sockets, HTTP, routes, chat template, tool-call parser.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowlat.generate.params import SamplingParams
from lowlat.serve.generation import Generation
from tests.abuse.local import Local, listening
from tests.unit.serve.fake_engine import Answer, FakeEngine, tiny
from tests.unit.serve.templates import tokenizer_of

Script = Callable[[str], str]


@dataclass
class ScriptedEngine(FakeEngine):
    """Answers every prompt with `script` of its text, and keeps the prompts."""

    script: Script = str
    prompts: list[str] = field(default_factory=list)

    async def submit(
        self, prompt: Sequence[int], params: SamplingParams, **options: Any
    ) -> Generation:
        text = self.model.tokenizer.decode(prompt, skip_special_tokens=False)
        self.prompts.append(text)
        self.answer = Answer(text=self.script(text))
        return await super().submit(prompt, params, **options)


@contextlib.contextmanager
def scripted(
    script: Script, *, family: str = "hermes", context: int = 1 << 20
) -> Iterator[tuple[Local, ScriptedEngine]]:
    """A server of a model with the chat template of `family`, and its engine."""
    engine = ScriptedEngine(model=tiny(tokenizer_of(family), context=context), script=script)
    with listening(engine=engine) as server:
        yield server, engine
