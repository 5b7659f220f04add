"""The sub-commands ``tokentrim run``, ``report`` and ``metrics``: what they take, what they print."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokentrim_hooks.console import show_table
from tokentrim_hooks.errors import ReportError, TokenTrimError
from tokentrim_hooks.extras import require
from tokentrim_hooks.policy import DriftPolicy, ObservePolicy, Policy
from tokentrim_hooks.rollout import Probe
from tokentrim_hooks.runner import Run, folder_of_process, run_script

OPTIONS = {
    "fraction": float,
    "sensitivity": float,
    "warmup": int,
    "max_regenerations": int,
}
"""Options of DriftPolicy that are numbers; the others are switches or come from a TOML file."""


# ---------------------------------------------------------------------------------------------- run


def configure_run(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim run`` takes; everything behind the script belongs to the script."""
    parser.add_argument("--out", type=Path, default=Path("runs/tokentrim"), help="folder of the log and the report")
    parser.add_argument("--config", type=Path, help="TOML file: probe, observers, [policy] of DriftPolicy")
    parser.add_argument("--probe", choices=("first-step", "candidate"))
    parser.add_argument("--observe", action="store_true", help="measure only; output stays bit-identical")
    parser.add_argument("--quiet", action="store_true", help="no progress line a chunk")
    parser.add_argument("--no-thumbnails", dest="thumbnails", action="store_false", help="no pictures of latents")
    parser.add_argument("--observer", action="append", default=[], help="an installed observer, by name; repeatable")
    for name, kind in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"DriftPolicy.{name}")
    parser.add_argument("script", type=Path, help="the inference script, unmodified")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")


def run(options: argparse.Namespace) -> int:
    """Run a script with every known model patched as it is constructed; write the report also when it crashes."""
    config = read_config(options.config) if options.config else {}
    folder = folder_of_process(options.out)
    thumbnails = options.thumbnails and importlib.util.find_spec("PIL") is not None
    policy, probe, observers = policy_of(options, config), probe_of(options, config), observers_of(options, config)
    this = Run(folder, policy, probe, options.quiet, observers, thumbnails)
    try:
        run_script(options.script, options.arguments, this)
    finally:
        _say_what_happened(this)
    return 0 if this.handles else 1


def read_config(path: Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        TokenTrimError: it cannot be read, or holds something other than ``probe``, ``observers``, ``[policy]``.
    """
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "demo")
    try:
        config: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise TokenTrimError(f"cannot read {path}: {failure}") from failure
    known = {"": {"probe", "policy", "observers"}, "policy.": {field.name for field in dataclasses.fields(DriftPolicy)}}
    for prefix, table in (("", config), ("policy.", config.get("policy", {}))):
        for name in table if isinstance(table, Mapping) else ():
            if name not in known[prefix]:
                words = ", ".join(sorted(known[prefix]))
                raise TokenTrimError(f"{path}: {prefix}{name} is not an option; known: {words}")
    return config


def policy_of(options: argparse.Namespace, config: Mapping[str, Any]) -> Policy:
    """The policy: flags win over the file, the file over the paper's constants."""
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    try:
        policy = DriftPolicy(**{**config.get("policy", {}), **given})
    except (TypeError, ValueError) as failure:
        raise TokenTrimError(f"no such policy: {failure}") from failure
    return ObservePolicy(policy.fraction, policy.sensitivity) if options.observe else policy


def probe_of(options: argparse.Namespace, config: Mapping[str, Any]) -> Probe:
    """The probe: flag, file, or ``first-step``."""
    probe: Any = options.probe or config.get("probe", "first-step")
    if probe not in ("first-step", "candidate"):
        raise TokenTrimError(f"probe must be 'first-step' or 'candidate', got {probe!r}")
    return probe  # type: ignore[no-any-return]


def observers_of(options: argparse.Namespace, config: Mapping[str, Any]) -> list[str]:
    """Names of observers: those of the file, then those of the flags, each once."""
    named = config.get("observers", [])
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise TokenTrimError(f"observers must be a list of names, got {named!r}")
    return list(dict.fromkeys([*named, *options.observer]))


def _say_what_happened(this: Run) -> None:
    """Summaries and report pages of all models that were patched, or why none was."""
    for handle in this.handles:
        print(handle.report.summary(), file=sys.stderr)
    if not this.handles:
        reasons = "\n".join(this.refusals) or "the script constructed no object of a known class"
        print(f"tokentrim: no model was patched.\n{reasons}", file=sys.stderr)
    for log in sorted(this.folder.glob("**/chunks.jsonl")):
        try:
            print(f"report: {_page(log.parent)}", file=sys.stderr)
        except TokenTrimError as failure:
            print(f"no report page for {log.parent}: {failure}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- report


def configure_report(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim report`` takes."""
    parser.add_argument("folder", type=Path, help="a run's folder, with chunks.jsonl in it; a crashed run will do")
    parser.add_argument("--video", type=Path, help="the decoded video of the run, to draw drift maps over")
    parser.add_argument("--unpatched", type=Path, metavar="VIDEO", help="of the same noise: shows a filmstrip of both")


def report(options: argparse.Namespace) -> int:
    """Render a run's folder as one self-contained report.html."""
    if options.unpatched and not options.video:
        raise TokenTrimError("--unpatched needs --video, the decoded video of the patched run")
    print(_page(options.folder, options.video, options.unpatched))
    return 0


def _page(folder: Path, video: Path | None = None, unpatched: Path | None = None) -> Path:
    from tokentrim_hooks.page import write_page
    from tokentrim_hooks.video import read_video

    if not folder.is_dir():
        raise ReportError(f"no such folder: {folder}")
    return write_page(folder, *(None if path is None else read_video(path)[0] for path in (video, unpatched)))


# ---------------------------------------------------------------------------------------------- metrics


def configure_metrics(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim metrics`` takes."""
    parser.add_argument("videos", type=Path, nargs="*", help="video files of any kind that ffmpeg reads")
    parser.add_argument("--period", type=int, help="frames of a chunk (Self-Forcing: 12), for spikes at its boundaries")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--vbench", type=Path, nargs="+", help="VBench result files: their scores by VBench's weights")


def metrics(options: argparse.Namespace) -> int:
    """Measure videos without any downloaded weights; one column a video."""
    if not options.videos and not options.vbench:
        raise TokenTrimError("give at least one video, or --vbench with result files")
    measured = {str(path): _measured(path, options.period) for path in options.videos}
    if measured:
        names = list(next(iter(measured.values())))
        rows = [[name, *(_cell(values.get(name)) for values in measured.values())] for name in names]
        show_table(["metric", *measured], rows)
    if options.vbench:
        _show_vbench(options.vbench)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2), encoding="utf-8")
    return 0


def _measured(path: Path, period: int | None) -> dict[str, Any]:
    from tokentrim_hooks.metrics import measure
    from tokentrim_hooks.video import read_video

    frames, fps = read_video(path)
    values = measure(frames, fps, period)
    similarity: Any = values.pop("lag_similarity")
    return {**values, **{f"similarity at lag {lag}": value for lag, value in similarity.items()}}


def _show_vbench(paths: list[Path]) -> None:
    from tokentrim_hooks.vbench import read_results, scores

    found = scores(read_results(paths))
    totals = {"quality": found.quality, "semantic": found.semantic, "total (4:1)": found.total}
    show_table(["VBench", "score"], [[name, _cell(value)] for name, value in totals.items()])
    if found.missing:
        print(f"missing, so not counted as zero: {', '.join(found.missing)}")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
