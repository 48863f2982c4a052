"""Codex CLI (npm @openai/codex) edits a file through /v1/responses."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowlat.serve.http.body import parse_object
from lowlat.serve.routes import endpoint

from .npm import run, script
from .scripted import scripted

BEFORE = "teh cat sat on the mat\n"
TASK = "Correct the spelling in notes.txt."
RESULT = "<|im_start|>tool\n"
"""Begins a tool result in a prompt."""


def tool_call(name: str, **arguments: str) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies of the requests that the server parses from now on."""
    bodies: list[dict[str, Any]] = []

    def parse(text: bytes) -> dict[str, Any]:
        bodies.append(parse_object(text))
        return bodies[-1]

    monkeypatch.setattr(endpoint, "parse_object", parse)
    return bodies


@pytest.mark.slow
def test_a_file_is_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = script("@openai/codex/bin/codex.js")
    home, work = tmp_path / "home", tmp_path / "work"
    (home / ".codex").mkdir(parents=True)
    work.mkdir()
    file = work / "notes.txt"
    file.write_text(BEFORE)
    steps = [
        "I read it first.\n" + tool_call("exec_command", cmd="cat notes.txt"),
        tool_call("exec_command", cmd="sed -i s/teh/the/ notes.txt && echo corrected"),
        "The spelling is right now.",
    ]

    def answer(prompt: str) -> str:
        return steps[min(prompt.count(RESULT), len(steps) - 1)]

    requests = recorded(monkeypatch)
    with scripted(answer) as (server, engine):
        provider = {
            "name": "lowlat",
            "base_url": f"http://127.0.0.1:{server.port}/v1",
            "env_key": "LOWLAT_API_KEY",
            "wire_api": "responses",
        }
        fields = ", ".join(f"{name} = {json.dumps(value)}" for name, value in provider.items())
        options = ["exec", "--skip-git-repo-check", "--model", engine.model.name]
        # The test's folder is the sandbox; containers may not allow another.
        options += ["--dangerously-bypass-approvals-and-sandbox"]
        options += ["-c", 'model_provider="lowlat"', "-c", f"model_providers.lowlat={{{fields}}}"]
        options += ["-c", "check_for_update_on_startup=false", "-c", "analytics.enabled=false"]
        env = {"LOWLAT_API_KEY": "none", "NO_COLOR": "1"}
        done = run([*command, *options, TASK], home=home, cwd=work, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert file.read_text() == BEFORE.replace("teh", "the")
    assert done.stdout.strip() == steps[-1]
    first, second, *_, last = engine.prompts
    assert TASK in first and '"name": "multi_agent_v1__spawn_agent"' in first
    assert BEFORE.strip() not in first and BEFORE.strip() in second
    assert "I read it first." in last and "corrected" in last
    # The server accepts this tool of OpenAI's and does not show it to the model.
    assert "web_search" in [tool["type"] for tool in requests[0]["tools"]]
    assert "web_search" not in first
