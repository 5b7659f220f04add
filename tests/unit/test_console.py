"""Rows of text: what wraps, what is escaped."""

from tokentrim_hooks.console import WIDTH, markdown_table, plain_table, progress, show_table


def test_plain_table_wraps_only_its_last_column():
    lines = plain_table(["a", "why"], [["x" * 20, "word " * 40]]).splitlines()
    assert lines[0].split() == ["a", "why"] and lines[0].index("why") == 22
    assert len(lines) > 3 and all(len(line) <= WIDTH for line in lines)
    assert all(line.startswith(" " * 22 + "word") for line in lines[3:])


def test_numbers_stay_as_they_are_written():
    assert plain_table(["a"], [["1.500"], ["1e-05"]]).splitlines()[2:] == ["1.500", "1e-05"]


def test_a_cell_of_several_lines_and_a_table_of_no_rows():
    assert plain_table(["a", "b"], [["one\ntwo", "x"]]).splitlines()[2:] == ["one  x", "two"]
    assert plain_table(["a", "b"], []).split() == ["a", "b", "---", "---"]


def test_show_table_prints_its_title(capsys):
    show_table(["a", "b"], [["1", "2"]], "title")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title" and lines[1].split() == ["a", "b"] and lines[-1] == ""


def test_markdown_escapes_what_would_end_a_cell_or_begin_a_tag():
    text = markdown_table(["a|b", "c"], [["x", "<i>y"]])
    assert text.splitlines() == [r"| a\|b | c |", "| --- | --- |", "| x | &lt;i>y |"]


def test_progress_counts_on_stderr(capsys):
    with progress("rolling out", 2) as advance:
        advance()
        advance()
    assert "rolling out: 100%" in capsys.readouterr().err
