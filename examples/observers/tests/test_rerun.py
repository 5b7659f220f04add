"""rerun's own reader finds the report's figures in the .rrd file."""

import numpy as np
import pytest
import rerun as rr
import torch
from expected import check_drift, curves, pictures

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference import ReferencePipeline


def columns_of(path):
    """``{entity: {chunk: {component: values}}}`` of a recording."""
    found = {}
    for piece in rr.chunk.RrdReader(path).stream():
        batch = piece.to_record_batch()
        if "chunk" not in batch.schema.names:
            continue
        names = [name for name in batch.schema.names if ":" in name]
        for i, chunk in enumerate(batch.column("chunk").to_pylist()):
            row = {name: batch.column(name)[i].as_py() for name in names}
            found.setdefault(piece.entity_path.lstrip("/"), {})[chunk] = row
    return found


@pytest.fixture(scope="module")
def entities(run):
    return columns_of(run.folder / "tokentrim.rrd")


def pixels(row):
    """An Image row as an array [height, width, 3]."""
    (buffer,), (form,) = row["Image:buffer"], row["Image:format"]
    return np.asarray(buffer, dtype=np.uint8).reshape(form["height"], form["width"], 3)


def test_curves_equal_the_report(run, entities):
    found = {}
    for entity, rows in entities.items():
        series, name = entity.split("/")
        if name not in ("drift", "latents"):
            found |= {(name, series, chunk): row["Scalars:scalars"][0] for chunk, row in rows.items()}
    assert found == curves(run.records)


def test_pictures_show_drift_and_pruned_tokens(run, entities):
    wanted = pictures(run.records)
    for entity, rows in entities.items():
        if entity.endswith("/drift"):
            for chunk, row in rows.items():
                check_drift(wanted.pop((entity.split("/")[0], chunk)), pixels(row).tolist())
    assert not wanted, "a picture is missing"


def test_settings_are_there(run):
    pieces = [p for p in rr.chunk.RrdReader(run.folder / "tokentrim.rrd").stream() if p.entity_path == "/settings"]
    (text,) = pieces[0].to_record_batch().column("TextDocument:text").to_pylist()[0]
    assert pieces[0].is_static and "policy.sensitivity: 0.0" in text


@pytest.mark.filterwarnings("ignore:RRD file has no footer")
def test_latents_are_shown_and_the_file_is_complete_while_the_run_goes_on(tmp_path):
    path, seen = tmp_path / "tokentrim.rrd", []

    class Look:
        def on_chunk(self, records, latents):
            seen.append((latents[0].mean(0), sorted(columns_of(path)["v0-s0/latents"])))

    torch.manual_seed(0)
    pipeline = ReferencePipeline.random(grid=(2, 3))
    observers = [tokentrim.make_observer("rerun", tmp_path), Look()]
    with tokentrim.patched(pipeline, observers=observers):
        pipeline.inference(torch.randn(1, 9, 3, 8, 12))
    assert [chunks for _, chunks in seen] == [[0], [0, 1], [0, 1, 2]], "each chunk is in the file as soon as accepted"
    for chunk, (mean, _) in enumerate(seen):
        wanted = 255 * (mean - mean.min()) / (mean.max() - mean.min())
        shown = pixels(columns_of(path)["v0-s0/latents"][chunk])
        assert np.abs(shown - wanted.movedim(0, -1).numpy()).max() <= 0.51
