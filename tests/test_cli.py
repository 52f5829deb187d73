"""python -m pytest tests/test_cli.py

The command lines: what they write, and how their runs are resumed. Most calls run main() in this process; a few start
a process.
"""
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import world
from commands import HEADER, ROWS, read, refused
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

import knockout
import lens
import llava_min
import score
import vicuna
from groups import NAMES
from harness import hub
from harness.experiment import Study
from harness.flags import PAPER_EDGES, Parser
from harness.questions import TASKS, read_csv
from views import open_image

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------- what they write

@pytest.mark.parametrize("kind", ["llava-1.5", "llava-1.6", "llama3-next"])
def test_knockout_writes_a_row_per_question_edge_and_layer_equal_to_the_plain_curve(call, data, checkpoint, model,
                                                                                    tmp_path, kind):
    out = tmp_path / "out"
    code, stdout, err = call(knockout.main, "--model", checkpoint(kind), *data, "--all", "--src", "image", "--tgt",
                             "question", "--edge", "True Option->Last", "last->last", "--window", 3, "--dtype",
                             "float32", "--out", out)
    assert code == 0, err
    assert "3/3" in err and str(out / "knockout.csv") in stdout and str(out / "knockout.png") in stdout
    assert err.startswith(f"model {checkpoint(kind)} ") and err.count("model ") == 1    # one line of what was resolved
    rows, m = read(out / "knockout.csv"), model(kind)
    L, edges = len(m.decoder.layers), ["last->last", "image->question", "true_option->last"]
    assert tuple(rows[0]) == (*knockout.COLUMNS, "model", "dtype", "subword", "heads")
    assert [(r["question_id"], r["edge"], int(r["layer"])) for r in rows] == [
        (q, e, l) for q in ("01", "02", "03") for e in edges for l in range(L)]
    for q in read_csv(data[1], data[3]):
        p = q.prompt(m)
        g, x = q.groups(p), m.embed(p)
        logits, caches = m.prefill(x, p.positions)
        token, answer = logits.argmax().item(), m.words(m.decode(logits, caches, len(p))[0])
        for edge in edges:
            mine = [r for r in rows if r["question_id"] == q.id and r["edge"] == edge]
            points = knockout.curve(m.decoder, x, p.positions, *map(g.positions, edge.split("->")), token, 3)
            assert [float(r["p_knockout"]) for r in mine] == pytest.approx(points, rel=1e-5)
            for r in mine:
                base, cut = float(r["p_base"]), float(r["p_knockout"])
                assert base == pytest.approx(logits[0].softmax(-1)[token].item(), rel=1e-5)
                assert float(r["change_percent"]) == (cut - base) / base * 100           # full precision
                assert (r["prediction"], r["token"]) == (answer, m.tokenizer.id_to_token(token))
                assert (r["image"], r["task"], r["window"]) == (q.image.name, "ChooseAttr", "3")
    image = Image.open(out / "knockout.png")
    assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize("flags", [("--heads", "0,2"), pytest.param((), marks=pytest.mark.slow),
                                   pytest.param(("--subword", "last"), marks=pytest.mark.slow)])
def test_plain_gives_the_same_csv_as_the_sweep(call, data, checkpoint, tmp_path, flags):
    argv = ("--model", checkpoint("llava-1.6"), *data, "--all", "--window", 2, "--dtype", "float32", *flags)
    assert call(knockout.main, *argv, "--out", tmp_path / "fast")[0] == 0
    assert call(knockout.main, *argv, "--plain", "--out", tmp_path / "slow")[0] == 0
    fast, slow = (read(tmp_path / d / "knockout.csv") for d in ("fast", "slow"))
    assert len(fast) == len(slow) > 0
    for ours, theirs in zip(fast, slow, strict=True):
        for column in ("p_base", "p_knockout"):
            assert float(ours.pop(column)) == pytest.approx(float(theirs.pop(column)), rel=1e-5)
        assert float(ours.pop("change_percent")) == pytest.approx(float(theirs.pop("change_percent")), abs=2e-3)
        for column in score.COLUMNS[1:]:                            # sums of logarithms, differences of logits
            a, b = ours.pop(column), theirs.pop(column)
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-5, abs=1e-4)
        assert ours == theirs
    refused(call(knockout.main, *argv, "--out", tmp_path / "slow"), "plain", tmp_path / "slow")


def test_heads_change_what_is_cut_and_a_head_that_is_not_there_is_named(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--limit", 1, "--all", "--edge", "image->question")
    for name, flags in (("all", ()), ("0", ("--heads", "0")), ("01", ("--heads", "0,1"))):
        assert call(knockout.main, *argv, *flags, "--out", tmp_path / name)[0] == 0
    curves = [[r["p_knockout"] for r in read(tmp_path / name / "knockout.csv")] for name in ("all", "0", "01")]
    assert len({tuple(c) for c in curves}) == 3
    refused(call(knockout.main, *argv, "--heads", "0,99", "--out", tmp_path / "no"), "head 99", "heads 0 to 3")
    refused(call(knockout.main, *argv, "--heads", "0,x", "--out", tmp_path / "no"), "--heads", "'0,x'")


def test_subword_last_is_measured_after_the_answers_other_tokens(call, data, checkpoint, model, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--edge", "image->last", "--window", 2, "--dtype",
            "float32", "--subword", "last", "--out", tmp_path / "out")
    assert call(knockout.main, *argv)[0] == 0
    rows, m, longer = read(tmp_path / "out" / "knockout.csv"), model("llava-1.5"), 0
    for q in read_csv(data[1], data[3]):
        p = q.prompt(m)
        ids, = m.decode(*m.prefill(m.embed(p), p.positions), len(p))
        x = torch.cat((m.embed(p), m.decoder.embed_tokens(torch.tensor([ids[:-1]], dtype=torch.long))), 1)
        T = x.shape[1]
        mine = [r for r in rows if r["question_id"] == q.id]
        points = knockout.curve(m.decoder, x, torch.arange(T), list(p.image), [T - 1], ids[-1], 2)
        assert [float(r["p_knockout"]) for r in mine] == pytest.approx(points, rel=1e-5)
        assert {r["token"] for r in mine} == {m.tokenizer.id_to_token(ids[-1])}
        longer += len(ids) > 1
    assert longer                                                   # answers of several tokens were among them


@pytest.mark.slow
@pytest.mark.parametrize("main, name, flags", [
    (knockout.main, "knockout", ("--edge", "image->question", "true_option->last", "--window", 2)),
    (lens.main, "lens", ()), (lens.main, "jaccard", ("--modules",))])
def test_shards_are_merged_as_one_process_would_have_written_them(call, data, checkpoint, tmp_path, main, name, flags):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--dtype", "float32", *flags)
    assert call(main, *argv, "--out", tmp_path / "one")[0] == 0
    code, stdout, err = call(main, *argv, "--shard", "1/2", "--out", tmp_path / "two")
    assert code == 0 and "shard 1 of 2 is done; the last one" in stdout, err
    assert not (tmp_path / "two" / f"{name}.csv").exists()
    code, stdout, err = call(main, *argv, "--shard", "0/2", "--out", tmp_path / "two")
    assert code == 0 and "3 questions" in stdout, err
    for suffix in (".csv", ".progress"):
        one, two = ((tmp_path / out / f"{name}{suffix}").read_bytes() for out in ("one", "two"))
        assert one == two
    assert (tmp_path / "two" / f"{name}.png").exists()
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (record["shards"], record["questions"], len(record["calls"])) == (2, 3, 2)
    (tmp_path / "two" / f"{name}.png").unlink()                     # a shard that is called again draws what is missing
    code, stdout, _ = call(main, *argv, "--shard", "1/2", "--out", tmp_path / "two")
    assert code == 0 and "merged in" in stdout and (tmp_path / "two" / f"{name}.png").exists()
    refused(call(main, *argv, "--shard", "1/2", "--limit", 2, "--out", tmp_path / "two"), "other questions", "asks 2")
    assert call(main, *argv, "--out", tmp_path / "two")[0] == 0     # and one process can resume it
    refused(call(main, *argv, "--shard", "2/2", "--out", tmp_path / "two"), "--shard", "'2/2'")


@pytest.mark.slow
def test_torchrun_splits_the_questions_over_its_processes(call, data, checkpoint, tmp_path):
    argv = ["--model", checkpoint("llava-1.5"), *data, "--all", "--dtype", "float32", "--edge", "image->last"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "knockout.py",
                           *map(str, argv), "--out", tmp_path / "two"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert call(knockout.main, *argv, "--out", tmp_path / "one")[0] == 0
    assert (tmp_path / "two" / "knockout.csv").read_bytes() == (tmp_path / "one" / "knockout.csv").read_bytes()
    assert (tmp_path / "two" / "knockout.png").exists()


def test_run_json_names_model_weights_and_settings(call, data, checkpoint, tmp_path):
    folder, out = checkpoint("llava-1.5"), tmp_path / "out"
    assert call(knockout.main, "--model", folder, *data, "--all", "--edge", "image->last", "--out", out)[0] == 0
    record = json.loads((out / "run.json").read_text())
    assert record["model"] == record["origin"] == str(folder) and record["seed"] == 0
    assert record["settings"]["edges"] == ["image->last"] and len(record["settings"]["config"]) == 4
    assert record["settings"]["weights"] == hub.weights_hash(hub.resolve(str(folder)).files)
    assert record["settings"]["dtype"] == ("float32" if record["settings"]["device"] == "cpu" else "float16")
    assert record["calls"][0]["command"][0] == "knockout.py" and record["questions"] == 3


def test_a_question_with_a_dollar_sign_is_drawn(call, photo, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), "--image", photo, "--question", "Is it $5 or x_{ $6 now?", "--out",
            tmp_path / "out")
    assert call(knockout.main, *argv, "--edge", "text:$5 or x_{ $6->last")[0] == 0
    assert call(knockout.main, *argv, "--groups")[0] == 0


def test_every_edge_is_looked_up_before_the_first_is_measured(call, photo, checkpoint, tmp_path):
    """With a good edge before the bad one, not one more module of the model is run."""
    argv = ("--model", checkpoint("llava-1.5"), "--image", photo, "--question", "Is it red?", "--out", tmp_path / "out")

    def modules(*edges):
        calls = []
        hook = register_module_forward_hook(lambda *_: calls.append(1))
        result = call(knockout.main, *argv, "--edge", *edges)
        hook.remove()
        return len(calls), result
    good, (code, _, err) = modules("image->last")
    assert code == 0, err
    shutil.rmtree(tmp_path / "out")
    for bad, words in (("true_option->last", ()), ("system->system", ("position(s) [0",))):
        alone, _ = modules(bad)
        after, result = modules("image->last", bad)
        refused(result, bad.split("->")[0], *words)
        assert 0 < alone == after < good


def test_only_right_answers_count_unless_all_is_given(call, data, checkpoint, model, tmp_path):
    m, rows = model("llava-1.5"), []
    for line, q in zip(ROWS, read_csv(data[1], data[3]), strict=True):
        answer = m.generate(q.prompt(m))
        rows.append(line if q.id == "02" else line.replace(f",{q.answer},", f',"{answer.lower()}",', 1))
    data[1].write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    argv = ("--model", checkpoint("llava-1.5"), *data, "--edge", "image->last", "--dtype", "float32")
    code, stdout, err = call(knockout.main, *argv, "--out", tmp_path / "right")
    assert code == 0 and "3 questions, 2 answered right" in stdout, err
    assert {r["question_id"] for r in read(tmp_path / "right" / "knockout.csv")} == {"01", "03"}
    assert call(knockout.main, *argv, "--all", "--out", tmp_path / "all")[0] == 0
    assert {r["question_id"] for r in read(tmp_path / "all" / "knockout.csv")} == {"01", "02", "03"}


def test_an_edge_whose_group_a_question_lacks_gives_no_row_and_is_counted(call, data, checkpoint, tmp_path):
    data[1].write_text(data[1].read_text().replace("Is the lamp on or off?", "Is the lamp turned on?"))
    code, stdout, err = call(knockout.main, "--model", checkpoint("llava-1.5"), *data, "--all", "--edge",
                             "false_option->last", "image->last", "--out", tmp_path / "out")
    assert code == 0, err
    rows = read(tmp_path / "out" / "knockout.csv")
    assert {r["question_id"] for r in rows if r["edge"] == "false_option->last"} == {"01", "02"}
    assert {r["question_id"] for r in rows if r["edge"] == "image->last"} == {"01", "02", "03"}
    assert "false_option->last: no row for 1 question (" in stdout


def test_groups_prints_the_table_of_groups_and_draws_them(call, photo, checkpoint, tmp_path):
    code, stdout, _ = call(knockout.main, "--model", checkpoint("llava-1.6"), "--image", photo, "--question",
                           "Is the cup red or blue?", "--options", "red,blue", "--answer", "blue", "--box", "0,0,40,30",
                           "--edge", "image-newlines->text:cup", "--groups", "--out", tmp_path / "out")
    table = {line.split()[0]: line for line in stdout.splitlines() if line}
    assert code == 0 and set(NAMES) <= set(table)
    assert "Is the cup red or blue?" in table["question"] and table["true_option"].endswith("blue")
    assert "only" not in table["newlines"] and "(" in table["captions"]
    assert table["image-newlines"] and table["text:cup"].endswith("cup")
    assert Image.open(tmp_path / "out" / "groups.png").size[0] > 300
    assert not (tmp_path / "out" / "knockout.csv").exists()


@pytest.mark.slow
def test_without_data_the_bundled_questions_are_asked_over_the_edges_of_figures_3_to_5(call, checkpoint, tmp_path):
    code, stdout, err = call(knockout.main, "--model", checkpoint("llava-1.5"), "--limit", 1, "--all", "--window", 2,
                             "--out", tmp_path / "out")
    assert code == 0, err
    rows = read(tmp_path / "out" / "knockout.csv")
    assert {r["task"] for r in rows} == set(TASKS.values())
    assert {r["edge"] for r in rows} == set(knockout.EDGES)


def test_a_text_only_model_reads_captions_in_the_pictures_place(call, checkpoint, tmp_path):
    (tmp_path / "x_Cap.csv").write_text(HEADER + ",captions\n" + ROWS[0] + ",a red cup. a table.\n")
    code, _, err = call(knockout.main, "--model", checkpoint("vicuna"), "--data", tmp_path / "x_Cap.csv", "--all",
                        "--edge", "captions->last", "image->last", "--out", tmp_path / "out")
    assert code == 0, err
    assert {r["edge"] for r in read(tmp_path / "out" / "knockout.csv")} == {"captions->last"}


def test_llava_min_answers_a_question(call, photo, checkpoint, model):
    m = model("llava-1.5")
    argv = ("--model", checkpoint("llava-1.5"), "--dtype", "float32", "--image", photo, "--question", "Is it red?")
    code, stdout, err = call(llava_min.main, *argv)
    assert code == 0 and stdout == m.generate(m.prompt("Is it red?", open_image(photo))) + "\n" and err == ""
    long = m.prompt("Is it red?", open_image(photo), brief=False)
    assert call(llava_min.main, *argv, "--long", "--tokens", 3)[1].strip() == m.generate(long, 3)
    assert "single word" not in long.text


def test_a_decoder_runs_alone(call, checkpoint):
    code, stdout, err = call(vicuna.main, "--weights", checkpoint("vicuna"), "--prompt", "Is the cup", "--tokens", 3)
    assert code == 0 and stdout.startswith("Is the cup"), err


SCRIPTS = sorted(str(file.relative_to(ROOT).with_suffix("")).replace(os.sep, ".") for folder in ("", "harness", "tiny")
                 for file in (ROOT / folder).glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_manual_with_an_example(call, script):
    code, stdout, _ = call(importlib.import_module(script).main, "--help")
    command = f"python -m {script}" if "." in script else f"python {script}.py"
    assert code == 0 and command in stdout and "usage:" in stdout


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_accents_changes_nothing_but_what_it_shows(data, checkpoint, tmp_path, terminal):
    """The question comes from a file and the answer goes to one, both in UTF-8; "?" stands on the terminal."""
    asked = "Is the café’s cup red or blue?"
    text = data[1].read_text(encoding="utf-8").replace("Is the cup red or blue?", asked)
    data[1].write_text(text, encoding="utf-8")
    for argv, shown in (((), "wrote "), (("--groups",), "the caf??s cup")):
        done = subprocess.run([sys.executable, ROOT / "knockout.py", "--model", checkpoint("llava-1.5"), *data, "--all",
                               "--limit", "1", "--edge", "image->last", "--out", tmp_path / "out", *argv],
                              capture_output=True, encoding="ascii", env=os.environ | terminal)
        assert done.returncode == 0 and shown in done.stdout, (done.stdout, done.stderr)
    assert {row["question"] for row in read(tmp_path / "out" / "knockout.csv")} == {asked}


@pytest.mark.slow
def test_help_needs_no_model_and_no_data_beside_it():
    done = subprocess.run([sys.executable, ROOT / "knockout.py", "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "python knockout.py" in done.stdout and "usage:" in done.stdout and not done.stderr


def test_help_and_manual_name_the_edges_that_are_cut_without_a_flag(call):
    parsed = [knockout.parse(Parser("what it is"), argv).edges for argv in (
        [], ["--image", "a", "--question", "b", "--box", "0,0,1,1"], ["--image", "a", "--question", "b"])]
    assert parsed == [tuple(tuple(edge.split("->")) for edge in knockout.EDGES[:n]) for n in (6, 6, 4)]
    assert knockout.EDGES == PAPER_EDGES
    shown = " ".join(call(knockout.main, "--help")[1].split())
    assert ", ".join(knockout.EDGES) in shown and "without --box the first four" in shown
    manual = (ROOT / "docs" / "manual.md").read_text(encoding="utf-8")
    assert all(f"`{edge}`" in manual for edge in knockout.EDGES)


def test_list_groups_says_what_every_name_means_and_stops(call):
    code, stdout, err = call(knockout.main, "--list-groups")
    assert code == 0 and not err and all(name in stdout for name in NAMES) and "text:WORDS" in stdout
    assert [line for line in stdout.splitlines() if line.startswith("    image ")]


# ---------------------------------------------------------------------------------------------------- resuming

@pytest.mark.slow
def test_a_stopped_run_is_resumed_and_ends_as_if_it_had_not_stopped(call, data, checkpoint, tmp_path, monkeypatch):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--edge", "image->question", "question->last",
            "--dtype", "float32", "--window", 2)
    assert call(knockout.main, *argv, "--out", tmp_path / "whole")[0] == 0
    honest, asked = Study.ask, []

    def stopped(study, q, *how, **more):
        asked.append(q.id)
        if asked == ["01", "02"]:
            raise KeyboardInterrupt
        return honest(study, q, *how, **more)
    monkeypatch.setattr(Study, "ask", stopped)
    code, _, err = call(knockout.main, *argv, "--out", tmp_path / "parts")
    assert code == 130 and "same command" in err
    assert {r["question_id"] for r in read(tmp_path / "parts" / "knockout.csv")} == {"01"}
    assert call(knockout.main, *argv, "--out", tmp_path / "parts")[0] == 0
    assert asked == ["01", "02", "02", "03"]                        # the first question is not asked again
    whole, parts = ((tmp_path / d / "knockout.csv").read_bytes() for d in ("whole", "parts"))
    assert whole == parts
    monkeypatch.setattr(llava_min, "load", None)                    # all is done: the model is not even loaded
    assert call(knockout.main, *argv, "--out", tmp_path / "parts")[0] == 0


@pytest.mark.slow
def test_another_runs_directory_is_refused_by_the_setting_that_differs(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--edge", "image->question", "--out", tmp_path / "out")
    assert call(knockout.main, *argv)[0] == 0
    before = (tmp_path / "out" / "knockout.csv").read_bytes()
    refused(call(knockout.main, *argv, "--window", 3), "window = 9, this one has 3", tmp_path / "out")
    refused(call(knockout.main, *argv, "--edge", "last->last"), "edges")
    assert (tmp_path / "out" / "knockout.csv").read_bytes() == before


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_pictures_or_another_config(call, photo, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llava-1.5", "hf"), folder)
    argv = ("--model", folder, "--image", photo, "--question", "Is it red?", "--edge", "image->last", "--out",
            tmp_path / "out")
    assert call(knockout.main, *argv)[0] == 0
    shutil.move(folder, tmp_path / "moved")                         # elsewhere it is the same model, and the same photo
    (tmp_path / "other").mkdir()
    shutil.copy(photo, tmp_path / "other")
    again = ("--model", tmp_path / "moved", "--image", tmp_path / "other" / photo.name, *argv[4:])
    assert call(knockout.main, *again)[0] == 0
    shutil.move(tmp_path / "moved", folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["rope_theta"] = 20000.0
    (folder / "config.json").write_text(json.dumps(raw))
    refused(call(knockout.main, *argv), "config")
    world.picture(60, 90).resize((90, 60)).save(photo)
    refused(call(knockout.main, *argv), tmp_path / "out")


def test_a_run_without_rows_makes_way_for_one_with_all(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--edge", "image->last", "--out", tmp_path / "out")
    refused_code, _, err = call(knockout.main, *argv)
    assert refused_code == 2 and "--all" in err
    assert call(knockout.main, *argv, "--all")[0] == 0 and len(read(tmp_path / "out" / "knockout.csv")) > 0
