"""The policies that come with the package, by name, through the hook that any plugin's come through."""

from __future__ import annotations

from collections.abc import Mapping

from tokentrim_hooks.markers import hookimpl
from tokentrim_hooks.policy.adaptive import AdaptivePolicy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.commit_window import CommitWindow
from tokentrim_hooks.policy.flowmo import FlowMo
from tokentrim_hooks.policy.frame_eviction import FrameEviction
from tokentrim_hooks.policy.late_mean import LateMean
from tokentrim_hooks.policy.latent_moments import LatentMoments
from tokentrim_hooks.policy.row_moments import RowMoments
from tokentrim_hooks.policy.soft_prune import SoftPrune
from tokentrim_hooks.policy.token_trim import DriftPolicy, ObservePolicy


@hookimpl
def tokentrim_policies() -> Mapping[str, type[Policy]]:
    """The built-in policies; what tests and comparisons need beside (controls, forced ones) is asked for in Python."""
    return {
        "drift": DriftPolicy,
        "adaptive": AdaptivePolicy,
        "observe": ObservePolicy,
        "commit-window": CommitWindow,
        "flowmo": FlowMo,
        "frame-eviction": FrameEviction,
        "latent-moments": LatentMoments,
        "late-mean": LateMean,
        "row-moments": RowMoments,
        "soft-prune": SoftPrune,
    }
