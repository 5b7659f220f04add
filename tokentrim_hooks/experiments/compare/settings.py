"""What is compared: an unpatched run, policies, probes and controls, each under a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.policy.adaptive import AdaptivePolicy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.commit_window import CommitWindow
from tokentrim_hooks.policy.controls import (
    AlwaysPolicy,
    ChooseTokens,
    FreshNoise,
    NewestLight,
    OldestWindow,
    RandomFrames,
    RandomStep,
)
from tokentrim_hooks.policy.flowmo import FlowMo
from tokentrim_hooks.policy.frame_eviction import FrameEviction
from tokentrim_hooks.policy.late_mean import LateMean
from tokentrim_hooks.policy.latent_moments import LatentMoments
from tokentrim_hooks.policy.row_moments import RowMoments
from tokentrim_hooks.policy.soft_prune import SoftPrune
from tokentrim_hooks.policy.token_trim import DriftPolicy
from tokentrim_hooks.rollout.shared import Probe

Tokens = Literal["unstable", "random", "least", "none"]
BASE = "off"
"""Name of the unpatched setting, with which all others are compared."""


@dataclass(frozen=True)
class Setting:
    """One arm of a comparison; the defaults are the paper's method with the cheap probe.

    Attributes:
        name: as it stands in tables.
        off: the model is not patched at all.
        probe: which prediction is judged.
        tokens: which tokens die: the unstable ones, or as a control as many random or the least drifting ones, or none.
        always: regenerate every chunk after the warm-up, whatever its severity.
        fresh_noise: regenerate from new noise.
        options: of the paper's policy.
        methods: the policies, in order, instead of the paper's.
        graded: the finished video's moments per channel are made those of its first chunk, and nothing is fed back.
    """

    name: str
    off: bool = False
    probe: Probe = "first-step"
    tokens: Tokens = "unstable"
    always: bool = False
    fresh_noise: bool = False
    options: DriftPolicy = field(default_factory=DriftPolicy)
    methods: tuple[Policy, ...] = ()
    graded: bool = False

    def policies(self, seed: int) -> list[Policy]:
        """What to patch with; ``seed`` is of what a control draws."""
        return list(self.methods) or [self.policy(seed)]

    def policy(self, seed: int) -> Policy:
        """The policy; ``seed`` is of what a control draws."""
        policy: Policy = AlwaysPolicy(**self.options.settings()) if self.always else self.options
        if self.tokens != "unstable":
            policy = ChooseTokens(policy, self.tokens, seed)
        return FreshNoise(policy, seed) if self.fresh_noise else policy

    def as_dict(self) -> dict[str, Any]:
        """All but the name: what makes results of two runs comparable."""
        own = {key: value for key, value in vars(self).items() if key not in ("name", "options", "methods")}
        if not self.graded:  # results from before there was grading hold no word of it
            del own["graded"]
        methods = {"methods": " + ".join(map(str, self.methods))} if self.methods else {}
        return {**own, **self.options.settings(), **methods}


STANDARD: tuple[Setting, ...] = (
    Setting(BASE, off=True),
    Setting("paper first-step"),
    Setting("paper candidate", probe="candidate"),
    Setting("p 0.05", options=DriftPolicy(fraction=0.05)),
    Setting("p 0.2", options=DriftPolicy(fraction=0.2)),
    Setting("lambda 1", options=DriftPolicy(sensitivity=1.0)),
    Setting("lambda 3", options=DriftPolicy(sensitivity=3.0)),
    Setting("not persistent", options=DriftPolicy(persist=False)),
    Setting("anchors pruned", options=DriftPolicy(prune_anchors=True)),
    Setting("prune always", always=True),
    Setting("control: random tokens", tokens="random"),
    Setting("control: least drifting", tokens="least"),
    Setting("control: same again", tokens="none"),
    Setting("control: new noise only", tokens="none", fresh_noise=True),
    Setting("control: random always", tokens="random", always=True),
)
"""The settings that ``tokentrim compare`` runs if it is told nothing else."""

METHODS: tuple[Setting, ...] = (
    Setting("adaptive", methods=(AdaptivePolicy(),)),
    Setting("adaptive + commit window 6", methods=(AdaptivePolicy(), CommitWindow(frames=6))),
    Setting("control: adaptive random tokens", methods=(ChooseTokens(policy=AdaptivePolicy()),)),
    Setting("commit window 6", methods=(CommitWindow(frames=6),)),
    Setting("self-caching", methods=(CommitWindow(frames=0),)),
    Setting("latent moments", methods=(LatentMoments(),)),
    Setting("late mean", methods=(LateMean(),)),
    Setting("row moments", methods=(RowMoments(),)),
    Setting("commit window 6 + row moments", methods=(CommitWindow(frames=6), RowMoments())),
    Setting(
        "adaptive + commit window 6 + row moments",
        methods=(AdaptivePolicy(), CommitWindow(frames=6), RowMoments()),
    ),
    Setting("paper + commit window 6", methods=(DriftPolicy(), CommitWindow(frames=6))),
    Setting("control: oldest window 6", methods=(OldestWindow(frames=6),)),
    Setting("frame eviction", methods=(FrameEviction(),)),
    Setting("control: random frames", methods=(RandomFrames(),)),
    Setting("soft prune", methods=(SoftPrune(),)),
    Setting("control: newest light", methods=(NewestLight(),)),
    Setting("flowmo", methods=(FlowMo(),)),
    Setting("control: random step", methods=(RandomStep(),)),
    Setting("control: graded afterwards", off=True, graded=True),
)
"""Other methods than the paper's, and controls for some of them: run where ``--only`` names them."""

OWN = {name: kind for name, kind in get_type_hints(Setting).items() if name not in ("name", "options", "methods")}
OPTIONS = get_type_hints(DriftPolicy)
TYPES = {**OWN, **OPTIONS}


def parse_setting(text: str) -> Setting:
    """Read ``NAME: key=value, key=value`` with the attributes of :class:`Setting` and the options of the policy.

    Raises:
        TokenTrimError: no name, no colon behind it, an unknown key, or a value of the wrong kind.
    """
    name, _, rest = text.partition(":")
    if not name.strip() or "=" in name:
        raise TokenTrimError(f"setting {text!r} has no name with a colon.\nWrite 'NAME: key=value, key=value'.")
    pairs = [item.partition("=") for item in rest.split(",") if item.strip()]
    try:
        values = {key.strip(): _value(key.strip(), value.strip()) for key, _, value in pairs}
        options = DriftPolicy(**{key: value for key, value in values.items() if key in OPTIONS})
        return Setting(name.strip(), **{key: value for key, value in values.items() if key in OWN}, options=options)
    except ValueError as failure:
        raise TokenTrimError(f"setting {text!r}: {failure}") from failure


def changes(description: Mapping[str, Any]) -> str:
    """What a setting (:meth:`Setting.as_dict`) changes of the paper's, in words."""
    if description["off"]:
        return "not patched, graded afterwards" if description.get("graded") else "not patched"
    usual = STANDARD[1].as_dict()
    return ", ".join(f"{key}={value}" for key, value in description.items() if value != usual.get(key)) or "nothing"


def choose(
    names: Iterable[str] | None, more: Iterable[str], anchors: bool, plugged: Sequence[Setting] = ()
) -> list[Setting]:
    """The base, the standard settings (or those of them named), ``plugged``, ``more`` in the words of parse_setting.

    Without anchors in the model "anchors pruned" is the paper's setting, so it is left out unless it is named.

    Raises:
        TokenTrimError: a name that is no standard setting, or a name given twice.
    """
    known = {setting.name: setting for setting in (*STANDARD, *METHODS)}
    wanted = [s.name for s in STANDARD if anchors or s.name != "anchors pruned"] if names is None else list(names)
    strange = [name for name in wanted if name not in known]
    if strange:
        raise TokenTrimError(f"no such setting: {', '.join(strange)}.\nSee tokentrim compare --list for all of them.")
    chosen = [known[name] for name in dict.fromkeys([BASE, *wanted])]
    chosen += [setting for setting in plugged if setting not in chosen] + [parse_setting(text) for text in more]
    if len({setting.name for setting in chosen}) < len(chosen):
        raise TokenTrimError("two settings have one name; rename one")
    return chosen


def _value(key: str, text: str) -> Any:
    kind = TYPES.get(key)
    if kind is None:
        raise ValueError(f"{key!r} is not an option; known: {', '.join(TYPES)}")
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{key} must be true or false, got {text!r}")
        return text == "true"
    if kind in (int, float):
        return kind(text)
    if text not in kind.__args__:
        raise ValueError(f"{key} must be one of {', '.join(kind.__args__)}, got {text!r}")
    return text
