"""What a page says: verdicts in sentences, figures, cells of its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokentrim_hooks.report.page.gathering import NAMED, Gathered, Run, Tally
from tokentrim_hooks.report.record import ChunkRecord

HEADS = (
    *("chunk", "frames", "severity", "mean", "threshold", "accepted"),
    *("tokens", "rows dead", "extra calls", "seconds", "notes"),
)
"""Headings of the table of all chunks."""


def headline(gathered: Gathered, settings: Mapping[str, Any]) -> str:
    """The whole run in a few sentences, the most important one first."""
    tally, runs = gathered.tally, gathered.runs
    many = f" of {len(runs)} samples" if len(runs) > 1 else ""
    if not tally.judged:
        return f"No chunk{many} was judged, so nothing was pruned. A first chunk has no predecessor to drift from."
    if not tally.pruned:
        why = " ObservePolicy only measures." if "Observe" in str(settings.get("policy", "")) else ""
        return f"Nothing was pruned: none of {_count(tally.judged, 'judged chunk')}{many} was regenerated.{why}"
    touched = sum(run.tally.pruned > 0 for run in runs)
    where = f", in {touched} of {len(runs)} samples" if len(runs) > 1 else ""
    were, their = ("was", "its") if tally.pruned == 1 else ("were", "their")
    return (
        f"{tally.pruned} of {_count(tally.judged, 'judged chunk')} {were} regenerated without {their} drifting tokens"
        f"{where}. {_afterwards(tally)} Whether the video is better for it, no log can say: look at it, or measure "
        "many pairs with tokentrim compare."
    )


def figures(gathered: Gathered) -> list[tuple[str, str]]:
    """What it took, in numbers: name and value."""
    tally = gathered.tally
    share = f" ({100 * tally.extra / tally.calls:.1f} %)" if tally.calls else ""
    found = [
        ("chunk records", f"{tally.records:,}"),
        ("judged, regenerated", f"{tally.judged:,}, {tally.pruned:,}"),
        ("token positions pruned", f"{tally.tokens:,}"),
        ("context rows dead", f"{tally.dead:,}"),
        ("denoiser calls, and further ones", f"{tally.calls:,} + {tally.extra:,}{share}"),
    ]
    for (policy, hook), (calls, rows) in tally.acts.items():
        found.append((f"{policy}, {hook}", f"{rows:,} rows in {calls:,} calls"))
    if tally.noted:
        found.append(("chunks with a note", f"{tally.noted:,}"))
    return found


def left_out(gathered: Gathered, drawn: int) -> str:
    """What a page of a huge log does not show; nothing for any other."""
    tally, words = gathered.tally, []
    if gathered.kept < tally.records:
        words.append(f"The log has {tally.records:,} records; all are counted, the first {gathered.kept:,} are shown.")
    if drawn < len(gathered.runs):
        words.append(f"The first {drawn} of {len(gathered.runs):,} samples are drawn.")
    return " ".join(words)


def verdict(tally: Tally) -> str:
    """One or two sentences: how many chunks were regenerated, which, and how many stayed above the threshold."""
    if not tally.judged:
        return "No chunk was judged."
    if not tally.pruned:
        return f"None of {_count(tally.judged, 'judged chunk')} was regenerated."
    more = f" and {tally.pruned - NAMED} more" if tally.pruned > NAMED else ""
    numbers = ", ".join(map(str, tally.named)) + more
    return f"{tally.pruned} of {_count(tally.judged, 'judged chunk')} regenerated: {numbers}. {_afterwards(tally)}"


def _afterwards(tally: Tally) -> str:
    end = f"and {_were(tally.above)} accepted all the same" if tally.above else "after it"
    if tally.pruned == 1:
        still = "still above the threshold, and accepted all the same" if tally.above else "below the threshold"
        return f"Made again, it was {still}."
    return f"{tally.above or 'None'} of these stayed above the threshold {end}."


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def shown(run: Run, maps: int) -> str:
    """Which chunks have a drift map."""
    pruned = run.tally.pruned
    if not pruned:
        return "the most severe chunks, for none was pruned"
    return "the pruned chunks" if pruned <= maps else f"the {maps} most severe of {pruned} pruned chunks"


def chart_in_words(run: Run) -> str:
    """The control chart for those who do not see it; its numbers are in the table."""
    severities = [r.severity for r in run.records if r.severity is not None and math.isfinite(r.severity)]
    span = f", severity {min(severities):.3g} to {max(severities):.3g}" if severities else ""
    return f"control chart: severity per chunk against its threshold{span}. {verdict(run.tally)}"


def rows(run: Run, most: int) -> list[dict[str, Any]]:
    """Rows of the table of chunks, ``most`` of them: of more, those that were pruned go first, then every n-th."""
    return [{"pruned": record.pruned, "cells": _cells(record)} for record in chosen(run.records, most)]


def chosen(records: Sequence[ChunkRecord], most: int) -> list[ChunkRecord]:
    """At most ``most`` records, in order: half of them may be pruned ones, the most severe; the others are spread."""
    if len(records) <= most:
        return list(records)
    pruned = sorted((i for i, r in enumerate(records) if r.pruned), key=lambda i: -(records[i].severity or 0))
    kept = set(pruned[: most // 2])
    step = len(records) / (most - len(kept))
    kept.update(int(i * step) for i in range(most - len(kept)))
    return [records[i] for i in sorted(kept)]


def _cells(record: ChunkRecord) -> list[str]:
    numbers = (record.severity, record.mean, record.threshold, record.accepted_severity)
    return [
        str(record.chunk),
        f"{record.start}-{record.start + record.frames - 1}",
        *("" if value is None else f"{value:.4g}" for value in numbers),
        str(len(record.tokens) or "") if record.pruned else "",
        str(record.dead or ""),
        str(record.extra_calls or ""),
        f"{record.seconds:.2f}",
        "; ".join((*(("given",) if record.given else ()), *record.notes)),
    ]
