"""python -m pytest tests/test_plots.py

harness/plots.py: that it draws every kind of CSV again, what its intervals are, and what it refuses.
"""
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from commands import refused

import figures
import knockout
import lens
import prune
from harness import intervals, plots

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def same_picture(call, tmp_path):
    """same_picture(CSV, PNG): drawn again, beside the CSV and elsewhere, it is the picture that the run drew."""
    def check(csv, picture):
        csv = shutil.copy(csv, tmp_path / "copy.csv")
        for argv, png in (((), tmp_path / "copy.png"), (("--out", tmp_path / "a" / "b.png"), tmp_path / "a" / "b.png")):
            assert call(plots.main, csv, *argv) == (0, f"wrote {png}\n", "")
            assert png.read_bytes() == picture.read_bytes()
    return check


@pytest.mark.slow
@pytest.mark.parametrize("main, argv, csv, picture", [
    (knockout.main, ("--edge", "image->question", "last->last"), "knockout.csv", "knockout.png"),
    (lens.main, (), "lens.csv", "lens.png"),
    (lens.main, ("--modules", "--edge", "image->question"), "jaccard.csv", "jaccard.png"),
    (prune.main, ("--last", 1, "--repeats", 1), "prune.csv", "prune.png"),
    (figures.main, (15,), "runs/norms/norms.csv", "figure_15.png")])
def test_every_kind_of_csv_is_drawn_again_as_its_run_drew_it(call, data, checkpoint, tmp_path, same_picture, main, argv,
                                                             csv, picture):
    code, _, err = call(main, *argv, "--model", checkpoint("llava-1.5"), *data, "--all", "--limit", 1, "--out",
                        tmp_path)
    assert code == 0, err
    same_picture(tmp_path / csv, tmp_path / picture)


@pytest.mark.slow
def test_an_accuracy_csv_is_drawn_again_as_table_2(call, checkpoint, tmp_path, same_picture):
    code, _, err = call(figures.main, "table2", "--model", checkpoint("llava-1.5"), "--limit", 1, "--out", tmp_path)
    assert code == 0, err
    same_picture(tmp_path / "runs" / "eval_gqa" / "accuracy.csv", tmp_path / "table_2.png")


@pytest.mark.slow
def test_plots_is_a_command_with_one_line_for_bad_input(tmp_path):
    def run(file):
        done = subprocess.run([sys.executable, "-m", "harness.plots", file], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    head = "question_id,task,removed_layers,correct,seconds,prefill_flops,image_tokens\n"
    (tmp_path / "prune.csv").write_text(head + "1,ChooseAttr,0,1,2.0,9,4\n1,ChooseAttr,1,0,1.0,8,3\n")
    code, stdout, err = run(tmp_path / "prune.csv")
    assert (code, stdout) == (0, f"wrote {tmp_path / 'prune.png'}\n"), err
    assert (tmp_path / "prune.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "prune.csv").write_text(head)
    refused(run(tmp_path / "prune.csv"), "prune.csv has no rows")


def test_plots_refuses_a_csv_that_is_not_a_runs(call, tmp_path):
    for text in ("", "a,b\n1,2\n"):
        (tmp_path / "k.csv").write_text(text)
        with pytest.raises(ValueError, match="k.csv has no"):
            plots.knockout(tmp_path / "k.csv", tmp_path / "k.png")
        refused(call(plots.main, tmp_path / "k.csv"), "k.csv has no")
    with pytest.raises(ValueError, match="No such file"):
        plots.knockout(tmp_path / "nowhere.csv", tmp_path / "k.png")
    refused(call(plots.main, tmp_path / "nowhere.csv"), "nowhere.csv", "No such file")
    assert not (tmp_path / "k.png").exists()


def interval_of(curves):
    mean = intervals.Mean()
    for curve in curves:
        mean.add(curve)
    return mean.mean(), *mean.interval()


def test_the_interval_of_a_mean_is_about_two_standard_errors_and_never_leaves_what_was_measured():
    """On many curves the bootstrap agrees with 1.96 standard errors; on lopsided ones it keeps to their bounds."""
    values = np.random.default_rng(1).normal(5, 2, (400, 3))
    mean, low, high = interval_of(values)
    assert mean == pytest.approx(values.mean(0))
    half = 1.96 * values.std(0, ddof=1) / 20
    assert mean - low == pytest.approx(half, rel=0.15) and high - mean == pytest.approx(half, rel=0.15)
    changes = [[-100.0]] * 11 + [[900.0]]                           # 1.96 standard errors would reach to -180 %
    mean, low, high = interval_of(changes)
    assert mean[0] == pytest.approx(-200 / 12) and -100 <= low[0] < mean[0] < high[0] <= 900
    assert [v.tolist() for v in interval_of([[4.0]] * 10)] == [[4.0]] * 3
    assert [v.tolist() for v in interval_of(changes)] == [v.tolist() for v in interval_of(changes)]     # no chance


@pytest.mark.parametrize("n", [9, 10])
def test_below_ten_questions_each_curve_is_drawn_and_from_ten_on_an_interval(tmp_path, monkeypatch, n):
    rows = [f"{q},t,image->last,3,{l},{-q}" for q in range(n) for l in range(2)]
    (tmp_path / "k.csv").write_text("\n".join(["question_id,task,edge,window,layer,change_percent", *rows]) + "\n")
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, file: figures.append(fig))
    assert plots.knockout(tmp_path / "k.csv", tmp_path / "k.png") == {("t", "image->last"): ([0, 1], [(1 - n) / 2] * 2,
                                                                                           n)}
    ax, = figures[0].axes
    thin = [line for line in ax.lines if line.get_linewidth() == 0.5]
    assert (len(thin), len(ax.collections)) == ((9, 0) if n == 9 else (0, 1))
    assert [line.get_ydata().tolist() for line in thin] == [[-q, -q] for q in range(n)] * (n == 9)


HEAD = ("question_id,task,edge,window,layer,p_base,change_percent,logp_per_token_base,logp_per_token_knockout,"
        "margin_base,margin_knockout\n")


def drawn_as(monkeypatch, file, *how):
    """The figure of a knockout.csv."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, file: figures.append(fig))
    plots.knockout(file, "k.png", *how)
    return figures[0]


def test_each_measure_draws_its_own_column_and_a_saturated_task_is_said(tmp_path, monkeypatch):
    (tmp_path / "k.csv").write_text(HEAD + "1,t,a->b,3,0,0.999,-2,-1,-1.5,4,1\n1,t,a->b,3,1,0.999,-4,-1,-3,4,-2\n")
    for measure, values, label in (("first", [-2, -4], "P(answer), %"), ("answer", [-0.5, -2], "nats per token"),
                                   ("margin", [-3, -6], "margin, nats")):
        ax, = drawn_as(monkeypatch, tmp_path / "k.csv", measure).axes
        assert ax.lines[0].get_ydata().tolist() == values and label in ax.get_ylabel()
        assert ("saturated: P(answer) > 0.99" in ax.get_title()) == (measure == "first")
    (tmp_path / "k.csv").write_text(HEAD + "1,t,a->b,3,0,0.9,-2,-1,-1.5,,\n")
    assert "saturated" not in drawn_as(monkeypatch, tmp_path / "k.csv").axes[0].get_title()
    with pytest.raises(ValueError, match="no question has a second option"):
        drawn_as(monkeypatch, tmp_path / "k.csv", "margin")


@pytest.mark.parametrize("layers, band", [((0, 1, 2, 3), True), ((1, 3), True), ((2,), False)])
def test_controls_are_drawn_grey_and_each_edge_in_a_panel_of_its_own(tmp_path, monkeypatch, layers, band):
    rows = [f"1,t,{edge},3,{l},0.9,{-10 * l}" for edge in ("a->b", "c->d") for l in range(4)]
    rows += [f'1,t,"a->b, random source {i}",3,{l},0.9,{-i}' for i in (1, 2, 3) for l in layers]
    head = "question_id,task,edge,window,layer,p_base,change_percent"
    (tmp_path / "k.csv").write_text("\n".join([head, *rows]) + "\n")
    fig = drawn_as(monkeypatch, tmp_path / "k.csv")
    first, second = fig.axes
    assert first.get_title().startswith("t, a \u2192 b (n = 1)")
    assert second.get_title().startswith("t, c \u2192 d (n = 1)")
    grey = [line for line in first.lines if line.get_color() == "#777777"]
    assert [line.get_ydata().tolist() for line in grey] == [[-2.0] * len(layers)]
    assert [line.get_xdata().tolist() for line in grey] == [list(layers)]
    (shape,) = first.collections                                    # a band, or a bar for each of a few layers
    assert [p.vertices[:, 1].min() for p in shape.get_paths()] == [-3] * (1 if band else len(layers))
    assert not second.collections
    assert "3 random sources: mean, lowest and highest" in [text.get_text() for text in fig.legends[0].get_texts()]


def test_two_runs_in_one_picture_are_told_apart_by_style_and_by_what_differs(call, tmp_path, monkeypatch):
    for name, window, dtype in (("A", 3, "float32"), ("B", 5, "bfloat16")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "knockout.csv").write_text(HEAD + f"1,t,a->b,{window},0,0.9,-2,-1,-1,4,1\n")
        (tmp_path / name / "run.json").write_text(json.dumps(
            {"csv": "knockout.csv", "model": "m", "settings": {"window": window, "dtype": dtype, "heads": None}}))
    files = [tmp_path / name / "knockout.csv" for name in "AB"]
    fig = drawn_as(monkeypatch, files)
    a, b, _ = fig.axes[0].lines
    assert a.get_color() == b.get_color() and a.get_linestyle() != b.get_linestyle()
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a \u2192 b", "float32, window 3",
                                                                        "bfloat16, window 5"]
    assert [line.get_linestyle() for line in fig.legends[0].get_lines()][1:] == [a.get_linestyle(), b.get_linestyle()]
    monkeypatch.undo()
    for end, mark in ((".svg", b"<?xml"), (".pdf", b"%PDF"), (".png", b"\x89PNG")):
        both = tmp_path / f"both{end}"
        assert call(plots.main, *files, "--out", both, "--measure", "answer") == (0, f"wrote {both}\n", "")
        assert both.read_bytes().startswith(mark)
        assert call(plots.main, tmp_path / "[AB]" / "knockout.csv", "--out", tmp_path / f"again{end}", "--measure",
                    "answer")[0] == 0
        assert end != ".png" or (tmp_path / "again.png").read_bytes() == both.read_bytes()
    refused(call(plots.main, tmp_path / "C*" / "knockout.csv"), "CSV ", "C*", "no file matches this pattern")
    (tmp_path / "B" / "run.json").unlink()                          # nothing is known of it: the folders tell
    assert plots.run_labels(files) == [str(tmp_path / name) for name in "AB"]
    (tmp_path / "lens.csv").write_text("question_id,task,kind,layer,probability,norm\n1,t,answer,0,0.5,raw\n")
    refused(call(plots.main, files[0], tmp_path / "lens.csv"), "several runs in one picture: knockout.csv of each")
    refused(call(plots.main, files[0], files[0]), "given twice")
    shutil.copy(files[0], tmp_path / "A" / "other.csv")
    assert call(plots.main, files[0], tmp_path / "A" / "other.csv", "--out", both)[0] == 0
    (tmp_path / "A" / "run.json").write_text("[1]")
    refused(call(plots.main, *files), "run.json is not a run's record")
    (tmp_path / "j.csv").write_text(HEAD.strip() + ",head\n1,t,a->b,3,,0.9,-2,-1,-1,4,1,\n")
    refused(call(plots.main, tmp_path / "j.csv"), "j.csv", "not drawn from its CSV alone")
    (tmp_path / "h.csv").write_text(HEAD.strip() + ",head\n1,t,a->b,3,0,0.9,-2,-1,-1,4,1,999999999\n")
    refused(call(plots.main, tmp_path / "h.csv"), "h.csv", "999999999")
    (tmp_path / "p.csv").write_text(HEAD + "1,t,a->b,3,0,abc,-2,-1,-1,4,1\n")
    refused(call(plots.main, tmp_path / "p.csv"), "p.csv", "p_base 'abc'")


def test_drawing_takes_no_more_memory_for_more_questions(tmp_path):
    """The peak of what Python allocates, for 50 and for 500 questions of one curve each."""
    peaks = []
    for n in (50, 500):
        rows = (f"{q},t,image->last,3,{l},{q / 7}\n" for q in range(n) for l in range(32))
        (tmp_path / "k.csv").write_text("question_id,task,edge,window,layer,change_percent\n" + "".join(rows))
        plots.knockout(tmp_path / "k.csv", tmp_path / "k.png")      # fonts are read the first time
        tracemalloc.start()
        plots.knockout(tmp_path / "k.csv", tmp_path / "k.png")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_drawing_chooses_no_backend(tmp_path):
    (tmp_path / "k.csv").write_text("question_id,task,edge,window,layer,change_percent\n1,t,a->b,3,0,-5\n")
    code = ("import sys, matplotlib; from harness import intervals, plots\n"
            "matplotlib.use('svg'); plots.knockout('k.csv', 'k.png')\n"
            "assert matplotlib.get_backend() == 'svg' and 'matplotlib.pyplot' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "k.png").exists(), done.stderr


def test_the_interval_of_a_change_is_never_nothing_and_stays_within_what_can_be():
    """Eighteen questions and half a one in each of four cells are twenty: by hand."""
    assert intervals.paired_interval([0] * 18, 0.5) == pytest.approx((-0.098, 0.098))           # 1.96 sqrt(1/20/20)
    assert intervals.paired_interval([-1] * 10 + [0] * 8, 0.9) == pytest.approx((-0.74005, -0.25995), abs=1e-5)
    assert intervals.paired_interval([-1] * 6 + [1] * 2 + [0] * 10, 0.6) == pytest.approx(
        (-0.2 - 1.96 * (0.41 / 20) ** 0.5, -0.2 + 1.96 * (0.41 / 20) ** 0.5))
    assert intervals.paired_interval([0] * 18, 0.95) == pytest.approx((-0.098, 0.05))           # accuracy ends at 100 %
    assert intervals.paired_interval([0] * 18, 0.01) == pytest.approx((-0.01, 0.098))
    assert intervals.paired_interval([-1], 0.5)[0] == -0.5


def test_where_every_answer_was_right_the_interval_of_a_change_is_wilsons_and_has_no_upper_half():
    low, high = intervals.wilson(8, 10)                                 # 0.490, 0.943
    assert intervals.paired_interval([-1] * 2 + [0] * 8, 1.0) == pytest.approx((low - 1, high - 1))
    assert intervals.paired_interval([0] * 10, 1.0) == pytest.approx((-0.27755, 0), abs=1e-5)
