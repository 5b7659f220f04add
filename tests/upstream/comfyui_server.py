"""ComfyUI's own server on a loopback port, with the node pack in its custom_nodes and tiny random weights."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import NOT_CHECKED, folder_of, randomise
from safetensors.torch import load_file, save_file
from tiny_comfyui import PACK, VARIABLE, comfyui
from torch import Tensor

HERE = Path(__file__).resolve().parent
WEIGHTS = "self_forcing_wan2.1_1.3b.safetensors"
TEXT = 32
PATIENCE = 300


@dataclass
class Server:
    """A server that answers at ``address`` and writes below ``folder``."""

    address: str
    folder: Path

    def ask(self, path: str, body: Any = None) -> Any:
        """GET, or POST with a body; the answer as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refusal:
            raise AssertionError(refusal.read().decode()) from None

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue a workflow in API format, as the frontend does; its history entry once it is done."""
        number = self.ask("/prompt", {"prompt": prompt})["prompt_id"]
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            history = self.ask(f"/history/{number}")
            if number in history:
                return dict(history[number])
            time.sleep(0.3)
        raise AssertionError("the workflow does not end")

    def latents(self, prefix: str) -> Tensor:
        """The latest latents that SaveLatent has written."""
        files = sorted((self.folder / "output").glob(f"{prefix}_*.latent"))
        return load_file(files[-1])["latent_tensor"]


def tiny_weights(place: Path) -> None:
    """A file of weights as users have it, in whose header the model is told to be autoregressive, and tiny."""
    sizes = {"dim": 128, "ffn_dim": 128, "num_heads": 1, "num_layers": 2, "text_dim": TEXT}
    with comfyui() as comfy:
        operations = sys.modules["comfy.ops"].disable_weight_init
        net = randomise(comfy.ar_model.CausalWanModel(freq_dim=256, operations=operations, **sizes))
        told = {"config": json.dumps({"transformer": {"causal_ar": True, "text_dim": TEXT}})}
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, place, told)


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """Start ``main.py --cpu`` and stop it again; skips the test where what it imports is not installed."""
    upstream = folder_of("ComfyUI")
    for name in ("custom_nodes", "models/diffusion_models", "output", "input", "user"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(PACK, folder / "custom_nodes" / "ComfyUI-TokenTrim", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "comfyui_text.py", folder / "custom_nodes")
    tiny_weights(folder / "models" / "diffusion_models" / WEIGHTS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--cpu", "--base-directory", str(folder), "--listen", "127.0.0.1", "--port", str(port)]
    options += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    options += ["--front-end-root", str(folder / "input")]  # so that the frontend need not be installed
    paths = [str(HERE), *sys.path, os.environ.get(VARIABLE, "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(HERE / "comfyui_start.py"), str(upstream), *options]
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, cwd=upstream, stdout=log, stderr=subprocess.STDOUT)
        try:
            found = Server(f"http://127.0.0.1:{port}", folder)
            _wait(found, process)
            yield found
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait(found: Server, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        try:
            found.ask("/system_stats")
            return
        except OSError:
            time.sleep(0.5)
    said = (found.folder / "log").read_text(encoding="utf-8")
    last = said.strip().splitlines()[-1] if said.strip() else ""
    if "ModuleNotFoundError" in last and "comfy." not in last:
        pytest.skip(f"{NOT_CHECKED} in the real ComfyUI's server: {last}")
    raise AssertionError(said[-3000:])
