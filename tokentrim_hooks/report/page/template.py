"""Templates of pages, and data that stands in them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tokentrim_hooks.extras import require

MIME = {"svg": "image/svg+xml", "png": "image/png"}


def filled(template: Path, **values: Any) -> str:
    """A jinja template with its values, escaped for HTML."""
    environment = require("jinja2", "report").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html: str = environment.from_string(template.read_text(encoding="utf-8")).render(**values)
    return html


def embedded(kind: str, content: bytes) -> str:
    """A picture as an address that holds all of it; ``kind`` is ``"svg"`` or ``"png"``."""
    return f"data:{MIME[kind]};base64,{base64.b64encode(content).decode()}"
