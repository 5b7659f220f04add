"""The offline file that ``wandb sync`` would upload holds the report's figures; nobody was called while it was made."""

import json
import os
import struct
import subprocess
import sys
import time

import numpy as np
import wandb
from expected import check_drift, clean_environment, curves, only, pictures
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference import ReferencePipeline

BLOCK = 32768


def records_of(path):
    """W&B's records in a .wandb file: LevelDB's log format after seven bytes, blocks of 32 KiB, pieces of a record."""
    content, place, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:  # too little for a header: the rest of a block is padding
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield Record.FromString(whole)
            whole = b""


def file_of(run):
    return only((run.folder / "wandb").glob("offline-run-*/*.wandb"))


def rows_of(run):
    """Logged rows, in order, as dicts."""
    for record in records_of(file_of(run)):
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                key, *inner = item.nested_key or [item.key]
                if inner:  # a picture or a table: its file's path and so on
                    row.setdefault(key, {})[inner[0]] = json.loads(item.value_json)
                else:
                    row[key] = json.loads(item.value_json)
            yield row


def logged(run):
    """``{(name, series, chunk): value}``."""
    rows = [row for row in rows_of(run) if "chunk" in row]
    return {
        (*reversed(key.split("/")), row["chunk"]): value for row in rows for key, value in row.items() if "/" in key
    }


def test_curves_equal_the_report(run):
    found = {key: value for key, value in logged(run).items() if key[0] != "drift"}
    assert found == curves(run.records)


def test_pictures_show_drift_and_pruned_tokens(run):
    wanted = pictures(run.records)
    files = only((run.folder / "wandb").glob("offline-run-*/files"))
    for (name, series, chunk), value in logged(run).items():
        if name == "drift":
            image = Image.open(files / value["path"]).convert("RGB")
            check_drift(wanted.pop((series, chunk)), np.asarray(image).tolist())
    assert not wanted, "a picture is missing"


def test_the_table_has_a_row_for_every_record(run):
    last = list(rows_of(run))[-1]["chunks"]
    files = only((run.folder / "wandb").glob("offline-run-*/files"))
    table = json.loads((files / last["path"]).read_text())
    assert table["columns"] == ["video", "sample", "chunk", "severity", "threshold", "pruned", "dead", "extra_calls"]
    wanted = [
        [r.video, r.sample, r.chunk, r.severity, r.threshold, r.pruned, r.dead, r.extra_calls] for r in run.records
    ]
    assert table["data"] == wanted


def test_nobody_was_called(run):
    assert run.calls == []


def test_the_proxy_would_have_been_called_online(telephone, tmp_path):
    """Else the test above could not fail."""
    code = "import wandb; wandb.init(mode='online', project='p')"
    environment = {**clean_environment(), **telephone.environment(), "WANDB_API_KEY": "0" * 40}
    before, deadline = len(telephone.calls), time.monotonic() + 60
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    while len(telephone.calls) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert len(telephone.calls) > before


def test_nothing_else_was_collected(run):
    files = only((run.folder / "wandb").glob("offline-run-*/files"))
    assert {path.name for path in files.iterdir()} == {"media"}, "no source, packages, console output"
    kinds = {record.WhichOneof("record_type") for record in records_of(file_of(run))}
    assert {"run", "history"} <= kinds
    assert not kinds & {"environment", "stats", "output", "output_raw"}, "no paths, git state, hardware, console output"


def test_a_run_of_the_scripts_own_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = wandb.init(project="mine", settings=wandb.Settings(silent=True, console="off"))
    with tokentrim.patched(ReferencePipeline.random(grid=(2, 2)), observers=["wandb"]):
        pass
    assert wandb.run is own and len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    own.log({"still": 1})
    own.finish()
    assert os.path.isdir(own.dir)
