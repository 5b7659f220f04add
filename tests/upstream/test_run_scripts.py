"""``tokentrim run`` on the real inference scripts of upstream repositories, unedited, each in processes of its own.

What is real and what stands in for a GPU, for weights and for packages is said in ``cpu_shims.py``. Command lines are
those of the repositories' READMEs, with short videos and with paths of our own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import NOT_CHECKED, checkout, folder_of

from tokentrim_hooks.report.record import Report, read_report

pytestmark = [pytest.mark.upstream, pytest.mark.slow]
HERE = Path(__file__).parent
PROMPT = "A lighthouse in a storm"
EAGER = ("--sensitivity", "0", "--warmup", "1")
"""A policy that prunes wherever drift is above its mean so far."""


@dataclass(frozen=True)
class Script:
    """A script: its repository, its command line in a folder of ours, and what its run must leave.

    ``chunks`` are the chunks of all its videos, ``frames`` those of the first one's pictures before the earliest chunk
    that could be pruned (0: chunks overlap in time, so no picture is sure to be the same).
    """

    repository: str
    path: str
    arguments: Callable[[Path], list[str]]
    chunks: int
    frames: int = 12 * 2 - 3

    def __str__(self) -> str:
        return f"{self.repository}/{self.path}"


def by_flags(configuration: str, frames: int = 12, *more: str) -> Callable[[Path], list[str]]:
    """Arguments of Self-Forcing's script and of its forks."""

    def arguments(folder: Path) -> list[str]:
        return [
            *("--config_path", f"configs/{configuration}.yaml", "--output_folder", str(folder / "videos")),
            *("--checkpoint_path", str(folder / "weights" / "model.pt"), "--data_path", str(folder / "prompts.txt")),
            *("--num_output_frames", str(frames), *more),
        ]

    return arguments


def by_file(configuration: str, **changes: Any) -> Callable[[Path], list[str]]:
    """Arguments of scripts that take all from a configuration: upstream's own, with paths of ours."""

    def arguments(folder: Path) -> list[str]:
        from omegaconf import OmegaConf  # what the scripts themselves need

        options = OmegaConf.load(configuration)
        paths = {"data_path": folder / "prompts.txt", "output_folder": folder / "videos"}
        paths |= {"generator_ckpt": folder / "weights" / "model.pt"}
        options.update({name: str(path) for name, path in paths.items()})
        options.update({"num_output_frames": 15, "lora_ckpt": None, **changes})
        OmegaConf.save(options, folder / "options.yaml")
        return ["--config_path", str(folder / "options.yaml")]

    return arguments


def causvid_flags(folder: Path) -> list[str]:
    """Arguments of CausVid's script for long videos: two rollouts."""
    return [
        *("--config_path", "configs/wan_causal_dmd.yaml", "--checkpoint_folder", str(folder / "weights")),
        *("--output_folder", str(folder / "videos"), "--prompt_file_path", str(folder / "prompts.txt")),
        *("--num_rollout", "2"),
    ]


SELF_FORCING = Script("Self-Forcing", "inference.py", by_flags("self_forcing_dmd", 12, "--use_ema"), 4)
SCRIPTS = [
    Script("Causal-Forcing", "inference.py", by_flags("causal_forcing_dmd_chunkwise"), 4),
    Script("infinity-rope", "inference.py", by_flags("self_forcing_dmd", 12, "--use_ema"), 4),
    Script("Reward-Forcing", "inference.py", by_flags("reward_forcing"), 4),
    # Five blocks are in flight at a time and the first one is an anchor: nothing can be pruned before the seventh.
    Script("RollingForcing", "inference.py", by_flags("rolling_forcing_dmd", 27, "--use_ema"), 9, frames=0),
    Script("LongLive-v1", "inference.py", by_file("configs/longlive_inference.yaml", adapter=None), 5),
    Script("MemFlow", "inference.py", by_file("configs/inference.yaml", adapter=None), 5),
    Script("CausVid", "minimal_inference/longvideo_autoregressive_inference.py", causvid_flags, 14),
]


class Shell:
    """Runs commands in a checkout, where torch thinks that it has a GPU; nothing is written into the checkout."""

    def __init__(self, script: Script, folder: Path) -> None:
        self.script, self.folder, self.home = script, folder, folder_of(script.repository)
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text("import cpu_shims\ncpu_shims.install()\n")
        (folder / "prompts.txt").write_text(PROMPT)
        path = [folder / "site", HERE, self.home, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **os.environ,
            **{"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"},
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        }
        save_weights(script.repository, folder / "weights")

    def python(self, *arguments: str | Path) -> str:
        """Standard error of ``python arguments...``, which must succeed."""
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=self.home, env=self.environment, timeout=1800, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr

    def video(self, *launcher: str | Path) -> torch.Tensor:
        """Run the script behind ``launcher``; return the frames of the one video that it wrote, and remove it."""
        arguments = self.with_home(self.script.arguments)
        self.python(*launcher, self.script.path, *arguments)
        (written,) = (self.folder / "videos").rglob("*.mp4")
        frames = torch.load(written)
        written.unlink()
        return frames

    def with_home(self, make: Callable[[Path], list[str]]) -> list[str]:
        """The script's arguments; upstream's configurations are found from its own folder."""
        before = Path.cwd()
        os.chdir(self.home)
        try:
            return make(self.folder)
        finally:
            os.chdir(before)

    def log(self, *options: str) -> Path:
        """The folder of a run's log; a run never takes the folder of another."""
        return self.folder / f"log{'-'.join(options)}"

    def tokentrim(self, *options: str) -> tuple[torch.Tensor, Report]:
        """The video and the log of ``tokentrim run OPTIONS SCRIPT``."""
        log = self.log(*options)
        video = self.video("-m", "tokentrim_hooks", "run", "--out", log, *options)
        return video, read_report(log)


def save_weights(repository: str, folder: Path) -> None:
    """A checkpoint for the script to load: the real model's parameters, random; other ones than it is built with."""
    name = "causvid.models.wan.causal_model" if repository == "CausVid" else "wan.modules.causal_model"
    from cpu_shims import STUBS, tiny_model

    with checkout(repository, stubs=(*STUBS, "peft")):
        model = tiny_model(importlib.import_module(name).CausalWanModel, "")
    parameters = {f"model.{name}": 0.9 * value for name, value in model.state_dict().items()}
    folder.mkdir()
    wrapped = {"generator": parameters, "generator_ema": parameters}
    torch.save(parameters if repository == "Reward-Forcing" else wrapped, folder / "model.pt")


def test_self_forcing(tmp_path: Path) -> None:
    """Observing leaves every bit of the video; an eager policy prunes; log, report and thumbnails are there."""
    shell = Shell(SELF_FORCING, tmp_path)
    plain = shell.video()
    observed, log = shell.tokentrim("--observe")
    assert torch.equal(observed, plain)
    assert len(log) == 4 and log.triggers == 0 and log.settings["adapter"] == "self-forcing"
    pruned, log = shell.tokentrim(*EAGER)
    assert_pruned(log, plain, pruned, SELF_FORCING)
    folder = shell.log(*EAGER)
    assert (folder / "report.html").stat().st_size > 10_000
    thumbnails = sorted(path.name for path in (folder / "thumbs").iterdir())
    assert thumbnails == [f"v0-c{chunk:04d}-s0.png" for chunk in range(4)]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_relatives(script: Script, tmp_path: Path) -> None:
    """The script runs, is patched, and prunes; pictures before the first prune are the unpatched run's."""
    shell = Shell(script, tmp_path)
    plain = shell.video()
    pruned, log = shell.tokentrim(*EAGER)
    assert_pruned(log, plain, pruned, script)


def assert_pruned(log: Report, plain: torch.Tensor, pruned: torch.Tensor, script: Script) -> None:
    """All chunks are logged, some were pruned, and pictures change from the first of these on, not before."""
    assert len(log) == script.chunks
    assert log.triggers > 0
    assert plain.shape == pruned.shape
    same = (plain == pruned).flatten(1).all(1)
    assert not same.all(), "a prune that changes no picture"
    assert same[: script.frames].all()


def test_lora_is_applied_to_a_patched_model(tmp_path: Path) -> None:
    """LongLive wraps its model in peft's LoRA after it was constructed, and so after it was patched."""
    if importlib.util.find_spec("peft") is None:
        pytest.skip(f"{NOT_CHECKED} with LoRA: peft is not installed")
    script = Script("LongLive-v1", "inference.py", by_file("configs/longlive_inference.yaml"), 5)
    shell = Shell(script, tmp_path)
    plain = shell.video()
    assert_pruned(shell.tokentrim(*EAGER)[1], plain, shell.tokentrim(*EAGER)[0], script)
    assert torch.equal(shell.tokentrim("--observe")[0], plain)


def test_torchrun(tmp_path: Path) -> None:
    """Two processes make a video each, as Self-Forcing's script shares prompts out, and log to a folder each."""
    shell = Shell(SELF_FORCING, tmp_path)
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\nA meadow in the wind")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tokentrim_hooks", "run")
    arguments = shell.with_home(SELF_FORCING.arguments)
    shell.python(*launcher, "--out", tmp_path / "log", *EAGER, SELF_FORCING.path, *arguments)
    assert len(list((tmp_path / "videos").iterdir())) == 2
    for rank in range(2):
        log = read_report(tmp_path / "log" / f"rank-{rank}")
        assert len(log) == 4 and log.triggers > 0
        assert (tmp_path / "log" / f"rank-{rank}" / "report.html").is_file()
    assert not (tmp_path / "log" / "chunks.jsonl").exists()


FRAMEPACK = """
import sys

import torch

torch.cuda.current_device = lambda: 0
from framepack_script import Loop, build, import_repository

kind, sample = import_repository(sys.argv[1])
if sys.argv[3] == "save":
    build(kind).save_pretrained(sys.argv[2])
    sys.exit()
from diffusers_helper.memory import DynamicSwapInstaller

transformer = kind.from_pretrained(sys.argv[2], torch_dtype=torch.float32).cpu()
DynamicSwapInstaller.install_model(transformer.eval(), device="cpu")
with torch.no_grad():
    torch.save(Loop(transformer, sample).run(inverted=False, sections=6), sys.argv[3])
"""
"""The lines of ``demo_gradio_f1.py`` that make a video; the demo itself is a web server."""


def test_framepack_s_transformer(tmp_path: Path) -> None:
    """It is patched when constructed, before its weights are loaded and its class is swapped."""
    (tmp_path / "demo.py").write_text(FRAMEPACK)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(out: str, *launcher: str) -> None:
        command = [sys.executable, *launcher, "demo.py", str(folder_of("FramePack")), "model", out]
        done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=1800, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    run("save")
    run("plain.pt")
    run("observed.pt", "-m", "tokentrim_hooks", "run", "--out", "observed", "--observe")
    run("pruned.pt", "-m", "tokentrim_hooks", "run", "--out", "log", *EAGER)
    plain, observed, pruned = (torch.load(tmp_path / f"{name}.pt") for name in ("plain", "observed", "pruned"))
    assert torch.equal(plain, observed) and not torch.equal(plain, pruned)
    log = read_report(tmp_path / "log")
    assert len(log) == 6 and log.triggers > 0 and log.settings["adapter"] == "framepack-original"
