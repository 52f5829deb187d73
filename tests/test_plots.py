"""python -m pytest tests/test_plots.py

harness/plots.py: that it draws every kind of CSV again, what its intervals are, and what it refuses.
"""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused

import figures
import knockout
import lens
import prune
from harness import plots

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


def test_the_interval_of_a_mean_is_196_standard_errors():
    mean, half = plots.mean_interval([[1.0, 0.0], [3.0, 0.0]])
    assert mean.tolist() == [2.0, 0.0] and half.tolist() == pytest.approx([1.96, 0.0])   # sd sqrt(2), n 2
    assert plots.mean_interval([[4.0]])[1].tolist() == [0.0]


def test_the_interval_of_a_change_is_never_nothing_and_stays_within_what_can_be():
    """Eighteen questions and half a one in each of four cells are twenty: by hand."""
    assert plots.paired_interval([0] * 18) == pytest.approx((-0.098, 0.098))                # 1.96 sqrt(1/20/20)
    assert plots.paired_interval([-1] * 10 + [0] * 8) == pytest.approx((-0.74005, -0.25995), abs=1e-5)
    assert plots.paired_interval([-1] * 6 + [1] * 2 + [0] * 10) == pytest.approx(
        (-0.2 - 1.96 * (0.41 / 20) ** 0.5, -0.2 + 1.96 * (0.41 / 20) ** 0.5))
    assert plots.paired_interval([-1])[0] == -1
