"""python -m pytest tests/test_figures.py

figures.py: which figures share a pass, that its numbers are the instruments' own, and what it writes.
"""
import json
import re
from dataclasses import replace

import pytest
import world
from commands import HEADER, ROWS, read, refused
from PIL import Image

import eval_gqa
import figures
import groups
import knockout
import lens
import prune
from harness import experiment, hub, plots, questions
from harness.flags import DataSettings, ModelSettings, Parser, Shared
from tiny.world import make
from views import open_image


def test_figures_3_to_5_are_one_pass_and_another_window_is_another():
    plan = figures.plan(figures.pictures([3, 4, 5]).values())
    assert plan == {("knockout", ()): knockout.EDGES}
    plan = figures.plan(figures.pictures([4, 8]).values())
    assert plan == dict.fromkeys([("knockout", ()), *(("knockout", (("tasks", ("ChooseAttr",)), ("window", k)))
                                                      for k in figures.WINDOWS)], ("image->question",))


def test_every_figure_names_groups_that_exist_and_a_registered_model():
    for number, figure in figures.FIGURES.items():
        for edge in figure.edges:
            assert "->".join(groups.parse_edge(edge)) == edge, number
        assert figure.model in hub.MODELS and figure.kind in figures.PASSES
    assert set(figures.FIGURES) == set(range(3, 38))


def test_the_cost_of_a_figure_counts_its_branches():
    """Figure 3 on 40 layers: a clean pass and three one-token branches per layer, each from its window's start up."""
    branches = sum(40 - max(0, l - 4) for l in range(40))
    assert figures.cost(figures.FIGURES[3]) == pytest.approx(1 + 3 * branches / (642 * 40))
    assert figures.cost(figures.FIGURES[6]) == 1
    assert figures.cost(figures.FIGURES[7]) > len(figures.WINDOWS)


@pytest.mark.slow
def test_the_rows_of_a_figure_are_those_the_instrument_writes(call, data, checkpoint, tmp_path):
    model = ("--model", checkpoint("llava-1.6"), *data, "--all", "--dtype", "float32")
    code, stdout, err = call(figures.main, 4, 3, 6, *model, "--out", tmp_path / "figures")
    assert code == 0, err
    assert stdout.count("pass ") == 2 and err.count("model ") == 1  # loaded once
    call(knockout.main, *model, "--edge", *figures.LAST, "image->question", "--out", tmp_path / "knockout")
    call(lens.main, *model, "--out", tmp_path / "lens")
    rows = read(tmp_path / "knockout" / "knockout.csv")
    for number in (3, 4):
        wanted = [r for r in rows if r["edge"] in figures.FIGURES[number].edges]
        assert read(tmp_path / "figures" / f"figure_{number}.csv") == wanted and wanted
    assert read(tmp_path / "figures" / "figure_6.csv") == read(tmp_path / "lens" / "lens.csv")
    for number in (3, 4, 6):
        assert Image.open(tmp_path / "figures" / f"figure_{number}.png").size[0] > 300
        assert (tmp_path / "figures" / f"figure_{number}.pdf").read_bytes()[:5] == b"%PDF-"
    before = (tmp_path / "figures" / "figure_3.csv").read_bytes()
    code, stdout, err = call(figures.main, 3, 4, 6, *model, "--out", tmp_path / "figures")
    assert code == 0 and "model " not in err                        # all there: nothing is loaded or measured again
    assert (tmp_path / "figures" / "figure_3.csv").read_bytes() == before


@pytest.mark.slow
def test_a_figure_of_one_task_asks_that_task_alone_and_draws_a_curve_per_window(call, data, checkpoint, tmp_path):
    code, _, err = call(figures.main, 8, 37, 14, "--model", checkpoint("llava-1.5"), *data, "--all", "--limit", 1,
                        "--out", tmp_path / "out")
    assert code == 0, err
    rows = read(tmp_path / "out" / "figure_8.csv")
    assert [int(k) for k in dict.fromkeys(r["window"] for r in rows)] == list(figures.WINDOWS)
    assert {r["task"] for r in rows} == {"ChooseAttr"}
    drawn = plots.knockout(tmp_path / "out" / "figure_8.csv", tmp_path / "again.png")
    assert list(drawn) == [("image->question", str(k)) for k in figures.WINDOWS]        # a panel, a curve per window
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out" / "figure_8.png").read_bytes()
    assert {r["intervention"] for r in read(tmp_path / "out" / "figure_37.csv")} == {"image->question"}
    assert "0" in {r["removed_layers"] for r in read(tmp_path / "out" / "figure_14.csv")}
    refused(call(figures.main, 8, "--model", checkpoint("llava-1.5"), *data, "--tasks", "QueryAttr"), "figure 8",
            "ChooseAttr", "--tasks")
    code, stdout, err = call(figures.main, 3, "--model", checkpoint("llava-1.5"), *data, "--tasks", "Query")
    assert code == 2 and "--tasks Query: the questions are of ChooseAttr" in err


@pytest.mark.slow
def test_a_figure_whose_task_the_data_lacks_does_not_keep_the_others_from_being_drawn(call, data, checkpoint, tmp_path):
    file = tmp_path / "some_ChooseCat.csv"
    file.write_bytes(data[1].read_bytes())
    argv = ("--model", checkpoint("llava-1.5"), "--data", file, *data[2:], "--all", "--limit", 1)
    code, stdout, err = call(figures.main, 4, 37, *argv, "--out", tmp_path / "out")
    assert code == 0 and "the questions are of ChooseCat" in stdout and "figure_37: not drawn" in stdout, err
    assert (tmp_path / "out" / "figure_4.pdf").exists() and not (tmp_path / "out" / "figure_37.csv").exists()
    code, _, err = call(figures.main, 37, *argv, "--out", tmp_path / "alone")
    assert code == 2 and err.splitlines()[-1] == "error: --tasks ChooseAttr: the questions are of ChooseCat"


def test_a_figure_without_rows_does_not_keep_the_others_from_being_drawn(call, data, checkpoint, tmp_path):
    """Every patch has a norm above 0, so none is left to cut."""
    code, stdout, err = call(figures.main, 16, 4, "--model", checkpoint("llava-1.5"), *data, "--all", "--max-norm", 0,
                             "--out", tmp_path)
    assert code == 0 and "no row was measured" in stdout and "figure_16: no question has its groups" in stdout, err
    assert (tmp_path / "figure_4.png").exists() and not (tmp_path / "figure_16.csv").exists()


def test_figure_17_of_a_text_only_model_is_the_plain_loops(call, checkpoint, model, tmp_path):
    file = tmp_path / "x_Cap.csv"
    file.write_text(f"{HEADER},captions\n" + "".join(f"{row},{said}\n" for row, said in zip(
        ROWS, ("a red cup. a table.", "two dogs."), strict=False)))
    code, _, err = call(figures.main, 17, "--model", checkpoint("vicuna"), "--data", file, "--all", "--dtype",
                        "float32", "--out", tmp_path / "out")
    assert code == 0, err
    rows, m = read(tmp_path / "out" / "figure_17.csv"), model("vicuna")
    for q in questions.read_csv(file, None):
        p = q.prompt(m)
        x, g = m.embed(p), q.groups(p)
        token = m.prefill(x, p.positions)[0].argmax().item()
        for source in ("captions", "question"):
            mine = [float(r["p_knockout"]) for r in rows if (r["question_id"], r["edge"]) == (q.id, f"{source}->last")]
            plain = knockout.curve(m.decoder, x, p.positions, g.positions(source), g.positions("last"), token, 9)
            assert mine == pytest.approx(plain, rel=1e-5)
    assert len(rows) == 2 * 2 * len(m.decoder.layers)


@pytest.mark.slow
def test_figures_18_and_19_are_three_of_figures_on_other_questions(call, checkpoint, tmp_path):
    world.picture(90, 60).save(tmp_path / "000000000009.jpg")
    (tmp_path / "aokvqa_v1p0_val.json").write_text(json.dumps([
        {"image_id": 9, "question_id": "a1", "question": "Why is it wet?", "direct_answers": ["rain", "rain", "snow"],
         "difficult_direct_answer": False}]))
    code, _, err = call(figures.main, 18, "--model", checkpoint("llava-1.5"), "--data",
                        tmp_path / "aokvqa_v1p0_val.json", "--images", tmp_path, "--all", "--out", tmp_path / "out")
    assert code == 0, err
    rows = read(tmp_path / "out" / "figure_18.csv")
    assert {r["edge"] for r in rows} == {*figures.LAST, "image->question"} and {r["task"] for r in rows} == {"A-OKVQA"}
    assert {r["kind"] for r in read(tmp_path / "out" / "figure_18_lens.csv")} == {"answer_lower", "answer_capitalized"}
    assert (tmp_path / "out" / "figure_18_lens.pdf").exists()
    refused(call(figures.main, 18, "--out", tmp_path / "other"), "figure 18", "A-OKVQA", "--data")


@pytest.mark.slow
def test_tables_are_what_eval_gqa_counts_and_collects(call, tmp_path):
    make(tmp_path / "world", seed=3, train=0, val=6)
    where = tmp_path / "world" / "val_balanced_questions.json", "--images", tmp_path / "world" / "images"
    code, stdout, err = call(figures.main, "table1", "table2", "--data", *where, "--out", tmp_path / "out")
    assert code == 0, err
    call(eval_gqa.main, "--questions", *where, "--collect", tmp_path / "six", "--out", tmp_path / "eval")
    assert read(tmp_path / "out" / "table_2.csv") == read(tmp_path / "eval" / "accuracy.csv")
    accuracy = {row["group"]: row for row in read(tmp_path / "out" / "table_2.csv")}
    for row in read(tmp_path / "out" / "table_1.csv"):
        assert row["questions"] == accuracy[row["task"]]["questions"]
        assert row["answered right"] == accuracy[row["task"]]["correct"]
        name = f"val_balanced_questions_{row['task']}.csv"
        kept = read(tmp_path / "six" / name)
        assert len(kept) == int(row["collected"]) > 0 and row["example"].startswith(kept[0]["question"])
        assert (tmp_path / "out" / "table_1" / name).read_bytes() == (tmp_path / "six" / name).read_bytes()
    assert Image.open(tmp_path / "out" / "table_2.png").size[0] > 300 and (tmp_path / "out" / "table_2.pdf").exists()
    refused(call(figures.main, "table2", "--data", *where, "--tasks", "ChooseAttr", "--out", tmp_path / "x"), "--tasks")
    refused(call(figures.main, "table2", "--data", "a.csv", "--images", tmp_path), "table2", "JSON")
    refused(call(figures.main, "table2", "--image", tmp_path / "a.jpg", "--question", "What?"), "table2", "JSON")


def test_figure_16_leaves_out_above_57_or_what_as_many_patches_exceed():
    assert plots.threshold([30.0] * 572 + [60.0] * 4) == 57
    other = [100.0 + i for i in range(576)]
    left = plots.threshold(other)
    assert sum(n > left for n in other) == 3                        # of 576; the paper has 3.3


@pytest.mark.slow
def test_shards_draw_the_figures_once_all_passes_are_merged(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--dtype", "float32")
    assert call(figures.main, 4, 6, *argv, "--out", tmp_path / "one")[0] == 0
    code, stdout, err = call(figures.main, 4, 6, *argv, "--shard", "1/2", "--out", tmp_path / "two")
    assert code == 0 and "figure_4: not drawn" in stdout and not (tmp_path / "two" / "figure_4.csv").exists(), err
    assert call(figures.main, 4, 6, *argv, "--shard", "0/2", "--out", tmp_path / "two")[0] == 0
    for number in (4, 6):
        one, two = ((tmp_path / out / f"figure_{number}.csv").read_bytes() for out in ("one", "two"))
        assert one == two


def test_the_norms_of_your_own_photo_are_drawn(call, photo, checkpoint, tmp_path):
    code, _, err = call(figures.main, 15, "--model", checkpoint("llava-1.5"), "--image", photo, "--question", "What?",
                        "--out", tmp_path / "out")
    assert code == 0 and (tmp_path / "out" / "figure_15.png").exists(), err


@pytest.mark.slow
def test_norms_are_those_of_the_towers_features_and_large_ones_can_be_left_out(call, data, checkpoint, model, tmp_path):
    argv = ("--model", checkpoint("llava-1.6"), *data, "--limit", 1, "--all", "--dtype", "float32", "--out", tmp_path)
    code, _, err = call(figures.main, 15, 16, *argv)
    assert code == 0, err
    rows, m = read(tmp_path / "figure_15.csv"), model("llava-1.6")
    p = m.prompt("Is the cup red or blue?", open_image(tmp_path / "a.jpg"))
    g = groups.token_groups(p, boxes=[(20, 10, 40, 30)])
    features = m.vision_tower(p.pixels, m.config.layer)[:, 1:]      # without the class token
    assert len(rows) == len(g.named["base_patches"]) + len(g.named["tile_patches"]) < len(p.slots)
    side = m.config.geometry.side
    for row in rows[::7]:
        view, y, x = p.slots[int(row["patch"])].tolist()
        assert float(row["norm"]) == pytest.approx(features[view, y * side + x].norm().item(), rel=1e-5)
    norms = experiment.patch_norms(m, p)
    middle = norms.nanmedian().item()
    left, none = (experiment.without_large(g, norms, most) for most in (middle, 0))
    first = p.image.start
    for name in ("related_patches", "other_patches"):
        assert left.named.get(name, []) == [i for i in g.positions(name) if norms[i - first] <= middle]
        with pytest.raises(groups.EmptyGroup, match="norm above 0"):
            none.positions(name)
    assert left.named["image"] == g.named["image"]


def test_list_shows_every_figure_with_its_cost(call):
    code, stdout, _ = call(figures.main, "--list")
    told = dict(re.findall(r"^(\d+) .*? ([\d.]+)$", stdout, re.MULTILINE))
    assert code == 0 and set(told) == set(map(str, figures.FIGURES))
    assert float(told["6"]) == 1 and float(told["5"]) > float(told["4"]) > 1


def test_a_figure_that_is_not_there_is_refused_with_those_that_are(call):
    refused(call(figures.main, "99"), "figure 99", "3, 4, 5")
    refused(call(figures.main, "three"), "figure three")
    refused(call(figures.main), "which figure?")


@pytest.fixture
def passes(call, monkeypatch):
    """passes(*argv) -> Shared, the settings of each pass; every one is ended where it would read its questions."""
    def run(*argv):
        found = []

        def end(shared, *_):
            found.append(shared)
            raise SystemExit(0)                                     # as a shard that is not the last one to finish
        monkeypatch.setattr(experiment, "Study", end)
        code, _, err = call(figures.main, *argv)
        assert code == 0, err
        return found
    return run


def test_the_settings_of_the_command_line_reach_every_pass(passes, tmp_path):
    found = passes(4, 6, 8, 9, 12, 14, 15, 16, 37, "--data", "a.csv", "b.csv", "--images", "photos", "--tasks",
                   "ChooseAttr", "ChooseRel", "--limit", 7, "--all", "--skip-bad", "--shard", "1/2", "--model",
                   "llava-tiny-anyres", "--revision", "main", "--vision-tower", "tower", "--device", "cpu", "--dtype",
                   "float16", "--preprocess", "hf", "--max-norm", 57, "--seed", 5, "--out", tmp_path)
    assert len({shared.out for shared in found}) == len(found) == 7 + len(figures.WINDOWS) + 1
    model = ModelSettings("llava-tiny-anyres", "main", "tower", "cpu", "float16", "hf")
    own = DataSettings(("a.csv", "b.csv"), "photos", ("ChooseAttr",), 7, True, True, (1, 2))
    for shared in found:                                            # a pass's own tasks take the place of --tasks
        mine = own if "-tasks-ChooseAttr-" in shared.out else replace(own, tasks=("ChooseAttr", "ChooseRel"))
        assert shared == Shared(model, mine, shared.out, 5, strict=False)
    assert [shared.data.tasks for shared in found].count(("ChooseAttr",)) == len(figures.WINDOWS) + 1


def test_the_settings_of_an_own_question_reach_every_pass(passes, tmp_path):
    found = passes(4, 6, 12, "--image", "photo.jpg", "--question", "Is the cup on the lamp?", "--answer", "yes",
                   "--options", "yes,no", "--object", "cup", "--object", "lamp", "--box", "1,2,3,4", "--box", "5,6,7,8",
                   "--out", tmp_path)
    assert len(found) == 3 and {shared.data for shared in found} == {DataSettings(
        image="photo.jpg", question="Is the cup on the lamp?", answer="yes", options="yes,no", object=("cup", "lamp"),
        box=("1,2,3,4", "5,6,7,8"))}


@pytest.mark.parametrize("model", ["llava-tiny", "llava-1.5-7b"])
def test_a_pass_has_the_settings_that_its_instrument_takes_from_flags(call, monkeypatch, tmp_path, model):
    found, edge = [], ("--edge", "image->question")
    wanted = [(lens, ()), *((knockout, (*edge, "--tasks", "ChooseAttr", "--window", k)) for k in figures.WINDOWS),
              (knockout, ("--edge", *figures.LAST, "--subword", "last")), (lens, ("--modules",)), (prune, ()),
              (knockout, ("--edge", *figures.PATCHES, "--max-norm", 40)), (lens, (*edge, "--tasks", "ChooseAttr"))]
    for instrument in (knockout, lens, prune):
        monkeypatch.setattr(instrument, "run", lambda settings, _: found.append(settings))
    flags = "--model", model, "--out", tmp_path
    code, _, err = call(figures.main, 6, 8, 9, 12, 14, 16, 37, "--max-norm", 40, *flags)
    assert code == 0, err
    assert [replace(s, shared=replace(s.shared, out=str(tmp_path), strict=True)) for s in found] == [
        instrument.parse(Parser(""), [*map(str, (*own, *flags))]) for instrument, own in wanted]


@pytest.mark.parametrize("flags, limits", [((), (20, None)), (("--limit", 3), (3, 3))])
def test_tables_ask_all_bundled_questions_and_figures_twenty_of_each_task_unless_limited(passes, tmp_path, flags,
                                                                                         limits):
    figure, = passes(3, "--out", tmp_path, *flags)
    table, = passes("table1", "table2", "--out", tmp_path, *flags)
    bundled = Shared().data
    assert figure.data == replace(bundled, limit=limits[0])
    assert table.data == replace(bundled, limit=limits[1], all=True)
