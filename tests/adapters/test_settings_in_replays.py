"""A fused layer, or another backend, that comes amid a repeated call is refused as the setting that it is: no count."""

import pytest
from targets import TARGETS

import tokentrim_hooks as tokentrim
from tokentrim_hooks.pruning.call_scope import current_scope
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})


def fuse(denoiser):
    denoiser.fuse_qkv_projections()


def switch_the_backend(denoiser):
    denoiser.set_attention_backend("_native_math")


def is_replay():
    scope = current_scope()
    return scope is not None and scope.replayer is not None


@pytest.mark.parametrize("switch", (fuse, switch_the_backend), ids=lambda switch: switch.__name__)
@pytest.mark.parametrize("turn", (0, 1), ids=("proof", "replay"))
def test_what_is_switched_inside_a_replay_is_called_a_setting(switch, turn):
    target = next(target for target in TARGETS if target.name == "helios")
    pipeline, calls = target.make(), []
    with tokentrim.patched(pipeline, POLICY):
        target.denoiser(pipeline).register_forward_pre_hook(lambda *_: calls.append(is_replay()))
        target.run(pipeline)
    repeated = [number for number, replays in enumerate(calls) if replays][turn]
    pipeline, seen = target.make(), []

    def hook(denoiser, _):
        seen.append(1)
        if len(seen) - 1 == repeated:
            switch(denoiser)

    refusal = pytest.raises(tokentrim.UnsupportedContextError, match=r"a setting \(.*\) is another one")
    with tokentrim.patched(pipeline, POLICY), refusal:
        target.denoiser(pipeline).register_forward_pre_hook(hook)
        target.run(pipeline)
