"""All conversations: search, rename and delete in the list, export and import."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open
from tests.browser.steps import (
    USAGE,
    answer_with,
    answers,
    ask,
    event,
    export_all,
    import_files,
    links,
    send,
    stored,
    wait_for_end,
)

pytestmark = pytest.mark.slow


def begin(page: Page, text: str) -> None:
    page.get_by_role("button", name="New conversation").click()
    ask(page, text)


def test_search(page: Page) -> None:
    """All words must occur, in any script and with their hyphens; matches show their place."""
    texts = ("low-rank attention", "rank of low matrices", "Ünïcode Straße", "注意機構とは何か")
    for text in texts:
        begin(page, text)
    field = page.get_by_role("searchbox", name="Search conversations")
    for query, found in {
        "low-rank": ["low-rank attention"],
        "LOW rank": ["rank of low matrices", "low-rank attention"],
        "rank low-": ["low-rank attention"],
        "機構": ["注意機構とは何か"],
        "ünïcode straße": ["Ünïcode Straße"],
        "u\u0308nïcode": ["Ünïcode Straße"],
        "said: matrices": ["rank of low matrices"],
        "low.rank": [],
        "": list(reversed(texts)),
    }.items():
        field.fill(query)
        expect(links(page).locator(".entry-title")).to_have_text(found)
        expect(page.locator("#search-found")).to_have_text(f"{len(found)} found" if query else "")
    field.fill("said: **low-rank")
    expect(links(page).locator(".excerpt")).to_contain_text("You said: **low-rank")
    links(page).first.click()
    expect(answers(page)).to_contain_text("low-rank attention")


def test_rename_and_delete_in_the_list(page: Page) -> None:
    """Both work for conversations that are not open, and ask before they delete."""
    begin(page, "first talk")
    begin(page, "second talk")
    page.get_by_role("button", name="Rename first talk").click()
    page.get_by_role("textbox", name="Name").fill("renamed")
    page.keyboard.press("Enter")
    expect(links(page)).to_have_text(["second talk", "renamed"])
    expect(page.get_by_role("heading", level=1)).to_have_text("second talk")
    page.get_by_role("button", name="Delete renamed").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(links(page)).to_have_count(2)
    page.get_by_role("button", name="Delete renamed").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(links(page)).to_have_text(["second talk"])
    expect(answers(page)).to_contain_text("second talk")
    assert [record["title"] for record in stored(page)] == ["second talk"]


def test_export_and_import(page: Page, open_page: Open) -> None:
    """Everything comes back in another browser, versions and files included; twice adds nothing."""
    begin(page, "first talk")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_contain_text("2 / 2")
    wait_for_end(answers(page))
    begin(page, "second talk")
    exported = export_all(page)
    before = sorted(stored(page), key=lambda record: record["id"])

    other = open_page()
    other.get_by_text("tokens of context").wait_for()
    for report in (
        "2 conversations imported.",
        "0 conversations imported. 2 conversations already here.",
    ):
        import_files(other, exported)
        expect(other.locator("#notice")).to_have_text(report)
        expect(links(other)).to_have_text(["second talk", "first talk"])
    assert sorted(stored(other), key=lambda record: record["id"]) == before
    links(other).nth(1).click()
    expect(answers(other).get_by_role("group", name="Versions")).to_contain_text("2 / 2")

    # What was added on either side is joined.
    ask(other, "only here")
    import_files(page, export_all(other))
    expect(page.locator("#notice")).to_contain_text("1 conversation imported.")
    first = next(record for record in stored(page) if record["title"] == "first talk")
    assert len(first["messages"]) == 5


def test_import_of_old_files(page: Page, tmp_path: Path) -> None:
    """Files of one conversation, also from before there were versions, make no duplicates."""
    old = {
        "id": "0123456789abcdef01234567",
        "title": "old talk",
        "system": "Be brief.",
        "created": 1,
        "updated": 2,
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho", "model": "m", "status": "done"},
        ],
    }
    longer = {**old, "messages": [*old["messages"], {"role": "user", "content": "more"}]}
    for name, data in (("old.json", old), ("longer.json", longer)):
        (tmp_path / name).write_text(json.dumps(data))
    import_files(page, tmp_path / "old.json", tmp_path / "old.json")
    expect(page.locator("#notice")).to_contain_text("1 conversation imported.")
    import_files(page, tmp_path / "longer.json")
    import_files(page, tmp_path / "old.json")
    expect(page.locator("#notice")).to_contain_text("already here")
    expect(links(page)).to_have_text(["old talk"])
    assert len(stored(page)[0]["messages"]) == 3
    links(page).click()
    expect(answers(page)).to_contain_text("ho")
    expect(page.locator(".system-note")).to_be_visible()


def test_import_of_wrong_files(page: Page, tmp_path: Path) -> None:
    """Each is refused in one line by name; a good one next to it is imported."""
    files = {
        "text.json": "no",
        "list.json": "[1]",
        "null.json": "null",
        "empty.json": '{"format": "lowlat-conversations", "version": 1, "conversations": []}',
        "role.json": '{"messages": [{"role": "tool", "content": "x"}]}',
        "good.json": '{"title": "good", "messages": [{"role": "user", "content": "good"}]}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    import_files(page, *[tmp_path / name for name in files])
    notice = page.locator("#notice")
    expect(notice).to_contain_text("1 conversation imported.")
    expect(notice).to_contain_text("text.json is not JSON; choose a file that this page exported.")
    for name in ("list.json", "null.json", "empty.json", "role.json"):
        expect(notice).to_contain_text(f"{name} has no conversations of this page")
    expect(links(page)).to_have_text(["good"])


def test_import_of_a_hostile_file(page: Page, tmp_path: Path) -> None:
    """Fields of wrong types, loops and markup do no harm."""
    evil = "<img src=x onerror=window.pwned=1>"
    data = {
        "id": '"><script>',
        "title": {"a": evil},
        "system": 3,
        "head": "b",
        "messages": [
            {"role": "user", "id": "a", "parent": "b", "content": evil, "files": [{"name": evil}]},
            {
                "role": "assistant",
                "id": "b",
                "parent": "a",
                "content": evil,
                "toolCalls": [{"name": evil}, None, 3],
                "usage": {"completionTokens": evil},
                "error": {"message": evil, "retryAt": 9e15},
                "status": "running",
            },
        ],
    }
    (tmp_path / "evil.json").write_text(json.dumps(data))
    import_files(page, tmp_path / "evil.json")
    links(page).click()
    expect(answers(page)).to_contain_text("<img")
    expect(answers(page)).to_contain_text("Stopped.")
    assert page.locator("#messages img").count() == 0
    assert page.evaluate("window.pwned") is None
    ask(page, "still works")


def test_several_models(open_page: Open) -> None:
    """The picker lists /v1/models; the choice holds after a reload and per conversation."""
    page = open_page()
    cards = [
        {"id": name, "max_model_len": 4096, "has_chat_template": True} for name in ("tiny", "other")
    ]
    page.context.route("**/v1/models", lambda route: route.fulfill(json={"data": cards}))
    page.reload()
    page.get_by_role("button", name="Settings", exact=True).click()
    picker = page.get_by_label("Model", exact=True)
    expect(picker.locator("option")).to_have_text(["tiny", "other"])
    ask(page, "to tiny")
    picker.select_option("other")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".welcome")).to_contain_text("other")
    answer_with(page, [event({"content": "Yes."}), event({}, "stop"), USAGE])
    with page.expect_request("**/completions") as request:
        send(page, "to other")
    assert request.value.post_data_json["model"] == "other"
    links(page).filter(has_text="to tiny").click()
    expect(picker).to_have_value("tiny")
    page.goto("/")
    expect(page.locator(".welcome")).to_contain_text("other")


def test_installable(page: Page) -> None:
    """Chromium finds nothing that is missing, and the icons have their sizes."""
    client = page.context.new_cdp_session(page)
    manifest = client.send("Page.getAppManifest")
    assert manifest["errors"] == []
    data = json.loads(manifest["data"])
    assert data["display"] == "standalone"
    found = client.send("Page.getInstallabilityErrors")["installabilityErrors"]
    # The tests' profiles are as private windows are.
    assert [error["errorId"] for error in found if error["errorId"] != "in-incognito"] == []
    for icon in data["icons"]:
        size = page.evaluate(
            """async (src) => {
              const image = new Image();
              image.src = `/static/${src}`;
              await image.decode();
              return image.naturalWidth;
            }""",
            icon["src"],
        )
        assert icon["sizes"] in ("any", f"{size}x{size}")
