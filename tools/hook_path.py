"""What our own hooks take now and took in an older checkout, in one run: the tables of docs/performance.md.

``python tools/hook_path.py OLD`` measures this checkout and the one in the folder ``OLD``, each in processes of its own
that take turns, so that both meet the same machine. The model's forward is a constant, so all that is left is ours.
Times are CPU time of one thread, patched less unpatched; memory is that of the process. Nothing here is asserted.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from blank_model import FRAMES, STEPS, Blank
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parents[1]
TOKENS = {64: (16, 16), 1560: (60, 104), 3600: (90, 160), 14400: (180, 320), 32640: (272, 480)}
"""Tokens of a frame, and the latents' height and width that make them."""
WINDOWS, SHORT, EVERY = 300, 12, 16
"""Sections of the long video and of the short one, and calls whose median is compared."""


def constant(tokens: int) -> Blank:
    """A model that attends to nothing."""
    return Blank(*TOKENS[tokens])


@torch.no_grad()
def chunks(generator: Blank, count: int) -> Iterator[int]:
    """A video, chunk by chunk."""
    cache = [{"k": torch.ones(1, 1, 1, 1), "v": torch.ones(1, 1, 1, 1), "global_end_index": 0, "local_end_index": 0}]
    noise, steps = torch.zeros_like(generator.answers[0]), [torch.full((1, FRAMES), step) for step in STEPS]
    for chunk in range(count):
        latents = noise
        for number, step in enumerate(steps):
            answer = generator(latents, None, step, cache, None, chunk * FRAMES * generator.tokens)[1]
            latents = answer if number == len(STEPS) - 2 else noise
        yield chunk


@contextmanager
def observed(model: Any) -> Iterator[Any]:
    """Patched with a policy that never prunes, in this checkout or in an older one."""
    import tokentrim_hooks as tokentrim

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = tokentrim.patch(model, tokentrim.ObservePolicy(), adapter="self-forcing")
        try:
            yield handle
        finally:
            handle.unpatch()


Watch = Callable[[Blank], AbstractContextManager[Any]]

# ------------------------------------------------------------------------------------------ in a process of its own


@contextmanager
def by_hand(model: Blank) -> Iterator[Any]:
    """Watched by the hand-written loop of ``tokentrim bench``, which does only what judging a chunk must."""
    from tokentrim_hooks.experiments.bench.ideal import ideal
    from tokentrim_hooks.experiments.bench.target import Target

    with ideal(Target(model, lambda: None, denoiser=model, calls=len(STEPS))) as watcher:
        yield watcher


def milliseconds(tokens: int, count: int = 24, watched: Watch = observed) -> float:
    """That we add to a chunk: median over a video, patched less unpatched."""
    generator, warm = constant(tokens), 4

    def times() -> list[float]:
        stamps = [time.process_time() for _ in chunks(generator, count)]
        return [1000 * (b - a) for a, b in zip(stamps[warm:], stamps[warm + 1 :], strict=False)]

    plain = statistics.median(times())
    with watched(generator):
        return statistics.median(times()) - plain


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(tokens: int, count: int = 12, watched: Watch = observed) -> float:
    """Operations on tensors that we add to a chunk."""
    generator, found = constant(tokens), []
    for patched in (False, True):
        with _Counter() as counter:
            if patched:
                with watched(generator):
                    stamps = [counter.count for _ in chunks(generator, count)]
            else:
                stamps = [counter.count for _ in chunks(generator, count)]
        found.append((stamps[-1] - stamps[2]) / (count - 3))
    return found[1] - found[0]


def mebibytes(tokens: int, count: int = 1000) -> float:
    """By which the process grows in ``count`` chunks."""
    generator = constant(tokens)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    with observed(generator) as handle:
        sizes = [resident() for _ in chunks(generator, count + 50)]
        assert len(handle.report) >= count
    return sizes[-1] - sizes[49]


def windows(_: int) -> list[float]:
    """How much longer a denoiser call of FramePack takes in a long video than in a short one: first and last third.

    Both prune in every section. The short one is made again and again amid the long one, so that both meet the same
    machine.
    """
    ratios, long = [], _Timed()

    def compare(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if len(long.times) >= EVERY:
            short = _Timed()
            short.run(SHORT)
            ratios.append(statistics.median(long.times[-EVERY:]) / statistics.median(short.times[-EVERY:]))
            long.times.clear()
            long.last = None
        return tensors

    long.run(WINDOWS, callback_on_step_end=compare)
    third = len(ratios) // 3
    return [statistics.median(ratios[:third]), statistics.median(ratios[-third:])]


class _Timed:
    """A FramePack whose calls are timed, each with what the sampler does until the next one."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.last: float | None = None

    def run(self, sections: int, **options: Any) -> None:
        """A video in which every section is pruned."""
        import framepack_tiny

        import tokentrim_hooks as tokentrim

        pipeline = framepack_tiny.pipeline()
        pipeline.transformer.register_forward_pre_hook(self._note)
        with tokentrim.patched(pipeline, tokentrim.DriftPolicy(sensitivity=0.0, warmup=1), adapter="framepack"):
            framepack_tiny.run(pipeline, sections=sections, **options)

    def _note(self, *_: Any) -> None:
        now = 1000 * time.process_time()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now


def syncs(_: int) -> dict[str, list[int]]:
    """Host syncs in each chunk of a video with a window of three, whose chunk 3 prunes: the core's, the adapter's."""
    import tiny_reference

    import tokentrim_hooks as tokentrim
    from tokentrim_hooks.testing import ForcedPolicy

    count_syncs = _counter_of_today().count_syncs
    pipeline, noted, policy = tiny_reference.make(), [], ForcedPolicy({3: [0, 3]})
    folders = [Path(str(tokentrim.__file__)).resolve().parent]
    with count_syncs(ours=folders) as log, tokentrim.patched(pipeline, policy, adapter="self-forcing") as handle:

        def note(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
            if not float(kwargs["timestep"].flatten()[0]):
                noted.append(log.ours)

        pipeline.generator.register_forward_hook(note, with_kwargs=True)
        torch.manual_seed(0)
        noise = torch.randn(1, 14 * pipeline.num_frame_per_block, 3, tiny_reference.PIXELS, tiny_reference.PIXELS)
        pipeline.inference(noise, ["a"], return_latents=True)
        assert handle.report.triggers == 1
    found: dict[str, list[int]] = {}
    for who in (False, True):
        # The reference model's own are nobody's fault; today's counter knows the folder of today's.
        own = [[event.place for event in events if "reference/" not in event.place] for events in noted]
        sums = [sum(("adapters/" in place) is who for place in places) for places in own]
        found["adapter" if who else "core"] = [b - a for a, b in zip([0, *sums], sums, strict=False)]
    return found


def _counter_of_today() -> Any:
    spec = importlib.util.spec_from_file_location("syncs_of_today", HERE / "tokentrim_hooks" / "testing" / "syncs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


JOBS: dict[str, Callable[[int], Any]] = {
    "ms": milliseconds, "ops": operations,
    "floor ms": functools.partial(milliseconds, watched=by_hand),
    "floor ops": functools.partial(operations, watched=by_hand), "mib": mebibytes, "windows": windows, "syncs": syncs,
}  # fmt: skip


def serve() -> None:
    """Answer jobs, one line of JSON each."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, tokens = json.loads(line)
        print(json.dumps(JOBS[name](tokens)), flush=True)


# ------------------------------------------------------------------------------------------ both of them in turns


class Checkout:
    """A process that runs one checkout's code."""

    def __init__(self, root: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokentrim_hooks").symlink_to(root / "tokentrim_hooks")
        (folder / "tokentrim_hooks_adapters").symlink_to(root / "adapters")
        paths = [folder, root / "tests" / "adapters", root / "tests" / "unit"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(root)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, name: str, tokens: int = 0) -> Any:
        """Have a job done."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, tokens]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Have it end."""
        self._process.communicate()


def measure(old: Path, rounds: int, only: Sequence[str] = ()) -> None:
    """Print what is in the docs, as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        pair = {"old": old.resolve(), "now": HERE}
        for name, tokens in [*((job, t) for t in TOKENS for job in ("ms", "floor ms")),
                             *((job, t) for t in TOKENS for job in ("ops", "floor ops")),
                             ("mib", 1560), ("windows", 0), ("syncs", 0)]:  # fmt: skip
            if only and name not in only:
                continue
            turns = {"ms": rounds, "floor ms": rounds, "mib": 3, "windows": 3}.get(name, 1)
            ends = {who: Checkout(root, Path(folder) / f"{name}-{tokens}-{who}") for who, root in pair.items()}
            found: dict[str, list[Any]] = {who: [] for who in pair}
            for turn in range(turns):
                for who in (*pair,) if turn % 2 else (*reversed(pair),):
                    found[who].append(ends[who].ask(name, tokens))
            for who, values in found.items():
                ends[who].close()
                shown = values if isinstance(values[0], list | dict) else f"{statistics.median(values):.2f}"
                print(f"{name} {tokens or ''} {who}: {shown}  of {values}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="A checkout of the version to compare with.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=(), choices=JOBS, help="Some of the figures.")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    serve() if options.serve else measure(options.old, options.rounds, options.only)
