"""Vercel's AI SDK (npm ai) with its provider for OpenAI-compatible servers."""

import json
import shutil
from pathlib import Path

import pytest

from .npm import FOLDER, run, script
from .scripted import scripted

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.slow
def test_text_stream_tools_and_objects(tmp_path: Path) -> None:
    script("ai/dist/index.mjs")  # skips the test if it is not installed

    def answer(prompt: str) -> str:
        asked = prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        match asked:
            case "tool":
                return "It rains." if "Rain in Oslo" in prompt else CALL
            case "object":
                return '{"isGood": true}'
            case _:
                return f"You said {asked}"

    with scripted(answer) as (server, engine):
        command = [str(shutil.which("node")), str(FOLDER / "ai_sdk.mjs")]
        url = f"http://127.0.0.1:{server.port}/v1"
        done = run([*command, url, engine.model.name], home=tmp_path, cwd=tmp_path, env={})
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "text": "You said text",
        "usage": len("You said text"),
        "streamed": "You said stream",
        "called": "It rains.",
        "steps": 2,
        "object": {"isGood": True},
    }
