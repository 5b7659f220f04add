"""What happened: one :class:`ChunkRecord` per chunk and sample, kept, summarised and written as JSON lines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokentrim_hooks.errors import ReportError


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk of one sample.

    Attributes:
        video: ordinal of the video in this report; chunk: ordinal of the chunk in its video; sample: batch index.
        start, frames: the chunk's latent frames. phases: denoiser calls of the sampler by phase.
        severity, mean, std, threshold: at the first judgement, in latent units; None where there was none.
        accepted_severity: severity of what was accepted, after regeneration.
        pruned: whether tokens were pruned for this sample. tokens: the unstable set (row-major over the patch grid).
        drift: drift of every token, to four digits.
        dead: context rows pruned for this chunk (a row of a KV cache that was dead before counts once more).
        anchors: latent frames of the context that this prune spared as sinks or anchors.
        regenerations, extra_calls: second attempts and the calls that they cost.
        grid: (height, width) of the token grid. seconds: wall clock from the chunk's first call to its last.
        given: the chunk was handed in as clean context (an image or video prefix). notes: anything unusual.
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
    drift: tuple[float, ...] = ()
    dead: int = 0
    anchors: int = 0
    regenerations: int = 0
    extra_calls: int = 0
    grid: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    given: bool = False
    notes: tuple[str, ...] = ()

    def as_json(self) -> str:
        """One line of strict JSON; values that are not finite become null, also those within lists."""
        return json.dumps(finite(dataclasses.asdict(self)), allow_nan=False)


def finite(value: Any) -> Any:
    """``value``, as deep as it goes, with None for every float that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def thumbnail_name(record: ChunkRecord) -> str:
    """File name of a chunk's thumbnail; it stands here so that a page finds pictures without what draws them."""
    return f"v{record.video}-c{record.chunk:04d}-s{record.sample}.png"


@dataclass
class Report:
    """All chunk records of a patched model, with the settings they were made under."""

    settings: dict[str, Any] = field(default_factory=dict)
    records: list[ChunkRecord] = field(default_factory=list)

    def __iter__(self) -> Iterator[ChunkRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

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
        share = f"{100 * extra / calls:.1f} %" if calls else "n/a"
        return "\n".join(
            [
                f"tokentrim: {len(self.records)} chunk records, {len(judged)} judged, {self.triggers} pruned",
                f"  token positions pruned {pruned}, context rows dead {sum(r.dead for r in self.records)}",
                f"  denoiser calls {calls} + {extra} extra ({share})",
            ]
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``chunks.jsonl`` and ``settings.json`` into ``folder`` (made if absent); return the folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        lines = "".join(record.as_json() + "\n" for record in self.records)
        (path / "chunks.jsonl").write_text(lines, encoding="utf-8")
        write_settings(path, self.settings)
        return path


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``folder/settings.json`` whole or not at all, whenever the process may be killed."""
    draft = folder / "settings.json.part"
    draft.write_text(json.dumps(settings, indent=2, default=str), encoding="utf-8")
    draft.replace(folder / "settings.json")


def read_report(folder: str | Path) -> Report:
    """Read back what :meth:`Report.save` or :class:`JsonLines` wrote; a last line that a crash cut off is left out.

    Raises:
        ReportError: no such log, or a line that is no record.
    """
    path = Path(folder)
    log = path / "chunks.jsonl"
    if not log.is_file():
        raise ReportError(f"no chunks.jsonl in {path}: is this the folder of a run?")
    lines = log.read_text(encoding="utf-8").split("\n")
    whole, rest = lines[:-1], lines[-1]
    records = [_record_of(line, f"{log}:{number}") for number, line in enumerate(whole, 1) if line.strip()]
    if rest.strip():
        with contextlib.suppress(ReportError):
            records.append(_record_of(rest, str(log)))
    settings = path / "settings.json"
    return Report(json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}, records)


def _record_of(line: str, place: str) -> ChunkRecord:
    try:
        values: dict[str, Any] = json.loads(line)
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return ChunkRecord(**{**values, **lists})
    except (ValueError, TypeError, AttributeError) as failure:
        raise ReportError(f"{place} is not a chunk record: {failure}") from failure
