"""Screenshots of the chat page for docs/: desktop and phone, light and dark theme.

    python -m tests.browser.screenshots docs

Server and page are real, the answers are prepared. Needs Chromium.
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.conftest import ARGUMENTS, MISSING, chromium_program
from tests.browser.scripted import ScriptedEngine, serve, tiny_chat_model
from tests.browser.steps import answer_with, answers, event, send, wait_for_end

SCREENS = {
    "chat-page": {"viewport": {"width": 1100, "height": 860}},
    "chat-page-phone": {"viewport": {"width": 412, "height": 915}, "has_touch": True},
}
"""Options of a browser context by the beginning of the picture's name."""
EARLIER = ("Translate 'attention' into French", "*attention*")
QUESTION = "How do I solve a quadratic equation?"
ANSWER = r"""The roots of $ax^2 + bx + c = 0$ follow from the **quadratic formula**:

$$x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}$$

```python
def roots(a, b, c):
    d = (b * b - 4 * a * c) ** 0.5
    for sign in (1, -1):  # both roots
        yield (-b + sign * d) / (2 * a)
```

| discriminant | real roots |
|---|--:|
| $b^2 > 4ac$ | 2 |
| $b^2 = 4ac$ | 1 |
| $b^2 < 4ac$ | 0 |
"""
USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 21, "completion_tokens": 187, "total_tokens": 208},
    "lowlat": {"prefill_seconds": 0.06, "decode_seconds": 4.4, "tokens_per_second": 42.5},
}


def converse(page: Page) -> None:
    """Two conversations; in the second one, the answer is regenerated."""
    page.get_by_text("tokens of context").wait_for()
    for question, answer in (EARLIER, (QUESTION, ANSWER)):
        answer_with(page, [event({"content": answer}), event({}, "stop"), USAGE])
        page.keyboard.press("Alt+KeyN")
        send(page, question)
        wait_for_end(answers(page))
    page.keyboard.press("Alt+KeyR")
    answers(page).get_by_text("2 / 2").wait_for()
    wait_for_end(answers(page))
    for part in (".katex-display", ".hljs-keyword", "table"):
        answers(page).locator(part).first.wait_for()


def record(browser: Browser, folder: Path) -> None:
    """Write all pictures to `folder`."""
    engine = ScriptedEngine(tiny_chat_model(name="prepared answer"))
    with serve(engine) as server:
        for name, options in SCREENS.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(base_url=server.url, color_scheme=scheme, **options)
                page = context.new_page()
                page.goto("/")
                converse(page)
                page.evaluate("document.fonts.ready")
                page.screenshot(path=folder / f"{name}-{scheme}.png", animations="disabled")
                context.close()


def main(folder: str) -> None:
    program = chromium_program()
    if program is None:
        sys.exit(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        record(browser, Path(folder))
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
