"""Attached text files: button, drop, paste; what is no short text is refused in one line."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.scripted import Server
from tests.browser.steps import answers, ask, attach, send, wait_for_end

pytestmark = pytest.mark.slow

DROP = """([name, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name));
  const target = document.getElementById("thread");
  for (const type of ["dragover", "drop"]) {
    const how = { dataTransfer: data, bubbles: true, cancelable: true };
    target.dispatchEvent(new DragEvent(type, how));
  }
}"""
PASTE = """(text) => {
  const data = new DataTransfer();
  data.setData("text/plain", text);
  const how = { clipboardData: data, bubbles: true, cancelable: true };
  return document.getElementById("prompt").dispatchEvent(new ClipboardEvent("paste", how));
}"""


def test_button(page: Page, server: Server, tmp_path: Path) -> None:
    """Files are chips until they are sent; then they are folded notes, also after a reload."""
    (tmp_path / "a.py").write_text("x = '```'\r\n")
    (tmp_path / "b.txt").write_text("naïve 漢")
    attach(page, tmp_path / "a.py", tmp_path / "b.txt")
    chips = page.get_by_role("list", name="Attached files").get_by_role("listitem")
    expect(chips).to_have_count(2)
    expect(chips.first).to_contain_text("a.py · 10 B")
    chips.nth(1).get_by_role("button", name="Remove b.txt").click()
    expect(chips).to_have_count(1)
    send(page, "what is it?")
    wait_for_end(answers(page))
    expect(chips).to_have_count(0)
    wanted = "File: a.py\n````\nx = '```'\n````\n\nwhat is it?"
    assert server.requests[-1]["messages"] == [{"role": "user", "content": wanted}]
    page.reload()
    note = page.locator(".file-note")
    expect(note.locator("summary")).to_have_text("a.py · 10 B")
    expect(page.locator(".bubble")).to_have_text("what is it?")
    note.locator("summary").click()
    expect(note.locator("pre")).to_have_text("x = '```'\n")


def test_edit_keeps_files(page: Page, server: Server) -> None:
    page.evaluate(DROP, ["notes.txt", "noted"])
    expect(page.locator(".chip")).to_have_count(1)
    ask(page, "first")
    page.get_by_role("button", name="Edit message").click()
    page.get_by_role("textbox", name="Edit message").fill("second")
    page.get_by_role("button", name="Save and send").click()
    wait_for_end(answers(page))
    assert server.requests[-1]["messages"][0]["content"] == (
        "File: notes.txt\n```\nnoted\n```\n\nsecond"
    )


def test_file_alone_gives_the_title(page: Page) -> None:
    """A dropped file can be sent without a text."""
    page.evaluate(DROP, ["notes.txt", "noted"])
    expect(page.locator(".chip")).to_have_count(1)
    send(page, "")
    wait_for_end(answers(page))
    expect(page.get_by_role("heading", level=1)).to_have_text("notes.txt")


def test_paste(page: Page) -> None:
    """Long text becomes a file, short text is typed."""
    assert page.evaluate(PASTE, "short"), "the browser inserts it"
    assert not page.evaluate(PASTE, "long " * 1000)
    expect(page.locator(".chip")).to_contain_text("pasted-1.txt · 5.00 kB")
    expect(page.get_by_label("Message", exact=True)).to_have_value("")


def test_refused_files(page: Page, tmp_path: Path) -> None:
    """Each has one line that names the file and the reason; the others are attached."""
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    (tmp_path / "zeros.bin").write_bytes(b"a\0b")
    (tmp_path / "big.txt").write_bytes(b"x" * ((1 << 20) + 1))
    (tmp_path / "good.txt").write_text("good")
    problem = page.locator("#attachment-problem")
    for name, reason in (
        ("photo.png", "it is not a text file in UTF-8."),
        ("zeros.bin", "it is not a text file in UTF-8."),
        ("big.txt", "the files of a message have at most 1.05 MB."),
    ):
        attach(page, tmp_path / name)
        expect(problem).to_have_text(f"{name} is not attached: {reason}")
    expect(page.locator(".chip")).to_have_count(0)
    attach(page, tmp_path / "good.txt", tmp_path / "big.txt")
    expect(problem).to_contain_text("big.txt")
    expect(page.locator(".chip")).to_have_count(1)
    attach(page, *[tmp_path / "good.txt"] * 16)
    expect(problem).to_have_text("good.txt is not attached: a message has at most 16 files.")


def test_hostile_files(page: Page) -> None:
    """Names and texts are text; nothing runs."""
    evil = "<img src=x onerror=window.pwned=1>"
    page.evaluate(DROP, [f"{evil}.txt", f"```\n{evil}\n[a](javascript:window.pwned=1)"])
    expect(page.locator(".chip")).to_contain_text(evil)
    send(page, evil)
    wait_for_end(answers(page))
    page.locator(".file-note summary").click()
    expect(page.locator(".file-note pre")).to_contain_text(evil)
    page.reload()
    expect(page.locator(".file-note")).to_contain_text(evil)
    assert page.locator("#messages img").count() == 0
    assert page.evaluate("window.pwned") is None
