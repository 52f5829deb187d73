"""python -m pytest tests/test_experiment.py

harness/experiment.py: one-line errors, the types of flags, shared flags as frozen settings, which questions count, and
the edges that a question has.
"""
import argparse
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval_gqa
import figures
import knockout
import lens
import prune
from groups import EmptyGroup
from harness import questions
from harness.errors import files_of, one_line_errors
from harness.experiment import Study
from harness.flags import DataSettings, ModelSettings, Parser, Shared

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------- errors

def outcome(error, capsys):
    """What an error inside comes to -> (exit code, stderr)."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error, text", [
    (ValueError("two\nlines"), "error: two lines\n"),
    (FileNotFoundError(2, "No such file or directory", "a.csv"), "error: a.csv: No such file or directory\n"),
    (OSError(28, "No space left on device", "out/x.csv"), "error: out/x.csv: No space left on device\n"),
    (FloatingPointError("non-finite logits"), "error: non-finite logits\n"),
    (EmptyGroup("newlines: none"), "error: newlines: none\n")])
def test_what_a_user_can_cause_is_one_line_and_exit_code_2(error, text, capsys, monkeypatch):
    monkeypatch.delenv("LLAVA_FLOW_TRACEBACK", raising=False)
    assert outcome(error, capsys) == (2, text)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_running_out_of_memory_says_what_to_try(error, capsys, monkeypatch):
    monkeypatch.delenv("LLAVA_FLOW_TRACEBACK", raising=False)
    code, err = outcome(error, capsys)
    assert code == 2 and err.startswith("error: out of memory") and err.count("\n") == 1 and "--dtype" in err


def test_what_only_we_can_cause_keeps_its_traceback(monkeypatch):
    monkeypatch.delenv("LLAVA_FLOW_TRACEBACK", raising=False)
    for error in (KeyError("x"), RuntimeError("bug"), AssertionError()):
        with pytest.raises(type(error)), one_line_errors():
            raise error
    monkeypatch.setenv("LLAVA_FLOW_TRACEBACK", "1")
    with pytest.raises(ValueError), one_line_errors():
        raise ValueError("x")


def test_ctrl_c_says_that_the_run_can_be_resumed(capsys):
    code, err = outcome(KeyboardInterrupt(), capsys)
    assert code == 130 and "same command" in err


@pytest.mark.slow
@pytest.mark.parametrize("printed, code", [("x", 0), ("x' * 10 ** 6 + '", 141)])
def test_a_reader_that_stops_early_is_no_error_but_a_stop_before_the_end_is_no_success(printed, code):
    """`knockout.py | head -1`, without the race: the pipe is closed before anything is printed. A short text is still
    in the buffer when the work is done, a long one is not."""
    end, start = os.pipe()
    os.close(end)
    program = f"from harness.errors import one_line_errors\nwith one_line_errors():\n    print('{printed}')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=start, stderr=subprocess.PIPE, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"})
    os.close(start)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.slow
@pytest.mark.parametrize("streams, code, err", [("<&- >&-", 0, "note\n"), (">&- 2>&-", 0, ""),
                                                ("> /dev/full", 2, "note\nerror: the output: No space left on "
                                                                   "device\n")])
def test_streams_that_are_closed_or_full_give_no_traceback(streams, code, err):
    program = ("import sys; from harness.errors import one_line_errors\nwith one_line_errors():\n"
               "    print('note', file=sys.stderr); print('x')")
    done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {streams}', sys.executable, program], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, err)


def test_control_characters_do_not_reach_the_terminal(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        print("a\x1b[31mb\tc\x9bd")
        raise ValueError("\x1b]0;title\x07.png: no such picture")
    out, err = capsys.readouterr()
    assert out == "a\\x1b[31mb\tc\\x9bd\n" and err == "error: \\x1b]0;title\\x07.png: no such picture\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["knockout.py", "lens.py", "prune.py", "eval_gqa.py", "figures.py", "check.py",
                                    "bench.py", "llava_min.py"])
def test_ctrl_c_while_torch_is_imported_gives_no_traceback(script):
    with subprocess.Popen([sys.executable, script, "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}) as process:
        for line in process.stderr:                                 # the first modules of torch have been imported
            if b"| " in line and b"torch" in line:
                break
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode in (-signal.SIGINT, 130)


# ---------------------------------------------------------------------------------------------------- types of flags

@pytest.mark.parametrize("read, good, bad", [
    (Parser.count, {"12": 12, "1": 1}, ["0", "-1", "1.5", "x", ""]),
    (Parser.numbers, {"0": (0,), "3,0, 3": (0, 3)}, ["", "0,", "0,x", "-1", "1.5", "0;1"]),
    (Parser.shard, {"0/1": None, "0/2": (0, 2), "1/2": (1, 2), "11/12": (11, 12)},
     ["2/2", "1", "/2", "1/", "-1/2", "1/2/3", "0/0", "x/2", ""])], ids=["count", "numbers", "shard"])
def test_a_type_reads_what_it_says_and_refuses_the_rest_by_its_text(read, good, bad):
    assert {text: read(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not"):
            read(text)


def test_edges_are_canonical_and_each_comes_once_in_an_order_of_their_own():
    edges = ["text:cup->last", "Image->Last", "last -> last", "captions->question", "image->last"]
    for given in (edges, edges[::-1]):
        assert Parser.edges(given) == (("image", "last"), ("last", "last"), ("captions", "question"),
                                       ("text:cup", "last"))
    with pytest.raises(ValueError, match="SOURCE->TARGET"):
        Parser.edges(["image->last", "image"])


@pytest.mark.parametrize("edge", ["last->image", "question->image", "last->question", "instruction->options",
                                  "image->system", "question->related_patches"])
def test_an_edge_backwards_in_time_is_refused_with_the_reason(edge):
    with pytest.raises(ValueError, match=f"{edge}: {edge.split('->')[1]} comes before .* attends only to what came"):
        Parser.edges(["image->last", edge])


def test_the_window_is_the_papers_9_or_3_for_the_bundled_models():
    assert [Parser.window(name) for name in ("llava-tiny", "llava-tiny-anyres", "llava-1.5-7b")] == [
        3, 3, 9]


def test_a_flag_that_cannot_be_read_is_one_line_and_exit_code_2(capsys):
    parser = Parser("what it is")
    parser.add_shared_flags("out/x")
    for argv in (["--limit", "0"], ["--nonsense"], ["--dtype", "float8"], ["--shard", "2/2"], ["--seed", "x"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and argv[0] in err


# ---------------------------------------------------------------------------------------------------- settings

def shared(*argv):
    parser = Parser("what it is")
    parser.add_shared_flags("out/x")
    return parser.shared(parser.parse_args(argv))


def test_flags_become_settings_of_the_model_the_questions_and_the_run():
    s = shared("--model", "m", "--revision", "r", "--vision-tower", "t", "--device", "cpu", "--dtype", "float16",
               "--preprocess", "hf", "--data", "a.csv", "b.csv", "--images", "i", "--tasks", "A", "B", "--limit", "3",
               "--all", "--skip-bad", "--shard", "1/2", "--out", "o", "--seed", "7")
    assert s.model == ModelSettings("m", "r", "t", "cpu", "float16", "hf") and (s.out, s.seed) == ("o", 7)
    assert s.data == DataSettings(("a.csv", "b.csv"), "i", ("A", "B"), 3, True, True, (1, 2))
    s = shared("--image", "p.png", "--question", "Is it red?", "--answer", "no", "--options", "yes,no", "--object",
               "cup", "--object", "tea", "--box", "0,0,1,1")
    assert s.data == DataSettings(image="p.png", question="Is it red?", answer="no", options="yes,no",
                                  object=("cup", "tea"), box=("0,0,1,1",))
    assert s.model == ModelSettings() and (s.out, s.seed) == ("out/x", 0)


def test_without_questions_20_bundled_ones_of_each_task_are_asked(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert shared() == Shared(out="out/x")
    assert shared().data == DataSettings((str(questions.BUNDLED),), str(questions.BUNDLED.parent / "images"), limit=20)
    assert shared("--limit", "3", "--all").data.limit == 3
    assert shared("--data", "a.csv").data.limit is None and shared("--question", "x").data == DataSettings(question="x")


def test_under_torchrun_a_process_has_the_shard_of_its_rank(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert shared().data.shard == (1, 3) and shared("--shard", "0/2").data.shard == (0, 2)


def test_a_pattern_that_the_shell_left_becomes_the_names_that_it_matches(tmp_path, monkeypatch):
    """As on Windows, or in quotes. Sorted, in its place among the files given; a file that has that very name comes
    first; and what is no pattern stays, whether it is there or not."""
    monkeypatch.chdir(tmp_path)
    for name in ("b_X.csv", "a_X.csv", "a_Y.csv", "[a]_X.csv"):
        (tmp_path / name).touch()
    assert shared("--data", "z.csv", "?_X.csv", "c.csv").data.data == ("z.csv", "a_X.csv", "b_X.csv", "c.csv")
    assert shared("--data", "[a]_X.csv").data.data == ("[a]_X.csv",)
    (tmp_path / "[a]_X.csv").unlink()
    assert shared("--data", "[a]_X.csv").data.data == ("a_X.csv",)
    assert files_of("CSV", [str(tmp_path / "*_X.csv")]) == [str(tmp_path / f"{letter}_X.csv") for letter in "ab"]
    with pytest.raises(ValueError, match=r"^--data q\*\.csv: no file matches this pattern; .* name the files$"):
        shared("--data", "a_X.csv", "q*.csv")


@pytest.mark.parametrize("argv, words", [
    (("--data", "a.csv", "--box", "0,0,1,1"), "--box and --data cannot be combined"),
    (("--data", "a.csv", "--image", "p.png"), "--image and --data cannot be combined"),
    (("--image", "p.png", "--tasks", "A"), "--tasks selects from question files")])
def test_many_questions_and_one_from_the_command_line_cannot_be_combined(argv, words):
    with pytest.raises(ValueError, match=words):
        shared(*argv)


@pytest.mark.parametrize("parse", [
    lambda p: knockout.parse(p, ["--heads", "0,3", "--edge", "image->last"]), lambda p: prune.parse(p, ["--last", "1"]),
    lambda p: lens.parse(p, ["--edge", "image->question"]), lambda p: eval_gqa.parse(p, questions, []),
    lambda p: figures.parse(p, ["3", "table2"])], ids=["knockout", "prune", "lens", "eval_gqa", "figures"])
def test_the_settings_of_every_instrument_are_frozen_and_hold_nothing_that_could_be_changed(parse):
    s = parse(Parser("what it is"))
    for part in (s, s.shared, s.shared.model, s.shared.data):
        assert dataclasses.is_dataclass(part)
        for field in dataclasses.fields(part):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, field.name, None)
    hash(s)                                                         # TypeError where a list or a dict is inside


# ---------------------------------------------------------------------------------------------------- the questions

@pytest.fixture
def study(data, model, checkpoint, tmp_path):
    """study(**fields of DataSettings) -> a Study over the questions of `data`, or over an own one."""
    def made(**how):
        how = how if "question" in how else {"data": (str(data[1]),), "images": str(data[3]), **how}
        return Study(Shared(ModelSettings(str(checkpoint("llava-1.5"))), DataSettings(**how), str(tmp_path / "out")),
                     lambda m, checkpoint: model("llava-1.5"))
    return made


def test_a_question_counts_if_it_is_answered_right_and_under_all_or_as_the_only_one_in_any_case(study, photo):
    rule = {right: study().counts(right) for right in (True, False)}
    assert rule == {True: True, False: False}
    assert study(all=True).counts(False) and study(image=str(photo), question="Is it red?").counts(False)


def test_what_is_asked_says_if_it_was_right_and_if_it_counts(study, model, photo):
    m, some = model("llava-1.5"), study()
    wrong = some.questions[0]
    answer = m.generate(wrong.prompt(m))
    right = dataclasses.replace(wrong, answer=answer.lower())
    assert answer.lower() != wrong.answer
    for s, q, verdict in ((some, right, (True, True)), (some, wrong, (False, False)),
                          (study(all=True), wrong, (False, True))):
        asked = s.ask(q)
        assert (asked.right, asked.counts) == verdict and asked.answer == answer and not asked.strict
    own = study(image=str(photo), question="Is it red?")
    asked = own.ask(own.questions[0])
    assert (asked.right, asked.counts, asked.strict) == (False, True, True)


def test_what_is_asked_is_the_clean_pass_the_models_answer_and_its_probability(study, model):
    m, s = model("llava-1.5"), study()
    for q in s.questions:
        asked, p = s.ask(q), q.prompt(m)
        logits, caches = m.prefill(m.embed(p), p.positions)
        ids, = m.decode(logits, caches, len(p))
        assert torch.equal(asked.x, m.embed(p)) and torch.equal(asked.clean.stream[0], asked.x)
        assert torch.equal(asked.positions, p.positions) and asked.prompt.text == p.text
        assert (asked.token, asked.answer) == (ids[0], m.words(ids))
        assert asked.token_text == m.tokenizer.id_to_token(ids[0])
        assert asked.p == pytest.approx(logits[0].softmax(-1)[ids[0]].item(), rel=1e-5)
        assert asked.groups.named == q.groups(p).named
        assert asked.first_columns == [q.id, q.image.name, "ChooseAttr", q.question, q.answer, asked.answer]
        with pytest.raises(dataclasses.FrozenInstanceError):
            asked.p = 1.0


def test_an_edge_that_a_question_of_many_does_not_have_is_named_with_the_reason(study):
    s = study()
    asked = s.ask(s.questions[0])
    cuts, lacking = asked.edges([("image", "last"), ("newlines", "last"), ("question", "text:green")])
    assert cuts == {"image->last": (asked.groups.positions("image"), asked.groups.positions("last"))}
    assert list(lacking) == ["newlines->last", "question->text:green"]
    assert "only AnyRes models have newlines" in lacking["newlines->last"]
    assert "text:green" in lacking["question->text:green"]
    with pytest.raises(ValueError, match="unknown token group"):    # no group of any question
        asked.edges([("imgae", "last")])


def test_an_edge_that_the_only_question_does_not_have_is_an_error(study, photo):
    s = study(image=str(photo), question="Is it red?")
    asked = s.ask(s.questions[0])
    assert asked.edges([("image", "last")]) == (
        {"image->last": (asked.groups.positions("image"), asked.groups.positions("last"))}, {})
    with pytest.raises(EmptyGroup, match="only AnyRes models have newlines"):
        asked.edges([("image", "last"), ("newlines", "last")])


def test_a_study_loads_its_model_once_and_only_if_a_question_is_left(study, model):
    loaded = []
    for left in (3, 0):
        s = Study(study(all=True).shared, lambda m, checkpoint: loaded.append(m.name) or model("llava-1.5"))
        s.open("x.csv", ("id", "p"))
        asked = []
        for q in s.todo():
            asked.append(s.ask(q))
            s.write(asked[-1], [[q.id, asked[-1].p]])
        s.finish()
        assert len(asked) == left and len(loaded) == 1


def test_an_error_inside_a_question_ends_the_run_or_is_noted_under_skip_bad(study):
    with pytest.raises(ValueError, match="bad"), study().skipping_bad():
        raise ValueError("bad")
    lenient = study(skip_bad=True)
    with lenient.skipping_bad():
        raise ValueError("bad")
    assert lenient.bad == ["bad"]
    with lenient.skipping_bad():
        raise FloatingPointError("non-finite")
    assert lenient.bad == ["bad", "non-finite"]
    with pytest.raises(KeyError), lenient.skipping_bad():                   # a defect of ours
        raise KeyError("x")
