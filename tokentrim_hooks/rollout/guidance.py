"""The hook ``guide``: other noisy latents before a denoising call, after a look ahead on a copy of the context."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.adapter import Adapter, Call, Phase
from tokentrim_hooks.errors import PolicyError, UnsupportedPolicyError
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.inspection import bind, compiled_part, shares_storage
from tokentrim_hooks.policy.base import Policy, labelled
from tokentrim_hooks.policy.views import Noisy, Place
from tokentrim_hooks.pruning.call_scope import scoped
from tokentrim_hooks.ranks.agreement import Alone
from tokentrim_hooks.rollout.answers import prediction_of, replayed, shown, unwritten
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.repeat.counters import Counters
from tokentrim_hooks.rollout.repeat.proof import require_repeated
from tokentrim_hooks.rollout.scene import Act
from tokentrim_hooks.rollout.state import ChunkState, VideoState

REFUSED = "policies that guide cannot work here: "


@dataclass(frozen=True)
class Given:
    """A call that is about to be made: of what, in the core's words, with which arguments."""

    module: Any
    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    phase: Phase | None
    place: Place | None


class Guidance:
    """Asks the policies that guide; what they look at is made on copies, so the model is as it was.

    Args:
        adapter: of the model. policies: all, in order.
        pruner: gives the look ahead its tap, so that it sees what the call will see.
        failures: knows the ranks that share the model.
    """

    def __init__(self, adapter: Adapter, policies: Sequence[Policy], pruner: Pruner, failures: FailurePolicy) -> None:
        self._adapter, self._pruner, self._failures = adapter, pruner, failures
        self._guiding = [(label, policy) for label, policy in labelled(policies) if policy.overrides("guide")]
        # A chunk that was guided, until its commit shows that the sampler went on from what it was handed.
        self._unproved: tuple[VideoState, ChunkState] | None = None

    def __bool__(self) -> bool:
        """Whether some policy guides."""
        return bool(self._guiding)

    def guided(
        self, given: Given, video: VideoState | None, chunk: ChunkState | None
    ) -> tuple[Given, list[Act]]:
        """The call from the latents that policies answer, and who moved them; ``given`` itself where nobody did.

        Raises:
            UnsupportedPolicyError: the sampler shows that it does not go on from what was guided, or the model cannot
                look ahead. PolicyError: an answer of another shape.
        """
        if chunk is None or video is None or given.place is None:
            return given, []
        self._require_few_steps(given, video, chunk)
        if given.phase not in (Phase.FIRST, Phase.REFINE):
            return given, []
        acts: list[Act] = []
        for label, policy in self._guiding:
            with unwritten(policy, "guide", given.call.latents):
                answer = policy.guide(self._view(given, given.place))
            if answer is None:
                continue
            before = given.call.latents
            given = self._from(given, _like(answer, before, f"{type(policy).__name__}.guide returned").detach())
            acts.append(Act(label, "guide", norm=(given.call.latents.float() - before.float()).norm()))
            self._unproved = (video, chunk)
        return given, acts

    def _require_few_steps(self, given: Given, video: VideoState, chunk: ChunkState) -> None:
        """Raise UnsupportedPolicyError where calls behind a guided one show another kind of sampler."""
        if self._unproved is None:
            return
        guided_video, guided = self._unproved
        if guided is chunk and given.phase is None:
            raise UnsupportedPolicyError(
                f"{REFUSED}the second branch of guidance was given latents that were not moved.\n"
                "Leave such policies out, or sample without classifier-free guidance."
            )
        if guided is chunk and given.phase is not Phase.COMMIT:
            return
        self._unproved = None
        lost = guided is not chunk or not shares_storage(given.call.latents, video.returned)
        if lost and guided_video is video and not guided.failed:
            raise UnsupportedPolicyError(
                f"{REFUSED}the sampler does not commit the x0 of the model: what was moved is lost.\n"
                "Leave such policies out, or use the few-step sampler, which does."
            )

    def _view(self, given: Given, place: Place) -> Noisy:
        return Noisy(
            **{f.name: getattr(place, f.name) for f in dataclasses.fields(Place)},
            latents=shown(given.call.latents),
            level=lambda: float(self._adapter.noise_level(given.call).max()),
            predict=functools.partial(self._predict, given, place),
        )

    def _from(self, given: Given, latents: Tensor) -> Given:
        """The same call from other latents."""
        args, kwargs = self._adapter.with_latents(given.call, given.args, given.kwargs, latents)
        return _rebound(given, args, kwargs, latents)

    def _predict(self, given: Given, place: Place, latents: Tensor) -> Tensor:
        """x0 of other latents, with gradients, by a call on copies of what it writes."""
        self._require_gradients(given)
        latents = _like(latents, given.call.latents, "predict() was given")
        look = self._from(_on_copies(given, self._adapter.scratch(given.call)), latents)
        counters = Counters(given.module)
        try:
            with torch.enable_grad(), scoped(self._pruner.tap(look.call, place), replayer=self._pruner.proof):
                output = replayed(self._adapter, look.module, look.args, look.kwargs)
                x0 = prediction_of(self._adapter, look.call, output)
        except BaseException:
            counters.put_back()
            raise
        finally:
            self._pruner.drop_hidden()
        require_repeated(given.module, counters)
        return x0

    def _require_gradients(self, given: Given) -> None:
        """Raise UnsupportedPolicyError where no gradient can come back from a call."""
        compiled = compiled_part(given.module)
        if torch.is_inference_mode_enabled():
            reason = "the sampler runs in torch.inference_mode(), which keeps no gradients: use torch.no_grad() there"
        elif compiled:
            reason = f"{compiled} is compiled, and its graph has no gradients: run it as it is"
        elif type(self._failures.ranks) is not Alone:
            reason = "several ranks make this video, and gradients do not pass between them: use one"
        elif any(parameter.is_inference() for parameter in getattr(given.module, "parameters", tuple)()):
            reason = "the model was made in torch.inference_mode(), and its weights keep no gradients: load it outside"
        else:
            return
        raise UnsupportedPolicyError(f"{REFUSED}{reason}")


def _on_copies(given: Given, scratch: Mapping[str, Any]) -> Given:
    """The same call on the stand-ins for some of its arguments."""
    known = given.call.arguments
    swap = {id(known[name]): stand_in for name, stand_in in scratch.items()}
    every = (*given.args, *given.kwargs.values())
    if not swap.keys() <= {id(argument) for argument in every}:
        raise UnsupportedPolicyError(
            f"{REFUSED}its caches are no arguments of the call, which so would write them.\n"
            "Leave policies that guide out."
        )
    args = tuple(swap.get(id(argument), argument) for argument in given.args)
    kwargs = {name: swap.get(id(argument), argument) for name, argument in given.kwargs.items()}
    return _rebound(given, args, kwargs, given.call.latents)


def _rebound(given: Given, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor) -> Given:
    call = dataclasses.replace(given.call, latents=latents, arguments=bind(given.module, args, kwargs))
    return dataclasses.replace(given, call=call, args=args, kwargs=kwargs)


def _like(latents: Tensor, own: Tensor, what: str) -> Tensor:
    """Latents in the type of the call's own.

    Raises:
        PolicyError: they have another shape.
    """
    if not isinstance(latents, Tensor) or latents.shape != own.shape:
        kind = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise PolicyError(f"{what} {kind} for latents of {tuple(own.shape)}; give latents of the same shape")
    return latents.to(own.dtype)
