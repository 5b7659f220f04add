"""Ranks, forks, and strangers that were given one folder: every process has a log of its own, and no record is lost."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.cli.main import main
from tokentrim_hooks.errors import ReportError
from tokentrim_hooks.report.names import logs_in, tag_of
from tokentrim_hooks.report.record import ChunkRecord, Report, read_report
from tokentrim_hooks.report.thumbnails import Thumbnails

LATENTS = torch.randn(1, 3, 4, 8, 8)


def records(*chunks, note="", video=0):
    return [ChunkRecord(video, n, 0, 3 * n, 3, {"first": 1}, grid=(1, 2), notes=(note,)) for n in chunks]


def noted(log):
    """Who wrote which chunk."""
    return [(record.notes[0], record.chunk) for record in read_report(log)]


def in_fork(work):
    """Run ``work`` in a real fork; returns its process number once it has ended well."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(number, 0)[1] == 0
    return number


@pytest.mark.parametrize("forked_at", ["made", "started", "written"])
def test_a_fork_writes_a_log_of_its_own(tmp_path, forked_at):
    log = tokentrim.JsonLines(tmp_path)
    if forked_at != "made":
        log.on_start({"adapter": "x"})
    if forked_at == "written":
        log.on_chunk(records(0, note="parent"), LATENTS)

    def child():
        if forked_at == "made":
            log.on_start({"adapter": "x"})
        log.on_chunk(records(0, 1, note="child"), LATENTS)
        log.on_end()

    number = in_fork(child)
    log.on_chunk(records(1, note="parent"), LATENTS)
    log.on_end()
    assert {"chunks.jsonl", f"chunks.pid{number}.jsonl"} == {p.name for p in logs_in(tmp_path)}
    assert {who for who, _ in noted(tmp_path)} == {"parent"}
    own = tmp_path / f"chunks.pid{number}.jsonl"
    assert noted(own) == [("child", 0), ("child", 1)]
    assert read_report(own).settings == {"adapter": "x"}


def test_a_fork_of_a_fork_and_many_at_once(tmp_path):
    log = tokentrim.JsonLines(tmp_path)
    log.on_start({})

    def work(name):
        for chunk in range(20):
            log.on_chunk(records(chunk, note=name), LATENTS)

    def child(name):
        in_fork(lambda: work(f"{name}, grandchild"))
        work(name)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child, args=(f"child {i}",)) for i in range(3)]
    for process in children:
        process.start()
    work("parent")
    for process in children:
        process.join(60)
    found = [noted(path) for path in logs_in(tmp_path)]
    assert len(found) == 7 and all(len(lines) == 20 and len({who for who, _ in lines}) == 1 for lines in found)


def test_a_fork_that_only_ends_leaves_no_trace(tmp_path):
    log = tokentrim.JsonLines(tmp_path)
    log.on_start({})
    log.on_chunk(records(0, note="parent"), LATENTS)
    in_fork(log.on_end)
    log.on_chunk(records(1, note="parent"), LATENTS)
    assert [p.name for p in logs_in(tmp_path)] == ["chunks.jsonl"] and len(noted(tmp_path)) == 2


@pytest.mark.parametrize("rank", ["0", "1", "12"])
def test_a_rank_writes_a_log_of_its_own(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    log = tokentrim.JsonLines(tmp_path)
    log.on_start({"rank": rank})
    log.on_chunk(records(0), LATENTS)
    number = in_fork(lambda: log.on_chunk(records(0), LATENTS))
    log.on_end()
    Report({"rank": rank}, records(0)).save(tmp_path / "saved")
    tag = "" if rank == "0" else f".rank{rank}"
    assert {p.name for p in logs_in(tmp_path)} == {f"chunks{tag}.jsonl", f"chunks{tag}.pid{number}.jsonl"}
    assert json.loads((tmp_path / f"settings{tag}.json").read_text()) == {"rank": rank}
    assert [p.name for p in logs_in(tmp_path / "saved")] == [f"chunks{tag}.jsonl"]


def test_what_rank_says_is_no_name(tmp_path, monkeypatch):
    for rank in ("../../x", "-1", "one", ""):
        monkeypatch.setenv("RANK", rank)
        assert tokentrim.JsonLines(tmp_path).path == tmp_path / "chunks.jsonl"


GLOO = """
import sys
import torch
import torch.distributed as dist
import tokentrim_hooks as tokentrim
from tokentrim_hooks.report.record import ChunkRecord

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
log = tokentrim.JsonLines(sys.argv[2] + "/log")
pictures = tokentrim.make_observer("thumbnails", sys.argv[2] + "/log")
log.on_start({"rank": rank})
for chunk in range(30):
    dist.barrier()
    records = [ChunkRecord(0, chunk, 0, 3 * chunk, 3, {}, notes=(str(rank),))]
    log.on_chunk(records, None)
    pictures.on_chunk(records, torch.randn(1, 3, 4, 2, 2))
log.on_end()
"""


def test_ranks_of_torch_distributed_have_their_own_without_an_environment(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-c", GLOO]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [process.wait(240) for process in ranks] == [0, 0]
    folder = tmp_path / "log"
    for rank, tag in enumerate(("", ".rank1")):
        assert noted(folder / f"chunks{tag}.jsonl") == [(str(rank), chunk) for chunk in range(30)]
        assert read_report(folder / f"chunks{tag}.jsonl").settings == {"rank": rank}
        assert len(list((folder / f"thumbs{tag}").iterdir())) == 30


WRITES = """
import sys, time, warnings
import torch
import tokentrim_hooks as tokentrim
from tokentrim_hooks.report.record import ChunkRecord

name, folder, append = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    log = tokentrim.JsonLines(folder, append=append == "True")
    log.on_start({"name": name})
print(log.path.name, *(str(w.message) for w in caught), flush=True)
sys.stdin.readline()
for chunk in range(36):
    log.on_chunk([ChunkRecord(0, chunk, 0, 3 * chunk, 3, {}, notes=(name,))], None)
log.on_end()
"""


def writer(folder, name, append=False):
    command = [sys.executable, "-c", WRITES, name, str(folder), str(append)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("append", [False, True])
def test_of_two_processes_with_one_folder_neither_loses_a_record(tmp_path, append):
    first = writer(tmp_path, "first")
    assert first.stdout.readline() == "chunks.jsonl\n"
    second = writer(tmp_path, "second", append)
    told = second.stdout.readline()
    assert told.startswith(f"chunks.pid{second.pid}.jsonl ") and "give each run a folder of its own" in told
    for process in (second, first):
        process.communicate("go\n", timeout=60)
        assert process.returncode == 0
    for name, tag in (("first", ""), ("second", f".pid{second.pid}")):
        assert noted(tmp_path / f"chunks{tag}.jsonl") == [(name, chunk) for chunk in range(36)]
        assert read_report(tmp_path / f"chunks{tag}.jsonl").settings == {"name": name}


def test_many_that_begin_at_once_lose_nothing(tmp_path):
    several = [writer(tmp_path, str(i)) for i in range(4)]
    for process in several:
        process.communicate("go\n", timeout=120)
    found = [noted(path) for path in logs_in(tmp_path)]
    assert sorted(lines[0][0] for lines in found) == ["0", "1", "2", "3"]
    assert all(len(lines) == 36 and len({who for who, _ in lines}) == 1 for lines in found)


def write(folder, name, **options):
    log = tokentrim.JsonLines(folder, **options)
    log.on_start({"name": name})
    log.on_chunk(records(0, note=name), LATENTS)
    log.on_end()


def test_a_log_of_an_earlier_run_is_set_aside(tmp_path):
    for name in ("first", "second", "third"):
        write(tmp_path, name)
    assert [p.name for p in logs_in(tmp_path)] == ["chunks.jsonl", "chunks.old-1.jsonl", "chunks.old-2.jsonl"]
    assert [noted(p) for p in logs_in(tmp_path)] == [[("third", 0)], [("first", 0)], [("second", 0)]]
    assert [read_report(p).settings["name"] for p in logs_in(tmp_path)] == ["third", "first", "second"]
    write(tmp_path, "fourth", append=True)
    assert noted(tmp_path) == [("third", 0), ("fourth", 0)]


def test_a_log_that_was_killed_can_be_followed_by_another(tmp_path):
    first = writer(tmp_path, "first")
    first.stdout.readline()
    first.kill()
    first.wait()
    write(tmp_path, "second")
    assert [p.name for p in logs_in(tmp_path)] == ["chunks.jsonl"], "nothing had been written to be kept"


def test_two_logs_of_one_process(tmp_path):
    logs = [tokentrim.JsonLines(tmp_path) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, log in enumerate(logs):
            log.on_start({})
            log.on_chunk(records(0, note=str(number)), LATENTS)
    own = f"chunks.pid{os.getpid()}"
    assert {log.path.name for log in logs} == {"chunks.jsonl", f"{own}.jsonl", f"{own}-2.jsonl"}
    assert [noted(log.path)[0][0] for log in logs] == ["0", "1", "2"]


def test_one_log_that_watches_two_models_or_one_twice(tmp_path):
    log = tokentrim.JsonLines(tmp_path)
    for _ in range(2):
        log.on_start({})
        log.on_chunk(records(0), LATENTS)
    log.on_end()
    log.on_start({})
    log.on_chunk(records(0), LATENTS)
    log.on_chunk(records(1), LATENTS)
    log.on_end()
    log.on_chunk(records(2), LATENTS)
    assert len(noted(tmp_path)) == 5 and len(logs_in(tmp_path)) == 1


def test_saving_does_not_take_a_running_logs_place(tmp_path):
    log = tokentrim.JsonLines(tmp_path)
    log.on_start({})
    with pytest.raises(ReportError, match=r"a run is writing .*\nGive save another folder"):
        Report({}, records(0)).save(tmp_path)
    log.on_end()
    Report({}, records(0, note="saved")).save(tmp_path)
    assert noted(tmp_path) == [("saved", 0)]


def test_pictures_go_with_their_log(tmp_path):
    log, pictures = tokentrim.JsonLines(tmp_path), Thumbnails(tmp_path)
    log.on_start({})

    def show(note):
        log.on_chunk(records(0, note=note), LATENTS)
        pictures.on_chunk(records(0), LATENTS)

    show("parent")
    number = in_fork(lambda: show("child"))
    assert {p.name for p in tmp_path.glob("thumbs*")} == {"thumbs", f"thumbs.pid{number}"}


def test_report_draws_the_main_log_and_says_what_else_there_is(tmp_path, capsys, monkeypatch):
    write(tmp_path, "old")
    write(tmp_path, "main")
    monkeypatch.setenv("RANK", "1")
    write(tmp_path, "rank")
    assert main(["report", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'report.html'}\n" and "main" in (tmp_path / "report.html").read_text()
    assert "shows chunks.jsonl; there are also chunks.rank1.jsonl, chunks.old-1.jsonl: give one" in err
    assert main(["report", str(tmp_path / "chunks.rank1.jsonl")]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'report.rank1.html'}\n", "")
    assert "rank" in (tmp_path / "report.rank1.html").read_text()
    (tmp_path / "chunks.jsonl").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert "report.rank1.html" in capsys.readouterr().out, "the first one, where there is no main log"


def test_report_of_a_folder_of_folders_names_them(tmp_path, capsys):
    for rank in range(2):
        write(tmp_path / f"rank-{rank}", str(rank))
    assert main(["report", str(tmp_path)]) == 2
    assert "There are logs in rank-0, rank-1: give one of these." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tag"),
    [("chunks.jsonl", ""), ("chunks.rank1.pid2-3.old-4.jsonl", ".rank1.pid2-3.old-4"), ("chunks.x/../y.jsonl", "")],
)
def test_tags(tmp_path, name, tag):
    assert tag_of(tmp_path / name) == tag


FORKS = """
import os, torch
from pipeline.causal_inference import CausalInferencePipeline

pipeline = CausalInferencePipeline()
torch.manual_seed(0)
number = os.fork()
pipeline.inference(torch.randn(1, 6 if number else 9, 3, 8, 8))
if number == 0:
    raise SystemExit(0)
os.waitpid(number, 0)
"""


def test_a_script_that_forks_has_one_page_and_two_logs(project):
    (project / "inference.py").write_text(textwrap.dedent(FORKS))
    command = [sys.executable, "-m", "tokentrim_hooks", "run", "--out", "log", "--quiet", "inference.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr.count("report: log/report.html") == 1, done.stderr
    main_log, forked = logs_in(project / "log")
    assert (len(read_report(main_log)), len(read_report(forked))) == (2, 3)


def test_a_run_in_an_old_folder_shows_its_own_log_only(project):
    write(project / "log", "old")
    (project / "inference.py").write_text("print('no model')")
    command = [sys.executable, "-m", "tokentrim_hooks", "run", "--out", "log", "--quiet", "inference.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "report:" not in done.stderr and not (project / "log" / "report.html").exists()
