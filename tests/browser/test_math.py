"""Math in answers: delimiters, prices, and KaTeX's nodes under the page's policy."""

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import Open
from tests.browser.test_markdown import render


@pytest.fixture
def page(open_page: Open) -> Page:
    return open_page()


OUTLINE = {
    "⟨": "<span class=math>",
    "⟩": "</span>",
    "⟪": "<span class=math display>",
    "⟫": "</span>",
    "⟦": "<div class=math display>",
    "⟧": "</div>",
}
"""Inline, display within a paragraph, display as a block."""

CASES = {
    "parentheses": (r"\(x_1*y*z_2\)", "<p>⟨x_1*y*z_2⟩</p>"),
    "brackets": (r"so \[a\] b", "<p>so ⟪a⟫ b</p>"),
    "brackets as a block": ("\\[\n a\n- b\n\\]", "⟦a\n- b⟧"),
    "dollars": (r"$a_b$, $2 \sin x$.", r"<p>⟨a_b⟩, ⟨2 \sin x⟩.</p>"),
    "two dollars": ("is $$a$$ b", "<p>is ⟪a⟫ b</p>"),
    "two dollars as a block": ("x\n$$\na\n$$\ny", "<p>x</p>⟦a⟧<p>y</p>"),
    "a block in an item": ("- a\n  $$\n  b\n  $$\n- c", "<ul><li>a⟦b⟧</li><li>c</li></ul>"),
    "a block in a quote": ("> \\[a\\]\n> b", "<blockquote>⟦a⟧<p>b</p></blockquote>"),
    "in emphasis": ("**a $b$**", "<p><strong>a ⟨b⟩</strong></p>"),
    "prices": (
        "$5 and $10, US$5, $5-$10, 5$ or $5 million or 6 million$",
        "<p>$5 and $10, US$5, $5-$10, 5$ or $5 million or 6 million$</p>",
    ),
    "a price before math": ("$5 for $x$", "<p>$5 for ⟨x⟩</p>"),
    "escaped dollars": (r"\$a\$ and $b\$c$", r"<p>$a$ and ⟨b\$c⟩</p>"),
    "code": ("`$a$` and ${HOME}:`$b`", "<p><code>$a$</code> and ${HOME}:<code>$b</code></p>"),
    "open block": ("$$\na", "<p>$$\na</p>"),
    "block with a blank line": ("$$\na\n\nb$$", "<p>$$\na</p><p>b$$</p>"),
    "unclosed": (r"\(a and \[b and $$c", "<p>(a and [b and $$c</p>"),
    "invalid": (r"\(\nosuch{\)", r"<p><span class=math invalid>\nosuch{</span></p>"),
    "html": (r"\(<b>\text{<img src=x>}\)", r"<p>⟨<b>\text{<img src=x>}⟩</p>"),
}


def test_delimiters(page: Page) -> None:
    """TeX in its delimiters, at once and as it comes in; prices and code stay text."""
    for name, (text, wanted) in CASES.items():
        for mark, tag in OUTLINE.items():
            wanted = wanted.replace(mark, tag)
        assert render(page, text) == wanted, name
        assert render(page, text, list(range(len(text)))) == wanted, name


FORMULAS = [
    r"\begin{aligned} a &= \frac{1}{2} \\ b &= \sqrt{\mathbb{R}} \end{aligned}",
    r"\fcolorbox{red}{blue}{a} \pmb{b} \boxed{c} \color{green} \cancel{d} \underbrace{e}_f",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} \xrightarrow{\text{words}} \int_0^\infty \bigg(",
]


def test_drawing(page: Page) -> None:
    """Fonts come from the package, positions are set by script, and a screen reader gets MathML.
    Environments, boxes and colours do not violate the policy: the console stays empty."""
    outcome = page.evaluate(
        """async (formulas) => {
          const { MarkdownView } = await import("/static/markdown_view.js");
          const element = document.createElement("div");
          element.className = "markdown";
          document.getElementById("messages").append(element);
          const text = formulas.map((formula) => `$$\\n${formula}\\n$$`).join("\\n\\n");
          new MarkdownView(element).update(text);
          await document.fonts.ready;
          const loaded = [...document.fonts].filter(({ status }) => status === "loaded");
          return {
            math: element.querySelectorAll(".math:not(.invalid) math").length,
            top: element.querySelector(".mfrac .vlist > span").style.top,
            fonts: loaded.map(({ family }) => family),
          };
        }""",
        FORMULAS,
    )
    assert outcome["math"] == 3
    assert outcome["top"].endswith("em")
    assert {"KaTeX_Main", "KaTeX_AMS", "KaTeX_Math"} <= set(outcome["fonts"])


def test_deep_formula_is_text(page: Page) -> None:
    """What would nest elements too deeply stays as its source."""
    for tex in ("{" * 400 + "a" + "}" * 400, r"\sqrt" * 400 + "a", "{" * 1000):
        assert render(page, f"${tex}$") == f"<p><span class=math invalid>{tex}</span></p>"
