"""Counts behind hooks of others, in context variables, thread locals and other files: put back for a repeated call.

Each acts by it: every seventh call, or eleventh, is answered otherwise, the one that is made again among these or not.
"""

from __future__ import annotations

import array
import functools
import itertools
import queue
import weakref

import counts_elsewhere as elsewhere
import pytest
import tiny_reference as tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from counts_elsewhere import STATE, step, step_of_task, step_of_thread
from counts_put_back import same_as_looked_up
from targets import TARGETS
from torch.nn.modules.module import register_module_forward_hook

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
ACT = 7
ACTS = (7, 11, 3)
"""The second is the call that is made again first; by the third both are, and more."""
CALLS = tiny.CHUNKS * 5


class Keeper:
    n = 0

    def step(self):
        self.n += 1
        return self.n

    def watch(self):
        self.n += 1


def in_an_array():
    numbers = array.array("l", [0])

    def count():
        numbers[0] += 1
        return numbers[0]

    return count


def in_a_queue():
    numbers = queue.Queue()
    for number in range(1, 200):
        numbers.put(number)
    return lambda: numbers.get()


def in_a_default():
    def count(*, numbers=itertools.count(1)):  # noqa: B008 - the pitfall is what is tested
        return next(numbers)

    return count


KEPT = Keeper()
WEAK = weakref.ref(KEPT)


def of_another_file():
    elsewhere.STEP += 1
    return elsewhere.STEP


def in_a_list_of_another_file():
    elsewhere.NUMBERS[0] += 1
    return elsewhere.NUMBERS[0]


def in_an_object_of_another_file():
    STATE.n += 1
    return STATE.n


WAYS = {
    "object": lambda: Keeper().step,
    "task": lambda: step_of_task,
    "thread": lambda: step_of_thread,
    "imported function": lambda: step,
    "function of another file": lambda: lambda: elsewhere.step(),
    "method of another file": lambda: lambda: elsewhere.step_of_state(),
    "global of another file": lambda: of_another_file,
    "list of another file": lambda: in_a_list_of_another_file,
    "object of another file": lambda: in_an_object_of_another_file,
    "array": in_an_array,
    "queue": in_a_queue,
    "weak reference": lambda: lambda: WEAK().step(),
    "default": in_a_default,
    "partial": lambda: functools.partial(next, itertools.count(1)),
}


def start():
    elsewhere.STEP = elsewhere.NUMBERS[0] = STATE.n = elsewhere.LOCAL.n = KEPT.n = 0
    elsewhere.VARIABLE.set(0)


@pytest.fixture(autouse=True)
def from_the_start():
    start()


def changed(output):
    return tuple(part * 1.05 if torch.is_tensor(part) else part for part in output)


def behind(denoiser, count):
    denoiser.register_forward_hook(lambda module, args, output: None if count() % ACT else changed(output))


def in_front(denoiser, count):
    def hook(module, args, kwargs):
        name = "noisy_image_or_video"
        return (args, kwargs) if count() % ACT else (args, {**kwargs, name: kwargs[name] * 1.05})

    denoiser.register_forward_pre_hook(hook, with_kwargs=True)


def of_an_object(denoiser, count):
    class Hook:
        def __call__(self, module, args, output):
            return output if count() % ACT else changed(output)

    denoiser.register_forward_hook(Hook())


def of_a_part(denoiser, count):
    part = denoiser.model.blocks[-1].self_attn
    part.register_forward_hook(lambda module, args, output: output if count() % ACT else output * 1.05)


def writing(denoiser, count):
    def hook(module, args, output):
        if not count() % ACT:
            output.mul_(1.05)

    denoiser.model.blocks[-1].register_forward_hook(hook)


def by_a_helper(denoiser, count):
    def times(tensor):
        tensor[:, 0] = 1

    def hook(module, args, output):
        if not count() % ACT:
            times(output)

    denoiser.model.blocks[-1].register_forward_hook(hook)


def instead(denoiser, count):
    forward = denoiser.forward

    def replaced(*args, **kwargs):
        output = forward(*args, **kwargs)
        return output if count() % ACT else changed(output)

    denoiser.forward = replaced


def of_accelerate(denoiser, count):
    class Hook(ModelHook):
        def post_forward(self, module, output):
            return output if count() % ACT else output * 1.05

    add_hook_to_module(denoiser.model.blocks[-1], Hook())


PLACES = (behind, in_front, of_an_object, of_a_part, writing, by_a_helper, of_accelerate, instead)


def right_video(place, kind, act):
    """With a count that is put back; the count then stands where the sampler's calls have brought it."""
    global ACT
    before, ACT = ACT, act
    try:
        count = WAYS[kind]()
        same_as_looked_up(place, count)
        assert count() == 1 + CALLS
    finally:
        ACT = before


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", WAYS)
def test_a_count_of_any_kind_behind_a_hook(kind, act):
    right_video(PLACES[list(WAYS).index(kind) % (len(PLACES) - 1)], kind, act)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", WAYS)
def test_a_count_of_any_kind_behind_a_replaced_forward(kind, act):
    right_video(instead, kind, act)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("kind", ("object", "task"))
def test_a_count_behind_a_hook_at_any_place(place, kind, act):
    right_video(place, kind, act)


@pytest.mark.parametrize("act", ACTS)
def test_a_hook_of_all_modules(act):
    def of_all(denoiser, count):
        handles.append(
            register_module_forward_hook(
                lambda module, args, output: changed(output) if module is denoiser and not count() % act else None
            )
        )

    handles = []
    try:
        same_as_looked_up(of_all, Keeper().step)
    finally:
        for handle in handles:
            handle.remove()


def test_a_method_that_forward_calls():
    """It counts in a global of its own; the forward that calls it is nobody's replacement."""

    def calling(denoiser, count):
        block = denoiser.model.blocks[-1]
        kind = type(block)

        class Counting(kind):
            def forward(self, *args, **kwargs):
                return self.answer(kind.forward(self, *args, **kwargs))

            def answer(self, output):
                return output if count() % ACT else output * 1.05

        block.__class__ = Counting

    same_as_looked_up(calling, lambda: step())
    assert step() == 1 + CALLS


# ----------------------------------------------------------------------------------------------- those that watch


def watchers():
    """Hooks that count or keep what they see, and change nothing, by kind."""
    keeper, log, table = Keeper(), [], {"calls": 0}

    def by_return(module, args, output):
        keeper.step()
        return output

    def by_number(*_):
        keeper.n += 1

    def by_item(module, args, output):
        table["calls"] += 1
        table["mean"] = float(sum(part.mean() for part in output if torch.is_tensor(part)))

    def by_raise(*_):
        log.append(1)
        if len(log) > 10_000:
            raise KeyboardInterrupt

    return {
        "return": by_return,
        "number": by_number,
        "item": by_item,
        "raise": by_raise,
        "log": lambda *_: log.append(1),
        "print": lambda *_: print(end=""),
        "helper": lambda *_: by_number(),
        "method": lambda *_: keeper.watch(),
    }


@pytest.mark.parametrize("kind", watchers())
@pytest.mark.parametrize("target", TARGETS[:2], ids=lambda target: target.name)
def test_a_hook_that_only_watches_may_count(target, kind):
    plain, pipeline = target.make(), target.make()
    with tokentrim.patched(plain, POLICY):
        right = target.run(plain)
    target.denoiser(pipeline).register_forward_hook(watchers()[kind])
    with tokentrim.patched(pipeline, POLICY) as handle:
        assert torch.equal(target.run(pipeline), right)
    assert handle.report.triggers == 1
