"""Sources: files found in order, read as what they are, faults named with their place."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import pytest

from lowlat.data import text_files
from lowlat.data.documents import (
    BadDocument,
    ChatDocument,
    ReadOptions,
    TextDocument,
)
from lowlat.data.records import Read
from lowlat.data.sources import files_of, read_sources, size_of
from lowlat.utils.errors import UserError


def read(path: Path | str, **options: object) -> list[Read]:
    return list(read_sources([str(path)], ReadOptions(**options)))  # type: ignore[arg-type]


def texts(documents: Iterable[Read]) -> list[str]:
    found = []
    for document in documents:
        assert isinstance(document, TextDocument), document
        found.append("".join(document.pieces()))
    return found


def test_folders_are_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    names = [
        "b.txt",
        "a/z.md",
        "a/b/c.txt",
        "B.txt",
        ".hidden",
        ".git/config",
        "a/.x/y.txt",
        "a.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    order = ["B.txt", "a/b/c.txt", "a/z.md", "a.txt", "b.txt"]
    assert texts(read(tmp_path)) == order
    assert texts(read(tmp_path, patterns=("*.md", "a*"))) == ["a/z.md", "a.txt"]
    assert size_of([str(tmp_path)], ReadOptions()) == sum(len(name) for name in order)


def test_a_named_file_may_be_hidden(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("x")
    assert texts(read(tmp_path / ".hidden")) == ["x"]


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent' does not exist; give a file, a folder"):
        read(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty' has no files to read"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "x.md").write_text("x")
    with pytest.raises(UserError, match=r"has no files of the form \*\.txt"):
        files_of(str(tmp_path / "empty"), ReadOptions(patterns=("*.txt",)))


def test_separators_cut_files(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\n---\ntwo\r\n---\r\n--- no\n----\n---\n\n---")
    found = read(path, separator="---")
    assert texts(found) == ["one\n", "two\r\n", "--- no\n----\n", "\n", ""]
    assert [document.origin for document in found if isinstance(document, TextDocument)] == [
        f"{path}: document at byte {start}" for start in (0, 8, 18, 34, 38)
    ]
    assert texts(read(path)) == [path.read_bytes().decode()]


def test_blank_lines_may_separate(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\nb\n\nc\n")
    assert texts(read(tmp_path / "x.txt", separator="")) == ["a\nb\n", "c\n"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa\n-\n\xef\xbb\xbfb")
    assert texts(read(tmp_path / "x.txt", separator="-")) == ["a\n", "\ufeffb"]


@pytest.mark.parametrize("packed", [False, True])
def test_large_documents_are_read_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(text_files, "CHUNK", 7)
    monkeypatch.setattr(text_files, "KEPT", 13)
    lines = ["日本語", "é" * 20, "x" * 40, "ab"]
    data = "\n=\n".join(lines).encode()
    path = tmp_path / ("x.txt.gz" if packed else "x.txt")
    path.write_bytes(gzip.compress(data) if packed else data)
    found = read(path, separator="=")
    assert [text.rstrip("\n") for text in texts(found)] == lines
    assert [text.rstrip("\n") for text in texts(found)] == lines, "a second time"
    assert sum(document.source_bytes for document in found if isinstance(document, TextDocument))
    assert texts(read(path)) == [data.decode()]


@pytest.mark.parametrize("place", [0, 5, 13, 14, 39])
def test_bytes_that_are_no_text_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(text_files, "CHUNK", 7)
    monkeypatch.setattr(text_files, "KEPT", 13)
    data = bytearray(b"a\n" * 20)
    data[place] = 0xE9
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    [document] = read(path)
    assert isinstance(document, TextDocument)
    with pytest.raises(BadDocument, match=f"x.txt: byte {place} is not UTF-8 text; convert"):
        document.fingerprint()
    replaced = texts(read(path, invalid="replace"))[0]
    assert replaced == data.decode("utf-8", "replace") and "\ufffd" in replaced


def test_text_cut_in_a_character_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("ab語".encode()[:-1])
    [document] = read(tmp_path / "x.txt")
    assert isinstance(document, TextDocument)
    with pytest.raises(BadDocument, match="byte 2 is not UTF-8"):
        document.fingerprint()


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz"])
def test_a_broken_archive_is_named(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(b'{"text": "abcdefghijklmnopqrstuvwxyz"}\n' * 9)
    for data in (whole[:-9], b"no archive", whole[:20] + b"\xff\xff\xff" + whole[23:]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            texts(read(tmp_path / name))


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    asked, told = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    lines = [{"text": "é\n", "id": 1}, {"messages": [asked, told], "tools": [{"name": "f"}]}]
    path.write_text(json.dumps(lines[0]) + "\n \n" + json.dumps(lines[1]) + "\n")
    text, chat = read(path)
    assert texts([text]) == ["é\n"]
    assert isinstance(chat, ChatDocument) and chat.origin == f"{path}: line 3"
    assert chat.messages == [asked, told] and chat.tools == [{"name": "f"}]
    path.write_text('{"body": "x", "text": 5}')
    assert texts(read(path, field="body")) == ["x"]
    path.write_bytes(b'\xef\xbb\xbf{"text": "marked"}\n{"text": "second"}\n')
    assert texts(read(path)) == ["marked", "second"]
    (tmp_path / "x.ndjson.gz").write_bytes(gzip.compress(b'{"text": "packed"}'))
    assert texts(read(tmp_path / "x.ndjson.gz")) == ["packed"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "\xff"}', "byte 10 is not UTF-8 text"),
        (b'{"text": "a"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a"]', "must be a JSON object, not list"),
        (b'{"body": "a"}', r"neither a text in 'text' nor 'messages' \(fields: body\)"),
        (b'{"text": null}', r"'text' is null, not a text; .* pass --invalid skip"),
        (b'{"text": ["a"]}', r"'text' is list, not a text"),
        (b'{"text": }', r"not valid JSON \(Expecting value at character 10\); fix"),
        (b'{"text": "\\ud800x"}', "character 0 of a text is half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "half of a surrogate"),
        (b'{"messages": "a"}', "'messages' must be objects with a role"),
        (b'{"messages": [{"content": "a"}]}', "'messages' must be objects with a role"),
        (b'{"messages": [], "tools": {"a": 1}}', "'tools' must be a list of objects"),
    ],
)
def test_faults_of_a_line_are_reported_and_passed_over(
    tmp_path: Path, line: bytes, words: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}')
    before, fault, after = read(path)
    assert texts([before, after]) == ["before", "after"]
    assert isinstance(fault, BadDocument)
    with pytest.raises(BadDocument, match=f"x.jsonl: line 2: .*{words}"):
        raise fault


def test_replacing_fixes_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a\xff"}\n{"text": "\\ud800b"}\n{"text": "\\ud83d\\udc1f"}')
    assert texts(read(path, invalid="replace")) == [
        "a\ufffd",
        "\ufffd" * 3 + "b",
        "🐟",
    ]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [f"row {index}" for index in range(700)]
    table = pyarrow.table({"body": rows, "id": list(range(700))})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert texts(read(tmp_path / "x.parquet", field="body")) == rows
    with pytest.raises(UserError, match=r"neither a text in 'text' .*\(fields: body, id\)"):
        read(tmp_path / "x.parquet")
    told = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "n"}]]
    parquet.write_table(pyarrow.table({"messages": told}), tmp_path / "chat.parquet")
    [chat] = read(tmp_path / "chat.parquet")
    assert isinstance(chat, ChatDocument) and chat.messages == told[0], "without null fields"
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(UserError, match=r"x.parquet: cannot be read"):
        read(tmp_path / "x.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"need pyarrow; pip install 'lowlat\[data\]'"):
        read(tmp_path / "x.parquet")


def test_datasets_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"datasets:wiki needs datasets; pip install 'lowlat\["):
        read("datasets:wiki")


class Table:
    """What the library gives for one split, as far as it is used."""

    column_names: ClassVar = ["id", "body"]

    def select_columns(self, names: list[str]) -> list[dict[str, str]]:
        assert names == ["body"]
        return [{"body": "one"}, {"body": "two"}]


def test_datasets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> object:
        if name == "absent":
            raise RuntimeError("no such\nset")
        asked.append((name, config, split))
        return Table()

    fake = types.SimpleNamespace(load_dataset=load_dataset, Dataset=Table)
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    assert texts(read("datasets:org/name:en:test[:1%]:body")) == ["one", "two"]
    assert texts(read("datasets:name", field="body")) == ["one", "two"]
    assert asked == [("org/name", "en", "test[:1%]"), ("name", None, "train")]
    assert size_of(["datasets:name"], ReadOptions()) is None
    with pytest.raises(UserError, match=r"datasets:absent' cannot be loaded \(no such set\)"):
        read("datasets:absent")
    with pytest.raises(UserError, match=r"neither a text in 'text' .*\(fields: id, body\)"):
        read("datasets:name")


def test_a_text_and_messages_in_one_record(tmp_path: Path) -> None:
    """Regression: chats taken as plain text, prompts learned with them, without a word."""
    told = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({"text": "a b", "messages": told}))
    said = "line 1: has both a text in 'text' and 'messages'; choose with --field text or"
    with pytest.raises(UserError, match=said):
        read(path)
    with pytest.raises(UserError, match=said):
        read(path, invalid="skip")
    assert texts(read(path, field="text")) == ["a b"]
    (chat,) = read(path, field="messages")
    assert isinstance(chat, ChatDocument) and list(chat.messages) == told
