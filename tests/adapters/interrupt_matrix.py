"""Ends a call of a patched model in every way at every place, and looks at what is left: hours, so it can go on later.

``PYTHONPATH=tests/unit:tests/upstream python tests/adapters/interrupt_matrix.py sana-wm --log sana.jsonl`` writes a
line for each trial, and leaves out those that the log has. The nightly tests of ``test_whatever_ends_a_call.py`` do the
same with nothing kept. Targets are those of ``targets.py``, and ``self-forcing-source``, whose checkout is in
$TOKENTRIM_UPSTREAM. ``--ways unpatch`` takes the patch off amid the call, in the same thread and from another one.
``--every`` takes every event (each hook of each submodule, each attention kernel), not one of each depth of each call;
``--first`` and ``--last`` bound them, of which ``--step`` takes one in so many. Each turn ends all places once,
neighbours in other ways, so that a run that is stopped has seen all of a video; ``--turns`` stops after so many.
Targets have twins in which a hook counts the calls and acts by their number (``skyreels-v2-counting``).
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from interruptions import KINDS, Event, Subject, unpatch_here, unpatch_in_a_thread
from targets import COUNTING, TARGETS, Target

SOURCE = "self-forcing-source"
Trial = tuple[Event, str, Callable[[], None]]


def main() -> None:
    """Try all that the log has not, from the first call to the last."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    done = set() if not options.log.exists() else {_key(json.loads(x)) for x in options.log.read_text().splitlines()}
    with ExitStack() as stack:
        subject = Subject(_target(options.target, stack))
        bounds = slice(options.first, options.last, options.step)
        events = (subject.first.events if options.every else subject.places())[bounds]
        print(f"{options.target}: {len(events)} of {len(subject.first.events)} places")
        trials = [[*_trials(subject, event, options.ways)] for event in events]
        for event, way, trial in _in_turns(trials, options.turns):
            if (event.number, way) not in done:
                _write(options.log, event, way, _outcome(trial), len(events))
    _sum_up(options.log)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[SOURCE, *(target.name for target in TARGETS + COUNTING)])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--ways", choices=("end", "unpatch"), default="end")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int)
    parser.add_argument("--step", type=int)
    parser.add_argument("--turns", type=int)
    return parser


def _target(name: str, stack: ExitStack) -> Target:
    if name == SOURCE:
        from test_self_forcing_interrupted import real_source

        return stack.enter_context(real_source())
    return next(target for target in TARGETS + COUNTING if target.name == name)


def _trials(subject: Subject, event: Event, ways: str) -> Iterator[Trial]:
    """What is done at one place: each kind of ending and all after one another, or the patch comes off."""
    if ways == "unpatch":
        for how in (unpatch_here, unpatch_in_a_thread):
            yield event, how.__name__, lambda how=how: subject.unpatch_amid(event, how)
        return
    for kind in KINDS:
        yield event, kind.__name__, lambda kind=kind: subject.interrupt(event, kind)
    yield event, "all", lambda: subject.interrupt(event, *KINDS)


def _in_turns(places: list[list[Trial]], turns: int | None) -> Iterator[Trial]:
    """One trial of each place, then the next of each; every place begins with another one than that before it."""
    for turn in range(max(map(len, places), default=0))[:turns]:
        for number, trials in enumerate(places):
            yield trials[(turn + number) % len(trials)]


def _outcome(trial: Callable[[], None]) -> str:
    """Nothing, or what went wrong."""
    try:
        trial()
    except Exception:
        return traceback.format_exc(limit=-3)
    return ""


def _write(log: Path, event: Event, way: str, bad: str, places: int) -> None:
    line = {"at": event.number, "call": event.call, "depth": event.depth, "where": event.where, "way": way, "bad": bad}
    with log.open("a") as file:
        print(json.dumps(line | {"places": places, "time": time.time()}), file=file)


def _key(line: dict[str, object]) -> tuple[object, object]:
    return line["at"], line["way"]


def _sum_up(log: Path) -> None:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    bad = [line for line in lines if line["bad"]]
    ends = sum(len(KINDS) if line["way"] == "all" else 1 for line in lines)
    print(f"{len({line['at'] for line in lines})} places, {ends} endings in {len(lines)} trials, {len(bad)} bad")
    for line in bad[:20]:
        print(f"call {line['call']}, {line['where']}, {line['way']}:\n{line['bad']}")


if __name__ == "__main__":
    main()
