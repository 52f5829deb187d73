"""python -m pytest tests/test_bundled.py

The bundled, trained models: that they are what their card says, and what cutting does to them. Every figure is measured
here, with tiny/score.py, from the weights and questions in tiny/.
"""
import json
import re

import numpy as np
import pytest
import torch
from commands import refused
from PIL import Image

import knockout
import llava_min
from fork import clean_pass, probability
from groups import parse_edge
from harness import hub
from harness.questions import BUNDLED, SIX, beside, read_gqa
from tiny import score
from tiny.world import make

pytestmark = pytest.mark.slow
FOLDER = BUNDLED.parents[1]
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
WANTED = {"llava-tiny": 0.95, "llava-tiny-anyres": 0.93}           # right answers, in each task
FROM_THE_IMAGE = {(name, "ChooseCat") for name in WANTED}          # the card: its last position attends to the image
ASKED = {"llava-tiny": 45, "llava-tiny-anyres": 25}                # of each task; AnyRes takes longer


@pytest.fixture(scope="module", params=hub.BUNDLED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tiny_model(name):
    return hub.load(name, device="cpu")


@pytest.fixture(scope="module")
def questions(name):
    return read_gqa(BUNDLED, BUNDLED.parent / "images", limit=ASKED[name], **beside(BUNDLED))


@pytest.fixture(scope="module")
def measured(tiny_model, questions):
    return score.score(tiny_model, questions)


@pytest.fixture(scope="module")
def cuts(tiny_model, questions):
    """Accuracy with an edge cut in all layers: edge -> task -> share."""
    found = score.cut_everywhere(tiny_model, questions, ("image->question", "last->last", "image->last"))
    return {edge: {task: share for task, (_, share) in by_task.items()} for edge, by_task in found.items()}


def test_all_six_tasks_are_answered_right(measured, name):
    assert set(measured) == set(SIX)
    for task, (n, right, _, _) in measured.items():
        assert n == ASKED[name] and right >= WANTED[name] - 1 / n, (task, right)    # a sample


def test_with_the_picture_blanked_no_task_is_answered_better_than_by_chance(measured):
    for task, (n, _, blind, guess) in measured.items():
        assert guess <= 0.5 and blind <= guess + 1.2 * n ** -0.5, (task, blind)         # 2.4 standard errors


def test_without_the_image_to_question_edge_accuracy_falls_to_chance(cuts, measured, name):
    """In five tasks; in the sixth without the edge from the image to the last position."""
    for task, (n, _, _, guess) in measured.items():
        edge = "image->last" if (name, task) in FROM_THE_IMAGE else "image->question"
        assert cuts[edge][task] <= guess + 1.2 * n ** -0.5, (edge, task)


def test_without_the_last_to_last_edge_accuracy_stays(cuts, measured):
    for task, share in cuts["last->last"].items():
        assert abs(share - measured[task][1]) <= 1.5 / measured[task][0], task          # one question at most


def test_the_card_tells_what_a_fresh_measurement_tells(measured, name):
    """Its accuracies, over all questions, within what a sample of them can tell."""
    section = CARD.partition(f"\n### {name}\n")[2].partition("\n#")[0]
    told = dict(re.findall(r"^\| (\w+) \| \d+ \| ([\d.]+) % \|", section, re.MULTILINE))
    for task, (n, right, _, _) in measured.items():
        assert abs(right - float(told[task]) / 100) <= 0.02 + 1 / n, (task, right)


def test_the_files_are_small_and_hold_no_surprise():
    assert sum(f.stat().st_size for name in hub.BUNDLED for f in (FOLDER / name).iterdir()) <= 12e6
    assert sum(f.stat().st_size for f in (FOLDER / "val").rglob("*") if f.is_file()) <= 4e6
    for name in hub.BUNDLED:
        assert {f.name for f in (FOLDER / name).iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}


def test_the_pages_in_docs_are_of_these_weights(name):
    page = (FOLDER.parent / "docs" / f"explain-{name}.html").read_text(encoding="utf-8")
    assert f'"weights":"{hub.weights_hash(hub.resolve(name).files)}"' in page


def test_the_bundled_questions_are_what_make_writes(tmp_path):
    make(tmp_path, 0, 0, 150)
    for file in sorted(tmp_path.glob("*.json")):
        assert file.read_bytes() == (FOLDER / "val" / file.name).read_bytes()
    for file in sorted(tmp_path.glob("images/*")):                  # another libjpeg may round otherwise
        ours = np.asarray(Image.open(FOLDER / "val" / "images" / file.name)).astype(int)
        assert abs(ours - np.asarray(Image.open(file))).max() <= 2


def test_around_its_first_layers_image_to_question_costs_the_answer_and_last_to_last_nothing(tiny_model, questions):
    model, lowest = tiny_model, {}
    for edge in ("image->question", "last->last"):
        found = []
        for q in questions[::12]:
            p = q.prompt(model)
            x, groups = model.embed(p), q.groups(p)
            logits = model.prefill(x, p.positions)[0][0]
            token = logits.argmax().item()
            curve, = knockout.sweep(model.decoder, clean_pass(model.decoder, x, p.positions),
                                    [list(map(groups.positions, parse_edge(edge)))], token, 3)
            found.append([knockout.percent(probability(logits, token), after) for after in curve])
        lowest[edge] = np.mean(found, 0).min()
    assert lowest["image->question"] < -25 and lowest["last->last"] > -1, lowest


def test_llava_min_answers_the_first_bundled_question_without_naming_a_model(call):
    q = next(iter(json.loads(BUNDLED.read_text()).values()))
    image = BUNDLED.parent / "images" / f"{q['imageId']}.jpg"
    code, answer, err = call(llava_min.main, "--image", image, "--question", q["question"])
    assert (code, answer.lower()) == (0, q["answer"] + "\n"), err


def test_a_bundled_name_without_its_folder_says_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setitem(hub.BUNDLED, "llava-tiny", tmp_path / "gone")
    with pytest.raises(ValueError, match="llava-tiny is bundled with llava-flow"):
        hub.resolve("llava-tiny")


def test_auto_dtype_is_what_the_config_asks_for():
    files = hub.resolve("llava-tiny").files
    assert hub.pick_dtype("auto", "cpu", files) == torch.float32
    assert hub.pick_dtype("auto", "cuda", files) == torch.float32
    assert hub.pick_dtype("bfloat16", "cpu", files) == torch.bfloat16


def test_score_prints_the_tables_of_the_card(call):
    code, stdout, err = call(score.main, "--limit", 1, "--device", "cpu")
    assert code == 0, err
    assert "17 questions about " in err and "6 of them with each of 6 edges cut" in err
    assert all(f"{part}: 100%" in err for part in ("accuracy", "cut in all layers", "after each layer")), err
    accuracy, cuts, layers = (table.splitlines()[0] for table in stdout.strip().split("\n\n"))
    assert f"\n{accuracy}\n" in CARD and f"\n{cuts}\n" in CARD
    assert layers == "| after layer | lower case | capitalised |" and stdout.count("\n| 10 | ") == 1


@pytest.mark.parametrize("argv, part", [(("--data", "gone.json"), "gone.json"),
                                        (("--model", "nothing at all"), "nothing at all")])
def test_bad_input_of_score_ends_in_one_line_and_exit_code_2(call, tmp_path, monkeypatch, argv, part):
    monkeypatch.chdir(tmp_path)
    result = call(score.main, *argv)
    refused(result, part)
    assert result[2].count("\n") == 1
