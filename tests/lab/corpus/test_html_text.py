"""Pages as text: content in, everything around it out."""

import pytest
from lowlat_lab.corpus.html_text import Selector, html_to_text


def rendered(html: str, root: str = "", skip: str = "") -> str:
    selectors = [[Selector.parse(s) for s in part.split()] for part in (root, skip)]
    return html_to_text(html, root=selectors[0], skip=selectors[1]).text


def test_blocks_keep_their_form() -> None:
    html = """<html><head><title>T</title><style>p {}</style></head><body>
    <h1>Head <code>line</code></h1><p>One
      two <b>three</b>.</p><ul><li>first<li>second <ul><li>inner</ul></ul>
    <ol><li>a</li><li>b</li></ol>
    <pre>def f():
    \treturn 1
    </pre><table><tr><th>x</th><td> 1</td></tr><tr><td>y</td><td>2</td></tr></table>
    <dl><dt>word</dt><dd><p>meaning</p></dd></dl><script>alert(1)</script></body></html>"""
    assert rendered(html) == (
        "Head line\n\nOne two three.\n\n- first\n- second\n  - inner\n1. a\n2. b\n\n"
        "    def f():\n            return 1\n\nx | 1\ny | 2\n\nword\nmeaning"
    )


def test_only_the_root_is_content_and_skipped_parts_are_not() -> None:
    html = (
        "<body><div class='top'>Menu<div>deep</div></div><div class='body x'><p>Text"
        "<a class='headerlink'>#</a> here</p><div>more</div></div><p>After</p></body>"
    )
    assert rendered(html, root="div.body", skip=".headerlink") == "Text here\n\nmore"
    assert rendered(html, skip=".top a") == "Text here\n\nmore\n\nAfter"


def test_a_page_without_the_root_is_content_as_a_whole() -> None:
    assert rendered("<p>old page</p>", root="main") == "old page"


def test_missing_end_tags_do_no_harm() -> None:
    assert rendered("<p>one<p>two<br>three</div></li><p>four") == "one\n\ntwo\nthree\n\nfour"


def test_a_block_inside_a_table_cell_stays_in_its_row() -> None:
    html = "<table><tr><td><p>a</p><p>b</p></td><td><ul><li>c</ul></td></tr></table>"
    assert rendered(html) == "a b | c"


def test_the_title_is_reported() -> None:
    page = html_to_text("<title> A\n page</title><body>x</body>", root=(), skip=())
    assert (page.title, page.text) == ("A page", "x")


@pytest.mark.parametrize("text", ["", "p.a.b", "p > a", "#", "."])
def test_selectors_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match=r"tag, \.class"):
        Selector.parse(text)
