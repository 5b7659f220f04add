"""What AdaptivePolicy does not do, tried on tuning seeds: ``python -m tokentrim_hooks.experiments.search.levers``.

Both probes together, each in the place of the other or confirming it, and an unstable set as wide as the corruption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.console import show_table
from tokentrim_hooks.experiments.compare.rollouts import roll_out
from tokentrim_hooks.experiments.compare.settings import BASE, Setting
from tokentrim_hooks.experiments.compare.trials import ReferenceMaker
from tokentrim_hooks.experiments.search.watched import Watched, asked, held_in, kept
from tokentrim_hooks.policy.adaptive import AdaptivePolicy
from tokentrim_hooks.policy.drift import unstable_tokens
from tokentrim_hooks.policy.views import Chunk, History, Verdict
from tokentrim_hooks.reference.fault import FAULTS, Where
from tokentrim_hooks.rollout.shared import Probe

SOUGHT: tuple[Where, ...] = ("settled", "late")
PROBES: tuple[Probe, ...] = ("first-step", "candidate")
SENSITIVITIES = (1.0, 1.25, 1.5, 2.0, 2.5)
BATCH = 16


@dataclass(frozen=True)
class Shaped(AdaptivePolicy):
    """The unstable set is as wide as what stands out: tokens at least ``share`` times as new as the newest one.

    Args:
        share: of the greatest novelty. most: share of tokens in the set at most; ``fraction`` is not used.
    """

    share: float = 0.5
    most: float = 0.2

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """The severity is the mean over that set; a row is filled by naming its newest token again."""
        verdict, score = super().judge(chunk, history), self.novelty(chunk)
        widest = unstable_tokens(score, self.most)
        ranked = score.gather(1, widest)
        inside = ranked >= self.share * ranked[:, :1]
        severity = (ranked * inside).sum(1) / inside.sum(1)
        tokens = torch.where(inside, widest, widest[:, :1])
        over = (severity > verdict.threshold) & verdict.threshold.isfinite()
        return Verdict(tokens, severity, verdict.threshold, over)


@dataclass(frozen=True)
class Wide(AdaptivePolicy):
    """Notices what AdaptivePolicy does, and prunes beside its set, up to ``most``, all that is as new by itself."""

    most: float = 0.2

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """The set grows by tokens whose novelty exceeds the threshold of the severity."""
        verdict, score = super().judge(chunk, history), self.novelty(chunk)
        widest = unstable_tokens(score, self.most)
        inside = score.gather(1, widest) > verdict.threshold[:, None]
        inside[:, : verdict.tokens.shape[1]] = True
        return dataclasses.replace(verdict, tokens=torch.where(inside, widest, widest[:, :1]))


@dataclass(frozen=True)
class Pair:
    """One batch of unpatched rollouts, as the two probes meet them."""

    first: Watched
    candidate: Watched

    def flags(self, policy: AdaptivePolicy, probes: str) -> Tensor:
        """Which chunks are flagged, ``[chunks, B]``, by the probes ``first``, ``candidate``, ``either`` or ``both``."""
        late = self.candidate.flags(policy)
        early = self.first.flags(policy)[-len(late) :]  # which call is the last is not known of the first chunk
        return {"first": early, "candidate": late, "either": early | late, "both": early & late}[probes]


def variants() -> Iterator[tuple[str, AdaptivePolicy, str]]:
    """What is tried: its name, the policy, and the probes that it judges by."""
    for sensitivity in SENSITIVITIES:
        usual = AdaptivePolicy(sensitivity=sensitivity)
        for probes in ("first", "candidate", "either", "both"):
            yield f"{probes}, sensitivity {sensitivity}", usual, probes
        for share in (0.4, 0.6, 0.8):
            shaped = Shaped(sensitivity=sensitivity, share=share)
            yield f"as wide as {share} of the newest, sensitivity {sensitivity}", shaped, "first"


def noticed(pairs: Sequence[Pair]) -> Iterator[list[str]]:
    """A row per variant: the share that is flagged of each fault's chunk, and of the chunks before the last fault."""
    for name, policy, probes in variants():
        flags = [pair.flags(policy, probes).float() for pair in pairs]
        true = flags[-1][: FAULTS[SOUGHT[-1]].first - 1]
        yield [name, *(f"{float(share):.3f}" for share in (true.mean(), *(flag[-1].mean() for flag in flags)))]


def repaired(seeds: Sequence[int], fault: Where) -> Iterator[list[str]]:
    """A row per unstable set: the error around a fault one chunk later, and sprites alive, less those of ``off``."""
    held_in(seeds)
    tried = {"as frozen": AdaptivePolicy(), "fraction 0.1": AdaptivePolicy(fraction=0.1), "wide": Wide(),
             "as wide as 0.6 of the newest": Shaped(share=0.6, sensitivity=1.0)}  # fmt: skip
    settings = [Setting(BASE, off=True), *(Setting(name, methods=(policy,)) for name, policy in tried.items())]
    maker = ReferenceMaker.load(FAULTS[fault].last + 2, fault, None, trained=True, device="cpu")
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(seeds), BATCH):
        trial = maker(seeds[start : start + BATCH])
        for setting in settings:
            values = roll_out(trial, setting, trial.seeds).outcome.values
            chosen = [values[key] for key in values if "+1" in key or key.startswith("sprites alive")]
            found.setdefault(setting.name, []).append(torch.tensor(chosen))
    off = torch.cat(found.pop(BASE), dim=1)
    for name, parts in found.items():
        gain = (torch.cat(parts, dim=1) - off).nanmean(dim=1)
        yield [f"{fault}: {name}", *(f"{float(value):+.3f}" for value in gain)]


def main() -> None:
    """Command line."""
    out, seeds = asked(__doc__, seeds=32)
    pairs = []
    for fault in SOUGHT:
        both = [kept(out, "fading", fault, seeds, FAULTS[fault].last + 1, probe) for probe in PROBES]
        pairs.append(Pair(*both))
    show_table(["lever", "true scenes", *SOUGHT], list(noticed(pairs)))
    show_table(["unstable set", "error, +1", "sprites alive, +1", "+2"], list(repaired(seeds[:BATCH], "settled")))


if __name__ == "__main__":
    main()
