"""python -m pytest tests/test_runs.py

A run on disk: what a crash leaves, how a run is resumed, and what it refuses.
"""
import json
import os
import shutil
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


def start(out, items=range(5), shard=None, pictures=(), **settings):
    """A run of these questions. pictures: other contents than usual, {item: hash}."""
    inputs = {str(i): {"question": f"q{i}", "picture": dict(pictures).get(i, "same")} for i in items}
    return Run(out, "x.csv", COLUMNS, {"window": 9, **settings}, inputs, shard)


def rows(i):
    return [[i, f'"{i}", a\nb', i / 3], [i, "é", 1e-17]]


def whole(out, items=range(5), **how):
    run, (j, n) = start(out, items, **how), how.get("shard") or (0, 1)
    for i in run.todo(list(items)[j::n] if run.shard else items, key=str):
        run.write(str(i), rows(i), right=i % 2 == 0)
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
        run.write(str(i), rows(i), right=i % 2 == 0)
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
        inputs = {{str(i): {{"question": f"q{{i}}", "picture": "same"}} for i in range(1000)}}
        run = Run({str(tmp_path)!r}, "x.csv", {COLUMNS!r}, {{"window": 9}}, inputs)
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
    run = start(tmp_path, range(1000))
    assert max(seen) <= len(run.done) - 1 <= max(seen) + 1
    assert (tmp_path / "x.csv").read_text().count("\n") == 1 + 3 * len(run.done)


def test_two_processes_cannot_write_one_run(tmp_path):
    run = start(tmp_path)
    run.write("1", [[1, "t", 0.5]])
    with pytest.raises(ValueError, match="another process is writing"):
        start(tmp_path)
    run.write("2", [[2, "t", 0.5]])
    run.finish()
    assert list(start(tmp_path).done) == ["1", "2"]


@pytest.mark.parametrize("settings, words", [({"window": 3}, "window = 9, this one has 3"),
                                             ({"window": 9, "dtype": "float16"}, "dtype = nothing")])
def test_another_runs_directory_is_refused_by_the_setting_that_differs(tmp_path, settings, words):
    before = whole(tmp_path)
    with pytest.raises(ValueError, match=words):
        Run(tmp_path, "x.csv", COLUMNS, settings, {})
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
    run.write("1", [[1, "t", 0.5]] * 50)
    assert order == ["sync", "note", "sync"]                        # the rows, then the line that makes them count


def test_the_progress_bar_counts_what_was_done_before(tmp_path, capsys):
    run = start(tmp_path)
    run.write("0", [])
    for i in run.todo(range(4), key=str):
        run.write(str(i), [])
    assert "4/4" in capsys.readouterr().err


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path, monkeypatch):
    run = start(tmp_path)
    run.write("1", [[1, "t", 0.5]])
    real = os.fsync

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.write("2", [[2, "t", 0.5]])
    monkeypatch.setattr(os, "fsync", real)
    run.rows.raw.close()                                            # as the dying process would
    run.lock.close()
    assert list(start(tmp_path).done) == ["1"]
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


# ---------------------------------------------------------------------------------------------------- pilots, changes

@pytest.mark.parametrize("pilot", [[0], [1, 2], [2, 0], [4, 3, 2, 1, 0], []])
def test_a_pilot_grows_into_the_run_that_asks_everything_at_once(tmp_path, pilot):
    expected, journal = whole(tmp_path / "once"), (tmp_path / "once" / "x.progress").read_bytes()
    whole(tmp_path / "grown", pilot)
    assert whole(tmp_path / "grown") == expected
    assert (tmp_path / "grown" / "x.progress").read_bytes() == journal
    assert whole(tmp_path / "grown", [3, *range(3), 4]) != expected                 # and another order is put in order
    assert whole(tmp_path / "grown") == expected


def test_a_folder_that_holds_more_questions_than_are_asked_is_refused(tmp_path):
    before = whole(tmp_path)
    with pytest.raises(ValueError, match="holds rows of question 3, which is not asked now .* 5 questions, .* asks 3"):
        start(tmp_path, range(3))
    assert (tmp_path / "x.csv").read_bytes() == before


def test_a_picture_that_changed_is_noticed_before_anything_is_computed(tmp_path):
    run = start(tmp_path)
    run.write("0", rows(0))
    run.close()
    with pytest.raises(ValueError, match="the picture of question 0 is not the one that its rows were computed from"):
        start(tmp_path, pictures={0: "red"})
    assert whole(tmp_path, pictures={3: "red"})                     # one that was not asked yet may change


def test_a_csv_edited_by_hand_is_noticed_before_anything_is_computed(tmp_path):
    run = start(tmp_path)
    for i in range(3):
        run.write(str(i), rows(i))
    run.close()
    text = (tmp_path / "x.csv").read_bytes()
    for edit, words in ((text.replace(b"0.3333", b"0.4333"), "the rows of question 1 are not those"),
                        (text.replace(b"id,text", b"ID,text"), "other columns"), (b"x" * len(text), "other columns")):
        (tmp_path / "x.csv").write_bytes(edit)
        with pytest.raises(ValueError, match=words):
            start(tmp_path)
        assert (tmp_path / "x.csv").read_bytes() == edit
    (tmp_path / "x.csv").write_bytes(text)
    assert list(start(tmp_path).done) == ["0", "1", "2"]


def damaged(lines):
    """A journal's lines -> {what was done to it: text}."""
    first, *rest = lines
    notes = [json.loads(line) for line in rest]

    def edited(**fields):
        return "".join([first, json.dumps(notes[0] | fields) + "\n", *rest[1:]])
    return {"reversed": "".join([first, *rest[::-1]]), "doubled": "".join([first, rest[0], *rest]),
            "the header twice": "".join([first, *lines]), "no header": "".join(rest), "not JSON": "".join(
                [first, "{\n", *rest]), "lost": "".join([first, *rest[1:]]),
            "deep": "".join([first, "[" * 10 ** 5 + "\n", *rest]),
            **{f"{name} is {value!r}": edited(**{name: value}) for name, value in (
                ("key", []), ("key", None), ("key", 3), ("end", -5), ("end", "9"), ("end", True), ("end", 1.5),
                ("end", None), ("rows", -1), ("rows", "2"), ("hash", None), ("hash", "0" * 16), ("inputs", []),
                ("inputs", {"picture": 3}), ("right", "yes"), ("skipped", ["x"]), ("skipped", {"x": 1}))},
            "a list": "".join([first, "[1]\n", *rest]), "a number": "".join([first, "7\n", *rest])}


def test_a_damaged_journal_is_refused_and_nothing_is_lost(tmp_path):
    before, journal = whole(tmp_path), tmp_path / "x.progress"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    for what, text in damaged(lines).items():
        journal.write_text(text)
        with pytest.raises(ValueError, match=r"x\.progress is damaged|the rows of question|other columns"):
            start(tmp_path)
            raise AssertionError(what)
        assert (tmp_path / "x.csv").read_bytes() == before and journal.read_text() == text, what
    journal.write_text("".join(lines))
    assert whole(tmp_path) == before


def test_a_torn_first_line_of_a_journal_has_lost_nothing(tmp_path):
    expected = whole(tmp_path / "a")
    for torn in ('{"rows": 0, "e', "", '{"rows": 0'):
        run = start(tmp_path / "b")
        run.close()
        (tmp_path / "b" / "x.progress").write_text(torn)            # a crash in the run's first write
        assert whole(tmp_path / "b") == expected
        for file in (tmp_path / "b").iterdir():
            file.unlink()


@pytest.mark.parametrize("step", ["x.progress", "x.csv", "run.json"])
def test_a_crash_while_rows_are_put_in_order_loses_nothing(tmp_path, monkeypatch, step):
    expected = whole(tmp_path / "a")
    whole(tmp_path / "b", [3, 1])
    honest = os.replace

    def crash(source, target):
        if Path(target).name == step:
            raise KeyboardInterrupt
        honest(source, target)
    run = start(tmp_path / "b")
    for i in run.todo(range(5), key=str):
        run.write(str(i), rows(i), right=i % 2 == 0)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", crash)
        run.finish()
    run.rows.close()
    run.log.close()
    run.lock.close()
    assert whole(tmp_path / "b") == expected


# ---------------------------------------------------------------------------------------------------- shards

def shards(out, items=range(5), n=2, **how):
    """All shards in turn; those that are not the last to finish end in SystemExit."""
    for j in range(n):
        try:
            whole(out, items, shard=(j, n), **how)
        except SystemExit as stop:
            assert not stop.code


def test_shards_are_merged_into_the_run_of_one_process(tmp_path, capsys):
    expected = whole(tmp_path / "one")
    for n in (2, 3, 7):
        shards(tmp_path / f"{n}", n=n)
        assert (tmp_path / f"{n}" / "x.csv").read_bytes() == expected
        assert (tmp_path / f"{n}" / "x.progress").read_bytes() == (tmp_path / "one" / "x.progress").read_bytes()
        assert json.loads((tmp_path / f"{n}" / "run.json").read_text())["shards"] == n
    assert "shard 0 of 2 is done; the last one to finish merges them (left: 1)" in capsys.readouterr().out


def test_a_shard_that_is_called_again_becomes_the_merged_run_and_can_draw_what_is_missing(tmp_path):
    shards(tmp_path)
    for shard in ((0, 2), (1, 2)):
        run = start(tmp_path, shard=shard)
        assert (run.out, run.csv, len(run.done)) == (tmp_path, tmp_path / "x.csv", 5)
        assert list(run.todo(range(5), key=str)) == []
        run.finish()                                                # no SystemExit: the caller draws


@pytest.mark.parametrize("before, words", [
    (dict(items=range(3)), "holds a run of other questions \\(3 finished, this call asks 5\\)"),
    (dict(pictures={2: "red"}), "other questions"), (dict(window=3), "window = 3, this one has 9")])
def test_shards_in_the_folder_of_another_run_are_refused(tmp_path, before, words):
    text = whole(tmp_path, **before)
    with pytest.raises(ValueError, match=words):
        start(tmp_path, shard=(0, 2))
    assert (tmp_path / "x.csv").read_bytes() == text


def test_shards_in_the_folder_of_an_unfinished_run_are_refused(tmp_path):
    run = start(tmp_path)
    run.write("0", rows(0))
    run.close()
    with pytest.raises(ValueError, match="unfinished run without --shard"):
        start(tmp_path, shard=(1, 2))


def test_shards_that_were_asked_different_questions_are_not_merged(tmp_path, capsys):
    for j, items in ((0, range(3)), (1, range(5))):
        with pytest.raises(SystemExit):
            whole(tmp_path, items, shard=(j, 2))
    assert "(left: 0)" in capsys.readouterr().out and not (tmp_path / "x.csv").exists()
    whole(tmp_path, shard=(0, 2))                                   # with all five, they are
    assert (tmp_path / "x.csv").read_bytes() == whole(tmp_path / "one")


def test_a_merged_run_of_shards_grows_in_one_process(tmp_path):
    shards(tmp_path / "a", range(3))
    assert whole(tmp_path / "a") == whole(tmp_path / "b")


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_is_found_in_a_folder_whose_name_the_machines_encoding_lacks(tmp_path):
    folder = tmp_path / "café"
    (folder / "harness").mkdir(parents=True)
    shutil.copy(runs.__file__, folder / "harness")
    git = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for args in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *args], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True).stdout.strip().decode()
    done = subprocess.run([sys.executable, "-B", "-c", "from harness import runs; print(runs.git_commit())"],
                          cwd=folder, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}, capture_output=True)
    assert done.stdout.decode().strip() == commit, done.stderr.decode(errors="replace")
