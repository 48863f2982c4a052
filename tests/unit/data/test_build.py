"""Whole builds: what is kept and counted, and the same bytes every time."""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from lowlat.data import text_files
from lowlat.data import tokenizing as tokenising
from lowlat.data.build import build
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.documents import ReadOptions
from lowlat.data.manifest import Split
from lowlat.data.selection import BuildOptions
from lowlat.data.vocabulary import MIN_VOCAB
from lowlat.text import pieces
from lowlat.text.parts import TokenizerParts
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from tests import forked

from .conftest import END, byte_level

ASK, TELL = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def told(folder: TokenizedDataset, split: Split = "train") -> list[str]:
    """The documents of a split as text, without the tokens around them."""
    ends = folder.ends(split).tolist()
    ids = folder.tokens(split, np.arange(folder.num_tokens(split))).tolist()
    parts = [ids[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    return [bytes(id for id in part if id < 256).decode() for part in parts]


def made(tmp_path: Path, *sources: Path, **options: object) -> TokenizedDataset:
    """A folder built with the byte tokenizer, all for training unless stated otherwise."""
    chosen = {"held_out": 0.0} | options
    settings = BuildOptions(sources=tuple(map(str, sources)), **chosen)  # type: ignore[arg-type]
    name = f"tokens-{len(list(tmp_path.iterdir()))}"
    return TokenizedDataset.open(build(tmp_path / name, settings, byte_level()).path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """211 short files, one of them empty and one repeated."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(211):
        (folder / f"{index:03}.txt").write_text(f"document {index} é\n" * (index % 5 + 1))
    (folder / "005.txt").write_text("\n \n")
    (folder / "007.txt").write_text((folder / "123.txt").read_text())
    return folder


def test_documents_are_kept_in_order_and_counted(corpus: Path, tmp_path: Path) -> None:
    folder = made(tmp_path, corpus)
    files = sorted(corpus.iterdir())
    kept = [path.read_text() for path in files if path.name not in ("005.txt", "123.txt")]
    assert told(folder) == kept
    assert folder.manifest.dropped == {"duplicate": 1, "empty": 1}
    assert folder.num_bytes("train") == sum(len(text.encode()) for text in kept)
    assert folder.num_tokens("train") == folder.num_bytes("train") + len(kept)
    assert folder.tokens("train", folder.ends("train") - 1).tolist() == [END] * len(kept)
    assert folder.manifest.begin_of_text is None
    folder.verify()


def test_the_begin_token_is_put_where_prompts_have_it(corpus: Path, tmp_path: Path) -> None:
    options = BuildOptions(sources=(str(corpus),), held_out=0.0)
    report = build(tmp_path / "tokens", options, MIN_VOCAB + 7)
    folder = TokenizedDataset.open(report.path)
    starts = np.append(0, folder.ends("train")[:-1])
    assert report.asked_vocab == MIN_VOCAB + 7 and folder.vocab_size == MIN_VOCAB + 7
    assert folder.tokens("train", starts).tolist() == [0] * 209
    assert folder.tokens("train", folder.ends("train") - 1).tolist() == [1] * 209
    tokenizer = folder.tokenizer()
    ids = folder.tokens("train", np.arange(folder.ends("train")[0])).tolist()
    assert ids == [*tokenizer.encode((corpus / "000.txt").read_text()), 1]


def test_held_out_documents_are_chosen_by_their_text(corpus: Path, tmp_path: Path) -> None:
    """Regression: a text in training and, as a copy or in another order, in validation."""
    folder = made(tmp_path, corpus, held_out=0.2)
    held = told(folder, "held_out")
    assert 20 < len(held) < 65
    assert not {*held} & {*told(folder)}
    other = tmp_path / "other"
    other.mkdir()
    for index, path in enumerate(sorted(corpus.iterdir(), reverse=True)[:100]):
        (other / f"{index}.txt").write_text(path.read_text())
    again = made(tmp_path, other, corpus, held_out=0.2)
    assert sorted(told(again, "held_out")) == sorted(held)
    assert again.manifest.dropped["duplicate"] > 99


def test_held_out_sources_are_left_out_of_training(corpus: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text((corpus / "011.txt").read_text())
    folder = made(tmp_path, corpus, held_out=None, held_out_sources=(str(held),))
    assert told(folder, "held_out") == [held.read_text()]
    assert held.read_text() not in told(folder) and folder.num_documents("train") == 208
    assert folder.manifest.dropped["duplicate"] == 2


def test_the_default_holds_some_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {index}"}) for index in range(2003)))
    assert 8 < made(tmp_path, path, held_out=None).num_documents("held_out") < 40


BUILD = """
import sys
from pathlib import Path
from lowlat.data.build import build
from lowlat.data.selection import BuildOptions
build(Path(sys.argv[2]), BuildOptions(sources=(sys.argv[1],), shard_tokens=997), 300)
"""


def test_the_same_sources_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """Regression: folders that depend on the number of threads."""
    contents = []
    for threads in ("1", "2"):
        folder = tmp_path / threads
        command = [sys.executable, "-c", BUILD, str(corpus), str(folder)]
        environment = os.environ | {"RAYON_NUM_THREADS": threads}
        forked.run(command, check=True, env=environment, cwd=Path(__file__).parents[3])
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) > 9


def test_large_documents_come_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 101)
    monkeypatch.setattr(text_files, "CHUNK", 57)
    monkeypatch.setattr(text_files, "KEPT", 211)
    monkeypatch.setattr(tokenising, "BATCH", 501)
    texts = [f"{index}: " + "line é 日\n" * (index * 7 % 150) for index in range(43)]
    path = tmp_path / "x.txt"
    path.write_text("---\n".join(f"{text}\n" for text in texts))
    folder = made(tmp_path, path, read=ReadOptions(separator="---"))
    assert told(folder) == [f"{text}\n" for text in texts]


MARK = "\u2581"


def sentencepiece(vocab: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """Of the sentencepiece kind: a blank is put before every text, and bytes stand for the rest."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), MARK, *vocab]
    ids = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
    )
    parts = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return Tokenizer(
        TokenizerParts(
            backend=backend,
            special_tokens={"eos_token": "</s>"},
            eos_ids=frozenset({1}),
            chat_template=None,
            origin="fake",
        )
    )


@pytest.mark.parametrize("joins_line_breaks", [False, True])
def test_pieces_get_no_blank_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joins_line_breaks: bool
) -> None:
    """A folder says its text, whatever a tokenizer puts before one.

    Regression: a blank at every place where a long document was cut.
    """
    monkeypatch.setattr(pieces, "PIECE", 20)
    vocab, merges = ["a", "b", "c", MARK + "a"], [(MARK, "a")]
    if joins_line_breaks:
        vocab, merges = [*vocab, "\n", "\nb"], [*merges, ("\n", "b")]
    tokenizer = sentencepiece(vocab, merges)
    text = "ab a\nb ca\n" * 5 + "abc" * 30 + " b\n\na"
    assert len(list(pieces.text_pieces([text]))) > 4
    (tmp_path / "long.txt").write_text(text)
    options = BuildOptions(sources=(str(tmp_path / "long.txt"),), held_out=0.0)
    folder = TokenizedDataset.open(build(tmp_path / "tokens", options, tokenizer).path)
    ids = folder.tokens("train", np.arange(folder.num_tokens("train"))).tolist()
    assert tokenizer.decode(ids) == text
    if not joins_line_breaks:
        assert ids == [*tokenizer.encode(text, add_special_tokens=False), 1]


def test_bad_documents_stop_the_build_or_are_counted(corpus: Path, tmp_path: Path) -> None:
    (corpus / "100.txt").write_bytes(b"abc\xffdef")
    with pytest.raises(UserError, match=r"100.txt: byte 3 is not UTF-8 text"):
        made(tmp_path, corpus)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"], "nothing is left"
    skipped = made(tmp_path, corpus, read=ReadOptions(invalid="skip"))
    assert skipped.manifest.dropped == {"duplicate": 1, "empty": 1, "invalid": 1}
    replaced = made(tmp_path, corpus, read=ReadOptions(invalid="replace"))
    assert "abc\ufffddef" in told(replaced) and len(told(replaced)) == len(told(skipped)) + 1


def test_chats_among_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    records = [
        {"text": "plain"},
        {"messages": [ASK, TELL]},
        {"messages": [ASK]},
        {"messages": [TELL | {"content": "!"}], "tools": None},
        {"messages": [{"content": "hi", "role": "user"}, TELL]},
        {"text": "more"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    folder = made(tmp_path, path)
    assert told(folder) == ["plain", "user\nhi\nassistant\nho\n", "assistant\n!\n", "more"]
    assert folder.manifest.dropped == {"duplicate": 1, "empty": 1}
    where = np.arange(folder.num_tokens("train"))
    ids, loss_mask = folder.tokens("train", where), folder.loss_mask("train", where)
    learned = [int(id) for id in ids[loss_mask]]
    end_of_turn = byte_level().encode("<|im_end|>")[0]
    turns = [*b"ho", end_of_turn, *b"!", end_of_turn]
    assert learned == [*b"plain", END, *turns, *b"more", END]
    assert folder.manifest.splits["train"].predicted == len(learned)
    assert ids[folder.ends("train") - 1].tolist() == [END] * 4
    folder.verify()


def test_a_chat_that_ends_its_text_gets_no_second_end(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [ASK, TELL]}))
    template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    options = BuildOptions(sources=(str(path),), held_out=0.0)
    report = build(tmp_path / "tokens", options, byte_level(template=template))
    folder = TokenizedDataset.open(report.path)
    assert folder.tokens("train", np.arange(6)).tolist() == [*b"hi", END, *b"ho", END]
    assert folder.loss_mask("train", np.arange(6)).tolist() == [False] * 3 + [True] * 3


def test_a_vocabulary_learns_from_training_text_alone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abab abab abab " * 20)
    (tmp_path / "held.txt").write_text("zyzyzyzy zyzyzyzy " * 99)
    options = BuildOptions(
        sources=(str(tmp_path),),
        held_out_sources=(str(tmp_path / "held.txt"),),
        read=ReadOptions(patterns=("*.txt",)),
    )
    tokenizer = TokenizedDataset.open(build(tmp_path / "tokens", options, 400).path).tokenizer()
    assert len(tokenizer.encode("abab", add_special_tokens=False)) == 1
    assert len(tokenizer.encode("zyzy", add_special_tokens=False)) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held_out": 1.0}, "held-out share 1.0 must be at least 0 and below 1"),
        ({"held_out": float("nan")}, "held-out share nan"),
        ({"read": ReadOptions(separator="a\n")}, "separator must be one line"),
        ({"shard_tokens": 0}, "shard_tokens 0 must be at least 1"),
        ({"read": ReadOptions(patterns=("005*",))}, r"corpus: no documents .*\(1 empty dropped\)"),
    ],
)
def test_options_that_cannot_be(
    corpus: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        made(tmp_path, corpus, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


FILL = """
import resource, sys
from pathlib import Path
from lowlat.data.build import build
from lowlat.data.selection import BuildOptions
from lowlat.utils.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    build(Path(sys.argv[2]), BuildOptions(sources=(sys.argv[1],), held_out=0.0), 300)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100, 9000])
def test_a_full_disk_leaves_nothing(corpus: Path, tmp_path: Path, limit: int) -> None:
    """The system refuses files beyond a size, as a full disk would: within the tokenizer's files
    and within a shard. The same build then goes through.
    """
    (corpus / "large.txt").write_text("".join(f"{i * i} " for i in range(3000)))
    command = [sys.executable, "-c", FILL, str(corpus), str(tmp_path / "tokens")]
    place = Path(__file__).parents[3]
    ended = forked.run([*command, str(limit)], capture_output=True, text=True, cwd=place)
    assert "tokens: cannot be written (File too large); nothing was left" in ended.stdout, ended
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    forked.run([*command, str(2**30)], check=True, cwd=place)
    TokenizedDataset.open(tmp_path / "tokens").verify()


def test_progress_reaches_its_total(corpus: Path, tmp_path: Path) -> None:
    seen = {}

    class Task:
        def __init__(self) -> None:
            self.done = 0

        def advance(self, n: int = 1) -> None:
            assert n >= 0
            self.done += n

    class Counting:
        shown = True

        @contextmanager
        def task(self, label: str, total: int | None = None, unit: str = "items"):
            task = Task()
            yield task
            seen[label] = (task.done, total)

    (corpus / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    options = BuildOptions(sources=(str(corpus),), held_out=0.1)
    build(tmp_path / "tokens", options, 300, Counting())  # type: ignore[arg-type]
    size = sum(path.stat().st_size for path in corpus.iterdir())
    dropped = sum((corpus / name).stat().st_size for name in ("005.txt", "123.txt"))
    for done, total in seen.values():
        assert total == size and size - dropped <= done <= size
    assert [*seen] == ["Training the vocabulary", "Tokenizing"]
