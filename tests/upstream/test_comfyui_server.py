"""The pack's workflow, run by ComfyUI's own server as the frontend would have it run: no window, tiny random weights.

What differs from the file: a text encoder's weights no test can have, nor a VAE's, so random numbers stand in for the
prompt, latents are saved instead of decoded, and the video is small.
"""

from __future__ import annotations

import copy
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_server import TEXT, Server, server
from PIL import Image
from tiny_comfyui import PACK

pytestmark = [pytest.mark.upstream, pytest.mark.slow]
ALWAYS = '{"sensitivity": 0.0, "warmup": 1}'


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("comfyui")) as started:
        yield started


def workflow() -> dict[str, Any]:
    """The pack's file, made small."""
    file = PACK / "workflow_api.json"
    nodes: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for decoding in ("2", "13", "14", "15", "16"):
        del nodes[decoding]
    nodes["3"] = {"class_type": "TinyText", "inputs": {"width": TEXT}}
    nodes["9"]["inputs"].update(width=96, height=64, length=69)
    nodes["20"] = {"class_type": "SaveLatent", "inputs": {"samples": ["10", 0], "filename_prefix": "patched"}}
    return nodes


def applied(**inputs: Any) -> dict[str, Any]:
    nodes = workflow()
    nodes["4"]["inputs"].update(inputs)
    return nodes


def plain() -> dict[str, Any]:
    """The same without our nodes."""
    nodes = copy.deepcopy(workflow())
    for ours in ("4", "11", "12", "17"):
        del nodes[ours]
    for user in ("5", "6"):
        nodes[user]["inputs"]["model"] = ["1", 0]
    nodes["20"]["inputs"]["filename_prefix"] = "plain"
    return nodes


def test_the_server_offers_the_nodes(running: Server) -> None:
    told = running.ask("/object_info/ApplyTokenTrim")["ApplyTokenTrim"]
    assert told["display_name"] == "Apply TokenTrim" and told["category"] == "model/tokentrim"
    assert told["input"]["required"]["policy"][0][0] == "drift" and told["output"] == ["MODEL"]
    assert running.ask("/object_info/TokenTrimReport")["TokenTrimReport"]["output"] == ["IMAGE", "STRING"]


def test_the_workflow_runs_and_leaves_the_cached_model_alone(running: Server) -> None:
    """Plain, measured, pruned, plain again: the loader's MODEL stays cached all the while, the samplers run anew."""
    videos = []
    for nodes in (plain(), applied(strength=0.0), applied(options=ALWAYS), plain()):
        done = running.run(nodes)
        assert done["status"]["status_str"] == "success", done["status"]
        videos.append(running.latents(nodes["20"]["inputs"]["filename_prefix"]))
    before, measured, pruned, after = videos
    assert torch.isfinite(before).all() and before.shape == (1, 16, 18, 8, 12)
    assert torch.equal(before, measured) and torch.equal(before, after) and not torch.equal(before, pruned)


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
def test_the_report_is_a_picture_of_the_run(running: Server, probe: str) -> None:
    done = running.run(applied(options=ALWAYS, probe=probe))
    (image,) = done["outputs"]["12"]["images"]
    words = done["outputs"]["17"]["text"][0]
    assert "6 chunk records, 5 judged" in words and " 0 pruned" not in words
    address = f"{running.address}/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
    with urllib.request.urlopen(address, timeout=60) as answer:
        pixels = np.asarray(Image.open(answer).convert("RGB")).reshape(-1, 3).astype(int)
    red = (abs(pixels - (214, 40, 57)) < 12).all(1).sum()
    assert red > 100, "regenerated chunks are red"
    assert (pixels > 250).all(1).mean() > 0.4, "on white"


def test_what_cannot_be_is_said_at_the_node(running: Server) -> None:
    done = running.run(applied(options='{"sensitivity": -1}'))
    (error,) = [said for kind, said in done["status"]["messages"] if kind == "execution_error"]
    assert error["node_type"] == "ApplyTokenTrim" and "sensitivity" in error["exception_message"]
