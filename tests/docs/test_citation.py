"""CITATION.cff can be read, names this version, and the paper beside the software."""

import yaml
from pages import ROOT

import tokentrim_hooks as tokentrim


def test_software_and_paper_are_named():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert (citation["title"], citation["version"]) == ("tokentrim-hooks", tokentrim.__version__)
    (paper,) = citation["references"]
    assert paper["url"].endswith("2602.00268") and len(paper["authors"]) == 4
