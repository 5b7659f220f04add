"""Plugins that claim taken names, exit, raise, answer nonsense or are disabled: each harms only itself."""

import asyncio
import os
import subprocess
import sys
import textwrap

import pytest
import tiny_reference as tiny

import tokentrim_hooks as tokentrim
from tokentrim_hooks import plugins
from tokentrim_hooks.cli.main import main

ADAPTER = """
    from pathlib import Path
    from tokentrim_hooks import Adapter, Match, NoMatch, hookimpl

    class Mine(Adapter):
        name = "mine"

        @classmethod
        def probe(cls, model):
            return NoMatch("only a test")

        def attach(self, model, patches): ...
        def parse(self, arguments): ...
        def context(self, call): ...

    @hookimpl
    def tokentrim_adapters():
        return [Mine]
"""


def infos(project):
    return [info for info in tokentrim.adapters() if info.distribution.startswith(f"{project} ")]


def all_goes_on():
    with tokentrim.patched(tiny.make()) as handle:
        assert handle.adapter.name == "self-forcing"
    assert [d.adapter for d in tokentrim.detect(tiny.make()) if d.matches] == ["self-forcing"]


def test_of_two_strangers_with_one_name_neither_is_used_and_both_are_shown(stranger, capsys, monkeypatch):
    stranger("first", ADAPTER)
    stranger("second", ADAPTER)
    all_goes_on()
    assert all(info.adapter is None and info.shadowed for p in ("first", "second") for info in infos(p))
    with pytest.raises(tokentrim.PluginError, match=r"claim the name 'mine', first 1.0 and second 1.0") as caught:
        tokentrim.patch(tiny.make(), adapter="mine")
    assert str(caught.value).count("\n") <= 2
    with pytest.raises(tokentrim.UnsupportedModelError, match=r"not used: mine \(see `tokentrim adapters`\)"):
        tokentrim.patch(object())
    assert main(["adapters"]) == 0
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines() if line.startswith("mine")]
    assert rows == [["mine", "name", "taken", "first"], ["mine", "name", "taken", "second"]]
    monkeypatch.setenv("TOKENTRIM_DISABLE_ADAPTERS", "second")
    assert [info.error for info in infos("first")] == [""], "the way out that the message names"


def test_a_class_that_comes_twice_from_one_distribution_is_no_rival(stranger, tmp_path):
    module = stranger("twice", ADAPTER)
    points = tmp_path / "twice-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[tokentrim_hooks]\none = {module}\ntwo = {module}\n")
    plugins.found.cache_clear()
    (info,) = infos("twice")
    assert info.adapter is not None


def test_a_built_in_observer_keeps_its_name(stranger, tmp_path, capsys):
    stranger("pictures", """
        from tokentrim_hooks import hookimpl

        @hookimpl
        def tokentrim_observers():
            return {"thumbnails": lambda folder: 1 / 0}
    """)  # fmt: skip
    assert type(tokentrim.make_observer("thumbnails", tmp_path)).__name__ == "Thumbnails"
    assert main(["adapters"]) == 0
    assert "name taken  pictures 1.0" in capsys.readouterr().out


@pytest.mark.parametrize("token", ["quiet-one", "Quiet_One", "quiet.entry", " quiet_entry ,x"])
def test_code_that_is_disabled_is_not_imported(stranger, tmp_path, monkeypatch, token):
    module = stranger("quiet-one", f'{ADAPTER}\n    Path({str(tmp_path / "ran")!r}).touch()', entry="quiet.entry")
    monkeypatch.setenv("TOKENTRIM_DISABLE_ADAPTERS", token)
    all_goes_on()
    (info,) = infos("quiet-one")
    assert info.disabled and info.adapter is None and "not imported" in info.error
    assert module not in sys.modules and not (tmp_path / "ran").exists()
    assert main(["adapters"]) == 0 and not (tmp_path / "ran").exists()
    monkeypatch.delenv("TOKENTRIM_DISABLE_ADAPTERS")
    assert [info.name for info in infos("quiet-one")] == ["mine"], "read at each use"


def test_a_disabled_built_in_adapter_is_not_imported(monkeypatch):
    code = "import sys, tokentrim_hooks; tokentrim_hooks.adapters(); print(*sys.modules)"
    environment = {**os.environ, "TOKENTRIM_DISABLE_ADAPTERS": "magi-1,magi1,self-forcing"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    loaded = done.stdout.split()
    assert "tokentrim_hooks_adapters.krea" in loaded, done.stderr
    assert "tokentrim_hooks_adapters.magi1" not in loaded


RAISES = {
    "import": "{raising}\n",
    "hook": """
        from tokentrim_hooks import hookimpl

        @hookimpl
        def tokentrim_adapters():
            {raising}
    """,
    "observers": """
        from tokentrim_hooks import hookimpl

        @hookimpl
        def tokentrim_observers():
            {raising}
    """,
}


@pytest.mark.parametrize("place", RAISES)
@pytest.mark.parametrize("raising", ["raise SystemExit(3)", "import sys; sys.exit()", "raise MemoryError", "1 / 0"])
def test_what_a_plugin_raises_while_it_loads_is_its_failure(stranger, place, raising):
    stranger("raiser", RAISES[place].format(raising=raising))
    all_goes_on()
    (info,) = infos("raiser")
    assert info.adapter is None and info.error.startswith(("SystemExit", "MemoryError", "ZeroDivisionError"))


def probing(answer):
    return ADAPTER.replace('return NoMatch("only a test")', answer)


@pytest.mark.parametrize("raising", ["raise SystemExit(3)", "raise SystemExit", "raise RecursionError('deep')"])
def test_what_a_probe_raises_is_a_refusal(stranger, raising):
    stranger("prober", probing(raising))
    all_goes_on()
    (said,) = (d for d in tokentrim.detect(object()) if d.adapter == "mine")
    assert not said.matches and said.reason.startswith("its probe failed with " + raising.split()[1].split("(")[0])
    with pytest.raises(tokentrim.UnsupportedModelError, match="mine: its probe failed"):
        tokentrim.patch(tiny.make(), adapter="mine")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("return True", "returned True, which is neither"),
        ("return None", "returned None, which is neither"),
        ("return Match", "which is neither"),
        ("return Match('net', (2, 2))", "denoiser is no module"),
        ("return Match(model.generator, 2)", "patch_size is 2"),
        ("return Match(model.generator, (2, 0))", r"patch_size is \(2, 0\)"),
        ("return Match(model.generator, (2, 2), also=None)", "its probe failed with TypeError"),
        ("return NoMatch(None)", "None"),
    ],
)
def test_nonsense_from_a_probe_is_a_refusal(stranger, answer, words):
    stranger("prober", probing(answer))
    all_goes_on()
    with pytest.raises(tokentrim.UnsupportedModelError, match=f"mine: .*{words}"):
        tokentrim.patch(tiny.make(), adapter="mine")


@pytest.mark.parametrize("place", [*RAISES, "probe", "factory"])
def test_ctrl_c_stops_the_users_program_wherever_it_comes(stranger, place):
    codes = {
        **RAISES,
        "probe": probing("{raising}"),
        "factory": RAISES["observers"].replace(
            "{raising}", "return {{'stop': stop}}\n\n        def stop(folder):\n            {raising}"
        ),
    }
    code = textwrap.dedent(codes[place]).replace("{raising}", "raise KeyboardInterrupt").replace("{{", "{")
    stranger("stopper", code.replace("}}", "}"))
    with pytest.raises(KeyboardInterrupt):
        tokentrim.patch(tiny.make(), observers=["stop"] if place == "factory" else [])
    plugins.found.cache_clear()


def test_a_cancelled_task_is_not_swallowed_either(stranger):
    stranger("stopper", probing("import asyncio; raise asyncio.CancelledError"))
    with pytest.raises(asyncio.CancelledError):
        tokentrim.patch(tiny.make())


def test_a_factory_that_exits_is_a_failure_of_the_observer(stranger):
    stranger("watcher", """
        from tokentrim_hooks import hookimpl

        @hookimpl
        def tokentrim_observers():
            return {"exits": exits, "odd": lambda folder: type("Odd", (), {"on_chunk": 5})()}

        def exits(folder):
            raise SystemExit("licence expired")
    """)  # fmt: skip
    with pytest.raises(tokentrim.PluginError, match=r"'exits' \(watcher 1.0\) cannot be made: SystemExit: licence"):
        tokentrim.patch(tiny.make(), observers=["exits"])
    with pytest.raises(tokentrim.PluginError, match="has no on_chunk"):
        tokentrim.make_observer("odd")


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        ("return Mine", "must return a list"),
        ("return True", "must return a list"),
        ("return ['Mine']", "must be one of the Adapter subclasses"),
        ("return [Mine()]", "must be one of the Adapter subclasses"),
        ("Mine.name = 7; return [Mine]", "has no name"),
        ("Mine.name = ' '; return [Mine]", "has no name"),
        ("del Mine.name; return [Mine]", "has no name"),
        ("Mine.models = 'Ribbon'; return [Mine]", "models of adapter 'mine' must be a tuple"),
        ("Mine.constructors = (7,); return [Mine]", "constructors of adapter 'mine' must be a tuple"),
        ("Mine.constructors = ('ribbon',); return [Mine]", "must read package.module:Class"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "its message cannot be shown"),
    ],
)
def test_a_plugin_that_provides_nonsense_is_shown_with_the_reason(stranger, instead, words):
    stranger("odd", ADAPTER.replace("return [Mine]", instead))
    all_goes_on()
    (info,) = infos("odd")
    assert info.adapter is None and words in info.error


def test_an_adapter_that_cannot_be_made(stranger):
    code = probing("return Match(model.generator, (2, 2))")
    stranger("unmade", code.replace("def attach", "def __init__(self): raise SystemExit\n        def attach"))
    pipeline = tiny.make()
    with pytest.raises(tokentrim.PluginError, match="adapter 'mine' cannot be made: SystemExit"):
        tokentrim.patch(pipeline, adapter="mine")
    assert not tokentrim.is_patched(pipeline)


def test_files_of_a_distribution_that_cannot_be_read_harm_no_other(stranger, tmp_path):
    stranger("wrecked", ADAPTER)
    (tmp_path / "wrecked-1.0.dist-info" / "entry_points.txt").write_text("[tokentrim_hooks]\nno equals sign\n")
    stranger("nameless", ADAPTER)
    (tmp_path / "nameless-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00")
    all_goes_on()
    (info,) = infos("wrecked")
    assert info.adapter is None and "cannot be read" in info.error
    assert [i.distribution for i in tokentrim.adapters() if i.name == "mine"] == ["unknown distribution"]
