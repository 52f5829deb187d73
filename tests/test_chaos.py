"""python -m pytest -m chaos                                                        three minutes, a table at the end
python -m pytest tests -m chaos --reliability docs/reliability.md                writes the table into that page, too

Hundreds of hostile inputs, seeded, each in a watched process: no traceback, no hang, no flood of memory, no file read
outside the folders that were given. And a run that is killed a hundred times.
"""
import csv
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
import world
from chaos import ODD, cases, promise, run, spoil, spoil_bytes, survived
from commands import HEADER, ROWS, read
from PIL import Image

import eval_gqa
import figures
import knockout
import lens
import llava_min
import prune
from harness import plots

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
WHY = "seeded damage, each case in a watched process"
LIMITS = "Whatever is in {}: a result or one line of error, no traceback, below 20 s and 3 GB"
OWN = ("--question", "Is it red?", "--edge", "image->last", "--window", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory, checkpoint):
    """A folder with a question file, its pictures, and a secret beside it that nobody may read."""
    folder = tmp_path_factory.mktemp("base")
    llava_min.load(checkpoint("llava-1.5"))                         # what this imports, the forked processes have then
    plots.save(plots.figure(1, "", "", "")[0], folder / "empty.png")
    (folder / "in").mkdir()
    (folder / "outside").mkdir()
    for name, size in (("a", (90, 60)), ("b", (60, 90))):
        world.picture(*size).save(folder / "in" / f"{name}.jpg")
    shutil.copy(folder / "in" / "a.jpg", folder / "outside" / "secret.jpg")
    (folder / "in" / "x_ChooseAttr.csv").write_text("\n".join([HEADER, *ROWS]) + "\n")
    return folder


def photo(base):
    return "--image", base / "in" / "a.jpg", "--question", "Is it red?", "--tokens", 2


def with_files(checkpoint, folder, files):
    """A copy of a checkpoint in which some files are replaced, {name: bytes}; the others are links."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name not in files and file.is_file():
            os.link(file, folder / file.name)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# ---------------------------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("kind, layout, n", [("llava-1.5", "original", 60), ("llava-1.6", "original", 30),
                                             ("llava-1.5", "hf", 30), ("llama3-next", "hf", 30)])
def test_config_json(checkpoint, base, tmp_path, kind, layout, n):
    whole = checkpoint(kind, layout)
    raw = json.loads((whole / "config.json").read_text())
    for r in cases(f"config/{kind}/{layout}", n):
        damaged, did = spoil(raw, r, r.choice((1, 1, 2)))
        folder = with_files(whole, tmp_path / "model", {"config.json": json.dumps(damaged).encode()})
        survived(run(llava_min.main, ("--model", folder, *photo(base)), tmp_path), did)
    promise(LIMITS.format("config.json"), WHY, n)


def test_other_files_of_a_checkpoint(checkpoint, base, tmp_path):
    whole, n = checkpoint("llava-1.5", "hf", "sharded"), 80
    names = sorted(file.name for file in whole.iterdir() if file.is_file())
    for r in cases("files", n):
        name = r.choice(names)
        data, did = spoil_bytes((whole / name).read_bytes(), r)
        if name.endswith(".json") and r.random() < 0.6:
            value, did = spoil(json.loads((whole / name).read_text()), r)
            data = json.dumps(value).encode()
        folder = with_files(whole, tmp_path / "in" / "model", {name: data})
        survived(run(llava_min.main, ("--model", folder, *photo(base)), tmp_path), (name, did))
    promise(LIMITS.format("weights, index files and tokenizers"), WHY, n)


def test_bin_files(checkpoint, base, tmp_path):
    whole = checkpoint("vicuna", "original", "bin")
    name = next(file.name for file in whole.iterdir() if file.suffix == ".bin")
    good = torch.load(whole / name, weights_only=True)
    key = next(iter(good))
    objects = [[], {}, 3, torch.zeros(2), {3: torch.zeros(2)}, good | {key: 5}, good | {key: {"a": torch.zeros(2)}},
               {"state_dict": good}, good | {key: good[key].to(torch.int8)}, good | {key: good[key] * float("nan")},
               good | {key: good[key].to_sparse()}, good | {key: torch.zeros(0)}]
    for i, value in enumerate(objects):
        data = io.BytesIO()
        torch.save(value, data)
        folder = with_files(whole, tmp_path / "model", {name: data.getvalue()})
        survived(o := run(llava_min.main, ("--model", folder, *OWN[:2], "--tokens", 2), tmp_path), i)
        assert o.code == 2, (i, o.out)
    promise(LIMITS.format("weights, index files and tokenizers"), WHY, len(objects))


# ---------------------------------------------------------------------------------------------------- pictures

def encoded(image, kind):
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def test_pictures(checkpoint, base, tmp_path):
    image = world.picture(90, 60)
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "QOI", "JPEG2000", "AVIF", "TGA", "PCX", "SGI"]
    good = {kind: encoded(image, kind) for kind in kinds if kind in Image.SAVE}
    file, n = tmp_path / "photo", 140
    for i, r in enumerate(cases("pictures", n)):
        kind = r.choice(list(good))
        data, did = (good[kind], "whole") if i < len(good) else spoil_bytes(good[kind], r)
        file.write_bytes(data)
        survived(run(knockout.main, ("--model", checkpoint("llava-1.5"), "--image", file, *OWN), tmp_path), (kind, did))
    promise(LIMITS.format("pictures"), WHY, n)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (16_000, 4000), (1, 1), (2, 3000)])
@pytest.mark.parametrize("kind, how", [("llava-1.5", "llava"), ("llava-1.5", "hf"), ("llava-1.6", "llava")])
def test_long_and_narrow_pictures(checkpoint, tmp_path, kind, how, size):
    Image.new("1", size).save(tmp_path / "p.png")
    survived(run(knockout.main, ("--model", checkpoint(kind), "--preprocess", how, "--image", tmp_path / "p.png", *OWN),
                 tmp_path), (kind, how, size))
    promise(LIMITS.format("pictures"), WHY, 1)


def test_pipes_devices_and_folders_are_refused_and_not_waited_for(checkpoint, base, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    model, images, n = checkpoint("llava-1.5"), ("--images", base / "in"), 0
    for odd in (tmp_path / "fifo", tmp_path / "folder", "/dev/zero", "/dev/null", "/dev/stdin"):
        for main, argv in ((knockout.main, ("--model", model, "--image", odd, *OWN)),
                           (knockout.main, ("--model", model, "--data", odd, *images)),
                           (eval_gqa.main, ("--model", model, "--questions", odd, *images)),
                           (prune.main, ("--model", model, "--data", base / "in" / "x_ChooseAttr.csv", *images,
                                         "--suggest", odd)),
                           (plots.main, (odd, "--out", "x.png")), (llava_min.main, ("--model", odd, *OWN[:2])),
                           (llava_min.main, ("--model", model, "--image", odd, *OWN[:2]))):
            o = run(main, argv, tmp_path)
            survived(o, (main.__module__, argv))
            assert o.code == 2 and o.seconds < 10, (argv, o.out)
            n += 1
    promise("A pipe, device or folder in place of a file is refused, not waited for", "each flag that takes a file", n)


# ---------------------------------------------------------------------------------------------------- question files

def test_question_csvs(checkpoint, base, tmp_path):
    text, n = (base / "in" / "x_ChooseAttr.csv").read_text(), 90
    table = list(csv.reader(io.StringIO(text)))
    file = tmp_path / "x_ChooseAttr.csv"
    for r in cases("csv", n):
        if r.random() < 0.4:
            data, did = spoil_bytes(text.encode(), r)
        else:
            rows = [list(row) for row in table]
            row, column = r.randrange(len(rows)), r.randrange(len(rows[0]))
            rows[row][column] = str(r.choice(ODD))
            out = io.StringIO()
            csv.writer(out).writerows(rows)
            data, did = out.getvalue().encode(errors="surrogatepass"), (row, table[0][column], rows[row][column][:30])
        file.write_bytes(data)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        o = run(knockout.main, ("--model", checkpoint("llava-1.5"), "--data", file, "--images", base / "in", "--all",
                                *OWN[2:], *r.choice(((), ("--skip-bad",)))), tmp_path)
        survived(o, did, outside=[base / "outside"])
    promise(LIMITS.format("question files"), WHY, n)


def gqa_files():
    """A small GQA question file with its scene graphs and regions, OK-VQA's two files and A-OKVQA's -> {name: JSON}."""
    types = {"structural": "choose", "semantic": "attr", "detailed": "chooseColor"}
    gqa = {str(i): {"question": "Is the cup red or blue?", "answer": "red", "imageId": image, "types": types,
                    "semantic": [{"operation": "select", "argument": "cup (7)"},
                                 {"operation": "choose color", "argument": "red|blue"}]}
           for i, image in enumerate("ab")}
    box = {"name": "cup", "x": 20, "y": 10, "w": 20, "h": 20}
    graphs = {image: {"width": size[0], "height": size[1], "objects": {"7": box}}
              for image, size in (("a", (90, 60)), ("b", (60, 90)))}
    regions = [{"id": 1, "regions": [{"image_id": "a", "phrase": "a red cup"}]}]
    okvqa = {"questions": [{"image_id": 7, "question": "What is it?", "question_id": 70}]}
    notes = {"annotations": [{"question_id": 70, "answers": [{"answer": "cup", "raw_answer": "cups"}] * 10}]}
    aokvqa = [{"image_id": 7, "question": "What is it?", "question_id": "q7", "difficult_direct_answer": False,
               "direct_answers": ["cup"] * 10}]
    return {"val_balanced_questions.json": gqa, "val_sceneGraphs.json": graphs, "region_descriptions.json": regions,
            "OpenEnded_mscoco_val2014_questions.json": okvqa, "mscoco_val2014_annotations.json": notes,
            "aokvqa_v1p0_val.json": aokvqa}


def test_question_jsons(checkpoint, base, tmp_path):
    good, n = gqa_files(), 150
    for name in ("COCO_val2014_000000000007", "000000000007"):
        shutil.copy(base / "in" / "a.jpg", base / "in" / f"{name}.jpg")
    for r in cases("json", n):
        name = r.choice(list(good))
        value, did = spoil(good[name], r)
        for other in good:
            (tmp_path / other).write_text(json.dumps(value if other == name else good[other]))
        asked = {"val": "val_balanced_questions.json", "reg": "val_balanced_questions.json",
                 "aok": "aokvqa_v1p0_val.json"}.get(name[:3], "OpenEnded_mscoco_val2014_questions.json")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        argv = ("--model", checkpoint("llava-1.5"), "--images", base / "in", *r.choice(((), ("--skip-bad",))))
        if asked.startswith("val") and r.random() < 0.3:
            o = run(eval_gqa.main, (*argv, "--questions", tmp_path / asked, "--collect", tmp_path / "six"), tmp_path)
        else:
            o = run(knockout.main, (*argv, "--data", tmp_path / asked, "--all", *OWN[2:]), tmp_path)
        survived(o, (name, did), outside=[base / "outside"])
    promise(LIMITS.format("question files"), WHY, n)


def test_names_that_lead_out_of_their_folder(checkpoint, base, tmp_path):
    secret, n = base / "outside" / "secret.jpg", 0
    whole = checkpoint("vicuna", "original", "sharded")
    index = next(file.name for file in whole.iterdir() if file.name.endswith(".index.json"))
    raw = json.loads((whole / index).read_text())
    shard = next(iter(raw["weight_map"].values()))
    shutil.copy(whole / shard, base / "outside" / shard)
    for name in ("../outside/secret", "../outside/secret.jpg", str(secret), "x/../../outside/secret.jpg", "..", "/"):
        (tmp_path / "x_ChooseAttr.csv").write_text("\n".join([HEADER, ROWS[0].replace(",a,", f",{name},")]) + "\n")
        gqa = gqa_files()
        gqa["val_balanced_questions.json"]["0"]["imageId"] = name
        for file, value in gqa.items():
            (tmp_path / file).write_text(json.dumps(value))
        for file in ("x_ChooseAttr.csv", "val_balanced_questions.json"):
            o = run(knockout.main, ("--model", checkpoint("llava-1.5"), "--data", tmp_path / file, "--images",
                                    base / "in", "--all", *OWN[2:]), tmp_path)
            survived(o, (file, name), outside=[base / "outside"])
            assert o.code == 2, (name, o.out)
            n += 1
    odd = (f"../../outside/{shard}", str(base / "outside" / shard), f"./{shard}/../{shard}", "..", 3, None, [])
    for name in odd:
        names = raw["weight_map"] | {next(iter(raw["weight_map"])): name}
        folder = with_files(whole, tmp_path / "m" / "model", {index: json.dumps({"weight_map": names}).encode()})
        o = run(llava_min.main, ("--model", folder, *OWN[:2]), tmp_path)
        survived(o, name, outside=[base / "outside"])
        assert o.code == 2 and "index of shards" in o.err, (name, o.err)
        n += 1
    promise("Nothing is read outside the folders that were given", "names with ../ and absolute ones in question and "
            "index files, watched by an audit hook, as are all question files above", n)


# ---------------------------------------------------------------------------------------------------- flags

FLAGS = ("--limit", "--window", "--heads", "--max-norm", "--edge", "--src", "--box", "--options", "--object",
         "--answer", "--question", "--seed", "--shard", "--subword", "--dtype", "--device", "--model", "--revision",
         "--image", "--vision-tower", "--tasks", "--out")


def test_flags(checkpoint, base, tmp_path):
    values, n = [str(v) for v in ODD if v != "\ud800" and len(str(v)) < 100_000], 120
    values += ["0,0,1,1", "nan,0,1,1", "image", "a->b", "last->image", "--x", "0,99", "text:red", "1/2", "red,blue"]
    for r in cases("flags", n):
        main, flag, value = r.choice((knockout.main, lens.main, prune.main)), r.choice(FLAGS), r.choice(values)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        argv = ["--model", checkpoint("llava-1.5"), "--image", base / "in" / "a.jpg", "--question", "Is it red?"]
        o = run(main, (*argv, flag, value), tmp_path)
        if flag != "--shard":
            survived(o, (main.__module__, flag, value))
    promise(LIMITS.format("flags"), WHY, n)


@pytest.mark.parametrize("number", [3, 4, 5, 6, 12, 14, 15, 37])
def test_every_figure_of_an_own_question_is_drawn_or_says_what_it_needs(checkpoint, base, tmp_path, number):
    o = run(figures.main, (number, "--model", checkpoint("llava-1.5"), "--image", base / "in" / "a.jpg", "--question",
                           "Is it red?"), tmp_path)
    survived(o, number)
    assert (tmp_path / "out" / "figures" / f"figure_{number}.png").exists() == (o.code == 0) == (number != 5), o.err
    promise(LIMITS.format("flags"), WHY, 1)


# ---------------------------------------------------------------------------------------------------- runs

def asking(checkpoint, base, out, *more):
    return ("--model", checkpoint("llava-1.5"), "--data", base / "in" / "x_ChooseAttr.csv", "--images", base / "in",
            "--all", "--dtype", "float32", "--edge", "image->last", "question->last", "--window", 2, "--out", out,
            *more)


def test_a_damaged_run_is_refused_or_completed_to_the_same_bytes(checkpoint, base, tmp_path):
    assert run(knockout.main, asking(checkpoint, base, tmp_path / "good"), tmp_path).code == 0
    names, n = ("knockout.csv", "knockout.progress", "run.json"), 120
    good = {name: (tmp_path / "good" / name).read_bytes() for name in names}
    for r in cases("runs", n):
        name, out = r.choice(names), tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "good", out)
        data, did = spoil_bytes(good[name], r)
        if name == "knockout.progress" and r.random() < 0.7:
            lines = [json.loads(line) for line in good[name].splitlines()]
            value, did = spoil(lines, r)
            r.choice((r.shuffle, lambda _: None))(value)
            data = "".join(json.dumps(line) + "\n" for line in value).encode()
        (out / name).write_bytes(data)
        o = run(knockout.main, asking(checkpoint, base, out), tmp_path)
        survived(o, (name, did))
        assert o.code == 2 or (out / "knockout.csv").read_bytes() == good["knockout.csv"], (name, did)
    promise("A damaged run is refused, or completed to the same bytes", "seeded damage to CSV, journal and run.json", n)


KILLS = ("A run that is killed at any moment comes out byte-identical",
         "SIGKILL at random moments, while it is resumed and while a pilot grows; cases are kills")


def killed(argv, tmp_path, out, n, seed, main=knockout.main):
    """Kill a command n times at random moments, resuming each time, then let it finish -> how often it was killed."""
    done = 0
    for r in cases(seed, n):
        o = run(main, argv, tmp_path, kill_after=r.uniform(0.01, 0.25))
        assert o.code in (0, -9), o.err
        done += o.code == -9
        if o.code == 0:                                             # it was finished: begin again
            shutil.rmtree(out)
    return done


def test_a_run_that_is_killed_comes_out_byte_identical(checkpoint, base, tmp_path):
    n = 100
    argv, out = asking(checkpoint, base, tmp_path / "b"), tmp_path / "b"
    assert run(knockout.main, asking(checkpoint, base, tmp_path / "a"), tmp_path).code == 0
    done = killed(argv, tmp_path, out, n, "kills")
    assert run(knockout.main, argv, tmp_path).code == 0
    for name in ("knockout.csv", "knockout.progress"):
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert {r["question_id"] for r in read(out / "knockout.csv")} == {"01", "02", "03"}
    promise(*KILLS, done)


def test_a_pilot_that_is_killed_while_it_grows_comes_out_byte_identical(checkpoint, base, tmp_path):
    whole = ("--limit", 3)
    assert run(knockout.main, asking(checkpoint, base, tmp_path / "a", *whole), tmp_path).code == 0
    done = 0
    for r in cases("pilots", 20):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        for limit in (1, 2, 3):
            o = run(knockout.main, asking(checkpoint, base, tmp_path / "b", "--limit", limit), tmp_path,
                    kill_after=r.uniform(0.02, 0.3))
            done += o.code == -9
        edges = ("--edge", "question->last", "image->last")         # the same edges in another order
        assert run(knockout.main, asking(checkpoint, base, tmp_path / "b", *edges, *whole), tmp_path).code == 0
        assert (tmp_path / "b" / "knockout.csv").read_bytes() == (tmp_path / "a" / "knockout.csv").read_bytes()
    promise(*KILLS, done)


def test_what_a_run_writes_is_finite(checkpoint, base, tmp_path):
    """The oracle of this file: undamaged, the same commands write numbers."""
    assert run(knockout.main, asking(checkpoint, base, tmp_path / "a"), tmp_path).code == 0
    assert np.isfinite([float(row["change_percent"]) for row in read(tmp_path / "a" / "knockout.csv")]).all()
