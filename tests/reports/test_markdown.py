"""Markdown and formulas without scripts."""

import xml.etree.ElementTree as ET

import pytest

from orthokit.reports.markdown import math_html, to_html


@pytest.mark.parametrize(
    "tex",
    [
        r"\lVert W \rVert_F^2 \le \frac{\eta}{2T-1}",
        r"\operatorname{polar}(M_t) = U V^\top",
        r"\begin{aligned}a &= b \\ c &= \sqrt{d}\end{aligned}",
        r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}",
        r"a < b > c",
        r"\mathbb{R}^{m \times n}, \quad \widehat{U}, \quad \langle X, S \rangle",
        r"\text{if } x \to \infty",
    ],
)
def test_formulas_become_well_formed_mathml_that_keeps_its_source(tex):
    element = ET.fromstring(math_html(tex, block=True))
    assert element.tag.endswith("math")
    assert element.attrib["display"] == "block"
    assert element.attrib["alttext"] == " ".join(tex.split())


@pytest.mark.parametrize("tex", [r"\nosuchmacro{x}", r"a & b", r"\begin{nothing}x\end{nothing}"])
def test_what_cannot_be_converted_is_shown_as_source(tex):
    assert "<code" in math_html(tex)
    assert "<math" not in math_html(tex)


def test_dollars_in_code_and_prices_are_no_formulas():
    made = to_html("It costs $5, not $6. `a$b$c`\n\n```\n$x$\n```\n")
    assert "<math" not in made
    assert "$x$" in made


def test_formulas_keep_their_underscores_and_stars():
    made = to_html("$a_1 * b_2 * c_3$ and *emphasis*")
    assert made.count("<msub>") == 3
    assert made.count("<em>") == 1


def test_displayed_formulas_tables_and_solutions():
    made = to_html(
        "$$\nx\n$$\n\n| a | b |\n|---|---|\n| $y$ | 2 |\n\n<details><summary>S</summary>\n\n**bold**\n\n</details>"
    )
    assert 'display="block"' in made
    assert "<td><math" in made
    assert "<details><summary>S</summary>" in made
    assert "<strong>bold</strong>" in made


def test_headings_can_be_linked_to_and_code_is_coloured():
    made = to_html("## What you *see*\n\n```python\nx = 1\n```")
    assert '<h2 id="what-you-see">' in made
    assert 'class="code"' in made
