"""Patches a MODEL while it samples, and at no other time: clones share the weights, so a patch that stayed would leak.

ComfyUI calls wrappers that a clone carries: ``OUTER_SAMPLE`` around a whole sampling, ``SAMPLER_SAMPLE`` around the
sampler's loop, when the weights are loaded. An interrupt, which is no Exception, ends both.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Policy, Report

from .adapter import ComfyAR

KEY = "tokentrim"
OUTER, LOOP = "outer_sample", "sampler_sample"
"""``comfy.patcher_extension.WrappersMP``, by its values: it is no dependency of ours."""
KEPT = 16
"""Reports of samplings at most, the latest ones."""


@dataclasses.dataclass
class Sampling:
    """What a MODEL carries: policies in order, the probe, and reports of its samplings with what came of each."""

    policies: tuple[Policy, ...]
    probe: Literal["first-step", "candidate"] = "first-step"
    reports: list[tuple[Callable[[], Tensor | None], Report]] = dataclasses.field(default_factory=list)

    def outer(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole sampling: remember whose report its latents have."""
        before = len(self.reports)
        latents = executor(*args, **kwargs)
        if len(self.reports) > before:
            self.reports[-1] = (weakref.ref(latents), self.reports[-1][1])
            del self.reports[:-KEPT]
        return latents

    def loop(self, executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the sampler's loop: the patch is on for as long as it runs."""
        with tokentrim.patched(guider.model_patcher, self.policies, adapter=ComfyAR, probe=self.probe) as handle:
            latents = executor(guider, *args, **kwargs)
            self.reports.append((_nothing, handle.report))
        return latents

    def report_of(self, latents: Tensor) -> Report:
        """The report of the sampling that ``latents`` came of; of the latest one where none is known to have.

        Raises:
            ValueError: nothing was sampled yet.
        """
        if not self.reports:
            raise ValueError("this MODEL was not sampled yet.\nGive the report the latents of a sampler that uses it.")
        own = [report for made, report in self.reports if tokentrim.shares_storage(made(), latents)]
        return own[-1] if own else self.reports[-1][1]


def _nothing() -> None:
    """Latents that are gone."""


def sampling_of(model: Any) -> Sampling | None:
    """What a MODEL carries of ours; None if nothing."""
    found = model.get_attachment(KEY)
    return found if isinstance(found, Sampling) else None


def applied(model: Any, policy: Policy, probe: Literal["first-step", "candidate"]) -> Any:
    """A clone of a MODEL that is patched whenever it samples; what an earlier node applied comes before ``policy``.

    Raises:
        TokenTrimError: it is no AR model, or the policies do not suit it. ValueError: two of them judge.
    """
    earlier = sampling_of(model)
    sampling = Sampling((*(earlier.policies if earlier else ()), policy), probe)
    with tokentrim.patched(model, sampling.policies, adapter=ComfyAR, probe=probe):
        pass  # only to say now what would be refused later
    clone = model.clone()
    for kind, wrapper in ((OUTER, sampling.outer), (LOOP, sampling.loop)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.set_attachments(KEY, sampling)
    return clone
