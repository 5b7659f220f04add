"""What the wheel holds, and what importing it does."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Contents by name of a wheel built offline from a copy of the checkout, which has to be small."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "tokentrim_hooks", "adapters"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    if not (copy / "README.md").exists():
        (copy / "README.md").write_text("tokentrim-hooks\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel", "--no-deps",
               "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(copy)]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    (path,) = out.glob("*.whl")
    assert path.stat().st_size < 6_000_000
    with zipfile.ZipFile(path) as archive:
        yield {name: archive.read(name) for name in archive.namelist()}


def test_top_level_names(wheel):
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"tokentrim_hooks", "tokentrim_hooks_adapters"}


def test_every_module_is_in_the_wheel(wheel):
    for folder, package in (("tokentrim_hooks", "tokentrim_hooks"), ("adapters", "tokentrim_hooks_adapters")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder).as_posix()}" in wheel
    for name in ("tokentrim_hooks/py.typed", "tokentrim_hooks_adapters/py.typed"):
        assert name in wheel


def test_every_template_is_in_the_wheel(wheel):
    templates = [file.relative_to(ROOT).as_posix() for file in (ROOT / "tokentrim_hooks").rglob("*.j2")]
    assert len(templates) == 2 and set(templates) <= wheel.keys()


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
