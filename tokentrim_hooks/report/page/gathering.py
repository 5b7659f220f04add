"""What a page needs of a log, taken from it record by record: memory depends on the page, not on the log."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from textwrap import shorten

from tokentrim_hooks.report.record import ChunkRecord

MAPS = 12
"""Drift maps shown at most for a sample of a video."""
CALM_MAPS = 3
"""Drift maps of a sample in which nothing was pruned."""
RECORDS = 100_000
"""Records that a page draws at most; further ones are counted."""
RUNS = 2_000
"""Samples of videos that a page tells apart at most."""
TOKENS = 1_000_000
"""Pruned tokens that cache maps draw at most, of all samples together."""
NAMED = 20
"""Chunks named in a sentence at most."""
NOTE = 200
"""Characters of a note at most."""


@dataclass
class Tally:
    """Sums over records.

    Attributes:
        records, judged, pruned: numbers of records. above: of those pruned that were accepted above the threshold.
        named: the first pruned chunks. tokens, dead: positions pruned, and context rows that died of it.
        calls, extra: denoiser calls of the sampler, and those of regenerations; each once for a batch.
        noted: records with a note. acts: (policy, hook) -> calls and rows.
    """

    records: int = 0
    judged: int = 0
    pruned: int = 0
    above: int = 0
    named: list[int] = field(default_factory=list)
    tokens: int = 0
    dead: int = 0
    calls: int = 0
    extra: int = 0
    noted: int = 0
    acts: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def add(self, record: ChunkRecord) -> None:
        """Count one more."""
        self.records += 1
        self.judged += record.severity is not None
        self.noted += bool(record.notes)
        self.dead += record.dead
        if record.sample == 0:
            self.calls += sum(record.phases.values())
            self.extra += record.extra_calls
        if record.pruned:
            self._add_prune(record)
        for act in record.acts:
            key = (shorten(str(act.get("policy")), 60), shorten(str(act.get("hook")), 60))
            if key in self.acts or len(self.acts) < NAMED:
                calls, rows = self.acts.get(key, (0, 0))
                self.acts[key] = (calls + int(act.get("calls") or 0), rows + int(act.get("rows") or 0))

    def _add_prune(self, record: ChunkRecord) -> None:
        self.pruned += 1
        self.tokens += len(record.tokens)
        self.above += record.threshold is not None and (record.accepted_severity or 0) > record.threshold
        if len(self.named) < NAMED:
            self.named.append(record.chunk)


@dataclass
class Run:
    """One sample of one video.

    Attributes:
        records: in order of the log, without drift; tokens of pruned ones only.
        worst, calm: (severity, place) of the most severe pruned records, and of the most severe ones.
    """

    video: int
    sample: int
    tally: Tally = field(default_factory=Tally)
    records: list[ChunkRecord] = field(default_factory=list)
    worst: list[tuple[float, int]] = field(default_factory=list)
    calm: list[tuple[float, int]] = field(default_factory=list)

    def mark(self, record: ChunkRecord, place: int) -> None:
        """Remember where a record is that is worth a map."""
        if record.severity is None or not record.drift:
            return
        heap, most = (self.worst, MAPS) if record.pruned else (self.calm, CALM_MAPS)
        heapq.heappush(heap, (record.severity, place))
        if len(heap) > most:
            heapq.heappop(heap)

    def places(self, most: int = MAPS) -> list[int]:
        """Places of the most severe pruned chunks; where none was pruned, of the most severe ones; in order."""
        chosen = heapq.nlargest(most, self.worst) or heapq.nlargest(min(most, CALM_MAPS), self.calm)
        return sorted(place for _, place in chosen)


@dataclass
class Gathered:
    """All of a log that its page needs; ``kept`` records of ``tally.records`` are in ``runs``."""

    runs: list[Run] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    kept: int = 0


def gather(records: Iterable[tuple[int, ChunkRecord]]) -> Gathered:
    """Take what a page needs of records, each with its place."""
    found: dict[tuple[int, int], Run] = {}
    gathered, tokens = Gathered(), 0
    for place, record in records:
        gathered.tally.add(record)
        key = (record.video, record.sample)
        if gathered.kept >= RECORDS or (key not in found and len(found) >= RUNS):
            continue
        run = found.setdefault(key, Run(*key))
        run.tally.add(record)
        run.mark(record, place)
        tokens += len(record.tokens) if record.pruned else 0
        run.records.append(_light(record, tokens <= TOKENS))
        gathered.kept += 1
    gathered.runs = [found[key] for key in sorted(found)]
    for run in gathered.runs:
        run.records.sort(key=lambda record: record.chunk)
    return gathered


def _light(record: ChunkRecord, with_tokens: bool) -> ChunkRecord:
    tokens = record.tokens if record.pruned and with_tokens else ()
    notes = tuple(shorten(note, NOTE) for note in record.notes[:5])
    return dataclasses.replace(record, drift=(), tokens=tokens, phases={}, acts=(), notes=notes)
