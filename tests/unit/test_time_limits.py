"""A time limit made of a signal raises an Exception where it finds us: it is the user's, and nobody may swallow it."""

import functools
import signal
import warnings

import pytest
import tiny_reference as tiny
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.errors import ReportError, of_a_signal
from tokentrim_hooks.report.files import told
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: (1,)})


def over(*_):
    raise TimeoutError("time is over")


class Limit:
    def __call__(self, *_):
        over()

    def over(self, *_):
        over()


HANDLERS = {"function": over, "method": Limit().over, "object": Limit(), "partial": functools.partial(over, 1)}


@pytest.fixture(params=HANDLERS)
def limit(request):
    """A handler of the user's."""
    before = signal.signal(signal.SIGUSR1, HANDLERS[request.param])
    yield
    signal.signal(signal.SIGUSR1, before)


def comes():
    signal.raise_signal(signal.SIGUSR1)


class InAPolicy(ForcedPolicy):
    def judge(self, chunk, history):
        if chunk.index == 3:
            comes()
        return super().judge(chunk, history)


class InAnObserver:
    def on_chunk(self, records, latents):
        if records[0].chunk == 3:
            comes()


class InAFile:
    def on_chunk(self, records, latents):
        if records[0].chunk == 3:
            with told("the picture cannot be written"):
                comes()


WHERE = {"policy": (InAPolicy, ()), "observer": (ForcedPolicy, (InAnObserver,)), "file": (ForcedPolicy, (InAFile,))}


@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize("where", WHERE)
def test_it_ends_the_call_and_the_next_video_is_as_ever(limit, where, on_error):
    policy, observers = WHERE[where]
    pipeline, other = tiny.make(), tiny.make()
    with tokentrim.patched(other, POLICY):
        pruned = tiny.run(other)
    with tokentrim.patched(pipeline, policy({2: (1,)}), on_error=on_error, observers=[kind() for kind in observers]):
        with warnings.catch_warnings(), pytest.raises(TimeoutError, match=r"^time is over$"):
            warnings.simplefilter("error", tokentrim.TokenTrimWarning)
            tiny.run(pipeline)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert torch.equal(tiny.run(pipeline), pruned)


def test_what_a_handler_has_not_raised_is_ours(limit):
    """Also where the user's own TimeoutError is being handled meanwhile."""
    try:
        comes()
    except TimeoutError as failure:
        assert of_a_signal(failure) is failure
        try:
            raise ReportError("ours")
        except ReportError as later:
            assert of_a_signal(later) is None
    assert of_a_signal(TimeoutError("a disk's")) is None
