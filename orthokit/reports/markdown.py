"""Markdown with formulas, turned into HTML and MathML that a browser shows without any script or network."""

from __future__ import annotations

import html
import re
from functools import cache
from typing import Any

__all__ = ["math_html", "to_html"]

# Code comes first: a dollar inside it is a dollar. Inline maths follows pandoc's rule, so that "$5 and $6" is money.
_PIECES = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+)[^\n]*\n.*?^(?P=fence)[ \t]*$|(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`))"
    r"|\$\$(?P<display>.+?)\$\$"
    r"|\\\[(?P<bracket>.+?)\\\]"
    r"|(?P<environment>\\begin\{(?P<name>equation|align|aligned|gather)\*?\}.+?\\end\{(?P=name)\*?\})"
    r"|(?<![\\$])\$(?!\s)(?P<inline>(?:\\.|[^$`\\\n]|\n(?!\n))+?)(?<!\s)\$(?!\d)"
    r"|\\\((?P<paren>.+?)\\\)",
    re.DOTALL | re.MULTILINE,
)
_OPEN, _CLOSE = "\ue000", "\ue001"
# What the converter spells differently.
_REWRITES = (
    (re.compile(r"\\(begin|end)\{(?:aligned|align\*?|gather\*?|split)\}"), r"\\\1{align*}"),
    (re.compile(r"\\(begin|end)\{equation\*?\}"), ""),
    (re.compile(r"\\(?:tag\*?|label)\{[^}]*\}"), ""),
    (re.compile(r"\\operatorname\*?\{([^}]*)\}"), r"\\mathrm{\1}\\,"),
    (re.compile(r"\\(?:big|Big|bigg|Bigg)[lrm]?(?![a-z])"), ""),
)
_ENVIRONMENTS = {"align*", "array", "cases", "smallmatrix"} | {f"{kind}matrix" for kind in ("", *"pbBvV")}


def to_html(text: str) -> str:
    """Markdown to HTML; formulas become MathML, raw HTML (such as ``<details>``) passes.

    Args:
        text: Markdown as notebooks hold it: tables, fenced code, ``$...$`` and ``$$...$$``.

    Returns:
        HTML without scripts of its own.

    Example:
        >>> to_html("The *gap* is $5$.").startswith("<p>The <em>gap</em> is <math")
        True
    """
    formulas: list[str] = []

    def keep(match: re.Match[str]) -> str:
        if match["code"]:
            return match["code"]
        block = match["display"] or match["bracket"] or match["environment"]
        formulas.append(math_html(block or match["inline"] or match["paren"], block=bool(block)))
        return f"{_OPEN}{len(formulas) - 1}{_CLOSE}"

    body = _renderer()(_PIECES.sub(keep, text))
    return re.sub(f"{_OPEN}(\\d+){_CLOSE}", lambda match: formulas[int(match[1])], body)


def math_html(tex: str, *, block: bool = False) -> str:
    """A formula as MathML; what cannot be converted is shown as its TeX source, never dropped.

    Args:
        tex: TeX without its dollars.
        block: A displayed formula.

    Returns:
        A ``<math>`` element, or ``<code class="tex">``.

    Example:
        >>> "<mfrac>" in math_html(r"\\frac{1}{2}")
        True
        >>> math_html(r"\\nosuchmacro{x}")
        '<code class="tex">\\\\nosuchmacro{x}</code>'
    """
    source = tex.strip()
    rewritten = source
    for pattern, replacement in _REWRITES:
        rewritten = pattern.sub(replacement, rewritten)
    known = all(name in _ENVIRONMENTS for name in re.findall(r"\\begin\{([^}]*)\}", rewritten))
    try:
        from latex2mathml.converter import convert

        mathml = convert(rewritten, display="block" if block else "inline")
    except Exception:  # the converter raises many kinds, all meaning: not this formula
        mathml = ""
    # It lets unknown macros and stray ampersands through as text, and drops the names of unknown environments.
    if not known or not mathml or re.search(r"<m[iot][^>]*>\\|<mi>&</mi>", mathml):
        shown = f'<code class="tex">{html.escape(source, quote=False)}</code>'
        return f'<p class="formula">{shown}</p>' if block else shown
    label = html.escape(" ".join(source.split()))
    return mathml.replace("<math ", f'<math alttext="{label}" ', 1)


@cache
def _renderer() -> Any:
    """The Markdown parser, with headings that can be linked to."""
    import mistune

    class Headings(mistune.HTMLRenderer):
        def heading(self, text: str, level: int, **attrs: Any) -> str:
            slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"<[^>]+>|[\ue000\ue001]", "", text).lower()).strip("-")
            return f'<h{level} id="{slug}">{text}</h{level}>\n'

        def block_code(self, code: str, info: str | None = None, **attrs: Any) -> str:
            from orthokit.reports.outputs import highlight

            return highlight(code, (info or "text").split()[0] if info else "text")

        def table(self, text: str) -> str:
            return f'<div class="wide"><table>{text}</table></div>\n'

    plugins = ["table", "strikethrough", "footnotes", "url", "task_lists", "def_list"]
    return mistune.create_markdown(escape=False, renderer=Headings(escape=False), plugins=plugins)
