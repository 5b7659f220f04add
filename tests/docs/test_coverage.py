"""Everything a user can name is in the docs: public names, hooks, options, errors, commands, environment variables."""

import dataclasses
import inspect
import re

import pytest
from pages import PAGES, ROOT

import tokentrim_hooks as tokentrim
from tokentrim_hooks import errors, plugins, testing
from tokentrim_hooks.cli import main as cli
from tokentrim_hooks.testing.laws.trial import Trial

DOCS = "\n".join(page.read_text() for page in PAGES if ROOT / "docs" in page.parents)
CODE = set(re.findall(r"\w+(?:-\w+)*", " ".join(re.findall(r"```.*?```|`[^`\n]+`", DOCS, re.DOTALL))))
"""Words that stand in code in docs/."""


def public(owner):
    return [name for name in vars(owner) if not name.startswith("_")]


def options(command):
    return [option for parameter in command.params for option in parameter.opts if option.startswith("-")]


def environment():
    """Variables that the package, its adapters and its tests read."""
    here = {"tests/docs"}
    sources = [path for folder in ("tokentrim_hooks", "adapters", "tests") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources if str(path.parent.relative_to(ROOT)) not in here)
    return set(re.findall(r"\bTOKENTRIM_[A-Z_]+\b", text))


def fields(cls):
    return [field.name for field in dataclasses.fields(cls)]


NAMES = {
    "public names": tokentrim.__all__,
    "hooks": [name for name, value in vars(plugins).items() if hasattr(value, "tokentrim_hooks_spec")],
    "the adapter's members": public(tokentrim.Adapter),
    "observer events": ["on_start", "on_chunk", "on_end"],
    "options of patch": list(inspect.signature(tokentrim.patch).parameters),
    "the handle": public(tokentrim.PatchHandle),
    "DriftPolicy": fields(tokentrim.DriftPolicy),
    "History": fields(tokentrim.History),
    "Verdict": fields(tokentrim.Verdict),
    "ChunkRecord": fields(tokentrim.ChunkRecord),
    "Call": [*fields(tokentrim.Call), "frames", "end"],
    "Seen": fields(tokentrim.Seen),
    "Match": fields(tokentrim.Match),
    "CacheRows": fields(tokentrim.CacheRows),
    "KeyLayout and Segment": [*fields(tokentrim.KeyLayout), *fields(tokentrim.Segment)],
    "phases and roles": [member.name for kind in (tokentrim.Phase, tokentrim.Role) for member in kind],
    "taps": list(inspect.signature(tokentrim.Patches.tap).parameters)[1:],
    "patches": sorted(set(public(tokentrim.Patches)) - {"require_tap", "undo", "gone"}),
    "errors": [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)],
    "the kit": [*testing.__all__, *testing.AdapterConformance.__annotations__, *Trial.__annotations__],
    "the kit for policies": list(testing.PolicyConformance.__annotations__),
    "policies by name": [info.name for info in tokentrim.policies()],
    "environment": environment(),
    "extras": ["report", "metrics", "demo"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_is_documented(kind):
    assert NAMES[kind], "nothing to look for: has something been renamed?"
    assert sorted(set(NAMES[kind]) - CODE) == [], f"not in docs/, in code: {kind}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_is_documented_with_all_its_options(name):
    page = (ROOT / "docs" / "cli.md").read_text()
    assert f"\n## tokentrim {name}\n" in page, f"docs/cli.md has no section on tokentrim {name}"
    section = page.split(f"\n## tokentrim {name}\n")[1].split("\n## ")[0]
    missing = [option for option in options(cli.COMMANDS[name]) if option != "--help" and f"`{option}`" not in section]
    assert not missing


def test_no_command_is_documented_that_is_not_there():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert set(re.findall(r"^## tokentrim (\S+)$", page, re.MULTILINE)) == set(cli.COMMANDS)


def test_documented_environment_variables_exist():
    assert set(re.findall(r"\bTOKENTRIM_[A-Z_]+\b", DOCS)) <= environment()


def test_a_name_that_is_nowhere_would_be_missed():
    assert "on_lunch" not in CODE and len(CODE) < 3000


def test_every_page_is_in_the_site_s_navigation():
    lines = [line for line in (ROOT / "mkdocs.yml").read_text().splitlines() if not line.lstrip().startswith("#")]
    named = {line.rpartition(": ")[2] for line in lines if line.endswith(".md")}
    assert named == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
