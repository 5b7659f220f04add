"""What a planted mistake is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A mistake that somebody could make.

    Attributes:
        file: in the checkout. old, new: text in it, and what stands there instead.
        means: the mistake in words. tests: those that fail of it.
    """

    file: str
    old: str
    new: str
    means: str
    tests: tuple[str, ...]


def planted(package: str, file: str, old: str, new: str, means: str, *tests: str) -> Mutant:
    """A mutant in a file of a room of the core, or of the adapters; tests as nodes below ``tests/``."""
    path = f"tokentrim_hooks/{package}/{file}.py" if package != "adapters" else f"adapters/{file}.py"
    return Mutant(path, old, new, means, tuple(f"tests/{test}" for test in tests))


OURS = "adapters/test_core_mutants.py::test_"
HIDE, SETTLE, CORRECT, ADAPTIVE = (
    f"policies/test_{name}.py::test_" for name in ("hide", "settle", "correct", "adaptive")
)
PARTS = "adapters/test_parts_of_a_batch.py::test_"
PRUNING, WRONG = "properties/test_pruning_laws.py::test_", "unit/test_when_things_go_wrong.py::test_"
