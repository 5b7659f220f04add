"""Questions to a log, and their answers as a table of the report page."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.what_if.replay import PAPER, Replay, of_the_run, same_severity, watcher_of
from tokentrim_hooks.plugins import make_policy
from tokentrim_hooks.policy.adaptive import AdaptivePolicy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.options import known
from tokentrim_hooks.policy.token_trim import DriftPolicy
from tokentrim_hooks.report.page import Section
from tokentrim_hooks.report.record import ChunkRecord, log_in, settings_beside, stream

SENSITIVITIES = (1.0, 1.5, 2.0, 3.0)
"""Asked of any run."""
RECORDS = 20_000
"""Records that are judged again at most; it takes a tenth of a millisecond for each and each policy."""

TITLE = "What other settings would have pruned"
WORDS = (
    "Each setting's own rule, asked again with the numbers of this log; nothing was run. A row is exact as far as the "
    "setting decides as this run did, and for its first other decision. From there on the video would have become "
    "another one, so what is said of later chunks of that sample is what the rule makes of this one."
)
HEADS = ("setting", "would regenerate", "decides as this run did", "exact", "which chunks, and what is to be known")


def section(place: Path, texts: Sequence[str] = ()) -> Section:
    """The table for a run's folder, or for one log in it; ``texts`` are further questions (:func:`question`).

    Raises:
        ReportError: no log, or one that cannot be read. TokenTrimError: a question that is none.
    """
    log = log_in(place)
    settings = settings_beside(log)
    asked = [*usual(settings), *(question(text, of_the_run(settings)) for text in texts)]
    replays = ask((record for _, record in stream(log, settings)), settings, asked)
    return Section("what-if", TITLE, WORDS, HEADS, [row(replay) for replay in replays])


def ask(records: Iterable[ChunkRecord], settings: Mapping[str, Any], policies: Sequence[Policy]) -> list[Replay]:
    """Ask policies what they would have done; the first replay is that of the setting that ran, if it is known.

    Args:
        records: of a log, in its order. settings: beside it, which say what ran. policies: asked.
    """
    ran, watcher = of_the_run(settings), watcher_of(settings)
    chosen = list(dict.fromkeys([*([ran] if ran else []), *policies]))
    replays = [_replay(policy, ran, watcher) for policy in chosen]
    for record in itertools.islice(records, RECORDS):
        for replay in replays:
            replay.feed(record)
    return replays


def _replay(policy: Policy, ran: Policy | None, watcher: Policy | None) -> Replay:
    """With the severities that are the policy's own, where the run's judge or its watcher has left such."""
    same = same_severity(policy, ran)
    watched = not same and same_severity(policy, watcher)
    return Replay(policy, same or watched, watched=watched)


def usual(settings: Mapping[str, Any]) -> list[Policy]:
    """What is asked of every run: other sensitivities, all else being equal, and AdaptivePolicy or the paper's."""
    ran = of_the_run(settings)
    if isinstance(ran, AdaptivePolicy):
        ran = dataclasses.replace(ran, max_regenerations=ran.max_regenerations or 1)
        return [AdaptivePolicy(), *(dataclasses.replace(ran, sensitivity=v) for v in SENSITIVITIES), DriftPolicy()]
    paper = _paper(ran)
    return [*(dataclasses.replace(paper, sensitivity=value) for value in SENSITIVITIES), AdaptivePolicy()]


def question(text: str, ran: Policy | None = None) -> Policy:
    """``"sensitivity=1.5, fraction=0.2"``, of the paper's policy as it ran, or ``"NAME: key=value, ..."`` of another.

    Raises:
        TokenTrimError: there is no such policy or option, or a value is out of range.
    """
    name, _, rest = text.partition(":") if ":" in text or "=" not in text else ("drift", ":", text)
    try:
        options = dict(_pair(item) for item in rest.split(",") if item.strip())
        if name.strip() == "drift":
            known(DriftPolicy, options)
            return dataclasses.replace(_paper(ran), **options)
        return make_policy(name.strip(), **options)
    except (TypeError, ValueError) as failure:
        raise TokenTrimError(f"what if {text!r}: {failure}.\nWrite it as 'sensitivity=1.5, fraction=0.2'.") from failure


def _paper(ran: Policy | None) -> DriftPolicy:
    """The paper's policy with what ran, where that has the same options."""
    given = ran.settings() if isinstance(ran, PAPER) else {}
    return DriftPolicy(**{name: given[name] for name in ("fraction", "sensitivity", "warmup") if name in given})


def _pair(item: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in item.partition("="))
    if not equals:
        raise ValueError(f"{key!r} has no value; write it behind a =")
    try:
        return key, ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):
        return key, value


def row(replay: Replay) -> list[str]:
    """A replay as a line of the table."""
    name = str(replay.policy)
    if replay.lacks:
        return [name, "not known", "", "", f"The log does not say: {replay.lacks}."]
    if not replay.judged:
        return [name, "not known", "", "", "No chunk was judged."]
    share = f"{replay.pruned} of {replay.judged}"
    exact = f"{replay.sure} of {replay.judged}" if replay.same else "no"
    return [name, share, f"{replay.agreed} of {replay.judged}", exact, _which(replay)]


def _which(replay: Replay) -> str:
    several = len({place[:2] for place in replay.named} | {place[:2] for place in replay._samples}) > 1
    shown = ", ".join(_name(place, several) for place in replay.named)
    words = [f"{shown} and {replay.pruned - len(replay.named)} more" if replay.pruned > len(replay.named) else shown]
    if replay.first is not None:
        words.append(f"first other decision: {_name(replay.first, several)}")
    if not replay.same:
        words.append("from drift to four digits, and what was accepted is estimated")
    if replay.lost:
        words.append(f"{replay.lost} records left out, for the log lacks the beginning of their video")
    return "; ".join(part for part in words if part) or "none"


def _name(place: tuple[int, int, int], several: bool) -> str:
    video, sample, chunk = place
    return f"{chunk} (video {video}, sample {sample})" if several else str(chunk)
