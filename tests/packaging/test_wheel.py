"""What the wheel holds, and what importing it does."""

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the checkout, as far as it is built."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "tokentrim_hooks", "adapters"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def built(copy, tmp_path_factory):
    """A wheel built offline by ``python -m build``, from a source archive made of a copy of the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", str(out)]
    subprocess.run([*command, str(copy)], check=True, timeout=300, capture_output=True)
    (path,) = out.glob("*.whl")
    assert path.stat().st_size < 6_000_000 and len(list(out.glob("*.tar.gz"))) == 1
    return path


@pytest.fixture(scope="module")
def wheel(built):
    """Its contents by name."""
    with zipfile.ZipFile(built) as archive:
        yield {name: archive.read(name) for name in archive.namelist()}


def test_top_level_names(wheel):
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"tokentrim_hooks", "tokentrim_hooks_adapters"}


def test_every_module_is_in_the_wheel(wheel):
    for folder, package in (("tokentrim_hooks", "tokentrim_hooks"), ("adapters", "tokentrim_hooks_adapters")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder).as_posix()}" in wheel
    for name in ("tokentrim_hooks/py.typed", "tokentrim_hooks_adapters/py.typed", "tokentrim_hooks/__init__.pyi"):
        assert name in wheel


def test_every_template_is_in_the_wheel(wheel):
    templates = [file.relative_to(ROOT).as_posix() for file in (ROOT / "tokentrim_hooks").rglob("*.j2")]
    assert len(templates) == 3 and set(templates) <= wheel.keys()


def test_weights_and_their_figures_are_in_the_wheel(wheel):
    folder = "tokentrim_hooks/reference/weights"
    kept = {f"{folder}/{file.name}" for file in (ROOT / folder).iterdir()}
    assert f"{folder}/fading.safetensors" in kept
    assert {name for name in wheel if name.startswith(folder) or name.endswith(".safetensors")} == kept


def test_entry_points_name_modules_of_the_wheel(wheel):
    (text,) = (content for name, content in wheel.items() if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(text.decode())
    points = dict(parser["tokentrim_hooks"])
    for module in points.values():
        assert module.replace(".", "/") + ".py" in wheel, f"entry point {module} has no file"
    files = {name for name in wheel if name.endswith(".py") and b"\n@hookimpl\n" in wheel[name]}
    assert files == {module.replace(".", "/") + ".py" for module in points.values()}, "a plugin has no entry point"


def python(code, cwd=ROOT.parent):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd)


def test_importing_has_no_side_effects():
    code = """
import sys, threading, warnings
import torch
threads, state = torch.get_num_threads(), torch.get_rng_state()
function, filters, before = torch.nn.functional.scaled_dot_product_attention, list(warnings.filters), set(sys.modules)
import tokentrim_hooks
heavy = {"diffusers", "transformers", "matplotlib", "accelerate", "hypothesis", "pytest", "torch._dynamo",
         "tokentrim_hooks_adapters"}
print(sorted(heavy & (set(sys.modules) - before)))
assert torch.get_num_threads() == threads and torch.equal(state, torch.get_rng_state())
assert torch.nn.functional.scaled_dot_product_attention is function
assert threading.active_count() == 1 and warnings.filters == filters
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"import tokentrim_hooks imports {done.stdout}"


def test_the_adapters_folder_is_no_package_of_its_own():
    done = python("import adapters", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "tokentrim_hooks_adapters" in done.stderr


def test_the_readmes_git_address_is_one_that_pip_takes(copy, tmp_path):
    """Of a repository with these files, by the line that the README shows; nothing is installed."""
    lines = (ROOT / "README.md").read_text().splitlines()
    (line,) = (line.removeprefix("$ ") for line in lines if line.startswith("$ pip install") and "git+" in line)
    address = shlex.split(line, comments=True)[2].replace("$PWD", str(copy))
    somebody = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for words in (["init", "--quiet"], ["add", "."], [*somebody, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *words], cwd=copy, check=True)
    dry = ["install", "--dry-run", "--no-deps", "--no-build-isolation", "--quiet", "--report", str(tmp_path / "report")]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *dry, "--ignore-installed", address]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "report").read_text())["install"]
    assert found["metadata"]["name"] == "tokentrim-hooks" and found["download_info"]["vcs_info"]["vcs"] == "git"


ALONE = """
import sys
import torch
import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference import ReferencePipeline

pipeline = ReferencePipeline.random(grid=(2, 2))
noise = torch.randn(1, 24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
noise[:, 12:] *= 3
with tokentrim.patched(pipeline, tokentrim.DriftPolicy(sensitivity=0)) as handle:
    pipeline.inference(noise)
print(handle.report.triggers > 0, len(handle.report), len(tokentrim.adapters()) > 10)

from tokentrim_hooks.cli.main import main

open("video.mp4", "w").close()
for words in ("metrics video.mp4", "try alone.py", "report .", "demo", "compare --reference", "bench", "run none.py"):
    print(main(words.split()), file=sys.stderr)
"""


def needs(name):
    """Distributions that ``name`` needs without extras, itself included."""
    wanted, found = [name], {}
    while wanted:
        name = wanted.pop()
        if canonicalize_name(name) not in found:
            found[canonicalize_name(name)] = distribution(name)
            lines = [Requirement(line) for line in found[canonicalize_name(name)].requires or []]
            wanted += [line.name for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]
    return found


def fresh(folder, built):
    """A folder with the wheel, torch, and the few small packages that the wheel asks for, but no more."""
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder)
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    asked = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]
    core = [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    for dist in {k: v for name in core if name not in MODELS for k, v in needs(name).items()}.values():
        for top in {file.parts[0] for file in dist.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(dist.locate_file(top))
    return folder


MODELS = {"diffusers", "transformers"}
"""Asked for, so that models which need them have them; nothing of ours imports them."""


def test_the_wheel_patches_with_torch_alone(built, tmp_path):
    """Not even NumPy is there; nor diffusers and transformers, which some of the models need."""
    (tmp_path / "alone.py").write_text(ALONE)
    site = fresh(tmp_path / "site", built)
    assert not {"numpy", "diffusers", "transformers"} & {path.name for path in site.iterdir()}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-W", "ignore", "alone.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "True 8 True\n", done.stderr
    *told, run = done.stderr.split("\n2\n")[:-1]
    assert run == "tokentrim run: no such script: none.py\nGive its path; a module's name goes behind -m."
    hint = re.compile(r"tokentrim \w+: this needs .* not installed\.\nInstall them: pip install .*")
    assert len(told) == 6 and all(map(hint.fullmatch, told)), told
