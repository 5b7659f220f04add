"""Docstrings write ``:class:`Call```, which Sphinx, IDEs and readers of the source know; Markdown wants `Call`."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`~?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Takes the roles off before mkdocstrings reads a docstring (mkdocs.yml names this file)."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
