"""python -m pytest tests/test_train.py

tiny/train.py: that training sees the prompts of llava_min.py, that a stopped training resumes, and what it writes.
"""
import json
import logging.handlers
import random
from collections import Counter

import pytest
import torch
from commands import refused
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import llava_min
from harness import hub
from harness.questions import BUNDLED, read_gqa
from tiny import train
from tiny.world import ANSWERS, COLORS, PHOTOS, SHAPES, SIZES, draw, scene
from views import patch_boxes

SCENES = [scene(3, "val", i) for i in range(6)]


@pytest.fixture(scope="module", params=[False, True], ids=["pad", "anyres"])
def fresh(request):
    model, raw = train.build(5, request.param)
    return model.eval(), raw


def test_a_batch_is_the_prompts_of_llava_min_and_no_text_attends_to_another(fresh):
    model, _ = fresh
    b = train.batch_of(model, 5, 2, 2, 2)
    with torch.no_grad():
        logits, tokens = train.replies(model, b)
    size = PHOTOS[2] if model.config.aspect == "anyres" else None
    drawn = (s for s in (scene(5, "train", 2000 + i) for i in range(100)) if size in (None, (s.width, s.height)))
    scenes, r, at, first = [next(drawn), next(drawn)], random.Random("5/2"), 0, []
    for s, texts in [(s, train.texts_of(s, r, 2)) for s in scenes]:
        for question, reply, brief in texts:
            p = model.prompt(question, draw(s), brief=brief)
            ids = model.tokenizer.encode(reply).ids[1:]             # as after a space: "ASSISTANT: Red"
            x = torch.cat((model.embed(p), model.decoder.embed_tokens(torch.tensor([ids]))), 1)
            with torch.no_grad():
                h = model.decoder(x, torch.arange(x.shape[1]))
                want = model.decoder.lm_head(model.decoder.norm(h[0, len(p) - 1:]))
            n = len(ids) + 1
            assert tokens[at:at + n].tolist() == [*ids, model.tokenizer.token_to_id("</s>")]
            torch.testing.assert_close(logits[at:at + n], want, rtol=1e-4, atol=1e-5)
            first += [at] * brief
            at += n
    assert at == len(tokens) and b.answers.tolist() == first


def test_a_patch_shows_the_thing_that_covers_most_of_it(fresh):
    model, _ = fresh
    c = model.config
    for s in SCENES:
        labels = train.patch_labels(s, c).tolist()
        shown = Counter()
        for box, label in zip(patch_boxes((s.width, s.height), c.geometry).tolist(), labels, strict=True):
            if box[0] != box[0]:                                    # padding or a newline
                assert label == [-1] * 5 + [0]
                continue
            x0, y0, x1, y1 = box
            parts = [max(0, min(x1, t.x + t.w) - max(x0, t.x)) * max(0, min(y1, t.y + t.h) - max(y0, t.y)) /
                     ((x1 - x0) * (y1 - y0)) for t in s.things]
            t = s.things[parts.index(max(parts))]
            if abs(max(parts) - 0.2) > 1e-4:
                (x, y), w, h = t.center, s.width, s.height
                want = [SHAPES.index(t.name), list(COLORS).index(t.color), list(SIZES).index(t.size),
                        2 if abs(x - w / 2) < 10 else int(x > w / 2), 2 if abs(y - h / 2) < 10 else int(y > h / 2), 1]
                assert label == (want if max(parts) > 0.2 else [-1] * 5 + [0])
                shown[t.name] += max(parts) > 0.2
        assert set(shown) == {t.name for t in s.things} and all(shown.values())


START = hub.BUNDLED["llava-tiny"]                                # its tokenizer is there: training one takes seconds


def test_a_stopped_training_resumes_and_ends_with_the_same_weights(call, tmp_path):
    def run(folder, most=99):
        """Train, but stop before step number `most` -> how many steps were taken."""
        taken = []

        def step(*_):
            if len(taken) == most:
                raise KeyboardInterrupt
            taken.append(1)
        hook = register_optimizer_step_pre_hook(step)
        try:
            train.train(folder, start=START, steps=(2, 1, 1, 1, 0), batch=1, seed=1, save_every=2)
        finally:
            hook.remove()
        return len(taken)
    assert run(tmp_path / "straight") == 5
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 3)
    assert (tmp_path / "stopped" / "training.safetensors").exists()
    with pytest.raises(ValueError, match="begun with seed = 1, now it is 2"):
        train.train(tmp_path / "stopped", start=START, steps=(2, 1, 1, 1, 0), batch=1, seed=2)
    assert run(tmp_path / "stopped") == 3                           # of the three steps taken, two had been saved
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not (tmp_path / "stopped" / "training.safetensors").exists()
    with pytest.raises(ValueError, match="holds a finished model"):
        run(tmp_path / "stopped")

    code, _, err = call(train.main, tmp_path / "on", "--anyres", "--start", tmp_path / "straight", "--device", "cpu",
                        "--batch", 1, "--steps", 0, 0, 1, 0, 0)
    assert code == 0 and "1 of 1 steps left (stages 0 to 4: 0, 0, 1, 0, 0)" in err, err
    assert llava_min.load(tmp_path / "on").config.aspect == "anyres"


def test_a_written_model_loads_to_the_same_answers(fresh, tmp_path):
    model, raw = fresh
    train.write_model(tmp_path, model, raw)
    loaded = hub.load(str(tmp_path), device="cpu")
    assert loaded.decoder.norm.weight.dtype == torch.float32        # auto: small models are not rounded further
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours.half().float(), theirs), name
    p = loaded.prompt("Is the circle red or blue?", draw(SCENES[0]))
    assert loaded.generate(p) is not None and p.ids == model.prompt(p.question, draw(SCENES[0])).ids


def same_in_transformers(folder, question, photo):
    """transformers opens the folder without a word, finds every weight, none too many, and computes our logits."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    ours, said = llava_min.load(folder, preprocess="hf"), logging.handlers.BufferingHandler(1000)
    said.setLevel(logging.WARNING)
    logging.getLogger("transformers").addHandler(said)
    try:
        cls = getattr(hf, json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])
        theirs, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(said)
    assert not any(info.values()) and not said.buffer, (info, [record.getMessage() for record in said.buffer])
    p, V = ours.prompt(question, photo), ours.config.text.vocab     # <image> has the first id after the vocabulary
    at = p.ids.index(llava_min.IMAGE)
    ids = p.ids[:at] + [V] * len(p.slots) + p.ids[at + 1:]
    sizes = {"image_sizes": torch.tensor([p.size[::-1]])} if ours.config.aspect == "anyres" else {}
    with torch.no_grad():
        logits = theirs.eval()(input_ids=torch.tensor([ids]), pixel_values=p.pixels[None] if sizes else p.pixels,
                               **sizes).logits
        torch.testing.assert_close(ours(p), logits[..., :V], rtol=1e-4, atol=1e-4)


def test_transformers_opens_a_written_model_and_computes_the_same(fresh, tmp_path):
    train.write_model(tmp_path, *fresh)
    same_in_transformers(tmp_path, "Is the circle red or blue?", draw(SCENES[0]))


@pytest.mark.parametrize("name", hub.BUNDLED)
def test_transformers_opens_the_bundled_models_and_computes_the_same(name):
    q = read_gqa(BUNDLED, BUNDLED.parent / "images", limit=1)[0]
    same_in_transformers(hub.BUNDLED[name], q.question, q.open())


@pytest.mark.parametrize("name", hub.BUNDLED)
def test_the_writer_would_write_the_bundled_weights_again(name, tmp_path):
    folder = hub.BUNDLED[name]
    train.write_model(tmp_path, hub.load(name, device="cpu"), llava_min.read_json(folder / "config.json"))
    ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path, folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_words_of_answers_are_single_tokens_in_both_spellings(fresh):
    model, _ = fresh
    for words in ANSWERS.values():
        for word in words:
            for spelling in (word, word.capitalize()):
                assert len(model.tokenizer.encode(spelling).ids) == 2, spelling   # BOS and the word


@pytest.mark.parametrize("argv, parts", [(("x", "--start", "nowhere"), ["nowhere"]), ((), ["required", "DIR"])])
def test_bad_input_ends_in_one_line_and_exit_code_2(call, tmp_path, monkeypatch, argv, parts):
    monkeypatch.chdir(tmp_path)
    result = call(train.main, *argv)
    refused(result, *parts)
    assert result[2].count("\n") == 1
