"""/v1/embeddings and /api/embed: transformers' hidden states, pooled by the written formula."""

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest
import torch
import transformers

import lowlat
from lowlat.config.hf.sentence_transformers import Pooling, read_pooling
from lowlat.engine.request import PoolingMode
from lowlat.generate.model import Model
from lowlat.utils.errors import UserError
from tests.abuse.local import Local, listening, until
from tests.fakes import byte_tokenizer, gqa_config, tiny_model

PROMPTS = [[7, 3, 11, 2, 5], [13], [4, 4, 9, 1, 8, 6, 17], list(range(2, 103))]
SIZES = {
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
BASES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaModel),
    "mistral": (transformers.MistralConfig, transformers.MistralModel),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2Model),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3Model),
}
FIELDS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def write_modules(folder: Path, *kinds: str, **pooling: object) -> None:
    """The files of sentence-transformers next to a model."""
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"x.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


def oracle(model: Any, ids: list[int], mode: PoolingMode) -> np.ndarray:
    """The formula: hidden state of the first or the last token, or the mean over all of them."""
    with torch.inference_mode():
        states = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    return {"cls": states[0], "mean": states.mean(0), "lasttoken": states[-1]}[mode]


@contextlib.contextmanager
def embedding_server(model: Model) -> Iterator[tuple[Local, openai.OpenAI]]:
    with listening(model) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield server, client


@pytest.mark.parametrize(
    ("family", "mode", "normalize"),
    [
        ("llama", "mean", False),
        ("mistral", "lasttoken", True),
        ("qwen2", "cls", True),
        ("qwen3", "lasttoken", False),
        ("qwen3", "mean", True),
    ],
)
def test_embeddings_are_pooled_hidden_states(
    tmp_path: Path, family: str, mode: PoolingMode, normalize: bool
) -> None:
    kind, base = BASES[family]
    torch.manual_seed(5)
    extra = {"head_dim": 6} if family == "qwen3" else {}
    reference = base(kind(**SIZES, **extra)).float().eval()
    reference.save_pretrained(tmp_path)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    write_modules(tmp_path, *kinds, **{name: key == mode for key, name in FIELDS.items()})
    model = lowlat.load(tmp_path, dtype="fp32")
    with pytest.raises(UserError, match="generates no text"):
        model.generate(PROMPTS[0])
    with embedding_server(model) as (_, client):
        answer = client.embeddings.create(model=model.name, input=PROMPTS, encoding_format="float")
    assert answer.usage.prompt_tokens == sum(map(len, PROMPTS))
    for ids, item in zip(PROMPTS, answer.data, strict=True):
        expected = oracle(reference, ids, mode)
        if normalize:
            expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(item.embedding, expected, rtol=1e-5, atol=1e-5)


def embedding_model(mode: PoolingMode = "mean", *, normalize: bool = False) -> Model:
    """An embedding model of random weights in bf16, on native kernels where there are some."""
    config = gqa_config(max_position_embeddings=6000)
    pooling = Pooling(mode=mode, normalize=normalize)
    model = tiny_model(config, torch.bfloat16)
    return Model(model, byte_tokenizer(), name="embedder", pooling=pooling)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_the_same_bits_alone_and_in_a_batch(mode: PoolingMode) -> None:
    """Also of a prompt that is prefilled in several chunks."""
    model = embedding_model(mode)
    if not model.runner.is_batch_invariant:
        pytest.skip("needs native kernels")
    texts = ["a", "some words", "word " * 1000, "a", "ab" * 40]
    with embedding_server(model) as (server, client):

        def embed(given: list[str]) -> list[list[float]]:
            answer = client.embeddings.create(model=model.name, input=given)
            return [item.embedding for item in answer.data]

        together = embed(texts)
        assert [embed([text])[0] for text in texts] == together
        assert together[0] == together[3] != together[1]
        until(lambda: server.is_idle)
        server.model.engine.check_integrity()


def test_many_texts_are_embedded_in_their_order() -> None:
    """More than the queue holds."""
    model = embedding_model()
    texts = [f"text {i}" for i in range(300)]
    with embedding_server(model) as (_, client):
        data = client.embeddings.create(model=model.name, input=texts).data
        last = client.embeddings.create(model=model.name, input=texts[-1]).data
    assert [item.index for item in data] == list(range(300))
    np.testing.assert_allclose(data[-1].embedding, last[0].embedding, atol=1e-2)
    assert len({tuple(item.embedding) for item in data}) == 300


def test_dimensions_and_formats() -> None:
    model = embedding_model()
    with embedding_server(model) as (server, client):

        def vector(**options: Any) -> np.ndarray:
            given = {"model": model.name, "input": "Hello", **options}
            return np.array(client.embeddings.create(**given).data[0].embedding)

        whole = vector(encoding_format="float")
        cut = vector(dimensions=5, encoding_format="float")
        np.testing.assert_allclose(cut, whole[:5] / np.linalg.norm(whole[:5]), rtol=1e-6)
        url = f"http://127.0.0.1:{server.port}"
        body = {"model": model.name, "input": list(b"Hello"), "encoding_format": "base64"}
        reply = httpx.post(f"{url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
        stored = np.frombuffer(base64.b64decode(reply), dtype="<f4")
        assert stored.tolist() == whole.tolist()
        with contextlib.closing(ollama.Client(host=url)) as other:
            pair = other.embed(model.name, ["Hello", "x"], keep_alive="5m")
            np.testing.assert_allclose(pair.embeddings[0], whole / np.linalg.norm(whole), rtol=1e-6)
            assert "embedding" in (other.show(model.name).capabilities or [])
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            vector(dimensions=1000)
        with pytest.raises(openai.BadRequestError, match="context"):
            vector(input="x" * 7000)
        with pytest.raises(openai.BadRequestError, match="generates no text"):
            client.completions.create(model=model.name, prompt="Hello")


def test_other_models_say_why_they_have_none() -> None:
    model = Model(tiny_model(gqa_config()), byte_tokenizer(), name="talker")
    with embedding_server(model) as (_, client):
        with pytest.raises(openai.NotFoundError, match=r"no modules.json") as missing:
            client.embeddings.create(model="talker", input="x")
    assert missing.value.code == "not_an_embedding_model"


@pytest.mark.parametrize(
    ("kinds", "pooling", "words"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_cls_token": True}, "Dense"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        (["Transformer", "Pooling"], {}, "nothing"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pooling_mode_mean_tokens",
        ),
    ],
)
def test_other_poolings_are_refused(
    tmp_path: Path, kinds: list[str], pooling: dict[str, bool], words: str
) -> None:
    write_modules(tmp_path, *kinds, **pooling)
    with pytest.raises(UserError, match=words):
        read_pooling(tmp_path)


def test_newer_files_name_the_mode(tmp_path: Path) -> None:
    write_modules(tmp_path, "Transformer", "Pooling", "Normalize", pooling_mode="lasttoken")
    assert read_pooling(tmp_path) == Pooling(mode="lasttoken", normalize=True)
    assert read_pooling(tmp_path / "none") is None


def test_a_base_model_alone_is_no_language_model(tmp_path: Path) -> None:
    """Its head would be made up."""
    kind, base = BASES["llama"]
    base(kind(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="architectures"):
        lowlat.load(tmp_path, dtype="fp32")
