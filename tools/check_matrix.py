"""The matrix of docs/models.md: each cell is what tests have found (``tools/record_checks.py``), or *not checked*."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from places import wrapped
from record_checks import COLUMNS, ends

from tokentrim_hooks.console import markdown_table

NOT_CHECKED = "not checked"
NOT_OFFERED = "not offered"
WITHOUT_CANDIDATE = ("candidate", "test_observing_finished_chunks_changes_no_bit")
"""A column, and a test of another one, that say nothing of an adapter which refuses probe='candidate'."""
HEADS = {
    "exact": "Exact",
    "neutral": "Neutral",
    "undone": "Undone",
    "candidate": "Judged by candidate",
    "hooks": "Hooks proved",
    "ranks": "Ranks",
    "compiled": "Compiled",
}
HOOKS = ("hide", "correct", "settle", "guide", "weigh")
NOTE = (
    "Of all suites of tests that have run an adapter. *Yes*: all tests of that column passed; *in part*: the others "
    "did not run, or found nothing to check; *not checked*: none ran; *not offered*: refused in words. *Refused* "
    "counts the refusals described below, "
    "by hand. Again: `pytest --record-checks docs/checks.json SUITE`, then `python tools/support_tables.py --write`; "
    "a `+` behind a commit says that its files were changed."
)

WHY = (
    "Why the rest is not checked. *Hooks* in part: some tests ask for what a model has not (a commit of its own, every "
    "kind of call open to hiding, one chunk in flight) and say so as they run. *Ranks*: what ranks agree on is the "
    "core's, and is tried on the bundled model and with SGLang's own groups; of other models parallelism is refused "
    "(diffusers' context parallelism, MAGI-1's cp_size, Ulysses) or was not tried; FastVideo 0.2.1's causal attention "
    "divides nothing over ranks (LocalAttention). *Compiled*: the other models' own "
    "code was not compiled."
)

Record = Mapping[str, Any]


def matrix(
    records: Sequence[Record], names: Iterable[str], refused: Mapping[str, int], no_candidate: Container[str] = ()
) -> str:
    """The tables, in Markdown, of ``names`` (adapters): what all tests of each have found, and their suites.

    ``no_candidate``: those that refuse ``probe="candidate"``.
    """
    lines, suites = [], []
    for name in names:
        mine = [record for record in records if record["adapter"] == name]
        cells = _cells(mine, offered=name not in no_candidate)
        lines.append([f"`{name}`", *cells, largest(mine), str(refused.get(name) or "none recorded")])
        for suite in sorted({record["suite"] for record in mine}):
            suites.append([f"`{name}`", *_suite([record for record in mine if record["suite"] == suite], suite)])
    table = markdown_table(["Adapter", *HEADS.values(), "Largest error", "Refused"], lines)
    suites_table = markdown_table(["From", "Suite", "Of", "Commit and date"], suites)
    return "\n\n".join([table, wrapped(NOTE), wrapped(WHY), suites_table])


def _cells(records: Sequence[Record], offered: bool) -> list[str]:
    return [hooks(records) if column == "hooks" else cell(records, column, offered) for column in HEADS]


def largest(records: Sequence[Record]) -> str:
    """The largest error that tests have measured."""
    figures = [error for record in records for _, error in record["figures"].values()]
    return f"{max(figures):.1e}" if figures else "not recorded"


def _suite(records: Sequence[Record], suite: str) -> list[str]:
    """Its name, what it has found something of, and when it ran."""
    found = {column for record in records for column, _, end in ends(dict(record)) if end != NOT_CHECKED}
    runs = ", ".join(dict.fromkeys(f"{record['commit']} {record['date']}" for record in records))
    return [f"`{suite.removeprefix('tests/')}`", ", ".join(column for column in COLUMNS if column in found), runs]


def cell(records: Sequence[Record], column: str, offered: bool = True) -> str:
    """One word for the tests of a column, failures first; ``offered``: whether ``probe="candidate"`` is not refused."""
    left_out = () if offered else WITHOUT_CANDIDATE
    told = [(test, end) for record in records for of, test, end in ends(dict(record)) if of == column]
    found = [end for test, end in told if test not in left_out]
    passed = found.count("passed")
    if "failed" in found:
        return f"**fails** ({found.count('failed')} of {len(found)})"
    if not passed:
        return NOT_OFFERED if column in left_out else NOT_CHECKED
    kit = any("::" in record["suite"] for record in records)
    # A kit's tests that were left out count, too.
    meant = max(len(found), len(set(COLUMNS[column]) - set(left_out)) if kit else 0)
    return "yes" if passed == meant else f"in part ({passed} of {meant})"


def hooks(records: Sequence[Record]) -> str:
    """The hooks of policies of which tests ran, with what they found if it was not simply *yes*."""
    found = {hook: cell(records, hook) for hook in HOOKS}
    told = [hook if end == "yes" else f"{hook} {end}" for hook, end in found.items() if end != NOT_CHECKED]
    return ", ".join(told) or NOT_CHECKED
