"""A pytest plugin: what tests have found of each adapter, into the records that docs/models.md is made from.

``pytest --record-checks docs/checks.json tests/adapters/test_diffusers_kits.py`` runs as ever, then merges outcomes.
A kit's class knows its adapter (or, where that is found when it runs, ``adapter_name``), and :data:`COLUMNS` which of
its tests fill which column. Another test says both with
``@pytest.mark.checks(ADAPTER, COLUMN)``, or while it runs with ``record_property("checks", (ADAPTER, SUITE, COLUMN,
TEST))``; its ``record_property("exact", (name, effect, error))`` gives the figures. A test that runs a suite in a
process of its own hands it :func:`passed_on`.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from tokentrim_hooks.api import adapters

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "exact": ("test_pruning_equals_minus_infinity", "test_a_late_prune_equals_minus_infinity"),
    "neutral": ("test_observing_changes_no_bit", "test_observing_finished_chunks_changes_no_bit"),
    "undone": ("test_unpatching_leaves_no_trace", "test_an_exception_in_mid_chunk_leaves_no_trace"),
    "candidate": ("test_a_candidate_prune_equals_minus_infinity",),
    "hide": ("test_what_a_policy_hides_no_kernel_sees", "test_hidden_from_one_call_and_from_no_other"),
    "correct": ("test_the_sampler_goes_on_with_what_a_policy_corrects",),
    "settle": ("test_rows_that_a_policy_settles_are_those_of_the_commit",),
    "guide": ("test_a_guided_call_is_made_from_the_latents_that_a_policy_moves", "test_a_look_ahead_touches_nothing"),
    "weigh": ("test_a_weighed_token_gets_that_share_of_attention", "test_weighed_in_one_call_and_in_no_other"),
    "ranks": (),
    "compiled": (),
}
"""The columns of the matrix, and the kit's tests that each needs; those without are filled by marked tests only."""
OF_TEST = {test: column for column, tests in COLUMNS.items() for test in tests}
PACKAGES = ("torch", "diffusers", "transformers")

Record = dict[str, Any]
"""Tests of one adapter in one suite, of one run: adapter, suite, commit, date, versions, outcomes, perhaps figures."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--record-checks FILE``."""
    parser.addoption("--record-checks", metavar="FILE", help="merge what tests find of each adapter into FILE (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    """Collect, if the option is given."""
    config.addinivalue_line("markers", "checks(adapter, column): fills a column of docs/models.md for an adapter")
    if config.getoption("--record-checks"):
        config.pluginmanager.register(Recorder(config), "record-checks")


def passed_on(config: pytest.Config) -> list[str]:
    """Options by which pytest in another process, with this folder on its path, records into the same file.

    Its ``--rootdir`` must be the checkout, for suites are named from there.
    """
    file = config.getoption("--record-checks")
    return ["-p", "record_checks", "--record-checks", str(Path(file).resolve())] if file else []


class Recorder:
    """Notes what each test is about when it is collected, and how it ended; writes when the session ends."""

    def __init__(self, config: pytest.Config) -> None:
        self.file = Path(config.getoption("--record-checks"))
        self.writes = not hasattr(config, "workerinput")  # with pytest-xdist the workers report to one that writes
        self.found: dict[tuple[str, str], Record] = {}
        self.own = {info.adapter: info.name for info in adapters() if info.adapter is not None}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Put adapter, suite, column and name beside the test; they travel with its reports."""
        item.user_properties += [("checks", about) for about in self._about(item)]

    def _about(self, item: pytest.Item) -> Iterable[tuple[str, str, str, str]]:
        path, *inner = item.nodeid.split("::")
        figures = "record_property" in getattr(item, "fixturenames", ())
        for mark in item.iter_markers("checks"):
            if mark.args[1] == "exact" and not figures:
                continue  # a whole module is marked; only its comparisons with a reference give figures
            yield (mark.args[0], path, mark.args[1], "::".join(inner))
        trial = getattr(item, "cls", None)
        name, kit = getattr(trial, "adapter_name", None) or self.own.get(getattr(trial, "adapter", None)), inner[-1]
        if name and kit in OF_TEST:
            yield (name, f"{path}::{inner[0]}", OF_TEST[kit], kit)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note an outcome: the call's, and whatever else did not pass in setup or teardown."""
        if report.when == "call" or report.outcome != "passed":
            for key, about in report.user_properties:
                if key == "checks":
                    self._note(report, *about)

    def _note(self, report: pytest.TestReport, adapter: str, suite: str, column: str, test: str) -> None:
        record = self.found.setdefault((adapter, suite), {"outcomes": {}, "figures": {}})
        outcomes = record["outcomes"].setdefault(column, {})
        if outcomes.get(test) != "failed":
            outcomes[test] = report.outcome if report.outcome != "skipped" else "not checked"
        figures = [value[1:] for key, value in report.user_properties if key == "exact"]
        if figures and report.passed:
            record["figures"][test] = [float(f"{number:.1e}") for number in figures[-1]]

    def pytest_sessionfinish(self) -> None:
        """Merge what was found into the file."""
        if self.writes:
            known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
            found = [{"adapter": a, "suite": s, **stamp(), **record} for (a, s), record in self.found.items()]
            known["tests"] = merged(known.get("tests", []), found)
            self.file.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def merged(old: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """``old`` records without what ``new`` ones have found again, then the new ones; sorted by adapter and suite.

    A suite of which nothing ran (no checkout, say) found nothing: what was known of it stands.
    """
    ran = [record for record in new if {"passed", "failed"} & {end for _, _, end in ends(record)}]
    again = {(record["adapter"], record["suite"], *end[:2]) for record in ran for end in ends(record)}
    kept = [_without(record, again) for record in old]
    found = [record for record in kept if record["outcomes"]] + ran
    return sorted(found, key=lambda record: (record["adapter"], record["suite"], record["date"]))


def ends(record: Record) -> list[tuple[str, str, str]]:
    """Column, test and outcome of each test of a record."""
    return [(column, test, end) for column, tests in record["outcomes"].items() for test, end in tests.items()]


def _without(record: Record, again: set[tuple[str, ...]]) -> Record:
    """A record less the tests that ran again, and their figures."""
    kept: dict[str, dict[str, str]] = {}
    for column, test, end in ends(record):
        if (record["adapter"], record["suite"], column, test) not in again:
            kept.setdefault(column, {})[test] = end
    names = {test for tests in kept.values() for test in tests}
    figures = {test: figure for test, figure in record["figures"].items() if test in names}
    return {**record, "outcomes": kept, "figures": figures}


def stamp() -> Record:
    """The commit that ran (with a + if files were changed, docs apart), the day in UTC, versions of packages."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"commit": _git("rev-parse", "--short", "HEAD") + "+" * bool(changed), "date": day, "versions": _versions()}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
