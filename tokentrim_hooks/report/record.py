"""What happened: one :class:`ChunkRecord` per chunk and sample, kept, summarised and written as JSON lines."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

from tokentrim_hooks.errors import ReportError
from tokentrim_hooks.report import names
from tokentrim_hooks.report.fields import fields_of
from tokentrim_hooks.report.files import made, refuse_links_out, told, write
from tokentrim_hooks.report.floats import Floats, four_digits
from tokentrim_hooks.report.log_file import is_held, read_settings, write_settings

LINE = 1 << 26
"""Bytes of a line of a log at most: that of a chunk of 14,400 tokens has 130,000."""
SETTINGS = 1 << 24
"""Bytes of settings at most."""

BROKEN_OFF = "a call of it did not come back"
"""Note of a chunk in which a denoiser call raised, or was interrupted."""


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk of one sample.

    Attributes:
        video: ordinal of the video in this report; chunk: ordinal of the chunk in its video; sample: batch index.
        start, frames: the chunk's latent frames. phases: denoiser calls of the sampler by phase.
        severity, mean, std, threshold: at the first judgement, in latent units; None where there was none.
        accepted_severity: severity of what was accepted, after regeneration.
        watched, accepted_watched: the same by a policy that only watches (:class:`Watched`); None where none does.
        pruned: whether tokens were pruned for this sample. tokens: the unstable set (row-major over the patch grid).
        drift: drift of every token; a log has four digits of it. Empty in the report of a run that has made more than
            a thousand chunks since; the log has it still.
        dead: context rows pruned for this chunk (a row of a KV cache that was dead before counts once more).
        anchors: latent frames of the context that this prune spared as sinks or anchors.
        regenerations, extra_calls: second attempts and the calls that they cost.
        proof_calls: calls with nothing pruned that showed, before a model's first prune, that it can be regenerated.
        grid: (height, width) of the token grid. seconds: wall clock from the chunk's first call to its last.
        given: the chunk was handed in as clean context (an image or video prefix). notes: anything unusual.
        acts: what policies did beside judging: ``policy``, ``hook``, ``calls`` at which it did something, ``rows`` of
            the context hidden or rewritten in them, ``norm`` of what was added to x0, and ``mean_before``,
            ``std_before``, ``mean_after``, ``std_after`` of rewritten rows of V (these five of all samples).
    """

    video: int
    chunk: int
    sample: int
    start: int
    frames: int
    phases: dict[str, int]
    severity: float | None = None
    mean: float | None = None
    std: float | None = None
    threshold: float | None = None
    accepted_severity: float | None = None
    pruned: bool = False
    tokens: tuple[int, ...] = ()
    drift: Sequence[float] = ()
    dead: int = 0
    anchors: int = 0
    regenerations: int = 0
    extra_calls: int = 0
    proof_calls: int = 0
    grid: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    given: bool = False
    notes: tuple[str, ...] = ()
    acts: tuple[dict[str, Any], ...] = ()
    watched: float | None = None
    accepted_watched: float | None = None

    def as_json(self) -> str:
        """One line of strict JSON; values that are not finite become null, also those within lists."""
        return json.dumps(finite(dataclasses.asdict(self)), allow_nan=False)


def finite(value: Any) -> Any:
    """``value``, as deep as it goes, with None for every float that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, Floats):
        value = [four_digits(part) for part in value]
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def thumbnail_name(record: ChunkRecord) -> str:
    """File name of a chunk's thumbnail; it stands here so that a page finds pictures without what draws them."""
    return f"v{record.video:d}-c{record.chunk:04d}-s{record.sample:d}.png"


@dataclass(repr=False)
class Report:
    """All chunk records of a patched model, with the settings they were made under."""

    settings: dict[str, Any] = field(default_factory=dict)
    records: list[ChunkRecord] = field(default_factory=list)

    def __iter__(self) -> Iterator[ChunkRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        about = ", ".join(str(self.settings[key]) for key in ("adapter", "policy") if key in self.settings)
        return f"<Report {about + ': ' if about else ''}{self.summary().partition(chr(10))[0]}; see summary()>"

    @property
    def triggers(self) -> int:
        """Chunks (of any sample) that were pruned and regenerated."""
        return sum(record.pruned for record in self.records)

    def summary(self) -> str:
        """A few lines of plain text: chunks, triggers, tokens pruned, extra denoiser calls."""
        if not self.records:
            return "tokentrim: no chunk seen yet"
        judged = [r for r in self.records if r.severity is not None]
        calls = sum(sum(r.phases.values()) for r in self.records if r.sample == 0)
        extra = sum(r.extra_calls for r in self.records if r.sample == 0)
        pruned = sum(len(r.tokens) for r in self.records if r.pruned)
        proof = sum(r.proof_calls for r in self.records if r.sample == 0)
        proved = f", {proof} more to prove that calls can be repeated" if proof else ""
        share = f"{100 * extra / calls:.1f} %" if calls else "n/a"
        return "\n".join(
            [
                f"tokentrim: {len(self.records)} chunk records, {len(judged)} judged, {self.triggers} pruned",
                f"  token positions pruned {pruned}, context rows dead {sum(r.dead for r in self.records)}",
                f"  denoiser calls {calls} + {extra} extra ({share}){proved}",
            ]
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``chunks.jsonl`` and ``settings.json`` into ``folder`` (made if absent); return the folder.

        What lies there is replaced. A rank other than 0 has its rank in the names, as in :class:`JsonLines`.

        Raises:
            ReportError: a run is writing that log just now, or the folder cannot be written.
        """
        path, tag = made(folder), names.tag_of_process()
        log = names.log_of(path, tag)
        if is_held(log):
            raise ReportError(f"a run is writing {log}, and saving would take its place.\nGive save another folder.")
        write(log, "".join(record.as_json() + "\n" for record in self.records))
        write_settings(path, self.settings, tag)
        return path


def read_report(place: str | Path) -> Report:
    """Read back what :meth:`Report.save` or :class:`JsonLines` wrote; a last line that a crash cut off is left out.

    Args:
        place: a run's folder, or one log in it.

    Raises:
        ReportError: no such log, a line that is no record, settings that cannot be read.
    """
    log = log_in(Path(place))
    settings = settings_beside(log)
    return Report(settings, [record for _, record in stream(log, settings)])


def log_in(place: Path) -> Path:
    """The log that is meant: ``place`` itself, or the main one of a folder, or the first one where there is no main.

    Raises:
        ReportError: there is none.
    """
    if place.is_file():
        return place
    with told(f"cannot read {place}"):
        logs = names.logs_in(place) if place.is_dir() else []
        below = sorted(inner.parent.name for inner in place.glob("*/chunks*.jsonl")) if not logs else []
    if not logs:
        hint = f"\nThere are logs in {', '.join(dict.fromkeys(below))}: give one of these." if below else ""
        raise ReportError(f"no chunks.jsonl in {place}: give the folder of a run.{hint}")
    return logs[0]


def settings_beside(log: Path) -> dict[str, Any]:
    """The settings that a log was made under; none where the file is missing.

    Raises:
        ReportError: they cannot be read.
    """
    path = names.settings_of(log.parent, names.tag_of(log))
    if not path.is_file():
        return {}
    return read_settings(path, SETTINGS, "Move it away: the log is read without it.")


def stream(log: Path, settings: Mapping[str, Any] | None = None) -> Iterator[tuple[int, ChunkRecord]]:
    """The records of a log one after the other, each with its place in bytes; a last line that was cut off is left out.

    Args:
        log: the file. settings: those beside it, for a hint in an error.

    Raises:
        ReportError: it cannot be read, or a line is no record.
    """
    refuse_links_out(log)
    with told(f"cannot read {log}"), log.open("rb") as file:
        place = 0
        for number in itertools.count(1):
            line = file.readline(LINE)
            if line.strip() or not line.endswith(b"\n"):
                record = _record(line, f"{log}:{number}", settings or {})
                if record is None:
                    return  # the end, or what a crash left of it
                yield place, record
            place += len(line)


def records_at(log: Path, places: Iterable[int]) -> Iterator[ChunkRecord]:
    """The records at these places, as :func:`stream` gave them; one that is there no more is left out.

    Raises:
        ReportError: as :func:`stream`.
    """
    refuse_links_out(log)
    with told(f"cannot read {log}"), log.open("rb") as file:
        for place in places:
            file.seek(place)
            record = _record(file.readline(LINE), f"{log}, byte {place},", {})
            if record is not None:
                yield record


def _record(line: bytes, where: str, settings: Mapping[str, Any]) -> ChunkRecord | None:
    """The record of a line; None for one that was cut off."""
    try:
        return ChunkRecord(**fields_of(line))
    except ValueError as failure:
        if len(line) < LINE and not line.endswith(b"\n"):
            return None
        words = "it has no end" if len(line) == LINE else shorten(str(failure), 120)
        raise ReportError(f"{where} is not a chunk record: {words}.\n{_hint(settings)}") from failure


def _hint(settings: Mapping[str, Any]) -> str:
    versions = settings.get("versions")
    theirs = versions.get("tokentrim-hooks") if isinstance(versions, Mapping) else None
    ours = version("tokentrim-hooks")
    if isinstance(theirs, str) and theirs != ours:
        return f"It was written by version {shorten(theirs, 30)}, this is {ours}: read it with that one."
    return "Take the line out, or give the folder of another run."
