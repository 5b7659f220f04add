"""Runs of one script in processes of their own: patched or not, all from the same seeds, by torchrun where we were."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokentrim_hooks.console import say
from tokentrim_hooks.errors import TokenTrimError, VideoError
from tokentrim_hooks.experiments.pair.videos import Places, kept, written
from tokentrim_hooks.metrics.video import VideoFile
from tokentrim_hooks.report import names

ELASTIC = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
"""Variables by which torchrun tells its processes who they are."""
PATIENCE = 60.0
"""Seconds that a run has for its log and its page after Ctrl-C, before it is ended."""


@dataclass(frozen=True)
class Launch:
    """How to start the script: options of ``tokentrim run``, the script, and what starts several processes."""

    options: Sequence[str]
    script: Sequence[str]
    places: Places
    launcher: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, folder: Path, seed: int, patched: bool) -> Arm:
        """One run, its log and videos in ``folder``; its output goes where ours goes.

        Raises:
            TokenTrimError: it failed, wrote no video, or (patched) had no model that could be patched.
        """
        log = folder / "log"
        own = [*self.options, "--out", str(log)] if patched else ["--unpatched"]
        command = ["-m", "tokentrim_hooks", "run", "--seed", str(seed), *own, *self.script]
        start = list(self.launcher) or [sys.executable]
        before, began = self.places.stamps(), time.monotonic()
        status = _status_of([*start, *command], {**self.environment, "PYTHONHASHSEED": str(seed % 2**32)})
        seconds = time.monotonic() - began
        if patched and not logs_of(log):
            raise TokenTrimError("no model was patched, so there is nothing to compare.\nSee the lines above for why.")
        if status:
            kind = "patched" if patched else "unpatched"
            raise TokenTrimError(f"the {kind} run of the script failed with status {status}.\nSee what it says above.")
        found = kept(written(before, self.places.stamps()), before, folder)
        if not found:
            where = self.places.pattern or ", ".join(map(str, self.places.roots))
            raise TokenTrimError(f"the script wrote no video; looked at: {where}.\nName its place: --video 'PATTERN'.")
        return Arm(_readable(found), seconds, logs_of(log))


def _readable(videos: Sequence[Path]) -> list[Path]:
    """Those that can be opened: a script may leave others, and nobody should wait for two more runs to hear of it.

    Raises:
        VideoError: none of them can.
    """
    failures: list[VideoError] = []
    good: list[Path] = []
    for path in videos:
        try:
            good.append(VideoFile.of(path).path)
        except VideoError as failure:
            failures.append(failure)
    if not good:
        raise failures[0]
    for bad in failures:
        say(f"tokentrim try: left out: {str(bad).splitlines()[0]}")
    return good


def _status_of(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a process to its end. Ctrl-C reaches it as well, and it is given the time to finish its log and its page."""
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.terminate()
            raise


@dataclass(frozen=True)
class Arm:
    """What one run left: videos in the order in which they were written, its wall clock, its logs, the main one first.
    """

    videos: Sequence[Path]
    seconds: float
    logs: Sequence[Path] = ()


def logs_of(folder: Path) -> list[Path]:
    """Logs of a run, of its first rank first."""
    places = [folder, *sorted(folder.glob("rank-*"))] if folder.is_dir() else []
    return [log for place in places for log in names.logs_in(place)]


def without_torchrun(environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """What starts as many processes as torchrun has started of us, and an environment in which it can.

    Raises:
        TokenTrimError: they are on several machines.
    """
    plain = {name: value for name, value in environment.items() if not ELASTIC.fullmatch(name)}
    size = environment.get("WORLD_SIZE", "1")
    if environment.get("RANK") is None or size == "1":
        return [], plain
    if environment.get("LOCAL_WORLD_SIZE", size) != size:
        raise TokenTrimError("tokentrim try starts processes on one machine only.\nUse tokentrim run on each of yours.")
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"], plain


def videos_of_all(arms: Sequence[Arm]) -> list[Path]:
    """The video to look at of each run: the first one whose name all runs share, else each one's first."""
    shared = set.intersection(*({path.name for path in arm.videos} for arm in arms))
    return [next((path for path in arm.videos if path.name in shared), arm.videos[0]) for arm in arms]
