"""Figures as part of a page: vectors that follow the page's colours, each with ids of its own."""

from __future__ import annotations

import re
from pathlib import Path

_HEAD = re.compile(r".*?(?=<svg\b)", re.DOTALL)  # the XML declaration and the document type
_META = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(r'(<svg\b[^>]*?) (?:width="[^"]*" height="[^"]*"|height="[^"]*" width="[^"]*")')
_ID = re.compile(r'\bid="([^"]+)"')
_USE = re.compile(r'(url\(#|href="#)([^)"]+)')


def inline(file: Path, name: str, text: str) -> str:
    """A figure's SVG file as an `<svg>` element with `text` as its label.

    Black becomes the page's ink and white its paper, so that it reads in the dark too.
    """
    svg = _META.sub("", _HEAD.sub("", file.read_text(encoding="utf-8"), count=1))
    svg = _ID.sub(rf'id="{name}-\g<1>"', svg)
    svg = _USE.sub(rf"\g<1>{name}-\g<2>", svg)
    svg = svg.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
    label = text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return _SIZE.sub(rf'\g<1> class="plot" role="img" aria-label="{label}"', svg, count=1)
