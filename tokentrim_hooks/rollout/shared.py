"""What all videos of one patched model have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.rollout.names import Names
from tokentrim_hooks.rollout.pace import Habits
from tokentrim_hooks.rollout.records import Recorder
from tokentrim_hooks.rollout.repeat.recall import Course
from tokentrim_hooks.rollout.repeat.shown import Proof
from tokentrim_hooks.rollout.state import VideoState

Probe = Literal["first-step", "candidate"]


@dataclass(frozen=True)
class Shared:
    """Options, report and proof of a patched model.

    Attributes:
        policy: the one that judges. probe: which prediction it judges.
        patch_size: (height, width) of a token in latent pixels.
        recorder: keeps the report.
        failures: what follows a failure of ours.
        proof: what the first prune has shown.
        names: of the contexts. habits: what was seen of how the samplers call.
        policies: all of them, in order.
    """

    policy: Policy
    probe: Probe
    patch_size: tuple[int, int]
    recorder: Recorder
    failures: FailurePolicy
    proof: Proof
    names: Names = field(default_factory=Names)
    habits: Habits = field(default_factory=Habits)
    policies: tuple[Policy, ...] = ()

    def course(self, module: object, video: VideoState | None) -> Course | None:
        """What counts in a call, to be put back before it is made again; None where nothing does, or nothing prunes."""
        if video is None or not (self.policy.regenerates and self.proof.enabled) or self.proof.repeats(module):
            return None
        return self.proof.recall.begin(module, video.number)
