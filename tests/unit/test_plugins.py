"""Plugins through real entry points, by way of checked-in distributions on sys.path."""

from pathlib import Path

import pytest
import tiny_reference as tiny

import tokentrim_hooks as tokentrim
from tokentrim_hooks import loading, plugins
from tokentrim_hooks.markers import hookimpl

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def installed(monkeypatch):
    """Put a folder with a .dist-info on sys.path, as if it had been installed."""

    def install(folder):
        monkeypatch.syspath_prepend(str(folder))
        plugins.found.cache_clear()

    yield install
    plugins.found.cache_clear()


def test_built_in_adapters_come_from_this_distribution():
    built_in = {info.name: info.distribution for info in tokentrim.adapters()}
    assert built_in["self-forcing"].startswith("tokentrim-hooks ")


def test_broken_plugins_are_recorded_and_harm_nobody(installed):
    installed(FIXTURES)
    broken = {info.name: info for info in tokentrim.adapters() if info.adapter is None}
    assert broken.keys() >= {"crashes", "absent", "empty", "unfinished"}
    assert {broken[name].distribution for name in ("crashes", "absent")} == {"broken-plugin 1.0"}
    assert broken["crashes"].error == "RuntimeError: this plugin crashes on import"
    assert broken["absent"].error.startswith("ModuleNotFoundError")
    assert "hookimpl named tokentrim_adapters" in broken["empty"].error
    assert "lacks attach, context, parse, probe" in broken["unfinished"].error
    with tokentrim.patched(tiny.make()) as handle:
        assert handle.adapter.name == "self-forcing"


def test_a_built_in_adapter_keeps_its_name(installed):
    installed(FIXTURES / "twin")
    claims = {info.distribution: info for info in tokentrim.adapters() if info.name == "self-forcing"}
    (ours,) = (info for origin, info in claims.items() if origin.startswith("tokentrim-hooks "))
    twin = claims["twin-plugin 2.0"]
    assert ours.adapter and twin.adapter is None and twin.shadowed and "built-in one of this name" in twin.error
    with tokentrim.patched(tiny.make(), adapter="self-forcing") as handle:
        assert type(handle.adapter) is ours.adapter


def test_adapters_can_be_disabled(monkeypatch):
    monkeypatch.setenv("TOKENTRIM_DISABLE_ADAPTERS", "something, self-forcing")
    assert {info.name: info.disabled for info in tokentrim.adapters()}["self-forcing"]
    assert "self-forcing" not in [found.adapter for found in tokentrim.detect(tiny.make())]
    with pytest.raises(tokentrim.UnsupportedModelError):
        tokentrim.patch(tiny.make())
    with pytest.raises(tokentrim.UnknownAdapterError):
        tokentrim.patch(tiny.make(), adapter="self-forcing")
    monkeypatch.setenv("TOKENTRIM_DISABLE_ADAPTERS", "")
    with tokentrim.patched(tiny.make()) as handle:
        assert handle.active


def test_the_order_is_fixed():
    names = [info.name for info in tokentrim.adapters() if info.adapter]
    assert names == sorted(names)


class Nameless(tokentrim.Adapter):
    pass


@pytest.mark.parametrize(
    ("answer", "words"),
    [([object()], "must be one of the Adapter subclasses"), ([Nameless], "has no name"), ([], "provides no adapter")],
)
def test_a_plugin_that_breaks_the_contract(answer, words):
    class Plugin:
        @hookimpl
        def tokentrim_adapters(self):
            return answer

    with pytest.raises(tokentrim.PluginError, match=words):
        loading.contents(Plugin())
