"""python -m pytest tests/test_runs.py

A run on disk: what a crash leaves, how a run is resumed, and what it refuses.
"""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from harness import runs
from harness.runs import Run

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("id", "text", "p")


def start(out, **settings):
    return Run(out, "x.csv", COLUMNS, {"window": 9, **settings})


def whole(out, items=range(5)):
    run = start(out)
    for i in run.todo(items, key=str):
        run.write(str(i), [[i, f'"{i}", a\nb', i / 3], [i, "é", 1e-17]], right=i % 2 == 0)
    run.finish()
    return (out / "x.csv").read_bytes()


def test_floats_are_written_in_full_precision_and_text_is_quoted(tmp_path):
    lines = whole(tmp_path, [1]).decode()
    assert lines == 'id,text,p\n1,"""1"", a\nb",0.3333333333333333\n1,é,1e-17\n'


def test_a_finished_run_has_nothing_left_to_do_and_stays_as_it_is(tmp_path):
    before = whole(tmp_path)
    run = start(tmp_path)
    assert list(run.todo(range(5), key=str)) == []
    run.close()
    assert whole(tmp_path) == before


def test_a_run_that_was_stopped_is_resumed_to_the_same_file(tmp_path):
    expected = whole(tmp_path / "whole")
    run = start(tmp_path / "parts")
    for i in run.todo(range(5), key=str):
        run.write(str(i), [[i, f'"{i}", a\nb', i / 3], [i, "é", 1e-17]], right=i % 2 == 0)
        if i == 2:
            break
    run.close()
    assert whole(tmp_path / "parts") == expected
    notes = start(tmp_path / "parts").done
    assert {key: note["right"] for key, note in notes.items()} == {str(i): i % 2 == 0 for i in range(5)}
    assert all(note["rows"] == 2 for note in notes.values())


@pytest.mark.slow
def test_whatever_byte_a_crash_cuts_the_files_at_the_run_comes_out_the_same(tmp_path):
    """The CSV may hold more than the journal says (torn rows) or the journal a torn line: both are dropped."""
    expected = whole(tmp_path)
    journal = (tmp_path / "x.progress").read_bytes()
    for cut in range(journal.index(b"\n") + 1, len(journal) + 1, 7):
        (tmp_path / "x.progress").write_bytes(journal[:cut])
        (tmp_path / "x.csv").write_bytes(expected[:max(len(expected) - cut % 11, end_of(journal[:cut]))] + b"9,to")
        assert whole(tmp_path) == expected, cut
        assert (tmp_path / "x.progress").read_bytes() == journal


def end_of(journal):
    lines = journal[:journal.rfind(b"\n") + 1].splitlines()
    return json.loads(lines[-1])["end"] if lines else 0


@pytest.mark.slow
def test_a_csv_cut_shorter_than_the_journal_says_is_made_whole(tmp_path):
    expected = whole(tmp_path)
    for size in range(0, len(expected), 13):
        (tmp_path / "x.csv").write_bytes(expected[:size])
        assert whole(tmp_path) == expected


@pytest.mark.slow
def test_a_killed_process_loses_at_most_the_question_it_was_at(tmp_path):
    code = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from harness.runs import Run
        run = Run({str(tmp_path)!r}, "x.csv", {COLUMNS!r}, {{"window": 9}})
        for i in run.todo(range(1000), key=str):
            run.write(str(i), [[i, "t", 0.5]] * 3)
            print(i, flush=True)
            time.sleep(0.002)
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for line in process.stdout:
            if line.strip() == b"20":
                break
        process.send_signal(signal.SIGKILL)
        seen = [20, *(int(line) for line in process.stdout if line.strip().isdigit())]
    run = start(tmp_path)
    assert max(seen) <= len(run.done) - 1 <= max(seen) + 1
    assert (tmp_path / "x.csv").read_text().count("\n") == 1 + 3 * len(run.done)


def test_two_processes_cannot_write_one_run(tmp_path):
    run = start(tmp_path)
    run.write("a", [[1, "t", 0.5]])
    with pytest.raises(ValueError, match="another process is writing"):
        start(tmp_path)
    run.write("b", [[2, "t", 0.5]])
    run.finish()
    assert list(start(tmp_path).done) == ["a", "b"]


@pytest.mark.parametrize("settings, words", [({"window": 3}, "window = 9, this one has 3"),
                                             ({"window": 9, "dtype": "float16"}, "dtype = nothing")])
def test_another_runs_directory_is_refused_by_the_setting_that_differs(tmp_path, settings, words):
    before = whole(tmp_path)
    with pytest.raises(ValueError, match=words):
        Run(tmp_path, "x.csv", COLUMNS, settings)
    assert (tmp_path / "x.csv").read_bytes() == before


def test_a_run_that_finished_nothing_makes_way_for_another(tmp_path):
    start(tmp_path, edges="misspelt").finish()
    assert whole(tmp_path).startswith(b"id,text,p")
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {"window": 9}


def test_files_that_are_no_runs_are_refused_and_left_alone(tmp_path):
    (tmp_path / "x.csv").write_text("mine\n")
    with pytest.raises(ValueError, match="no run.json beside it"):
        start(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is not a run's record"):
        start(tmp_path)
    assert (tmp_path / "x.csv").read_text() == "mine\n"
    before = whole(tmp_path / "b")
    journal = tmp_path / "b" / "x.progress"
    for text, words in ((b"", "is empty"), (b"[1]\n", "is damaged"), (b"\0\0\n{}\n", "is damaged"), (None, "is gone")):
        journal.write_bytes(text) if text is not None else journal.unlink()
        with pytest.raises(ValueError, match=words):
            start(tmp_path / "b")
        assert (tmp_path / "b" / "x.csv").read_bytes() == before
    for text in ("[]", '{"settings": [], "calls": []}', '{"settings": 3, "calls": 4}'):
        (tmp_path / "b" / "run.json").write_text(text)
        with pytest.raises(ValueError):
            start(tmp_path / "b")


def test_run_json_says_where_the_numbers_come_from(tmp_path):
    whole(tmp_path)
    whole(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"] == {"window": 9} and record["questions"] == 5
    assert [call["questions"] for call in record["calls"]] == [5, 0]
    assert all(call["command"] == sys.argv and call["seconds"] >= 0 for call in record["calls"])
    import torch
    for call in record["calls"]:
        assert call["versions"]["torch"] == torch.__version__.split("+")[0] and call["versions"]["python"]
        assert call["machine"]["cores"] >= 1


def test_each_question_is_synced_before_it_counts(tmp_path, monkeypatch):
    run, order = start(tmp_path), []
    honest = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), honest(fd)))
    noted = run.note
    monkeypatch.setattr(run, "note", lambda line: (order.append("note"), noted(line)))
    run.write("a", [[1, "t", 0.5]] * 50)
    assert order == ["sync", "note", "sync"]                        # the rows, then the line that makes them count


def test_the_progress_bar_counts_what_was_done_before(tmp_path, capsys):
    run = start(tmp_path)
    run.write("0", [])
    for i in run.todo(range(4), key=str):
        run.write(str(i), [])
    assert "4/4" in capsys.readouterr().err


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path, monkeypatch):
    run = start(tmp_path)
    run.write("a", [[1, "t", 0.5]])
    real = os.fsync

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.write("b", [[2, "t", 0.5]])
    monkeypatch.setattr(os, "fsync", real)
    run.rows.raw.close()                                            # as the dying process would
    assert list(start(tmp_path).done) == ["a"]
    assert (tmp_path / "x.csv").read_text() == "id,text,p\n1,t,0.5\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    runs.write_json(file, {"a": 1})

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        runs.write_json(file, {"b": 2})
    assert json.loads(file.read_text()) == {"a": 1}


def test_the_clock_has_a_time_zone():
    assert time.strptime(runs.now(), "%Y-%m-%dT%H:%M:%S%z")
