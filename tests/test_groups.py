"""python -m pytest tests/test_groups.py

Token groups: names and their algebra, words in questions, patches on photos, image-token counts. No reference files:
the truth is a second, independent way to the same thing.
"""
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import world
from PIL import Image

import clip_vit
import llava_min
import vicuna
from llava_min import EmptyGroup, canonical, name_spans, option_spans, parse_edge

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
PAD = llava_min.Config(vicuna.Config(), clip_vit.Config())
ANYRES = replace(PAD, aspect="anyres", pinpoints=PINPOINTS)
EVERY = {"pad": PAD, "anyres": ANYRES, "pad hf": replace(PAD, preprocess="hf"),
         "anyres hf": replace(ANYRES, preprocess="hf")}
every_config = pytest.mark.parametrize("c", EVERY.values(), ids=EVERY)


def sizes(n, seed=0, low=20, high=1400):
    draw = random.Random(seed)
    common = [(640, 480), (500, 375), (375, 500), (336, 336), (500, 333), (1000, 300), (1, 1), (2000, 3), (3, 2000)]
    return common + [(draw.randint(low, high), draw.randint(low, high)) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------- names

@pytest.mark.parametrize("paper, ours", [
    ("Image->Question", ("image", "question")), ("Last->Last", ("last", "last")),
    ("Image Central Object->Question", ("related_patches", "question")),
    ("Image Without Central Object->Question", ("other_patches", "question")),
    ("True Option->Last", ("true_option", "last")), ("Question without Options->Last", ("question_wo_options", "last")),
    ("image -> text:the cup - text:cup", ("image", "text:the cup - text:cup")),
    ("image+last->question", ("image+last", "question"))])
def test_the_papers_own_edge_names_are_understood(paper, ours):
    assert parse_edge(paper) == ours


def test_hyphens_in_words_are_not_minus_signs():
    assert llava_min.parse_group("question-text:t-shirt") == [("+", "question"), ("-", "text:t-shirt")]
    assert llava_min.parse_group("text:t-shirt - text:a+b + last") == [("+", "text:t-shirt"), ("-", "text:a+b"),
                                                                      ("+", "last")]
    assert canonical("Image Without Central Object With Pad") == "image-related_patches"
    assert llava_min.parse_group("question-image hd patch indice") == [
        ("+", "question"), ("-", "tile_patches"), ("-", "newlines")]


@pytest.mark.parametrize("text", ["image-related_patches", "question - text:t-shirt + last", "text:a-b", "last"])
def test_the_house_spelling_reads_as_the_same_group(text):
    assert canonical(text) == text
    assert llava_min.parse_group(canonical(text)) == llava_min.parse_group(text)


def test_a_paper_name_that_is_a_difference_stands_alone():
    for text in ("question-image without central object with pad", "image without central object with pad+last"):
        with pytest.raises(ValueError, match="cannot be combined"):
            llava_min.parse_group(text)


@pytest.mark.parametrize("text", ["imgae", "image+", "-", "", "image++last", "image->", "question minus last"])
def test_an_unknown_group_is_refused_with_the_legal_ones(text):
    with pytest.raises(ValueError, match="token group"):
        llava_min.parse_group(text)


@pytest.mark.parametrize("text", ["image", "image->", "->question", "image=>question"])
def test_an_edge_without_two_ends_is_refused(text):
    with pytest.raises(ValueError, match="SOURCE->TARGET|token group"):
        parse_edge(text)


# ---------------------------------------------------------------------------------------------------- words

def said(spans, text):
    return {name: s if isinstance(s, str) else [text[a:b] for a, b in s] for name, s in spans.items()}


def test_an_option_is_a_whole_word():
    text = "What clothing item is not black, the shirt or the hat?"
    assert option_spans(["hat", "shirt"], text) == {"shirt": [(37, 42)], "hat": [(50, 53)]}
    assert option_spans(["healthy", "unhealthy"], "Is it unhealthy or healthy?")["healthy"] == [(19, 26)]
    assert "not a word" in option_spans(["phone", "laptop"], "Is it the telephone or the laptop?")["phone"]


def test_the_longer_of_two_overlapping_names_keeps_its_words():
    text = "Which vehicle is white, the train car or the car?"
    assert option_spans(["train car", "car"], text) == {"train car": [(28, 37)], "car": [(45, 48)]}
    assert "not a word" in name_spans(["bed", "bed sheet"], "Where is the bed sheet?")["bed"]


def test_an_option_that_stands_twice_is_the_one_next_to_or():
    text = "Is the person to the right or to the left of the chair on the left side?"
    assert option_spans(["left", "right"], text)["left"] == [(37, 41)]
    assert "more than once" in option_spans(["cup", "red"], "cup or cup or red")["cup"]


def test_a_name_counts_in_the_plural_and_every_time_it_stands():
    assert said(name_spans(["child", "woman", "knife", "box"], "Any children, women, knives or boxes?"),
                "Any children, women, knives or boxes?") == {
        "child": ["children"], "woman": ["women"], "knife": ["knives"], "box": ["boxes"]}
    assert name_spans(["picture"], "Which side of the picture is the picture on?")["picture"] == [(18, 25), (33, 40)]
    assert said(name_spans(["he", "she"], "Is he behind the shed?"), "Is he behind the shed?")["he"] == ["he"]


QUESTION = "Is the t-shirt of the café owner red or dark blue?"


@pytest.fixture(scope="module", params=["llava-1.5", "llava-1.6", "llama3-next"])
def asked(request, model):
    m = model(request.param)
    return m, m.prompt(QUESTION, world.picture(90, 60), true_option="red", false_option="dark blue",
                       objects=["t-shirt", "owner"], boxes=[(10, 10, 40, 30)])


def chars(p, name):
    """What the group's tokens cover of the prompt, spaces aside (several byte tokens may cover one character)."""
    covered = sorted({at for i in p.positions(name) for at in range(*p.spans[i])})
    return "".join(p.text[at] for at in covered).replace(" ", "")


def test_text_groups_cover_their_words_and_no_other(asked):
    _, p = asked
    squeeze = QUESTION.replace(" ", "")
    assert chars(p, "question") == squeeze
    assert chars(p, "true_option") == "red"
    assert chars(p, "false_option") == "darkblue"
    assert chars(p, "objects") == "t-shirtowner"
    assert chars(p, "question_wo_options") == squeeze.replace("red", "").replace("darkblue", "")
    assert chars(p, "text:café OWNER") == "caféowner"
    assert chars(p, "question - text:t-shirt") == squeeze.replace("t-shirt", "")
    assert p.positions("last") == [len(p) - 1]
    assert "Answerthequestion" in chars(p, "instruction")


def test_the_groups_of_a_prompt_do_not_overlap_and_the_picture_is_one_block(asked):
    _, p = asked
    image = p.positions("image")
    assert image == list(range(image[0], image[-1] + 1))
    assert p.positions("system") == list(range(image[0]))
    parts = [p.positions(n) for n in ("system", "image", "question", "instruction", "last")]
    assert len({i for part in parts for i in part}) == sum(map(len, parts))
    patches = [p.groups.get(n, []) for n in ("base_patches", "tile_patches", "newlines")]
    assert sorted(i for part in patches for i in part) == image
    related, other, newlines = (set(p.groups.get(n, ())) for n in ("related_patches", "other_patches", "newlines"))
    assert related | other | newlines == set(image) and not related & other and not (related | other) & newlines


def test_unions_and_differences_are_set_algebra(asked):
    _, p = asked
    image, related = set(p.positions("image")), set(p.positions("related_patches"))
    assert set(p.positions("image-related_patches")) == image - related
    assert set(p.positions("question+image")) == image | set(p.positions("question"))
    with pytest.raises(EmptyGroup, match="no token"):
        p.positions("image-image")


def test_a_group_this_question_does_not_have_says_why(model):
    p = model("llava-1.5").prompt("Is it red?", world.picture(90, 60))
    for name, why in [("true_option", "no options"), ("objects", "no object"), ("related_patches", "no annotated box"),
                      ("newlines", "AnyRes"), ("captions", "no token"), ("text:blue", "not whole words")]:
        with pytest.raises(EmptyGroup, match=why):
            p.positions(name)
    p = model("vicuna").prompt("Is it red?", captions="a red cup. a table.")
    assert chars(p, "captions") == "aredcup.atable."
    with pytest.raises(EmptyGroup, match="no image"):
        p.positions("image")


@pytest.mark.parametrize("kwargs, why", [
    ({"question": "Is <image> red?"}, "<image>"), ({"question": "  "}, "empty"), ({"image": None}, "needs an image"),
    ({"boxes": [(90, 0, 5, 5)]}, "outside"), ({"boxes": [(0, 0, -1, 5)]}, "outside"),
    ({"question": "word " * 5000}, "the model takes")])
def test_a_prompt_that_cannot_be_is_refused(model, kwargs, why):
    with pytest.raises(ValueError, match=why):
        model("llava-1.5").prompt(**{"question": "Is it red?", "image": world.picture(90, 60), **kwargs})


# ---------------------------------------------------------------------------------------------------- patches

def unpad_by_tensor(size, c):
    """The original's own way to the token count: build the map, reshape, slice, append a column (llava_arch.py)."""
    p = c.vision.side
    best = kept = waste = None
    for a, b in c.pinpoints:
        W, H = (b, a) if c.preprocess == "hf" else (a, b)
        scale = min(W / size[0], H / size[1])
        now = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        if best is None or now > kept or (now == kept and W * H - now < waste):
            best, kept, waste = (W // c.vision.image, H // c.vision.image), now, W * H - now
    gw, gh = best
    index = torch.arange(1, 1 + gw * gh).view(gh, gw, 1, 1) * p * p + torch.arange(p * p).view(1, 1, p, p)
    index = index.permute(0, 2, 1, 3).reshape(gh * p, gw * p)
    height, width = index.shape
    rounded = (lambda x: int(round(x, 7))) if c.preprocess == "hf" else int
    if size[0] / size[1] > width / height:
        cut = (height - rounded(size[1] * (width / size[0]))) // 2
        index = index[cut:height - cut]
    else:
        cut = (width - rounded(size[0] * (height / size[1]))) // 2
        index = index[:, cut:width - cut]
    index = torch.cat((index, torch.full((len(index), 1), -1)), 1)
    return torch.cat((torch.arange(p * p), index.flatten()))


@pytest.mark.parametrize("name", ["anyres", "anyres hf"])
def test_image_tokens_of_thousands_of_sizes_are_the_originals_slices_of_the_tile_map(name):
    c, p = EVERY[name], 24
    for size in sizes(1500):
        slots = llava_min.patch_slots(size, c)
        flat = torch.where(slots[:, 0] < 0, -1, slots[:, 0] * p * p + slots[:, 1] * p + slots[:, 2])
        assert torch.equal(flat, unpad_by_tensor(size, c)), size


@pytest.mark.parametrize("size, n", [((640, 480), 2340), ((480, 640), 2352), ((500, 333), 1464), ((333, 500), 1476),
                                     ((640, 427), 2144), ((427, 640), 2160), ((336, 336), 1176), ((500, 500), 2928),
                                     ((1000, 300), 2182), ((300, 1000), 2232), ((1920, 1080), 1948)])
def test_published_image_token_counts(size, n):
    assert len(llava_min.patch_slots(size, ANYRES)) == n
    assert len(llava_min.patch_slots(size, PAD)) == 576


@every_config
def test_the_two_directions_of_the_patch_map_agree(c):
    """photo -> patches (a resized mask) against patches -> photo (an affine map), for random boxes in random photos.

    A patch that holds a pixel wholly inside the box must touch the box; one that lies inside it with pixels to spare
    on every side must hold such a pixel.
    """
    draw = random.Random(3)
    for size in sizes(150, seed=1, low=60, high=900)[:-1]:
        w, h = size
        if min(size) < 30:
            continue
        x, y = draw.randint(0, w - 20), draw.randint(0, h - 20)
        box = (x, y, draw.randint(8, w - x - 1), draw.randint(8, h - y - 1))
        inside = llava_min.patches_in_boxes(size, [box], c)
        x0, y0, x1, y1 = llava_min.patch_boxes(size, c).unbind(1)
        fx0, fy0, fx1, fy1 = box[0], box[1], box[0] + box[2] + 1, box[1] + box[3] + 1
        touches = (x0 < fx1) & (x1 > fx0) & (y0 < fy1) & (y1 > fy0)
        assert not (inside & ~touches).any(), (size, box)
        # bicubic reads two pixels of the resized view on each side, that is at least two of the photo's
        spare = 2 * max(1.0, max(max(abs(a), abs(b)) for a, b, _, _ in llava_min.affine(size, c))) + 1
        deep = (x0 >= fx0 + spare) & (x1 <= fx1 - spare) & (y0 >= fy0 + spare) & (y1 <= fy1 - spare)
        assert not (deep & ~inside).any(), (size, box)


@every_config
def test_patch_boxes_tile_what_the_model_sees_of_the_photo_once(c):
    for size in sizes(300, seed=2)[:-2]:
        slots, boxes = llava_min.patch_slots(size, c), llava_min.patch_boxes(size, c)
        seen = ~boxes.isnan().any(1)
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        w, h = size
        base = area[seen & (slots[:, 0] == 0)].sum().item()
        centre = c.preprocess == "hf" and c.aspect == "pad"         # transformers cuts the centre out
        assert base == pytest.approx(min(w, h) ** 2 if centre else w * h, rel=0.03 if centre else 1e-3)
        if c.aspect == "anyres":                                    # unpadding truncates: up to one strip is lost
            sx, sy, _, _ = llava_min.affine(size, c)[1]
            strip = 14 * max(w * sy, h * sx)
            assert w * h - 1.001 * strip - 1 <= area[seen & (slots[:, 0] > 0)].sum().item() <= w * h * 1.001
        assert (slots[:, 0] < 0).sum() == boxes.isnan().all(1)[slots[:, 0] < 0].sum()


@every_config
def test_a_patch_sees_the_photo_where_its_box_says(c):
    """Paint one patch's box white on a black photo: of all squares of its view, its own becomes the brightest."""
    size, I, step = (500, 340), c.vision.image, c.vision.patch
    slots, boxes = llava_min.patch_slots(size, c), llava_min.patch_boxes(size, c)
    for i in torch.linspace(0, len(slots) - 1, 40).long().tolist():
        if boxes[i].isnan().any():
            continue
        x0, y0, x1, y1 = boxes[i].tolist()
        photo = np.zeros((size[1], size[0]), dtype=np.uint8)
        photo[round(y0):math.ceil(y1), round(x0):math.ceil(x1)] = 255
        view, row, col = slots[i].tolist()
        seen = np.asarray(llava_min.views(Image.fromarray(photo), c, fill=0)[view]).astype(float)
        squares = seen.reshape(I // step, step, I // step, step).mean((1, 3))
        assert np.unravel_index(squares.argmax(), squares.shape) == (row, col)


def test_a_wide_photo_is_padded_to_a_square_and_a_white_one_has_grey_borders():
    view, = llava_min.views(Image.new("RGB", (400, 200), "white"), PAD)
    rows = np.asarray(view)[:, 168]
    assert view.size == (336, 336)
    assert (rows[90:246] == 255).all()
    assert (rows[:80] == (122, 116, 104)).all() and (rows[256:] == (122, 116, 104)).all()


def test_transformers_variant_cuts_the_centre_out_where_the_original_pads():
    image = Image.new("RGB", (400, 200), "white")
    assert (np.asarray(llava_min.views(image, EVERY["pad hf"])[0]) == 255).all()
    assert llava_min.best_canvas((300, 300), ANYRES) == (336, 672)  # a tie: each reads the list its own way
    assert llava_min.best_canvas((300, 300), EVERY["anyres hf"]) == (672, 336)


def test_a_box_partly_outside_the_photo_is_cut_off_at_its_border():
    whole = llava_min.patches_in_boxes((500, 375), [(400, 300, 99, 74)], PAD)
    assert torch.equal(llava_min.patches_in_boxes((500, 375), [(400, 300, 900, 900)], PAD), whole)
    assert whole.any()


def test_two_boxes_give_the_union_of_their_patches():
    a, b = (10, 20, 100, 50), (300, 200, 60, 90)
    for c in (PAD, ANYRES):
        one = [llava_min.patches_in_boxes((500, 375), [box], c) for box in (a, b)]
        assert torch.equal(llava_min.patches_in_boxes((500, 375), [a, b], c), one[0] | one[1])
