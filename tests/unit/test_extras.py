"""What a missing library's hint says to install, for each way in which this package may have been installed."""

import json
import sys
from types import SimpleNamespace

import pytest

from tokentrim_hooks import extras
from tokentrim_hooks.errors import MissingExtraError


def installed_from(monkeypatch, tmp_path, origin):
    """As if it lay in a site-packages, from there."""
    monkeypatch.setattr(extras, "CHECKOUT", tmp_path)
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(extras, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))


def test_a_checkout_is_named_by_its_folder(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "CHECKOUT", tmp_path)
    assert extras.with_extra("report") == f"-e '{tmp_path}[report]'"


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (None, "'tokentrim-hooks[report]'"),
        ({"url": "file:///src", "dir_info": {}}, "'tokentrim-hooks[report] @ file:///src'"),
        (
            {"url": "file:///src", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "'tokentrim-hooks[report] @ git+file://localhost/src'",
        ),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "'tokentrim-hooks[report] @ git+https://host/x.git'",
        ),
    ],
)
def test_elsewhere_it_is_named_as_it_was_installed(monkeypatch, tmp_path, origin, words):
    installed_from(monkeypatch, tmp_path, origin)
    assert extras.with_extra("report") == words


@pytest.mark.parametrize(
    ("module", "extra", "wanted"),
    [
        ("absent_library.part", "metrics", "'tokentrim-hooks[metrics]'"),
        ("absent_library", "", "absent_library"),
        ("cv2", "metrics", "opencv-python-headless"),
    ],
)
def test_the_hint_says_what_is_missing_and_how_to_get_it(monkeypatch, tmp_path, module, extra, wanted):
    installed_from(monkeypatch, tmp_path, None)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    with pytest.raises(MissingExtraError) as caught:
        extras.require(module, extra)
    name = module.partition(".")[0]
    assert str(caught.value) == f"this needs {name}, which is not installed.\nInstall it: pip install {wanted}"


def test_all_that_is_missing_is_told_at_once_with_one_command(monkeypatch, tmp_path):
    installed_from(monkeypatch, tmp_path, None)
    for name in ("absent_av", "cv2", "absent_jinja2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError) as caught:
        extras.require_all({"metrics": ["absent_av", "cv2"], "report": ["absent_jinja2", "json"], "demo": []})
    assert str(caught.value) == (
        "this needs absent_av, cv2 and absent_jinja2, which are not installed.\n"
        "Install them: pip install 'tokentrim-hooks[metrics,report]' opencv-python-headless"
    )
    with pytest.raises(MissingExtraError, match=r"^this needs cv2, which is not installed\.\nInstall it: pip"):
        extras.require_all({"metrics": ["cv2"]})
    extras.require_all({"metrics": ["json"], "demo": ()})


def test_what_is_there_is_imported():
    assert extras.require("json") is json
