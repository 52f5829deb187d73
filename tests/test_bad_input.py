"""python -m pytest tests/test_bad_input.py

One line on stderr and exit code 2 for every kind of bad input: flags, groups, pictures, questions, checkpoints,
devices, folders. Most calls run main() in this process; a few start a process. Bad CSVs for pictures: test_plots.py.
"""
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import world
from commands import HEADER, ROWS, read, refused
from PIL import Image
from safetensors.torch import load_file, save_file

import knockout
import llava_min

ROOT = Path(__file__).resolve().parents[1]
EDGE = ("--src", "image", "--tgt", "question")


# ---------------------------------------------------------------------------------------------------- flags and groups

@pytest.mark.parametrize("argv, words", [
    (("--src", "image"), ["--src and --tgt"]),
    (("--src", "imgae", "--tgt", "question"), ["imgae", "related_patches"]),
    (("--edge", "image"), ["SOURCE->TARGET"]), ((*EDGE, "--window", "0"), ["--window", "from 1"]),
    ((*EDGE, "--window", "x"), ["--window"]), ((*EDGE, "--dtype", "float8"), ["--dtype"]),
    (("--nonsense",), ["--nonsense"]), ((*EDGE, "--limit", "0"), ["--limit"])])
def test_flags_are_checked_before_anything_is_loaded(call, argv, words):
    refused(call(knockout.main, *argv), *words)


def test_a_group_this_single_question_does_not_have_is_an_error(call, photo, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), "--image", photo, "--question", "Is it red?", "--out", tmp_path / "out")
    refused(call(knockout.main, *argv, "--edge", "true_option->last"), "true_option", "no options")
    refused(call(knockout.main, *argv, "--edge", "text:green->last"), "text:green", "Is it red?")
    refused(call(knockout.main, *argv, "--edge", "image->last", "--box", "80,2,30,3"), "--box 80,2,30,3")


# ---------------------------------------------------------------------------------------------------- pictures and rows

def spoil(file, how):
    data = file.read_bytes()
    file.write_bytes({"truncated": data[:len(data) // 2], "text": b"not a picture", "empty": b""}[how])


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
def test_a_picture_that_cannot_be_read_is_named(call, photo, checkpoint, tmp_path, how):
    spoil(photo, how)
    argv = ("--model", checkpoint("llava-1.5"), "--image", photo, "--question", "Is it red?")
    refused(call(knockout.main, *argv, *EDGE, "--out", tmp_path / "out"), photo)
    refused(call(llava_min.main, *argv), photo)


def test_a_decompression_bomb_is_refused(call, checkpoint, tmp_path, monkeypatch):
    Image.new("1", (2000, 2000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500_000)       # warned about above this, refused above twice this
    for limit in (1_500_000, 3_000_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused(call(knockout.main, "--model", checkpoint("llava-1.5"), "--image", tmp_path / "bomb.png", "--question",
                     "Is it red?", *EDGE, "--out", tmp_path / "out"), "bomb.png", "pixels")


@pytest.mark.slow
def test_a_bad_row_stops_the_run_with_what_was_finished_or_is_left_out_under_skip_bad(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--edge", "image->last")
    spoil(tmp_path / "b.jpg", "truncated")                          # the second question's picture
    refused(call(knockout.main, *argv, "--out", tmp_path / "out"), "b.jpg", "x_ChooseAttr.csv, line 3")
    assert {r["question_id"] for r in read(tmp_path / "out" / "knockout.csv")} == {"01"}
    code, stdout, err = call(knockout.main, *argv, "--skip-bad", "--out", tmp_path / "out")
    assert code == 0 and "left out: " in stdout and "b.jpg" in stdout, err
    assert {r["question_id"] for r in read(tmp_path / "out" / "knockout.csv")} == {"01", "03"}
    world.picture(60, 90).save(tmp_path / "b.jpg")                  # it is found again: the run is completed
    assert call(knockout.main, *argv, "--out", tmp_path / "out")[0] == 0
    assert {r["question_id"] for r in read(tmp_path / "out" / "knockout.csv")} == {"01", "02", "03"}


def test_a_picture_that_is_missing_is_named_before_anything_is_computed(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--edge", "image->last")
    os.remove(tmp_path / "b.jpg")
    refused(call(knockout.main, *argv, "--out", tmp_path / "out"), "b.jpg", "no such picture", "ChooseAttr.csv, line 3")
    assert not (tmp_path / "out").exists()
    code, stdout, err = call(knockout.main, *argv, "--skip-bad", "--out", tmp_path / "out")
    assert code == 0 and "left out: " in stdout and "b.jpg" in stdout, err
    assert {r["question_id"] for r in read(tmp_path / "out" / "knockout.csv")} == {"01", "03"}


@pytest.mark.parametrize("edit, words", [
    (lambda t: t.replace("40,30", "40,x"), ["line 2", "'central object h'", "'x'"]),
    (lambda t: t.replace("central object h", "height"), ["no column 'central object h'"]),
    (lambda t: t.replace("20,10,40,30", "95,10,40,30"), ["line 2", "box 95,10,40,30", "outside the 90x60"]),
    (lambda t: t.replace(",90,60,", ",91,60,"), ["line 2", "90x60", "91x60"])])
def test_a_row_with_bad_numbers_is_named_by_line(call, data, checkpoint, tmp_path, edit, words):
    data[1].write_text(edit(data[1].read_text()))
    refused(call(knockout.main, "--model", checkpoint("llava-1.5"), *data, *EDGE, "--all", "--out", tmp_path / "out"),
            "x_ChooseAttr.csv", *words)


def test_if_nothing_could_be_measured_the_run_says_so(call, data, checkpoint, tmp_path):
    out = tmp_path / "out"
    code, stdout, err = call(knockout.main, "--model", checkpoint("llava-1.5"), *data, *EDGE, "--out", out)
    assert code == 2 and "0 answered right" in stdout and "--all" in err and not (out / "knockout.png").exists()


# ---------------------------------------------------------------------------------------------------- checkpoints

def resave(folder, change):
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


DAMAGE = {"missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
                      ["missing", "decoder.layers.1.up_proj.weight"]),
          "extra": (lambda t: t.update(lost=torch.zeros(2)), ["extra", "lost"]),
          "misshapen": (lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
                        ["model.norm.weight", "(7,)", "(48,)"])}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_checkpoint_that_does_not_fit_is_refused_by_tensor(call, checkpoint, photo, tmp_path, what):
    shutil.copytree(checkpoint("vicuna"), tmp_path / "model")
    change, words = DAMAGE[what]
    resave(tmp_path / "model", change)
    refused(call(llava_min.main, "--model", tmp_path / "model", "--question", "Is it red?"), *words)


@pytest.mark.parametrize("spoiled, words", [
    ("header", ["model.safetensors", "damaged"]), ("cut", ["model.safetensors", "damaged"]),
    ("config", ["config.json", "not JSON"]), ("tokenizer", ["tokenizer.json or tokenizer.model"]),
    ("list", ["config.json", "not a JSON object"]), ("rope", ["rope_scaling"])])
def test_damaged_files_of_a_checkpoint_are_named(call, checkpoint, tmp_path, spoiled, words):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("vicuna"), folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if spoiled == "header":
        weights.write_bytes(b"\xff" * 40 + weights.read_bytes()[40:])
    elif spoiled == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif spoiled == "tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    else:
        raw = json.loads(config.read_text())
        scaled = json.dumps(raw | {"rope_scaling": {"factor": 2}})
        config.write_text({"config": "{", "list": "[]", "rope": scaled}[spoiled])
    refused(call(llava_min.main, "--model", folder, "--question", "Is it red?"), *words)


@pytest.mark.parametrize("dtype, advice", [("float16", "try --dtype bfloat16 or float32"),
                                           ("bfloat16", "try --dtype float32"), ("float32", "published ones?")])
def test_a_layer_that_overflows_is_named_with_the_question_the_dtype_and_advice_that_fits(call, checkpoint, tmp_path,
                                                                                          dtype, advice):
    shutil.copytree(checkpoint("vicuna"), tmp_path / "model")

    def enlarge(tensors):                                           # each fits into the dtype, their product does not
        for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"):
            tensors[name] = torch.full(tensors[name].shape, 6e4 if dtype == "float16" else 1e30)
    resave(tmp_path / "model", enlarge)
    (tmp_path / "x_Cap.csv").write_text(HEADER + ",captions\n" + ROWS[0] + ",a red cup.\n")
    argv = ("--model", tmp_path / "model", "--data", tmp_path / "x_Cap.csv", "--all", "--edge", "captions->last",
            "--dtype", dtype, "--out", tmp_path / "out")
    refused(call(knockout.main, *argv), "x_Cap.csv, line 2", "after layer 1 ", f"in {dtype}", advice)
    code, stdout, err = call(knockout.main, *argv, "--skip-bad")
    assert code == 2 and "after layer 1 " in stdout and "no row was measured" in err, (stdout, err)


@pytest.mark.parametrize("value, dtype, words", [(float("nan"), "float32", "holds NaN or infinity"),
                                                 (float("inf"), "float16", "holds NaN or infinity"),
                                                 (1e30, "float16", "torch.float16 is too narrow")])
def test_weights_that_are_not_numbers_are_named_when_they_are_loaded(call, checkpoint, tmp_path, value, dtype, words):
    shutil.copytree(checkpoint("vicuna"), tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(tensors):
        tensors[name] = tensors[name].float()
        tensors[name][3, 5] = value
    resave(tmp_path / "model", damage)
    refused(call(llava_min.main, "--model", tmp_path / "model", "--question", "Is it red?", "--dtype", dtype), name,
            words)


# ---------------------------------------------------------------------------------------------------- folders, devices

def test_a_directory_that_cannot_be_written_is_named(call, data, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    refused(call(knockout.main, "--model", checkpoint("llava-1.5"), *data, *EDGE, "--out", tmp_path / "file" / "out"),
            tmp_path / "file")


def test_a_device_this_machine_lacks_is_refused(call, checkpoint, tmp_path):
    for device, backend in {"cuda": torch.cuda, "mps": torch.backends.mps}.items():
        if not backend.is_available():
            refused(call(knockout.main, "--model", checkpoint("vicuna"), "--question", "x", "--device", device, "--out",
                         tmp_path / "out"), f"--device {device}")


@pytest.mark.parametrize("argv", ["vicuna.py --weights nowhere --prompt x", "llama3.py --weights nowhere --prompt x",
                                  "clip_vit.py --weights nowhere --image nowhere.png",
                                  "llava_min.py --model nowhere --question x"])
def test_a_file_that_is_run_by_itself_turns_an_error_into_one_line(argv, monkeypatch, capsys):
    script, *flags = argv.split()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    refused((stop.value.code, *capsys.readouterr()), "nowhere")
