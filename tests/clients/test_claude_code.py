"""Claude Code (npm @anthropic-ai/claude-code) edits a file through /v1/messages."""

import json
from pathlib import Path

import pytest

from tests.unit.serve.fake_engine import NAME

from .npm import run, script
from .scripted import scripted

QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}
RESULT = "<|im_start|>tool\n"
"""Begins a tool result in a prompt."""


def tool_call(name: str, **arguments: str) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


@pytest.mark.slow
def test_a_file_is_edited(tmp_path: Path) -> None:
    command = script("@anthropic-ai/claude-code/cli-wrapper.cjs")
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    file = work / "greeting.py"
    file.write_text('print("helo")\n')
    path = str(file)
    steps = [
        "I read it." + tool_call("Read", file_path=path),
        tool_call("Edit", file_path=path, old_string="helo", new_string="hello"),
        "The greeting is right now.",
    ]

    def answer(prompt: str) -> str:
        return steps[min(prompt.count(RESULT), len(steps) - 1)]

    with scripted(answer) as (server, engine):
        env = {
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{server.port}",
            "ANTHROPIC_API_KEY": "none",
            "ANTHROPIC_MODEL": NAME,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": NAME,
            **QUIET,
        }
        options = ["--permission-mode", "acceptEdits", "--output-format", "json"]
        done = run(
            [*command, "--print", "Fix the spelling in greeting.py", *options],
            home=home,
            cwd=work,
            env=env,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["is_error"], result["num_turns"]) == (False, 3), result
    assert result["result"] == steps[-1]
    assert file.read_text() == 'print("hello")\n'
    # The file reached the model, and the success of the edit.
    (last,) = [prompt for prompt in engine.prompts if prompt.count(RESULT) == 2]
    assert 'print("helo")' in last and "has been updated" in last
