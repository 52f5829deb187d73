"""python -m pytest tests/test_views.py

Photo <-> patches: views and tiles, image-token counts, where patches lie on the photo and which of them a box holds. No
reference files: each result is checked against a second, independent way to compute it.
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
from groups import token_groups
from views import Geometry, affine, best_canvas, patch_boxes, patch_slots, patches_in_boxes, tile_map, views

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
PAD = Geometry(336, 14)
ANYRES = Geometry(336, 14, "anyres", PINPOINTS)
# As OneVision's, but smaller, so that the map of tiles is scaled down for most photos; 6 px of a view are in no patch.
LESS = Geometry(62, 14, "anyres", tuple((62 * i, 62 * j) for i in range(1, 7) for j in range(1, 7)), most=9)
EVERY = {"pad": PAD, "anyres": ANYRES, "pad hf": replace(PAD, preprocess="hf"),
         "anyres hf": replace(ANYRES, preprocess="hf"), "scaled down": LESS}
every_geometry = pytest.mark.parametrize("g", EVERY.values(), ids=EVERY)


def sizes(n, seed=0, low=20, high=1400):
    draw = random.Random(seed)
    common = [(640, 480), (500, 375), (375, 500), (336, 336), (500, 333), (1000, 300), (1, 1), (2000, 3), (3, 2000)]
    return common + [(draw.randint(low, high), draw.randint(low, high)) for _ in range(n)]


@pytest.mark.parametrize("g", [PAD, ANYRES, EVERY["anyres hf"]])
def test_a_models_config_gives_its_geometry(g):
    config = llava_min.Config(vicuna.Config(), clip_vit.Config(), g.aspect, g.pinpoints, preprocess=g.preprocess)
    assert config.geometry == g


# ---------------------------------------------------------------------------------------------------- image tokens

def unpad_by_tensor(size, g):
    """The original's own way to the token count: build the map, reshape, slice, append a column (llava_arch.py)."""
    p = g.side
    best = kept = waste = None
    for a, b in g.pinpoints:
        W, H = (b, a) if g.preprocess == "hf" else (a, b)
        scale = min(W / size[0], H / size[1])
        now = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        if best is None or now > kept or (now == kept and W * H - now < waste):
            best, kept, waste = (W // g.image, H // g.image), now, W * H - now
    gw, gh = best
    index = torch.arange(1, 1 + gw * gh).view(gh, gw, 1, 1) * p * p + torch.arange(p * p).view(1, 1, p, p)
    index = index.permute(0, 2, 1, 3).reshape(gh * p, gw * p)
    height, width = index.shape
    rounded = (lambda x: int(round(x, 7))) if g.preprocess == "hf" else int
    if size[0] / size[1] > width / height:
        cut = (height - rounded(size[1] * (width / size[0]))) // 2
        index = index[cut:height - cut]
    else:
        cut = (width - rounded(size[0] * (height / size[1]))) // 2
        index = index[:, cut:width - cut]
    index = torch.cat((index, torch.full((len(index), 1), -1)), 1)
    return torch.cat((torch.arange(p * p), index.flatten()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anyres", "anyres hf"])
def test_image_tokens_of_thousands_of_sizes_are_the_originals_slices_of_the_tile_map(name):
    g, p = EVERY[name], 24
    for size in sizes(1000):
        slots = patch_slots(size, g)
        flat = torch.where(slots[:, 0] < 0, -1, slots[:, 0] * p * p + slots[:, 1] * p + slots[:, 2])
        assert torch.equal(flat, unpad_by_tensor(size, g)), size


@pytest.mark.parametrize("size, n", [((640, 480), 2340), ((480, 640), 2352), ((500, 333), 1464), ((333, 500), 1476),
                                     ((640, 427), 2144), ((427, 640), 2160), ((336, 336), 1176), ((500, 500), 2928),
                                     ((1000, 300), 2182), ((300, 1000), 2232), ((1920, 1080), 1948)])
def test_published_image_token_counts(size, n):
    assert len(patch_slots(size, ANYRES)) == n
    assert len(patch_slots(size, PAD)) == 576


# ---------------------------------------------------------------------------------------------------- photos, boxes

@pytest.mark.slow
@every_geometry
def test_the_two_directions_of_the_patch_map_agree(g):
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
        inside = patches_in_boxes(size, [box], g)
        x0, y0, x1, y1 = patch_boxes(size, g).unbind(1)
        fx0, fy0, fx1, fy1 = box[0], box[1], box[0] + box[2] + 1, box[1] + box[3] + 1
        touches = (x0 < fx1) & (x1 > fx0) & (y0 < fy1) & (y1 > fy0)
        assert not (inside & ~touches).any(), (size, box)
        # bicubic reads two pixels of the resized view on each side, that is at least two of the photo's
        spare = 2 * max(1.0, max(max(abs(a), abs(b)) for a, b, _, _ in affine(size, g))) + 1
        deep = (x0 >= fx0 + spare) & (x1 <= fx1 - spare) & (y0 >= fy0 + spare) & (y1 <= fy1 - spare)
        assert not (deep & ~inside).any(), (size, box)


@pytest.mark.slow
@every_geometry
def test_patch_boxes_tile_what_the_model_sees_of_the_photo_once(g):
    for size in sizes(120, seed=2)[:-2]:
        slots, boxes = patch_slots(size, g), patch_boxes(size, g)
        seen = ~boxes.isnan().any(1)
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        w, h = size
        base = area[seen & (slots[:, 0] == 0)].sum().item()
        centre = g.preprocess == "hf" and g.aspect == "pad"         # transformers cuts the centre out
        read = (g.side * g.patch / g.image) ** 2                    # the part of a view that patches cover
        assert base == pytest.approx(min(w, h) ** 2 if centre else w * h * read, rel=0.03 if centre else 1e-3)
        if g.aspect == "anyres":                                    # unpadding truncates: up to one strip is lost
            sx, sy, _, _ = affine(size, g)[1]
            strip = (g.image / g.side + (g.most is not None)) * max(w * sy, h * sx)
            tiled = area[seen & (slots[:, 0] > 0)].sum().item()
            least = 1 if read == 1 else 0.95 * read                 # a map that ends inside a view covers less of it
            assert least * (w * h - 1.001 * strip - 1) <= tiled <= w * h * 1.001
        assert (slots[:, 0] < 0).sum() == boxes.isnan().all(1)[slots[:, 0] < 0].sum()


@every_geometry
def test_a_patch_sees_the_photo_where_its_box_says(g):
    """Paint one patch's box white on a black photo: of all squares of its view, its own becomes the brightest."""
    size, step = (500, 340), g.patch
    slots, boxes = patch_slots(size, g), patch_boxes(size, g)
    for i in torch.linspace(0, len(slots) - 1, 40).long().tolist():
        if boxes[i].isnan().any():
            continue
        x0, y0, x1, y1 = boxes[i].tolist()
        photo = np.zeros((size[1], size[0]), dtype=np.uint8)
        photo[round(y0):math.ceil(y1), round(x0):math.ceil(x1)] = 255
        view, row, col = slots[i].tolist()
        seen = np.asarray(views(Image.fromarray(photo), g, fill=0)[view]).astype(float)
        p = g.side
        squares = seen[:p * step, :p * step].reshape(p, step, p, step).mean((1, 3))
        if view and g.most:                                         # the part of several patches: they are brightest
            assert squares[row, col] > 0.5 * squares.max()
        else:
            assert np.unravel_index(squares.argmax(), squares.shape) == (row, col)


def test_a_map_of_tiles_is_scaled_down_as_the_original_does_it():
    """Token i of an axis reads its source, max((i + 0.5) kept / out - 0.5, 0): the middle of its part, in patches."""
    reduced = 0
    for size in sizes(300, seed=5):
        for axis in tile_map(size, LESS):
            for i in range(axis.out):
                source = max((i + 0.5) * axis.kept / axis.out - 0.5, 0)
                assert abs(axis.start + source - axis.nearest(i)) <= 0.5 + 1e-9
            assert axis.out == axis.kept or axis.kept > 1.1 * axis.out
            reduced += axis.out < axis.kept
        rows, cols = tile_map(size, LESS)
        assert rows.out * cols.out <= 1.21 * 9 * 16 and rows.start >= 0 and rows.start + rows.kept <= 24
    assert reduced > 200


def test_a_box_around_one_scaled_down_token_holds_it_and_no_far_one():
    size = (900, 700)
    rows, cols = tile_map(size, LESS)
    boxes, slots = patch_boxes(size, LESS), patch_slots(size, LESS)
    assert rows.out < rows.kept and len(boxes) == 16 + rows.out * (cols.out + 1)
    for y, x in ((0, 0), (3, 5), (rows.out - 1, cols.out - 1)):
        i = 16 + y * (cols.out + 1) + x
        x0, y0, x1, y1 = boxes[i].tolist()
        found = patches_in_boxes(size, [(x0, y0, x1 - x0, y1 - y0)], LESS)
        assert found[i] and slots[i, 0] > 0
        near = {16 + b * (cols.out + 1) + a for b in range(y - 1, y + 2) for a in range(x - 1, x + 2)}
        assert {j for j in found.nonzero().flatten().tolist() if j >= 16} <= near


def test_a_wide_photo_is_padded_to_a_square_and_a_white_one_has_grey_borders():
    view, = views(Image.new("RGB", (400, 200), "white"), PAD)
    rows = np.asarray(view)[:, 168]
    assert view.size == (336, 336)
    assert (rows[90:246] == 255).all()
    assert (rows[:80] == (122, 116, 104)).all() and (rows[256:] == (122, 116, 104)).all()


def test_transformers_variant_cuts_the_centre_out_where_the_original_pads():
    image = Image.new("RGB", (400, 200), "white")
    assert (np.asarray(views(image, EVERY["pad hf"])[0]) == 255).all()
    assert best_canvas((300, 300), ANYRES) == (336, 672)            # a tie: each reads the list its own way
    assert best_canvas((300, 300), EVERY["anyres hf"]) == (672, 336)


def test_a_box_partly_outside_the_photo_is_cut_off_at_its_border():
    whole = patches_in_boxes((500, 375), [(400, 300, 99, 74)], PAD)
    assert torch.equal(patches_in_boxes((500, 375), [(400, 300, 900, 900)], PAD), whole)
    assert whole.any()


@pytest.mark.parametrize("box", [(90, 0, 5, 5), (0, 0, -1, 5)])
def test_a_box_that_lies_outside_the_photo_is_refused(model, box):
    prompt = model("llava-1.5").prompt("Is it red?", world.picture(90, 60))
    with pytest.raises(ValueError, match="outside"):
        token_groups(prompt, boxes=[box])


def test_two_boxes_give_the_union_of_their_patches():
    a, b = (10, 20, 100, 50), (300, 200, 60, 90)
    for g in (PAD, ANYRES):
        of_a, of_b = (patches_in_boxes((500, 375), [box], g) for box in (a, b))
        assert torch.equal(patches_in_boxes((500, 375), [a, b], g), of_a | of_b)
