"""What happens on one rank; run as ``python scenarios.py folder rank size``, which leaves a file per scenario."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import traceback
import warnings
from pathlib import Path

import framepack_tiny
import own_loop
import shared_model
import tiny_reference as tiny
import torch
import torch.distributed as dist
from tokentrim_hooks_adapters.self_forcing import SelfForcing
from torch.utils._pytree import tree_map

import tokentrim_hooks as tokentrim
from tokentrim_hooks import CommitWindow, RankError
from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.ranks import channel
from tokentrim_hooks.ranks.channel import Channel
from tokentrim_hooks.rollout.repeat.proof import NullReplay
from tokentrim_hooks.testing import ForcedPolicy

FORCED = ForcedPolicy({2: (1, 3)})
OTHER = {0: (1, 3), 1: (0,), 2: (2, 0), 3: (1, 2)}
"""What each rank would prune on its own."""


class Planted(Exception):
    """The failure of one rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judges(ForcedPolicy):
    """Fails on rank ``only`` at its call number ``fails_at``."""

    only: int
    fails_at: int
    seen: list = dataclasses.field(default_factory=list)

    def judge(self, chunk, history):
        self.seen.append(1)
        if dist.get_rank() == self.only and len(self.seen) == self.fails_at:
            raise Planted("the policy has a bug")
        return super().judge(chunk, history)


class Undecided(tokentrim.Policy):
    """Has no opinion."""

    def judge(self, chunk, history):
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByRank(tokentrim.Policy):
    """The same options on all ranks, of which each judges by its own of ``judges``, as if its numbers were others."""

    judges_of: tuple[tokentrim.Policy, ...]

    def judge(self, chunk, history):
        return self.judges_of[dist.get_rank()].judge(chunk, history)


def records(handle):
    """What a report says, without drift and seconds."""
    names = ("video", "chunk", "severity", "mean", "std", "threshold", "accepted_severity", "pruned", "tokens", "dead",
             "regenerations", "extra_calls", "sample", "proof_calls")  # fmt: skip
    return [tuple(getattr(record, name) for name in names) for record in handle.report]


def rollout(policy, *, sabotage=None, make=shared_model.divided, run=tiny.run, again=False, **options):
    """One video, and after a failure perhaps a second one on the same patch; all that can be compared.

    ``sabotage(handle)`` makes this rank fail, and returns what undoes that.
    """
    pipeline, found = make(), {"error": None, "video": None, "again": None}
    options = {"group": dist.group.WORLD, **options}
    posts, post = [], Channel.post
    Channel.post = lambda self, *said: posts.append(1) or post(self, *said)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = tokentrim.patch(pipeline, policy, **options)
        undo = sabotage(handle) if sabotage else None
        try:
            found["video"] = run(pipeline)
        except (Exception, KeyboardInterrupt) as failure:
            found["error"] = (type(failure).__name__, str(failure))
        if undo:
            undo()
        found |= {"posts": len(posts), "records": records(handle), "active": handle.active}
        if again:
            found["again"] = run(pipeline)
        try:
            handle.unpatch()
        except Exception as failure:
            found["at_unpatch"] = (type(failure).__name__, str(failure))
    Channel.post = post
    found["warnings"] = [str(w.message) for w in caught if issubclass(w.category, tokentrim.TokenTrimWarning)]
    found["plain"] = run(pipeline)
    return found


def fails(owner_of, name, number, only=1):
    """Sabotage: on rank ``only`` a method of ``owner_of(handle)`` fails at its call ``number`` (from 1)."""

    def sabotage(handle):
        if dist.get_rank() != only:
            return None
        owner = owner_of(handle)
        method, calls = getattr(owner, name), []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                raise Planted(f"{name} has a bug")
            return method(*args, **kwargs)

        setattr(owner, name, failing)
        return lambda: delattr(owner, name)

    return sabotage


def adapter_of(handle):
    return handle.adapter


def blind(_handle):
    """On rank 1 the tap sees no call: the prune cannot be proved there."""
    if dist.get_rank() != 1:
        return None
    attend = CallTap.attend
    CallTap.attend = lambda self, attend, q, k, v, mask: attend(q, k, v, mask)

    def undo():
        CallTap.attend = attend

    return undo


def tap_fails(_handle):
    """On rank 1 the tap fails in the middle of the model, in the replay and in the two calls behind it."""
    if dist.get_rank() != 1:
        return None
    attend = CallTap.attend

    def failing(*_):
        raise Planted("the tap has a bug")

    CallTap.attend = failing

    def undo():
        CallTap.attend = attend

    return undo


def uneven_noise(pipeline):
    """Ranks whose noise differs by a little, as after reductions in another order, but by far more."""
    torch.manual_seed(0)
    noise = torch.randn(1, 7 * pipeline.num_frame_per_block, 3, tiny.PIXELS, tiny.PIXELS)
    own = torch.Generator().manual_seed(dist.get_rank())
    noise += 0.3 * torch.randn(noise.shape, generator=own)
    return pipeline.inference(noise, ["a"], return_latents=True)[1]


def batch(pipeline):
    return tiny.run(pipeline, batch=3)


def guided(pipeline):
    return own_loop.last(own_loop.calls(pipeline, 1, guidance=1.5))


def ringing(make, **options):
    """A model whose attention goes over ranks, each with the keys of its own tokens."""
    with shared_model.tokens_over_ranks():
        return rollout(ForcedPolicy({2: (1,)}), make=make, **options)


def own_part(pipeline):
    """This rank's part of the picture."""
    torch.manual_seed(dist.get_rank())
    noise = torch.randn(1, tiny.CHUNKS * pipeline.num_frame_per_block, 3, 2 * tiny.PIXELS, 2 * tiny.PIXELS)
    return pipeline.inference(noise, ["a"], return_latents=True)[1]


def own_verdict():
    return ByRank(judges_of=tuple(ForcedPolicy({2: OTHER[rank], (3 if rank else 4): (0,)}) for rank in OTHER))


def own_tokens(**options):
    """Each rank would prune other tokens of one chunk."""
    return ByRank(judges_of=tuple(ForcedPolicy({2: OTHER[rank]}) for rank in OTHER), **options)


def own_samples():
    """Each rank would prune another sample."""
    return ByRank(judges_of=tuple(ForcedPolicy({2: (1, 3)}, samples=(rank,)) for rank in OTHER))


def on(rank, policy, other):
    """One policy judges on a rank, another on the others."""
    return ByRank(judges_of=tuple(policy if number == rank else other for number in OTHER))


def unlike(policy=FORCED, others=FORCED, **options):
    """The last rank is patched with other options; what each is told, and whether its model is as it was."""
    pipeline, last, words = shared_model.divided(), dist.get_rank() == dist.get_world_size() - 1, ""
    try:
        tokentrim.patch(
            pipeline,
            policy if last else others,
            group=dist.group.WORLD,
            **{name: given[last] for name, given in options.items()},
        )
    except RankError as refusal:
        words = str(refusal)
    return {"error": words, "patched": tokentrim.is_patched(pipeline), "plain": tiny.run(pipeline)}


def packed():
    """A model whose context lies in the sequence, so that it is asked for before every call; undivided, but in step."""
    pipeline = framepack_tiny.pipeline()
    shared_model.keep_in_step(pipeline.transformer)
    return pipeline


def model_fails(handle):
    """On rank 1 the model itself fails, at the end of the replay: its collectives are made."""
    if dist.get_rank() != 1:
        return None
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 13:
            raise Planted("out of memory")

    return handle._rollout._model().generator.register_forward_hook(fail).remove


def remembering_fails(_handle):
    """On rank 1 nothing can be remembered before the call that is to prove repeatability."""
    if dist.get_rank() != 1:
        return None
    remember = NullReplay.remember

    def fail(*_):
        raise Planted("out of memory")

    NullReplay.remember = fail

    def undo():
        NullReplay.remember = remember

    return undo


def answering(pipeline, answer):
    """On rank 1 ``answer(generator)`` is added to what the model gives, behind all collectives."""
    if dist.get_rank() == 1:
        pipeline.generator.register_forward_hook(
            lambda module, _args, output: tree_map(lambda part: part + answer(module), output)
        )
    return pipeline


def rounding():
    """The kernels of rank 1 round otherwise in each call."""

    def noise(_module):
        numbers = torch.Generator()  # kept by nobody, so that it is not put back
        numbers.seed()
        return 1e-6 * torch.randn((), generator=numbers)

    return answering(shared_model.divided(), noise)


def remembering():
    """Rank 1 keeps something from call to call: more than one float, which is no count."""
    pipeline = shared_model.divided()
    pipeline.generator.register_buffer("memory", torch.zeros(2), persistent=False)
    return answering(pipeline, lambda module: module.memory.add_(0.1)[0].clone())


def from_the_start(pipeline):
    pipeline.generator.memory.zero_()
    return tiny.run(pipeline)


def interrupted(_handle):
    """Ctrl-C on rank 1 while it judges."""
    if dist.get_rank() != 1:
        return None
    judge = ForcedPolicy.judge

    def interrupt(*_):
        raise KeyboardInterrupt

    ForcedPolicy.judge = interrupt
    return lambda: setattr(ForcedPolicy, "judge", judge)


def declared():
    """The adapter says which ranks share the model; the user says nothing."""
    kind, before = SelfForcing, SelfForcing.group
    kind.group = lambda self, model: dist.group.WORLD
    try:
        return rollout(own_verdict(), group=None)
    finally:
        kind.group = before


def long_words():
    """A verdict that does not fit beside the ranks' own words, as of a large batch."""
    before, channel.BODY = channel.BODY, 64
    try:
        return rollout(own_verdict())
    finally:
        channel.BODY = before


def failing_judge(only, number):
    return Judges({2: (1, 3)}, only=only, fails_at=number)


def out_of_step():
    sizes = 1 + dist.get_rank()
    return rollout(FORCED, make=shared_model.whole, run=lambda pipeline: tiny.run(pipeline, batch=sizes))


def after_an_unheard_word():
    """A failure behind the last verdict is raised at the end; the next patch is not harmed by it."""
    number = 1 + 5 * (tiny.CHUNKS - 1) + 3
    first = rollout(FORCED, sabotage=fails(adapter_of, "parse", number))
    return {"first": first, "second": rollout(FORCED)}


SABOTAGES = {
    "parse": fails(adapter_of, "parse", 9),
    "parse-at-judged": fails(adapter_of, "parse", 11),
    "phase": fails(adapter_of, "phase", 9),
    "prediction": fails(adapter_of, "prediction", 10),
    "prediction-of-proof": fails(adapter_of, "prediction", 12),
    "prediction-of-replay": fails(adapter_of, "prediction", 14),
    "order": fails(adapter_of, "replay", 1),
    "proof": fails(adapter_of, "replay", 2),
    "remembering": remembering_fails,
    "replay": fails(adapter_of, "replay", 3),
    "context-of-order": fails(adapter_of, "context", 1),
    "context-before-order": fails(adapter_of, "context", 2),
    "context-behind-order": fails(adapter_of, "context", 3),
    "context-of-prune": fails(adapter_of, "context", 4),
    "tap": tap_fails,
    "model-in-replay": model_fails,
}

SCENARIOS = {
    "forced": lambda: rollout(FORCED),
    "own-verdict": lambda: rollout(own_verdict()),
    "own-samples": lambda: rollout(own_samples(), run=batch),
    "uneven-noise": lambda: rollout(tokentrim.DriftPolicy(fraction=0.5, sensitivity=0.0, warmup=1), run=uneven_noise),
    "candidate": lambda: rollout(own_verdict(), probe="candidate"),
    "twice": lambda: rollout(own_tokens(max_regenerations=2)),
    "guided": lambda: rollout(own_verdict(), run=guided),
    "guided-fleeting": lambda: rollout(own_tokens(persist=False), run=guided),
    "undecided-follower": lambda: rollout(on(1, Undecided(), FORCED)),
    "undecided-leader": lambda: rollout(on(0, Undecided(), FORCED)),
    "alone": lambda: rollout(ForcedPolicy({2: (1, 3)}), group=None),
    "data-parallel": lambda: rollout(own_verdict(), make=shared_model.whole, group=None),
    "declared": declared,
    "long-words": long_words,
    "packed": lambda: rollout(own_verdict(), make=packed, run=framepack_tiny.run),
    "rounding": lambda: rollout(FORCED, make=rounding),
    "remembering-model": lambda: rollout(FORCED, make=remembering, run=from_the_start),
    "remembering-model-aside": lambda: rollout(FORCED, make=remembering, run=from_the_start, on_error="warn"),
    "tokens-divided": lambda: ringing(shared_model.by_tokens),
    "tokens-divided-aside": lambda: ringing(shared_model.by_tokens, on_error="warn"),
    "tokens-divided-no-group": lambda: ringing(shared_model.by_tokens, group=None),
    "picture-divided": lambda: ringing(shared_model.by_picture, run=own_part),
    "picture-divided-aside": lambda: ringing(shared_model.by_picture, run=own_part, on_error="warn"),
    "interrupted": lambda: rollout(FORCED, sabotage=interrupted, again=True),
    "out-of-step": out_of_step,
    "unheard": after_an_unheard_word,
}
for way in ("raise", "warn"):
    for only in (0, 1):
        SCENARIOS[f"judge-{only}-{way}"] = lambda w=way, o=only: rollout(
            failing_judge(o, 2), on_error=w, again=w == "raise"
        )
        SCENARIOS[f"second-judge-{only}-{way}"] = lambda w=way, o=only: rollout(failing_judge(o, 3), on_error=w)
    for place, sabotage in SABOTAGES.items():
        SCENARIOS[f"{place}-{way}"] = lambda w=way, s=sabotage: rollout(
            FORCED, sabotage=s, on_error=w, again=w == "raise"
        )
    SCENARIOS[f"context-of-call-{way}"] = lambda w=way: rollout(
        FORCED, sabotage=fails(adapter_of, "context", 4), on_error=w, make=packed, run=framepack_tiny.run
    )
    SCENARIOS[f"carry-{way}"] = lambda w=way: rollout(
        FORCED, sabotage=fails(adapter_of, "carry", 2), on_error=w, probe="candidate", again=w == "raise"
    )
UNLIKE = {
    "on_error": {"on_error": ("raise", "warn")},
    "probe": {"probe": ("first-step", "candidate")},
    "policy": {"policy": tokentrim.DriftPolicy(), "others": tokentrim.ObservePolicy()},
    "policy.persist": {"policy": ForcedPolicy({2: (1, 3)}, persist=False)},
    "policy.at": {"policy": ForcedPolicy({2: (1, 2)})},
    "policy.CommitWindow.frames": {"policy": [FORCED, CommitWindow(6)], "others": [FORCED, CommitWindow(3)]},
}
SCENARIOS |= {f"unlike-{name}": lambda given=given: unlike(**given) for name, given in UNLIKE.items()}
SCENARIOS["blind"] = lambda: rollout(ForcedPolicy({2: (1,), 3: (2,)}), sabotage=blind)
FOUR = ("forced", "own-verdict", "uneven-noise", "judge-1-raise", "judge-1-warn", "parse-warn", "replay-raise", "blind",
        "unlike-on_error")  # fmt: skip


def main(folder, rank, size, *wanted):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60))
    for name in wanted or (SCENARIOS if size == 2 else FOUR):
        try:
            found = SCENARIOS[name]()
        except BaseException:
            print(name, flush=True)
            traceback.print_exc()
            raise
        torch.save(found, f"{folder}/{name}.{rank}.part")
        Path(f"{folder}/{name}.{rank}.part").rename(f"{folder}/{name}.{rank}")
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
