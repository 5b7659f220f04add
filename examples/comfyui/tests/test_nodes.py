"""What ComfyUI reads of the nodes, and what they do that needs no ComfyUI; the rest is in tests/upstream."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokentrim_comfyui.adapter
import torch
from tokentrim_comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from tokentrim_comfyui.picture import chart
from tokentrim_comfyui.sampling import Sampling
from tokentrim_comfyui.settings import choices, policy_of

import tokentrim_hooks as tokentrim

NODES = NODE_CLASS_MAPPINGS.values()


def records(video: int, samples: int = 1):
    """Six chunks, the fourth of which was pruned."""
    return [
        tokentrim.ChunkRecord(
            video=video, chunk=chunk, sample=sample, start=2 * chunk, frames=2, phases={"first": 1},
            severity=1.0 + chunk * 0.1 + video, mean=1.0, threshold=1.35,
            pruned=chunk == 4, accepted_severity=1.2, tokens=(0, 1), grid=(2, 3),
        )
        for chunk in range(1, 6)
        for sample in range(samples)
    ]  # fmt: skip


def test_comfyui_finds_the_nodes_in_the_folder():
    door = Path(__file__).parents[1] / "__init__.py"
    spec = importlib.util.spec_from_file_location("custom_node", door, submodule_search_locations=[str(door.parent)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_node"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "custom_node"]:
            del sys.modules[name]
    assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("node", NODES)
def test_every_socket_and_widget_is_explained(node):
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional", "hidden"}
    for name, (kind, options) in {**inputs["required"], **inputs.get("optional", {})}.items():
        assert len(options["tooltip"]) > 20, name
        assert isinstance(kind, str) or options["default"] in kind, name
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES) and node.DESCRIPTION
    assert node.CATEGORY == "model/tokentrim" and callable(getattr(node, node.FUNCTION))


def test_names_are_the_users():
    assert NODE_DISPLAY_NAME_MAPPINGS == {"ApplyTokenTrim": "Apply TokenTrim", "TokenTrimReport": "TokenTrim Report"}


def test_the_paper_s_policy_is_the_default_and_what_the_model_does_not_take_is_not_offered():
    offered = choices()
    assert offered[0] == "drift" and {"observe", "commit-window", "soft-prune"} <= set(offered)
    assert "flowmo" not in offered
    assert policy_of("drift", 1.0) == tokentrim.DriftPolicy()


@pytest.mark.parametrize("name", choices())
def test_strength_one_is_the_policy_s_own_default_and_zero_only_measures(name):
    assert policy_of(name, 1.0) == tokentrim.make_policy(name)
    assert policy_of(name, 0.0) == tokentrim.ObservePolicy()
    assert policy_of(name, 10.0), "the widget's largest number is a setting, too"


def test_strength_and_options():
    assert policy_of("drift", 0.5).fraction == 0.05 and policy_of("drift", 20).fraction == 1.0
    assert policy_of("soft-prune", 0.5).weight == 0.75 and policy_of("latent-moments", 2).strength == 0.7
    policy = policy_of("drift", 0.5, '{"sensitivity": 1.5, "fraction": 0.2}')
    assert (policy.sensitivity, policy.fraction) == (1.5, 0.2)


@pytest.mark.parametrize(
    ("options", "failure"),
    [("{", ValueError), ("[1]", ValueError), ('{"sensitivity": -1}', ValueError), ('{"nonsense": 1}', TypeError)],
)
def test_options_that_are_none_are_refused(options, failure):
    with pytest.raises(failure):
        policy_of("drift", 1.0, options)


def test_the_chart_is_an_image_of_the_latest_video():
    both = tokentrim.Report({"policy.warmup": 2}, [*records(0), *records(1)])
    image = chart(both)
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[3] == 3 and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1 and 0.5 < image.mean() < 0.99
    assert torch.equal(image, chart(tokentrim.Report({"policy.warmup": 2}, records(1))))
    assert image.shape != (again := chart(tokentrim.Report({}, records(0)))).shape or not torch.equal(image, again)
    assert chart(tokentrim.Report({}, records(0, samples=2))).shape[0] == 2
    assert chart(tokentrim.Report()).shape[0] == 1, "nothing was judged: words instead of a curve"


def test_latents_have_the_report_of_their_own_sampling():
    sampling = Sampling((tokentrim.ObservePolicy(),))
    with pytest.raises(ValueError, match="not sampled yet"):
        sampling.report_of(torch.zeros(1))
    made = []
    for number in range(20):

        def sample(number=number):
            sampling.reports.append((lambda: None, tokentrim.Report({"number": number})))
            return torch.full((2,), float(number))

        made.append(sampling.outer(sample))
    assert [sampling.report_of(latents).settings["number"] for latents in made[-16:]] == list(range(4, 20))
    assert sampling.report_of(made[0]).settings["number"] == 19, "too long ago, so the latest"
    assert sampling.report_of(made[-2].view(1, 2)).settings["number"] == 18
    assert len(sampling.reports) == 16


@pytest.mark.parametrize("stranger", [object(), torch.nn.Linear(1, 1), None])
def test_the_adapter_refuses_strangers_with_a_reason(stranger):
    answer = tokentrim_comfyui.adapter.ComfyAR.probe(stranger)
    assert isinstance(answer, tokentrim.NoMatch) and "ComfyUI" in answer.reason


class WanVideoModel:
    """What WanVideoWrapper's loader gives, as far as it is looked at: a BaseModel with a dict of what it loaded."""

    def __init__(self):
        self.pipeline, self.diffusion_model = {}, torch.nn.Identity()

    def _apply_model(self, x):
        return x


def test_a_model_of_wan_video_wrapper_is_refused_by_name():
    """Its socket does not fit either, so this is for workflows that go around types."""
    with pytest.raises(tokentrim.TokenTrimError, match="WanVideoWrapper, whose own sampler"):
        tokentrim.patch(SimpleNamespace(model=WanVideoModel()), adapter=tokentrim_comfyui.adapter.ComfyAR)
