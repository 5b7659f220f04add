"""A second thread on a pipeline that cannot tell two videos apart is refused, and the first one's goes on as it was.

By then the second has called what a pipeline calls before its transformer, to which adapters listen.
"""

import copy
import threading

import pytest
from interruptions import POLICY
from targets import TARGETS

import tokentrim_hooks as tokentrim

LISTENS = [target for target in TARGETS if target.name in ("skyreels-v2", "ltx-long")]


def at_call(target, pipeline, number, act):
    """Have ``act`` done in the first block of call ``number``, in the middle of the transformer."""
    transformer, calls = target.denoiser(pipeline), []
    blocks = getattr(transformer, "blocks", None) or transformer.transformer_blocks

    def hook(*_):
        calls.append(1)
        if len(calls) == number:
            act()

    blocks[0].register_forward_pre_hook(hook)


def in_a_thread(job):
    """What it raised, or None."""
    raised = []

    def run():
        try:
            job()
        except Exception as failure:
            raised.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.parametrize("number", [2, 7])
@pytest.mark.parametrize("target", LISTENS, ids=lambda target: target.name)
def test_the_first_video_is_as_if_nobody_had_come(target, number):
    alone, pipeline, seen = target.make(), target.make(), []
    with tokentrim.patched(alone, POLICY) as handle:
        right, records = target.run(alone), len(handle.report)
    at_call(target, pipeline, number, lambda: seen.append(in_a_thread(lambda: target.run(pipeline))))
    with tokentrim.patched(pipeline, POLICY) as handle:
        video = target.run(pipeline)
    assert isinstance(seen[0], tokentrim.SessionError)
    assert handle.report.triggers == 1 and len(handle.report) == records
    assert video.equal(right)


@pytest.mark.parametrize("target", LISTENS, ids=lambda target: target.name)
def test_a_shallow_copy_that_fails_early_moves_nothing(target):
    """It has the methods that are listened to, and no video of this pipeline's."""
    alone, pipeline, seen = target.make(), target.make(), []
    with tokentrim.patched(alone, POLICY):
        right = target.run(alone)

    def preview():
        other = copy.copy(pipeline)
        other.transformer, other.scheduler = target.make().transformer, copy.deepcopy(pipeline.scheduler)
        seen.append(target.run(other))

    at_call(target, pipeline, 7, preview)
    with tokentrim.patched(pipeline, POLICY) as handle:
        video = target.run(pipeline)
    assert seen[0].equal(target.run(target.make())) and handle.report.triggers == 1
    assert video.equal(right)
