"""A pipeline that hands the calls of its transformer to other threads, and waits for them, is pruned as it was."""

import asyncio
import concurrent.futures as futures
import queue
import threading
import warnings

import pytest
import tiny_reference
import torch
from interruptions import POLICY
from targets import TARGETS

import tokentrim_hooks as tokentrim

IN_SEQUENCE = [target for target in TARGETS if target.name in ("skyreels-v2", "ltx-long", "framepack")]


def in_a_pool(threads):
    """The next call goes to the next thread."""
    pools = [futures.ThreadPoolExecutor(1) for _ in range(threads)]

    def way(job, *given):
        pools.append(pools.pop(0))
        return pools[0].submit(job, *given).result()

    return way


def in_a_new_thread(job, *given):
    done = []
    thread = threading.Thread(target=lambda: done.append(job(*given)))
    thread.start()
    thread.join()
    return done[0]


def by_await(job, *given):
    return asyncio.run(asyncio.to_thread(job, *given))


def on_a_loop(job, *given):
    async def work():
        return await asyncio.get_running_loop().run_in_executor(None, job, *given)

    return asyncio.run(work())


def noticed_late(job, *given):
    """Nobody waits in ``Future.result`` of the call itself."""
    with futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(job, *given)
        futures.wait([done])
        return done.result()


WAYS = {"pool": in_a_pool(1), "pools": in_a_pool(3), "thread": in_a_new_thread, "await": by_await, "loop": on_a_loop}


def hand_over(denoiser, way):
    """Have the sampler's calls made elsewhere; what is called there stays there."""
    kind = type(denoiser)

    def called_elsewhere(self, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return kind.__call__(self, *args, **kwargs)
        return way(lambda: kind.__call__(self, *args, **kwargs))

    denoiser.__class__ = type(kind.__name__, (kind,), {"__call__": called_elsewhere, "__module__": kind.__module__})


@pytest.fixture(params=IN_SEQUENCE, ids=lambda target: target.name, scope="module")
def known(request):
    """A model, its video when it is pruned, and how many chunks that has."""
    pipeline = request.param.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        return request.param, request.param.run(pipeline), len(handle.report)


@pytest.mark.parametrize("way", WAYS)
def test_the_video_is_pruned_as_it_was(known, way):
    target, right, chunks = known
    if target.name == "skyreels-v2" and way not in ("pools", "await"):
        pytest.skip("it listens as LTX does, and its videos take longer")
    pipeline = target.make()
    hand_over(target.denoiser(pipeline), WAYS[way])
    with tokentrim.patched(pipeline, POLICY) as handle:
        assert target.run(pipeline).equal(right) and target.run(pipeline).equal(right)
    assert (handle.report.triggers, len(handle.report)) == (2, 2 * chunks)


def test_a_call_that_nobody_waits_for_by_name_is_the_videos_that_made_the_function(known):
    target, right, _ = known
    pipeline = target.make()
    hand_over(target.denoiser(pipeline), noticed_late)
    with tokentrim.patched(pipeline, POLICY) as handle:
        assert target.run(pipeline).equal(right) and handle.report.triggers == 1


def test_a_video_made_whole_in_a_thread_that_another_ones_hook_waits_for_is_its_own():
    """It is no part of the first one, which goes on: the pipeline's own method began it."""
    target = next(target for target in TARGETS if target.name == "skyreels-v2")
    pipeline, seen, calls = target.make(), [], []

    def hook(*_):
        calls.append(1)
        if len(calls) == 7:
            try:
                in_a_pool(1)(target.run, pipeline)
            except tokentrim.SessionError as refusal:
                seen.append(refusal)

    pipeline.transformer.blocks[0].register_forward_pre_hook(hook)
    with tokentrim.patched(pipeline, POLICY) as handle:
        target.run(pipeline)
    assert seen and handle.report.triggers == 1


@pytest.mark.parametrize("way", ["pool", "thread"])
def test_another_pipeline_that_hands_its_calls_over_is_not_pruned(way):
    """It shares the denoiser with a patched one."""
    pipeline = tiny_reference.make()
    other = type(pipeline)(pipeline.generator)
    plain = tiny_reference.run(other)
    hand_over(pipeline.generator, WAYS[way])
    with tokentrim.patched(pipeline, POLICY) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore", tokentrim.TokenTrimWarning)
        assert tiny_reference.run(other).equal(plain) and not len(handle.report)
        assert not tiny_reference.run(pipeline).equal(plain) and handle.report.triggers == 1


@pytest.mark.filterwarnings("ignore:tokentrim was patched in")
def test_another_pipelines_call_of_a_denoiser_with_a_call_of_its_own_is_not_pruned():
    """A class that overrides ``__call__``: its frame was taken for the patched pipeline, which has the denoiser."""
    pipeline = tiny_reference.make()
    other = type(pipeline)(pipeline.generator)
    plain = tiny_reference.run(other)
    hand_over(pipeline.generator, lambda job: job())
    with tokentrim.patched(pipeline, POLICY) as handle:
        assert tiny_reference.run(other).equal(plain) and not len(handle.report)


class Handed(torch.nn.Module):
    """What a pipeline calls as its transformer: threads work off a queue, and it waits in another one."""

    def __init__(self, denoiser, threads):
        super().__init__()
        self.jobs, self.done, self.calls = [queue.Queue() for _ in range(threads)], queue.Queue(), 0
        self.__dict__["real"] = denoiser
        for jobs in self.jobs:
            threading.Thread(target=_work_off, args=(denoiser, jobs, self.done), daemon=True).start()

    def __getattr__(self, name):
        return getattr(self.__dict__["real"], name)

    def __call__(self, *args, **kwargs):
        self.__dict__["calls"] += 1
        self.__dict__["jobs"][self.calls % len(self.__dict__["jobs"])].put((args, kwargs))
        found = self.__dict__["done"].get(timeout=60)
        if isinstance(found, Exception):
            raise found
        return found


def _work_off(denoiser, jobs, done):
    while True:
        args, kwargs = jobs.get()
        try:
            done.put(denoiser(*args, **kwargs))
        except Exception as failure:
            done.put(failure)


def run_by_queues(target, pipeline, threads):
    """The video; calls of the patched transformer by way of queues."""
    pipeline.__dict__["transformer"] = Handed(pipeline.transformer, threads)
    return target.run(pipeline)


@pytest.mark.filterwarnings("ignore:tokentrim was patched in", "ignore:the model's transformer")
def test_threads_that_work_for_nobody_known_are_told():
    target = next(target for target in TARGETS if target.name == "ltx-long")
    pipeline = target.make()
    handle = tokentrim.patch(pipeline, POLICY)
    with pytest.warns(tokentrim.TokenTrimWarning, match="in another thread than"):
        run_by_queues(target, pipeline, 1)
    assert not len(handle.report)


def test_framepacks_transformer_alone_in_several_threads_is_refused():
    """Nothing tells that they make one video; it was pruned as several, in silence."""
    target = next(target for target in TARGETS if target.name == "framepack")
    pipeline = target.make()
    tokentrim.patch(pipeline.transformer, POLICY)
    with pytest.raises(tokentrim.SessionError, match="several threads"):
        run_by_queues(target, pipeline, 2)
