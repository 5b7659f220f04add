"""Conformance kits for authors of adapters and of policies, and what tests of patched models need."""

from tokentrim_hooks.testing.attention import Attention, KeyTracker, watch_attention
from tokentrim_hooks.testing.checks import failures, not_checked
from tokentrim_hooks.testing.conformance import AdapterConformance
from tokentrim_hooks.testing.fingerprint import Fingerprint, assert_same, fingerprint
from tokentrim_hooks.testing.policies import ForcedPolicy
from tokentrim_hooks.testing.policy_conformance import PolicyConformance
from tokentrim_hooks.testing.syncs import Sync, SyncLog, count_syncs
from tokentrim_hooks.testing.views import Views, chunk_of

__all__ = [
    "AdapterConformance",
    "Attention",
    "Fingerprint",
    "ForcedPolicy",
    "KeyTracker",
    "PolicyConformance",
    "Sync",
    "SyncLog",
    "Views",
    "assert_same",
    "chunk_of",
    "count_syncs",
    "failures",
    "fingerprint",
    "not_checked",
    "watch_attention",
]
