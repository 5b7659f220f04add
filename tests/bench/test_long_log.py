"""The tool that says what a long run with a log needs of memory measures such a run, and its report."""

import json

import long_log


def test_sizes_are_of_a_run_whose_log_has_every_chunk_and_of_its_report(tmp_path):
    sizes = long_log.run(64, long_log.WARM + 2, tmp_path)
    assert [*sizes] == [long_log.WARM, long_log.WARM + 1] and min(sizes.values()) > 100
    records = [json.loads(line) for line in (tmp_path / "chunks.jsonl").read_text().splitlines()]
    assert [record["chunk"] for record in records] == [*range(long_log.WARM + 2)]
    peak, seconds = long_log.read(tmp_path)
    assert peak > 100 and seconds > 0 and (tmp_path / "report.html").is_file()
