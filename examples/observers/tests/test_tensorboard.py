"""TensorBoard's own reader finds the report's figures in the event file."""

import io

import numpy as np
import tokentrim_observers
from expected import NAMES, check_drift, curves, pictures
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference import ReferencePipeline


def opened(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_curves_equal_the_report(run):
    log = opened(run.folder / "tensorboard")
    found = {
        (*tag.split("/"), event.step): event.value for tag in log.Tags()["scalars"] for event in log.Scalars(tag)
    }
    assert found == curves(run.records)
    assert {name for name, _, _ in found} == set(NAMES)


def test_pictures_show_drift_and_pruned_tokens(run):
    log = opened(run.folder / "tensorboard")
    wanted = pictures(run.records)
    for tag in log.Tags()["images"]:
        for event in log.Images(tag):
            image = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
            check_drift(wanted.pop((tag.removeprefix("drift/"), event.step)), np.asarray(image).tolist())
    assert not wanted, "a picture is missing"


def test_settings_are_there_as_text(run):
    log = opened(run.folder / "tensorboard")
    (event,) = log.Tensors("settings/text_summary")
    assert "- policy.sensitivity: 0.0" in event.tensor_proto.string_val[0].decode()


def test_by_name_alone_it_writes_where_tensorboard_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tokentrim.patched(ReferencePipeline.random(grid=(2, 2)), observers=["tensorboard"]) as handle:
        assert handle.active
    assert list((tmp_path / "runs").glob("*/events.out.tfevents.*"))


def test_the_hook_names_all_three():
    assert sorted(tokentrim_observers.tokentrim_observers()) == ["rerun", "tensorboard", "wandb"]
    assert {info.name for info in tokentrim.installed_observers()} >= {"rerun", "tensorboard", "wandb"}
