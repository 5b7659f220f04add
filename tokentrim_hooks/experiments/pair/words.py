"""A pair in words, which never say more than one pair can carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokentrim_hooks.report.record import Report
from tokentrim_hooks.report.warm_up import WarmUp, is_above

NOTICEABLE = 2.3
"""CIE76 distance that is just noticeable (Mahy et al., 1994)."""
DRIFTS = ("colour drift", "sharpness drift")
STILL = 0.8
"""Less motion than this share of the unpatched video's is mentioned: a still video drifts little."""
ONE_PAIR = (
    "One pair tells what happened to this video. It cannot tell whether pruning helps: with another seed it may go the "
    "other way. Repeat it over more seeds; below 6 pairs there is no verdict."
)


@dataclass(frozen=True)
class Pair:
    """What became of one pair.

    Attributes:
        report: the log of the patched run. unpatched, patched: values of the two videos, see ``curves.COLUMNS``.
        apart: mean difference of their pixels in levels, None if they differ in size.
        again: the same of two unpatched runs; None likewise. repeated: whether there were two.
        seconds: wall clock of the unpatched and the patched run, from start to end.
    """

    report: Report
    unpatched: Mapping[str, float]
    patched: Mapping[str, float]
    apart: float | None
    again: float | None
    repeated: bool
    seconds: tuple[float, float]

    @property
    def pruned(self) -> list[int]:
        """Chunks of the first video's first sample that were made again."""
        return [r.chunk for r in self.report if r.pruned and (r.video, r.sample) == (0, 0)]


def headline(pair: Pair) -> str:
    """What happened to this video, in a few words."""
    if not pair.report.triggers:
        return "Nothing was pruned."
    if pair.apart == 0:
        why = "its frames show nothing of it" if pair.pruned else "not of this video"
        return f"Chunks were pruned, but {why}: both are the same, bit for bit."
    if pair.repeated and pair.again != 0 and not _beyond_chance(pair):
        return "Cannot be told: the script gives another video at each run."
    moved = [pair.patched[key] - pair.unpatched[key] for key in DRIFTS if _clearly(pair, key)]
    if not moved:
        return "About as much drift with pruning as without, in this one pair."
    less, more = any(change < 0 for change in moved), any(change > 0 for change in moved)
    kind = "Less drift in one measure, more in another," if less and more else "Less drift" if less else "More drift"
    return f"{kind} with pruning, in this one pair."


def _clearly(pair: Pair, key: str) -> bool:
    """Whether a drift differs by more than a tenth."""
    before, after = pair.unpatched[key], pair.patched[key]
    return abs(after - before) > 0.1 * max(abs(before), abs(after))


def _beyond_chance(pair: Pair) -> bool:
    """Whether the pair differs clearly more than two unpatched runs do."""
    return pair.repeated and pair.again is not None and pair.apart is not None and pair.apart > 2 * pair.again


def sentences(pair: Pair) -> list[str]:
    """What was pruned, how the videos drift, whether the script repeats itself, the cost, what all this cannot tell."""
    found = [_what_was_pruned(pair)]
    if pair.apart != 0:
        found += _drift(pair.unpatched, pair.patched)
    return [*found, _repeats(pair), _cost(pair), ONE_PAIR]


def _what_was_pruned(pair: Pair) -> str:
    chunks = {(r.video, r.chunk) for r in pair.report}
    judged = [r for r in pair.report if r.severity is not None]
    if not judged:
        return f"No chunk was judged: the run made {len(chunks)}, and a video's first one has nothing to drift from."
    if not pair.report.triggers:
        return _why_nothing(pair.report)
    numbers = ", ".join(map(str, pair.pruned)) or "none of the first video"
    were = "was" if pair.report.triggers == 1 else "were"
    return f"{pair.report.triggers} of {len(judged)} judged chunks {were} pruned and made again: {numbers}."


def _why_nothing(report: Report) -> str:
    """Chunks of the warm-up may be above their thresholds; others are left as they are where a policy only observes."""
    warm_up = WarmUp(report.settings)
    warming = [record for record in report if warm_up.holds(record)]
    judged = [record for record in report if record.severity is not None and record not in warming]
    early = f", {len(warming)} of them while the statistics were warming up" if warming else ""
    above = sum(map(is_above, judged))
    others = " of the others" if warming else ""
    which = f"{above or 'none'}{others} drifted above {'their' if above > 1 else 'its'} threshold"
    end = ", and the policy left it at that" if above else ", so nothing was changed"
    return f"{len(judged) + len(warming)} chunks were judged{early}; {which}{end}."


def _drift(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    colour = (
        f"From its first to its last 15 %, the mean colour moves by {after['colour drift']:.1f} with the patch and by "
        f"{before['colour drift']:.1f} without (CIE76; {NOTICEABLE} is just noticeable), sharpness by "
        f"{after['sharpness drift']:.3g} and {before['sharpness drift']:.3g}."
    )
    motion = (
        f"Motion is {after['motion']:.2f} pixels per frame with the patch and {before['motion']:.2f} without, change "
        f"per frame {after['flicker']:.2f} and {before['flicker']:.2f} of 255 levels."
    )
    still = before["motion"] > 0 and after["motion"] < STILL * before["motion"]
    return [colour, motion, *(["The patched video moves less: that alone looks like less drift."] if still else [])]


def _repeats(pair: Pair) -> str:
    if not pair.repeated:
        return "Whether the script gives the same video twice was not looked at (--once)."
    if pair.again == 0:
        return "Two unpatched runs from the same seeds are the same, bit for bit: what differs is the patch's doing."
    if pair.again is None:
        return "Two unpatched runs from the same seeds differ in length: part of what differs is not the patch's doing."
    against = "in size" if pair.apart is None else f"by {pair.apart:.2f}"
    return (
        f"Two unpatched runs from the same seeds differ by {pair.again:.2f} of 255 levels, patched and unpatched "
        f"{against}: part of what differs is not the patch's doing."
    )


def _cost(pair: Pair) -> str:
    unpatched, patched = pair.seconds
    calls = pair.report.summary().splitlines()[-1].strip()
    told = "start and loading included, and with the patch its report page"
    return f"{patched:.0f} s with the patch, {unpatched:.0f} s without ({told}); {calls}."
