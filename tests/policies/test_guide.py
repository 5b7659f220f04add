"""What a policy makes of noisy latents is what the call is made from, and a look ahead leaves the model as it was."""

import copy
import dataclasses
import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from by_hand import FRAMES, PIXELS, make, run, twin_of

import tokentrim_hooks as tokentrim
from tokentrim_hooks import FlowMo, UnsupportedPolicyError
from tokentrim_hooks.policy.controls import AlwaysPolicy

THREE = {"num_frame_per_block": 3, "local_attn_size": 9, "dtype": torch.float64}
"""In float64: Adam's first step is a sign, and where the slope is nearly 0 rounding decides it."""


def pipe(cls=None, **settings):
    """Chunks of three frames, which FlowMo needs."""
    return make(**{**THREE, **settings}) if cls is None else make(cls, **{**THREE, **settings})


def video(pipeline, seed=0, batch=2, chunks=4):
    torch.manual_seed(seed)
    noise = torch.randn(batch, chunks * 3, 3, PIXELS, PIXELS, dtype=torch.float64)
    return pipeline.inference(noise, ["a"] * batch, return_latents=True)[1]


def loss_of(seen):
    """Written out per sample and place: |difference| of neighbours, population variance, mean over channels, max."""
    total = 0
    for sample in seen:
        moves = [(b - a).abs() for a, b in itertools.pairwise(sample)]
        mean = sum(moves) / len(moves)
        variance = sum((move - mean) ** 2 for move in moves) / len(moves)
        total = total + variance.mean(0).max()
    return total


def moved_by_hand(pipeline, latents, sigma, policy):
    """The same latents by the model alone, its cache empty, by torch's own optimisers."""
    generator = copy.deepcopy(pipeline.generator)
    generator._forward_pre_hooks.clear()
    z = latents.detach().clone().requires_grad_()
    make_optimiser = torch.optim.Adam if policy.optimiser == "adam" else torch.optim.SGD
    optimiser = make_optimiser([z], lr=policy.step)
    timestep = torch.full(latents.shape[:2], round(1000 * sigma))
    for _ in range(policy.iterations):
        with torch.enable_grad():
            # The whole chunk without any cache: what a first chunk sees.
            flow, x0 = generator(z, None, timestep)
            loss = loss_of(flow if policy.of == "velocity" else x0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return z.detach()


def expected_video(policy, batch=2, steps=(0,), **settings):
    """The unpatched loop, whose first chunk's calls ``steps`` are made from moved latents."""
    pipeline, place = pipe(**settings), {"call": 0}

    def move(module, args, kwargs):
        call, place["call"] = place["call"], place["call"] + 1
        if call not in steps:
            return None
        sigma = float(kwargs["timestep"].flatten()[0]) / 1000
        latents = moved_by_hand(pipeline, kwargs["noisy_image_or_video"], sigma, policy)
        return args, {**kwargs, "noisy_image_or_video": latents}

    pipeline.generator.register_forward_pre_hook(move, with_kwargs=True)
    return video(pipeline, batch=batch)


POLICIES = [
    FlowMo(),
    FlowMo(step=0.05, of="x0"),
    FlowMo(step=0.001, iterations=3),
    FlowMo(step=2.0, optimiser="descent"),
    FlowMo(step=1.0, optimiser="descent", iterations=2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_flowmo_equals_a_calculation_by_hand(policy):
    pipeline, plain = pipe(), video(pipe())
    with tokentrim.patched(pipeline, policy) as handle:
        got = video(pipeline)
    expected = expected_video(policy)
    assert (expected - plain).abs().max() > 2e-5
    assert torch.allclose(got, expected, atol=1e-9)
    acts = [(record.chunk, *act.items()) for record in handle.report for act in record.acts]
    assert {act[0] for act in acts} == {0} and all(dict(act[1:])["hook"] == "guide" for act in acts)
    assert torch.equal(video(pipeline), plain)


def test_the_band_says_which_calls_are_guided():
    policy = FlowMo(noise_band=0.7, step=0.05)
    pipeline = pipe()
    with tokentrim.patched(pipeline, policy) as handle:
        got = video(pipeline)
    assert torch.allclose(got, expected_video(policy, steps=(0, 1)), atol=1e-9)
    assert handle.report.records[0].acts[0]["calls"] == 2
    with tokentrim.patched(pipeline, FlowMo(noise_band=1.0, step=0.05)) as handle:
        video(pipeline)
    assert handle.report.records[0].acts[0]["calls"] == 1


def test_one_step_of_adam_moves_every_element_by_the_step():
    pipeline, seen = pipe(), []

    @dataclass(frozen=True)
    class Keeps(FlowMo):
        """Keeps what it answers."""

        def guide(self, chunk):
            answer = super().guide(chunk)
            seen.extend([] if answer is None else [(answer - chunk.latents).abs()])
            return answer

    with tokentrim.patched(pipeline, Keeps()):
        video(pipeline)
    assert len(seen) == 1 and float((seen[0] - 0.005).abs().median()) < 1e-5 and float(seen[0].max()) < 0.0051


def test_each_sample_is_guided_as_if_it_were_alone():
    pipeline = pipe()
    torch.manual_seed(0)
    noise = torch.randn(2, 3, 3, PIXELS, PIXELS, dtype=torch.float64)
    with tokentrim.patched(pipeline, FlowMo(step=0.05, optimiser="descent")) as handle:
        torch.manual_seed(1)
        both = pipeline.inference(noise, ["a"] * 2, return_latents=True)[1]
        assert len(handle.report) == 2
    alone, first = pipe(), []
    alone.generator.register_forward_pre_hook(
        lambda module, args, kwargs: first.append(kwargs["noisy_image_or_video"]), with_kwargs=True
    )
    with tokentrim.patched(alone, FlowMo(step=0.05, optimiser="descent")):
        alone.inference(noise[:1], ["a"], return_latents=True)
    assert both.shape[0] == 2 and len(first) >= 2
    expected = moved_by_hand(pipe(), noise, 1.0, FlowMo(step=0.05, optimiser="descent"))
    assert torch.allclose(first[1], expected[:1], atol=1e-9)


# ------------------------------------------------------------------------------------------------- any guiding policy


@dataclass(frozen=True)
class Descends(tokentrim.Policy):
    """Moves the latents of one chunk's calls against the gradient of x0's square."""

    chunk: int = 2
    phases: tuple[str, ...] = ("first", "refine")
    step: float = 0.02

    def guide(self, chunk):
        if chunk.index != self.chunk or chunk.phase not in self.phases:
            return None
        z = chunk.latents.detach().clone()
        with torch.enable_grad():
            z.requires_grad_()
            (slope,) = torch.autograd.grad(chunk.predict(z).square().sum(), z)
        return z.detach() - self.step * slope


def descended(policy, **settings):
    """The same in an unpatched loop, the look ahead on a copy of the whole pipeline."""
    pipeline, place = pipe(**settings), {"call": -1, "busy": False}

    def move(module, args, kwargs):
        if place["busy"]:
            return None
        place["call"] += 1
        chunk, step = divmod(place["call"], 5)
        phase = "commit" if step == 4 else "refine" if step else "first"
        if chunk != policy.chunk or phase not in policy.phases:
            return None
        twin, given = copy.deepcopy((module, kwargs))
        twin._forward_pre_hooks.clear()
        z = given["noisy_image_or_video"].requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(twin(*args, **given)[1].square().sum(), z)
        return args, {**kwargs, "noisy_image_or_video": z.detach() - policy.step * slope}

    pipeline.generator.register_forward_pre_hook(move, with_kwargs=True)
    return video(pipeline, chunks=5)


@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize("phases", [("first",), ("refine",), ("first", "refine")])
def test_a_later_chunk_looks_ahead_on_its_whole_context(sink, chunk, phases):
    policy, pipeline = Descends(chunk, phases), pipe(sink_size=sink)
    with tokentrim.patched(pipeline, policy):
        got = video(pipeline, chunks=5)
    expected = descended(policy, sink_size=sink)
    plain = video(pipe(sink_size=sink), chunks=5)
    assert (expected - plain).abs().max() > 1e-5
    assert torch.allclose(got, expected, atol=1e-9)
    assert torch.equal(video(pipeline, chunks=5), plain)


def bits_of(value):
    """All tensors in a structure."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in bits_of(part)]


@dataclass(frozen=True)
class Looks(tokentrim.Policy):
    """Looks ahead before every call, and answers nothing; the caches must be, bit for bit, what they were."""

    pipeline: object = None
    looks: list = field(default_factory=list)

    def guide(self, chunk):
        caches = bits_of(self.pipeline.kv_cache1) + bits_of(self.pipeline.crossattn_cache)
        before, state = [(tensor, tensor._version, tensor.clone()) for tensor in caches], torch.get_rng_state()
        with torch.enable_grad():
            z = chunk.latents.detach().clone().requires_grad_()
            x0 = chunk.predict(z)
            assert x0.requires_grad and x0.shape == z.shape and float(torch.autograd.grad(x0.sum(), z)[0].norm()) > 0
        assert all(t._version == version and torch.equal(t, bits) for t, version, bits in before)
        assert not any(tensor.requires_grad for tensor in caches) and torch.equal(state, torch.get_rng_state())
        self.looks.append(chunk.phase)
        return None


@pytest.mark.parametrize("policies", [(), (AlwaysPolicy(warmup=1),), (tokentrim.CommitWindow(3),)], ids=str)
def test_looking_and_answering_nothing_changes_no_bit_of_video_or_cache(policies):
    pipeline, twin = pipe(sink_size=3), pipe(sink_size=3)
    looks = Looks(pipeline=pipeline)
    with tokentrim.patched(twin, list(policies) or tokentrim.ObservePolicy()):
        expected, state = video(twin, chunks=5), torch.get_rng_state()
    with tokentrim.patched(pipeline, [*policies, looks]) as handle:
        assert torch.equal(video(pipeline, chunks=5), expected) and torch.equal(torch.get_rng_state(), state)
    assert looks.looks == ["first", "refine", "refine", "refine"] * 5
    assert not any(act["hook"] == "guide" for record in handle.report for act in record.acts)


def test_a_look_ahead_sees_what_the_call_will_see():
    """Dead rows and rows that are hidden from the call are missing in the look ahead, too."""
    pipeline, looks, made = pipe(sink_size=3), [], []

    @dataclass(frozen=True)
    class Hides(tokentrim.Policy):
        """Hides the first token of the newest frame from first calls, and looks."""

        def hide(self, chunk, context):
            mask = torch.zeros(context.frames, context.tokens, dtype=torch.bool)
            mask[-1:, 0] = True
            return mask if chunk.phase == "first" else None

        def guide(self, chunk):
            looks.append(None)
            looks[-1] = chunk.predict(chunk.latents).detach()
            return None

    def keep(module, args, kwargs, output):
        if len(made) < len(looks) and looks[-1] is not None and kwargs["timestep"].any():  # no replay
            made.append(output[1])

    with tokentrim.patched(pipeline, [AlwaysPolicy(warmup=1), Hides()]):
        hook = pipeline.generator.register_forward_hook(keep, with_kwargs=True)
        video(pipeline, chunks=5)
        hook.remove()
    assert len(looks) == 20 and all(torch.allclose(*pair, atol=1e-12) for pair in zip(looks, made, strict=True))


def test_a_regenerated_chunk_starts_from_the_latents_that_were_moved():
    class Again(tokentrim.Policy):
        """Regenerates every chunk without pruning: the answer must be the same."""

        def judge(self, chunk, history):
            flags = torch.ones(2, dtype=torch.bool)
            return tokentrim.Verdict(torch.empty(2, 0, dtype=torch.long), torch.ones(2), torch.zeros(2), flags)

    one, both = pipe(), pipe()
    with tokentrim.patched(one, Descends()):
        expected = video(one)
    for probe in ("first-step", "candidate"):
        with tokentrim.patched(both, [Again(), Descends()], probe=probe) as handle:
            assert torch.allclose(video(both), expected, atol=1e-9)
            assert sum(record.regenerations for record in handle.report)


def test_policies_guide_one_after_the_other():
    @dataclass(frozen=True)
    class Both(tokentrim.Policy):
        """The two by hand: the second one sees what the first has made."""

        def guide(self, chunk):
            first = Descends(0, ("first",), 0.02).guide(chunk)
            if first is None:
                return None
            return Descends(0, ("first",), 0.05).guide(dataclasses.replace(chunk, latents=first))

    one, two = pipe(), pipe()
    with tokentrim.patched(one, [Descends(0, ("first",), 0.02), Descends(0, ("first",), 0.05)]) as handle:
        expected = video(one)
    assert [act["calls"] for act in handle.report.records[0].acts] == [2]
    with tokentrim.patched(two, Both()):
        assert torch.allclose(video(two), expected, atol=1e-9)


# ------------------------------------------------------------------------------------------------- interrupts, sessions


@dataclass(frozen=True)
class Breaks(Descends):
    """Raises in guide before, inside or behind the look ahead, once."""

    kind: type = RuntimeError
    where: str = "inside"
    state: dict = field(default_factory=lambda: {"armed": True})

    def guide(self, chunk):
        if chunk.index != self.chunk or not self.state["armed"]:
            return None
        self.state["armed"] = False
        if self.where == "before":
            raise self.kind
        if self.where == "inside":
            hook = self.state["attention"].register_forward_hook(self._raise)
            try:
                chunk.predict(chunk.latents)
            finally:
                hook.remove()
        super().guide(chunk)
        raise self.kind

    def _raise(self, *_):
        raise self.kind


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("where", ["before", "inside", "behind"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_whatever_ends_a_look_ahead_leaves_nothing(kind, where, chunk):
    pipeline, plain = pipe(), video(pipe())
    attention = pipeline.generator.model.blocks[1].self_attn
    policy = Breaks(chunk, kind=kind, where=where, state={"armed": True, "attention": attention})
    always = AlwaysPolicy(warmup=1)
    with tokentrim.patched(pipe_fresh := pipe(), always):
        fresh = video(pipe_fresh)
    with tokentrim.patched(pipeline, [always, policy, tokentrim.CommitWindow(3)]):
        with pytest.raises(kind):
            video(pipeline)
        caches = bits_of(pipeline.kv_cache1)
        assert not any(tensor.requires_grad for tensor in caches)
        assert not any(bool(torch.isneginf(layer["v"]).any()) for layer in pipeline.kv_cache1)
    with tokentrim.patched(pipeline, always):
        assert torch.equal(video(pipeline), fresh)
    assert torch.equal(video(pipeline), plain)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_the_next_video_of_the_same_patch_is_guided_as_if_nothing_had_happened(kind):
    pipeline, expected = pipe(), expected_video(FlowMo(step=0.05))
    armed = [True]

    @dataclass(frozen=True)
    class Once(FlowMo):
        """Fails once."""

        def guide(self, chunk):
            if armed and armed.pop():
                chunk.predict(chunk.latents)
                raise kind
            return super().guide(chunk)

    with tokentrim.patched(pipeline, Once(step=0.05)):
        with pytest.raises(kind):
            video(pipeline)
        assert torch.allclose(video(pipeline), expected, atol=1e-9)


def test_videos_that_alternate_are_each_guided_at_their_own_first_chunk():
    pipeline, policy = pipe(), FlowMo(step=0.05)
    expected, other = expected_video(policy), []

    def between(index, count, chunk):
        if index == 0 and not other:
            other.append(None)
            twin = twin_of(pipeline)
            state = torch.get_rng_state()
            other[0] = video(twin)
            torch.set_rng_state(state)

    with tokentrim.patched(pipeline.generator, policy):
        torch.manual_seed(0)
        noise = torch.randn(2, 12, 3, PIXELS, PIXELS, dtype=torch.float64)
        got = pipeline.inference(noise, ["a"] * 2, return_latents=True, on_chunk=between)[1]
    assert torch.allclose(other[0], expected, atol=1e-9) and torch.allclose(got, expected, atol=1e-9)


def test_a_second_video_is_guided_at_its_first_chunk_too():
    pipeline, expected = pipe(), expected_video(FlowMo(step=0.05))
    with tokentrim.patched(pipeline, FlowMo(step=0.05)) as handle:
        assert torch.allclose(video(pipeline), expected, atol=1e-9)
        assert torch.allclose(video(pipeline), expected, atol=1e-9)
    guided = [(record.video, record.chunk) for record in handle.report if record.acts and record.sample == 0]
    assert guided == [(0, 0), (1, 0)]


# ------------------------------------------------------------------------------------------------- refusals


def refused(pipeline, policy, words, run=video):
    plain = video(pipe())
    with tokentrim.patched(pipeline, policy), pytest.raises(UnsupportedPolicyError, match=words) as caught:
        run(pipeline)
    assert str(caught.value).count("\n") <= 2
    return plain


def test_inference_mode_is_refused():
    pipeline = pipe()

    def run_in(pipeline):
        with torch.inference_mode():
            return video(pipeline)

    refused(pipeline, FlowMo(), "inference_mode", run_in)
    with torch.inference_mode():
        assert torch.equal(video(pipe()), video(pipeline))


@pytest.mark.parametrize("frames", [1, 2])
def test_too_few_frames_are_refused(frames):
    pipeline = make(num_frame_per_block=frames)
    refused(pipeline, FlowMo(), f"this chunk has {frames}", lambda p: run(p) if frames == FRAMES else run_one(p))


def run_one(pipeline):
    return pipeline.inference(torch.randn(1, 3, 3, PIXELS, PIXELS), ["a"], return_latents=True)[1]


def test_compiled_parts_are_refused():
    pipeline = pipe()
    with tokentrim.patched(pipeline, FlowMo()):
        pipeline.generator.model.blocks[0].compile(backend="eager")
        with pytest.raises(UnsupportedPolicyError, match="is compiled"):
            video(pipeline)
    torch._dynamo.reset()


def test_an_adapter_that_does_not_declare_it_is_refused_at_the_patch(monkeypatch):
    from tokentrim_hooks_adapters.self_forcing import SelfForcing

    monkeypatch.setattr(SelfForcing, "takes", SelfForcing.takes - {"guide"})
    pipeline = pipe()
    with pytest.raises(UnsupportedPolicyError, match="scratch cache"):
        tokentrim.patch(pipeline, FlowMo())
    assert torch.equal(video(pipeline), video(pipe()))


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        pipeline = pipe()
    refused(pipeline, FlowMo(), "weights keep no gradients")


def test_a_sampler_that_integrates_is_told_at_its_second_chunk():
    pipeline = pipe()
    native = pipeline._denoise

    def integrates(noisy, conditional, start):
        return native(noisy, conditional, start).clone()

    pipeline._denoise = integrates
    refused(pipeline, FlowMo(), "does not commit the x0")


def test_with_on_error_warn_the_video_is_the_unpatched_one():
    pipeline = make(num_frame_per_block=2)
    warned = pytest.warns(tokentrim.TokenTrimWarning, match="this chunk has 2")
    with warned, tokentrim.patched(pipeline, FlowMo(), on_error="warn"):
        got = run(pipeline)
    assert torch.equal(got, run(make(num_frame_per_block=2)))


@pytest.mark.parametrize("answer", [lambda x: x[:, :1], lambda x: 3, lambda x: x[0]])
def test_another_shape_is_an_error_that_names_the_policy(answer):
    @dataclass(frozen=True)
    class Wrong(tokentrim.Policy):
        """Answers something else."""

        def guide(self, chunk):
            return answer(chunk.latents)

    pipeline = pipe()
    with tokentrim.patched(pipeline, Wrong()), pytest.raises(tokentrim.PolicyError, match=r"Wrong\.guide returned"):
        video(pipeline)
    assert torch.equal(video(pipeline), video(pipe()))


def test_the_level_is_the_schedulers():
    levels, pipeline = [], pipe()

    class Levels(tokentrim.Policy):
        """Keeps the levels."""

        def guide(self, chunk):
            levels.append(chunk.level())
            return None

    with tokentrim.patched(pipeline, Levels()):
        video(pipeline, chunks=2)
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(levels, [1, 0.75, 0.5, 0.25] * 2, strict=True))
