# The public face. Its names are imported when they are first used: the command line shows its help without torch.

from .adapter import (
    Adapter,
    Call,
    Match,
    NoMatch,
    Phase,
    Seen,
    default_phase,
)
from .api import Detection, adapters, detect, is_patched, patch, patch_in_engine, patched, policies, unpatch
from .errors import (
    AlreadyPatchedError,
    AmbiguousModelError,
    AttachError,
    CompiledModelError,
    LatentsError,
    MissingExtraError,
    PluginError,
    PolicyError,
    RankError,
    ReportError,
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
    VideoError,
)
from .handle.handle import PatchHandle
from .inspection import (
    bind,
    defaults_of,
    home_of,
    lacks,
    layers_of,
    nearest_sigma,
    parameters_of,
    shares_storage,
    x0_of_flow,
)
from .markers import hookimpl
from .patching.callers import is_driven_by, strand
from .patching.patches import Method, Patches
from .plugins import (
    AdapterInfo,
    ObserverInfo,
    PolicyInfo,
    installed_observers,
    make_observer,
    make_policy,
)
from .policy.adaptive import AdaptivePolicy
from .policy.base import Policy
from .policy.commit_window import CommitWindow
from .policy.drift import grid_of
from .policy.flowmo import FlowMo
from .policy.frame_eviction import FrameEviction
from .policy.late_mean import LateMean
from .policy.latent_moments import LatentMoments
from .policy.row_moments import RowMoments
from .policy.soft_prune import SoftPrune
from .policy.statistics import Moments
from .policy.token_trim import DriftPolicy, ObservePolicy
from .policy.views import Chunk, ContextView, Denoised, History, Noisy, Place, Rows, Verdict
from .policy.watched import Watched
from .pruning.context import CacheRows, Context, KeyLayout, Role, Segment
from .pruning.tap import CallTap
from .pruning.tombstones import unmark
from .report.observers import JsonLines, Observer, ProgressLine
from .report.page.charts import control_chart
from .report.record import ChunkRecord, Report

__version__: str

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
    "MissingExtraError",
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
    "ReportError",
    "Role",
    "RowMoments",
    "Rows",
    "Seen",
    "Segment",
    "SessionError",
    "SoftPrune",
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
    "VideoError",
    "Watched",
    "adapters",
    "bind",
    "control_chart",
    "default_phase",
    "defaults_of",
    "detect",
    "grid_of",
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
    "patch_in_engine",
    "patched",
    "policies",
    "shares_storage",
    "strand",
    "unmark",
    "unpatch",
    "x0_of_flow",
]
