"""Formulas as MathML when the site is built: browsers draw it themselves, without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
TAG = re.compile(r"\\tag\{(\d+)\}")


def on_page_content(content: str, **_: Any) -> str:
    """Called for every page with its HTML."""
    content = DISPLAY.sub(lambda match: _display(html.unescape(match[1])), content)
    return INLINE.sub(lambda match: convert(html.unescape(match[1])), content)


def _display(latex: str) -> str:
    number = TAG.search(latex)
    shown = convert(TAG.sub("", latex).strip(), display="block")
    anchor = f' id="eq-{number[1]}"' if number else ""
    return f'<div class="equation"{anchor}>{shown}{f"<span>({number[1]})</span>" if number else ""}</div>'
