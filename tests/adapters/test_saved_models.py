"""A patched model that was saved or copied is the model: its file loads where this package cannot be imported."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
import subprocess
import sys
import zipfile

import pytest
import torch
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
OURS = ("tokentrim_hooks", "tokentrim_hooks_adapters")

ELSEWHERE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tokentrim_hooks", "tokentrim_hooks_adapters"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
for file in sys.argv[1:]:
    module, kwargs, expected = torch.load(file, weights_only=False)
    with torch.no_grad():
        got = module(**kwargs)
    torch.testing.assert_close(got[0], expected, rtol=1e-5, atol=1e-5)
assert not [name for name in sys.modules if name.startswith("tokentrim_hooks")]
print("loaded and ran")
"""


def first_call(target, pipeline):
    """The keyword arguments of the first call, its caches as they were then."""
    seen = []

    def remember(module, args, kwargs):
        assert not args
        if not seen:
            seen.append(copy.deepcopy(kwargs))

    mine = target.denoiser(pipeline).register_forward_pre_hook(remember, with_kwargs=True)
    target.run(pipeline)
    mine.remove()
    return seen[0]


def names_in(stream):
    """What a pickle imports, as ``module name``; strings too, which is where protocol 4 keeps the names."""
    return {str(argument) for _, argument, _ in pickletools.genops(stream) if isinstance(argument, str)}


def ours_in(module):
    file = io.BytesIO()
    torch.save(module, file)
    with zipfile.ZipFile(file) as archive:
        saved = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    found = names_in(saved) | names_in(pickle.dumps(module))
    return {name for name in found if name.startswith(OURS) and "tokentrim_hooks.reference" not in name}


@pytest.fixture
def pruned(target):
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        target.run(pipeline)
        assert handle.report.triggers
        yield pipeline


@each_target
def test_a_saved_model_names_nothing_of_ours(target, pruned):
    denoiser = target.denoiser(pruned)
    assert denoiser._forward_hooks, "the patch is on"
    for module in (denoiser, copy.deepcopy(denoiser), copy.copy(denoiser)):
        assert ours_in(module) == set()


def save_pruned(target, path):
    """The denoiser of a pruned pipeline, patch on, with a call of it and what that gives unpatched."""
    pipeline, plain = target.make(), target.make()
    kwargs = first_call(target, plain)
    with torch.no_grad():
        expected = target.denoiser(plain)(**copy.deepcopy(kwargs))[0]
    with tokentrim.patched(pipeline, POLICY) as handle:
        target.run(pipeline)
        assert handle.report.triggers
        torch.save((target.denoiser(pipeline), kwargs, expected), path)


def test_files_load_and_run_where_we_are_not_installed(tmp_path):
    """In one process for all, which blocks our import; the reference model is left out, being ours."""
    files = [tmp_path / f"{target.name}.pt" for target in TARGETS[1:]]
    for target, file in zip(TARGETS[1:], files, strict=True):
        save_pruned(target, file)
    command = [sys.executable, "-c", ELSEWHERE, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout.strip() == "loaded and ran", done.stderr[-2000:]


@each_target
def test_what_was_loaded_is_the_unpatched_model(target, pruned):
    file = io.BytesIO()
    torch.save(target.denoiser(pruned), file)
    file.seek(0)
    plain, other = target.make(), target.make()
    setattr(other, target.part, torch.load(file, weights_only=False))
    assert not tokentrim.is_patched(target.denoiser(other))
    assert torch.equal(target.run(other), target.run(plain))
