"""Videos that are made at the same time on one model: each as if it were alone, or a refusal, and nobody else's."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import framepack_tiny
import helios_tiny
import ltx_tiny
import pytest
import skyreels_tiny
import tiny_reference
import torch
from own_loop import STEPS, _cache, _call, _noised, calls, in_turns, last, remade, same
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
DIFFUSERS = TARGETS[1:]
each_pipeline = pytest.mark.parametrize("target", DIFFUSERS, ids=lambda target: target.name)


def told(report, video):
    """What happened in a video, chunk by chunk."""
    return [(r.chunk, r.start, r.severity, r.pruned, r.dead) for r in report if r.video == video]


def alone(seed, **how):
    """A pruned video made alone, and the records of it."""
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        video = last(calls(pipeline, seed, **how))
    assert handle.report.triggers == 1
    return video, told(handle.report, 0)


@pytest.mark.parametrize("every", (1, 5, 3), ids=("call by call", "chunk by chunk", "out of step"))
@pytest.mark.parametrize("noise", (None, 7), ids=("other noise", "the same noise"))
@pytest.mark.parametrize("handed", (same, remade), ids=("kept", "containers remade"))
def test_two_videos_in_turns(every, noise, handed):
    right = [alone(seed, noise_seed=noise) for seed in (1, 2)]
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        made = in_turns(*(calls(pipeline, s, noise_seed=noise, handed=handed) for s in (1, 2)), every=every)
    for number, (video, records) in enumerate(right):
        assert torch.equal(made[number], video)
        assert told(handle.report, number) == records


def test_several_videos_in_turns_are_not_taken_for_runs_of_one_chunk():
    """A server's first round has first chunks only, which nobody can judge; a warning would be an error here."""
    video, records = alone(1)
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        made = in_turns(*(calls(pipeline, seed) for seed in (2, 3, 4, 1)), every=5)
    assert torch.equal(made[-1], video) and told(handle.report, 3) == records


@pytest.mark.parametrize("persist", (True, False))
def test_two_guided_videos_in_turns(persist):
    """Guidance has two caches: one session; two guided videos have four caches and two sessions."""
    policy = ForcedPolicy({2: [0, 3]}, persist=persist)
    right = []
    for seed in (1, 2):
        pipeline = tiny_reference.make()
        with tokentrim.patched(pipeline, policy) as handle:
            right.append(last(calls(pipeline, seed, guidance=1.5)))
        assert {r.video for r in handle.report} == {0} and handle.report.triggers == 1
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, policy) as handle:
        made = in_turns(*(calls(pipeline, seed, guidance=1.5) for seed in (1, 2)), every=2)
    assert all(torch.equal(a, b) for a, b in zip(made, right, strict=True))
    assert sorted({(r.video, r.chunk) for r in handle.report if r.pruned}) == [(0, 2), (1, 2)]


def test_a_video_that_begins_leaves_the_marks_of_another_alone():
    right, _ = alone(1)
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY):
        first, second = calls(pipeline, 1), calls(pipeline, 2)
        for _ in range(16):
            next(first)  # into chunk 3: chunk 2 has been pruned
        next(second)
        assert torch.equal(last(first), right)


def test_a_cache_that_moves_in_memory_is_the_same_video():
    right, records = alone(1)
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        assert torch.equal(last(calls(pipeline, 1, moved=True)), right)
    assert told(handle.report, 0) == records and {r.video for r in handle.report} == {0}


def test_a_video_goes_on_with_a_copy_of_its_cache():
    """What it left is kept by somebody, with the marks that were in it: none is left behind."""
    right, records = alone(1)
    pipeline, seen = tiny_reference.make(), {}

    def note(cache):
        seen[id(cache[0]["v"])] = cache[0]["v"]
        return cache

    with tokentrim.patched(pipeline, POLICY) as handle:
        assert torch.equal(last(calls(pipeline, 1, copied=2, handed=note)), right)
    assert told(handle.report, 0) == records and {r.video for r in handle.report} == {0}
    assert len(seen) == 2 and all(bool(values.isfinite().all()) for values in seen.values())


def chunk_of(pipeline, cache, chunk):
    """A chunk whose noise is its number's; yields it behind each of its calls."""
    noise, frames = torch.Generator().manual_seed(chunk), pipeline.num_frame_per_block
    x = torch.randn(1, frames, 3, 8, 8, generator=noise)
    for step, following in zip((*STEPS, 0), (*STEPS[1:], None, None), strict=True):
        answer = _call(pipeline, x, step, cache, chunk * frames, 0)
        x0 = answer if step else x
        x = x0 if following is None else _noised(pipeline, x0, following, noise)
        yield x0


@pytest.mark.parametrize("every", (1, len(STEPS) + 1), ids=("call by call", "one behind the other"))
@pytest.mark.parametrize("turned", (False, True), ids=("the copy first", "the copy last"))
def test_a_video_that_is_forked_is_pruned_on_both_ways(turned, every):
    """The dead rows of either cache stay dead, and no mark is left in one."""
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY):
        cache = _cache(pipeline, torch.zeros(1))
        right = [last(chunk_of(pipeline, cache, chunk)) for chunk in range(5)]
    with tokentrim.patched(pipeline, POLICY) as handle:
        cache = _cache(pipeline, torch.zeros(1))
        for chunk in range(4):
            assert torch.equal(last(chunk_of(pipeline, cache, chunk)), right[chunk])
        both = [copy.deepcopy(cache), cache]
        ways = [chunk_of(pipeline, each, 4) for each in (reversed(both) if turned else both)]
        assert all(torch.equal(video, right[4]) for video in in_turns(*ways, every=every))
    assert handle.report.triggers == 1
    assert all(bool(layer["v"].isfinite().all()) for each in both for layer in each)


def test_every_call_in_a_thread_of_its_own():
    """A server that hands its work to a pool: the thread says nothing of the video."""
    right, records = alone(1)
    pipeline = tiny_reference.make()
    video = calls(pipeline, 1)
    with tokentrim.patched(pipeline, POLICY) as handle, ThreadPoolExecutor(3) as pool:
        while (latest := pool.submit(next, video, None).result()) is not None:
            made = latest
    assert torch.equal(made, right) and told(handle.report, 0) == records


def test_two_tasks_of_asyncio():
    right = [alone(seed)[0] for seed in (1, 2)]
    pipeline = tiny_reference.make()

    async def make(seed):
        for video in calls(pipeline, seed):  # noqa: B007
            await asyncio.sleep(0)
        return video

    async def both():
        return await asyncio.gather(make(1), make(2))

    with tokentrim.patched(pipeline, POLICY):
        made = asyncio.run(both())
    assert all(torch.equal(a, b) for a, b in zip(made, right, strict=True))


@pytest.mark.parametrize("calls_before", (1, 2, 3), ids=str)
def test_a_run_broken_off_between_calls_of_its_first_chunk(calls_before):
    """Ctrl-C outside of any call, then the same seed with a new cache: no branch of the old video."""
    right, records = alone(1)
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        broken = calls(pipeline, 1)
        for _ in range(calls_before):
            next(broken)
        assert torch.equal(last(calls(pipeline, 1)), right)
    assert [chunk for chunk in told(handle.report, 1) if chunk[0]] == records[1:]


# ---------------------------------------------------------------------------------------------- pipelines and threads


def in_threads(*jobs):
    """What each job returned or raised, all at the same time."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(job) for job in jobs]
        return [job.exception() or job.result() for job in running]


def slowly(denoiser):
    """Give other threads their turn inside every block."""
    for module in denoiser.modules():
        if type(module).__name__.lower().endswith("block"):
            module.register_forward_pre_hook(lambda *_: time.sleep(0.002))


def sharing(pipeline):
    """A second pipeline over the same components, but with its own scheduler, which no two threads can share."""
    components = dict(pipeline.components)
    components["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    other = type(pipeline)(**components)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture(scope="module")
def known():
    """Per target: the unpatched video and the pruned one."""
    found = {}
    for target in DIFFUSERS:
        plain = target.run(target.make())
        pipeline = target.make()
        with tokentrim.patched(pipeline, POLICY):
            found[target.name] = plain, target.run(pipeline)
        assert not torch.equal(*found[target.name])
    return found


@each_pipeline
def test_a_pipeline_that_shares_components_is_not_pruned(target, known):
    plain, pruned = known[target.name]
    pipeline = target.make()
    other = sharing(pipeline)
    with tokentrim.patched(pipeline, POLICY) as handle:
        assert not tokentrim.is_patched(other) and tokentrim.is_patched(pipeline)
        assert torch.equal(target.run(other), plain)
        assert not len(handle.report)
        assert torch.equal(target.run(pipeline), pruned)
        assert torch.equal(target.run(other), plain)
    assert {record.video for record in handle.report} == {0}


@each_pipeline
def test_two_threads_one_transformer_one_of_two_pipelines_patched(target, known):
    plain, pruned = known[target.name]
    pipeline = target.make()
    other = sharing(pipeline)
    slowly(target.denoiser(pipeline))
    with tokentrim.patched(pipeline, POLICY):
        ours, theirs = in_threads(lambda: target.run(pipeline), lambda: target.run(other))
    assert torch.equal(ours, pruned) and torch.equal(theirs, plain)


@each_pipeline
def test_two_threads_two_patched_models(target, known):
    pipelines = target.make(), target.make()
    handles = [tokentrim.patch(pipeline, POLICY) for pipeline in pipelines]
    for made in in_threads(*(lambda p=p: target.run(p) for p in pipelines)):
        assert torch.equal(made, known[target.name][1])
    for handle in handles:
        handle.unpatch()
        assert [(r.video, r.chunk) for r in handle.report if r.pruned] == [(0, 2)]


@pytest.mark.parametrize("tiny", (framepack_tiny, helios_tiny), ids=("framepack", "helios"))
def test_two_threads_on_a_patched_transformer(tiny):
    """Where the transformer itself was patched every pipeline over it is, each with a session of its own."""
    right = tiny.pipeline()
    with tokentrim.patched(right.transformer, POLICY):
        wanted = tiny.run(right)
    pipeline = tiny.pipeline()
    other = sharing(pipeline)
    slowly(pipeline.transformer)
    with tokentrim.patched(pipeline.transformer, POLICY) as handle:
        made = in_threads(lambda: tiny.run(pipeline), lambda: tiny.run(other))
    assert all(torch.equal(video, wanted) for video in made)
    assert sorted((r.video, r.chunk) for r in handle.report if r.pruned) == [(0, 2), (1, 2)]


@each_target
def test_thread_after_thread(target):
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY):
        first = target.run(pipeline)
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        made = [in_threads(lambda: target.run(pipeline))[0] for _ in range(2)]
    assert all(torch.equal(video, first) for video in made)
    assert [(r.video, r.chunk) for r in handle.report if r.pruned] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("tiny", (skyreels_tiny, ltx_tiny), ids=("skyreels-v2", "ltx-long"))
def test_one_pipeline_in_two_threads_is_refused_in_words(tiny):
    """Its own state is one video's, so nobody could tell; the first video goes on."""
    pipeline = tiny.pipeline()
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(20)

    with tokentrim.patched(pipeline, POLICY):
        hook = pipeline.transformer.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(tiny.run, pipeline)
            inside.wait(20)
            hook.remove()
            with pytest.raises(tokentrim.SessionError, match="two threads or tasks"):
                tiny.run(pipeline)
            go_on.set()
            first.exception()


@pytest.mark.parametrize("sampling", ("vanilla", "inverted_anti_drifting"))
def test_an_image_embedding_kept_for_two_videos(sampling):
    right = framepack_tiny.pipeline()
    with tokentrim.patched(right, POLICY) as handle:
        wanted = framepack_tiny.run(right, sampling=sampling, seed=6)
    pipeline = framepack_tiny.pipeline()
    kept = pipeline.encode_image([None])
    pipeline.encode_image = lambda *_, **__: kept
    with tokentrim.patched(pipeline, POLICY) as again:
        framepack_tiny.run(pipeline, sampling=sampling, seed=5)
        assert torch.equal(framepack_tiny.run(pipeline, sampling=sampling, seed=6), wanted)
    assert told(again.report, 1) == told(handle.report, 0)


REMADE = (
    (framepack_tiny, "image_embeds"),
    (framepack_tiny, "indices_latents"),
    (helios_tiny, "indices_hidden_states"),
    (helios_tiny, "latents_history_mid"),
)


def outside(pipeline, change):
    """Have calls of the transformer made through ``change(arguments)``, in front of every hook."""
    kind = type(pipeline.transformer)
    call = {"__call__": lambda self, **arguments: kind.__call__(self, **change(arguments))}
    pipeline.transformer.__class__ = type("Changed", (kind,), call)
    return pipeline


@pytest.mark.parametrize(("tiny", "name"), REMADE, ids=[name for _, name in REMADE])
def test_arguments_made_anew_at_every_call_are_refused(tiny, name):
    """By a wrapper that casts or copies: what tells videos and chunks apart is gone, and each step seemed a chunk."""
    pipeline = outside(tiny.pipeline(), lambda given: {**given, name: given[name].clone()})
    refused = pytest.raises(tokentrim.UnsupportedContextError, match="other tensors for one and the same chunk")
    with tokentrim.patched(pipeline, POLICY), refused:
        tiny.run(pipeline)


@pytest.mark.parametrize("tiny", (framepack_tiny, helios_tiny, skyreels_tiny), ids=("framepack", "helios", "skyreels"))
def test_a_text_that_videos_share_or_that_is_encoded_anew_tells_nothing(tiny):
    """Two videos of one text are two, and one whose text is another tensor at every call is one."""

    def made(pipeline, *seeds):
        with tokentrim.patched(pipeline, POLICY) as handle:
            videos = [tiny.run(pipeline, seed=seed, **text) for seed in seeds]
        return videos, [told(handle.report, number) for number, _ in enumerate(seeds)]

    given = tiny.settings()
    text = {name: given[name] for name in given if "prompt" in name and torch.is_tensor(given[name])}
    right = [made(tiny.pipeline(), seed) for seed in (5, 6)]
    videos, records = made(tiny.pipeline(), 5, 6, 5)
    assert records == [right[n][1][0] for n in (0, 1, 0)]
    assert all(torch.equal(video, right[n][0][0]) for video, n in zip(videos, (0, 1, 0), strict=True))
    name = "encoder_hidden_states"
    anew = outside(tiny.pipeline(), lambda given: {**given, name: given[name].clone()})
    videos, records = made(anew, 5)
    assert torch.equal(videos[0], right[0][0][0]) and records == right[0][1]


@pytest.mark.parametrize("sampling", ("vanilla", "inverted_anti_drifting"))
@pytest.mark.parametrize("at", (0, 1), ids=("amid the first section", "amid the second"))
def test_videos_that_share_an_embedding_and_take_turns_in_one_thread_are_refused(sampling, at):
    """The second one is made in a callback of the first, which goes on behind it. Kept apart, each is as if alone."""

    def both(pipeline):
        videos, told = [], []

        def callback(running, step, _timestep, tensors):
            told.append(step)
            if len(told) == 2 * at + 1:
                own, running.scheduler = running.scheduler, copy.deepcopy(running.scheduler)
                videos.append(framepack_tiny.run(running, sampling=sampling, seed=6))
                running.scheduler = own
            return tensors

        first = framepack_tiny.run(pipeline, sampling=sampling, seed=5, callback_on_step_end=callback)
        return [first, *videos]

    right = []
    for seed in (5, 6):
        pipeline = framepack_tiny.pipeline()
        with tokentrim.patched(pipeline, POLICY):
            right.append(framepack_tiny.run(pipeline, sampling=sampling, seed=seed))
    pipeline = framepack_tiny.pipeline()
    with tokentrim.patched(pipeline, POLICY):
        assert all(map(torch.equal, both(pipeline), right))
    kept = pipeline.encode_image([None])
    pipeline.encode_image = lambda *_, **__: kept
    refused = pytest.raises(tokentrim.SessionError, match="image_embeds take turns")
    with tokentrim.patched(pipeline, POLICY), refused:
        both(pipeline)
