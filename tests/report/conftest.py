"""A folder laid out as an upstream repository: a pipeline that scripts import by name. Scripts are the tests' own."""

import pytest

MODEL = """
from tokentrim_hooks.reference.pipeline import ReferencePipeline

class CausalInferencePipeline(ReferencePipeline):
    def __init__(self):
        super().__init__(ReferencePipeline.random(grid=(2, 2)).generator)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("")
    (tmp_path / "pipeline" / "causal_inference.py").write_text(MODEL)
    return tmp_path
