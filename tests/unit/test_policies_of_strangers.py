"""Policies of plugins: names that two claim, failures, nonsense and what is disabled; each harms only itself."""

import sys

import pytest
from test_plugins_of_strangers import all_goes_on, infos

import tokentrim_hooks as tokentrim
from tokentrim_hooks.cli.main import main

POLICY = """
    from dataclasses import dataclass
    from tokentrim_hooks import Policy, hookimpl

    @dataclass(frozen=True)
    class Mine(Policy):
        '''Hides nothing.'''

        def hide(self, chunk, context):
            return None

    @hookimpl
    def tokentrim_policies():
        return {"mine": Mine}
"""


def named(name):
    return [info for info in tokentrim.policies() if info.name == name]


def test_a_policy_of_a_stranger_is_found_and_listed(stranger, capsys):
    stranger("one", POLICY)
    (info,) = named("mine")
    assert (info.distribution, info.hooks, info.summary) == ("one 1.0", ("hide",), "Hides nothing.")
    assert tokentrim.make_policy("mine", persist=False).persist is False
    assert main(["policies"]) == 0
    assert "mine            hide     one 1.0" in capsys.readouterr().out


OWN_INIT = """
    from dataclasses import InitVar, dataclass
    from tokentrim_hooks import DriftPolicy, hookimpl

    @dataclass(frozen=True)
    class Scaled(DriftPolicy):
        percent: InitVar[float | None] = None

        def __post_init__(self, percent):
            if percent is not None:
                object.__setattr__(self, "fraction", percent / 100)

    class Named(DriftPolicy):
        def __init__(self, strength="low"):
            super().__init__(fraction={"low": 0.1, "high": 0.3}[strength])

    @hookimpl
    def tokentrim_policies():
        return {"scaled": Scaled, "named": Named}
"""


def test_options_are_what_a_policy_takes_fields_or_not(stranger):
    """A class of its own __init__, which is derived from a dataclass, and a field that is only for __post_init__."""
    stranger("own", OWN_INIT)
    assert tokentrim.make_policy("scaled", percent=30.0).fraction == 0.3
    assert tokentrim.make_policy("named", strength="high").fraction == 0.3
    with pytest.raises(TypeError, match=r"no option 'strenght' \(did you mean 'strength'\?\); known: strength$"):
        tokentrim.make_policy("named", strenght="high")


def test_of_two_policies_with_one_name_neither_is_made_and_both_are_shown(stranger, capsys, monkeypatch):
    stranger("first", POLICY)
    stranger("second", POLICY)
    all_goes_on()
    assert all("none of them is used" in info.error for info in named("mine")) and len(named("mine")) == 2
    with pytest.raises(tokentrim.PluginError, match=r"two policies are named 'mine', from first 1.0 and second 1.0"):
        tokentrim.make_policy("mine")
    assert main(["policies"]) == 0
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines() if line.startswith("mine")]
    assert rows == [["mine", "name", "taken", "first"], ["mine", "name", "taken", "second"]]
    monkeypatch.setenv("TOKENTRIM_DISABLE_ADAPTERS", "second")
    assert type(tokentrim.make_policy("mine")).__name__ == "Mine", "the way out that the message names"


def test_a_built_in_policy_keeps_its_name(stranger):
    stranger("twin", POLICY.replace('"mine"', '"drift"'))
    assert tokentrim.make_policy("drift") == tokentrim.DriftPolicy()
    (lost,) = [info for info in named("drift") if info.distribution == "twin 1.0"]
    assert "has a built-in one of this name" in lost.error


def test_policies_that_are_disabled_are_not_imported(stranger, monkeypatch):
    module = stranger("quiet", POLICY)
    monkeypatch.setenv("TOKENTRIM_DISABLE_ADAPTERS", "quiet")
    assert not named("mine") and module not in sys.modules
    with pytest.raises(tokentrim.UnknownPolicyError, match="no policy named 'mine'; installed: adaptive"):
        tokentrim.make_policy("mine")


@pytest.mark.parametrize("raising", ["raise SystemExit(3)", "1 / 0"])
def test_what_a_plugin_of_policies_raises_is_its_failure_and_is_shown(stranger, raising, capsys):
    stranger("raiser", POLICY.replace('return {"mine": Mine}', raising))
    all_goes_on()
    assert main(["policies"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("raiser")]
    assert "raiser 1.0" in row and ("SystemExit" in row or "ZeroDivisionError" in row)
    with pytest.raises(tokentrim.UnknownPolicyError, match=r"not used: raiser \(see `tokentrim adapters`\)"):
        tokentrim.make_policy("mine")


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        ("return [Mine]", "must return a mapping"),
        ("return {'mine': Mine()}", "must be a subclass of Policy"),
        ("return {'mine': dict}", "must be a subclass of Policy"),
        ("return {7: Mine}", "by strings, got 7"),
        ("return {' ': Mine}", "by strings"),
        ("return {'mine': Policy}", "that overrides a hook"),
        ("return {}", "no adapter, no observer and no policy"),
    ],
)
def test_nonsense_from_a_plugin_of_policies_is_its_failure(stranger, instead, words):
    stranger("nonsense", POLICY.replace('return {"mine": Mine}', instead))
    all_goes_on()
    (info,) = infos("nonsense")
    assert info.adapter is None and words in info.error


def test_a_policy_that_exits_when_it_is_made_is_a_plugin_error(stranger):
    stranger(
        "exits", POLICY.replace("def hide", "def __post_init__(self): raise SystemExit('licence')\n\n        def hide")
    )
    with pytest.raises(tokentrim.PluginError, match=r"policy 'mine' \(exits 1.0\) cannot be made: SystemExit: licence"):
        tokentrim.make_policy("mine")
