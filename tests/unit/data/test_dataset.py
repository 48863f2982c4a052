"""Token folders opened: what is read, and every way in which one can be broken."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowlat.data.dataset import TokenizedDataset
from lowlat.utils.errors import UserError

from .conftest import END, Make, texts

Break = Callable[[Path], None]


def change(name: str, edit: Callable[[dict[str, Any]], None]) -> Break:
    """A break that edits the JSON file `name`."""

    def apply(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        edit(raw)
        (folder / name).write_text(json.dumps(raw))

    return apply


def facts(**values: Any) -> Break:
    """A break that replaces fields of tokens.json."""
    return change("tokens.json", lambda raw: raw.update(values))


def shard(**values: Any) -> Break:
    """A break that replaces fields of the first shard."""
    return change("tokens.json", lambda raw: raw["train"]["shards"][0].update(values))


def cut_short(name: str) -> Break:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def swap_ends(folder: Path) -> None:
    path = folder / "train-ends.bin"
    ends = np.fromfile(path, "<i8")
    ends[[1, 2]] = ends[[2, 1]]
    ends.tofile(path)


def make_folder_of_shard(folder: Path) -> None:
    (folder / "train-00000.bin").unlink()
    (folder / "train-00000.bin").mkdir()


def link_out(folder: Path) -> None:
    shutil.move(folder / "train-00000.bin", folder.parent / "elsewhere.bin")
    (folder / "train-00000.bin").symlink_to(folder.parent / "elsewhere.bin")


FAULTS: dict[str, tuple[Break, str]] = {
    "no facts": (lambda folder: (folder / "tokens.json").unlink(), "tokens.json: not found"),
    "broken JSON": (lambda folder: os.truncate(folder / "tokens.json", 99), "not valid JSON"),
    "a list": (lambda folder: (folder / "tokens.json").write_text("[]"), "must hold a JSON object"),
    "other format": (facts(format="x"), "not a tokenized dataset"),
    "other version": (facts(version=2), "version 2 is not 1; build the folder again"),
    "version of a string": (facts(version="1"), "version '1' is not 1"),
    "unknown field": (facts(more=1), "more .* is unknown"),
    "vocabulary of nothing": (facts(vocab_size=0), "vocab_size must be within"),
    "vocabulary of a truth": (facts(vocab_size=True), "vocab_size must be an integer"),
    "wrong type": (facts(dtype="uint32"), "dtype must be uint16 for 262 ids"),
    "end beyond": (facts(end_of_text=262), r"end_of_text must be within 0\.\.261"),
    "infilling beyond": (facts(fim={"prefix": 1, "suffix": 2, "middle": 999}), "fim.middle"),
    "infilling in part": (facts(fim={"prefix": 1, "suffix": 2}), "fim.middle is missing"),
    "no tokenizer": (facts(tokenizer={}), "tokenizer must be an object of checksums"),
    "foreign tokenizer file": (
        change("tokens.json", lambda raw: raw["tokenizer"].update({"../x": "0" * 64})),
        "tokenizer must be an object of checksums",
    ),
    "no split": (facts(held_out=None), "held_out is missing"),
    "path traversal": (shard(file="../train-00000.bin"), "file must be 'train-00000.bin'"),
    "absolute path": (shard(file="/etc/passwd"), "file must be 'train-00000.bin'"),
    "other shard": (shard(file="held_out-00000.bin"), "file must be 'train-00000.bin'"),
    "shard of more": (shard(tokens=998), r"train.shards\[0\].tokens must be 997"),
    "shard of nothing": (shard(tokens=None), r"train.shards\[0\].tokens must be 997"),
    "no checksum": (shard(sha256="00"), "sha256 must be a SHA-256"),
    "shards missing": (
        change("tokens.json", lambda raw: raw["train"]["shards"].pop()),
        "train.shards does not list",
    ),
    "shards of huge count": (
        change("tokens.json", lambda raw: raw["train"].update(tokens=2**53)),
        "train.shards does not list",
    ),
    "negative count": (
        change("tokens.json", lambda raw: raw["train"].update(tokens=-1)),
        "train.tokens must be within",
    ),
    "more documents than tokens": (
        change("tokens.json", lambda raw: raw["train"].update(documents=2**40)),
        "train.tokens contradicts documents",
    ),
    "other document count": (
        change("tokens.json", lambda raw: raw["train"].update(documents=66)),
        "train-ends.bin: has 536 bytes, not 528",
    ),
    "shard truncated": (cut_short("train-00001.bin"), r"train-00001.bin: has \d+ bytes, not 1994"),
    "ends truncated": (cut_short("train-ends.bin"), "train-ends.bin: has 535 bytes, not 536"),
    "mask truncated": (cut_short("train-mask.bin"), r"train-mask.bin: has \d+ bytes"),
    "shard empty": (lambda folder: os.truncate(folder / "train-00000.bin", 0), "is empty"),
    "shard missing": (lambda folder: (folder / "train-00000.bin").unlink(), "bin: not found"),
    "shard a folder": (make_folder_of_shard, "bin: not found"),
    "link out of the folder": (link_out, "is a link out of the folder"),
    "ends out of order": (swap_ends, "train-ends.bin: does not cut"),
}


@pytest.fixture
def folder(make_folder: Make) -> Path:
    """67 documents with targets, in several shards."""
    documents = texts(67)
    masks = [[True] * len(document) for document in documents]
    return make_folder(documents, held_out=texts(3), masks=masks, shard_tokens=997).path


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_at_open(folder: Path, fault: str) -> None:
    apply, words = FAULTS[fault]
    apply(folder)
    with pytest.raises(UserError, match=words) as raised:
        TokenizedDataset.open(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_an_absent_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; build it with lowlat data build"):
        TokenizedDataset.open(tmp_path / "absent")


def test_every_flipped_bit_is_found(folder: Path) -> None:
    """Regression: training on damaged data. Files of tokens, ends, targets and the tokenizer."""
    TokenizedDataset.open(folder).verify()
    files = [path for path in sorted(folder.iterdir()) if path.name != "tokens.json"]
    assert len(files) == 12
    draws = random.Random(7)
    for path in files * 3:
        data = path.read_bytes()
        place, bit = draws.randrange(len(data)), draws.randrange(8)
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name}: (differs|does not cut)"):
            TokenizedDataset.open(folder).verify()
        path.write_bytes(data)
    TokenizedDataset.open(folder).verify()


def test_ids_beyond_the_vocabulary_are_found(make_folder: Make) -> None:
    folder = make_folder([[1, 2, 999]])
    with pytest.raises(UserError, match=r"train-00000.bin: has id 999, beyond .* of 262"):
        folder.verify()
    with pytest.raises(UserError, match=r"train has id 999, beyond the vocabulary of 262"):
        folder.tokens("train", np.array([2]))
    assert folder.tokens("train", np.array([1])).tolist() == [2]


def test_tokens_at_any_positions(make_folder: Make) -> None:
    documents = texts(23)
    flat = [token for document in documents for token in (*document, END)]
    folder = make_folder(documents, shard_tokens=97)
    positions = np.array([[0, len(flat) - 1, 96], [97, 98, 13]])
    assert folder.tokens("train", positions).tolist() == [[flat[p] for p in r] for r in positions]
    assert folder.num_documents("train") == 23 and folder.num_tokens("train") == len(flat)
    assert folder.num_bytes("train") == len(flat) - 23


def test_large_vocabularies_have_wide_ids(make_folder: Make) -> None:
    special = [f"<|{index}|>" for index in range(65_537 - 256)]
    special[0] = "<|endoftext|>"
    folder = make_folder([[65_536, 5]], special=special)
    assert folder.manifest.dtype == np.dtype("<u4")
    assert folder.tokens("train", np.arange(3)).tolist() == [65_536, 5, END]


def test_an_empty_split_is_no_fault(make_folder: Make) -> None:
    folder = make_folder([[1, 2]])
    assert folder.num_tokens("held_out") == 0 and len(folder.ends("held_out")) == 0
    folder.verify()


def test_the_fingerprint_distinguishes_folders(make_folder: Make) -> None:
    one, same, other = (
        make_folder([ids], name=name).fingerprint
        for ids, name in (([1, 2], "one"), ([1, 2], "same"), ([1, 3], "other"))
    )
    assert one == same != other
