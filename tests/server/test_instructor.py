"""instructor, unmodified."""

import instructor
import openai
import pytest
from pydantic import BaseModel

from .conftest import KEY, Server
from .tiny_server import NAME

pytestmark = pytest.mark.slow

MODES = (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA)
MESSAGES = [{"role": "user", "content": "Hello"}]


class Verdict(BaseModel):
    """A judgement."""

    is_good: bool


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_a_response_model(server: Server, mode: instructor.Mode) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        answer = instructor.from_openai(client, mode=mode).chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            response_model=Verdict,
            max_retries=0,
            max_tokens=300,
            seed=1,
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )
    assert isinstance(answer, Verdict)
