"""The node pack for ComfyUI installs offline, its adapter is found by its entry point, and its own tests pass."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "comfyui"
OURS = {"ApplyTokenTrim", "TokenTrimReport"}


@pytest.fixture(scope="module")
def target(install):
    return install(EXAMPLE)


def test_the_adapter_is_found(python, target):
    script = "import tokentrim_hooks as t; print([i.distribution for i in t.adapters() if i.name == 'comfyui-ar'])"
    assert python(target, "-c", script).strip() == "['comfyui-tokentrim 0.1.0']"


def test_its_own_tests_pass(python, target):
    out = python(target, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(EXAMPLE / "tests"))
    assert "passed" in out and "failed" not in out and "skipped" not in out


def read(*parts):
    return json.loads(EXAMPLE.joinpath(*parts).read_text(encoding="utf-8"))


def test_the_workflow_in_api_format_uses_the_nodes():
    workflow = read("workflow_api.json")
    assert {node["class_type"] for node in workflow.values()} >= OURS
    for node in workflow.values():
        links = [value for value in node["inputs"].values() if isinstance(value, list)]
        assert all(source in workflow and isinstance(slot, int) for source, slot in links)
        assert node["_meta"]["title"]


def test_the_template_of_the_frontend_is_the_same_workflow():
    """ComfyUI lists example_workflows among its templates, which it reads in the frontend's own format only."""
    api, canvas = read("workflow_api.json"), read("example_workflows", "tokentrim_ar_video.json")
    by_id = {str(node["id"]): node for node in canvas["nodes"]}
    types = {key: node["type"] for key, node in by_id.items()}
    assert types == {key: node["class_type"] for key, node in api.items()}
    linked = {
        (str(target), by_id[str(target)]["inputs"][place]["name"], str(source), slot)
        for _, source, slot, target, place, _ in canvas["links"]
    }
    inputs = [(key, name, value) for key, node in api.items() for name, value in node["inputs"].items()]
    wanted = {(key, name, *value) for key, name, value in inputs if isinstance(value, list)}
    assert linked == wanted
    for key, node in api.items():
        widgets = [value for value in node["inputs"].values() if not isinstance(value, list)]
        assert all(value in by_id[key]["widgets_values"] for value in widgets), key
