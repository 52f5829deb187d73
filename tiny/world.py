"""
tiny/world.py - a drawn world in GQA's own file formats: pictures, questions with programs, scene graphs, regions.

Run     python -m tiny.world world --seed 7                  pictures, scene graphs, questions, regions of both splits
Needs   pillow, tqdm; harness/ for the command line and GQA's names of tasks
Paper   https://arxiv.org/abs/2411.18620, Table 1 (the six tasks) and Table 2 (the fifteen groups of questions)

A scene holds 2 to 5 things of different shapes. It is a pure function of (seed, split, number): tiny/train.py sees what
`make` would write, and no scene of one split is in the other.
"""
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from harness.errors import one_line_errors
from harness.flags import Parser
from harness.questions import TASKS, task_of

# ---------------------------------------------------------------------------------------------------- scenes

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "moon")
COLORS = {"red": (220, 30, 35), "green": (40, 165, 55), "blue": (45, 85, 225), "yellow": (242, 222, 40),
          "purple": (140, 45, 185), "orange": (248, 140, 20), "pink": (250, 150, 195), "brown": (125, 75, 35)}
SIZES = {"small": (32, 38), "large": (54, 62)}     # px across
WEATHER = {"sunny": (248, 243, 214), "cloudy": (186, 192, 200), "rainy": (74, 84, 104)}
PHOTOS = ((192, 144), (144, 192), (192, 128), (128, 192), (160, 160))  # width, height in px
CLEAR = 20                                         # px by which centres differ where a question asks for a direction


@dataclass(frozen=True)
class Thing:
    id: str
    name: str                                      # its shape; no two things of a scene share it
    color: str
    size: str
    x: int                                         # the box, px
    y: int
    w: int
    h: int

    @property
    def center(self):
        return self.x + self.w / 2, self.y + self.h / 2


@dataclass(frozen=True)
class Scene:
    id: str
    width: int
    height: int
    weather: str
    things: tuple


def scene(seed, split, number, most=5):
    """Scene `number` of a split ("train" or "val"): the same for the same arguments. most: things in it at most."""
    r = random.Random(f"{seed}/{split}/{number}")
    width, height = r.choice(PHOTOS)
    while True:                                     # until everything has a free place
        boxes = []
        for size in r.choices(list(SIZES), k=r.randint(min(2, most - 1) or 1, most)):
            side = r.randint(*SIZES[size])
            for _ in range(30):
                x, y = r.randint(2, width - side - 2), r.randint(2, height - side - 2)
                if all(x + side + 3 < a or a + s + 3 < x or y + side + 3 < b or b + s + 3 < y for a, b, s, _ in boxes):
                    boxes.append((x, y, side, size))
                    break
            else:
                break
        else:
            break
    name = f"{('train', 'val').index(split) + 1}{number:07}"
    palette = r.sample(list(COLORS), r.randint(2, 4))               # few colours, so that things share them
    things = [Thing(f"{name}{i}", shape, r.choice(palette), size, x, y, side, side)
              for i, (shape, (x, y, side, size)) in enumerate(zip(r.sample(SHAPES, len(boxes)), boxes, strict=True))]
    return Scene(name, width, height, r.choice(list(WEATHER)), tuple(things))


def outline(name):
    """A shape in the unit square: (parts that are drawn, parts that are then taken away). A part is a list of a
    polygon's points, or a box (x0, y0, x1, y1) for the ellipse in it."""
    if name == "circle":
        return [(0, 0, 1, 1)], []
    if name == "moon":
        return [(0, 0, 1, 1)], [(0.36, -0.08, 1.28, 0.84)]
    if name == "heart":
        return [(0, 0.04, 0.54, 0.58), (0.46, 0.04, 1, 0.58), [(0.04, 0.42), (0.96, 0.42), (0.5, 1)]], []
    return [{"square": [(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)],
             "triangle": [(0.5, 0.02), (1, 0.98), (0, 0.98)],
             "diamond": [(0.5, 0), (0.86, 0.5), (0.5, 1), (0.14, 0.5)],
             "cross": [(a, b) for a, b in ((.34, 0), (.66, 0), (.66, .34), (1, .34), (1, .66), (.66, .66), (.66, 1),
                                           (.34, 1), (.34, .66), (0, .66), (0, .34), (.34, .34))],
             "star": [(0.5 + (0.5, 0.21)[i % 2] * sin(pi * i / 5), 0.52 - (0.52, 0.22)[i % 2] * cos(pi * i / 5))
                      for i in range(10)]}[name]], []


def draw(s):
    """Scene -> PIL RGB image. Shapes are drawn four times as large and averaged down, which softens their edges."""
    r = random.Random(f"paint/{s.id}")

    def paint(color):
        return tuple(max(0, min(255, c + r.randint(-10, 10))) for c in color)
    image = Image.new("RGB", (s.width, s.height), paint(WEATHER[s.weather]))
    for t in s.things:
        stencil = Image.new("L", (4 * t.w, 4 * t.h))
        pen = ImageDraw.Draw(stencil)
        for value, parts in zip((255, 0), outline(t.name), strict=True):
            for part in parts:
                if isinstance(part, tuple):
                    pen.ellipse([4 * t.w * v for v in part], fill=value)
                else:
                    pen.polygon([(4 * t.w * x, 4 * t.h * y) for x, y in part], fill=value)
        image.paste(paint(COLORS[t.color]), (t.x, t.y), stencil.reduce(4))
    return image


def relations(s):
    """Yield (a, relation, b) for all things a and b of which GQA would say so: "to the left of", "above" ..."""
    for a in s.things:
        for b in s.things:
            dx, dy = (p - q for p, q in zip(a.center, b.center, strict=True))
            if a is not b and abs(dx) >= CLEAR:
                yield a, "to the left of" if dx < 0 else "to the right of", b
            if a is not b and abs(dy) >= CLEAR:
                yield a, "above" if dy < 0 else "below", b


OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}


def sides(s, t):
    """On which sides of the picture a thing clearly lies: dict of GQA's hposition and vposition."""
    (x, y), found = t.center, {}
    if abs(x - s.width / 2) >= CLEAR / 2:
        found["hposition"] = "left" if x < s.width / 2 else "right"
    if abs(y - s.height / 2) >= CLEAR / 2:
        found["vposition"] = "top" if y < s.height / 2 else "bottom"
    return found


# ---------------------------------------------------------------------------------------------------- questions

def step(operation, argument, *dependencies):
    return {"operation": operation, "dependencies": list(dependencies), "argument": argument}


def select(t):
    """The program step that finds a thing, or looks for a shape that the scene may not have."""
    return step("select", f"{t.name} ({t.id})" if isinstance(t, Thing) else f"{t} (-) ")


def yes(truth):
    return "yes" if truth else "no"


def plural(name):
    return name + ("es" if name.endswith("s") else "s")


def attributes(t):
    return {"color": t.color, "size": t.size}


def another(r, kind, value):
    return r.choice([v for v in (COLORS if kind == "color" else SIZES) if v != value])


# Each function below asks one kind of question: (scene, random) -> (question, answer, detailed type, program), or None
# where the scene does not allow it. The answer is drawn first, evenly, so that no answer is a safe guess.

def verify_obj(s, r):
    here = [t.name for t in s.things]
    truth = r.random() < 0.5
    name = r.choice(here if truth else [n for n in SHAPES if n not in here])
    form = r.choice((f"Is there a {name} in the image?", f"Are there any {plural(name)}?", f"Do you see a {name}?"))
    return form, yes(truth), "exist", [select(next((t for t in s.things if t.name == name), name)),
                                       step("exist", "?", 0)]


def verify_attr(s, r):
    t, truth = r.choice(s.things), r.random() < 0.5
    kind, value = r.choice(list(attributes(t).items()))
    asked = value if truth else another(r, kind, value)
    form = r.choice((f"Is the {t.name} {asked}?", f"Does the {t.name} look {asked}?"))
    return form, yes(truth), "verifyAttr", [select(t), step(f"verify {kind}", asked, 0)]


def verify_rel(s, r):
    found = list(relations(s))
    if found:
        (a, rel, b), truth = r.choice(found), r.random() < 0.5
        asked = rel if truth else OPPOSITE[rel]
        return f"Is the {a.name} {asked} the {b.name}?", yes(truth), "relVerify", [
            select(b), step("verify rel", f"{a.name},{asked},s ({a.id})", 0)]


def verify_global(s, r):
    truth = r.random() < 0.5
    asked = s.weather if truth else r.choice([w for w in WEATHER if w != s.weather])
    return f"Is it {asked}?", yes(truth), "weatherVerify", [step("select", "scene"), step("verify weather", asked, 0)]


def query_position(s, r):
    places = [(t, *place) for t in s.things for place in sides(s, t).items()]
    if places:
        t, kind, value = r.choice(places)
        where, thing = "of the " + r.choice(("image", "photo", "picture")), f"is the {t.name}"
        form = r.choice((f"On which side {where} {thing}?", f"Which side {where} {thing} on?")
                        if kind == "hposition" else
                        (f"In which part {where} {thing}?", f"Which part {where} {thing} in?"))
        return form, value, "positionQuery", [select(t), step("query", kind, 0)]


def query_attr(s, r):
    t = r.choice(s.things)
    kind, value = r.choice(list(attributes(t).items()))
    form = r.choice((f"What color is the {t.name}?", f"What is the color of the {t.name}?") if kind == "color" else
                    (f"What size is the {t.name}?", f"How large is the {t.name}?"))
    return form, value, "directOf", [select(t), step("query", kind, 0)]


def unique(s, r):
    """A thing that has a colour or size of its own in the scene: (thing, kind of attribute, value), or None."""
    found = [(t, kind, value) for t in s.things for kind, value in attributes(t).items()
             if sum(attributes(u)[kind] == value for u in s.things) == 1]
    return r.choice(found) if found else None


def query_cat(s, r):
    if found := unique(s, r):
        t, kind, value = found
        form = r.choice((f"Which shape is {value}?", f"What is the {value} shape called?"))
        return form, t.name, "categoryThat", [step("select", f"shape ({t.id})"), step(f"filter {kind}", value, 0),
                                              step("query", "name", 1)]


def query_rel(s, r):
    found = []
    for b in s.things:
        for rel, axis, sign in zip(OPPOSITE, (0, 1, 0, 1), (-1, -1, 1, 1), strict=True):
            gaps = [(sign * (t.center[axis] - b.center[axis]), t) for t in s.things if t is not b]
            if all(abs(gap) >= CLEAR for gap, _ in gaps) and sum(gap > 0 for gap, _ in gaps) == 1:
                found.append((max(gaps, key=lambda pair: pair[0])[1], rel, b))
    if found:
        a, rel, b = r.choice(found)
        return f"Which shape is {rel} the {b.name}?", a.name, "relS", [
            select(b), step("relate", f"shape,{rel},s ({a.id})", 0), step("query", "name", 1)]


def query_global(s, r):
    form = r.choice(("How is the weather?", "What is the weather like?"))
    return form, s.weather, "weather", [step("select", "scene"), step("query", "weather", 0)]


def either(r, right, wrong):
    return (right, wrong) if r.random() < 0.5 else (wrong, right)


def choose_attr(s, r):
    t = r.choice(s.things)
    kind, value = r.choice(list(attributes(t).items()))
    wrong = another(r, kind, value)
    a, b = either(r, value, wrong)
    form = r.choice((f"Is the {t.name} {a} or {b}?", f"Does the {t.name} look {a} or {b}?",
                     f"What is the {kind} of the {t.name}, {a} or {b}?"))
    return form, value, "chooseAttr", [select(t), step(f"choose {kind}", f"{value}|{wrong}", 0)]


def choose_cat(s, r):
    if found := unique(s, r):
        t, kind, value = found
        wrong = r.choice([u.name for u in s.things if u is not t])
        a, b = either(r, t.name, wrong)
        form = r.choice((f"Which shape is {value}, the {a} or the {b}?", f"What is the {value} shape, a {a} or a {b}?"))
        return form, t.name, "categoryThatChoose", [step("select", f"shape ({t.id})"), step(f"filter {kind}", value, 0),
                                                    step("choose name", f"{t.name}|{wrong}", 1)]


def choose_rel(s, r):
    found = list(relations(s))
    if found:
        a, rel, b = r.choice(found)
        first, second = either(r, rel, OPPOSITE[rel])
        words = rel.removeprefix("to the ").removesuffix(" of")
        return f"Is the {a.name} {first.removesuffix(' of')} or {second} the {b.name}?", words, "relChooser", [
            select(b), step("choose rel", f"{a.name},{rel}|{OPPOSITE[rel]},s ({a.id})", 0)]


def choose_global(s, r):
    wrong = r.choice([w for w in WEATHER if w != s.weather])
    a, b = either(r, s.weather, wrong)
    return f"Is it {a} or {b}?", s.weather, "weatherChoose", [step("select", "scene"),
                                                              step("choose weather", f"{s.weather}|{wrong}", 0)]


def logical_obj(s, r):
    truth, by_name = r.random() < 0.5, {t.name: t for t in s.things}
    for _ in range(50):
        t = r.choice(s.things)
        kind = "color" if r.random() < 0.75 else "size"
        value = attributes(t if truth else r.choice(s.things))[kind]
        if not truth and r.random() < 0.3:
            value = another(r, kind, value)
        names = [t.name, r.choice([n for n in SHAPES if n != t.name])]
        r.shuffle(names)
        if truth == any(n in by_name and attributes(by_name[n])[kind] == value for n in names):
            break
    else:
        return None
    a, b = names
    form, detailed = r.choice(((f"Are there either {plural(a)} or {plural(b)} that are {value}?", "existThatOr"),
                               (f"Is there a {a} or a {b} that is {value}?", "existThatOrC"),
                               (f"Are there any {plural(a)} or {plural(b)} that are {value}?", "existThatOrC")))
    program = [part for i, n in enumerate(names) for part in (
        select(by_name.get(n, n)), step(f"filter {kind}", value, 3 * i), step("exist", "?", 3 * i + 1))]
    return form, yes(truth), detailed, [*program, step("or", "", 2, 5)]


def logical_attr(s, r):
    t, truth = r.choice(s.things), r.random() < 0.5
    color, size = t.color, t.size
    if not truth:
        which = r.choice(("color", "size", "both"))
        color = another(r, "color", color) if which != "size" else color
        size = another(r, "size", size) if which != "color" else size
    return f"Is the {t.name} {size} and {color}?", yes(truth), "verifyAttrAnd", [
        select(t), step("verify size", size, 0), step("verify color", color, 0), step("and", "", 1, 2)]


def compare_common(s, r):
    pairs = {"color": [], "size": []}
    for a in s.things:
        for b in s.things:
            same = [kind for kind in pairs if attributes(a)[kind] == attributes(b)[kind]]
            if a is not b and len(same) == 1:
                pairs[same[0]].append((a, b))
    answer = r.choice(("color", "size"))
    if pairs[answer]:
        a, b = r.choice(pairs[answer])
        form = r.choice((f"What do the {a.name} and the {b.name} have in common?",
                         f"What do both the {a.name} and the {b.name} have in common?",
                         f"What is common to the {a.name} and the {b.name}?"))
        return form, answer, "twoCommon", [select(a), select(b), step("common", "", 0, 1)]


def compare_same(s, r):
    a, b = r.sample(s.things, 2)
    kind = r.choice(("color", "size"))
    truth = attributes(a)[kind] == attributes(b)[kind]
    if truth == (r.random() < 0.5):
        return f"Do the {a.name} and the {b.name} have the same {kind}?", yes(truth), "twoSame", [
            select(a), select(b), step(f"same {kind}", "", 0, 1)]


# (structural type, semantic type, function): the fifteen groups of Table 2
ASKERS = (("verify", "obj", verify_obj), ("verify", "attr", verify_attr), ("verify", "rel", verify_rel),
          ("verify", "global", verify_global), ("query", "attr", query_position), ("query", "attr", query_attr),
          ("query", "cat", query_cat), ("query", "rel", query_rel), ("query", "global", query_global),
          ("choose", "attr", choose_attr), ("choose", "cat", choose_cat), ("choose", "rel", choose_rel),
          ("choose", "global", choose_global), ("logical", "obj", logical_obj), ("logical", "attr", logical_attr),
          ("compare", "attr", compare_common), ("compare", "attr", compare_same))


def phrases(s, r):
    """Phrases about a scene, in random order: list of (phrase, the thing that it is about, or None)."""
    found = []
    for t in s.things:
        found.append((r.choice((f"the {t.name} is {t.size} and {t.color}", f"a {t.size} {t.color} {t.name}")), t))
        place = sides(s, t)
        if "hposition" in place:
            found.append((f"the {t.name} is on the {place['hposition']}", t))
        if "vposition" in place:
            found.append((f"the {t.name} is at the {place['vposition']}", t))
    for a, rel, b in r.sample(rels := list(relations(s)), min(3, len(rels))):
        found.append((f"the {a.name} is {rel} the {b.name}", a))
    found.append((f"the weather is {s.weather}", None))
    r.shuffle(found)
    return found


# ---------------------------------------------------------------------------------------------------- GQA's files

ANSWERS = {"place": ("left", "right"), "height": ("top", "bottom"), "order": ("above", "below"), "color": tuple(COLORS),
           "size": tuple(SIZES), "shape": SHAPES, "weather": tuple(WEATHER), "kind": ("color", "size"),
           None: ("yes", "no")}


def kind_of(answer):
    """The kind of an answer, a key of ANSWERS; None for yes and no."""
    return next(kind for kind, words in ANSWERS.items() if answer in words)


def entry(s, asker, again, question, answer, detailed, program):
    """One question in GQA's format -> (question id, dict). again: 0 for the asker's first one of the scene, or 1."""
    structural, semantic, _ = ASKERS[asker]
    names = {form: t.id for t in s.things for form in (t.name, plural(t.name))}
    full = {"yes": "Yes, that is right.", "no": "No, that is not right."}.get(answer, f"The answer is {answer}.")

    def annotated(text):
        return {str(i): names[word] for i, w in enumerate(text.split()) if (word := w.strip("?,.")) in names}
    number = f"{s.id}{2 * asker + again:02}"
    chain = "->".join(f"{p['operation']}: {p['argument'] or '-'} {p['dependencies'] or '[]'}" for p in program)
    return number, {
        "imageId": s.id, "question": question, "answer": answer, "fullAnswer": full, "isBalanced": True,
        "groups": {"global": kind_of(answer), "local": f"{asker:02}-{detailed}_{kind_of(answer) or 'yes-no'}"},
        "types": {"structural": structural, "semantic": semantic, "detailed": detailed}, "semantic": program,
        "semanticStr": chain, "entailed": [], "equivalent": [number],
        "annotations": {"question": annotated(question), "answer": annotated(answer), "fullAnswer": annotated(full)}}


def scene_graph(s):
    """One scene in the format of GQA's sceneGraphs.json."""
    near = list(relations(s))
    return {"width": s.width, "height": s.height, "weather": s.weather, "objects": {
        t.id: {"name": t.name, "x": t.x, "y": t.y, "w": t.w, "h": t.h, "attributes": [t.color, t.size],
               "relations": [{"name": rel, "object": b.id} for a, rel, b in near if a is t]} for t in s.things}}


def regions(s, r):
    """One scene in the format of Visual Genome's region_descriptions.json."""
    found = []
    for i, (phrase, t) in enumerate(phrases(s, r)):
        box = (t.x, t.y, t.w, t.h) if t else (0, 0, s.width, s.height)
        found.append({"region_id": int(f"{s.id}{i:02}"), "image_id": int(s.id), "phrase": phrase,
                      **dict(zip(("x", "y", "width", "height"), box, strict=True))})
    return {"id": int(s.id), "regions": found}


def ask_all(scenes, r):
    """Questions about every scene, two of each kind in the six tasks and one of the others -> dict of GQA's entries.

    Some are then left out, until each kind has all its answers equally often. GQA balanced its questions, too.
    """
    pools = defaultdict(lambda: defaultdict(list))                  # (asker, answers) -> answer -> entries
    for s in scenes:
        asked = set()
        for asker, (_, _, ask) in enumerate(ASKERS):
            for again in range(2):
                q = ask(s, r)
                if q and q[0] not in asked:
                    number, one = entry(s, asker, again, *q)
                    if not again or task_of(one["types"]) in TASKS.values():
                        pools[asker, kind_of(q[1])][q[1]].append((number, one))
                        asked.add(q[0])
    kept = {}
    for pool in pools.values():
        n = min(map(len, pool.values()))
        for entries in pool.values():
            kept |= r.sample(entries, n)
    return dict(sorted(kept.items()))


def make(folder, seed=0, train=1000, val=150):
    """Write a world into `folder`: images/, GQA's questions and scene graphs of each split, VG's regions of all."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    described = []
    for split, n in (("train", train), ("val", val)):
        if not n:
            continue
        scenes, r = [scene(seed, split, i) for i in range(n)], random.Random(f"{seed}/{split}")
        for s in tqdm(scenes, desc=split, unit="picture", dynamic_ncols=True):
            draw(s).save(folder / "images" / f"{s.id}.jpg", quality=95, subsampling=0)
        described += [json.dumps(regions(s, r)) for s in scenes]
        write_lines(folder / f"{split}_balanced_questions.json", "{}", (
            f"{json.dumps(k)}: {json.dumps(v)}" for k, v in ask_all(scenes, r).items()))
        write_lines(folder / f"{split}_sceneGraphs.json", "{}", (
            f"{json.dumps(s.id)}: {json.dumps(scene_graph(s))}" for s in scenes))
    write_lines(folder / "region_descriptions.json", "[]", described)


def write_lines(file, brackets, entries):
    """Write a JSON file with one entry per line. brackets: "{}" or "[]"."""
    file.write_text(brackets[0] + "\n" + ",\n".join(entries) + "\n" + brackets[1] + "\n", encoding="utf-8")


def main(argv=None):
    with one_line_errors():
        parser = Parser(__doc__)
        parser.add_argument("folder", metavar="DIR")
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another world (0)")
        parser.add_argument("--train", type=int, default=1000, metavar="N", help="pictures to train on (1000)")
        parser.add_argument("--val", type=int, default=150, metavar="N", help="pictures to test on (150)")
        args = parser.parse_args(argv)
        if min(args.train, args.val) < 0 or args.train + args.val == 0:
            raise ValueError("--train and --val take numbers from 0, and not both 0")
        make(args.folder, args.seed, args.train, args.val)
        print(f"wrote {args.folder}: {args.train} + {args.val} pictures and their questions, scene graphs and regions")


if __name__ == "__main__":
    main()
