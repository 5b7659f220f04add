"""Mistakes that authors make, planted in sound adapters of three kinds of model: each fails the test named for it.

A KV cache (the reference model), keys in the sequence with a velocity (Stream), a per-site cache (Loom).
"""

import dataclasses

import pytest
from kinds import PerSite, Velocity
from test_reference_conformance import Reference
from tokentrim_hooks_adapters.self_forcing import SelfForcing

from tokentrim_hooks import CacheRows, KeyLayout, Match, Phase, Role
from tokentrim_hooks.testing import failures

X0 = "test_x0_is_what_the_sampler_delivers"
PIXEL = "test_one_pixel_moves_one_token"
LATE = "test_a_late_prune_equals_minus_infinity"
CANDIDATE = "test_a_candidate_prune_equals_minus_infinity"
EXACT = "test_pruning_equals_minus_infinity"
SEEN = "test_every_chunk_is_seen_once_and_in_order"
AGAIN = "test_a_call_is_read_the_same_when_asked_again"
TWO = "test_two_models_at_once_do_not_mix"
SECOND = "test_a_second_video_starts_from_nothing"
SETTLE = "test_rows_that_a_policy_settles_are_those_of_the_commit"
LOOK = "test_a_look_ahead_touches_nothing"


class CacheKit(Reference):
    """The reference model with a window that rolls at every chunk behind the third."""

    adapter, window, chunk_to_prune = SelfForcing, 9, 2


KITS = {"cache": CacheKit, "keys": Velocity, "sites": PerSite}


def method(name):
    """A mutant: ``function(adapter, right, *arguments)`` stands in for a method, ``right`` is the sound one."""

    def make(function):
        def mutate(adapter):
            def wrong(self, *arguments):
                return function(self, lambda *given: getattr(super(mutant, self), name)(*given), *arguments)

            mutant = type("Mutant", (adapter,), {name: wrong})
            return mutant

        return mutate

    return make


def x0(change):
    return method("prediction")(lambda self, right, call, output: change(call, output, right(call, output)))


def start(by):
    def change(self, right, arguments):
        call = right(arguments)
        return dataclasses.replace(call, start=call.start + by)

    return method("parse")(change)


def patch_size(change):
    def mutate(adapter):
        def probe(cls, model):
            answer = super(mutant, cls).probe(model)
            wrong = isinstance(answer, Match)
            return dataclasses.replace(answer, patch_size=change(answer.patch_size)) if wrong else answer

        mutant = type("Mutant", (adapter,), {"probe": classmethod(probe)})
        return mutant

    return mutate


def late(newest):
    """Right until the cache has rolled; from then on the oldest or the newest frame is left out."""

    def change(self, right, call):
        context = right(call)
        if isinstance(context, CacheRows):
            frame, full = context.rows_per_frame, call.start >= 8
            first, last = (0, frame) if newest else (frame, 0)
            rows = dataclasses.replace(context, start=context.start + first, stop=context.stop - last)
            return rows if full and context.stop > 2 * frame else context
        history, current = context.segments
        if call.start < 8:
            return context
        parts = [history.frames[:-1], history.frames[-1:]] if newest else [history.frames[1:], history.frames[:1]]
        kept, spared = (dataclasses.replace(history, frames=frames) for frames in parts)
        spared = dataclasses.replace(spared, role=Role.ANCHOR)
        return KeyLayout((kept, spared, current) if newest else (spared, kept, current))

    return method("context")(change)


def carry(change):
    """In ``carry_step``, which every replay asks."""

    def wrong(self, right, call, earlier, moved, before, after):
        return change(lambda old, new: right(call, earlier, moved, old, new), call, before, after)

    return method("carry_step")(wrong)


def turned(adapter):
    """Latents and x0 with height and width exchanged."""

    def parse(self, arguments):
        call = super(mutant, self).parse(arguments)
        return dataclasses.replace(call, latents=call.latents.transpose(3, 4))

    def prediction(self, call, output):
        call = dataclasses.replace(call, latents=call.latents.transpose(3, 4))
        return super(mutant, self).prediction(call, output).transpose(3, 4)

    mutant = type("Mutant", (adapter,), {"parse": parse, "prediction": prediction})
    return mutant


def with_methods(**methods):
    """A mutant with other methods, which need no sound one."""
    return lambda adapter: type("Mutant", (adapter,), methods)


def counting(adapter):
    """Counts calls where it reads them, instead of in the sampler: right as long as every call is read once."""

    def parse(self, arguments):
        call = super(mutant, self).parse(arguments)
        calls = {0: 1} if call.start == 0 and self.frames.keys() - {0} else self.frames
        self.frames = {**calls, call.start: calls.get(call.start, 0) + 1}
        late = self.frames[call.start] > CALLS[adapter]
        return dataclasses.replace(call, start=call.start + call.frames * late)

    mutant = type("Mutant", (adapter,), {"parse": parse, "frames": {}})
    return mutant


CALLS = {SelfForcing: 5, Velocity.adapter: 4, PerSite.adapter: 4}
"""Of a chunk."""


def read_last(adapter):
    """Keeps the latest call in its class, and answers for that one."""

    def parse(self, arguments):
        call = super(mutant, self).parse(arguments)
        mutant.latest = call
        return call

    mutant = type("Mutant", (adapter,), {
        "parse": parse, "context": lambda self, call: super(mutant, self).context(mutant.latest),
    })  # fmt: skip
    return mutant


def for_all(adapter):
    """Wraps a method of the model's class where one of this model is meant."""

    def attach(self, model, patches):
        super(mutant, self).attach(model, patches)
        net = self.probe(model).denoiser

        def forward(wrapped, instance, args, kwargs):
            output = wrapped(*args, **kwargs)
            return output if instance is net else _doubled(output)

        patches.wrap(type(net), "forward", forward)

    mutant = type("Mutant", (adapter,), {"attach": attach})
    return mutant


def _doubled(output):
    return tuple(2 * part for part in output) if isinstance(output, tuple) else 2 * output


def hoarding(adapter):
    """Keeps every call that it has read."""

    def attach(self, model, patches):
        super(mutant, self).attach(model, patches)
        self.calls = []

    def parse(self, arguments):
        self.calls.append(super(mutant, self).parse(arguments))
        return self.calls[-1]

    mutant = type("Mutant", (adapter,), {"attach": attach, "parse": parse})
    return mutant


class Passing:
    """A name that nobody has heard before."""


def keys(change):
    def context(self, right, call):
        rows = right(call)
        return dataclasses.replace(rows, keys=change(rows))

    return method("context")(context)


def recached(self, right, call, seen):
    phase = right(call, seen)
    return Phase.RECACHE if phase is Phase.COMMIT else phase


X0S = {
    "the noisy input": x0(lambda call, output, right: call.latents),
    "the wrong sign": x0(lambda call, output, right: -right),
    "not scaled": x0(lambda call, output, right: 2 * right),
    "frames reversed": x0(lambda call, output, right: right.flip(1)),
    "noise minus x0": x0(lambda call, output, right: call.latents - right),
}
STARTS = {"start one late": start(1), "start one early": start(-1)}
SIZES = {
    "patch size (1, 1)": patch_size(lambda size: (1, 1)),
    "patch size (4, 1)": patch_size(lambda size: (4, 1)),
}
EXCHANGED = {"height and width of a token exchanged": patch_size(lambda size: size[::-1])}
TURNED = {"height and width of latents exchanged": turned}
ROLLED = {"oldest frame lost after eviction": late(newest=False), "newest frame lost after eviction": late(newest=True)}
CARRIES = {
    "carry without its factor": carry(lambda right, call, before, after: call.latents + 2 * (after - before)),
    "carry with the wrong sign": carry(lambda right, call, before, after: right(after, before)),
    "carry nothing": carry(lambda right, call, before, after: call.latents),
    "with_latents ignores them": method("with_latents")(lambda self, right, call, args, kwargs, new: (args, kwargs)),
}
RAW = {"the velocity itself": x0(lambda call, output, right: output)}
UNSAID = {"x0 not said as a velocity": method("with_prediction")(lambda self, right, call, output, new: output)}

SCENES = {"every chunk another prompt": with_methods(changes_prompt=lambda self, call: True)}
RECACHES = {"commits taken for a rebuilt context": method("phase")(recached)}
READ = {
    "calls counted in parse": counting,
    "a stream of its own for every call": method("parse")(
        lambda self, right, given: dataclasses.replace(right(given), stream=Passing())
    ),
    "an identity of its own for every call": with_methods(identity=lambda self, arguments: (Passing(),)),
}
MIXED = {"the latest call in the class": read_last, "a wrapper on the class": for_all}
HOARDED = {"every call kept": hoarding}
LEVELS = {
    "noise level turned round": method("noise_level")(lambda self, right, call: 1 - right(call)),
    "a timestep for the noise level": method("noise_level")(lambda self, right, call: call.timestep),
}
KEYS = {"keys of other layers": keys(lambda rows: rows.keys[::-1]), "V for K": keys(lambda rows: rows.values)}

PLANTED = [
    *((kit, X0, name, mutate) for kit in KITS for name, mutate in {**X0S, **STARTS, **TURNED}.items()),
    *((kit, PIXEL, name, mutate) for kit in KITS for name, mutate in {**SIZES, **EXCHANGED}.items()),
    *((kit, LATE, name, mutate) for kit in KITS for name, mutate in ROLLED.items()),
    *((kit, CANDIDATE, name, mutate) for kit in KITS for name, mutate in CARRIES.items()),
    *((kit, SEEN, name, mutate) for kit in KITS for name, mutate in SCENES.items()),
    *((kit, SEEN, name, mutate) for kit in ("cache", "sites") for name, mutate in RECACHES.items()),
    *((kit, AGAIN, name, mutate) for kit in KITS for name, mutate in READ.items()),
    *((kit, TWO, name, mutate) for kit in KITS for name, mutate in MIXED.items()),
    *((kit, SECOND, name, mutate) for kit in KITS for name, mutate in HOARDED.items()),
    *(("cache", LOOK, name, mutate) for name, mutate in LEVELS.items()),
    *(("cache", SETTLE, name, mutate) for name, mutate in KEYS.items()),
    *(("keys", X0, name, mutate) for name, mutate in RAW.items()),
    *(("keys", CANDIDATE, name, mutate) for name, mutate in UNSAID.items()),
]


@pytest.mark.parametrize(("kit", "test", "name", "mutate"), PLANTED, ids=[f"{p[0]}: {p[2]}" for p in PLANTED])
@pytest.mark.filterwarnings("ignore::tokentrim_hooks.TokenTrimWarning")
def test_a_mistake_fails_the_test_named_for_it(kit, test, name, mutate):
    sound = KITS[kit]
    found = failures(type("Mutated", (sound,), {"adapter": mutate(sound.adapter)}), [test])
    assert test in found and "NOT CHECKED" not in found[test], f"{name} passes: {found}"


@pytest.mark.parametrize("kit", KITS)
def test_sound_adapters_pass_them(kit):
    declared = [SETTLE, LOOK] if kit == "cache" else []
    assert failures(KITS[kit], [X0, PIXEL, LATE, CANDIDATE, EXACT, SEEN, AGAIN, TWO, SECOND, *declared]) == {}
