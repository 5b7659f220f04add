"""The measuring instruments of the conformance kit, below its laws."""

from tokentrim_hooks.testing.checks.basics import (
    Counter,
    Injected,
    assert_close,
    assert_raises,
    counting,
    failures,
    not_checked,
)
from tokentrim_hooks.testing.checks.disturbances import (
    PoisonLog,
    Tripwire,
    poisoned,
    replaced_forward,
)
from tokentrim_hooks.testing.checks.keys import (
    check_anchors,
    check_kernels,
    check_no_sink,
    evictions,
    require_followed,
    run_with_dead_keys,
    run_with_weights,
)
from tokentrim_hooks.testing.checks.records import (
    check_calls,
    check_records,
)

__all__ = [
    "Counter",
    "Injected",
    "PoisonLog",
    "Tripwire",
    "assert_close",
    "assert_raises",
    "check_anchors",
    "check_calls",
    "check_kernels",
    "check_no_sink",
    "check_records",
    "counting",
    "evictions",
    "failures",
    "not_checked",
    "poisoned",
    "replaced_forward",
    "require_followed",
    "run_with_dead_keys",
    "run_with_weights",
]
