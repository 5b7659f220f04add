"""The tables of supported models: made from the installed adapters and the check records, never written by hand.

What an adapter says of itself (name, models, context) comes from the adapter; what was run on which version comes from
``docs/checks.json`` in the checkout. A model without a record is printed as *not checked*.

``python tools/support_tables.py --write`` writes both tables to where they belong, README.md and docs/models.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import places
from check_matrix import NOT_CHECKED, matrix
from engine_adapters import engine_adapters

from tokentrim_hooks import Adapter
from tokentrim_hooks.api import adapters
from tokentrim_hooks.console import markdown_table
from tokentrim_hooks.errors import ReportError
from tokentrim_hooks.policy.commit_window import CommitWindow
from tokentrim_hooks.policy.flowmo import FlowMo
from tokentrim_hooks.policy.frame_eviction import FrameEviction
from tokentrim_hooks.policy.late_mean import LateMean
from tokentrim_hooks.policy.latent_moments import LatentMoments
from tokentrim_hooks.policy.row_moments import RowMoments
from tokentrim_hooks.policy.soft_prune import SoftPrune

ROOT = Path(__file__).parents[1]
"""The checkout; an installed wheel has no check records beside it."""
OWN = "tokentrim-hooks "
"""How the name of our own distribution begins: tables in our README list our adapters only."""

HOOKS = {
    "judge": "Judges",
    "hide": "Hides",
    "commit": "Commits",
    "correct": "Corrects",
    "settle": "Settles",
    "guide": "Guides",
    "weigh": "Weighs",
}
"""Words of :attr:`Adapter.takes`, and how the table heads them."""
SHORT = {"judge": "Prune", "hide": "Hide", "correct": "Correct", "settle": "Settle", "guide": "Guide"}
"""The same for the README's table."""
COLUMNS, BETWEEN = 120, " · "
"""Of a line of the README; what stands between models there, some of which have a comma in their name."""
METHODS = (CommitWindow(), LatentMoments(), LateMean(), RowMoments(), FlowMo(), SoftPrune(), FrameEviction())
"""Methods that need more of a model than that it can be judged."""
AT_ALL_CALLS = (SoftPrune, FrameEviction)
"""Those that hide from every call, which some models do not take."""

FORKS = (
    "Public forks that no adapter was written for: their real generator and attention, or FramePack's transformer and "
    "sampler, with tiny random weights on a CPU, in a loop like their pipelines', windows full and rolling. *Exact*: "
    "the largest difference to the -inf reference. Tried once, by hand: no test runs them."
)

Row = tuple[str, str, str, Mapping[str, Any]]
"""Model, adapter, where the context lies, the check record (empty if there is none)."""


def read_checks(root: Path = ROOT) -> dict[str, Any]:
    """Read ``docs/checks.json``.

    Raises:
        ReportError: there is none, as in an installed package.
    """
    path = root / "docs" / "checks.json"
    try:
        checks: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise ReportError(f"no check records here: {path.name} lies in a checkout, in docs/") from failure
    return checks


def kinds() -> dict[str, type[Adapter[Any]]]:
    """Our adapters by name: the built-in ones, then those of the example plugins for engines."""
    own = {info.name: info.adapter for info in adapters() if info.adapter and info.distribution.startswith(OWN)}
    return {**own, **engine_adapters()}


def rows(checks: Mapping[str, Any]) -> list[Row]:
    """One row per model of our adapters, sorted by adapter, those of engines behind, then the base classes.

    Raises:
        ReportError: a record names a model that no adapter of ours has.
    """
    by_model = {model: record for record in checks["checks"] for model in record["models"]}
    found: list[Row] = []
    for name, kind in kinds().items():
        found += [(model, name, kind.context_kind, by_model.pop(model, {})) for model in kind.models]
    if by_model:
        raise ReportError(f"check records of models that no adapter has: {', '.join(sorted(by_model))}")
    for base in checks.get("base_classes", ()):
        found += [(model, base["adapter"], base["context_kind"], base) for model in base["models"]]
    return found


def support_table(checks: Mapping[str, Any] | None = None) -> str:
    """The short table, in Markdown: models of built-in adapters with equal hooks share lines of 120 characters."""
    checks, engines = checks or read_checks(), engine_adapters()
    takes = {info.name: info.adapter.takes for info in adapters() if info.adapter is not None}
    groups: dict[tuple[str, ...], list[str]] = {}
    built_in = {adapter: found for adapter, found in _by_adapter(checks).items() if adapter not in engines}
    for adapter, found in built_in.items():
        taken = takes.get(adapter, {"judge"})  # a base class declares what every adapter does at least
        models = groups.setdefault(tuple("yes" if hook in taken else "" for hook in SHORT), [])
        models += [model + ("" if version != NOT_CHECKED else f" ({NOT_CHECKED})") for model, version in found]
    table = markdown_table(["Models", *SHORT.values()], [line for group in groups.items() for line in _lines(*group)])
    note = f"Checked on {checks['device']}. Adapters, versions, figures: [docs/models.md](docs/models.md)."
    return f"{table}\n\n{places.wrapped(note)}"


def _lines(hooks: tuple[str, ...], models: Sequence[str]) -> list[list[str]]:
    """Rows of a table for models with these hooks, each no wider than ``COLUMNS``; long names are put together."""
    room = COLUMNS - len(f"|  | {' | '.join(hooks)} |")
    packed: list[list[str]] = []
    for model in sorted(models, key=len, reverse=True):
        fits = (line for line in packed if len(BETWEEN.join([*line, model])) <= room)
        line = next(fits, [])
        if not line:
            packed.append(line)
        line.append(model)
    return [[line, *hooks] for line in sorted(BETWEEN.join(sorted(line, key=str.casefold)) for line in packed)]


def _by_adapter(checks: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Models of each adapter, with the version that each was checked on."""
    found: dict[str, list[tuple[str, str]]] = {}
    for model, adapter, _, record in rows(checks):
        found.setdefault(adapter, []).append((model, record.get("version", NOT_CHECKED)))
    return found


def support_details(checks: Mapping[str, Any] | None = None) -> str:
    """The long version, in Markdown: one section per model, with what was run, figures and refusals."""
    checks = checks or read_checks()
    sections = [_section(*row, checks["device"]) for row in rows(checks)]
    refused = markdown_table(["Refused", "Why"], [[item["model"], item["why"]] for item in checks["refused"]])
    tried = [[item["fork"], item["adapter"], item["found"]] for item in checks["forks"]]
    forks = ["## Forks tried", places.wrapped(FORKS), markdown_table(["Fork and commit", "Adapter", "Found"], tried)]
    hooks = ["## Which hooks of policies a model takes", hooks_table()]
    found = ["## What tests have found", tests_matrix(checks)]
    return "\n\n".join([*found, *hooks, *sections, *forks, "## Refused, each with a reason", refused])


def tests_matrix(checks: Mapping[str, Any]) -> str:
    """What tests have found of each of our adapters, in Markdown; see ``tools/check_matrix.py``.

    Raises:
        ReportError: a test's record names an adapter that is not ours.
    """
    own = list(kinds())
    strange = {record["adapter"] for record in checks.get("tests", ())} - set(own)
    if strange:
        raise ReportError(f"test records of adapters that are not here: {', '.join(sorted(strange))}")
    refused: dict[str, int] = {}
    for _, name, _, record in rows(checks):
        refused[name] = refused.get(name, 0) + len(record.get("refused", ()))
    carries = {name: (kind.carry, kind.carry_step) for name, kind in kinds().items()}
    no_candidate = {name for name, ways in carries.items() if ways == (Adapter.carry, Adapter.carry_step)}
    return matrix(checks.get("tests", ()), own, refused, no_candidate)


def hooks_table() -> str:
    """Which hooks each of our adapters declares, in Markdown, and which methods it takes with them."""
    lines = []
    for name, kind in kinds().items():
        words = ["yes" if hook in kind.takes else "" for hook in HOOKS]
        phases = [phase for phase in ("first", "refine", "commit") if phase in kind.hides_from]
        if words[1] and len(phases) < 3:
            words[1] = f"from {' and '.join(phases)} calls"
        able = [policy for policy in METHODS if policy.needs <= kind.takes]
        taken = [type(p).__name__ for p in able if len(phases) == 3 or not isinstance(p, AT_ALL_CALLS)]
        lines.append([f"`{name}`", *words, ", ".join(taken)])
    note = (
        "A policy is refused with a reason on a model that does not take all that it needs. *Commits*: finished chunks "
        "are written into the context by calls of their own. What is not marked was not proved here, or is not there."
    )
    return f"{markdown_table(['Adapter', *HOOKS.values(), 'Methods beside pruning'], lines)}\n\n{places.wrapped(note)}"


def write(root: Path = ROOT) -> list[Path]:
    """Write the short table into README.md and the long one into docs/models.md; return what changed."""
    checks = read_checks(root)
    blocks = {root / "README.md": support_table(checks), root / "docs" / "models.md": support_details(checks)}
    changed = []
    for place, block in blocks.items():
        old = place.read_text(encoding="utf-8")
        new = filled(old, block)
        if new != old:
            place.write_text(new, encoding="utf-8")
            changed.append(place)
    return changed


def filled(text: str, block: str) -> str:
    """``text`` with ``block`` between its two ``support-table`` comments.

    Raises:
        ReportError: the comments are not there, once each.
    """
    try:
        return places.filled(text, "support-table", f"\n{block}\n")
    except ValueError as failure:
        raise ReportError(str(failure)) from failure


def _section(model: str, adapter: str, kind: str, record: Mapping[str, Any], device: str) -> str:
    """Heading and list of one model."""
    lines = [f"- Adapter: {adapter}. Context: {kind}."]
    if not record:
        return "\n".join([f"## {model}", "", *lines, f"- **{NOT_CHECKED}**"])
    licence = f" Licence: {record['licence']}." if "licence" in record else " Licence: not recorded."
    lines += [f"- Checked on: {record['version']}, on {device}.{licence}", f"- Ran: {record['ran']}."]
    figures = record.get("figures", {})
    lines += [f"- {word}: {figures[key]}." for key, word in FIGURES.items() if key in figures]
    lines += [f"- Note: {record['note']}."] if "note" in record else []
    lines += [f"- Refused: {'; '.join(record['refused'])}."] if "refused" in record else []
    return "\n".join([f"## {model}", "", *map(places.wrapped, lines), f"- Again: `{record['command']}`"])


FIGURES = {"effect": "Largest change by a prune", "error": "Largest difference to the -inf reference", "other": "Also"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the short table, or with ``--write`` put both tables in their places."""
    parser = argparse.ArgumentParser(prog="python tools/support_tables.py", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write README.md and docs/models.md of this checkout")
    if not parser.parse_args(arguments).write:
        print(support_table())
        return 0
    for place in write():
        print(f"written: {place.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
