"""Templates of pages, and data that stands in them."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from tokentrim_hooks.extras import require

MIME = {"svg": "image/svg+xml", "png": "image/png"}
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What HTML forbids, steers a terminal that shows the file, or turns round the words beside it."""


def filled(template: Path, **values: Any) -> str:
    """A jinja template with its values, escaped for HTML; a control character is shown as Python writes it."""
    environment = require("jinja2", "report").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html: str = environment.from_string(template.read_text(encoding="utf-8")).render(**values)
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), html)


def embedded(kind: str, content: bytes) -> str:
    """A picture as an address that holds all of it; ``kind`` is ``"svg"`` or ``"png"``."""
    return f"data:{MIME[kind]};base64,{base64.b64encode(content).decode()}"
