"""The pages as people see them: opened from a file in headless Chromium, desktop and phone, without a network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import NOT_CHECKED, missing

import tokentrim_hooks as tokentrim
from tokentrim_hooks.cli.main import main
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.report.page import Section, write_page
from tokentrim_hooks.report.thumbnails import Thumbnails
from tokentrim_hooks.testing import ForcedPolicy

WIDTHS = {"desktop": 1280, "phone": 390}
RED = np.array([0xD6, 0x28, 0x39])
"""Colour of what was pruned, in control chart and cache map."""
PARTS = [".chart img", ".cache img", ".maps img", ".strip img", "#verdict", "#figures", "#settings", "figcaption"]
COMPARE = Path(__file__).parents[1] / "compare"


def run(folder, policy, batch=1):
    pipeline = ReferencePipeline.random(grid=(4, 6), sink_size=3)
    torch.manual_seed(1)
    observers = [tokentrim.JsonLines(folder), Thumbnails(folder)]
    with torch.no_grad(), tokentrim.patched(pipeline, policy, observers=observers):
        pipeline.inference(torch.randn(batch, 30, 3, 16, 24))
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run with two prunes and a sink, decoded frames, and the unpatched video."""
    folder = run(tmp_path_factory.mktemp("run"), ForcedPolicy({4: (1, 8, 9), 7: (20,)}), batch=2)
    videos = np.random.default_rng(0).random((2, 60, 32, 48, 3)).astype(np.float32)
    return write_page(folder, videos[0], videos[1])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    sys.path.insert(0, str(COMPARE))
    try:
        arguments = ["--seeds", "3", "--batch", "3", "--only", "prune always,control: random always"]
        assert main(["compare", "toy_trial:make", "--out", str(folder), *arguments]) == 0
    finally:
        sys.path.remove(str(COMPARE))
    return folder / "compare.html"


def part(picture, box):
    left, top, right, bottom = box
    return picture[top:bottom, left : min(right, picture.shape[1])]


def has(pixels, colour, within=30):
    return (np.abs(pixels.astype(int) - colour).max(axis=2) <= within).sum()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_part_of_the_report_is_there_and_not_blank(browser, report, width):
    browser.open(report, width)
    browser.unfold()
    picture = browser.picture()
    for selector in PARTS:
        boxes = browser.boxes(selector)
        assert boxes, f"no {selector}"
        for box in boxes:
            assert part(picture, box).std() > 3, f"{selector} is blank"
    sizes = browser.ask("return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(sizes) == 2 * 2 + 2 * 2 + 1 and all(done and real > 50 and shown > 50 for done, real, shown in sizes)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_prunes_and_anchors_are_marked(browser, report, width):
    browser.open(report, width)
    browser.unfold()
    picture = browser.picture()
    for selector in (".chart img", ".cache img"):
        for box in browser.boxes(selector):
            assert has(part(picture, box), RED) > 20, f"{selector} shows no prune"
    for box in browser.boxes(".cache img"):
        assert has(part(picture, box), np.array([0xE0, 0xA0, 0x30])) > 200, "the cache map shows no anchor"


def test_a_link_of_the_contents_opens_its_sample(browser, report):
    browser.open(report, WIDTHS["desktop"])
    folded = "return document.querySelector('details.run').open"
    assert not browser.ask(folded)
    browser.ask("document.querySelector('nav a[href=\"#v0-s1\"]').click()")
    assert browser.ask(folded)


def test_charts_of_a_phone_have_letters_that_can_be_read(browser, report):
    shrunk = "return [...document.querySelectorAll('.chart img, .cache img')].map(i => i.clientWidth / i.naturalWidth)"
    for width in WIDTHS.values():
        browser.open(report, width)
        assert all(scale > 0.75 for scale in browser.ask(shrunk)), "9 points, 12 pixels, become less than 9"


def test_a_run_without_a_prune_has_no_mark(browser, tmp_path):
    browser.open(write_page(run(tmp_path, tokentrim.ObservePolicy())), WIDTHS["desktop"])
    picture = browser.picture()
    boxes = browser.boxes(".chart img, .cache img")
    assert len(boxes) == 1 and not any(has(part(picture, box), RED, 12) for box in boxes)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("page", ["report", "comparison"])
def test_nothing_runs_over_the_edge_or_asks_for_anything(browser, request, page, width):
    file = request.getfixturevalue(page)
    browser.open(file, width)
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    browser.logs()
    assert not browser.console
    assert file.resolve().as_uri() in browser.asked
    here = ("data:", "chrome:", file.resolve().as_uri())  # chrome: the empty tab that a browser begins with
    assert not [address for address in browser.asked if not address.startswith(here)]


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("page", ["report", "comparison"])
def test_nothing_is_for_eyes_or_a_mouse_alone(browser, request, page, width):
    browser.open(request.getfixturevalue(page), width)
    browser.ask("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.unheard() == []


def test_what_would_be_missed_is_noticed(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<h2>a</h2><img src=x alt=b><video></video><table><tr><th></th><td>1</td></tr><tr><td>2</td></tr></table>"
        "<a href='#none'>c</a><div style='overflow-x:auto;width:9px' class=wide>wwwwwwwwwwwww</div>"
    )
    browser.open(page, WIDTHS["desktop"])
    assert len(browser.unheard()) == 8


def test_the_table_of_all_chunks_opens_and_fits_a_phone(browser, report):
    browser.open(report, WIDTHS["phone"])
    visible = "return [...document.querySelectorAll('tr.pruned')].filter(row => row.checkVisibility()).length"
    assert browser.ask(visible) == 0
    browser.ask("document.querySelectorAll('details').forEach(details => details.querySelector('summary').click())")
    assert browser.ask(visible) == 4
    assert browser.ask("return document.documentElement.scrollWidth") <= WIDTHS["phone"]


@pytest.mark.parametrize("dark", [False, True])
def test_the_comparison_draws_every_interval(browser, comparison, dark):
    browser.open(comparison, WIDTHS["desktop"], dark=dark)
    picture, boxes = browser.picture(), browser.boxes("td svg")
    columns = browser.ask("return document.querySelector('thead tr:last-child').children.length")
    assert len(boxes) == 2 * (columns - 4), "two settings, a picture for each measure"
    assert all(part(picture, box).std() > 3 for box in boxes)
    background = picture[2, 2].mean()
    assert background < 60 if dark else background > 200


def test_on_a_phone_the_comparison_begins_with_its_results(browser, comparison):
    """Pairs and shares stand below the setting's name there, and in columns of their own elsewhere."""
    for width, below in ((WIDTHS["phone"], True), (WIDTHS["desktop"], False)):
        browser.open(comparison, width)
        assert browser.boxes("td svg")[0][2] <= width
        seen = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).length"
        assert (browser.ask(seen, ".narrow") > 0) == below and (browser.ask(seen, "td.share") > 0) != below


CONTRAST = """
const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => {
    v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const paper = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
document.querySelectorAll('details').forEach(d => d.open = true);
return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(paper(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.tagName + ': ' + e.textContent.trim().slice(0, 40)]; });
"""
"""WCAG 2's contrast of every element that has text of its own, with its words."""


@pytest.mark.parametrize("dark", [False, True])
def test_every_word_stands_out_from_its_paper(browser, report, dark):
    browser.open(report, WIDTHS["desktop"], dark=dark)
    found = browser.ask(CONTRAST)
    assert len(found) > 100 and not [words for ratio, words in found if ratio < 4.5]


def test_the_page_can_be_read_without_seeing_it(browser, report):
    browser.open(report, WIDTHS["desktop"])
    alts = browser.ask("return [...document.images].map(i => i.alt)")
    assert all(len(alt) > 15 for alt in alts) and len(set(alts)) >= len(alts) - 2
    chart = next(alt for alt in alts if alt.startswith("control chart"))
    assert "2 of 9 judged chunks regenerated: 4, 7" in chart
    unnamed = "return [...document.querySelectorAll('[tabindex]')].filter(e => !e.getAttribute('aria-label')).length"
    assert browser.ask(unnamed) == 0
    order = browser.ask("return [...document.querySelectorAll('h1, h2')].map(e => e.tagName)")
    assert order[0] == "H1" and set(order[1:]) == {"H2"}
    links = "return [...document.querySelectorAll('a')].every(a => document.getElementById(a.hash.slice(1)))"
    assert browser.ask(links), "every link has its target"


def test_a_hostile_log_runs_nothing(browser, tmp_path):
    folder = run(tmp_path, ForcedPolicy({4: (1, 8)}))
    evil = "\"'><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    lines = [json.loads(line) for line in (folder / "chunks.jsonl").read_text().splitlines()]
    for line in lines:
        line["notes"], line["phases"] = [evil], {evil: 1}
        line["acts"] = [{"policy": evil, "hook": evil, "calls": 1, "rows": 2}]
    (folder / "chunks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "settings.json").write_text(json.dumps({"policy": evil, "adapter": evil, evil: evil}))
    section = Section("s", evil, evil, [evil], [[evil]])
    page = write_page(folder, sections=[section])
    browser.open(page, WIDTHS["desktop"])
    assert browser.ask("return document.title") != "owned"
    assert browser.ask("return document.querySelectorAll('script, img[src=x], [onerror]').length") == 0
    assert not browser.console and browser.ask("return document.documentElement.scrollWidth") <= WIDTHS["desktop"]


def test_a_broken_picture_would_be_noticed(browser, report, tmp_path):
    broken = tmp_path / "broken.html"
    nothing = r'\1data:image/png;base64,AAAA"'
    broken.write_text(re.sub(r'(<img alt="control chart[^>]*src=")[^"]+"', nothing, report.read_text()))
    browser.open(broken, WIDTHS["desktop"])
    assert 0 in browser.ask("return [...document.images].map(i => i.naturalWidth)")


def test_without_chromium_it_is_not_checked_and_in_ci_that_fails():
    assert missing(lambda name: None, {}).startswith(NOT_CHECKED)
    assert missing(lambda name: name, {"CI": "true"}) == ""
    with pytest.raises(pytest.fail.Exception, match="chromedriver"):
        missing(lambda name: None, {"CI": "true"})


def test_a_browser_of_that_name_answers():
    """So that a failure above is known to be the page's and not the browser's."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    version = subprocess.run([str(shutil.which("chromedriver")), "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("ChromeDriver")
