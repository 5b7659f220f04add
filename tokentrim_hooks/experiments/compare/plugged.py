"""Settings of installed policies by their plugin names, each with the control that belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokentrim_hooks.experiments.compare.settings import METHODS, STANDARD, Setting
from tokentrim_hooks.plugins import make_policy
from tokentrim_hooks.policy.base import Policy, hooks_of
from tokentrim_hooks.policy.controls import ChooseTokens
from tokentrim_hooks.policy.token_trim import ObservePolicy

GRADED = "control: graded afterwards"
BUILT_IN = {
    "drift": ("paper first-step", "control: random tokens"),
    "adaptive": ("adaptive", "control: adaptive random tokens"),
    "commit-window": ("commit window 6", "control: oldest window 6"),
    "flowmo": ("flowmo", "control: random step"),
    "frame-eviction": ("frame eviction", "control: random frames"),
    "latent-moments": ("latent moments", GRADED),
    "late-mean": ("late mean", GRADED),
    "row-moments": ("row moments", GRADED),
    "soft-prune": ("soft prune", "control: newest light"),
}
"""Plugin names of built-in policies: the setting that is that policy with its defaults, and its control."""
KNOWN = {setting.name: setting for setting in (*STANDARD, *METHODS)}


def of_policies(names: Iterable[str]) -> list[Setting]:
    """The settings of these policies, each followed by its control; one that two of them share comes once.

    Raises:
        UnknownPolicyError, PluginError: as ``plugins.make_policy``.
    """
    chosen: list[Setting] = []
    for name in names:
        policy = make_policy(name)
        found = [KNOWN[key] for key in BUILT_IN[name]] if name in BUILT_IN else list(_own(name, policy))
        chosen += [setting for setting in found if setting not in chosen]
    return chosen


def _own(name: str, policy: Policy) -> Iterator[Setting]:
    """A policy that we have no setting of, and what its hooks are to be compared with.

    Random tokens stand in for a policy that does nothing but judge: of one that does more, the rest would be gone.
    """
    yield Setting(name, methods=(policy,))
    hooks = hooks_of(type(policy))
    prunes = policy.max_regenerations and not isinstance(policy, ObservePolicy)
    if hooks == ("judge",) and prunes:
        yield Setting(f"control: {name} random tokens", methods=(ChooseTokens(policy=policy),))
    if {"correct", "settle"} & set(hooks):
        yield KNOWN[GRADED]
