"""One run with all three observers, as a user makes it; where the network was there is a proxy that nobody may call."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from expected import clean_environment

from tokentrim_hooks import ChunkRecord

SCRIPT = """
import torch
from pipeline.causal_inference import CausalInferencePipeline

pipeline = CausalInferencePipeline()
torch.manual_seed(0)
noise = torch.randn(2, 18, 3, 8, 12)
noise[:, 9:] *= 3  # the second half is another world: drift for sure
pipeline.inference(noise)
pipeline.inference(noise.flip(3))  # a second video
"""

MODEL = """
from tokentrim_hooks.reference import ReferencePipeline

class CausalInferencePipeline(ReferencePipeline):
    def __init__(self):
        super().__init__(ReferencePipeline.random(grid=(2, 3)).generator)
"""


class Telephone:
    """Listens on the loopback interface and counts who calls."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """Variables that make Python's and Go's clients call here, whomever they want."""
        here = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        return {**{name: here for name in names}, "NO_PROXY": "", "no_proxy": "", "WANDB_BASE_URL": "http://wandb.test"}

    def _listen(self) -> None:
        while True:
            caller, _ = self._server.accept()
            caller.settimeout(5)
            try:
                self.calls.append(caller.recv(200))
            except OSError as failure:
                self.calls.append(repr(failure).encode())
            finally:
                caller.close()


@pytest.fixture(scope="session")
def telephone() -> Telephone:
    """A proxy that counts its calls."""
    return Telephone()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, telephone: Telephone) -> Iterator[SimpleNamespace]:
    """``folder`` and ``records`` of a run, ``stderr``, and the ``calls`` it made."""
    project = tmp_path_factory.mktemp("project")
    (project / "pipeline").mkdir()
    (project / "pipeline" / "__init__.py").write_text("")
    (project / "pipeline" / "causal_inference.py").write_text(MODEL)
    (project / "inference.py").write_text(SCRIPT)
    named = [word for name in ("tensorboard", "wandb", "rerun") for word in ("--observer", name)]
    command = [sys.executable, "-m", "tokentrim_hooks", "run", "--out", "log", "--sensitivity", "0", *named]
    done = subprocess.run(
        [*command, "--quiet", "inference.py"],
        cwd=project,
        env={**clean_environment(), **telephone.environment()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = (project / "log" / "chunks.jsonl").read_text().splitlines()
    records = [ChunkRecord(**json.loads(line)) for line in lines]
    assert len(records) == 24 and {(r.video, r.sample) for r in records} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert any(r.pruned for r in records) and any(r.severity is None for r in records), "both kinds are needed"
    yield SimpleNamespace(folder=project / "log", records=records, stderr=done.stderr, calls=list(telephone.calls))
