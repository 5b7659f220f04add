"""The kit's tests of what stands beside a call: another model at the same time, the same call once more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.adapter import Call
from tokentrim_hooks.policy.token_trim import ObservePolicy
from tokentrim_hooks.testing import checks
from tokentrim_hooks.testing.attention import around_calls
from tokentrim_hooks.testing.laws.hooks import calls_of
from tokentrim_hooks.testing.laws.trial import Trial


class CompanyTests(Trial):
    """An adapter keeps what it knows of one model and one call to these."""

    def test_two_models_at_once_do_not_mix(self) -> None:
        """Amid a pruned run another model, patched as well, makes whole videos: each makes what it makes alone."""
        expected, model = self._pruned(6), self.make_model()
        with checks.counting(self.denoisers(model)) as calls:
            plain = self.run(model, 7)
        # As the chunk that is pruned begins, and when something is dead.
        amid = [calls_of(self, self.chunk_to_prune, 6)["first"][0] + 1, int(0.8 * calls.count)]
        one, other = self.make_model(), self.make_model()
        with self.patch(one, self._forced()), self.patch(other, ObservePolicy()):
            found = self._amid(one, other, amid)
        if all(map(torch.equal, found, (expected, plain, plain))):
            return
        alone = self.run(self.make_model(), 6)
        if not all(map(torch.equal, self._amid(self.make_model(), self.make_model(), amid), (alone, plain, plain))):
            raise checks.not_checked("two unpatched models mix as well when one runs amid the other")
        raise AssertionError("two patched models mix: what does the adapter keep in its class, or hang on one?")

    def _amid(self, one: Any, other: Any, calls: Sequence[int]) -> list[Tensor]:
        """The one's video, and those that the other makes in a thread of its own while these calls of it wait."""
        count, found, nested = checks.Counter(), list[Tensor](), False

        def enter() -> None:
            nonlocal nested
            if nested:  # a method of a class, which both models call
                return
            count.up()
            if count.count in calls:
                nested = True
                with torch.random.fork_rng(devices=[]), ThreadPoolExecutor(1) as aside:
                    found.append(aside.submit(self.run, other, 7).result())
                nested = False

        with around_calls(self.denoisers(one), enter):
            return [self.run(one, 6), *found]

    def test_a_call_is_read_the_same_when_asked_again(self) -> None:
        """``identity`` and ``parse`` give the same answer for the same arguments, however often they are asked.

        The number of a branch of guidance (a number in ``stream``) may be told by the order of calls alone.
        """
        changed: dict[str, int] = {}
        sound, model = self.adapter, self.make_model()

        def ask_twice(name: str) -> Any:
            def ask(adapter: Any, arguments: Mapping[str, Any]) -> Any:
                right = getattr(super(twice, adapter), name)
                first, again = right(arguments), right(arguments)
                changed.update(dict.fromkeys(_changed(name, first, again), 1))
                return again

            return ask

        twice: Any = type(sound.__name__, (sound,), {name: ask_twice(name) for name in ("identity", "parse")})
        vars(self)["adapter"] = twice
        try:
            with self.patch(model, ObservePolicy()) as handle:
                self.run(model, 0)
        finally:
            del vars(self)["adapter"]
        assert not changed, f"asked again about the same call, the adapter gives other {', '.join(changed)}"
        checks.check_records(handle.report, self.chunks, self.overlap, self.backwards)


def _changed(name: str, first: Any, again: Any) -> Iterator[str]:
    """What differs in two answers to one question."""
    if isinstance(first, Call) and isinstance(again, Call):
        counted = {"stream"} if isinstance(first.stream, int) and isinstance(again.stream, int) else set[str]()
        known = [field.name for field in fields(Call) if field.name not in {"arguments", *counted}]
        yield from (f"Call.{field}" for field in known if not _same(getattr(first, field), getattr(again, field)))
    elif name == "identity" and len(first) == len(again):
        yield from (f"{name}()" for one, other in zip(first, again, strict=True) if not _same(one, other))
    elif first is not None or again is not None:
        yield f"{name}()"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    return one is other or (type(one) is type(other) and bool(one == other))
