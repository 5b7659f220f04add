"""The examples run: the quick start whole, Self-Forcing's as far as it goes without a GPU and weights."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference.pipeline import ReferencePipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = ["--checkout", "somewhere", "--prompt", "a boat"]


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("self_forcing_example", EXAMPLES / "self_forcing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart_is_short():
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 18


def test_self_forcing_help():
    done = run(EXAMPLES / "self_forcing.py", "--help")
    assert done.returncode == 0 and "--checkpoint_path" in done.stdout


def test_a_wrong_checkout_is_named(tmp_path):
    done = run(EXAMPLES / "self_forcing.py", "--checkout", tmp_path, "--prompt", "x", "--out", tmp_path / "run")
    assert done.returncode == 1 and "is not a checkout of Self-Forcing" in done.stderr


def test_policy_follows_the_options(example):
    assert example.policy(example.arguments(OPTIONS)) == tokentrim.DriftPolicy()
    observing = example.arguments([*OPTIONS, "--observe", "--fraction", "0.2"])
    assert example.policy(observing) == tokentrim.ObservePolicy(fraction=0.2)


def test_generate_patches_writes_the_report_and_unpatches(example, tmp_path):
    pipeline = ReferencePipeline.random(grid=(2, 2))
    noise = torch.randn(1, 24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flags = {"pruned": [], "observed": ["--observe"], "plain": ["--unpatched"]}
    videos = {}
    for name, extra in flags.items():
        options = example.arguments([*OPTIONS, "--sensitivity", "0", "--out", str(tmp_path / name), *extra])
        videos[name] = example.generate(pipeline, options, noise)
        assert not tokentrim.is_patched(pipeline)
    assert torch.equal(videos["observed"], videos["plain"])
    assert not torch.equal(videos["pruned"], videos["plain"])
    assert len((tmp_path / "pruned" / "chunks.jsonl").read_text().splitlines()) == 8
    assert not (tmp_path / "plain").exists()
