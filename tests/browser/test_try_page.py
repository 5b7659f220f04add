"""The page of ``tokentrim try`` as people see it: both videos play in step, and it fits desktop and phone."""

import time

import numpy as np
import pytest

from tokentrim_hooks.experiments.pair.curves import Curves, apart
from tokentrim_hooks.experiments.pair.page import write_page
from tokentrim_hooks.experiments.pair.words import Pair
from tokentrim_hooks.metrics.writing import write_video
from tokentrim_hooks.report.record import ChunkRecord, Report

TIMES = "return [...document.querySelectorAll('video')].map(v => v.currentTime)"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Six seconds of two videos; one chunk of eight was pruned."""
    folder = tmp_path_factory.mktemp("try")
    noise = np.random.default_rng(0).random((2, 48, 32, 48, 3)) * np.linspace(0.5, 1, 48)[:, None, None, None]
    videos = [write_video(folder / f"{name}.mp4", noise[n], 8) for n, name in enumerate(("unpatched", "patched"))]
    records = [
        ChunkRecord(video=0, chunk=n, sample=0, start=2 * n, frames=2, phases={"denoise": 4},
                    severity=1.0 if n else None, threshold=2.0 if n > 2 else None, pruned=n == 4)
        for n in range(8)
    ]  # fmt: skip
    curves = [Curves.of(video) for video in videos]
    values = [found.values() for found in curves]
    pair = Pair(Report({"adapter": "x"}, records), *values, apart(*videos), 0.0, True, (3.0, 4.0))
    words = {"command": "tokentrim try x.py", "again": "tokentrim try --pairs 8 x.py", "report": "", "others": 0}
    return write_page(folder, pair, videos, curves, {**words, "pairs": ""})


def until(ask, seconds=20.0):
    """Whether ``ask`` comes true within that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if ask():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_logs_nothing_and_asks_for_nothing_but_its_videos(browser, page, width):
    browser.open(page, width)
    assert until(lambda: browser.ask("return [...document.querySelectorAll('video')].every(v => v.readyState > 1)"))
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    images = browser.ask("return [...document.images].map(i => [i.naturalWidth > 0, i.alt.length > 10])")
    assert len(images) == 4 and all(map(all, images))
    assert browser.unheard() == []
    assert until(lambda: browser.ask("return document.getElementById('place').ariaValueText") == "0.0 of 6.0 seconds")
    (marked,), (line,) = browser.boxes(".bar i"), browser.boxes("#place")
    assert abs((marked[0] - line[0]) / (line[2] - line[0]) - 0.5) < 0.03, "chunk 4 of 8 begins in the middle"
    browser.logs()
    assert browser.console == []
    assert {url.rpartition("/")[2] for url in browser.asked if not url.startswith("data:")} == {
        "try.html", "unpatched.mp4", "patched.mp4",
    }  # fmt: skip


def test_a_command_is_not_broken_behind_a_hyphen(browser, page):
    browser.open(page, 390)
    heights = {bottom - top for _, top, _, bottom in browser.boxes("#again span")}
    assert len(browser.boxes("#again span")) == 5 and max(heights) <= 24, "a word each, on one line"
    assert browser.ask("return document.getElementById('again').textContent") == "tokentrim try --pairs 8 x.py"


def test_both_videos_go_together(browser, page):
    browser.open(page, 1280)
    assert until(lambda: browser.ask("return [...document.querySelectorAll('video')].every(v => v.readyState > 1)"))
    browser.ask("const p = document.getElementById('place'); p.value = 0.5; p.oninput()")
    assert until(lambda: browser.ask(TIMES) == pytest.approx([3.0, 3.0], abs=0.05))
    browser.ask("document.querySelectorAll('video')[1].currentTime = 1")
    assert until(lambda: browser.ask(TIMES) == pytest.approx([1.0, 1.0], abs=0.2)), "also by a video's own controls"
    browser.ask("document.getElementById('play').click()")
    assert until(lambda: min(browser.ask(TIMES)) > 1.5)
    assert browser.ask("return document.getElementById('play').textContent") == "Pause"
    browser.ask("document.getElementById('play').click()")
    assert until(lambda: browser.ask("return [...document.querySelectorAll('video')].every(v => v.paused)"))
    one, other = browser.ask(TIMES)
    assert abs(one - other) < 0.3
