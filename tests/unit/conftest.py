"""Distributions of strangers, installed for one test."""

import sys
import textwrap

import pytest

from tokentrim_hooks import plugins


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Installs a distribution of one module; returns the name of that module."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def install(project, code, entry="", version="1.0"):
        module = f"stranger_{len(made)}_{project.replace('-', '_')}"
        made.append(module)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{project.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[tokentrim_hooks]\n{entry or project} = {module}\n")
        plugins.found.cache_clear()
        return module

    yield install
    plugins.found.cache_clear()
    for module in made:
        sys.modules.pop(module, None)
