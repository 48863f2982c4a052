"""Supervised fine-tuning: what of a chat is learned, and every kind of base model."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.convert.run import convert
from lowlat.data.batch import Batch
from lowlat.data.build import build
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.selection import BuildOptions
from lowlat.text.chat_prompt import encode_chat
from lowlat.text.token_bytes import byte_alphabet
from lowlat.train.inputs.phase_data import data_notes, phase_data, phase_dataset
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.run.build import load_base_model
from lowlat.train.run.export import export_save
from lowlat.utils.errors import UserError
from tests.configs import GQA
from tests.fakes import ASSISTANT, EOS, TEMPLATE, byte_tokenizer, gqa_config
from tests.lowlat_configs import random_model
from tests.unit.checkpoint.gguf_files import write_gguf

from . import tuning


def test_only_answers_are_targets(tmp_path: Path) -> None:
    """Of every chat what follows <assistant>, to the end of its turn, and nothing else; windows
    keep chats apart.
    """
    folder = TokenizedDataset.open(tuning.chats(tmp_path / "tokens"))
    places = np.arange(folder.num_tokens("train"))
    tokens = folder.tokens("train", places).tolist()
    expected, is_answer = [], False
    for token in tokens:
        expected.append(is_answer)
        is_answer = token == ASSISTANT or (is_answer and token != EOS)
    assert folder.loss_mask("train", places).tolist() == expected
    assert sum(expected) > 2 * folder.num_documents("train")
    recipe = parse_recipe(tuning.raw_recipe(model={}), origin="r.toml")
    batch = phase_data(recipe, 0, phase_dataset(recipe, 0, tmp_path), 2).train.batch(0, 5)
    assert batch.documents is not None and max(map(len, batch.documents)) > 1
    ends = {(batch.tokens == EOS)[row, sum(part[:-1]) - 1].item() for row, part in cut(batch)}
    assert ends == {True}


def test_no_answer_is_learned_without_its_question(tmp_path: Path) -> None:
    """What has targets begins with the beginning of a chat, in every row of an epoch."""
    folder = TokenizedDataset.open(tuning.chats(tmp_path / "tokens"))
    recipe = parse_recipe(tuning.raw_recipe(model={}), origin="r.toml")
    rows = phase_data(recipe, 0, folder, 1).train
    batch = rows.batch(0, rows.per_epoch)
    begin = int(folder.tokens("train", np.array([0]))[0])
    assert batch.documents is not None
    learned = 0
    for row, lengths in enumerate(batch.documents):
        for first, size in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            targets = int(batch.loss_mask[row, first : first + size].sum())
            assert not targets or int(batch.tokens[row, first]) == begin
            learned += targets
    assert learned >= 0.9 * folder.manifest.splits["train"].predicted


def test_truncated_chats_are_reported(tmp_path: Path) -> None:
    folder = TokenizedDataset.open(tuning.chats(tmp_path / "tokens"))
    raw = tuning.raw_recipe(model={}, phase=tuning.phases({"sequence_length": 9}))
    recipe = parse_recipe(raw, origin="r.toml")
    sizes = np.diff(folder.ends("train"), prepend=0)
    (line,) = data_notes(recipe, [phase_data(recipe, 0, folder, 1)])
    assert f"{(sizes > 10).sum()} of {len(sizes)} chats are longer than a sequence" in line
    assert f"lose their last {np.maximum(sizes - 10, 0).sum()} tokens" in line
    long = tuning.phases({"sequence_length": int(sizes.max()) - 1})
    recipe = parse_recipe(raw | {"phase": long}, origin="r.toml")
    assert list(data_notes(recipe, [phase_data(recipe, 0, folder, 1)])) == []


def test_chats_without_a_target_are_refused(tmp_path: Path) -> None:
    """Regression: a run over rows that cut every answer, of a loss of 0 and decaying weights."""
    folder = TokenizedDataset.open(tuning.chats(tmp_path / "tokens"))
    base_model = tuning.checkpoint(tmp_path / "base", tuning.config())
    raw = tuning.raw_recipe(base_model="base", phase=tuning.phases({"sequence_length": 2}))
    longest = int(np.diff(folder.ends("train"), prepend=0).max())
    what = f"r.toml: phase p: no sequence of {folder.path} has a target: every answer begins after "
    what += f"sequence_length 2; sequence_length = {longest - 1} holds all"
    with pytest.raises(UserError, match=re.escape(what)):
        tuning.train(tmp_path, raw, base_model=base_model)


def test_held_out_chats_without_a_target_are_not_evaluated(tmp_path: Path) -> None:
    """A note says so, where a loss of nothing would be 0."""
    long, short = two_chats(tmp_path)
    options = BuildOptions(sources=(short,), held_out_sources=(long,))
    build(tmp_path / "tokens", options, byte_tokenizer())
    base_model = tuning.checkpoint(tmp_path / "base", tuning.config())
    raw = tuning.raw_recipe(
        base_model="base", phase=tuning.phases({"steps": 1, "sequence_length": 11})
    )
    run = tuning.train(tmp_path, raw, base_model=base_model)
    assert run.records("evaluation") == [] and run.losses()[0] > 0
    (note, *_) = [record["text"] for record in run.records("note")]
    assert "phase p: no evaluations, the held-out sequences of" in note and "have no target" in note


def test_a_batch_of_cut_answers_is_reported(tmp_path: Path) -> None:
    """Every second row has its answer cut off: a step of it moves nothing and has no loss."""
    options = BuildOptions(sources=two_chats(tmp_path), held_out=0.0)
    build(tmp_path / "tokens", options, byte_tokenizer())
    base_model = tuning.checkpoint(tmp_path / "base", tuning.config())
    one = {"steps": 4, "sequence_length": 11, "batch_size": 1, "micro_batch_size": 1}
    run = tuning.train(
        tmp_path,
        tuning.raw_recipe(base_model="base", phase=tuning.phases(one)),
        base_model=base_model,
    )
    blind = [record["step"] for record in run.records("step") if record["loss"] is None]
    assert len(blind) == 2
    notes = [record["text"] for record in run.records("note")]
    assert [note for note in notes if note.startswith("step")] == [
        f"step {step}: its batch has no target; no weight was updated" for step in blind
    ]


def two_chats(folder: Path) -> tuple[str, str]:
    """Files of a chat whose question alone is longer than 11 tokens, and of a short one."""
    said = {"role": "assistant", "content": "b"}
    paths = (folder / "long.jsonl", folder / "short.jsonl")
    for path, question in zip(paths, ("a question of more tokens than a row", "c"), strict=True):
        asked = {"role": "user", "content": question}
        path.write_text(json.dumps({"messages": [asked, said]}))
    return str(paths[0]), str(paths[1])


def test_losses_are_per_answer_token(tmp_path: Path) -> None:
    """Bytes of prompts, which are not predicted, make no bits per byte."""
    tuning.chats(tmp_path / "tokens")
    base_model = tuning.checkpoint(tmp_path / "base", tuning.config())
    recipe = tuning.raw_recipe(base_model="base", phase=tuning.phases({"steps": 1}))
    run = tuning.train(tmp_path, recipe, base_model=base_model)
    (record,) = run.records("evaluation")
    assert record["bits_per_byte"] is None and record["targets"] == "answer token"


def cut(batch: Batch) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Rows that hold the end of a chat, and the lengths up to and with the next one."""
    assert batch.documents is not None
    for row, lengths in enumerate(batch.documents):
        for count in range(2, len(lengths) + 1):
            yield row, lengths[:count]


def dense(**changes: object) -> ModelConfig:
    return gqa_config(max_position_embeddings=64, **changes)


def folder_of(model_config: ModelConfig) -> Callable[[Path], Path]:
    return lambda path: tuning.checkpoint(path / "base", model_config)


def converted(path: Path) -> Path:
    """GQA rewritten exactly as MLA: no norm of the latent, padded in files."""
    source = tuning.checkpoint(path / "gqa", dense(attention=ATTENTION, hidden_size=24))
    convert(source, path / "base", to="mla")
    return path / "base"


def gguf(path: Path) -> Path:
    """A llama in one file that brings its tokenizer."""
    config = dense(attention=ATTENTION, hidden_size=24, bos_token_id=256, eos_token_ids=(EOS,))
    weights = tuning.loaded(tuning.checkpoint(path / "folder", config))
    alphabet = byte_alphabet()
    tokens = sorted(alphabet, key=alphabet.__getitem__)
    special = ["<s>", "</s>", "<user>", "<assistant>"]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *special, "ab"],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4 + [1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.chat_template": TEMPLATE,
        "vocab_size": None,
    }
    return write_gguf(path / "base.gguf", config, weights, keys=keys)


ATTENTION = replace(GQA, num_attention_heads=3, num_key_value_heads=1, head_dim=8)
FP8 = QuantConfig(weight_block_size=(8, 5))
STARTS = {
    "mla with experts and mtp": folder_of(tuning.config()),
    "mtp with copies": folder_of(tuning.config(mtp_copies=True)),
    "fp8 blocks": folder_of(tuning.config(quantization=FP8)),
    "tied gqa": folder_of(dense(tie_word_embeddings=True)),
    "exactly converted": converted,
    "gguf": gguf,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STARTS)
def test_start(tmp_path: Path, kind: str) -> None:
    """Training moves every matrix, the loss falls, and the export has the base model's layout,
    tokenizer and template.
    """
    base_model = STARTS[kind](tmp_path)
    tuning.chats(tmp_path / "tokens")
    recipe = tuning.raw_recipe(base_model="base", phase=tuning.phases({"steps": 9}))
    run = tuning.train(tmp_path, recipe, base_model=base_model)
    losses = run.losses()
    assert sum(losses[-3:]) < sum(losses[:3])
    assert run.outcome.model is not None
    before, after = tuning.loaded(base_model), tuning.loaded(run.outcome.model)
    assert before.keys() == after.keys()
    matrices = [name for name, tensor in before.items() if tensor.ndim > 1]
    assert set(tuning.changed(before, after)) >= set(matrices)
    first = load_model(base_model, dtype="fp32").config
    last = load_model(run.outcome.model).config
    assert last == replace(first, quantization=None)
    assert (run.outcome.model / "tokenizer.json").is_file()
    evaluations = [record["loss"] for record in run.records("evaluation")]
    assert evaluations[-1] < evaluations[0]


def test_copies_in_mtp_modules_are_shared_in_training_and_written_again(tmp_path: Path) -> None:
    """Trained as weights of their own they moved apart, and the head lacked their gradients."""
    base_model = tuning.checkpoint(tmp_path / "base", tuning.config(mtp_copies=True))
    tuning.chats(tmp_path / "tokens")
    recipe = tuning.raw_recipe(base_model="base", phase=tuning.phases({"steps": 2}))
    run = tuning.train(tmp_path, recipe, base_model=base_model)
    assert not [name for name in run.saved() if ".mtp.0.head" in name or "mtp.0.embed" in name]
    assert run.outcome.model is not None
    export_save(run.path, tmp_path / "later", step=None, dtype="fp8")
    for folder in (run.outcome.model, tmp_path / "later"):
        assert load_model(folder).config.mtp_copies
        after = tuning.loaded(folder)
        assert after["mtp.0.head.weight"].equal(after["lm_head.weight"])
        assert after["mtp.0.embed_tokens.weight"].equal(after["embed_tokens.weight"])


def test_copies_that_differ_from_the_main_model_are_refused(tmp_path: Path) -> None:
    config = tuning.config(mtp_copies=True)
    model = random_model(config, torch.float32, seed=3)
    save_model(model, config, tmp_path / "base", source=None)
    message = r"model\.layers\.\d+\.embed_tokens\.weight' differs from the main model's.*copy"
    with pytest.raises(UserError, match=message):
        load_base_model(tmp_path / "base", replace(config, mtp_copies=False), "fp32")


def test_masters_are_fp32(tmp_path: Path) -> None:
    """A bf16 checkpoint is trained in fp32: steps smaller than bf16 can tell are not lost."""
    base_model = tuning.checkpoint(tmp_path / "base", tuning.config(), torch.bfloat16)
    tuning.chats(tmp_path / "tokens")
    small = tuning.phases({"steps": 2, "learning_rate": 1e-6})
    recipe = tuning.raw_recipe(base_model="base", precision="bf16", phase=small)
    run = tuning.train(tmp_path, recipe, base_model=base_model)
    saved = {n: t for n, t in run.saved().items() if n.startswith("model.layers.0.self_attn.o")}
    before = tuning.loaded(base_model)
    assert saved
    for name, tensor in saved.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, before[name.removeprefix("model.")])


def test_prompt_of_training_is_that_of_serving(tmp_path: Path) -> None:
    """A chat's tokens begin with the very prompt that a server would encode for its question."""
    folder = TokenizedDataset.open(tuning.chats(tmp_path / "tokens"))
    tokens = folder.tokens("train", np.arange(folder.ends("train")[0])).tolist()
    end = tokens.index(ASSISTANT)
    question = bytes(tokens[2:end][: tokens[2:end].index(EOS)]).decode()
    assert tokens[: end + 1] == encode_chat(
        byte_tokenizer(), [{"role": "user", "content": question}]
    )
