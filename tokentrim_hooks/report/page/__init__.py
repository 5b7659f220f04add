"""``report.html``: one self-contained file about a run, readable offline and on a phone."""

from tokentrim_hooks.report.page.template import filled
from tokentrim_hooks.report.page.writing import Section, render, write_page

__all__ = ["Section", "filled", "render", "write_page"]
