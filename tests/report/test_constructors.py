"""The classes that ``tokentrim run`` looks at are there: in diffusers, in upstream checkouts, in foreign packages."""

import ast
import importlib
import os
from pathlib import Path

import pytest

from tokentrim_hooks.plugins import usable_adapters

ADAPTERS = {
    info.name: info.loaded.constructors
    for info in usable_adapters()
    if info.distribution.startswith("tokentrim-hooks ")
}
IN_DIFFUSERS = sorted({place for places in ADAPTERS.values() for place in places if place.startswith("diffusers.")})

UPSTREAM = {
    "Self-Forcing": "self-forcing",
    "Causal-Forcing": "self-forcing",
    "infinity-rope": "infinity-rope",
    "Reward-Forcing": "reward-forcing",
    "realtime-video": "krea-realtime",
    "RollingForcing": "rolling-forcing",
    "LongLive-v1": "longlive",
    "MemFlow": "memflow",
    "MemRoPE": "memrope",
    "RollingSink": "rolling-sink",
    "CausVid": "causvid",
    "MAGI-1": "magi-1",
    "FramePack": "framepack-original",
}
ROOT = Path(__file__).parents[2]


def classes_in(folder, place):
    """Names of the classes that the module of ``place`` defines, read from its source below ``folder``."""
    module = folder / (place.partition(":")[0].replace(".", "/") + ".py")
    if not module.is_file():
        return set()
    return {node.name for node in ast.parse(module.read_text()).body if isinstance(node, ast.ClassDef)}


def found_in(folder, name):
    return [place for place in ADAPTERS[name] if place.partition(":")[2] in classes_in(folder, place)]


def test_every_adapter_names_the_classes_that_scripts_construct():
    assert all(ADAPTERS.values())
    assert len(IN_DIFFUSERS) >= 7 and set(UPSTREAM.values()) <= set(ADAPTERS)


@pytest.mark.parametrize("place", IN_DIFFUSERS)
def test_class_is_in_diffusers(place):
    module, _, name = place.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as failure:
        pytest.skip(f"not checked: this diffusers has no {failure.name}")
    assert cls.__module__ == module, "scripts may import it from elsewhere, but it must be defined here"


@pytest.mark.upstream
@pytest.mark.parametrize("repository", UPSTREAM)
def test_class_is_in_its_repository(repository):
    folder = Path(os.environ.get("TOKENTRIM_UPSTREAM") or "nowhere") / repository
    if not folder.is_dir():
        pytest.skip(f"not checked against the real {repository}: TOKENTRIM_UPSTREAM has no folder {repository}")
    assert found_in(folder, UPSTREAM[repository])


@pytest.mark.parametrize("name, place", [("fastvideo", "fv"), ("streamdiffusion-v2", "sd2")])
def test_class_is_in_the_foreign_package(name, place):
    folder = Path(os.environ.get("TOKENTRIM_THIRD_PARTY") or ROOT / "third_party") / place
    if not folder.is_dir():
        pytest.skip(f"not checked against the real {name}: run `make test-models`")
    assert found_in(folder, name) == list(ADAPTERS[name])
