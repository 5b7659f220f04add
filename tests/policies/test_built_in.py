"""Every built-in policy through the kit that authors of policies use, and found by its name."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from by_hand import make, run

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy import built_in
from tokentrim_hooks.testing import PolicyConformance

OFFERED = built_in.tokentrim_policies()
STRENGTH = {"strength": [-0.1, 1.5, "half"]}
WRONG = {
    "drift": {"fraction": [0, 1.5], "sensitivity": [-1.0], "warmup": [-1, 1.5]},
    "adaptive": {
        "fraction": [0, 1.5],
        "sensitivity": [-1.0],
        "floor": [-1.0],
        "fresh": [-1.0],
        "reach": [-1, 0.5],
        "warmup": [-1, 1.5],
    },
    "observe": {"fraction": [0, 1.5], "sensitivity": [-1.0]},
    "commit-window": {"frames": [-1, 1.5], "anchors": [1]},
    "flowmo": {
        "noise_band": [-0.1, 1.5],
        "step": [-1.0, "far"],
        "iterations": [-1, 0.5],
        "of": ["flow"],
        "optimiser": ["sgd"],
    },
    "frame-eviction": {"similarity": [-1.1, 2, "much"], "keep": [-1, 0.5]},
    "latent-moments": {**STRENGTH, "channels": [(-1,)]},
    "late-mean": {"last": [0, 1.5]},
    "soft-prune": {"weight": [-0.1, 1.5], "keep": [-1, 0.5], "anchors": [1]},
    "row-moments": {**STRENGTH, "of": [(), ("q",)], "reference": ["last"]},
}
NEUTRAL = {
    "observe": {},
    "flowmo": {"step": 0.0},
    "frame-eviction": {"similarity": -1.0},
    "latent-moments": {"strength": 0.0},
    "late-mean": {"last": 1},
    "row-moments": {"strength": 0.0},
    "soft-prune": {"weight": 1.0},
}


class OnTheReferenceModel(PolicyConformance):
    def make_model(self):
        return make(sink_size=2, num_frame_per_block=3)

    def run(self, model, seed):
        return run(model, seed, chunks=6)


def on_trial(name):
    policy = OFFERED[name]
    neutral = policy(**NEUTRAL[name]) if name in NEUTRAL else None
    members = {"policy": policy(), "wrong": WRONG[name], "neutral": neutral}
    return type(f"Test{policy.__name__}", (OnTheReferenceModel,), members)


globals().update({f"Test{policy.__name__}": on_trial(name) for name, policy in OFFERED.items()})


def test_all_public_policies_are_offered():
    public = {value for value in (getattr(tokentrim, name) for name in tokentrim.__all__) if isinstance(value, type)}
    no_methods = {tokentrim.Policy, tokentrim.Watched}  # the base, and what wraps a policy
    assert set(OFFERED.values()) == {cls for cls in public if issubclass(cls, tokentrim.Policy)} - no_methods


@pytest.mark.parametrize("name", sorted(set(OFFERED) - {"drift", "observe"}))
def test_a_method_is_one_file_of_less_than_80_lines(name):
    """The paper's policy and the one that only measures as it does share a file, which is longer."""
    lines = Path(inspect.getfile(OFFERED[name])).read_text().splitlines()
    assert len(lines) < 80 and sum(line.startswith("class ") for line in lines) == 1


SOURCES = r"arXiv\s+\d{4}\.\d{5}|repository\s+[\w-]+/[\w-]+|[Ss]ource|moment pin of chained clips"


@pytest.mark.parametrize("name", OFFERED)
def test_a_method_says_where_it_comes_from(name):
    module = inspect.getmodule(OFFERED[name]).__doc__
    assert re.search(SOURCES, OFFERED[name].__doc__ + module)


@pytest.mark.parametrize("name", sorted(set(OFFERED) - {"observe"}))
def test_a_method_has_a_section_with_purpose_cost_finding_source_and_picture(name):
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    section = re.split(r"^### ", page, flags=re.MULTILINE)
    (own,) = [part for part in section if part.startswith(f"`{OFFERED[name].__name__}`\n")]
    for words in ("**What it is for.**", "**What it costs.**", "**Where it was seen to help.**"):
        assert words in own
    if name != "drift":  # explained above, picture and source included
        assert "**Source.**" in own and "](pictures/policy-" in own


@pytest.mark.parametrize("name", OFFERED)
def test_they_come_through_the_entry_point(name):
    (info,) = [info for info in tokentrim.policies() if info.name == name]
    assert info.policy is OFFERED[name] and info.distribution.startswith("tokentrim-hooks ") and not info.error
    assert info.hooks and info.summary.endswith((".", ":"))
    assert tokentrim.make_policy(name, persist=False) == dataclasses.replace(OFFERED[name](), persist=False)


class TestTheKitCatches:
    """Each mistake of an author is one that the kit finds, by the test that is there for it."""

    @dataclasses.dataclass(frozen=True)
    class Good(tokentrim.Policy):
        """Pulls x0 to nothing."""

        scale: float = 0.5

        def __post_init__(self):
            super().__post_init__()
            if not 0 <= self.scale <= 1:
                raise ValueError("scale must be in [0, 1]")

        def correct(self, chunk):
            return chunk.prediction * self.scale

    def trial(self, policy, **members):
        kit = type("Trial", (PolicyConformance,), {"policy": policy, "wrong": {"scale": [2.0]}, **members})()
        return {name.removeprefix("test_"): getattr(kit, name) for name in dir(kit) if name.startswith("test_")}

    def spoilt(self, **members):
        return dataclasses.dataclass(frozen=True)(type("Spoilt", (self.Good,), {"__doc__": "Spoilt.", **members}))()

    def failing(self, tests):
        failed = set()
        for name, test in tests.items():
            try:
                test()
            except (AssertionError, pytest.fail.Exception, RuntimeError, NotImplementedError):
                failed.add(name)
            except BaseException as skip:
                assert "NOT CHECKED" in str(skip), (name, skip)
        return failed

    def test_a_good_policy_passes(self):
        assert self.failing(self.trial(self.Good())) == set()

    @pytest.mark.parametrize(
        ("correct", "caught"),
        [
            (lambda self, chunk: chunk.prediction * float(chunk.prediction.std()), "never_waits_for_the_device"),
            (lambda self, chunk: None if chunk.prediction.mean() > 0 else chunk.prediction,
             "never_waits_for_the_device"),
            (lambda self, chunk: chunk.prediction[:, :1], "answers_fit"),
            (lambda self, chunk: chunk.prediction / 0, "answers_fit"),
            (lambda self, chunk: None, "answers_fit"),
            (lambda self, chunk: chunk.prediction.mul_(0.5), "what_it_is_shown_stays_as_it_was"),
            (lambda self, chunk: chunk.prediction + chunk.prediction.new_empty(1).normal_(),
             "the_same_question_has_the_same_answer"),
            (lambda self, chunk: chunk.prediction.new_ones(chunk.prediction.shape, device="cpu"),
             "stays_on_the_device"),
        ],
    )  # fmt: skip
    def test_a_bad_answer(self, correct, caught):
        assert caught in self.failing(self.trial(self.spoilt(correct=correct)))

    def test_options_that_are_not_checked(self):
        unchecked = self.spoilt(__post_init__=lambda self: None)
        assert self.failing(self.trial(unchecked)) == {"values_out_of_range_are_refused_by_name"}
        assert "values_out_of_range_are_refused_by_name" in self.failing(self.trial(self.Good(), wrong={}))

    def test_a_class_without_its_decorator(self):
        class Forgot(self.Good):
            """Forgets the decorator, so that its option is none."""

            more: int = 1

        caught = self.failing(self.trial(Forgot(), wrong={"scale": [2.0], "more": []}))
        assert caught == {"is_a_frozen_dataclass_that_says_what_it_does"}

    def test_neutral_options_that_do_something(self):
        assert "neutral_options_do_nothing" in self.failing(self.trial(self.Good(), neutral=self.Good(0.1)))
