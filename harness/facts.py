"""
harness/facts.py - facts files: what is known of a model, published by others (published.json) or frozen by us.

Use     entry = read(FILES)["llava-1.5-7b"]
Needs   questions.py and runs.py beside it; groups.py and llava_min.py

A facts file is JSON, {model: entry}. An entry says its `source`, and has one or more of
    questions   with the photo's name and sha256. `prompt`: token ids (the sha256 of them as int64, little-endian, every
                image token as `image_id`), positions, related patches. `numbers`: the answer, the probability of its
                first token, also with edges cut around each layer, and the likeliest token after each layer, through
                the final norm. `dtype`, `window` and `preprocess` are those that they were measured with
    greedy      the answer to a question about one picture, 100 tokens at most
    accuracy    percent in groups of GQA's questions
"""
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np

from groups import parse_edge
from harness.questions import BUNDLED, Question, picture
from harness.runs import replace_text, sha256
from llava_min import IMAGE, read_json

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "harness" / "published.json", ROOT / "tiny" / "frozen.json")
PHOTOS = BUNDLED.parent / "images"                 # where photos are looked for without --images


class CannotCheck(ValueError):
    """Why something cannot be checked."""


# ---------------------------------------------------------------------------------------------------- reading

def whole(value):
    return type(value) is int and 0 <= value < 2 ** 31


def number(value):
    return type(value) in (int, float) and math.isfinite(value)


def share(value):
    return number(value) and 0 <= value <= 1


def text(value):
    return isinstance(value, str)


def digest(value):
    return text(value) and bool(re.fullmatch("[0-9a-f]{64}", value))


def mapping(value):
    return isinstance(value, dict)


def each(kind, n=None, least=0):
    """A test of a list: n things of a kind, or at least so many."""
    return lambda value: isinstance(value, list) and all(map(kind, value)) and (
        len(value) == n if n is not None else len(value) >= least)


def edge(value):
    """Is it an edge in its canonical spelling, which is what the results are named by?"""
    try:
        return text(value) and "->".join(parse_edge(value)) == value
    except ValueError:
        return False


def curves(value):
    return mapping(value) and bool(value) and all(map(edge, value)) and all(
        each(share, least=1)(curve) for curve in value.values())


def percents(value):
    return mapping(value) and bool(value) and all(number(v) and 0 <= v <= 100 for v in value.values())


def side(value):
    return whole(value) and 1 <= value <= 20_000


# key -> what its value must be. Keys of OPTIONAL may be absent.
MEASURED = {"dtype": lambda v: v in ("float32", "bfloat16", "float16"), "window": side, "image_id": whole,
            "preprocess": lambda v: v in ("llava", "hf"), "questions": each(mapping, least=1)}
ASKED = {"id": text, "question": text, "answer": text, "true_option": text, "false_option": text, "objects": each(text),
         "boxes": each(each(number, 4)), "image": text, "image_sha256": digest, "size": each(side, 2),
         "prompt": mapping, "numbers": mapping}
PROMPT = {"ids_sha256": digest, "tokens": whole, "image": each(whole, 2), "question": each(whole, 2), "last": whole,
          "related_patches": each(whole)}
NUMBERS = {"token": whole, "answer_ids": each(whole), "p_base": lambda v: share(v) and v > 0, "p_knockout": curves,
           "lens_top1": each(whole, least=1)}
GREEDY = {"image": text, "size": each(side, 2), "question": text, "answer": text, "from": text}
OPTIONAL = ("lens_top1",)


def read(files):
    """Facts files -> {model: entry}, each checked. ValueError: the file, the key, and that its value is none."""
    facts = {}
    for file in files:
        for model, entry in read_json(file).items():
            check(f"{file}, {model}", entry)
            facts[model] = entry
    return facts


def check(where, entry):
    """ValueError: an entry of a facts file is none."""
    if not mapping(entry) or not {"questions", "greedy", "accuracy"} & set(entry):
        raise ValueError(f"{where}: not an entry of a facts file, as `check.py --freeze` writes it")
    keys(where, entry, {"source": text})
    if "questions" in entry:
        keys(where, entry, MEASURED)
        for i, question in enumerate(entry["questions"], 1):
            keys(f"{where}, question {i}", question, ASKED)
            keys(f"{where}, question {question['id']}, prompt", question["prompt"], PROMPT)
            keys(f"{where}, question {question['id']}, numbers", question["numbers"], NUMBERS)
    if "greedy" in entry:
        keys(where, entry, {"greedy": mapping})
        keys(f"{where}, greedy", entry["greedy"], GREEDY)
    if "accuracy" in entry:
        keys(where, entry, {"accuracy": percents})


def keys(where, value, wanted):
    for key, kind in wanted.items():
        if key not in value and key not in OPTIONAL:
            raise ValueError(f"{where}: it has no {key!r}")
        if key in value and not kind(value[key]):
            shown = json.dumps(value[key])
            raise ValueError(f"{where}: {key!r} is not what it must be: {shown[:60]}{'...' * (len(shown) > 60)}")


def question_of(fact, images=None):
    """A question of a facts file -> Question, its photo in the folder `images`."""
    return Question(id=fact["id"], question=fact["question"], image=picture(images or PHOTOS, fact["image"]),
                    answer=fact["answer"], task="check", true_option=fact["true_option"],
                    false_option=fact["false_option"], objects=tuple(fact["objects"]),
                    boxes=tuple(map(tuple, fact["boxes"])), size=tuple(fact["size"]))


def photo_of(fact, images):
    """The photo of a fact -> its path. CannotCheck: it is missing, or another one."""
    file = picture(images or PHOTOS, fact["image"])
    if not file.is_file():
        place = f": it is {fact['from']}" if "from" in fact else ""
        raise CannotCheck(f"{file} is missing{place}" if images else
                          f"it needs the photo {fact['image']}{place}; pass --images DIR")
    wanted = fact.get("image_sha256")
    if wanted and (ours := sha256(file)) != wanted:
        raise CannotCheck(f"{file} is another photo: its sha256 is {ours[:12]}..., not {wanted[:12]}...")
    return file


def prompt_numbers(p, groups, image_id):
    """llava_min.Prompt and its Groups -> what a facts file calls `prompt`. No weights are needed."""
    ids = [j for i in p.ids for j in ([image_id] * len(p.image) if i == IMAGE else [i])]
    named = groups.named
    return {"ids_sha256": hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest(), "tokens": len(p),
            "image": [p.image.start, p.image.stop], "question": [named["question"][0], named["question"][-1] + 1],
            "last": named["last"][0], "related_patches": named.get("related_patches", [])}


# ---------------------------------------------------------------------------------------------------- freezing

def writable(file, model, **how):
    """Before hours are spent: a facts file that can be written -> what it holds already. ValueError: it cannot, or has
    numbers of this model that were measured in another way; how: dtype, window, preprocess, image_id."""
    file = Path(file)
    if not file.name or not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise ValueError(f"--freeze {file}: there is no such folder, or nothing can be written into it")
    facts = read([file]) if file.exists() else {}
    if differs := [key for key, value in how.items() if facts.get(model, how).get(key) != value]:
        raise ValueError(f"--freeze {file}: it has numbers of {model} with {differs[0]} "
                         f"{facts[model].get(differs[0])}, not {how[differs[0]]}; use another file")
    return facts


def write(file, facts, model, entry):
    """Add an entry; questions that the file has of this model and that were not asked again stay."""
    asked = {question["id"] for question in entry["questions"]}
    kept = [question for question in facts.get(model, {}).get("questions", ()) if question["id"] not in asked]
    entry = json.loads(json.dumps(entry | {"questions": kept + entry["questions"]}))
    check(f"{file}, {model}", entry)
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in (facts | {model: entry}).items())
    replace_text(Path(file), "{\n" + ",\n".join(lines) + "\n}\n")
