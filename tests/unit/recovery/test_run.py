"""Conversions with healing and evaluation: what is made, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowlat import api
from lowlat.checkpoint.load import load_model
from lowlat.convert.compression.calibration import bundled_text
from lowlat.convert.compression.plan import estimated_config
from lowlat.convert.options import CompressionOptions, RecoveryOptions
from lowlat.convert.parameters.exact_mla import check_exact
from lowlat.convert.run import convert
from lowlat.recovery.run import convert_with_recovery
from lowlat.recovery.work_folder import work_folder_path
from lowlat.train.cost.dry_run import most_memory, needed_bytes
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.run.distill import DistillationOptions, distillation_recipe
from lowlat.utils.errors import UserError
from tests.unit.convert.test_compressed_folders import LENGTH, logits, source_model
from tests.unit.convert.test_run import edit_tensors
from tests.unit.convert.texts import write_tokenizer

from . import tiny

ATTENTION = ".self_attn."


def test_a_healed_model(made: Path) -> None:
    """Its attention moved, nothing else did; everything requested is in the report."""
    told = tiny.report(made / "whole")
    source, healed = (load_model(made / name, dtype="fp32").model for name in ("source", "whole"))
    before, after = source.state_dict(), healed.state_dict()
    kept = [name for name in after if ATTENTION not in name]
    assert len(kept) > 8 and all(torch.equal(before[name], after[name]) for name in kept)
    healing = told["recovery"]
    assert healing["tokens"] == tiny.TOKENS and healing["settings"]["trainable"] == "attention"
    assert healing["divergence_after"] < healing["divergence_before"]
    assert [entry["tokens"] for entry in healing["evaluations"]] == [0, 320, 640, 1280]
    assert healing["tokens_per_second"] == pytest.approx(tiny.TOKENS / healing["seconds"])
    assert told["cache_bytes_per_token_after"] * 2 == told["cache_bytes_per_token_before"]
    for layer in told["layers"]:
        assert layer["rotary_share"] == layer["rotary"] / (layer["latent"] + layer["rotary"])
        assert min(layer[key] for key in ("predicted_error", "measured_deviation")) > 0
    names = {path.name for path in (made / "whole").iterdir()}
    assert {"tokenizer.json", "conversion.json", "conversion.svg", "config.json"} <= names
    assert not work_folder_path(made / "whole").exists()


def test_perplexities_are_those_of_eval(made: Path) -> None:
    told = tiny.report(made / "whole")["evaluation"]
    text = (made / "evaluate.txt").read_text()
    for name, folder in (("original", "source"), ("recovered", "whole")):
        score = api.load(str(made / folder)).perplexity(text)
        assert told[name]["perplexity"] == score.perplexity
        assert told[name]["window"] == LENGTH and told[name]["tokens"] == score.tokens
    assert told["compressed"]["perplexity"] != told["recovered"]["perplexity"]


@pytest.mark.slow
def test_the_same_bytes_again(made: Path) -> None:
    tiny.call(made, made / "again")
    assert tiny.contents(made / "again") == tiny.contents(made / "whole")


def test_other_programs_compute_the_same(made: Path) -> None:
    loaded = load_model(made / "whole", dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(
        made / "whole", dtype=torch.float32, experts_implementation="eager"
    )
    ids = torch.randint(263, (LENGTH,), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids[None]).logits[0].detach()
    found = logits(loaded.config, loaded.model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "dtype"), [({"dtype": "int8"}, "int8"), ({"layout": "free"}, "fp32")]
)
def test_other_forms(made: Path, tmp_path: Path, changes: dict[str, Any], dtype: str) -> None:
    """Packed numbers, and layers that differ; without an evaluation."""
    report = tiny.call(made, tmp_path / "mla", evaluate=None, **changes)
    told = tiny.report(tmp_path / "mla")
    assert told["dtype"] == dtype and "evaluation" not in told
    assert report.bits_per_weight_after < 24 if dtype == "int8" else told["layout"] == "free"
    assert load_model(tmp_path / "mla").config.packing == ("int8" if dtype == "int8" else None)


@pytest.mark.slow
def test_evaluation_alone(made: Path, tmp_path: Path) -> None:
    tiny.call(made, tmp_path / "mla", tokens=None, texts=(), dtype="bf16")
    told = tiny.report(tmp_path / "mla")
    assert set(told["evaluation"]) == {"text", "original", "compressed"}
    score = api.load(str(tmp_path / "mla")).perplexity(
        (made / "evaluate.txt").read_text(), window=LENGTH
    )
    assert told["evaluation"]["compressed"]["perplexity"] == score.perplexity
    assert "recovery" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["mla"]


def refused(made: Path, tmp_path: Path, words: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=words):
        tiny.call(made, tmp_path / changes.pop("dst", "mla"), **changes)
    assert not (tmp_path / "mla").exists() and not work_folder_path(tmp_path / "mla").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 39}, "--heal 39: is less than a sequence of 40 tokens"),
        ({"share": 0.05}, "--cache 0.05 leaves 0 of 64 channels"),
        ({"method": "best"}, "--method 'best' is unknown"),
        ({"to": None, "dtype": "bf16"}, "add --to mla"),
        ({"dst": "mla.gguf"}, r"latent without norm"),
        ({"texts": ("nowhere",)}, "--text: source 'nowhere' does not exist"),
        ({"calibrate": (Path("nowhere"),)}, "--calibrate nowhere: cannot be read"),
        ({"evaluate": Path("nowhere")}, "--evaluate nowhere: cannot be read"),
        ({"dtype": "int2"}, "--dtype 'int2' is unknown"),
    ],
)
def test_what_cannot_be_asked(
    made: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    refused(made, tmp_path, words, **changes)


@pytest.mark.parametrize(
    ("option", "content", "words"),
    [
        (
            "texts",
            b"too little",
            "--text: .*bad.txt: 0 tokens of 1 documents .* at least 41 are needed",
        ),
        ("texts", b"   \n", "--text: .*bad.txt: 0 tokens of 0 documents are for training"),
        ("texts", b"", "--text: .*bad.txt: 0 tokens of 0 documents are for training"),
        ("texts", b"caf\xe9 " * 999, "--text: .*byte 3 is not UTF-8 text; convert the file$"),
        ("texts", b"a\0b" * 999, "--text: .* contains zero bytes, so it is not text"),
        ("calibrate", b"too little", "--calibrate bad.txt: 10 tokens are too few"),
        ("calibrate", b"\xff" * 999, "--calibrate .*bad.txt: is not UTF-8"),
        ("evaluate", b"too little", "--evaluate .*bad.txt: 10 tokens are too few"),
        ("evaluate", b"\xff" * 999, "--evaluate .*bad.txt: is not UTF-8"),
        ("evaluate", b"a\0b" * 999, "--evaluate .*bad.txt: holds zero bytes"),
    ],
)
def test_unfit_text(made: Path, tmp_path: Path, option: str, content: bytes, words: str) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    value = {"texts": (str(bad),), "calibrate": (bad,), "evaluate": bad}[option]
    refused(made, tmp_path, words, **{option: value})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"content": "a"}', r"\(fields: content\); call the field 'text'$"),
        ('{"text": null}', "'text' is null, not a text; fix it$"),
        ('{"text": "a"', r"not valid JSON \(.*\); fix the line$"),
        ('{"text": "a", "messages": []}', "has both .*; leave one of them out$"),
    ],
)
def test_unfit_records(made: Path, tmp_path: Path, line: str, words: str) -> None:
    """What is to be done is something that can be done here."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f"{line}\n")
    refused(made, tmp_path, f"^--text: .*bad.jsonl: line 1: .*{words}", texts=(str(bad),))


@pytest.mark.parametrize("name", ["bad.json", "bad.csv", "bad.JSON.gz"])
@pytest.mark.parametrize("option", ["texts", "calibrate", "evaluate"])
def test_records_that_nothing_reads(made: Path, tmp_path: Path, name: str, option: str) -> None:
    bad = tmp_path / name
    bad.write_text(json.dumps([{"text": tiny.prose(300, seed=1)}]))
    value = {"texts": (str(bad),), "calibrate": (bad,), "evaluate": bad}[option]
    refused(made, tmp_path, f"{name}: this is a file of records", **{option: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("within_reach", "what"), [(4, "held out for evaluation"), (0, "for training")]
)
def test_answers_out_of_reach(made: Path, tmp_path: Path, within_reach: int, what: str) -> None:
    """Chats are read as far as a row goes: where the answers of all begin behind it, that is told
    before anything is trained.
    """
    file = tmp_path / "chats.jsonl"
    with file.open("w") as out:
        for number in range(400):
            question = "who?" if number < within_reach else tiny.prose(9, seed=number)
            said = {"user": question, "assistant": f"home {number}"}
            messages = [{"role": role, "content": text} for role, text in said.items()]
            out.write(json.dumps({"messages": messages}) + "\n")
    words = f"^--text .*chats.jsonl: no answer {what} is within the first 40 tokens of its chat"
    refused(made, tmp_path, words, texts=(str(file),))


@pytest.mark.parametrize(
    ("option", "suffix"), [("--text", ".txt"), ("--text", ".jsonl"), ("--calibrate", ".txt")]
)
def test_evaluation_text_elsewhere(made: Path, tmp_path: Path, option: str, suffix: str) -> None:
    """A copy of it within other text, in files of other names."""
    mixed = tiny.prose(300, seed=4) + (made / "evaluate.txt").read_text() + tiny.prose(9, seed=5)
    file = tmp_path / f"mixed{suffix}"
    if suffix == ".jsonl":
        pieces = [mixed[first : first + 500] for first in range(0, len(mixed), 500)]
        mixed = "\n".join(json.dumps({"text": piece}) for piece in pieces)
    file.write_text(mixed)
    changes: dict[str, Any] = {"texts": (str(file),)}
    if option == "--calibrate":
        changes = {"calibrate": (file,)}
    refused(made, tmp_path, f"of it is in the text of {option}", **changes)


@pytest.mark.parametrize("option", ["--text", "--calibrate"])
def test_evaluation_text_with_other_line_ends(made: Path, tmp_path: Path, option: str) -> None:
    """Lines shorter than the runs that are looked for, ended as on Windows."""
    lines = tiny.prose(60, seed=3).replace(" ", "\r\n")
    own, mixed = tmp_path / "own.txt", tmp_path / "mixed.txt"
    own.write_bytes(lines.encode())
    mixed.write_bytes((tiny.prose(300, seed=4) + lines).encode())
    changes: dict[str, Any] = {"texts": (str(mixed),)}
    if option == "--calibrate":
        changes = {"calibrate": (mixed,)}
    refused(made, tmp_path, f"of it is in the text of {option}", evaluate=own, **changes)


def test_the_bundled_evaluation_text(made: Path, tmp_path: Path) -> None:
    text = bundled_text()
    (tmp_path / "own.txt").write_text(text[:2000])
    changes = {"calibrate": (), "tokens": None, "texts": (), "evaluate": tmp_path / "own.txt"}
    refused(made, tmp_path, "of it is in lowlat's own calibration text", **changes)


def test_a_model_that_predicts_nothing(made: Path, tmp_path: Path) -> None:
    """Told before the work begins, and not in a report that is no JSON."""
    shutil.copytree(made / "source", tmp_path / "source")
    for name in ("heal.txt", "calibrate.txt", "evaluate.txt"):
        shutil.copy(made / name, tmp_path)
    edit_tensors(tmp_path / "source", lambda tensors: tensors["model.norm.weight"].fill_(math.inf))
    refused(tmp_path, tmp_path, "the perplexity of")


def test_the_evaluation_text_itself(made: Path, tmp_path: Path) -> None:
    """Known by its name, or as part of a folder, before anything is read."""
    text = made / "evaluate.txt"
    refused(made, tmp_path, "is also given as --text", texts=(str(made),))
    refused(made, tmp_path, "is also given as --text", texts=(str(text),))
    refused(made, tmp_path, "is also given as --calibrate", calibrate=(text,))


def test_too_little_memory_is_reported_first(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowlat.train.run.distill.usable_memory", lambda *_: 1_000_000)
    with pytest.raises(UserError, match=r"--heal: training needs about .*, 1 MB are available"):
        tiny.call(made, tmp_path / "dst")
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_the_compressed_model(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose queries are wider than the original's; nothing that fits is refused."""
    config, converted = (load_model(made / name).config for name in ("source", "whole"))
    likely = estimated_config(config, check_exact(config), 0.5, "standard")
    healing = DistillationOptions(tokens=tiny.TOKENS, sequence_length=LENGTH)
    recipe = parse_recipe(distillation_recipe(made, made, made, healing), origin="distillation")
    original, found, true = (
        needed_bytes(most_memory(each, recipe, teacher=config)[1])
        for each in (config, likely, converted)
    )
    assert original < found < true
    monkeypatch.setattr(
        "lowlat.train.run.distill.usable_memory", lambda *_: (original + found) // 2
    )
    refused(made, tmp_path, "--heal: training needs about")


def test_an_existing_destination_is_left_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "mla").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        tiny.call(made, tmp_path / "mla")
    assert (tmp_path / "mla").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mla"]


@pytest.mark.slow
def test_a_gguf_file_is_healed(made: Path, tmp_path: Path) -> None:
    """And is the teacher; its blocks of four bits become fp32."""
    folder = tmp_path / "m"
    source_model(folder, vocab_size=290)
    write_tokenizer(folder)
    convert(folder, tmp_path / "m.gguf", dtype="int4")
    convert_with_recovery(
        tmp_path / "m.gguf",
        tmp_path / "mla",
        compression=CompressionOptions(share=0.5, calibrate=(made / "calibrate.txt",)),
        recovery=RecoveryOptions(tokens=320, texts=(str(made / "heal.txt"),)),
    )
    assert tiny.report(tmp_path / "mla")["dtype"] == "fp32"
    source, healed = (load_model(tmp_path / name, dtype="fp32") for name in ("m.gguf", "mla"))
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(source.model.get_parameter(name), healed.model.get_parameter(name))


@pytest.mark.slow
def test_calibration_is_on_the_text_to_heal_on(made: Path, tmp_path: Path) -> None:
    """Unless another is given; and it is the same every time."""
    changes = {"calibrate": (), "evaluate": None}
    for name in ("a", "b"):
        tiny.call(made, tmp_path / name, **changes)
    assert tiny.contents(tmp_path / "a") == tiny.contents(tmp_path / "b")
    assert tiny.report(tmp_path / "a")["calibration"] == "the text of --text"
    assert tiny.report(made / "whole")["calibration"] == "calibrate.txt"


@pytest.mark.slow
def test_experts_are_made_of_what_was_healed(made: Path, tmp_path: Path) -> None:
    report = tiny.call(made, tmp_path / "experts", experts=4)
    assert report.experts == "4 routed, 2 active per token, 1 shared"
    assert tiny.report(tmp_path / "experts")["routed_experts"] == 4
    dense, found = (load_model(path).model for path in (made / "whole", tmp_path / "experts"))
    assert found.config.moe is not None and found.config.moe.n_routed_experts == 4
    before, after = dense.state_dict(), found.state_dict()
    kept = [name for name in before if ".mlp." not in name]
    assert len(kept) > 8 and all(torch.equal(before[name], after[name]) for name in kept)
    whole = before["layers.1.mlp.up_proj.weight"]
    halves = [
        after[f"layers.1.mlp.{name}.up_proj.weight"] for name in ("shared_experts", "experts.3")
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_experts_without_healing(made: Path, tmp_path: Path) -> None:
    tiny.call(made, tmp_path / "experts", experts=4, tokens=None, texts=())
    told = tiny.report(tmp_path / "experts")
    assert told["routed_experts"] == 4 and "recovered" not in told["evaluation"]
    assert load_model(tmp_path / "experts").config.moe is not None


def test_a_tokenizer_with_more_ids_than_the_model(made: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made / "source", source)
    file = source / "tokenizer.json"
    raw = json.loads(file.read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    raw["added_tokens"] += [
        {"id": 256 + number, "content": f"<{number}>", "special": True, **plain}
        for number in range(20)
    ]
    file.write_text(json.dumps(raw))
    with pytest.raises(
        UserError, match="its tokenizer has ids up to 279, but the model has 263 tokens"
    ):
        convert_with_recovery(
            source,
            tmp_path / "mla",
            compression=CompressionOptions(share=0.5),
            recovery=RecoveryOptions(tokens=tiny.TOKENS, texts=(str(made / "heal.txt"),)),
        )


@pytest.mark.slow
def test_evaluating_leaves_pytorch_its_threads(made: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tiny.call(made, tmp_path / "mla", tokens=None, texts=(), dtype="bf16")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
