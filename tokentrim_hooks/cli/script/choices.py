"""What to patch with, from a TOML file and from flags, which win over the file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokentrim_hooks.cli.script.options import NUMBERS
from tokentrim_hooks.console import reason
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.extras import require
from tokentrim_hooks.handle.handle import judge_of
from tokentrim_hooks.plugins import make_policy, ready_observer
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.options import known
from tokentrim_hooks.policy.token_trim import DriftPolicy, ObservePolicy
from tokentrim_hooks.policy.watched import Watched
from tokentrim_hooks.rollout.shared import Probe

Flags = Mapping[str, Any]
"""Options of the command line by name, as click hands them over."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """Policies in order, the probe, names of observers."""

    policies: Sequence[Policy]
    probe: Probe
    observers: Sequence[str]

    @classmethod
    def of(cls, flags: Flags) -> Choices:
        """Those of the flags, over those of the file that ``--config`` names.

        Raises:
            TokenTrimError: something that there is none of, or a value out of range; the message says what.
        """
        config = read_config(flags["config"]) if flags["config"] else {}
        observers = observers_of(flags, config)
        for name in observers:
            ready_observer(name)
        policies = policies_of(flags, config)
        return cls(watched(policies) if flags.get("watch") else policies, probe_of(flags, config), observers)


def read_config(path: Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        TokenTrimError: it cannot be read, or holds something other than ``probe``, ``observers``, ``[policy]`` and
            ``[policies.NAME]``.
    """
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        config: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise TokenTrimError(f"cannot read {path}: {reason(failure)}.\nGive a TOML file, see docs/cli.md.") from failure
    drift = {field.name for field in dataclasses.fields(DriftPolicy)}
    words = {"": {"probe", "policy", "policies", "observers"}, "policy.": drift}
    for prefix, table in (("", config), ("policy.", config.get("policy", {}))):
        for name in table if isinstance(table, Mapping) else ():
            if name not in words[prefix]:
                options = ", ".join(sorted(words[prefix]))
                raise TokenTrimError(f"{path}: {prefix}{name} is not an option; known: {options}")
    for name in ("policy", "policies"):
        if not isinstance(config.get(name, {}), Mapping):
            raise TokenTrimError(f"{path}: {_NEEDED[name]}, got {config[name]!r}")
    tables = config.get("policies", {})
    if not all(isinstance(table, Mapping) for table in tables.values()):
        raise TokenTrimError(f"{path}: {_NEEDED['policies']}, got {tables!r}")
    return config


_NEEDED = {"policy": "policy must be a table, [policy]", "policies": "policies must be tables, [policies.NAME]"}


def policies_of(flags: Flags, config: Mapping[str, Any]) -> list[Policy]:
    """The policies by name, in order: those of the flags, else of the file, else the paper's; flags win over the file.

    Raises:
        TokenTrimError: a policy or an option that there is none of, options of one that does not run, two that judge.
    """
    tables: Mapping[str, Any] = config.get("policies", {})
    names = list(dict.fromkeys(flags["policy"] or tables or ["drift"]))
    paper = {**config.get("policy", {}), **{name: flags[name] for name in NUMBERS if flags[name] is not None}}
    if paper and "drift" not in names:
        raise TokenTrimError(f"{', '.join(paper)}: options of the policy drift, which does not run; add --policy drift")
    policies = [_made(name, {**tables.get(name, {}), **(paper if name == "drift" else {})}) for name in names]
    try:
        judge_of(policies)
    except ValueError as failure:
        raise TokenTrimError(str(failure)) from failure
    return _observing(policies) if flags.get("observe") else policies


def watched(policies: Sequence[Policy]) -> list[Policy]:
    """The same, with AdaptivePolicy watching the paper's: a log of it says what that one would have pruned."""
    paper = (DriftPolicy, ObservePolicy)
    return [Watched(policy) if type(policy) in paper else policy for policy in policies]


def _made(name: str, options: Mapping[str, Any]) -> Policy:
    """The policy of that name; lists of the file become tuples, which a frozen policy can keep."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        if name != "drift":
            return make_policy(name, **given)
        known(DriftPolicy, given)
        return DriftPolicy(**given)  # the default needs no plugin: none can take it away
    except (TypeError, ValueError) as failure:
        raise TokenTrimError(f"the policy {name} cannot be made so: {failure}") from failure


def _observing(policies: Sequence[Policy]) -> list[Policy]:
    """A policy that measures what the one that judges would have measured."""
    steering = [type(policy).__name__ for policy in policies if policy.needs - {"judge"}]
    if steering:
        raise TokenTrimError(f"--observe changes nothing, {', '.join(steering)} would; leave one of them out")
    given = policies[0].settings() if policies else {}
    return [ObservePolicy(**{name: given[name] for name in ("fraction", "sensitivity") if name in given})]


def probe_of(flags: Flags, config: Mapping[str, Any]) -> Probe:
    """The probe: flag, file, or ``first-step``."""
    probe: Any = flags["probe"] or config.get("probe", "first-step")
    if probe not in ("first-step", "candidate"):
        raise TokenTrimError(f"probe must be 'first-step' or 'candidate', got {probe!r}")
    return probe  # type: ignore[no-any-return]


def observers_of(flags: Flags, config: Mapping[str, Any]) -> list[str]:
    """Names of observers: those of the file, then those of the flags, each once."""
    named = config.get("observers", [])
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise TokenTrimError(f"observers must be a list of names, got {named!r}")
    return list(dict.fromkeys([*named, *flags.get("observer", ())]))
