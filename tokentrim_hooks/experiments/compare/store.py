"""Results on disk, one JSON line per setting and batch of seeds, written as they come: an interrupted run goes on."""

from __future__ import annotations

import contextlib
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokentrim_hooks.errors import ReportError, TokenTrimError
from tokentrim_hooks.experiments.compare.settings import Setting
from tokentrim_hooks.report.fields import LARGE, parsed
from tokentrim_hooks.report.files import append, made, read, write
from tokentrim_hooks.report.log_file import alone, read_settings
from tokentrim_hooks.report.record import finite

MOST = 1 << 30
"""Bytes of a file of a comparison at most."""


@dataclass(frozen=True)
class Outcome:
    """One batch of seeds under one setting.

    Attributes:
        setting, description: name and meaning of the setting (:meth:`Setting.as_dict`).
        seeds: one per sample; all lists below go with them.
        values: per column key a value for each sample; NaN where there was nothing to measure.
        judged: chunks that got a verdict, for each sample. pruned: ordinals of the chunks that were regenerated.
        chunks, calls, extra: chunks, denoiser calls of the sampler and further ones, of the batch.
        alone: further calls for each sample, had it been rolled out alone.
        seconds: wall clock of the rollout.
    """

    setting: str
    description: dict[str, Any]
    seeds: list[int]
    values: dict[str, list[float]]
    judged: list[int]
    pruned: list[list[int]]
    chunks: int
    calls: int
    extra: int
    alone: list[int]
    seconds: float


class Store:
    """The folder of a comparison: ``settings.json`` says of what, ``results.jsonl`` holds the outcomes.

    Raises:
        TokenTrimError: the folder holds a comparison made with other settings, or a setting of this name but another
            meaning.
        ReportError: a line that is no outcome (the last one, if a crash cut it off, is dropped).
    """

    def __init__(self, folder: Path, made_with: Mapping[str, Any], settings: Sequence[Setting] = ()) -> None:
        self.folder, self.log = folder, folder / "results.jsonl"
        self.outcomes: list[Outcome] = []
        made(folder)
        with self.held():  # not while somebody writes: the half of a line would be taken for what a crash left
            self._guard(made_with)
            self.refresh()
        for outcome in self.outcomes:
            for setting in settings:
                if setting.name == outcome.setting and setting.as_dict() != outcome.description:
                    raise TokenTrimError(f"{folder} holds results of another setting named {setting.name!r}; rename it")

    def _guard(self, made_with: Mapping[str, Any]) -> None:
        file = self.folder / "settings.json"
        now = self.made_with = json.loads(json.dumps(made_with))
        if not file.is_file():
            if self.log.is_file() and self.log.stat().st_size:
                raise TokenTrimError(
                    f"{self.log} has no settings.json beside it, so nobody knows what these are results of; "
                    "give another --out"
                )
            write(file, json.dumps(now, indent=2) + "\n")
            return
        before = read_settings(file, MOST, "Give another --out, or a folder whose settings are whole.")
        if before != now:
            words = _in_words(list(_differences(before, now)))
            raise TokenTrimError(f"{self.folder} holds another comparison: {words}.\nGive another --out.")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            TokenTrimError: one is at it.
        """
        with alone(self.folder / ".lock") as nobody_else:
            if not nobody_else:
                raise TokenTrimError(
                    f"another comparison is running in {self.folder}, and would do the same work again.\n"
                    "Wait for its end, or give another --out."
                )
            yield

    def refresh(self) -> None:
        """Read the outcomes anew: another process may have added some. To be called while the folder is :meth:`held`.

        Raises:
            ReportError: the log cannot be read, or a line is no outcome.
        """
        self.outcomes = read_outcomes(self.log)

    def has(self, setting: str, seeds: Sequence[int]) -> bool:
        """Whether this batch is done."""
        return any(o.setting == setting and o.seeds == list(seeds) for o in self.outcomes)

    def add(self, outcome: Outcome) -> None:
        """Append one outcome and see it on disk.

        Raises:
            ReportError: it cannot be written.
        """
        append(self.log, json.dumps(finite(asdict(outcome)), allow_nan=False) + "\n")
        self.outcomes.append(outcome)


def _short(value: Any) -> str:
    return textwrap.shorten(value if isinstance(value, str) else repr(value), 120)


def read_outcomes(log: Path) -> list[Outcome]:
    """All whole lines of a log; what a crash left of a last one is removed from the file.

    Raises:
        ReportError: it cannot be read, or a line is no outcome.
    """
    if not log.is_file():
        return []
    text = read(log, MOST)
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        # Otherwise the next outcome would be appended to half a line.
        write(log, whole)
    return [_outcome(line, f"{log}:{n}") for n, line in enumerate(whole.split(b"\n"), 1) if line.strip()]


def _outcome(line: bytes, place: str) -> Outcome:
    try:
        found = parsed(line)
        _check(found)
        values = {k: [math.nan if v is None else v for v in column] for k, column in found["values"].items()}
        return Outcome(**{**found, "values": values})
    except (ValueError, TypeError, KeyError, AttributeError) as failure:
        hint = "Take the line out, or give another --out."
        raise ReportError(f"{place} is not an outcome of a comparison: {_short(str(failure))}.\n{hint}") from failure


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What differs, by its name; where that holds names of its own, what differs in it."""
    for key in sorted({*before, *now}):
        then, here = before.get(key), now.get(key)
        if isinstance(then, dict) and isinstance(here, dict):
            yield from _differences(then, here)
        elif then != here:
            yield key, then, here


def _in_words(differences: Sequence[tuple[str, Any, Any]]) -> str:
    """Three at most, those first that fit a line: columns of measures follow from other chunks, and say less."""
    told = [f"{key} {then} then, {now} now" for key, then, now in differences
            if not any(isinstance(value, (list, dict)) for value in (then, now))]  # fmt: skip
    return "; ".join(_short(words) for words in told[:3]) or f"other {', '.join(key for key, *_ in differences)}"


def _check(found: Any) -> None:
    """See that every value is of its kind, and that there is one of each for every seed."""
    if not (isinstance(found, dict) and isinstance(found["setting"], str) and isinstance(found["description"], dict)):
        raise ValueError("it names no setting")
    lists = {name: found[name] for name in ("seeds", "judged", "alone")}
    numbers = {name: [found[name]] for name in ("chunks", "calls", "extra")}
    pruned = {"pruned": [number for chunks in found["pruned"] for number in chunks]}
    for name, values in {**lists, **numbers, **pruned}.items():
        if not all(type(value) is int for value in values):
            raise ValueError(f"{name} must be whole numbers")
    columns = list(found["values"].values())
    if not all(v is None or (type(v) in (int, float) and abs(v) < LARGE) for column in columns for v in column):
        raise ValueError("values must be numbers")
    if {len(found["seeds"])} != {*map(len, (*lists.values(), found["pruned"], *columns))}:
        raise ValueError("it has not one value for each seed")
