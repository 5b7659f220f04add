"""Installing this package beside a supported model moves none of the versions that the model pins.

The pins are those of the models' own requirement files. What our ranges say of them is looked at always, offline; what
pip makes of all of it together, where there is an index.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PINS = {
    "Self-Forcing": ["diffusers==0.31.0", "transformers==4.49.0", "av==13.1.0"],
    "Causal-Forcing": ["diffusers==0.31.0", "transformers==4.49.0", "av==13.1.0"],
    "LongLive": ["diffusers==0.31.0", "transformers==4.49.0", "av==13.1.0"],
    "Krea": ["diffusers==0.31.0", "transformers==4.54.1", "av==13.1.0", "click==8.2.1", "einops==0.8.1",
             "lazy-loader==0.4", "matplotlib==3.10.3", "pillow==10.4.0"],
    "MAGI-1": ["diffusers==0.29.2", "transformers==4.42.3", "matplotlib==3.10.1", "numpy==1.26.4"],
    "FramePack": ["diffusers==0.33.1", "transformers==4.46.2", "pillow==11.1.0", "av==12.1.0", "numpy==1.26.2"],
}  # fmt: skip
"""Where a model gives a lowest version only, that one; numpy 1.24.4 of some has no wheel for this Python."""
OPENCV = {"opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"}


def project():
    """The ``[project]`` table."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def asked_for(*extras):
    """Our own requirements, those of extras included, by name."""
    table = project()
    lines = [*table["dependencies"], *(line for extra in extras for line in table["optional-dependencies"][extra])]
    return {found.name: found.specifier for line in lines if (found := Requirement(line)).name != "tokentrim-hooks"}


@pytest.mark.parametrize("model", PINS)
def test_no_range_of_ours_excludes_a_model_s_pin(model):
    ours = asked_for("report", "metrics", "demo")
    for pin in map(Requirement, PINS[model]):
        (exact,) = pin.specifier
        assert exact.version in ours.get(pin.name, SpecifierSet()), f"{model} pins {pin}, we ask for {ours[pin.name]}"


def test_the_floors_are_the_lowest_pins():
    ours = asked_for()
    assert (str(ours["diffusers"]), str(ours["transformers"])) == (">=0.29", ">=4.42")


def test_no_user_is_made_to_install_another_opencv():
    assert not OPENCV & asked_for("report", "metrics", "demo").keys()
    assert "imageio-ffmpeg" not in asked_for("report", "metrics", "demo", "test")


def has_index():
    """Whether pip reaches an index: it is asked for one small package."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet",
               "--retries", "0", "--timeout", "10", "--dest", os.devnull, "einops==0.8.1"]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
    return "No matching distribution" not in said and "Could not find a version" not in said


@pytest.fixture(scope="module")
def index():
    if not has_index():
        pytest.skip("not checked: what pip resolves beside the models' pins, for no package index can be reached")


@pytest.mark.slow
@pytest.mark.parametrize("model", PINS)
def test_a_dry_run_keeps_a_model_s_pins(model, index, tmp_path):
    report = tmp_path / "report.json"
    dry = ["install", "--dry-run", "--quiet", "--no-build-isolation", "--only-binary", ":all:", "--report", str(report)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *dry, str(ROOT), *PINS[model]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-2000:]
    installed = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    chosen = {item["name"].lower(): item["version"] for item in installed}
    for pin in map(Requirement, PINS[model]):
        (exact,) = pin.specifier
        assert chosen.get(pin.name, exact.version) == exact.version, (model, str(pin), chosen)
    assert not OPENCV & chosen.keys()
