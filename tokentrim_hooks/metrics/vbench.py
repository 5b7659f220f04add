"""Import of VBench results, with VBench's own normalisation and weights (Vchitect/VBench, scripts/constant.py).

VBench itself needs downloaded models and old library versions, so it runs elsewhere; this reads the JSON that it writes
(``{"dimension_name": [score, details], ...}``, one or several files) and makes its Quality, Semantic and Total scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokentrim_hooks.console import reason
from tokentrim_hooks.errors import VideoError

QUALITY: dict[str, tuple[float, float, float]] = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
"""Dimension: (minimum, maximum, weight)."""
SEMANTIC: dict[str, tuple[float, float, float]] = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}


@dataclass(frozen=True)
class Scores:
    """VBench's totals, 0..1; None where a dimension is missing (``missing``), never counted as zero."""

    quality: float | None
    semantic: float | None
    missing: tuple[str, ...]

    @property
    def total(self) -> float | None:
        """(4 quality + semantic) / 5; not the plain mean that some papers call "Final"."""
        if self.quality is None or self.semantic is None:
            return None
        return (4 * self.quality + self.semantic) / 5

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "quality": self.quality, "semantic": self.semantic, "total": self.total, "missing": list(self.missing)
        }  # fmt: skip


def read_results(paths: Iterable[str | Path]) -> dict[str, float]:
    """Raw scores by dimension from VBench's ``*_eval_results.json`` files; what else they hold is not looked at.

    Raises:
        VideoError: a file is not such a result, or has a dimension that another one has, too.
    """
    raw: dict[str, float] = {}
    for path in paths:
        found = _read(Path(path))
        for name in raw.keys() & found:
            words = f"{path} has a score of {name}, and so has a file before it"
            raise VideoError(f"{words}.\nGive the results of one video, or one set of videos, at a time.")
        raw.update(found)
    return raw


def _read(path: Path) -> dict[str, float]:
    try:
        return _result(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as failure:
        words = f"{path} is not a VBench result file: {reason(failure)}"
        raise VideoError(f"{words}.\nGive the *_eval_results.json that VBench writes.") from failure


def _result(data: Any) -> dict[str, float]:
    """The scores of VBench's dimensions; a file may hold more, as a date."""
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__}, not an object of dimensions")
    named = {str(name).replace(" ", "_"): value for name, value in data.items()}
    found = {name: _score(name, value) for name, value in named.items() if name in QUALITY or name in SEMANTIC}
    if not found:
        raise ValueError("it has none of VBench's dimensions")
    return found


def _score(name: str, value: Any) -> float:
    """A score as VBench writes it: no percentage, and no NaN, which a metric that failed leaves."""
    if not isinstance(value, list) or not value or isinstance(value[0], bool) or not isinstance(value[0], (int, float)):
        raise ValueError(f"{name} has no list that begins with a score")
    if not -1 <= value[0] <= 1:
        raise ValueError(f"the score of {name} is {str(value[0])[:12]}, not between -1 and 1")
    return float(value[0])


def scores(raw: Mapping[str, float]) -> Scores:
    """Quality and Semantic scores from raw scores in 0..1."""
    missing = tuple(name for name in (*QUALITY, *SEMANTIC) if name not in raw)
    return Scores(_weighted(raw, QUALITY), _weighted(raw, SEMANTIC), missing)


def _weighted(raw: Mapping[str, float], table: Mapping[str, tuple[float, float, float]]) -> float | None:
    if any(name not in raw for name in table):
        return None
    parts = [weight * (raw[name] - low) / (high - low) for name, (low, high, weight) in table.items()]
    return sum(parts) / sum(weight for *_, weight in table.values())
