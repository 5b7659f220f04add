"""The training script at a tiny size: it runs, it can be interrupted, its files load."""

import json
from dataclasses import replace

import pytest
import torch

from tokentrim_hooks.reference import objectives
from tokentrim_hooks.reference.kinds import KINDS
from tokentrim_hooks.reference.low_rank import adapt, differences, merge
from tokentrim_hooks.reference.model import CausalVideoModel
from tokentrim_hooks.reference.recipes import RECIPES, Phase
from tokentrim_hooks.reference.train import Training, initialised, save

SIZE = {"dim": 32, "layers": 1, "heads": 2}


def training(kind="fading", steps=5, seed=0):
    phases = (Phase(0.6, 9, 2, passes=2), Phase(0.4, 12, 1, passes=2))
    recipe = replace(RECIPES[kind], steps=steps, warmup=2, phases=phases)
    made = KINDS[kind]
    torch.manual_seed(seed)
    model = initialised(**SIZE, sink_size=made.sink_size, num_frame_per_block=made.num_frame_per_block)
    if recipe.rank:
        adapt(model, 2, torch.Generator().manual_seed(seed))
    return Training(model, recipe, seed)


@pytest.mark.parametrize("kind", RECIPES)
def test_going_on_from_a_checkpoint_is_the_same_as_not_stopping(kind, tmp_path):
    straight, first = training(kind), training(kind)
    for _ in range(5):
        straight.advance()
    for _ in range(2):
        first.advance()
    save(first, tmp_path / f"{kind}.safetensors", {})
    second = training(kind)
    second.restore(torch.load(tmp_path / f"{kind}.checkpoint", weights_only=True))
    for _ in range(3):
        second.advance()
    assert second.losses == straight.losses
    for name, tensor in straight.weights().items():
        assert torch.equal(second.weights()[name], tensor), name


def test_other_seeds_give_other_losses():
    one, other = training(seed=0), training(seed=1)
    one.advance()
    other.advance()
    assert one.losses != other.losses


def test_training_lowers_the_loss():
    run = training(steps=40)
    for _ in range(40):
        run.advance()
    assert sum(run.losses[-6:]) < 0.8 * sum(run.losses[:2]) * 3


def test_figures_lie_beside_the_weights(tmp_path):
    run = training()
    run.advance()
    save(run, tmp_path / "fading.safetensors", {"note": "from nothing"})
    figures = json.loads((tmp_path / "fading.json").read_text())
    assert figures["steps"] == 1
    assert figures["made from"] == {"note": "from nothing"}
    assert figures["recipe"]["rate"] == RECIPES["fading"].rate


def test_several_noisy_copies_do_not_see_each_other():
    model, index = CausalVideoModel(**SIZE).eval(), torch.arange(6)
    clean, one, other = torch.randn(3, 1, 3, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    level = torch.full((1, 6), 500.0)
    with torch.no_grad():
        both = model(torch.cat([one, other], dim=2), level.repeat(1, 2), clean_x=clean, frame_index=index)
        alone = model(other, level, clean_x=clean)
    torch.testing.assert_close(both[:, :, 6:], alone, atol=1e-5, rtol=0)


def test_merged_differences_are_the_trained_model():
    base = initialised(**SIZE)
    torch.nn.init.normal_(base.head.weight)
    adapted, plain = CausalVideoModel(**SIZE), CausalVideoModel(**SIZE)
    for model in (adapted, plain):
        model.load_state_dict(base.state_dict())
    adapt(adapted, 3, torch.Generator().manual_seed(0))
    for name, tensor in differences(adapted).items():
        tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    merge(plain, differences(adapted))
    video, level = torch.randn(1, 3, 3, 32, 32), torch.full((1, 3), 500.0)
    with torch.no_grad():
        torch.testing.assert_close(plain(video, level), adapted(video, level), atol=1e-4, rtol=1e-4)


def test_a_jump_leaves_frames_out_behind_the_first_chunk_only():
    recipe, phase = RECIPES["sink"], Phase(1.0, 9, 1)
    clips = [objectives.draw_clip(seed, phase, recipe) for seed in range(12)]
    jumped = [clip for clip in clips if clip.given == 6]
    assert 0 < len(jumped) < 12
    for clip in jumped:
        assert clip.index[:3].tolist() == [0, 1, 2]
        assert (clip.index[3:].diff() == 1).all()
        assert clip.index[3] % 3 == 0
