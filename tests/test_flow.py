"""python -m pytest tests/test_flow.py

The functions for notebooks: the instruments' own numbers, a figure, and nothing printed; and every snippet of
docs/own-intervention.md, with what it prints.
"""
import contextlib
import io
import re
from pathlib import Path

import pytest
import world
from commands import read
from PIL import Image

import flow
import knockout
import lens
import maps
import patch

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Is the cup red or blue?"


@pytest.fixture
def results(model, photo, capsys):
    """What each function gives, by name."""
    m, other = model("llava-1.5"), world.picture(90, 60).rotate(180)
    both = {"options": ("red", "blue")}
    edges = ["image->question", "image->last"]
    found = {"knock_out": flow.knock_out(m, photo, QUESTION, edges, window=3, control=2, **both),
             "heads_of": flow.heads_of(m, photo, QUESTION, "image->last", measure="margin", **both),
             "lens_of": flow.lens_of(m, photo, QUESTION),
             "patch_in": flow.patch_in(m, photo, other, QUESTION, **both),
             "map_of": flow.map_of(m, photo, QUESTION, layer=1, measure="margin", **both)}
    assert capsys.readouterr() == ("", "")                          # nothing is printed
    return found


def test_each_function_gives_the_instruments_columns_and_a_figure(results):
    columns = {"knock_out": knockout.COLUMNS, "heads_of": knockout.COLUMNS, "lens_of": lens.COLUMNS["lens.csv"],
               "patch_in": patch.COLUMNS, "map_of": maps.COLUMNS}
    for name, result in results.items():
        assert result.rows and all(tuple(row) == columns[name] for row in result.rows)
        assert result._repr_png_()[:4] == b"\x89PNG" and "figure" not in repr(result)


def test_its_numbers_are_those_of_the_command_line(results, call, checkpoint, photo, tmp_path):
    own = ("--model", checkpoint("llava-1.5"), "--image", photo, "--question", QUESTION, "--options", "red,blue")
    code, _, err = call(knockout.main, *own, "--edge", "image->question", "image->last", "--window", 3, "--control", 2,
                        "--control-step", 1, "--out", tmp_path)
    assert code == 0, err
    theirs, ours = read(tmp_path / "knockout.csv"), {(r["edge"], str(r["layer"])): r for r in results["knock_out"].rows}
    assert len(theirs) == len(ours)
    for row in theirs:
        if "random" not in row["edge"]:                             # those are drawn by the question's id, too
            mine = ours[row["edge"], row["layer"]]
            assert [str(mine[c]) for c in ("p_base", "p_knockout", "margin_knockout")] == [
                row[c] for c in ("p_base", "p_knockout", "margin_knockout")]


def test_a_photo_may_be_a_file_or_a_picture_and_a_question_is_answered(model, photo):
    m = model("llava-1.5")
    answers = [flow.ask(m, one, QUESTION, top=3) for one in (photo, str(photo), Image.open(photo))]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["answer"] == m.generate(m.prompt(QUESTION, photo)) and len(answers[0]["top"]) == 3
    assert answers[0]["p"] == answers[0]["top"][0][1] and answers[0]["image_tokens"] == 16
    with pytest.raises(ValueError, match="unknown token group"):
        flow.knock_out(m, photo, QUESTION, ["sky->last"])


@pytest.mark.parametrize("call", [
    lambda m, f: flow.knock_out(m, f, QUESTION, window=0), lambda m, f: flow.knock_out(m, f, QUESTION, measure="x"),
    lambda m, f: flow.knock_out(m, f, QUESTION, edges=()), lambda m, f: flow.knock_out(m, f, QUESTION, control=-1),
    lambda m, f: flow.knock_out(m, f, QUESTION, control_of="x"),
    lambda m, f: flow.heads_of(m, f, QUESTION, "image->last", top=0),
    lambda m, f: flow.knock_out(m, f, QUESTION, options="red,blue"), lambda m, f: flow.ask(m, b"x", QUESTION),
    lambda m, f: flow.knock_out(m, f, QUESTION, options=("red", "Red")), lambda m, f: flow.ask(m, f, QUESTION, top=-1),
    lambda m, f: flow.patch_in(m, f, f, QUESTION, part="x"), lambda m, f: flow.patch_in(m, f, f, QUESTION, groups=()),
    lambda m, f: flow.patch_in(m, f, f, QUESTION, direction="x"), lambda m, f: flow.map_of(m, f, QUESTION, block=0),
    lambda m, f: flow.lens_of(m, f, QUESTION, norm="x"), lambda m, f: flow.ask(m, f, QUESTION, boxes=(1, 2, 3, 4))])
def test_what_cannot_be_done_is_a_value_error(model, photo, call):
    with pytest.raises(ValueError):
        call(model("llava-1.5"), photo)


def test_load_takes_a_registered_name():
    m = flow.load("llava-tiny")
    assert len(m.decoder.layers) == 10 and flow.default_window(m) == 3


def numbers(text):
    return [float(v) for v in re.findall(r"-?\d+\.\d+", text)]


@pytest.mark.slow
def test_every_snippet_of_own_interventions_prints_what_the_page_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "own-intervention.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 11 == page.count("```python")
    names = {}
    for i, (code, printed) in enumerate(blocks):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "own-intervention.md", "exec"), names)
        assert re.sub(r"-?\d+\.\d+", "", out.getvalue()) == re.sub(r"-?\d+\.\d+", "", printed)
        assert numbers(out.getvalue()) == pytest.approx(numbers(printed), abs=0.05)
        assert len([line for line in code.splitlines() if line.strip()]) <= (13 if i else 18)
