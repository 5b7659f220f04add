"""``tokentrim run``: what it takes, what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokentrim_hooks.cli.report import page_of
from tokentrim_hooks.cli.runner import Run, folder_of_process, run_script
from tokentrim_hooks.console import printable
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.extras import require
from tokentrim_hooks.plugins import make_policy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.token_trim import DriftPolicy, ObservePolicy
from tokentrim_hooks.rollout.shared import Probe

OPTIONS = {
    "fraction": float,
    "sensitivity": float,
    "warmup": int,
    "max_regenerations": int,
}
"""Options of DriftPolicy that are numbers; the others are switches or come from a TOML file."""
HELP = "Run an unmodified inference script, patched."


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim run`` takes; everything behind the script belongs to the script."""
    parser.add_argument("--out", type=Path, default=Path("runs/tokentrim"), help="folder of the log and the report")
    parser.add_argument("--config", type=Path, help="TOML file: probe, observers, [policies.NAME]")
    parser.add_argument("--probe", choices=("first-step", "candidate"))
    parser.add_argument("--observe", action="store_true", help="measure only; output stays bit-identical")
    parser.add_argument("--quiet", action="store_true", help="no progress line per chunk")
    parser.add_argument("--no-thumbnails", dest="thumbnails", action="store_false", help="no pictures of latents")
    parser.add_argument("--observer", action="append", default=[], help="an installed observer, by name; repeatable")
    parser.add_argument("--policy", action="append", default=[], help="an installed policy, by name; repeatable")
    for name, kind in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"DriftPolicy.{name}")
    parser.add_argument("script", type=Path, help="the inference script, unmodified")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")


def run(options: argparse.Namespace) -> int:
    """Run a script with every known model patched as it is constructed; write the report also when it crashes."""
    config = read_config(options.config) if options.config else {}
    folder = folder_of_process(options.out)
    thumbnails = options.thumbnails and importlib.util.find_spec("PIL") is not None
    policies, probe, observers = policies_of(options, config), probe_of(options, config), observers_of(options, config)
    this = Run(folder, policies, probe, options.quiet, observers, thumbnails)
    try:
        run_script(options.script, options.arguments, this)
    finally:
        _say_what_happened(this)
    return 0 if this.handles else 1


def read_config(path: Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        TokenTrimError: it cannot be read, or holds something other than ``probe``, ``observers``, ``[policy]`` and
            ``[policies.NAME]``.
    """
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "demo")
    try:
        config: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise TokenTrimError(f"cannot read {path}: {failure}") from failure
    drift = {field.name for field in dataclasses.fields(DriftPolicy)}
    known = {"": {"probe", "policy", "policies", "observers"}, "policy.": drift}
    for prefix, table in (("", config), ("policy.", config.get("policy", {}))):
        for name in table if isinstance(table, Mapping) else ():
            if name not in known[prefix]:
                words = ", ".join(sorted(known[prefix]))
                raise TokenTrimError(f"{path}: {prefix}{name} is not an option; known: {words}")
    tables = config.get("policies", {})
    if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
        raise TokenTrimError(f"{path}: policies must be tables, [policies.NAME], got {tables!r}")
    return config


def policies_of(options: argparse.Namespace, config: Mapping[str, Any]) -> list[Policy]:
    """The policies by name, in order: those of the flags, else of the file, else the paper's; flags win over the file.

    Raises:
        TokenTrimError: a policy or an option that there is none of, or options of one that does not run.
    """
    tables: Mapping[str, Any] = config.get("policies", {})
    names = list(dict.fromkeys(options.policy or tables or ["drift"]))
    paper = {**config.get("policy", {}), **{n: getattr(options, n) for n in OPTIONS if getattr(options, n) is not None}}
    if paper and "drift" not in names:
        raise TokenTrimError(f"{', '.join(paper)}: options of the policy drift, which does not run; add --policy drift")
    policies = [_made(name, {**tables.get(name, {}), **(paper if name == "drift" else {})}) for name in names]
    return _observing(policies) if options.observe else policies


def _made(name: str, options: Mapping[str, Any]) -> Policy:
    """The policy of that name; lists of the file become tuples, which a frozen policy can keep."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        # The default needs no plugin: none can take it away.
        return DriftPolicy(**given) if name == "drift" else make_policy(name, **given)
    except (TypeError, ValueError) as failure:
        raise TokenTrimError(f"no such policy: {name}: {failure}") from failure


def _observing(policies: Sequence[Policy]) -> list[Policy]:
    """A policy that measures what the one that judges would have measured."""
    steering = [type(policy).__name__ for policy in policies if policy.needs - {"judge"}]
    if steering:
        raise TokenTrimError(f"--observe changes nothing, {', '.join(steering)} would; leave one of them out")
    given = policies[0].settings() if policies else {}
    return [ObservePolicy(**{name: given[name] for name in ("fraction", "sensitivity") if name in given})]


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
    """Summaries and report pages of all models that were patched, or why none was; a fork leaves that to its parent."""
    if os.getpid() != this.process:
        return
    for handle in this.handles:
        print(handle.report.summary(), file=sys.stderr)
    if not this.handles:
        reasons = "\n".join(this.refusals) or "the script constructed no object of a known class"
        print(f"tokentrim: no model was patched.\n{reasons}", file=sys.stderr)
    for log in this.logs:
        try:
            print(f"report: {page_of(log.path)}", file=sys.stderr)
        except TokenTrimError as failure:
            print(printable(f"no report page for {log.path}: {failure}"), file=sys.stderr)
