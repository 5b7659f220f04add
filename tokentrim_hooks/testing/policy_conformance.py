"""The kit for authors of policies: subclass :class:`PolicyConformance` in a test module and your policy is on trial.

The hooks are shown random views, in every phase, with one sample and several, at the start of a scene and later; given
a model as well, the policy runs on that. A part that cannot be checked is skipped with a reason that begins with
``NOT CHECKED``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.base import hooks_of
from tokentrim_hooks.testing.checks import not_checked
from tokentrim_hooks.testing.syncs import count_syncs
from tokentrim_hooks.testing.views import Views

PHASES = ("first", "refine", "commit", "recache")


class PolicyConformance:
    """What every policy must pass. Subclasses set ``policy`` and, for each option of its own, ``wrong`` values.

    Attributes:
        policy: the policy on trial, with options by which it answers something.
        wrong: per option of its own, values that it must refuse with a ValueError that names the option; an empty list
            for one that takes any value.
        neutral: the same policy with options by which it does nothing; None if there are none.
        tolerance: greatest difference of two runs on the model.
    """

    policy: ClassVar[tokentrim.Policy]
    wrong: ClassVar[Mapping[str, list[Any]]] = {}
    neutral: ClassVar[tokentrim.Policy | None] = None
    tolerance: ClassVar[float] = 0.0

    # ------------------------------------------------------------------------------ what an author may write

    def make_model(self) -> Any:
        """Build a fresh small model that takes the policy, with the same weights every time."""
        raise not_checked("no model to run the policy on: write make_model() and run(model, seed)")

    def run(self, model: Any, seed: int) -> Tensor:
        """Generate a video of at least 5 chunks from ``seed`` alone; return the latents."""
        raise not_checked("no model to run the policy on: write make_model() and run(model, seed)")

    # ------------------------------------------------------------------------------ options

    def test_is_a_frozen_dataclass_that_says_what_it_does(self) -> None:
        """Frozen, so that a run's settings are those it began with; documented; every annotated option a field."""
        cls = type(self.policy)
        assert cls.__dataclass_params__.frozen, "decorate it with @dataclass(frozen=True)"  # type: ignore[attr-defined]
        words = (cls.__doc__ or "").strip()
        assert words and not words.startswith(f"{cls.__name__}("), "it has no docstring"
        lost = [name for name in _own_options(cls) if name not in self.policy.settings()]
        assert not lost, f"{lost} are no fields: decorate the class itself with @dataclass(frozen=True)"
        assert hooks_of(cls), "it overrides no hook"

    def test_settings_can_be_recorded(self) -> None:
        """The log keeps options as JSON."""
        json.dumps(self.policy.settings())

    def test_an_unknown_option_is_a_type_error(self) -> None:
        """A misspelt option must not pass unnoticed."""
        refused = _refusal(TypeError, lambda: type(self.policy)(no_such_option=1))  # type: ignore[call-arg]
        assert refused is not None, "it takes an option that it does not have"

    def test_values_out_of_range_are_refused_by_name(self) -> None:
        """Every option of its own refuses the values in ``wrong``; those of every policy are checked as well."""
        unnamed = sorted(set(_own_options(type(self.policy))) - set(self.wrong))
        assert not unnamed, f"name in `wrong` what {unnamed} must refuse (an empty list if there is nothing)"
        every = {**self.wrong, "max_regenerations": [-1], "coarse": ["some"]}
        for name, value in ((name, value) for name, values in every.items() for value in values):
            refused = _refusal(ValueError, functools.partial(dataclasses.replace, self.policy, **{name: value}))
            assert refused is not None and name in refused, f"{name}={value!r} is not refused by name: {refused}"

    # ------------------------------------------------------------------------------ answers

    def test_answers_fit(self) -> None:
        """Every hook answers None, or with the shapes, types and values that its docstring asks for; once at least."""
        answered = set()
        for views in _places():
            for hook, answer in views.ask(self.policy).items():
                if answer is not None:
                    answered.add(hook)
                    _CHECKS[hook](views, answer)
        assert answered == set(hooks_of(type(self.policy))), "a hook has never answered: give it other options"

    def test_never_waits_for_the_device(self) -> None:
        """No ``.item()``, no ``bool(tensor)``: the rollout reads the device once per chunk, and nobody else does."""
        file = inspect.getfile(type(self.policy))
        for views in _places():
            with count_syncs(ours=[file]) as log:
                views.ask(self.policy)
            assert not len(log), f"the policy waits for the device\n{log}"

    def test_stays_on_the_device(self) -> None:
        """Shown tensors of another device, it answers on that one; what it hides may be said on the CPU."""
        for hook, answer in Views.random(device="meta").ask(self.policy).items():
            devices = {tensor.device.type for tensor in _tensors(answer)}
            assert devices <= ({"meta", "cpu"} if hook == "hide" else {"meta"}), f"{hook} answered on {devices}"

    def test_the_same_question_has_the_same_answer(self) -> None:
        """Bit for bit, with no random number from the global stream, which is the sampler's."""
        for views in _places():
            before = torch.get_rng_state()
            first, again = views.ask(self.policy), views.ask(self.policy)
            assert torch.equal(before, torch.get_rng_state()), "it draws from the global random stream"
            pairs = zip(_tensors(first), _tensors(again), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), "two answers differ"

    def test_what_it_is_shown_stays_as_it_was(self) -> None:
        """Views are read only: an operation in place would change the sampler's latents, or the cache."""
        for views in _places():
            before = [tensor.clone() for tensor in _tensors(views)]
            views.ask(self.policy)
            pairs = zip(before, _tensors(views), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), "it writes into what it is shown"

    def test_neutral_options_do_nothing(self) -> None:
        """With them every hook answers None, a verdict that prunes nothing, or a mask that hides nothing."""
        if self.neutral is None:
            raise not_checked("the policy has no options by which it does nothing")
        for views in _places():
            for hook, answer in views.ask(self.neutral).items():
                flags = answer.prune if isinstance(answer, tokentrim.Verdict) else answer
                flags = flags < 1 if hook == "hide" and flags is not None and flags.is_floating_point() else flags
                idle = answer is None or (hook in ("judge", "hide") and not flags.any())
                assert idle, f"{hook} answers {answer} with neutral options"

    # ------------------------------------------------------------------------------ on a model

    def test_a_neutral_policy_changes_no_bit(self) -> None:
        """The video is the unpatched model's."""
        model, plain = self.make_model(), self.run(self.make_model(), 1)
        if self.neutral is None:
            raise not_checked("the policy has no options by which it does nothing")
        with tokentrim.patched(model, self.neutral):
            assert torch.equal(self.run(model, 1), plain)

    def test_runs_on_a_model_and_leaves_it_whole(self) -> None:
        """Two videos of one seed are the same and finite; afterwards the model is as if it had never been patched."""
        model, plain = self.make_model(), self.run(self.make_model(), 1)
        with tokentrim.patched(model, self.policy) as handle:
            first, again = self.run(model, 1), self.run(model, 1)
        assert torch.isfinite(first).all() and torch.allclose(first, again, rtol=0, atol=self.tolerance)
        assert handle.report.records, "no chunk was recorded"
        assert torch.equal(self.run(model, 1), plain)


def _refusal(kind: type[Exception], make: Callable[[], object]) -> str | None:
    """The message with which ``make`` refuses; None if it does not."""
    try:
        make()
    except kind as refusal:
        return str(refusal)
    return None


def _own_options(cls: type) -> list[str]:
    """Options that a class and its bases below Policy annotate."""
    below = itertools.takewhile(lambda base: base is not tokentrim.Policy, cls.__mro__)
    return [name for base in below for name, kind in vars(base).get("__annotations__", {}).items()
            if "ClassVar" not in str(kind)]  # fmt: skip


def _places() -> Iterator[Views]:
    """Views of every phase, of one sample and several, in half precision too, at the start of a scene and later."""
    for seed, (phase, batch, first) in enumerate(itertools.product(PHASES, (1, 3), (False, True))):
        yield Views.random(seed, batch, phase, first=first)
    yield Views.random(99, dtype=torch.bfloat16)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in an answer or a view, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _check_judge(views: Views, answer: Any) -> None:
    batch, tokens = views.chunk.drift.shape
    assert isinstance(answer, tokentrim.Verdict), f"judge answered {type(answer).__name__}, not a Verdict"
    assert answer.tokens.dtype == torch.long and answer.tokens.shape[:-1] == (batch,), "tokens: LongTensor [B, k]"
    assert ((answer.tokens >= 0) & (answer.tokens < tokens)).all(), f"tokens lie in 0 .. {tokens - 1}"
    assert answer.prune.dtype == torch.bool and answer.prune.shape == (batch,), "prune: BoolTensor [B]"
    for name in ("severity", "threshold"):
        value = getattr(answer, name)
        assert value.dtype.is_floating_point and value.shape == (batch,), f"{name}: floating [B]"
    assert torch.isfinite(answer.severity).all() and not answer.threshold.isnan().any()


def _check_hide(views: Views, answer: Any) -> None:
    batch, frames, tokens = views.chunk.drift.shape[0], views.context.frames, views.context.tokens
    weights = answer.dtype.is_floating_point
    assert weights or answer.dtype == torch.bool, f"hide answered {answer.dtype}, neither a BoolTensor nor weights"
    assert not weights or ((answer >= 0) & (answer <= 1)).all(), "weights lie in [0, 1]"
    shapes = [(frames,), (frames, tokens), (batch, frames, tokens)]
    assert tuple(answer.shape) in shapes, f"hide answered {tuple(answer.shape)}, not one of {shapes}"


def _check_guide(views: Views, answer: Any) -> None:
    latents = views.noisy.latents
    assert answer.shape == latents.shape and answer.dtype.is_floating_point, f"guide must answer {tuple(latents.shape)}"
    assert torch.isfinite(answer).all(), "guide answered what is not finite"


def _check_correct(views: Views, answer: Any) -> None:
    x0 = views.denoised.prediction
    assert answer.shape == x0.shape and answer.dtype.is_floating_point, f"correct must answer latents {tuple(x0.shape)}"
    assert torch.isfinite(answer).all(), "correct answered what is not finite"


def _check_settle(views: Views, answer: Any) -> None:
    assert isinstance(answer, tokentrim.Rows), f"settle answered {type(answer).__name__}, not Rows"
    for name in ("values", "keys"):
        old, new = getattr(views.rows, name), getattr(answer, name)
        assert new.shape == old.shape and new.dtype == old.dtype, f"{name} must stay {old.dtype} {tuple(old.shape)}"
        assert torch.isfinite(new).all(), f"{name} are not finite"


_CHECKS = {
    "guide": _check_guide,
    "judge": _check_judge,
    "hide": _check_hide,
    "correct": _check_correct,
    "settle": _check_settle,
}
