"""
tiny.py - the bundled model: a drawn world in GQA's own file formats, and a LLaVA of 2.8 M parameters trained on it.

Needs   torch, tokenizers, safetensors, pillow, tqdm; beside it llava_min.py with its neighbours, eval_gqa.py, runs.py,
        knockout.py and, for `score`, lens.py
Run     python tiny.py make world --seed 7                   pictures, scene graphs, questions, regions of both splits
        python tiny.py train out/my-tiny                     over an hour on 2 CPU cores; called again it goes on
        python tiny.py train out/my-tiny-anyres --anyres --start out/my-tiny
        python tiny.py score --model llava-tiny              the model card's tables: accuracy, with a blank picture ...
Formats GQA's questions and scene graphs, Visual Genome's region descriptions
Paper   https://arxiv.org/abs/2411.18620, Table 1 (the six tasks) and Table 2 (the fifteen groups of questions)

A scene holds 2 to 5 things of different shapes. Every scene is a pure function of (seed, split, number), so what
`train` sees is what `make` would write, and no scene of one split is in the other.

Shapes  B pictures in a batch  K texts about each of them  T tokens of a text  P tokens before it
"""
import json
import random
from dataclasses import dataclass
from pathlib import Path

# ---------------------------------------------------------------------------------------------------- the world

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
    """Scene `number` of a split ("train" or "val"), the same for the same seed wherever it is drawn.

    most: things in it at most; fewer than 5 make easier lessons, with as few as 1.
    """
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
    """A shape's polygons in the unit square: (what is drawn, what is then taken away), each a list of points or boxes.

    A box (x0, y0, x1, y1) stands for the ellipse in it.
    """
    from math import cos, pi, sin
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
    """Scene -> PIL RGB image. Shapes are drawn four times as large and averaged down, so that edges are soft."""
    from PIL import Image, ImageDraw
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
    """(a, name, b) for every pair of things where a clearly lies so from b, as GQA names it."""
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
    """Where in the picture a thing clearly lies: a dict of GQA's hposition and vposition."""
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
    """The program step that finds a thing, or looks for a shape that the scene does not have."""
    return step("select", f"{t.name} ({t.id})" if isinstance(t, Thing) else f"{t} (-) ")


def yes(truth):
    return "yes" if truth else "no"


def plural(name):
    return name + ("es" if name.endswith("s") else "s")


def attributes(t):
    return {"color": t.color, "size": t.size}


def another(r, kind, value):
    return r.choice([v for v in (COLORS if kind == "color" else SIZES) if v != value])


# Each of these asks one question of its kind: (scene, random) -> (question, answer, detailed type, program), or None
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
    """A thing that one of its attributes tells from all others: (thing, kind, value), or None."""
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


# (structural type, semantic type, who asks): the fifteen groups of Table 2
ASKERS = (("verify", "obj", verify_obj), ("verify", "attr", verify_attr), ("verify", "rel", verify_rel),
          ("verify", "global", verify_global), ("query", "attr", query_position), ("query", "attr", query_attr),
          ("query", "cat", query_cat), ("query", "rel", query_rel), ("query", "global", query_global),
          ("choose", "attr", choose_attr), ("choose", "cat", choose_cat), ("choose", "rel", choose_rel),
          ("choose", "global", choose_global), ("logical", "obj", logical_obj), ("logical", "attr", logical_attr),
          ("compare", "attr", compare_common), ("compare", "attr", compare_same))


def phrases(s, r):
    """What there is to say about a scene: list of (phrase, thing or None), in the order of a throw of dice."""
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


# ---------------------------------------------------------------------------------------------------- the model

def config(vocab, anyres):
    """config.json in transformers' LLaVA layout. vocab: pieces of the tokenizer, <image> and <pad> not counted."""
    side, rows = 64, (vocab + 2 + 63) // 64 * 64                    # the tables are padded, as the conversions do
    raw = {"model_type": "llava_next" if anyres else "llava", "projector_hidden_act": "gelu",
           "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
           "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
           "image_token_index": vocab, "pad_token_id": vocab + 1, "image_seq_length": 64,
           "torch_dtype": "float32",                                # how it is to be run; the file holds float16
           "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 128,
                             "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                             "image_size": side, "patch_size": 8},
           "text_config": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 320,
                           "num_hidden_layers": 10, "num_attention_heads": 4, "rms_norm_eps": 1e-5,
                           "max_position_embeddings": 1024, "rope_theta": 10000.0, "vocab_size": rows,
                           "bos_token_id": 1, "eos_token_id": 2}}
    if anyres:
        raw["image_grid_pinpoints"] = [[a * side, b * side] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
        raw["use_image_newline_parameter"] = True
    return raw


def train_tokenizer(texts):
    """A tokenizer in Llama-2's manner, small: byte fallback, "▁" for a space, a piece for every word of `texts`."""
    import re
    from collections import Counter

    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    special = ["<unk>", "<s>", "</s>"]
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Punctuation("isolated")        # for the training only: no merge crosses a word
    words = Counter(word for text in texts for word in re.findall("▁?[^▁\n]+", "▁" + text.replace(" ", "▁")))
    t.train_from_iterator((word for word, n in sorted(words.items()) for _ in range(min(n, 100) + 1)),
                          trainers.BpeTrainer(vocab_size=4096, min_frequency=2, show_progress=False, special_tokens=[
                              *special, *(f"<0x{b:02X}>" for b in range(256))],
                              initial_alphabet=["▁", *map(chr, range(33, 127))]))
    raw = json.loads(t.to_str())
    raw["added_tokens"] = []                                        # the bytes are plain pieces of the vocabulary
    t = Tokenizer.from_str(json.dumps(raw))
    t.pre_tokenizer = None
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken(text, normalized=False) for text in (*special, "<image>", "<pad>")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


# ---------------------------------------------------------------------------------------------------- training

CAPTION = "Describe the image."
BY_COLOR = "Which shape is which color?"
# How often each of ASKERS asks in stages 2 to 4: the six tasks more than others, LogicalObj more than all in stage 3,
# and in stage 4 what it is made of, too: whether a thing is there at all.
WEIGHTS = {2: (1, 1, 1, .5, 2, 1, 1, 1, .5, 2, 2, 2, .5, 3, 1, 3, 1),
           3: (1, .5, 1, .5, 1, .5, 1, 1, .5, 1, 2, 1, .5, 10, .5, 2, 1),
           4: (6, .5, .5, .5, .5, .5, 1, .5, .5, .5, 1, 2, .5, 10, .5, 1, .5)}


def corpus(seed):
    """The texts that the tokenizer learns its words from: what is said about the first thousand scenes."""
    from llava_min import INSTRUCTION, VICUNA_V1
    yield VICUNA_V1[0] + f"\n{CAPTION}{INSTRUCTION}" + VICUNA_V1[1]
    for i in range(1000):
        s, r = scene(seed, "train", i), random.Random(i)
        for _, _, ask in ASKERS:
            if q := ask(s, r):
                yield from ("\n" + q[0], q[1], q[1].capitalize())
        yield from (phrase for phrase, _ in phrases(s, r))
        yield caption(s, r)


def caption(s, r):
    """A description in telegraphic style, the things in any order: "moon red small left top. cross ... weather sunny."

    What follows a thing's name is certain, so nearly every word is a lesson in looking at the picture. With sentences
    ("The moon is small and red.") the model could not tell whose color is whose after 1,400 steps; with these it can
    after 200.
    """
    things = (" ".join((t.name, t.color, t.size, *sides(s, t).values())) for t in r.sample(s.things, len(s.things)))
    return ". ".join((*things, f"weather {s.weather}."))


def by_color(s, r):
    """The other way round, a lesson in going from a color to its things: "red moon cross. blue star." Without it the
    model could not tell which of two shapes is red after 4,000 steps of questions."""
    colors = sorted({t.color for t in s.things})
    return ". ".join(" ".join((color, *(t.name for t in r.sample(s.things, len(s.things)) if t.color == color)))
                     for color in r.sample(colors, len(colors))) + "."


def talk(s, r, stage):
    """What one picture teaches: list of (question, reply, brief). Stage 1 describes it, later ones ask about it."""
    found = [(CAPTION, caption(s, r), False), (BY_COLOR, by_color(s, r), False)]
    while stage >= 2 and len(found) < 8:
        _, _, ask = r.choices(ASKERS, WEIGHTS[stage])[0]
        if q := ask(s, r):
            found.append((q[0], q[1].capitalize(), True))
    return found


class Batch:
    """B pictures of one size with K texts each, as tensors."""

    def __init__(self, model, scenes, said):
        """scenes: B of them, of one size where the model has AnyRes. said: B lists of K (question, reply, brief)."""
        import torch

        import clip_vit
        from llava_min import INSTRUCTION, VICUNA_V1, patch_slots, views
        c, t, (before, after) = model.config, model.tokenizer, VICUNA_V1
        self.pixels = torch.stack([clip_vit.to_pixels(view) for s in scenes for view in views(draw(s), c)])
        self.slots = patch_slots((scenes[0].width, scenes[0].height), c)
        self.before = torch.tensor(t.encode(before).ids)            # BOS and the system's words, the same for all
        asked = [f"\n{question}{INSTRUCTION if brief else ''}{after}" for texts in said for question, _, brief in texts]
        replies = [f" {reply}" for texts in said for _, reply, _ in texts]
        skip = [len(e.ids) - 2 for e in t.encode_batch(asked)]      # rows before the one that predicts the reply
        full = [e.ids[1:] + [2] for e in t.encode_batch([a + b for a, b in zip(asked, replies, strict=True)])]
        T = max(map(len, full)) - 1                                 # what lies behind a shorter text is never seen
        self.ids = torch.tensor([ids[:-1] + [0] * (T + 1 - len(ids)) for ids in full])  # (B K, T)
        self.next = torch.tensor([[-1] * n + ids[1 + n:] + [-1] * (T + 1 - len(ids))    # -1: not to be learnt
                                  for n, ids in zip(skip, full, strict=True)])
        brief = torch.tensor([brief for texts in said for _, _, brief in texts])
        length = (self.next >= 0).sum(1)
        self.answers = (length.cumsum(0) - length)[brief]           # of all replies' tokens, the first ones of answers

    def to(self, device):
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.to(device))
        return self


def replies(model, b):
    """Batch -> logits (n, V) of the rows that predict the replies' tokens, and those tokens (n,).

    It is llava_min's forward for B K prompts, but each picture goes through a layer once, with the system's words
    before it; its texts then see them through the layer's own cache, and no text sees another.
    """
    import torch

    from vicuna import causal, to_mask
    d, c = model.decoder, model.config
    x = model.mm_projector(model.vision_tower(b.pixels, c.layer)[:, 1:])                # (B N, patches, C)
    view, row, col = b.slots.unbind(1)
    N, side = view.max().item() + 1, c.vision.side
    B = len(x) // N
    x = x.reshape(B, -1, x.shape[-1])
    if c.aspect == "anyres":
        x = torch.cat((x, model.image_newline.to(x.dtype).expand(B, 1, -1)), 1)         # a newline's row is the last
    x = x[:, torch.where(view < 0, x.shape[1] - 1, view * side ** 2 + row * side + col)]
    x = torch.cat((d.embed_tokens(b.before).expand(B, -1, -1), x.float()), 1)           # (B, P, C)
    y = d.embed_tokens(b.ids)                                                           # (B K, T, C)
    P, K, T = x.shape[1], len(y) // B, y.shape[1]
    near, far = (d.rope(torch.arange(a, z, device=x.device)) for a, z in ((0, P), (P, P + T)))
    masks = [to_mask(causal(n, S, x.device)) for n, S in ((P, P), (T, P + T))]
    for layer in d.layers:
        seen = []
        x = layer(x, *near, masks[0], seen)
        y = layer(y, *far, masks[1], [kv.repeat_interleave(K, 0) for kv in seen])
    learnt = b.next >= 0
    return d.lm_head(d.norm(y[learnt])), b.next[learnt]


def initialize(model, seed):
    """Random weights: each layer keeps its input's size, and what a block adds to the residual stream starts small."""
    import torch
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight") or "layrnorm.weight" in name or "layer_norm" in name and p.ndim == 1:
            p.data.fill_(0.0 if name.endswith("bias") else 1.0)
        elif p.ndim == 1 and name != "image_newline":
            p.data.zero_()
        else:
            small = name.removesuffix(".weight").endswith(("o_proj", "out_proj", "down_proj", "fc2", "lm_head"))
            p.data.normal_(generator=g)
            p.data *= (0.2 if "position" in name else 0.02 if "embed" in name or p.ndim == 1 else
                       (0.3 if small else 1.0) / p.shape[1] ** 0.5)


def build(seed, anyres, start=None):
    """-> (LLaVA with its tokenizer, its config.json as a dict): random, or from the finished model in a folder `start`.

    A newline vector that `start` lacks stays random. ValueError: `start` is of another size.
    """
    import llava_min
    from vicuna import attend
    other = llava_min.load(str(start), dtype="float32", device="cpu") if start else None
    t = other.tokenizer if other else train_tokenizer(corpus(seed))
    raw = config(t.token_to_id("<image>"), anyres)
    model = llava_min.LLaVA(llava_min.Config.from_json(raw))
    model.tokenizer = t
    initialize(model, seed)
    if other:
        theirs = dict(other.named_parameters())
        for name, p in model.named_parameters():
            if name in theirs and theirs[name].shape == p.shape:
                p.data.copy_(theirs[name])
            elif name != "image_newline":
                raise ValueError(f"{start} is a model of other sizes: see {name}")
    for layer in model.decoder.layers:
        layer.self_attn.kernel = attend                             # for heads this small SDPA's backward is slower
    return model, raw


def patch_labels(s, c):
    """What each patch of a scene's views shows: int (n, 6) of shape, color, size, sides of the picture, and 1; or five
    times -1, and 0, for nothing.

    A patch shows the thing whose box covers most of it, from a fifth of it on. Rows as llava_min.patch_slots has them.
    """
    import torch

    from llava_min import patch_boxes
    boxes = patch_boxes((s.width, s.height), c).nan_to_num(-1)                          # (n, 4); padding: no area
    things = torch.tensor([(t.x, t.y, t.x + t.w, t.y + t.h) for t in s.things])
    low = torch.maximum(boxes[:, None, :2], things[:, :2])
    high = torch.minimum(boxes[:, None, 2:], things[:, 2:])
    part = (high - low).clamp(min=0).prod(-1) / (boxes[:, None, 2:] - boxes[:, None, :2]).prod(-1).clamp(min=1e-9)
    kinds = torch.tensor([(SHAPES.index(t.name), list(COLORS).index(t.color), list(SIZES).index(t.size),
                           ("left", "right", None).index(sides(s, t).get("hposition")),
                           ("top", "bottom", None).index(sides(s, t).get("vposition")), 1) for t in s.things])
    most, which = part.max(1)                                                           # (n,)
    return torch.where((most >= 0.2)[:, None], kinds[which], torch.tensor([-1] * 5 + [0]))


def look(model, heads, seed, step, batch):
    """One step of stage 0: the loss of telling from each patch's feature what it shows, and the share told right."""
    import torch
    import torch.nn.functional as F

    import clip_vit
    from llava_min import views
    c = model.config
    scenes = [scene(seed, "train", step * 1000 + i) for i in range(batch)]
    pixels = torch.stack([clip_vit.to_pixels(views(draw(s), c)[0]) for s in scenes]).to(model.device)
    labels = torch.cat([patch_labels(s, c)[:c.vision.side ** 2] for s in scenes]).to(model.device)  # the first view's
    with torch.autocast(model.device.type, torch.bfloat16):
        guesses = heads(model.vision_tower(pixels, c.layer)[:, 1:]).float().flatten(0, 1).split(PARTS, 1)
    loss = sum(F.cross_entropy(g, l, ignore_index=-1) for g, l in zip(guesses, labels.T, strict=True))
    there = labels[:, -1] == 1
    right = torch.stack([(g.argmax(1) == l)[there] for g, l in zip(guesses, labels.T, strict=True)]).float().mean(1)
    return loss, right


PARTS = [len(SHAPES), len(COLORS), len(SIZES), 3, 3, 2]             # how many answers each question of stage 0 has


def train(out, anyres=False, start=None, steps=(2500, 800, 1500, 2500, 0), seed=0, device="cpu", batch=24, rate=1.5e-3,
          save_every=200):
    """Train a model into the folder `out`, in five stages.

    Stage 0 teaches the vision tower what a patch shows, in the place of CLIP's own training, on 2 `batch` pictures a
    step. Stages 1 and 2 are LLaVA's: descriptions, then questions; all weights learn in both, since none but the
    tower's have learnt anything before. Stages 3 and 4 ask more of what is learnt last. The learning rate rises for 200
    steps and falls over the last 30 % of stage 0 and of what follows. steps: of the five. start: a folder to start
    from instead of random weights.
    What is in `out` already is gone on with. ValueError: it was made otherwise, or is finished.
    """
    import time
    from itertools import accumulate

    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    from runs import replace_text
    out = Path(out)
    state, log = out / "training.safetensors", out / "training.csv"
    if (out / "model.safetensors").exists():
        raise ValueError(f"{out} holds a finished model; train into another folder, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"anyres": anyres, "start": start and str(start), "steps": list(steps), "seed": seed, "batch": batch,
                "rate": rate}
    model, raw = build(seed, anyres, start)
    heads = torch.nn.Linear(model.config.vision.width, sum(PARTS))  # of stage 0 alone
    torch.nn.init.zeros_(heads.weight)
    torch.nn.init.zeros_(heads.bias)
    model.to(device)
    heads.to(device)
    named = dict(model.named_parameters()) | {f"heads.{name}": p for name, p in heads.named_parameters()}
    opt = torch.optim.AdamW(named.values(), rate, betas=(0.9, 0.98), weight_decay=0.02)
    first, lines, seconds = restore(state, settings, named, opt) if state.exists() else (0, [], 0.0)
    total, began, recent = sum(steps), time.time() - seconds, []
    for step in tqdm(range(first, total), initial=first, total=total, unit="step", dynamic_ncols=True):
        stage = sum(step >= end for end in accumulate(steps[:-1]))
        at, length = (step, steps[0]) if stage == 0 else (step - steps[0], total - steps[0])
        for group in opt.param_groups:
            group["lr"] = rate * min(1, (at + 1) / 200, (length - at) / (0.3 * length))
        if stage == 0:
            loss, right = look(model, heads, seed, step, 2 * batch)
            right = right.mean()
        else:
            b = lesson(model, seed, step, batch, stage).to(device)
            with torch.autocast(model.device.type, torch.bfloat16):
                logits, tokens = replies(model, b)
            loss = F.cross_entropy(logits.float(), tokens)
            right = (logits.argmax(-1) == tokens)[b.answers if stage > 1 else slice(None)].float().mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        opt.step()
        recent.append((loss.item(), right.item()))
        if step % 50 == 49 or step + 1 == total:
            loss, right = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            lines.append(f"{step + 1},{stage},{loss:.4f},{right:.4f},{time.time() - began:.0f}\n")
            recent = []
            replace_text(log, "step,stage,loss,right,seconds\n" + "".join(lines))
        if (step + 1) % save_every == 0 and step + 1 < total:
            about = {"settings": settings, "step": step + 1, "seconds": time.time() - began, "lines": lines}
            moments = {f"{key}.{name}": value for name, p in named.items() for key, value in opt.state[p].items()}
            save(state, {name: p.data for name, p in named.items()} | moments, about=json.dumps(about))
    write_model(out, model, raw)
    state.unlink(missing_ok=True)


def restore(state, settings, named, opt):
    """Put the weights and moments of a stopped training back -> (step it had reached, lines of its log, seconds)."""
    from safetensors import safe_open
    with safe_open(state, "pt") as f:
        about = json.loads(f.metadata()["about"])
        old = about["settings"]
        odd = next((key for key in settings if old.get(key) != settings[key]), None)
        if odd:
            raise ValueError(f"{state.parent} was begun with {odd} = {old.get(odd)}, this is {settings[odd]}; "
                             "use another folder, or delete that one")
        for name, p in named.items():
            p.data.copy_(f.get_tensor(name))
            kept = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if kept["step"] in f.keys():
                opt.state[p] = {key: f.get_tensor(full).to(p.device if key != "step" else "cpu")
                                for key, full in kept.items()}
    return about["step"], about["lines"], about["seconds"]


def lesson(model, seed, step, batch, stage):
    """The pictures and texts of one training step, the same whenever it is run."""
    from itertools import count, islice
    size = PHOTOS[step % len(PHOTOS)] if model.config.aspect == "anyres" else None      # one shape of AnyRes at a time
    drawn = (scene(seed, "train", step * 1000 + i) for i in count())
    scenes = list(islice((s for s in drawn if size in (None, (s.width, s.height))), batch))
    r = random.Random(f"{seed}/{step}")
    return Batch(model, scenes, [talk(s, r, stage) for s in scenes])


# Our names -> transformers' LLaVA layout, the first that fits.
HUB_NAMES = (("decoder.lm_head.", "language_model.lm_head."), ("decoder.", "language_model.model."),
             ("mm_projector.0.", "multi_modal_projector.linear_1."),
             ("mm_projector.2.", "multi_modal_projector.linear_2."), ("vision_tower.", "vision_tower.vision_model."),
             ("image_newline", "image_newline"))


def write_model(out, model, raw):
    """config.json, tokenizer.json and model.safetensors in float16, as transformers' LLaVA repositories have them."""
    import torch.nn.functional as F
    rows = raw["text_config"]["vocab_size"]
    tensors = {}
    for name, p in model.named_parameters():
        if name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight"):
            p = F.pad(p, (0, 0, 0, rows - len(p)))                  # <image>, <pad>, and up to the next multiple of 64
        old, new = next(pair for pair in HUB_NAMES if name.startswith(pair[0]))
        tensors[new + name.removeprefix(old)] = p.detach().half()
    (out / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    (out / "tokenizer.json").write_text(model.tokenizer.to_str() + "\n", encoding="utf-8")
    save(out / "model.safetensors", tensors, format="pt")


def save(file, tensors, **about):
    """Write a safetensors file so that a crash leaves the old one or the new one, whole."""
    import os

    from safetensors.torch import save_file
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, f"{file}.new", about)
    os.replace(f"{file}.new", file)


# ---------------------------------------------------------------------------------------------------- GQA's files

ANSWERS = {"place": ("left", "right"), "height": ("top", "bottom"), "order": ("above", "below"), "color": tuple(COLORS),
           "size": tuple(SIZES), "shape": SHAPES, "weather": tuple(WEATHER), "kind": ("color", "size"),
           None: ("yes", "no")}


def kind_of(answer):
    """The name of the few words that an answer is one of; None for yes and no."""
    return next(kind for kind, words in ANSWERS.items() if answer in words)


def entry(s, asker, again, question, answer, detailed, program):
    """One question in GQA's format, as (question id, dict). again: how many this asker has asked about the scene."""
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

    They are thinned until each kind has its answers equally often, as GQA balanced its own.
    """
    from collections import defaultdict

    from eval_gqa import TASKS, task_of
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
    """Write a world into `folder`: images/, and per split GQA's questions and scene graphs, VG's regions of all."""
    from tqdm import tqdm
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
    """A JSON file with one entry a line."""
    file.write_text(brackets[0] + "\n" + ",\n".join(entries) + "\n" + brackets[1] + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- what it learnt

def blank(image):
    """A picture of the same size that shows nothing."""
    from PIL import Image

    from clip_vit import MEAN
    return Image.new("RGB", image.size, tuple(int(255 * m) for m in MEAN))


def chance(questions):
    """Share of right answers of one who sees nothing but knows the words that answer each kind of question, used
    equally often, and takes one of the two where a question offers two."""
    return sum(0.5 if q.true_option else 1 / len(ANSWERS[kind_of(q.answer)]) for q in questions) / len(questions)


def score(model, questions):
    """-> {task: (number of questions, share answered right, share with the picture blanked, chance)}"""
    from tqdm import tqdm

    from eval_gqa import answers
    right, found, pictures = {}, {}, {}
    for q in questions:
        pictures.setdefault(q.image, []).append(q)
    for about in tqdm(pictures.values(), desc="accuracy", unit="picture", dynamic_ncols=True):
        image = about[0].open()
        said = [answers(model, [model.prompt(q.question, shown) for q in about]) for shown in (image, blank(image))]
        for q, *ids in zip(about, *said, strict=True):
            right[q.key] = [q.right(model.words(one)) for one in ids]
    for task in sorted({q.task for q in questions}):
        own = [q for q in questions if q.task == task]
        seen, blind = (sum(right[q.key][i] for q in own) / len(own) for i in (0, 1))
        found[task] = len(own), seen, blind, chance(own)
    return found


def cut_everywhere(model, questions, edges):
    """Accuracy with an edge cut in all layers at once -> {edge: {task: (questions that have it, share right)}}

    The answer's first token decides, which in this world is the whole answer.
    """
    from collections import defaultdict
    from contextlib import suppress

    from tqdm import tqdm

    from knockout import clean_pass, cut_ends, unembed
    from llava_min import EmptyGroup, parse_edge
    right, layers = defaultdict(lambda: defaultdict(list)), range(len(model.decoder.layers))
    for q in tqdm(questions, desc="cut in all layers", unit="question", dynamic_ncols=True):
        p, cuts = q.prompt(model), {}
        for edge in edges:
            with suppress(EmptyGroup):
                cuts[edge] = [p.positions(group) for group in parse_edge(edge)]
        ends = cut_ends(model.decoder, *clean_pass(model.decoder, model.embed(p)), list(cuts.values()), [layers])
        for edge, token in zip(cuts, unembed(model.decoder, ends[:, 0]).argmax(-1).tolist(), strict=True):
            right[edge][q.task].append(q.right(model.words([token])))
    return {edge: {task: (len(r), sum(r) / len(r)) for task, r in sorted(right[edge].items())} for edge in edges}


def spelling(model, questions):
    """Logit lens with the final norm at the last position: mean probability of the answer in lower case and
    capitalised after each layer -> list of L + 1 pairs, the embedding first."""
    from knockout import clean_pass
    from lens import lens
    total = 0
    for q in questions:
        stream, _ = clean_pass(model.decoder, model.embed(q.prompt(model)))
        ids = [model.tokenizer.encode(word).ids[1] for word in (q.answer, q.answer.capitalize())]
        total = total + lens(model.decoder, stream, [-1], "final")[:, 0, ids].double()
    return (total / len(questions)).tolist()


# ---------------------------------------------------------------------------------------------------- command line

def parse():
    from llava_min import add_model_flags
    from runs import Parser, count
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="make | train | score",
                                     parser_class=lambda **kw: Parser(__doc__, **kw))
    sub = commands.add_parser("make", help="draw a world into a folder")
    sub.add_argument("folder", metavar="DIR")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="another world (0)")
    sub.add_argument("--train", type=int, default=1000, metavar="N", help="pictures to train on (1000)")
    sub.add_argument("--val", type=int, default=150, metavar="N", help="pictures to test on (150)")
    sub = commands.add_parser("train", help="train the bundled model into a folder")
    sub.add_argument("folder", metavar="DIR")
    sub.add_argument("--anyres", action="store_true", help="a LLaVA-1.6: tiles, newlines, unpad")
    sub.add_argument("--start", metavar="DIR", help="a finished model to start from")
    sub.add_argument("--steps", type=int, nargs=5, metavar="N", help="of the five stages")
    sub.add_argument("--rate", type=float, metavar="X", help="highest learning rate")
    sub.add_argument("--batch", type=count, default=24, metavar="N", help="pictures in a step (24)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and scenes (0)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    sub = commands.add_parser("score", help="measure what the model card says")
    add_model_flags(sub)
    sub.add_argument("--data", metavar="JSON", help="a GQA question file (the bundled one)")
    sub.add_argument("--images", metavar="DIR", help="its pictures (images/ beside it)")
    sub.add_argument("--limit", type=count, metavar="N", help="the first N questions of each task")
    return parser.parse_args()


def main():
    args = parse()
    if args.command == "make":
        if min(args.train, args.val) < 0 or args.train + args.val == 0:
            raise ValueError("--train and --val take numbers from 0, and not both 0")
        make(args.folder, args.seed, args.train, args.val)
        print(f"wrote {args.folder}: {args.train} + {args.val} pictures and their questions, scene graphs and regions")
    elif args.command == "train":
        import llava_min
        steps, rate = (2500, 800, 1500, 2500, 0), 1.5e-3
        if args.start:
            steps, rate = ((0, 0, 300, 0, 350), 5e-4) if args.anyres else ((0, 0, 0, 0, 1500), 8e-4)
        train(args.folder, args.anyres, args.start, tuple(args.steps or steps), args.seed,
              llava_min.pick_device(args.device), args.batch, args.rate or rate)
        print(f"wrote {args.folder}; try: python tiny.py score --model {args.folder}")
    else:
        show_score(args)


def show_score(args):
    """Print the tables of the model card."""
    import llava_min
    from eval_gqa import BUNDLED, SIX, beside, read_gqa
    from knockout import EDGES
    file = Path(args.data or BUNDLED)
    questions = read_gqa(file, args.images or file.parent / "images", limit=args.limit, only=None, **beside(file))
    model = llava_min.load_files(llava_min.resolve(args.model, args.revision, args.vision_tower), args)

    def table(head, rows):
        print("\n".join(["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]) + "\n")
    table(("task or group", "questions", "accuracy", "picture blanked", "chance"), (
        (task, n, *(f"{100 * v:.1f} %" for v in shares)) for task, (n, *shares) in score(model, questions).items()))
    six = [q for q in questions if q.task in SIX]
    cuts = cut_everywhere(model, six, EDGES)
    tasks = sorted({q.task for q in six})
    table(("cut in all layers", *tasks), (
        (edge, *(f"{100 * by_task[t][1]:.1f} %" if t in by_task else "-" for t in tasks))
        for edge, by_task in cuts.items()))
    table(("after layer", "lower case", "capitalised"), ((i, f"{100 * low:.2f} %", f"{100 * high:.2f} %")
                                                       for i, (low, high) in enumerate(spelling(model, six))))


if __name__ == "__main__":
    from runs import cli
    cli(main)
