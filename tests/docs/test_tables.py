"""Tables of the docs that repeat what the code says name the same things, no more and no fewer."""

import dataclasses
import inspect
import re

import pytest
from pages import ROOT

import tokentrim_hooks as tokentrim
from tokentrim_hooks import errors
from tokentrim_hooks.reference.fault import FAULTS


def first_column(page, heading):
    """Names in code in the first column of the one table of a page whose first heading is this; arguments left out."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    names = []
    for line in lines[start + 2 :]:
        if not line.startswith("| "):
            break
        names += [name.partition("(")[0] for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    return names


def fields(cls):
    return {field.name for field in dataclasses.fields(cls)}


def public(owner):
    return {name for name in {**vars(owner), **getattr(owner, "__annotations__", {})} if not name.startswith("_")}


def members(kind):
    return {member.name for member in kind}


ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
TABLES = [
    ("patch.md", "Field of `ChunkRecord`", fields(tokentrim.ChunkRecord)),
    ("patch.md", "Option", set(inspect.signature(tokentrim.patch).parameters)),
    ("errors.md", "Error", ERRORS - {"TokenTrimError", "TokenTrimWarning"}),
    ("policies.md", "Option", fields(tokentrim.DriftPolicy)),
    ("policies.md", "`chunk`, a `Chunk`", fields(tokentrim.Chunk)),
    ("cli.md", "Fault", set(FAULTS)),
    ("adapters.md", "Member", public(tokentrim.Adapter)),
    ("adapters.md", "`Phase`", members(tokentrim.Phase)),
    ("adapters.md", "`Role`", members(tokentrim.Role)),
]


@pytest.mark.parametrize(
    ("page", "heading", "names"), TABLES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_table_is_the_codes(page, heading, names):
    found = first_column(page, heading)
    assert len(found) == len(set(found)) and set(found) == names


def test_the_defaults_of_drift_policy_are_the_tables():
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]*\| `?([^|`]+)`? \|", (ROOT / "docs" / "policies.md").read_text(), re.MULTILINE
    )
    defaults = {field.name: str(field.default) for field in dataclasses.fields(tokentrim.DriftPolicy)}
    assert {name: value.strip().strip('"') for name, value in rows} == defaults


@pytest.mark.parametrize("name", FAULTS)
def test_the_figures_of_a_fault_are_the_tables(name):
    (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    planted, accepted, what, needs = row.split(" | ")[:4]
    fault = FAULTS[name]
    assert (planted, accepted, needs) == (str(fault), "yes" if fault.accepted else "no", str(fault.needs))
    assert ("noise" in what) == fault.noise
