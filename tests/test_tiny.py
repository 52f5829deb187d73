"""python -m pytest tests/test_tiny.py

tiny/world.py, the drawn world: what its pictures show, what its questions ask and answer, and its files in GQA's
formats. Answers are checked by an interpreter of GQA's programs that knows the scene graphs alone.
"""
import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest
from commands import read, refused

import knockout
import tiny.world
from harness.questions import SIX, beside, read_gqa

SCENES = [tiny.world.scene(3, "val", i) for i in range(150)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A made world: 60 pictures to train on, 60 to test on."""
    folder = tmp_path_factory.mktemp("world")
    tiny.world.make(folder, 3, 60, 60)
    return folder


def every_question(per_scene=2):
    r = random.Random(0)
    for s in SCENES:
        for asker, (_, _, ask) in enumerate(tiny.world.ASKERS):
            for _ in range(per_scene):
                if q := ask(s, r):
                    yield s, tiny.world.entry(s, asker, 0, *q)[1]


# ---------------------------------------------------------------------------------------------------- pictures

def test_things_lie_inside_the_picture_apart_from_each_other_and_no_two_share_a_shape():
    for s in SCENES:
        assert 2 <= len(s.things) <= 5
        assert len({t.name for t in s.things}) == len(s.things)
        for t in s.things:
            assert 0 <= t.x and t.x + t.w <= s.width and 0 <= t.y and t.y + t.h <= s.height
            for u in s.things:
                assert t is u or t.x + t.w < u.x or u.x + u.w < t.x or t.y + t.h < u.y or u.y + u.h < t.y
    assert {len(s.things) for s in SCENES} == {2, 3, 4, 5}
    assert {(s.width, s.height) for s in SCENES} == set(tiny.world.PHOTOS)
    assert {t.name for s in SCENES for t in s.things} == set(tiny.world.SHAPES)


def test_a_picture_shows_its_things_in_their_colors_and_nothing_else():
    for s in SCENES[:40]:
        pixels = np.asarray(tiny.world.draw(s)).astype(int)
        elsewhere = np.ones(pixels.shape[:2], bool)
        for t in s.things:
            box = pixels[t.y:t.y + t.h, t.x:t.x + t.w]
            elsewhere[t.y:t.y + t.h, t.x:t.x + t.w] = False
            painted = (abs(box - tiny.world.COLORS[t.color]) <= 10).all(-1)
            assert 0.25 < painted.mean() <= 1, (s.id, t)            # the thinnest, moon and star, fill a third of it
            rows, columns = painted.any(1).nonzero()[0], painted.any(0).nonzero()[0]
            assert rows[0] < 0.2 * t.h and rows[-1] > 0.8 * t.h   # and it reaches to the edges of its box
            assert columns[-1] - columns[0] > 0.6 * t.w
        ground = pixels[elsewhere]
        assert (ground == ground[0]).all() and (abs(ground[0] - tiny.world.WEATHER[s.weather]) <= 10).all()


def test_shapes_differ_from_each_other():
    def stencil(name):
        t = tiny.world.Thing("1", name, "red", "large", 0, 0, 60, 60)
        pixels = np.asarray(tiny.world.draw(tiny.world.Scene("1", 60, 60, "rainy", (t,)))).astype(int)
        return (abs(pixels - tiny.world.COLORS["red"]) <= 10).all(-1)
    drawn = {name: stencil(name) for name in tiny.world.SHAPES}
    for a in drawn:
        for b in drawn:
            assert a == b or (drawn[a] ^ drawn[b]).mean() > 0.08, (a, b)


def test_no_scene_of_one_split_is_in_the_other():
    def looks(split):
        pictures = (tiny.world.draw(tiny.world.scene(3, split, i)) for i in range(200))
        return {hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures}
    assert len(looks("train")) == len(looks("val")) == 200 and not looks("train") & looks("val")


# ---------------------------------------------------------------------------------------------------- answers

def run_program(program, graph):
    """Execute a GQA program on a scene graph -> set of answers that are right."""
    objects, values = graph["objects"], []

    def place(i):
        o = objects[i]
        return o["x"] + o["w"] / 2, o["y"] + o["h"] / 2

    def related(a, name, b):
        (ax, ay), (bx, by) = place(a), place(b)
        return {"to the left of": ax < bx, "to the right of": ax > bx, "above": ay < by, "below": ay > by}[name]

    def attribute(i, kind):
        words = {"color": tiny.world.COLORS, "size": tiny.world.SIZES}[kind]
        return next(word for word in objects[i]["attributes"] if word in words)

    def having(kind, word, found):
        return [i for i in found if attribute(i, kind) == word]

    for s in program:
        operation, argument = s["operation"], s["argument"].strip()
        before = [values[d] for d in s["dependencies"]]
        name = argument.partition(" (")[0].split(",")[0]
        verb, _, what = operation.partition(" ")
        if operation == "select":
            values.append("scene" if name == "scene" else list(objects) if name == "shape" else
                          [i for i, o in objects.items() if o["name"] == name])
        elif verb == "filter":
            values.append(having(what, argument, before[0]))
        elif operation == "exist":
            values.append(bool(before[0]))
        elif operation in ("or", "and"):
            values.append({"or": any, "and": all}[operation](before))
        elif operation == "relate":
            name = argument.split(",")[1]
            values.append([i for i in objects if i not in before[0] and related(i, name, before[0][0])])
        elif operation == "verify rel":
            subject = next(i for i, o in objects.items() if o["name"] == name)
            values.append(related(subject, argument.split(",")[1], before[0][0]))
        elif operation == "choose rel":
            subject = next(i for i, o in objects.items() if o["name"] == name)
            values.append([n.removeprefix("to the ").removesuffix(" of") for n in argument.split(",")[1].split("|")
                           if related(subject, n, before[0][0])])
        elif operation == "verify weather":
            values.append(graph["weather"] == argument)
        elif verb == "verify":
            values.append(bool(having(what, argument, before[0])))
        elif operation == "choose weather":
            values.append([w for w in argument.split("|") if w == graph["weather"]])
        elif operation == "choose name":
            values.append([w for w in argument.split("|") if w in {objects[i]["name"] for i in before[0]}])
        elif verb == "choose":
            values.append([w for w in argument.split("|") if having(what, w, before[0])])
        elif operation == "common":
            (a,), (b,) = before
            values.append([kind for kind in ("color", "size") if attribute(a, kind) == attribute(b, kind)])
        elif verb == "same":
            (a,), (b,) = before
            values.append(attribute(a, what) == attribute(b, what))
        elif operation == "query":
            if argument == "weather":
                values.append([graph["weather"]])
            elif argument == "name":
                values.append([objects[i]["name"] for i in before[0]])
            elif argument in ("hposition", "vposition"):
                at, middle = (place(before[0][0])[0], graph["width"] / 2) if argument == "hposition" else (
                    place(before[0][0])[1], graph["height"] / 2)
                values.append([(("left", "right") if argument == "hposition" else ("top", "bottom"))[at > middle]])
            else:
                values.append([attribute(i, argument) for i in before[0]])
        else:
            raise AssertionError(f"unknown step {s}")
    return {"yes" if values[-1] else "no"} if isinstance(values[-1], bool) else set(values[-1])


def test_every_answer_is_the_only_one_its_program_gives_on_the_scene_graph():
    asked = Counter()
    for s, q in every_question():
        assert run_program(q["semantic"], tiny.world.scene_graph(s)) == {q["answer"]}, q
        asked[q["types"]["structural"], q["types"]["semantic"]] += 1
    assert set(asked) == {(a, b) for a, b, _ in tiny.world.ASKERS} and len(asked) == 15 and min(asked.values()) > 100


def test_the_relations_of_a_scene_graph_are_those_of_the_boxes():
    for s in SCENES[:50]:
        objects = tiny.world.scene_graph(s)["objects"]
        for o in objects.values():
            for relation in o["relations"]:
                other, axis = objects[relation["object"]], "xy"[relation["name"] in ("above", "below")]
                gap = (o[axis] + o["w"] / 2) - (other[axis] + other["w"] / 2)
                assert abs(gap) >= tiny.world.CLEAR and (gap < 0) == (relation["name"] in ("to the left of", "above"))


def test_the_words_that_name_things_are_annotated_and_stand_in_the_question():
    for s, q in every_question(1):
        words = q["question"].split()
        names = {t.id: t.name for t in s.things}
        annotated = q["annotations"]["question"]
        assert all(words[int(i)].startswith(names[thing]) for i, thing in annotated.items())
        named = {t.id for t in s.things if any(w.strip("?,.") in (t.name, tiny.world.plural(t.name)) for w in words)}
        assert named == set(annotated.values())
        assert all(i in names for step in q["semantic"] for i in
                   step["argument"].rpartition("(")[2].rstrip(") ").split(",") if i.isdecimal())


def test_phrases_are_true_of_their_things():
    r = random.Random(1)
    for s in SCENES[:60]:
        for phrase, t in tiny.world.phrases(s, r):
            words = phrase.split()
            assert (t is None) == ("weather" in words)
            if t is None:
                assert s.weather in words
                continue
            assert t.name in words
            assert not set(words) & (set(tiny.world.COLORS) - {t.color})
            assert not set(words) & (set(tiny.world.SIZES) - {t.size})
            x, y = t.center
            for word, truth in {"top": y < s.height / 2, "bottom": y > s.height / 2}.items():
                assert word not in words or truth
            other = next((u for u in s.things if u is not t and u.name in words), None)
            if other:
                gap = [a - b for a, b in zip(t.center, other.center, strict=True)]
                assert {"left": gap[0] < 0, "right": gap[0] > 0, "above": gap[1] < 0, "below": gap[1] > 0}[
                    next(w for w in words if w in ("left", "right", "above", "below"))]
            elif {"left", "right"} & set(words):
                assert ("left" in words) == (x < s.width / 2)


# ---------------------------------------------------------------------------------------------------- files

def test_the_same_seed_writes_the_same_bytes_and_another_seed_another_world(call, world, tmp_path):
    def bytes_of(folder):
        return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    code, _, err = call(tiny.world.main, tmp_path / "again", "--seed", 3, "--train", 60, "--val", 60)
    assert code == 0, err
    tiny.world.make(tmp_path / "other", 4, 60, 60)
    assert bytes_of(tmp_path / "again") == bytes_of(world)
    ours, theirs = bytes_of(world), bytes_of(tmp_path / "other")
    assert set(ours) == set(theirs) and not [f for f in ours if ours[f] == theirs[f]]


def test_what_training_sees_is_what_make_writes(world):
    graphs = json.loads((world / "train_sceneGraphs.json").read_text())
    assert graphs == {s.id: tiny.world.scene_graph(s) for s in (tiny.world.scene(3, "train", i) for i in range(60))}


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_kind_of_question_has_its_answers_equally_often(world, split):
    questions = json.loads((world / f"{split}_balanced_questions.json").read_text())
    often = Counter((q["groups"]["local"][:2], q["groups"]["global"], q["answer"]) for q in questions.values())
    by_kind = {}
    for (asker, kind, _), n in often.items():
        by_kind.setdefault((asker, kind), set()).add(n)
    assert all(len(counts) == 1 for counts in by_kind.values()), by_kind


def test_no_option_is_favoured_for_its_place(world):
    found = read_gqa(world / "val_balanced_questions.json", only=None)
    first = [q.question.find(q.true_option) < q.question.find(q.false_option) for q in found if q.true_option]
    assert len(first) > 80 and 0.35 < np.mean(first) < 0.65


def test_the_readers_take_a_made_world_as_gqa(world):
    file = world / "val_balanced_questions.json"
    found = read_gqa(file, world / "images", **beside(file))
    assert {q.task for q in found} == set(SIX)
    graphs = json.loads((world / "val_sceneGraphs.json").read_text())
    for q in found:
        graph = graphs[q.image.stem]
        boxes = {tuple(o[key] for key in "xywh"): o["name"] for o in graph["objects"].values()}
        assert q.open().size == q.size == (graph["width"], graph["height"])
        assert q.captions.count(". ") >= 4
        named = {boxes[box] for box in q.boxes}
        if q.task == "ChooseCat":
            assert named == {q.true_option} and q.objects == ("shape",)
        else:
            assert named <= set(q.objects) and (named == set(q.objects) or q.task == "LogicalObj")
        if q.task.startswith("Choose"):
            assert q.true_option == q.answer and q.false_option and q.false_option in q.question
    everything = read_gqa(file, only=None)
    assert len({q.task for q in everything}) == 6 + 11  # four of the 15 groups are tasks, two are so in part
    assert [q.id for q in read_gqa(file, limit=2)] == [
        q.id for task in sorted(SIX) for q in [q for q in found if q.task == task][:2]]


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not JSON"), ("[]", "is not a JSON object"), ('{"7": {"question": "Is it?"}}', "question 7: not GQA's f"),
    ("{}", "has no question of the tasks")])
def test_a_damaged_question_file_is_named(tmp_path, text, message):
    file = tmp_path / "val_balanced_questions.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_gqa(file)
    bad = []
    if "question 7" in message:
        assert read_gqa(file, bad=bad) == [] and "question 7" in bad[0]


def test_a_box_that_the_scene_graph_lacks_is_named(world, tmp_path):
    graphs = json.loads((world / "val_sceneGraphs.json").read_text())
    for graph in graphs.values():
        graph["objects"].popitem()
    (tmp_path / "graphs.json").write_text(json.dumps(graphs))
    with pytest.raises(ValueError, match="val_balanced_questions.json, question 2.*its scene graph has no object 2"):
        read_gqa(world / "val_balanced_questions.json", scene_graphs=tmp_path / "graphs.json")


def test_knockout_reads_a_made_world_by_its_gqa_file(call, world, checkpoint, tmp_path):
    code, _, err = call(knockout.main, "--model", checkpoint("llava-1.5"), "--all", "--limit", 1, "--window", 2,
                        "--data", world / "val_balanced_questions.json", "--images", world / "images", "--edge",
                        "related_patches->last", "--out", tmp_path)
    assert code == 0, err
    assert {r["task"] for r in read(tmp_path / "knockout.csv")} == set(SIX)
    data = json.loads((tmp_path / "run.json").read_text())["data"]
    assert [name.split()[0] for name in data] == ["val_balanced_questions.json", "val_sceneGraphs.json",
                                                  "region_descriptions.json"]


@pytest.mark.parametrize("argv, parts", [(("x", "--val", 0, "--train", 0), ["--train and --val"]),
                                         ((), ["required", "DIR"])])
def test_bad_input_ends_in_one_line_and_exit_code_2(call, tmp_path, monkeypatch, argv, parts):
    monkeypatch.chdir(tmp_path)
    result = call(tiny.world.main, *argv)
    refused(result, *parts)
    assert result[2].count("\n") == 1
