"""python -m pytest tests/test_eval.py

Accuracy on GQA's questions: batched answers against one by one, counting against hand-made cases, the command line.
"""
import copy
import csv
import json

import pytest
import torch
import world
from commands import read, refused
from PIL import Image

import eval_gqa
from eval_gqa import normalize
from harness.intervals import wilson
from harness.questions import BUNDLED, SIX, beside, group_of, program_of, read_csv, read_gqa, task_of

QUESTIONS = ["Is the cup red or blue?", "Red?", "What is to the left of the cup on the table?", "Is the cup red?"]


@pytest.mark.parametrize("kind", ["llava-1.5", "llava-1.6", "llama3-next", "vicuna"])
@pytest.mark.parametrize("ask", [QUESTIONS, QUESTIONS[:1], ["Red?", "Red?"]])
def test_answers_as_a_batch_are_those_one_by_one(model, kind, ask, monkeypatch):
    """In float64, and with a stop token that ends some answers before others."""
    m = copy.copy(model(kind))
    m._modules = dict(m._modules) | {"decoder": copy.deepcopy(m.decoder).double()}
    for name in ("mm_projector",):
        if hasattr(m, name):
            m._modules[name] = copy.deepcopy(getattr(m, name)).double()
    if getattr(m, "image_newline", None) is not None:
        m._parameters = {"image_newline": torch.nn.Parameter(m.image_newline.double(), requires_grad=False)}
    image = world.picture(90, 60) if m.config.vision else None
    prompts = [m.prompt(text, image) for text in ask]
    monkeypatch.setattr(m, "stop", set())
    plain = one_by_one(m, prompts)
    assert eval_gqa.answers(m, prompts, 6) == plain and all(len(ids) == 6 for ids in plain)
    monkeypatch.setattr(m, "stop", {plain[0][2]})
    ended = one_by_one(m, prompts)
    assert eval_gqa.answers(m, prompts, 6) == ended and len(ended[0]) <= 2
    monkeypatch.setattr(eval_gqa, "COPIED", 2 * len(prompts[0]))    # memory for few copies of the shared prefix
    passes = []                                                     # (sequences, tokens) of each pass but for decoding
    m.decoder.register_forward_pre_hook(lambda _, x: passes.append(tuple(x[0].shape[:2])))
    assert eval_gqa.answers(m, prompts, 6) == ended
    (once, prefix), *batches = passes
    assert once == 1 and sum(B for B, _ in batches) == len(prompts) and max(B for B, _ in batches) < 4
    assert all(B * prefix <= 2 * len(prompts[0]) for B, _ in batches)


def one_by_one(m, prompts):
    return [m.decode(*m.prefill(m.embed(p), p.positions), len(p), 6)[0] for p in prompts]


@pytest.mark.parametrize("kind", ["llava-1.5", "llama3-next"])
def test_llavas_prompt_has_neither_of_the_papers_two_spaces(model, kind):
    m, image = model(kind), world.picture(90, 60)
    papers, llavas = (m.prompt("Is it red?", image, **how).text for how in ({}, {
        "instruction": eval_gqa.LLAVA_INSTRUCTION}))
    assert llavas == papers.replace("? \nAnswer", "?\nAnswer").removesuffix(" \n") and papers != llavas
    assert papers.endswith("\n\n \n" if kind == "llama3-next" else "ASSISTANT:")


def test_a_picture_goes_through_the_tower_once_for_all_its_questions(model):
    m, passes = model("llava-1.5"), []
    hook = m.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    eval_gqa.answers(m, [m.prompt(text, world.picture(90, 60)) for text in QUESTIONS], 2)
    hook.remove()
    assert len(passes) == 1


def test_the_groups_are_those_of_table_2():
    assert [group_of(task) for task in SIX] == [
        "choose/attr", "choose/rel", "choose/cat", "compare/attr", "logical/obj", "query/attr"]
    assert group_of("verify/global") == "verify/global"


def test_normalizing_is_the_papers_or_llavas():
    assert normalize(" Yes.\n", "paper") == "yes." and normalize(" Yes.\n", "llava") == "yes"
    assert normalize("Hot dog", "paper") == "hot dog"


def test_wilsons_interval():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.fixture
def gqa(tmp_path):
    """A question file in GQA's format about two pictures -> its flags and entries."""
    def entry(image, question, answer, *types):
        return {"imageId": image, "question": question, "answer": answer, "semantic": [],
                "types": dict(zip(("structural", "semantic", "detailed"), types, strict=True))}
    world.picture(90, 60).save(tmp_path / "7.jpg")
    world.picture(60, 90).save(tmp_path / "8.jpg")
    entries = {"1": entry("7", "Is the cup red?", "yes", "verify", "attr", "verifyAttr"),
               "2": entry("8", "Is the cup red or blue?", "red", "choose", "attr", "chooseAttr"),
               "3": entry("7", "Is there a cup?", "yes", "verify", "obj", "exist"),
               "4": entry("7", "What is in the cup?", "milk", "query", "rel", "relS")}
    (tmp_path / "val_balanced_questions.json").write_text(json.dumps(entries))
    return ("--questions", tmp_path / "val_balanced_questions.json", "--images", tmp_path), entries


def test_eval_writes_answers_accuracy_and_predictions(call, gqa, checkpoint, model, tmp_path):
    flags, entries = gqa
    m = model("llava-1.6")
    said = {n: m.generate(m.prompt(e["question"], Image.open(tmp_path / f"{e['imageId']}.jpg").convert("RGB")))
            for n, e in entries.items()}
    entries["3"]["answer"] = said["3"].lower()                      # random weights get one right, if we let them
    flags[1].write_text(json.dumps(entries))
    code, stdout, err = call(eval_gqa.main, "--model", checkpoint("llava-1.6"), *flags, "--dtype", "float32", "--batch",
                             2, "--out", tmp_path / "out")
    assert code == 0, err
    rows = {r["question_id"]: r for r in read(tmp_path / "out" / "eval.csv")}
    assert {n: r["prediction"] for n, r in rows.items()} == {n: normalize(text, "paper") for n, text in said.items()}
    assert rows["3"]["correct"] == "1"
    with open(tmp_path / "out" / "accuracy.csv", newline="") as f:
        groups = {r["group"]: r for r in csv.DictReader(f)}
    assert set(groups) == {"verify/attr", "verify/obj", "choose/attr", "query/rel", "ChooseAttr", "all"}
    assert groups["all"]["questions"] == "4" and float(groups["verify/obj"]["accuracy"]) == 1
    assert int(groups["all"]["correct"]) == sum(r["correct"] == "1" for r in rows.values())
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == [
        {"questionId": n, "prediction": r["prediction"]} for n, r in rows.items()]
    assert "95 % interval" in stdout
    before = (tmp_path / "out" / "eval.csv").read_bytes()
    code, _, err = call(eval_gqa.main, "--model", checkpoint("llava-1.6"), *flags, "--dtype", "float32", "--batch", 2,
                        "--out", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "eval.csv").read_bytes() == before
    refused(call(eval_gqa.main, "--model", checkpoint("llava-1.6"), *flags, "--dtype", "float32", "--prompt", "llava",
                 "--out", tmp_path / "out"), "prompt", tmp_path / "out")


def test_an_evaluation_that_was_stopped_is_resumed(call, gqa, checkpoint, tmp_path, monkeypatch):
    argv = ("--model", checkpoint("llava-1.5"), *gqa[0], "--dtype", "float32")
    assert call(eval_gqa.main, *argv, "--out", tmp_path / "whole")[0] == 0
    honest, calls = eval_gqa.answers, []

    def stop(model, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(model, prompts, *rest)
    monkeypatch.setattr(eval_gqa, "answers", stop)
    assert call(eval_gqa.main, *argv, "--out", tmp_path / "parts")[0] == 130
    assert len(read(tmp_path / "parts" / "eval.csv")) == calls[0] == 3
    assert call(eval_gqa.main, *argv, "--out", tmp_path / "parts")[0] == 0
    whole, parts = ((tmp_path / name / "eval.csv").read_bytes() for name in ("whole", "parts"))
    assert whole == parts and calls == [3, 1, 1]


def test_shards_of_an_evaluation_are_merged(call, gqa, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *gqa[0], "--dtype", "float32")
    assert call(eval_gqa.main, *argv, "--out", tmp_path / "one")[0] == 0
    for shard in ("0/2", "1/2"):
        assert call(eval_gqa.main, *argv, "--shard", shard, "--out", tmp_path / "two")[0] == 0
    for name in ("eval.csv", "accuracy.csv", "predictions.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_what_cannot_be_asked_is_refused(call, gqa, checkpoint, tmp_path):
    flags, _ = gqa
    refused(call(eval_gqa.main, "--questions", flags[1]), "--images")
    refused(call(eval_gqa.main, *flags[:3], tmp_path / "gone"), "gone", "no such folder")
    refused(call(eval_gqa.main, "--model", checkpoint("vicuna"), *flags), "text-only")
    (tmp_path / "8.jpg").write_bytes(b"no picture")
    argv = ("--model", checkpoint("llava-1.5"), *flags, "--out", tmp_path / "out")
    refused(call(eval_gqa.main, *argv), "8.jpg")
    code, stdout, _ = call(eval_gqa.main, *argv, "--skip-bad")
    assert code == 0 and "left out: " in stdout and len(read(tmp_path / "out" / "eval.csv")) == 3


@pytest.mark.slow
def test_collecting_writes_files_that_read_as_the_questions_answered_right(call, tmp_path):
    """On the bundled world: the model's right answers, in the paper's columns, at most so many, drawn by seed."""
    argv = ("--limit", 12, "--out", tmp_path / "out", "--most", 5)
    code, stdout, err = call(eval_gqa.main, *argv, "--collect", tmp_path / "six")
    assert code == 0, err
    right = {r["question_id"] for r in read(tmp_path / "out" / "eval.csv") if r["correct"] == "1"}
    known = {q.id: q for q in read_gqa(BUNDLED, BUNDLED.parent / "images", **beside(BUNDLED))}
    files = sorted((tmp_path / "six").glob("*.csv"))
    assert [file.stem.rpartition("_")[2] for file in files] == sorted(SIX)
    for file in files:
        found = read_csv(file, BUNDLED.parent / "images")
        assert 0 < len(found) <= 5 and {q.id for q in found} <= right
        for q in found:
            for part in ("task", "question", "answer", "true_option", "false_option", "objects", "boxes", "size",
                         "captions", "image"):
                assert getattr(q, part) == getattr(known[q.id], part), (file, part)
    first = [file.read_bytes() for file in files]
    assert call(eval_gqa.main, *argv, "--collect", tmp_path / "again")[0] == 0
    assert [file.read_bytes() for file in sorted((tmp_path / "again").glob("*.csv"))] == first


@pytest.mark.slow
def test_collecting_reads_the_scene_graphs_before_it_asks_and_leaves_out_what_is_bad(call, tmp_path):
    graphs = json.loads(beside(BUNDLED)["scene_graphs"].read_text())
    raw = json.loads(BUNDLED.read_text())
    bad = next(n for n, e in raw.items() if task_of(e["types"]) in SIX
               and any(ids for _, ids in program_of(e)[1]))
    gone = next(ids[0] for _, ids in program_of(raw[bad])[1] if ids)
    del graphs[raw[bad]["imageId"]]["objects"][gone]
    (tmp_path / "graphs.json").write_text(json.dumps(graphs))
    argv = ("--limit", 2, "--scene-graphs", tmp_path / "graphs.json", "--collect", tmp_path / "six", "--out",
            tmp_path / "out")
    refused(call(eval_gqa.main, *argv), f"question {bad}", f"has no object {gone}")
    assert not (tmp_path / "out").exists()
    code, stdout, err = call(eval_gqa.main, *argv, "--skip-bad")
    assert code == 0 and f"has no object {gone}" in stdout and list((tmp_path / "six").glob("*.csv")), err


def test_collecting_needs_boxes(call, gqa, checkpoint, tmp_path):
    refused(call(eval_gqa.main, *gqa[0], "--collect", tmp_path / "six"), "--collect", "--scene-graphs")
