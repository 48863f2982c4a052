"""POST /tokenize and /detokenize."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.fakes import ASSISTANT, BOS, EOS, USER

from .fake_engine import NAME


def test_text(client: TestClient) -> None:
    body = {"model": NAME, "prompt": "aé<s>", "return_token_strs": True}
    answer = client.post("/tokenize", json=body).json()
    assert answer["tokens"] == [97, 0xC3, 0xA9, BOS]
    assert answer["token_strs"] == ["a", "\ufffd", "\ufffd", "<s>"]
    assert (answer["count"], answer["max_model_len"]) == (4, 97)


def test_chat(client: TestClient) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
    answer = client.post("/tokenize", json=body).json()
    assert answer["tokens"] == [BOS, USER, 97, EOS, ASSISTANT]
    assert answer["token_strs"] is None


def test_ids(client: TestClient) -> None:
    body = {"model": NAME, "tokens": [97, 0xC3, 0xA9, EOS]}
    assert client.post("/detokenize", json=body).json() == {"prompt": "aé</s>"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/detokenize", {"tokens": []}, "tokens"),
        ("/detokenize", {"tokens": [263]}, "tokens"),
        ("/detokenize", {"tokens": [1 << 31]}, "tokens[0]"),
    ],
)
def test_refusals(client: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    response = client.post(path, json={"model": NAME, **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
