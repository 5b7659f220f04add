"""Watched: a policy acts, and another one's severities are recorded beside its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tokentrim_hooks.policy.adaptive import AdaptivePolicy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.controls import Wrapper
from tokentrim_hooks.policy.views import Chunk, History, Verdict


@dataclass(frozen=True)
class Watched(Wrapper):
    """Act as ``policy`` does, to the bit, and record what ``watcher`` measures of the same predictions.

    For the question that a log can answer then, without another run: what would the watcher have pruned? It costs the
    watcher's mathematics once per judged attempt; its numbers travel with the verdict's, in the same host read.

    Args:
        watcher: any policy that judges. Its severities are ``watched`` and ``accepted_watched`` of the records.

    Raises:
        ValueError: the watcher does not judge.

    Example:
        >>> tokentrim.patch(pipeline, Watched(DriftPolicy()), observers=["jsonl"])  # doctest: +SKIP
    """

    watcher: Policy = field(default_factory=AdaptivePolicy)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.watcher.judges:
            raise ValueError(f"{type(self.watcher).__name__} judges nothing; give a watcher that does")

    def judge(self, chunk: Chunk, history: History) -> Verdict | None:
        """The wrapped policy's verdict, with the watcher's severity beside it."""
        verdict = self.policy.judge(chunk, history)
        # Severities of another policy would be no history of the watcher's, so only what it measures is asked for.
        seen = None if verdict is None else self.watcher.judge(chunk, replace(history, count=0, recent=None))
        return verdict if verdict is None or seen is None else replace(verdict, watched=seen.severity)

    @property
    def acting(self) -> Policy:
        """The wrapped policy."""
        return self.policy

    def settings(self) -> dict[str, Any]:
        """The wrapped policy's, flat, and the watcher's behind ``watcher.``."""
        own = {**super().settings(), "watcher": type(self.watcher).__name__}
        return own | {f"watcher.{name}": value for name, value in self.watcher.settings().items()}
