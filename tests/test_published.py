"""python -m pytest tests/test_published.py

check.py against numbers: of others, on the published models, and our own frozen ones. A number that differs fails.
"""
import json
import math
import shutil
from pathlib import Path

import pytest
import world
from commands import refused

import check
from harness import facts, hub, runs

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
PUBLISHED = json.loads((ROOT / "harness" / "published.json").read_text(encoding="utf-8"))
here = pytest.mark.skipif(not (SHARED / "published").is_dir() or not (SHARED / "golden").is_dir(),
                          reason="../shared/published and ../shared/golden are not here")

# config.json of llava-hf/llava-1.5-7b-hf: transformers leaves out what is its default.
CONFIG = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
          "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
          "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-05,
                          "max_position_embeddings": 4096},
          "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "patch_size": 14,
                            "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                            "projection_dim": 768, "vocab_size": 32000}}


def lines(stdout, part):
    return [line for line in stdout.splitlines() if line[8:].startswith(part + " ")]


# ---------------------------------------------------------------------------------------------------- others' numbers

@here
def test_the_facts_in_the_repository_are_those_that_were_published():
    theirs = json.loads((SHARED / "published" / "llava-1.5-7b.json").read_text())
    entry = PUBLISHED["llava-1.5-7b"]
    assert entry["window"] == theirs["window"] and entry["dtype"] == theirs["dtype"]
    assert theirs["source"].split(" ")[0] in entry["source"] and len(theirs["questions"]) == 2
    for ours, q in zip(entry["questions"], theirs["questions"], strict=True):
        assert ours["id"] == q["question_id"] and ours["image_sha256"] == q["image_sha256"]
        assert ours["prompt"] == {"ids_sha256": theirs["input_ids_sha256"], "related_patches": q["related_patches"],
                                  **{name: theirs[name] for name in ("tokens", "image", "question", "last")}}
        numbers = dict(ours["numbers"])
        assert numbers.pop("lens_top1", None) == q.get("lens_final_norm_top1_at_last_after_layer_1_to_32")
        assert numbers == {name: q[name] for name in ("token", "answer_ids", "p_base", "p_knockout")}
    assert "lens_top1" in entry["questions"][0]["numbers"]


@pytest.fixture
def texts(tmp_path):
    """A folder with the published config and the published tokenizer, and no weights."""
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(SHARED / "golden" / "setA" / "tiny-llava-1.5" / "checkpoint" / "tokenizer.model", folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@here
def test_tokenizer_and_config_alone_give_the_published_ids_positions_and_patches(call, texts):
    argv = ("--model", texts, "--published", "llava-1.5-7b")
    code, stdout, err = call(check.main, *argv, "--only", "prompt")
    assert code == 0 and "6 checks, 0 failed" in stdout and "not checked" not in stdout, (stdout, err)
    assert all(line.startswith("ok ") for line in lines(stdout, "prompt")) and "gexinh/vlm-probing" in stdout
    code, stdout, err = call(check.main, *argv)                     # the rest needs weights, and says so
    assert code == 0 and "not checked: cut, numbers: " in stdout and "lacks model.safetensors" in stdout, (stdout, err)
    assert "not checked: greedy, accuracy: nobody's numbers" in stdout
    refused(call(check.main, *argv, "--only", "numbers"), "lacks model.safetensors")


@here
@pytest.mark.parametrize("name, change", [
    ("token ids", lambda raw: raw.update(text_config=raw["text_config"] | {"vocab_size": 32000})),      # no change
    ("related patches", lambda raw: raw["vision_config"].update(image_size=224)),
    ("number of tokens", lambda raw: raw["vision_config"].update(patch_size=28))])
def test_another_geometry_is_not_the_published_one(call, texts, name, change):
    raw = json.loads(json.dumps(CONFIG))
    change(raw)
    (texts / "config.json").write_text(json.dumps(raw))
    code, stdout, _ = call(check.main, "--model", texts, "--published", "llava-1.5-7b", "--only", "prompt")
    failed = [line for line in lines(stdout, "prompt") if line.startswith("FAILED")]
    assert code == (1 if failed else 0) and bool(failed) == (name != "token ids")
    assert not failed or any(f" {name}, 2 questions" in line for line in failed)


# ---------------------------------------------------------------------------------------------------- our own numbers

def test_the_bundled_models_give_the_frozen_numbers(call):
    for model, *how in (("llava-tiny",), ("llava-tiny-anyres",), ("llava-tiny", "--offload", "disk")):
        code, stdout, err = call(check.main, "--model", model, "--only", "prompt", "numbers", *how)
        assert code == 0 and "15 checks, 0 failed" in stdout and "not checked" not in stdout, (stdout, err)


@pytest.fixture(scope="module")
def frozen(checkpoint, tmp_path_factory):
    """(flags of a tiny model and its photos, what --freeze wrote about it)."""
    from commands import HEADER, ROWS
    folder = tmp_path_factory.mktemp("frozen")
    world.picture(90, 60).save(folder / "a.jpg")
    world.picture(60, 90).save(folder / "b.jpg")
    (folder / "x_ChooseAttr.csv").write_text("\n".join([HEADER, *ROWS]) + "\n")
    argv = ("--model", str(checkpoint("llava-1.5")), "--images", str(folder))
    with pytest.raises(SystemExit) as stop:
        check.main([*argv, "--data", str(folder / "x_ChooseAttr.csv"), "--window", "2", "--dtype", "float32",
                    "--freeze", str(folder / "mine.json")])
    assert not stop.value.code
    return argv, json.loads((folder / "mine.json").read_text())


def against(call, frozen, tmp_path, change=None, *flags, parts=("prompt", "numbers")):
    argv, facts = frozen
    facts = json.loads(json.dumps(facts))
    if change:
        change(next(iter(facts.values())))
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(facts))
    return call(check.main, *argv, "--against", file, "--dtype", "float32", "--only", *parts, *flags)


def test_a_models_own_numbers_hold_and_are_compared_whatever_its_folder_is_called(call, frozen, tmp_path):
    argv, facts = frozen
    code, stdout, err = against(call, ((("--model", argv[1], *argv[2:])), {"another name": next(iter(facts.values()))}),
                                tmp_path)
    assert code == 0 and "15 checks, 0 failed" in stdout and "--freeze" in stdout, (stdout, err)


def put(*path):
    """put("numbers", "p_base", lambda v: ...): change one value of the first question."""
    *keys, last, new = path

    def change(entry):
        at = entry["questions"][0]
        for key in keys:
            at = at[key]
        at[last] = new(at[last])
    return change


@pytest.mark.parametrize("change, what", [
    (put("prompt", "ids_sha256", lambda v: "0" + v[1:]), "token ids, 3 questions"),
    (put("prompt", "tokens", lambda v: v + 1), "number of tokens"),
    (put("prompt", "image", lambda v: [v[0], v[1] + 1]), "positions of the image"),
    (put("prompt", "related_patches", lambda v: v[1:]), "related patches"),
    (put("numbers", "answer_ids", lambda v: [v[0] + 1, *v[1:]]), "answers, 3 questions"),
    (put("numbers", "p_base", lambda v: v * 1.002), "P of the first token, 3 questions: largest difference (01)"),
    (put("numbers", "p_knockout", "image->question", 2, lambda v: v * 1.003), "image->question, 3 questions: largest,"),
    (put("numbers", "p_knockout", "last->last", lambda v: [p * 1.0006 for p in v]), "last->last, 3 questions: largest"),
    (put("numbers", "lens_top1", lambda v: [v[0] + 1, *v[1:]]), "logit lens, 3 questions: layers")])
def test_one_number_that_differs_fails_and_is_named(call, frozen, tmp_path, change, what):
    code, stdout, _ = against(call, frozen, tmp_path, change)
    failed = [line for line in stdout.splitlines() if line.startswith("FAILED")]
    assert code == 1 and what in failed[0] and ("P of" in what or len(failed) == 1), stdout
    assert "checks, " + str(len(failed)) + " failed" in stdout


def test_in_16_bits_shapes_are_compared_and_not_digits(call, frozen, tmp_path):
    argv, facts = frozen
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(facts))
    code, stdout, _ = call(check.main, *argv, "--against", file, "--dtype", "bfloat16", "--only", "numbers")
    assert "at most 12, 4 %" in stdout and "at least 75 %" in stdout
    code, stdout, _ = against(call, frozen, tmp_path, lambda entry: entry.update(dtype="bfloat16"))
    assert code == 0 and "at most 12, 4 %" in stdout                # the wanted numbers are the rounded ones


def test_a_photo_that_is_missing_or_another_one_leaves_its_question_unchecked(call, frozen, tmp_path):
    argv, facts = frozen
    code, stdout, _ = against(call, frozen, tmp_path, put("image_sha256", lambda v: "0" * 64))
    assert code == 0 and "not checked: numbers of question 01: " in stdout and "is another photo" in stdout
    assert "answers, 2 questions" in stdout

    def rename(entry):
        for q in entry["questions"]:
            q["image"] = "z.jpg"
    code, stdout, _ = against(call, frozen, tmp_path, rename)
    assert code == 0 and stdout.count("z.jpg is missing") == 3 and not lines(stdout, "numbers")
    file = tmp_path / "facts.json"
    refused(call(check.main, *argv[:2], "--against", file, "--only", "numbers"), "nothing could be checked",
            "needs the photo z.jpg", "--images DIR")


def test_a_long_answer_is_compared_word_by_word(call, frozen, tmp_path, model):
    argv, _ = frozen
    m, file = model("llava-1.5"), Path(argv[3]) / "a.jpg"
    answer = m.generate(m.prompt("What is shown in this image?", file, brief=False), 100)
    words, fact = len(answer.split()), {"image": "a.jpg", "size": [90, 60], "question": "What is shown in this image?",
                                        "answer": answer, "from": "here"}
    assert words > check.WORDS

    def result(**new):
        facts = {"m": {"source": "a test", "greedy": fact | new}}
        return against(call, (argv, facts), tmp_path, parts=("greedy",))
    code, stdout, err = result()
    assert code == 0 and f"{words} of {words}" in stdout, (stdout, err)
    at = answer.split()
    code, stdout, _ = result(answer=" ".join([*at[:4], "radar", *at[5:]]))
    assert code == 1 and f"4 of {words}" in stdout and "FAILED" in stdout
    for new, why in (({"size": [90, 61]}, "a.jpg is 90x60 px, not 90x61"),
                     ({"image": "y.jpg"}, "y.jpg is missing: it is here")):
        code, _, err = result(**new)
        assert code == 2 and why in err


@pytest.mark.slow
def test_accuracy_by_group_is_compared_with_its_interval(call, monkeypatch, tmp_path):
    bundled = hub.BUNDLED["llava-tiny"].parent / "val"
    argv = ("--images", bundled / "images", "--gqa", bundled / "val_balanced_questions.json", "--limit", 4,
            "--only", "accuracy", "--out", tmp_path / "out")

    def result(**accuracy):
        file = tmp_path / "facts.json"
        file.write_text(json.dumps({"llava-tiny": {"source": "a test", "accuracy": accuracy}}))
        return call(check.main, *argv, "--against", file)
    code, stdout, err = result(**{"choose/attr": 97.0, "query/attr": 95.0})
    assert code == 0 and "choose/attr, 4 questions" in stdout, (stdout, err)
    assert "0 checks, 0 failed" in stdout                           # of so few, nothing is said
    monkeypatch.setattr(check, "ENOUGH", 4)
    code, stdout, err = result(**{"choose/attr": 10.0, "query/attr": 95.0, "query/none": 50.0})
    assert code == 1 and "2 checks, 1 failed" in stdout and "not checked: accuracy in query/none: " in stdout
    code, _, err = call(check.main, "--against", tmp_path / "facts.json", "--only", "accuracy")
    assert code == 2 and "--gqa FILE" in err


@pytest.mark.parametrize("text, words", [
    ("[]", ["is not a JSON object"]), ("{", ["is not JSON"]), ('{"m": 3}', [", m: not an entry of a facts file"]),
    ('{"m": {"source": "x", "questions": []}}', [", m: it has no 'dtype'"]),
    ('{"m": {"source": "x", "accuracy": {"a": "9"}}}', [", m: 'accuracy' is not what it must be"])])
def test_what_is_no_facts_file_is_refused(call, tmp_path, text, words):
    (tmp_path / "f.json").write_text(text)
    refused(call(check.main, "--against", tmp_path / "f.json"), "f.json", *words)


def test_flags_that_do_not_fit_are_refused(call, tmp_path):
    refused(call(check.main, "--only", "everything"), "--only", "everything")
    refused(call(check.main, "--gqa", "x.json"), "--gqa needs --images")
    refused(call(check.main, "--images", tmp_path / "no"), "no such folder")
    refused(call(check.main, "--published", "llava-9"), "--published llava-9", "llava-1.5-7b")
    refused(call(check.main, "--against", tmp_path / "no.json"), "no.json")


def test_every_entry_says_where_it_is_from_and_frozen_photos_are_the_bundled_ones():
    assert all(len(entry["source"]) > 20 for entry in PUBLISHED.values())
    assert len(PUBLISHED["llava-1.5-13b"]["accuracy"]) == 15
    frozen = json.loads((ROOT / "tiny" / "frozen.json").read_text(encoding="utf-8"))
    assert set(frozen) == set(hub.BUNDLED)
    for entry in frozen.values():
        for q in entry["questions"]:
            assert runs.sha256(ROOT / "tiny" / "val" / "images" / q["image"]) == q["image_sha256"]


# ---------------------------------------------------------------------------------------------------- bad facts

def places(value, path=()):
    """Every place in nested JSON, as a path."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def test_whatever_is_missing_or_odd_in_a_facts_file_is_named(frozen, tmp_path):
    """Each key deleted, and each value replaced by each of some odd ones: either the file is refused in one line, or it
    is still a facts file."""
    entry = json.loads(json.dumps(next(iter(frozen[1].values()))))
    entry = entry | {"questions": entry["questions"][:1], "accuracy": {"choose/attr": 50.0},
                     "greedy": {"image": "a.jpg", "size": [9, 9], "question": "q", "answer": "a", "from": "b"}}
    short = entry["questions"][0]["numbers"]["p_knockout"]
    entry["questions"][0]["numbers"]["p_knockout"] = dict(list(short.items())[:1])
    refusals = deletions = 0
    for path in places(entry):
        for odd in (None, "x", -1, 2.5, math.nan, [], {}, [None], 10 ** 30, "DELETE"):
            changed = json.loads(json.dumps(entry))
            at = changed
            for key in path[:-1]:
                at = at[key]
            if odd == "DELETE" and isinstance(at, dict):
                del at[path[-1]]
            elif odd != "DELETE":
                at[path[-1]] = odd
            try:
                facts.check("f.json, m", changed)
            except ValueError as e:
                assert str(e).startswith("f.json, m") and len(str(e)) < 300
                refusals, deletions = refusals + 1, deletions + (odd == "DELETE")
    assert refusals > 500 and deletions > 20


def test_facts_of_another_model_are_an_error_and_not_a_difference(call, frozen, tmp_path):
    change = put("numbers", "p_knockout", "image->question", lambda v: v[:3])
    code, stdout, err = against(call, frozen, tmp_path, change)
    assert code == 2 and "question 01 of the facts file: image->question has 3 points, but the model has " in err
    assert "token ids" in stdout                                    # what was checked before is on the screen


def test_an_edge_that_the_question_does_not_have_is_named(call, frozen, tmp_path):
    def change(entry):
        known = entry["questions"][0]["numbers"]["p_knockout"]
        known["newlines->last"] = known["image->last"]
    code, stdout, _ = against(call, frozen, tmp_path, change)
    assert code == 0 and "not checked: numbers of question 01, newlines->last: newlines: only AnyRes" in stdout


def test_other_preprocessing_is_not_compared_and_the_same_one_holds(call, frozen, tmp_path):
    argv, _ = frozen
    code, stdout, _ = against(call, frozen, tmp_path, None, "--preprocess", "hf", parts=("prompt", "cut"))
    assert code == 0 and "not checked: prompt, numbers: they were measured with --preprocess llava" in stdout
    own = (*argv[:2], "--image", Path(argv[3]) / "a.jpg", "--question", "Is the cup red?", "--box", "20,10,40,30")
    how = ("--preprocess", "hf", "--dtype", "float32")
    code, stdout, err = call(check.main, *own, *how, "--freeze", tmp_path / "hf.json")
    assert code == 0 and f"--images {argv[3]}" in stdout, err
    code, stdout, err = call(check.main, *argv, *how, "--against", tmp_path / "hf.json", "--only", "prompt", "numbers")
    assert code == 0 and "FAILED" not in stdout and "1 question" in stdout, (stdout, err)


def test_freezing_adds_to_a_file_and_refuses_what_it_cannot_say(call, frozen, tmp_path):
    argv, _ = frozen
    data = (*argv, "--data", Path(argv[3]) / "x_ChooseAttr.csv", "--dtype", "float32", "--window", 2)
    for n in (1, 3):                                                # the first again, and two more
        assert call(check.main, *data, "--limit", n, "--freeze", tmp_path / "f.json")[0] == 0
    entry, = json.loads((tmp_path / "f.json").read_text()).values()
    assert [q["id"] for q in entry["questions"]] == ["01", "02", "03"]
    refused(call(check.main, *data[:-1], 3, "--freeze", tmp_path / "f.json"), "with window 2, not 3", "another file")
    refused(call(check.main, *data, "--freeze", tmp_path / "no" / "f.json"), "no such folder")
    refused(call(check.main, *data, "--freeze", ""), "--freeze")
    for flags in (("--heads", 0), ("--max-norm", 9), ("--only", "cut"), ("--against", tmp_path / "f.json")):
        refused(call(check.main, *data, "--freeze", tmp_path / "g.json", *flags), "--freeze and --" + flags[0][2:])
    refused(call(check.main, *data, "--freeze", tmp_path / "g.json", "--subword", "last"), "--subword")


def test_flags_of_experiments_are_not_check_pys(call):
    for flag in ("--groups", "--plain", "--control", "--per-head", "--measure"):
        refused(call(check.main, flag), flag)
    refused(call(check.main, "--shard", "0/2"), "not split into shards")
