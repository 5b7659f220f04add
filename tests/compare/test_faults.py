"""Faults that ``tokentrim compare --fault`` knows: planted in the right chunks, told and measured from the last one."""

from typing import get_args

import pytest
import torch

from tokentrim_hooks.cli import compare
from tokentrim_hooks.cli.main import main
from tokentrim_hooks.experiments.compare.rollouts import roll_out
from tokentrim_hooks.experiments.compare.settings import BASE, Setting
from tokentrim_hooks.experiments.compare.trials import ReferenceMaker
from tokentrim_hooks.reference import fault as faults
from tokentrim_hooks.reference.kinds import BASE as BASE_KIND
from tokentrim_hooks.reference.kinds import KINDS

OFF = Setting(BASE, off=True)
FRAMES = 3
PLANTED = {
    "context": ([7], []),
    "chunk": ([7], [7]),
    "settled": ([7, 8, 9], [7, 8, 9]),
    "noise": ([7], []),
    "late": ([15], [15]),
}
"""By hand: numbers of the chunks whose context, and of those whose accepted chunk, is corrupted."""
SEEDS = [7, 8]


def load(fault, chunks, on_chunk=None):
    return ReferenceMaker.load(chunks, fault, sink=0, trained=False, device="cpu", on_chunk=on_chunk)


def rolled(fault, seeds=SEEDS):
    """An unpatched rollout: trial, video, what was written into the context and what was accepted, by chunk."""
    context, accepted = {}, {}
    last = PLANTED[fault][0][-1]
    trial = load(fault, last + 2, lambda i, n, chunk: accepted.setdefault(i + 1, chunk.clone()))(seeds)

    def written(model, args, kwargs):
        if not kwargs["t"].any():
            chunk = kwargs["current_start"] // trial.model.frame_seq_length // FRAMES
            context[chunk] = args[0].transpose(1, 2).clone()

    with trial.model.generator.model.register_forward_pre_hook(written, with_kwargs=True):
        video = roll_out(trial, OFF, seeds).video
    return trial, video, context, accepted


def frames(chunk):
    return slice(chunk * FRAMES, (chunk + 1) * FRAMES)


def corrupted(trial, found, last):
    """Numbers of chunks up to ``last`` that are not the true ones, and that are wrong in the blotch's place alone."""
    truth = trial.scene.video
    wrong = [chunk for chunk in range(1, last + 1) if not torch.equal(found[chunk], truth[:, frames(chunk)])]
    outside = ~trial.blotch.area(32, 32)[:, None, None]
    assert not any(((found[chunk] - truth[:, frames(chunk)]) * outside).any() for chunk in wrong)
    return wrong


def test_there_is_one_list_of_faults():
    assert tuple(faults.FAULTS) == get_args(faults.Where) == tuple(PLANTED) == compare.FAULTS
    assert tuple(KINDS) == compare.KINDS and compare.KINDS[0] == BASE_KIND
    for name in PLANTED:
        assert f'\n- ``"{name}"``: ' in faults.__doc__, "every fault is explained"


@pytest.mark.parametrize("fault", PLANTED)
def test_the_blotch_is_in_these_chunks_and_in_no_others(fault):
    trial, video, context, accepted = rolled(fault)
    last = PLANTED[fault][0][-1]
    assert (corrupted(trial, context, last), corrupted(trial, accepted, last)) == PLANTED[fault]
    for chunk in (last + 1, last + 2):
        assert torch.equal(context[chunk], accepted[chunk]), "behind the fault nothing is overwritten"
        assert not torch.equal(context[chunk], trial.scene.video[:, frames(chunk)])
    assert video.shape[1] == FRAMES * (last + 3)


@pytest.mark.parametrize("fault", PLANTED)
def test_in_the_place_is_one_colour_in_all_frames_or_noise(fault):
    trial, _, context, _ = rolled(fault, [7])
    area = trial.blotch.area(32, 32)[0]
    for chunk in PLANTED[fault][0]:
        colours = context[chunk][0].permute(0, 2, 3, 1)[:, area].flatten(0, 1)
        assert len(colours.unique(dim=0)) == (len(colours) if fault == "noise" else 1)
        assert torch.equal(colours[:1], trial.blotch.color) == (fault != "noise")


@pytest.mark.parametrize("fault", PLANTED)
def test_the_same_seeds_give_the_same_fault_alone_or_in_a_batch(fault):
    (_, video, context, _), (_, again, same, _) = rolled(fault), rolled(fault)
    assert torch.equal(video, again) and all(torch.equal(context[chunk], same[chunk]) for chunk in context)
    (_, _, alone, _), (_, _, other, _) = rolled(fault, SEEDS[1:]), rolled(fault, [9])
    for chunk in PLANTED[fault][0]:
        assert torch.equal(context[chunk][1:], alone[chunk])
        assert not torch.equal(other[chunk], alone[chunk])


def test_context_and_chunk_are_one_fault_to_an_unpatched_model():
    (_, one, context, _), (_, other, chunk, _) = rolled("context"), rolled("chunk")
    assert context.keys() == chunk.keys() and all(torch.equal(context[i], chunk[i]) for i in context)
    assert torch.equal(one, other), "the sampler put chunk 7 aside before it was overwritten: not even that differs"


@pytest.mark.parametrize("fault", PLANTED)
def test_columns_are_counted_from_the_last_corrupted_chunk(fault):
    last = PLANTED[fault][0][-1]
    trial = load(fault, last + 5)(SEEDS)
    assert trial.watch == last + 1
    assert [c.name for c in trial.columns if not c.window] == [f"error around the fault, +{o}" for o in (1, 4)]
    windows = [f"chunks {last + 1}-{last + 2}", f"chunks {last + 3}-{last + 5}"]
    assert list(dict.fromkeys(c.window for c in trial.columns if c.window)) == windows
    for offset, other in ((1, 4), (4, 1)):
        video = trial.scene.video.clone()
        here = frames(last + offset)
        video[:, here] = trial.blotch.paint(video[:, here])
        found = trial.measure(video)
        assert (found[f"error around the fault, +{offset}"] > 0.01).all()
        assert (found[f"error around the fault, +{other}"] == 0).all()


@pytest.mark.parametrize("fault", PLANTED)
def test_too_few_chunks_are_refused_with_how_many_are_needed(fault, tmp_path, capsys):
    first, last = PLANTED[fault][0][0], PLANTED[fault][0][-1]
    asked = ["compare", "--reference", "--untrained", "--fault", fault, "--chunks", str(last), "--out", str(tmp_path)]
    assert main(asked) == 2
    where = f"chunk {first}" if first == last else f"chunks {first} to {last}"
    assert f"'{fault}' needs at least {last + 1} chunks: it is planted in {where}" in capsys.readouterr().err
    enough = load(fault, last + 1)(SEEDS)
    assert [c.name for c in enough.columns if not c.window] == ["error around the fault, +1"]
