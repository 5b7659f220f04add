"""A replay of a real model makes nothing twice that does not depend on its context and that the sampler hands in."""

from __future__ import annotations

import pytest
from test_self_forcing_interrupted import SETUP, run
from tiny_self_forcing import few_step_pipeline, self_forcing

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

pytestmark = pytest.mark.upstream


def projections(policy):
    """Calls of each projection of the text in a video under a policy, behind a first one; triggers of that video."""
    with self_forcing() as repository:
        pipeline = few_step_pipeline(repository, SETUP)
        with tokentrim.patched(pipeline, policy) as handle:
            run(pipeline)
            before, made = handle.report.triggers, []
            for name, module in pipeline.generator.named_modules():
                if name.endswith(("cross_attn.k", "cross_attn.v", "self_attn.k")):
                    module.register_forward_hook(lambda *_, name=name: made.append(name.rpartition("blocks")[2]))
            run(pipeline)
            kinds = [[name for name in made if part in name] for part in ("cross", "self")]
            return kinds, handle.report.triggers - before


def test_the_text_s_keys_and_values_are_read_again_and_not_made_again():
    (text, own), none = projections(tokentrim.ObservePolicy())
    (text_again, own_again), triggers = projections(ForcedPolicy({2: 0.1}))
    assert (none, triggers) == (0, 1) and len(own_again) > len(own), "the replay is a call of its own"
    assert text_again == text and text, "but the sampler's cross-attention cache is what it was"
