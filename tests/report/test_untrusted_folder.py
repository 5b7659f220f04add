"""Nothing in a log or a run's folder is trusted: names, links, sizes, strings. Clear words, and no write outside."""

import json
import os
import re
import struct
import unicodedata
import zlib

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.cli.main import main
from tokentrim_hooks.console import markdown_table, plain_table
from tokentrim_hooks.errors import ReportError, TokenTrimError
from tokentrim_hooks.experiments.compare.store import Outcome, Store, read_outcomes
from tokentrim_hooks.report import files
from tokentrim_hooks.report.fields import KINDS
from tokentrim_hooks.report.filmstrip import save_film, words
from tokentrim_hooks.report.page import filled, render, write_page
from tokentrim_hooks.report.record import ChunkRecord, Report, read_report, thumbnail_name
from tokentrim_hooks.report.thumbnails import Thumbnails, clear

LATENTS = torch.randn(1, 3, 4, 8, 8)


def record(chunk=1, **more):
    given = {"severity": 2.0, "threshold": 1.0, "grid": (1, 2), "tokens": (1,), "drift": (0.5, 2.0), **more}
    return ChunkRecord(0, chunk, 0, 3 * chunk, 3, {"first": 1}, **given)


def log_with(folder, **changes):
    """A log of one good line and one with other values."""
    lines = [record(0).as_json(), json.dumps({**json.loads(record(1).as_json()), **changes})]
    (folder / "chunks.jsonl").write_text("\n".join(lines) + "\n")


def said(folder, capsys):
    """What ``tokentrim report`` says of a folder that it refuses: at most two lines."""
    assert main(["report", str(folder)]) == 2
    words = capsys.readouterr().err
    assert words.count("\n") <= 2 and "Traceback" not in words, words
    return words


def test_every_field_of_a_record_is_checked():
    assert KINDS.keys() == ChunkRecord.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("video", v) for v in ("../../escaped", -1, 1.5, True, None, [], 10**30)),
        ("chunk", "1"), ("sample", {}), ("start", -3), ("frames", "3"), ("dead", 1e9), ("anchors", None),
        ("severity", "high"), ("mean", [1]), ("threshold", True), ("std", 1e300), ("accepted_severity", {}),
        ("pruned", 1), ("given", "yes"), ("seconds", "long"), ("phases", []), ("phases", {"first": "1"}),
        ("tokens", 5), ("tokens", [9]), ("tokens", [-1]), ("tokens", ["0"]), ("drift", {"0": 1}), ("drift", ["x"]),
        ("grid", [1, 2, 3]), ("grid", "1x2"), ("grid", [10**9, 10**9]), ("grid", [-1, -2]),
        ("notes", "words"), ("notes", [1]),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type_is_named(tmp_path, capsys, field, value):
    log_with(tmp_path, **{field: value})
    words = said(tmp_path, capsys)
    assert f"chunks.jsonl:2 is not a chunk record: {field} " in words and "Take the line out" in words


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense", b"[]", b"7", b"null", b'"text"', b"{}", b"\x00\xff\xfe\x80binary", b"\x00" * 4096, b"[" * 200_000,
        b'{"video": ' + b"9" * 5000 + b"}", b'{"video": 0, "video"', "chunk ½".encode("latin-1"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_is_named(tmp_path, capsys, line):
    (tmp_path / "chunks.jsonl").write_bytes(record(0).as_json().encode() + b"\n" + line + b"\n")
    assert "chunks.jsonl:2 is not a chunk record" in said(tmp_path, capsys)


def test_a_line_without_an_end_is_not_read_to_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokentrim_hooks.report.record.LINE", 1000)
    (tmp_path / "chunks.jsonl").write_bytes(b'{"notes": ["' + b"x" * 5000)
    assert "it has no end" in said(tmp_path, capsys)


def test_numbers_that_json_has_no_word_for_are_nothing(tmp_path):
    line = record(1, drift=(1.0, float("nan")), severity=float("inf"), seconds=float("nan")).as_json()
    foreign = line.replace('"mean": null', '"mean": NaN').replace('"std": null', '"std": 1e999')
    (tmp_path / "chunks.jsonl").write_text(f"{record(0, drift=(float('nan'),) * 2).as_json()}\n{line}\n{foreign}\n")
    last = read_report(tmp_path).records[-1]
    assert (last.severity, last.mean, last.std) == (None, None, None) and last.drift[0] == 1.0
    assert "drift map of chunk 0" in write_page(tmp_path).read_text()


def test_a_log_of_another_version(tmp_path, capsys):
    log_with(tmp_path, curvature=[1, 2])
    assert len(read_report(tmp_path)) == 2, "what a later version adds is left out"
    assert main(["report", str(tmp_path)]) == 0
    (tmp_path / "settings.json").write_text('{"versions": {"tokentrim-hooks": "9.0"}}')
    (tmp_path / "chunks.jsonl").write_text('{"clip": 0, "chunk": 1}\n')
    words = said(tmp_path, capsys)
    assert "it has no video, sample" in words and "written by version 9.0, this is" in words


NESTED = b'{"a": ' * 900 + b"1" + b"}" * 900


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, NESTED])
def test_broken_settings_are_said_or_shown(tmp_path, capsys, content):
    log_with(tmp_path)
    (tmp_path / "settings.json").write_bytes(content)
    if main(["report", str(tmp_path)]) == 0:
        assert (tmp_path / "report.html").is_file()
    else:
        assert "Move it away" in said(tmp_path, capsys.readouterr() and capsys)


def test_settings_that_are_too_large(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokentrim_hooks.report.record.SETTINGS", 1 << 20)
    log_with(tmp_path)
    (tmp_path / "settings.json").write_text(" " * (2 << 20))
    assert "larger than 1 MiB" in said(tmp_path, capsys)


@pytest.mark.parametrize("warmup", ["abc", [1], -5, 1e300, None, True, {"a": 1}])
def test_a_warm_up_may_be_anything(warmup):
    assert "<table>" in render(Report({"policy.warmup": warmup, "policy": ["x"], "versions": 7}, [record(1)]))


def test_strings_of_a_log_are_text_on_the_page(tmp_path):
    evil = "</pre><script>alert(1)</script>\ud800\x1b[31m"
    log_with(tmp_path, notes=[evil], phases={evil: 1})
    (tmp_path / "settings.json").write_text(json.dumps({"policy": evil, evil: evil}))
    html = write_page(tmp_path).read_text()
    assert "<script" not in html and "&lt;script" in html
    assert "\x1b" not in html and "\\x1b[31m" in html, "cat report.html does not steer the terminal either"


def test_no_page_and_no_markdown_has_a_control_character(tmp_path):
    every = "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0xD800]))
    template = tmp_path / "page.j2"
    template.write_text("<p title='{{ text }}'>{{ text }}\n\t</p>\n")
    page = filled(template, text=f"a\u00a0b \U0001f469\u200d\U0001f680 {every}")
    table = markdown_table(["a"], [[every]])
    for text in (page, table):
        text.encode()
        steering = [c for c in text if unicodedata.category(c) in ("Cc", "Cs") or c in "\u202e\u2066"]
        assert set(steering) <= {"\n", "\t"}
    assert "\\x1b" in page and "\\u202e" in page and "\\ud800" in page
    assert "a\u00a0b \U0001f469\u200d\U0001f680" in page, "what belongs to words stays"


def test_strings_of_a_log_do_not_steer_the_terminal(tmp_path, capsys):
    assert "\x1b" not in plain_table(["a", "b"], [["\x1b[31m", "x"], ["\r\x07", "\u202e"]])
    log_with(tmp_path, grid="\x1b[2J\ud800")
    assert "\x1b" not in said(tmp_path, capsys)


def test_a_markdown_table_of_anything_is_that_table():
    cells = ["a|b", r"c\|d", "<script>", "e\nf", "g\r\n| h |", "[i](javascript:alert(1))", "![j](http://k)", "\u2028"]
    table = markdown_table([*"abcdefgh"], [cells])
    lines = table.splitlines()
    assert len(lines) == 3 and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 9 for line in lines)
    assert "<" not in table and "](" not in table


# ---------------------------------------------------------------------------------------------- links and names


@pytest.fixture
def outside(tmp_path):
    """A file that nothing may touch, and a folder in which nothing may appear."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "precious").write_text("precious")
    yield place
    assert [path.name for path in place.iterdir()] == ["precious"]
    assert (place / "precious").read_text() == "precious"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", ["chunks.jsonl", "settings.json", "settings.json.part", "report.html"])
@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("append", [False, True])
def test_a_link_in_the_folder_is_not_written_through(folder, outside, name, kind, append):
    getattr(folder / name, kind)(outside / "precious")
    log = tokentrim.JsonLines(folder, append=append)
    log.on_start({"adapter": "x"})
    log.on_chunk([record(1)], LATENTS)
    log.on_end()
    assert not (folder / "chunks.jsonl").is_symlink() and len(read_report(folder)) == 1
    assert not write_page(folder).is_symlink()


def test_saving_does_not_follow_links_either(folder, outside):
    for name in ("chunks.jsonl", "settings.json"):
        (folder / name).symlink_to(outside / "precious")
    Report({}, [record(1)]).save(folder)
    (folder / "film.gif").symlink_to(outside / "precious")
    save_film([words("a"), words("b")], folder / "film.gif", [10, 10])


def test_a_folder_that_the_user_named_may_be_a_link(folder, tmp_path):
    (tmp_path / "named").symlink_to(folder)
    Report({}, [record(1)]).save(tmp_path / "named")
    assert len(read_report(folder)) == 1


def test_pictures_stay_in_the_folder(folder, outside):
    (folder / "thumbs").symlink_to(outside)
    with pytest.raises(ReportError, match="is a link"):
        Thumbnails(folder).on_chunk([record(1)], LATENTS)
    with pytest.raises(ReportError, match="is a link"):
        clear(folder)
    (folder / "thumbs").unlink()
    (folder / "thumbs").mkdir()
    (folder / "thumbs" / thumbnail_name(record(1))).symlink_to(outside / "precious")
    Thumbnails(folder).on_chunk([record(1)], LATENTS)
    assert not (folder / "thumbs" / thumbnail_name(record(1))).is_symlink()


@pytest.mark.parametrize("field", ["video", "sample", "chunk"])
def test_a_name_does_not_climb_out_of_the_folder(folder, outside, field):
    values = {"video": 0, "chunk": 0, "sample": 0, field: "/../../outside/precious"}
    with pytest.raises(ValueError):
        thumbnail_name(ChunkRecord(**values, start=0, frames=3, phases={}))
    with pytest.raises(ValueError):
        Thumbnails(folder).on_chunk([ChunkRecord(**values, start=0, frames=3, phases={})], LATENTS)


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", png(10**6, 10**6), png(9000, 9000), png(64, 64)]
)
def test_a_picture_that_is_none_is_left_out(folder, content):
    log_with(folder)
    (folder / "thumbs").mkdir()
    (folder / "thumbs" / thumbnail_name(record(1))).write_bytes(content)
    assert "also over" not in write_page(folder).read_text()


def test_nothing_is_read_through_links_that_leave_the_folder(folder, outside, capsys):
    log_with(folder)
    secret = folder.parent / "secret.png"
    words("secret").save(secret)
    (folder / "thumbs").mkdir()
    (folder / "thumbs" / thumbnail_name(record(1))).symlink_to(secret)
    assert "also over" not in write_page(folder).read_text()
    secret.unlink()
    (folder.parent / "keys.json").write_text('{"secret": 1}')
    for name in ("settings.json", "chunks.jsonl"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / "keys.json")
        assert "is a link to a place outside" in said(folder, capsys)


def test_pipes_folders_and_circles_in_the_place_of_files(folder, capsys):
    os.mkfifo(folder / "chunks.jsonl")
    assert "no chunks.jsonl" in said(folder, capsys)
    log = tokentrim.JsonLines(folder)
    log.on_chunk([record(1)], LATENTS)
    log.on_end()
    assert len(read_report(folder)) == 1, "a pipe is set aside"
    (folder / "settings.json").symlink_to(folder / "settings.json")
    (folder / "report.html").mkdir()
    assert "cannot write" in said(folder, capsys)


@pytest.mark.parametrize("place", ["file/x", "file", "null\0"])
def test_a_folder_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").write_text("")
    for act in (tokentrim.JsonLines, Report({}, [record(1)]).save):
        with pytest.raises(ReportError, match="cannot make the folder") as caught:
            act(tmp_path / place)
        assert str(caught.value).count("\n") == 1


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def by_name(folder):
        return tokentrim.make_observer("thumbnails", folder)

    for act in (tokentrim.JsonLines, Thumbnails, by_name, Report({}, [record(1)]).save):
        with pytest.raises(ReportError, match=r"an empty name is no folder\.\nGive one"):
            act("")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_no_draft(folder, monkeypatch):
    files.write(folder / "settings.json", "old")

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", lambda number, mode: os.close(number) or Full())
    with pytest.raises(ReportError, match=r"cannot write .*: No space left on device\.\n"):
        files.write(folder / "settings.json", "new")
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("settings.json", "old")]


# ---------------------------------------------------------------------------------------------- comparisons

OUTCOME = {
    "setting": "off", "description": {}, "seeds": [1], "values": {"luma": [0.5]}, "judged": [0], "pruned": [[]],
    "chunks": 2, "calls": 4, "extra": 0, "alone": [0], "seconds": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_broken_settings_of_a_comparison(folder, content):
    (folder / "settings.json").write_bytes(content)
    with pytest.raises(TokenTrimError, match=r"settings.json cannot be read: .*\nGive another --out") as caught:
        Store(folder, {"target": "reference"})
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"setting": 7}, {"description": "x"}, {"seeds": "1"}, {"seeds": [1, 2]}, {"values": []}, {"judged": 5},
        {"values": {"luma": ["x"]}}, {"values": {"luma": 5}}, {"pruned": [["x"]]}, {"calls": "many"}, {"extra": None},
        {"surplus": 1},
    ],
)  # fmt: skip
def test_an_outcome_of_the_wrong_type_is_named(folder, changes):
    (folder / "results.jsonl").write_text(json.dumps(OUTCOME) + "\n" + json.dumps({**OUTCOME, **changes}) + "\n")
    with pytest.raises(ReportError, match=r"results.jsonl:2 is not an outcome of a comparison: .*\nTake the line out"):
        read_outcomes(folder / "results.jsonl")


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[" * 100_000, b"null", b'{"setting": "off"}'])
def test_a_line_that_is_no_outcome_is_named(folder, line):
    (folder / "results.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ReportError, match=r"results.jsonl:1 is not an outcome"):
        read_outcomes(folder / "results.jsonl")


def test_a_comparison_follows_no_links(folder, outside):
    (folder / "settings.json").symlink_to(outside / "precious")
    with pytest.raises(TokenTrimError, match="is a link"):
        Store(folder, {"target": "reference"})
    (folder / "settings.json").unlink()
    store = Store(folder, {"target": "reference"})
    (folder / "results.jsonl").symlink_to(outside / "precious")
    with pytest.raises(ReportError, match="cannot write"):
        store.add(Outcome(**OUTCOME))
    (folder / "results.jsonl").unlink()
    (folder / "results.jsonl").hardlink_to(outside / "precious")
    with pytest.raises(ReportError, match="no file of this folder alone"):
        store.add(Outcome(**OUTCOME))
    (folder / "results.jsonl").unlink()
    (folder / "results.jsonl").symlink_to(outside / "precious")
    with pytest.raises(TokenTrimError, match="is a link"):
        Store(folder, {"target": "reference"})
    (folder / "results.jsonl").unlink()
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(outside / "new")
    with pytest.raises(ReportError, match=r"cannot write .*\.lock"):
        Store(folder, {"target": "reference"})
