"""Observers of installed plugins, asked for by name."""

from pathlib import Path

import pytest
import tiny_reference as tiny

import tokentrim_hooks as tokentrim
from tokentrim_hooks import loading, plugins
from tokentrim_hooks.markers import hookimpl

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def installed(monkeypatch):
    """Put folders with a .dist-info on sys.path, as if they had been installed; returns the class behind ``notes``."""

    def install(*folders):
        for folder in folders:
            monkeypatch.syspath_prepend(str(folder))
        plugins.found.cache_clear()
        factories = {info.name: info.factory for info in tokentrim.installed_observers()}
        factories["notes"].made.clear()
        return factories["notes"]

    yield install
    plugins.found.cache_clear()


def test_a_plugin_may_provide_observers_only(installed):
    installed(FIXTURES / "watchers")
    origins = {info.name: info.distribution for info in tokentrim.installed_observers()}
    assert {origins[name] for name in ("notes", "broken", "hollow")} == {"watcher-plugin 1.0"}
    assert origins["thumbnails"].startswith("tokentrim-hooks ")
    assert not [i for i in tokentrim.adapters() if i.distribution == "watcher-plugin 1.0"], "it is no broken plugin"


def test_nothing_observes_that_was_not_asked_for(installed):
    notes = installed(FIXTURES / "watchers")
    pipeline = tiny.make()
    with tokentrim.patched(pipeline) as handle:
        tiny.run(pipeline, chunks=2)
        assert len(handle.report) == 2
    assert notes.made == []


def test_names_and_objects_in_one_list(installed):
    notes = installed(FIXTURES / "watchers")
    pipeline, own = tiny.make(), notes(None)
    with tokentrim.patched(pipeline, observers=["notes", own]):
        tiny.run(pipeline, chunks=3)
    _, named = notes.made
    assert named is not own and named.chunks == own.chunks == [0, 1, 2] and named.folder is None


def test_every_model_gets_an_observer_of_its_own(installed):
    notes = installed(FIXTURES / "watchers")
    first, second = tiny.make(), tiny.make()
    with tokentrim.patched(first, observers=["notes"]), tokentrim.patched(second, observers=["notes"]):
        tiny.run(second, chunks=2)
    assert [made.chunks for made in notes.made] == [[], [0, 1]]


def test_a_folder_is_handed_on_as_a_path(installed):
    installed(FIXTURES / "watchers")
    assert tokentrim.make_observer("notes", "here").folder == Path("here")


def test_an_unknown_name_lists_the_installed_and_the_broken(installed):
    installed(FIXTURES / "watchers", FIXTURES)
    with pytest.raises(tokentrim.UnknownObserverError) as caught:
        tokentrim.patch(tiny.make(), observers=["notebook"])
    message = str(caught.value)
    assert "no observer named 'notebook'; did you mean 'notes'? installed: broken, hollow, notes, " in message
    assert ", thumbnails" in message, "further ones may be installed"
    assert "; not used: absent, crashes, empty, unfinished (see `tokentrim adapters`)" in message


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("nobody", tokentrim.UnknownObserverError, "no observer named 'nobody'"),
        ("broken", tokentrim.PluginError, r"'broken' \(watcher-plugin 1.0\) cannot be made: ImportError: .*wobble"),
        ("hollow", tokentrim.PluginError, "has no on_chunk"),
        ("thumbnails", tokentrim.TokenTrimError, "need a folder"),
    ],
)
def test_a_failure_leaves_the_model_and_its_patch_alone(installed, name, error, words):
    installed(FIXTURES / "watchers")
    pipeline = tiny.make()
    with pytest.raises(error, match=words):
        tokentrim.patch(pipeline, observers=[name])
    assert not tokentrim.is_patched(pipeline)
    with tokentrim.patched(pipeline) as handle:
        with pytest.raises(error, match=words):
            tokentrim.patch(pipeline, replace=True, observers=[name])
        assert handle.active


def test_two_of_one_name_are_an_error_for_who_asks(installed):
    installed(FIXTURES / "watchers", FIXTURES / "watchers_again")
    with tokentrim.patched(tiny.make()) as handle:
        assert handle.active
    with pytest.raises(tokentrim.PluginError, match=r"'notes', from again-plugin 3.0 and watcher-plugin 1.0"):
        tokentrim.make_observer("notes")


def test_one_string_is_not_a_list():
    with pytest.raises(TypeError, match="must be a list"):
        tokentrim.patch(tiny.make(), observers="thumbnails")


def test_the_built_in_observer_writes_a_picture_a_chunk(tmp_path):
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, observers=[tokentrim.make_observer("thumbnails", tmp_path)]):
        tiny.run(pipeline, chunks=2)
    assert sorted(path.name for path in (tmp_path / "thumbs").iterdir()) == ["v0-c0000-s0.png", "v0-c0001-s0.png"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (["notes"], "must return a mapping"),
        ({"notes": None}, "must name factories"),
        ({"": print}, "must name factories"),
        ({}, "no adapter, no observer and no policy"),
    ],
)
def test_a_plugin_that_breaks_the_contract(answer, words):
    class Plugin:
        @hookimpl
        def tokentrim_observers(self):
            return answer

    with pytest.raises(tokentrim.PluginError, match=words):
        loading.contents(Plugin())
