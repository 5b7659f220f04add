"""The tables of supported models are what the adapters and the check records give, and say what was not checked."""

import copy
import shutil

import pytest
import support_tables as support
from pages import ROOT

from tokentrim_hooks.api import adapters
from tokentrim_hooks.errors import ReportError


@pytest.fixture
def checks():
    return copy.deepcopy(support.read_checks())


def without(checks, model):
    checks["checks"] = [record for record in checks["checks"] if record["models"] != [model]]
    return checks


@pytest.mark.parametrize(("page", "block"), [("README.md", "support_table"), ("docs/models.md", "support_details")])
def test_pages_are_what_is_generated(page, block):
    text = (ROOT / page).read_text()
    assert support.filled(text, getattr(support, block)()) == text, "run python tools/support_tables.py --write"


def short_rows(table):
    return [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][2:]


def test_every_model_is_in_one_row_with_the_hooks_of_its_adapter(checks):
    own = [info.adapter for info in adapters() if info.adapter and info.distribution.startswith("tokentrim-hooks ")]
    assert len(own) > 10
    left = {row[0].strip(): row[1:] for row in short_rows(support.support_table(checks))}
    for adapter in own:
        for model in adapter.models:
            (cells,) = (cells for models, cells in left.items() if model in models.split(" · "))
            assert [bool(cell.strip()) for cell in cells] == [hook in adapter.takes for hook in support.SHORT], model
    named = {model for adapter in own for model in adapter.models}
    named |= {model for base in checks["base_classes"] for model in base["models"]}
    assert sum(map(len, left)) == sum(map(len, named)) + 3 * (len(named) - len(left)), "nothing else stands there"


def test_rows_are_narrow_and_packed():
    long = ["x" * 50, "y" * 50, "z" * 20, "a" * 20]
    rows = support._lines(("yes", "", "yes"), long)
    assert sorted(" · ".join(row[0] for row in rows).split(" · ")) == sorted(long) and len(rows) == 2
    assert all(len(f"| {' | '.join(row)} |") <= support.COLUMNS and row[1:] == ["yes", "", "yes"] for row in rows)


def test_a_model_without_record_is_not_checked(checks):
    assert "not checked" not in support.support_table(checks), "every adapter has a record by now"
    table = support.support_table(without(checks, "CausVid"))
    assert "CausVid (not checked)" in table and table.count("not checked") == 1
    section = support.support_details(checks).split("## CausVid\n")[1].split("\n## ")[0]
    assert "**not checked**" in section and "Ran:" not in section


def test_a_record_of_a_model_that_no_adapter_has_is_an_error(checks):
    checks["checks"][0]["models"].append("Sora")
    with pytest.raises(ReportError, match="Sora"):
        support.support_table(checks)


def test_every_own_adapter_has_its_hooks_in_one_row():
    rows = [line for line in support.hooks_table().splitlines() if line.startswith("| `")]
    own = support.kinds()
    assert len(rows) == len(own) and {"comfyui-ar", "sglang", "vllm-omni-lingbot"} < own.keys()
    for name, kind in own.items():
        cells = next(row for row in rows if row.startswith(f"| `{name}` |")).split("|")
        told = {hook for hook, cell in zip(support.HOOKS, cells[2:], strict=False) if cell.strip()}
        assert told == kind.takes, name
        assert ("CommitWindow" in cells[-2]) is ({"hide", "commit"} <= kind.takes)


def test_plugins_of_engines_are_in_the_long_tables_only(checks):
    long, short = support.support_details(checks), support.support_table(checks)
    for name, kind in support.engine_adapters().items():
        assert f"| `{name}` |" in long and f"`{name}`" not in short
        assert all(f"## {model}\n" in long for model in kind.models)


def test_a_test_record_of_an_adapter_that_is_not_here_is_an_error(checks):
    checks["tests"] = [{"adapter": "sora", "suite": "s", "outcomes": {}, "figures": {}}]
    with pytest.raises(ReportError, match="sora"):
        support.support_details(checks)


def test_suites_of_test_records_are_there(checks):
    for record in checks["tests"]:
        assert (ROOT / record["suite"].partition("::")[0]).is_file(), record["suite"]


KEYS = {"models", "version", "licence", "ran", "command", "figures", "note", "refused", "adapter", "context_kind"}


def test_records_are_complete(checks):
    for record in [*checks["checks"], *checks["base_classes"]]:
        assert record["version"] and record["ran"] and record["command"] and record["figures"], record["models"]
        assert record.keys() <= KEYS
        assert record["figures"].keys() <= support.FIGURES.keys()
        for word in record["command"].split():
            if word.startswith("tests/"):
                assert list(ROOT.glob(word)), f"{record['models']}: {word} is not there"


def test_writing_changes_what_is_stale_and_nothing_else(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/models.md", "docs/checks.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    assert support.write(tmp_path) == []
    readme = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme.replace("CausVid", "Caus"))
    assert support.write(tmp_path) == [tmp_path / "README.md"]
    assert (tmp_path / "README.md").read_text() == readme


def test_an_installed_package_has_no_records(tmp_path):
    with pytest.raises(ReportError, match="checkout"):
        support.read_checks(tmp_path)


def test_a_page_without_its_place_is_an_error():
    with pytest.raises(ReportError, match="found 0"):
        support.filled("no place here", "table")


def test_the_tool_prints_the_short_table(capsys):
    assert support.main([]) == 0
    assert capsys.readouterr().out == support.support_table() + "\n"
