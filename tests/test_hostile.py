"""python -m pytest tests/test_hostile.py

One fixed case for each class of hostile input and silent nonsense; test_chaos.py has hundreds of random ones.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import world
from commands import HEADER, ROWS, read, refused
from PIL import Image

import check
import clip_vit
import figures
import knockout
import lens
import llama3
import llava_min
import prune
import vicuna
from fork import clean_pass
from harness import hub, plots
from harness.flags import Parser
from harness.questions import Question, picture, read_any, read_csv
from harness.runs import csv_text
from knockout import curve, sweep
from views import Geometry, open_image, views

ROOT = Path(__file__).resolve().parents[1]
OWN = ("--question", "Is it red?")
pytestmark = pytest.mark.slow


# ---------------------------------------------------------------------------------------------------- silent nonsense

def test_an_own_question_without_an_answer_measures_agreement_with_the_whole_image(call, photo, checkpoint, tmp_path):
    out = tmp_path / "out"
    code, stdout, err = call(prune.main, "--model", checkpoint("llava-1.5"), "--image", photo, *OWN, "--repeats", 1,
                             "--out", out)
    assert code == 0, err
    rows = read(out / "prune.csv")
    whole = next(r["prediction"] for r in rows if r["removed_layers"] == "0")
    assert [int(r["correct"]) for r in rows] == [int(r["prediction"] == whole) for r in rows]
    assert {r["answer"] for r in rows} == {""} and rows[0]["correct"] == "1"


@pytest.fixture
def curves(call, data, checkpoint, tmp_path):
    """A knockout.csv with its run.json -> the flags of a prune.py that takes X from it."""
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--limit", 1)
    assert call(knockout.main, *argv, "--edge", "image->question", "--window", 1, "--out", tmp_path / "k")[0] == 0
    return (*argv, "--repeats", 1, "--out", tmp_path / "p", "--suggest", tmp_path / "k" / "knockout.csv")


def test_curves_of_another_model_do_not_suggest_x(call, curves, checkpoint, tmp_path):
    info = tmp_path / "k" / "run.json"
    record = json.loads(info.read_text())
    record["settings"]["weights"], record["model"] = "0" * 64, "another-llava"
    info.write_text(json.dumps(record))
    refused(call(prune.main, *curves), "knockout.csv is of another-llava, whose weights are not those")
    info.write_text("{}")
    refused(call(prune.main, *curves), "run.json is not a run's record")


def test_an_x_of_no_layer_is_refused(call, curves, tmp_path):
    file = tmp_path / "k" / "knockout.csv"
    rows = read(file)
    text = csv_text([rows[0].keys(), *((row | {"change_percent": "-50.0"}).values() for row in rows)])
    file.write_text(text, encoding="utf-8")
    refused(call(prune.main, *curves), "up to the last layer", "no layer to leave the image out of")


@pytest.mark.parametrize("main", [knockout.main, check.main, lens.main])
def test_an_edge_backwards_in_time_is_refused(call, photo, checkpoint, tmp_path, main):
    argv = ("--model", checkpoint("llava-1.5"), "--image", photo, *OWN, "--out", tmp_path)
    refused(call(main, *argv, "--edge", "last->image"), "last->image", "image comes before last", "no such edge")
    if main is not check.main:                                      # this one only shows in the question itself
        refused(call(main, *argv, "--edge", "text:red->text:Is"), "text:Is comes before text:red", "nothing to cut")


@pytest.mark.parametrize("source, target, heads, words", [
    ([1], [], None, "target is empty"), ([-1], [5], None, "position -1 is not in the prompt"),
    ([1], [-2], None, "position -2 is not in the prompt"), ([1], [10 ** 6], None, "position 1000000 is not in"),
    ([1], [5], [], "no head is given"), ([1], [5], [-1], "head -1 is asked for"), ([1], [5], [99], "head 99 is asked")])
def test_curve_and_sweep_refuse_the_same_edges_alike(model, source, target, heads, words):
    m = model("vicuna")
    p = m.prompt("Is the cup red?", captions="a cup")
    x, said = m.embed(p), []
    for how in (lambda: curve(m.decoder, x, p.positions, source, target, 3, 2, heads),
                lambda: sweep(m.decoder, clean_pass(m.decoder, x, p.positions), [(source, target)], 3, 2, heads)):
        with pytest.raises(ValueError, match=words) as error:
            how()
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_wide_window_and_more_patches_than_there_are_get_a_word(call, data, photo, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--limit", 1)
    code, stdout, _ = call(knockout.main, *argv, "--edge", "image->last", "--window", 50, "--out", tmp_path / "k")
    assert code == 0 and "a window of 50 layers is wider than the model" in stdout
    own = ("--model", checkpoint("llava-1.5"), "--image", photo, *OWN, "--out", tmp_path / "p")
    for keep in ("random:9999", "attended:9999"):
        refused(call(prune.main, *own, "--keep", keep, "--last", 1), "image: it has", "not the 9999 that are asked for")
    for flags in (("--max-norm", -1), ("--max-norm", "nan"), ("--max-norm", "x")):
        refused(call(knockout.main, *argv, *flags), "--max-norm", "is not a number from 0")


# ---------------------------------------------------------------------------------------------------- pictures

def test_a_page_that_would_not_fit_into_memory_is_refused_before_it_is_made():
    for g, size in ((Geometry(), (60_000, 1)), (Geometry(), (1, 10_001)), (Geometry(preprocess="hf"), (60_000, 1))):
        with pytest.raises(ValueError, match="needs a page of .* scale it down"):
            views(Image.new("RGB", size), g)
    g = Geometry(aspect="anyres", pinpoints=((672, 336),))          # scaled before it is padded: no page to fear
    assert len(views(Image.new("RGB", (60_000, 1)), g)) == 3


@pytest.mark.parametrize("kind", ["QOI", "AVIF", "ICO", "TGA", "JPEG2000", "SGI"])
def test_rare_formats_are_refused_by_one_sentence(tmp_path, kind):
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    world.picture(90, 60).save(tmp_path / "p", kind)
    with pytest.raises(ValueError, match="p is not a picture, or not JPEG, PNG"):
        open_image(tmp_path / "p")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_in_place_of_a_picture_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / "p.png")
    with pytest.raises(ValueError, match=r"p\.png: not a file"):
        open_image(tmp_path / "p.png")


def test_a_grey_picture_and_a_path_work_and_anything_else_is_a_sentence(model, tmp_path):
    m, photo = model("llava-1.5"), world.picture(90, 60)
    photo.save(tmp_path / "p.png")
    pixels = m.prompt("Is it red?", photo).pixels
    for same in (tmp_path / "p.png", str(tmp_path / "p.png"), photo.convert("RGBA")):
        assert torch.equal(m.prompt("Is it red?", same).pixels, pixels)
    grey = photo.convert("L")
    assert torch.equal(m.prompt("Is it red?", grey).pixels, m.prompt("Is it red?", grey.convert("RGB")).pixels)
    with pytest.raises(ValueError, match="as a path or a PIL image, not as ndarray"):
        m.prompt("Is it red?", np.asarray(photo))


def test_of_what_is_transparent_the_stored_colour_is_seen_and_of_an_animation_the_first_frame(tmp_path):
    Image.new("RGBA", (4, 4), (200, 10, 20, 0)).save(tmp_path / "p.png")
    assert open_image(tmp_path / "p.png").getpixel((1, 1)) == (200, 10, 20)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "p.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "p.gif").getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "x/../../a", "..", "a\0b", "x" * 300, ""])
def test_the_name_of_a_picture_stays_in_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="is not that of a file in"):
        picture(tmp_path, name)
    assert picture(tmp_path, "val/a") == tmp_path / "val" / "a.jpg"


# ---------------------------------------------------------------------------------------------------- configs

@pytest.mark.parametrize("key, value", [("num_hidden_layers", 10 ** 6), ("num_hidden_layers", 2.0),
                                        ("hidden_size", 1e9), ("num_attention_heads", 0), ("vocab_size", None),
                                        ("num_attention_heads", "4"), ("hidden_size", True),
                                        ("rms_norm_eps", float("nan")), ("rope_theta", "x"),
                                        ("max_position_embeddings", 10 ** 30), ("intermediate_size", [8])])
def test_sizes_of_a_decoder_are_whole_numbers_with_bounds(key, value):
    for file in (vicuna, llama3):
        raw = {"num_attention_heads": 32, "num_key_value_heads": 32 if file is vicuna else 8} | {key: value}
        with pytest.raises(ValueError, match="impossible sizes in the config"):
            file.Config.from_json(raw)


@pytest.mark.parametrize("key, value", [("num_hidden_layers", 10 ** 6), ("image_size", 336.0), ("patch_size", 0),
                                        ("hidden_size", 10 ** 9), ("num_attention_heads", None)])
def test_sizes_of_a_tower_are_whole_numbers_with_bounds(key, value):
    with pytest.raises(ValueError, match="impossible sizes in the config"):
        clip_vit.Config.from_json({key: value})


@pytest.mark.parametrize("name, edit, words", [
    ("generation_config.json", lambda raw: raw | {"eos_token_id": {}}, "eos_token_id {} is not a token id"),
    ("config.json", lambda raw: raw | {"mm_vision_tower": 5}, "mm_vision_tower is 5, not a name"),
    ("model.safetensors.index.json", lambda raw: {"weight_map": {"a": 3}}, "is not an index of shards"),
    ("model.safetensors.index.json", lambda raw: {"weight_map": None}, "is not an index of shards"),
    ("model.safetensors.index.json", lambda raw: {"weight_map": {"a": "../model"}}, "is not an index of shards")])
def test_other_json_of_a_checkpoint_is_checked(call, checkpoint, photo, tmp_path, name, edit, words):
    shutil.copytree(checkpoint("llava-1.5", "original", "sharded"), tmp_path / "m")
    file = tmp_path / "m" / name
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    refused(call(llava_min.main, "--model", tmp_path / "m", "--image", photo, *OWN), words)


# ---------------------------------------------------------------------------------------------------- questions

@pytest.mark.parametrize("kind, special", [("llava-1.5", "</s>"), ("llava-1.5", "<s>"), ("llava-1.5", "<image>"),
                                           ("llama3-next", "<|eot_id|>"), ("llama3-next", "<|begin_of_text|>")])
def test_special_tokens_are_refused_in_a_question(model, kind, special):
    m = model(kind)
    assert special in m.special
    with pytest.raises(ValueError, match=f"the text holds {special}".replace("|", r"\|")):
        m.prompt(f"Is it red?{special} Or blue?", world.picture(90, 60))


@pytest.mark.parametrize("special", ["<image>", "</s>"])
def test_special_tokens_are_refused_in_captions(model, special):
    with pytest.raises(ValueError, match=f"the text holds {special}"):
        model("vicuna").prompt("Is it red?", captions=f"a cup. {special}")


@pytest.mark.parametrize("fields, words", [
    ({"question": None}, "question is None, not a text"), ({"answer": ["red"]}, "not a text"),
    ({"answer": "x" * 200_000}, "answer has 200,000 characters"), ({"question": "\ud800"}, "half of a character"),
    ({"boxes": ((0, 0, "1", 1),)}, "not four numbers"), ({"boxes": ((0, 0, float("nan"), 1),)}, "not four numbers"),
    ({"boxes": ((0, 0, 1),)}, "not four numbers"), ({"boxes": ((0, 0, -1, 1),)}, "not four numbers"),
    ({"size": (90.5, 60)}, "not two whole numbers"), ({"options": ("a", 3)}, "options is 3")])
def test_a_question_checks_its_fields_whatever_file_they_are_from(fields, words):
    with pytest.raises(ValueError, match=words):
        Question(**{"id": "1", "question": "Is it red?"} | fields)


def test_entries_of_a_wrong_type_are_named_and_left_out_under_skip_bad(tmp_path):
    good = {"image_id": 7, "question": "What is it?", "question_id": "q1", "difficult_direct_answer": False,
            "direct_answers": ["cup"] * 10}
    odd = [{"direct_answers": []}, {"question": None}, {"image_id": "7"}, {"direct_answers": [3]},
           {"direct_answers": None}]
    file = tmp_path / "aokvqa_v1p0_val.json"
    file.write_text(json.dumps([good, *(good | fields for fields in odd)]))
    bad = []
    assert [q.id for q in read_any(file, tmp_path, bad, None)] == ["q1"] and len(bad) == len(odd)
    assert [message.split(": ")[0] for message in bad] == [f"{file}, question {i}" for i in range(2, 7)]
    with pytest.raises(ValueError, match="question 2: not OK-VQA's or A-OKVQA's format"):
        read_any(file, tmp_path, None, None)


def test_a_pipe_in_place_of_a_question_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"x\.csv is not a file, but a folder, a pipe or a device"):
        read_csv(tmp_path / "x.csv")


# ---------------------------------------------------------------------------------------------------- runs

def test_a_pilot_with_another_order_of_edges_and_moved_pictures_grows_into_the_run(call, data, checkpoint, tmp_path):
    """What a question's rows depend on is the setting, not how many were asked or where their pictures were."""
    argv = ("--model", checkpoint("llava-1.5"), *data[:2], "--all", "--window", 2, "--dtype", "float32")
    edges = "image->last", "question->last", "text:or->last"
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in "ab":
        shutil.copy(tmp_path / f"{name}.jpg", moved)
    assert call(knockout.main, *argv, *data[2:], "--edge", *edges, "--out", tmp_path / "one")[0] == 0
    assert call(knockout.main, *argv, *data[2:], "--edge", *edges, "--limit", 1, "--out", tmp_path / "two")[0] == 0
    code, _, err = call(knockout.main, *argv, "--images", moved, "--edge", *edges[::-1], "--out", tmp_path / "two")
    assert code == 0 and "1/3" in err, err
    for name in ("knockout.csv", "knockout.progress"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_pictures_painted_over_between_two_calls_are_noticed_first(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--edge", "image->last", "--out", tmp_path / "out")
    assert call(knockout.main, *argv, "--limit", 1)[0] == 0
    before = (tmp_path / "out" / "knockout.csv").read_bytes()
    Image.new("RGB", (90, 60), "red").save(tmp_path / "a.jpg")
    refused(call(knockout.main, *argv), "the picture of question ChooseAttr/01 is not the one")
    assert (tmp_path / "out" / "knockout.csv").read_bytes() == before


def test_a_question_that_was_edited_between_two_calls_is_noticed_first(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--edge", "image->last", "--out", tmp_path / "out")
    assert call(knockout.main, *argv, "--limit", 2)[0] == 0
    text = "\n".join([HEADER, *ROWS]) + "\n"
    data[1].write_text(text.replace("full or empty", "empty or full"))
    refused(call(knockout.main, *argv), "the question of question ChooseAttr/02 is not the one")
    data[1].write_text(text.replace("on or off", "off or on"))      # of one that was not asked yet
    assert call(knockout.main, *argv)[0] == 0


@pytest.mark.parametrize("numbers, drawn", [((3, 4, 5), {3, 4}), ((8,), {8}), ((37,), {37}), ((6, 5), {6})])
def test_figures_of_an_own_question_are_drawn_where_it_has_their_groups(call, photo, checkpoint, tmp_path, numbers,
                                                                        drawn):
    argv = ("--model", checkpoint("llava-1.5"), "--image", photo, *OWN, "--out", tmp_path / "out")
    code, stdout, err = call(figures.main, *numbers, *argv)
    assert code == 0, err
    assert {int(file.stem[7:]) for file in (tmp_path / "out").glob("figure_*.png")} == drawn
    assert (5 in numbers) == ("figure_5: no question has its groups" in stdout or "no row was measured" in stdout)


# ---------------------------------------------------------------------------------------------------- installed

def test_after_pip_install_the_scripts_and_the_bundled_model_work_from_any_folder(tmp_path):
    pytest.importorskip("setuptools", reason="without setuptools a package cannot be built here")
    source, target = tmp_path / "source", tmp_path / "installed"
    skip = shutil.ignore_patterns(".git", ".venv", "out", "tests", "docs", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skip)                      # pip leaves a build folder there
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--target", str(target), "."]
    subprocess.run(install, cwd=source, check=True, capture_output=True)
    for module in ("knockout", "llava_min"):
        argv = {"knockout": ("--limit", "1", "--tasks", "ChooseAttr", "--edge", "image->last"),
                "llava_min": ("--question", "Is it red?", "--image", str(next((ROOT / "tiny/val/images").iterdir())))}
        done = subprocess.run([sys.executable, "-m", module, *argv[module]], cwd=tmp_path, capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": str(target)})
        assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out" / "knockout" / "knockout.csv")


# ---------------------------------------------------------------------------------------------------- one folder

def test_two_instruments_in_one_folder_keep_a_record_each_and_both_can_be_resumed(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--dtype", "float32", "--out", tmp_path / "out")
    mine = {knockout.main: ("--edge", "image->last", "--window", 2), lens.main: ("--modules",)}
    for main, flags in (*mine.items(), (lens.main, ()), *mine.items()):
        code, _, err = call(main, *argv, *flags)
        assert code == 0, err
    assert "3/3" in err and err.count("model ") == 0                # the last two had nothing left to ask
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["csv"] == "jaccard.csv" and set(record["others"]) == {"knockout.csv", "lens.csv"}
    assert record["others"]["knockout.csv"]["settings"]["window"] == 2
    assert call(knockout.main, *argv, "--edge", "image->last", "--window", 3)[0] == 2


def test_a_carriage_return_in_a_question_is_kept(call, photo, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), "--image", photo, "--edge", "image->last", "--out", tmp_path / "out")
    for _ in range(2):
        code, _, err = call(knockout.main, *argv, "--question", "Is the cup\rred\r\nor blue?")
        assert code == 0, err
    rows = read(tmp_path / "out" / "knockout.csv")
    assert {r["question"] for r in rows} == {"Is the cup\rred\r\nor blue?"}


def test_a_dollar_sign_in_a_task_does_not_spoil_the_picture(call, data, checkpoint, tmp_path):
    file = tmp_path / r"x_$5 or $\frac$.csv"
    shutil.copy(data[1], file)
    code, _, err = call(knockout.main, "--model", checkpoint("llava-1.5"), "--data", file, *data[2:], "--all", "--edge",
                        "image->last", "--out", tmp_path / "out")
    assert code == 0 and (tmp_path / "out" / "knockout.png").exists(), err


@pytest.mark.parametrize("name", ["run.json", "knockout.csv", "knockout.progress"])
def test_a_pipe_among_a_runs_files_is_refused(call, data, checkpoint, tmp_path, name):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / name)
    refused(call(knockout.main, "--model", checkpoint("llava-1.5"), *data, "--all", "--out", tmp_path / "out"), name,
            "is not a file")


def test_after_an_error_the_same_process_can_go_on_in_the_same_folder(data, checkpoint, tmp_path):
    """As in a notebook, which keeps the error, and with it everything that its frames hold."""
    settings = knockout.parse(Parser(""), [*map(str, ("--model", checkpoint("llava-1.5"), *data, "--all", "--edge",
                                                      "image->last", "--out", tmp_path / "out"))])
    photo = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(photo[:200])
    with pytest.raises(ValueError, match=r"b\.jpg cannot be read") as kept:
        knockout.run(settings)
    (tmp_path / "b.jpg").write_bytes(photo)
    knockout.run(settings)
    assert {r["question_id"] for r in read(tmp_path / "out" / "knockout.csv")} == {"01", "02", "03"} and kept


@pytest.mark.parametrize("rows, words", [
    ([(0, "nan", 1), (1, 0, 1)], "is not a number"), ([(0, 0, 1), (1, 0, 3)], "several sizes"),
    ([(0, "inf", 1)], "is not a number"), ([(0, 0, 0)], "is not a number"), ([(-7, -50, 1)], "is not a number"),
    ([(3, 0, 1)], "a point for every layer")])
def test_curves_that_suggest_nothing_sound_are_refused(tmp_path, rows, words):
    file = tmp_path / "knockout.csv"
    file.write_text("edge,task,layer,change_percent,window\n" + "".join(
        f"image->last,t,{layer},{change},{width}\n" for layer, change, width in rows))
    with pytest.raises(ValueError, match=words):
        prune.suggest(file, 4, 1.0, plots.rows)


@pytest.mark.parametrize("column, value", [("layer", "inf"), ("layer", "1" * 5000), ("layer", "nan"), ("layer", "0.5"),
                                           ("change_percent", "nan"), ("change_percent", "1e308")])
def test_a_cell_that_cannot_be_drawn_is_named(call, tmp_path, column, value):
    row = {"question_id": 1, "task": "t", "edge": "a->b", "window": 3, "layer": 0, "change_percent": -5}
    row[column] = value
    (tmp_path / "k.csv").write_text(f"{','.join(row)}\n{','.join(map(str, row.values()))}\n")
    refused(call(plots.main, tmp_path / "k.csv"), "k.csv", column, "is not a number that can be drawn")


@pytest.mark.parametrize("column, value", [("seconds", 0), ("prefill_flops", 0), ("correct", 7), ("seconds", "nan")])
def test_a_prune_csv_that_cannot_be_is_refused(call, tmp_path, column, value):
    row = {"question_id": 1, "task": "t", "removed_layers": 0, "correct": 1, "seconds": 1, "prefill_flops": 1,
           "image_tokens": 1} | {column: value}
    (tmp_path / "p.csv").write_text(f"{','.join(row)}\n{','.join(map(str, row.values()))}\n")
    refused(call(plots.main, tmp_path / "p.csv"), "p.csv")


def test_a_link_outside_the_hubs_cache_is_not_believed_by_its_name(checkpoint, tmp_path):
    shutil.copytree(checkpoint("vicuna"), tmp_path / "m")
    weights, blob = tmp_path / "m" / "model.safetensors", tmp_path / ("a" * 64)
    shutil.move(weights, blob)
    weights.symlink_to(blob)
    before = hub.weights_hash(llava_min.find_files(tmp_path / "m"))
    blob.write_bytes(blob.read_bytes() + b" ")
    assert hub.weights_hash(llava_min.find_files(tmp_path / "m")) != before


@pytest.mark.parametrize("env", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": ""},
                                 {"RANK": "0", "WORLD_SIZE": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_an_odd_rank_in_the_environment_is_named(call, monkeypatch, env):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    refused(call(knockout.main, "--limit", 1), "RANK and WORLD_SIZE in the environment")


@pytest.mark.parametrize("stream, code", [("1> /dev/full", 2), ("2> /dev/full", 0), ("2>&-", 0)])
def test_files_are_there_whatever_becomes_of_the_output(data, checkpoint, tmp_path, stream, code):
    argv = ["knockout.py", "--model", checkpoint("llava-1.5"), *data, "--all", "--edge", "image->last", "--out",
            tmp_path / "out"]
    done = subprocess.run(["sh", "-c", f'"$@" {stream}', "sh", sys.executable, *map(str, argv)], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "knockout.png").exists() and len(read(tmp_path / "out" / "knockout.csv")) == 12
