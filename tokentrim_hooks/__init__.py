"""TokenTrim for autoregressive video diffusion: prune drifting tokens from the context of any model, from outside.

>>> import tokentrim_hooks as tokentrim
>>> handle = tokentrim.patch(pipeline)  # doctest: +SKIP
"""

import logging
from importlib.metadata import version

from tokentrim_hooks.adapter import (
    Adapter,
    Call,
    Match,
    NoMatch,
    Phase,
    Seen,
    default_phase,
)
from tokentrim_hooks.api import Detection, adapters, detect, is_patched, patch, patched, policies, unpatch
from tokentrim_hooks.errors import (
    AlreadyPatchedError,
    AmbiguousModelError,
    AttachError,
    CompiledModelError,
    LatentsError,
    PluginError,
    PolicyError,
    RankError,
    SessionError,
    TokenTrimError,
    TokenTrimWarning,
    UnknownAdapterError,
    UnknownObserverError,
    UnknownPolicyError,
    UnsupportedContextError,
    UnsupportedModelError,
    UnsupportedPolicyError,
    UnsupportedProbeError,
)
from tokentrim_hooks.handle.handle import PatchHandle
from tokentrim_hooks.inspection import (
    bind,
    home_of,
    is_driven_by,
    lacks,
    layers_of,
    nearest_sigma,
    parameters_of,
    shares_storage,
    strand,
)
from tokentrim_hooks.markers import hookimpl
from tokentrim_hooks.patching.patches import Method, Patches
from tokentrim_hooks.plugins import (
    AdapterInfo,
    ObserverInfo,
    PolicyInfo,
    installed_observers,
    make_observer,
    make_policy,
)
from tokentrim_hooks.policy.adaptive import AdaptivePolicy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.commit_window import CommitWindow
from tokentrim_hooks.policy.flowmo import FlowMo
from tokentrim_hooks.policy.frame_eviction import FrameEviction
from tokentrim_hooks.policy.moments import LateMean, LatentMoments, RowMoments
from tokentrim_hooks.policy.statistics import Moments
from tokentrim_hooks.policy.token_trim import DriftPolicy, ObservePolicy
from tokentrim_hooks.policy.views import Chunk, ContextView, Denoised, History, Noisy, Place, Rows, Verdict
from tokentrim_hooks.pruning.context import CacheRows, Context, KeyLayout, Role, Segment
from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.report.observers import JsonLines, Observer, ProgressLine
from tokentrim_hooks.report.record import ChunkRecord, Report

__version__ = version("tokentrim-hooks")

# A library stays silent until its user asks for its log.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "Adapter",
    "AdapterInfo",
    "AdaptivePolicy",
    "AlreadyPatchedError",
    "AmbiguousModelError",
    "AttachError",
    "CacheRows",
    "Call",
    "CallTap",
    "Chunk",
    "ChunkRecord",
    "CommitWindow",
    "CompiledModelError",
    "Context",
    "ContextView",
    "Denoised",
    "Detection",
    "DriftPolicy",
    "FlowMo",
    "FrameEviction",
    "History",
    "JsonLines",
    "KeyLayout",
    "LateMean",
    "LatentMoments",
    "LatentsError",
    "Match",
    "Method",
    "Moments",
    "NoMatch",
    "Noisy",
    "ObservePolicy",
    "Observer",
    "ObserverInfo",
    "PatchHandle",
    "Patches",
    "Phase",
    "Place",
    "PluginError",
    "Policy",
    "PolicyError",
    "PolicyInfo",
    "ProgressLine",
    "RankError",
    "Report",
    "Role",
    "RowMoments",
    "Rows",
    "Seen",
    "Segment",
    "SessionError",
    "TokenTrimError",
    "TokenTrimWarning",
    "UnknownAdapterError",
    "UnknownObserverError",
    "UnknownPolicyError",
    "UnsupportedContextError",
    "UnsupportedModelError",
    "UnsupportedPolicyError",
    "UnsupportedProbeError",
    "Verdict",
    "adapters",
    "bind",
    "default_phase",
    "detect",
    "home_of",
    "hookimpl",
    "installed_observers",
    "is_driven_by",
    "is_patched",
    "lacks",
    "layers_of",
    "make_observer",
    "make_policy",
    "nearest_sigma",
    "parameters_of",
    "patch",
    "patched",
    "policies",
    "shares_storage",
    "strand",
    "unpatch",
]
