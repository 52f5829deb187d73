"""
views.py - photo <-> patches: how LLaVA cuts a photo into square views, and which part of it each image token shows.

Needs   torch, numpy, pillow. Nothing else of this repo: copy it and it works.
Use     g = Geometry(336, 14)                     LLaVA-1.5: one view of 336 px, patches of 14 px
        views(photo, g)                           the square pictures that go into the vision tower
        patch_boxes(photo.size, g)                where each image token lies on the photo
Matches the original LLaVA (mm_utils.py, llava_arch.py) and the paper's object patches  (tests/test_golden.py)
Paper   LLaVA-1.5, https://arxiv.org/abs/2310.03744; which patches hold an object: https://arxiv.org/abs/2411.18620

    "pad" (LLaVA-1.5)            "anyres" (LLaVA-1.6, NeXT): the whole photo squeezed, then tiles of a larger copy

    +-------------+              +-----+   +-----+-----+     Image tokens: the squeezed view's patches, then the tiles'
    |/////////////|              |photo|   |//tile/tile|     as one map, row by row. Rows (or columns) of padding are
    |    photo    |   ->  1 view |     | , |   photo   |     cut off ("unpad"), and a newline token ends each row.
    |             |              +-----+   +-----+-----+
    |/////////////|                view 0    views 1, 2
    +-------------+

Shapes  N views of one photo  P patches of a view  n image tokens  I side of a view in px

(width, height) and (x, y) everywhere, in px of the photo if nothing else is said; a box is (x, y, width, height).
"""
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Geometry:
    """What decides how a model cuts a photo. ValueError: views that are not made of whole patches, and the like."""
    image: int = 336                               # I, side of a view
    patch: int = 14                                # side of a patch
    aspect: str = "pad"                            # "pad" or "anyres", see above
    pinpoints: tuple = ()                          # anyres: sizes that the canvas of tiles may have
    preprocess: str = "llava"                      # "llava": pad, tile and round as LLaVA; "hf": as transformers
    fill: tuple = (122, 116, 104)                  # RGB of the padding, 0 to 255: CLIP's mean colour
    most: int | None = None                        # anyres: a map of more views' patches than this is scaled down

    def __post_init__(self):
        if not 0 < self.patch <= self.image:
            raise ValueError(f"a view of {self.image} px has no patch of {self.patch} px")
        whole = all(len(p) == 2 and all(type(v) is int and v > 0 and v % self.image == 0 for v in p)
                    and p[0] * p[1] <= 100 * self.image ** 2 for p in self.pinpoints[:1000])
        if self.aspect == "anyres" and not (self.pinpoints and whole):
            raise ValueError(f"image_grid_pinpoints {self.pinpoints}: not pairs of multiples of {self.image} px, "
                             "at most 100 views")

    @property
    def side(self):
        """Patches along one side of a view: 24 for 336 / 14. Of 384 px, the last 6 are in none of 27."""
        return self.image // self.patch


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")     # Pillow's rarer decoders are not hardened
MOST = 100_000_000                                 # pixels of the page that a photo is padded or scaled to


def open_image(file):
    """A photo's file -> PIL RGB image, upright. ValueError: it is missing, broken, too large or no photo.

    Of an animation, the first frame. What is transparent shows the colour that is stored beneath, as in LLaVA's code.
    """
    if not Path(file).is_file():                                    # a pipe would be waited for, a device read for ever
        raise ValueError(f"{file}: " + ("not a file" if Path(file).exists() else "no such picture"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=FORMATS) as image:
                return to_rgb(ImageOps.exif_transpose(image))       # cameras store the rotation beside the pixels
        except UnidentifiedImageError:
            raise ValueError(f"{file} is not a picture, or not {', '.join(FORMATS)}") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"{file} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down first") from None
        except MemoryError:
            raise
        except Exception as e:                                      # each decoder raises errors of its own kind
            raise ValueError(f"{file} cannot be read as a picture: {e}") from None


def to_rgb(image):
    """A PIL image of any mode -> RGB. ValueError: it is no image; its pixels have no natural range (modes I and F)."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"a photo is given as a path or a PIL image, not as {type(image).__name__}")
    if image.mode.startswith("I;16"):                               # 16-bit grey: convert() would clip it to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode!r}; save it with 8 bits a channel")
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------- photo -> views

def best_canvas(size, g):
    """AnyRes: the canvas (W, H) that keeps most of the photo; on a tie, the one with least empty area (mm_utils.py)."""
    w, h = size
    canvases = [(b, a) if g.preprocess == "hf" else (a, b) for a, b in g.pinpoints]  # transformers: (height, width)

    def merit(canvas):
        scale = min(canvas[0] / w, canvas[1] / h)
        kept = min(int(w * scale) * int(h * scale), w * h)          # enlarging a photo adds no pixels
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)                                 # on a tie, the first in the list


def fit(size, canvas):
    """Scale a photo to fit a canvas: its new size (w, h), and the corner (left, top) at which it is centred."""
    (w, h), (W, H) = size, canvas
    new = (W, min(math.ceil(h * (W / w)), H)) if W / w < H / h else (min(math.ceil(w * (H / h)), W), H)
    return new, ((W - new[0]) // 2, (H - new[1]) // 2)


def crop(size, side):
    """transformers' LLaVA-1.5 scales the short edge to `side` and cuts out the centre: new size, corner of the cut."""
    w, h = size
    new = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    return new, ((new[0] - side) // 2, (new[1] - side) // 2)


def views(image, g, fill=None):
    """A PIL image -> its N square PIL views of I px. fill: the padding, in the image's mode (the geometry's colour).

    The same code runs on photos and on the one-channel masks that find the patches inside a box. ValueError: the photo
    is so long and narrow that the padded page would not fit into memory.
    """
    I, (w, h) = g.image, image.size
    W, H = crop(image.size, I)[0] if g.preprocess == "hf" else (max(w, h), max(w, h))
    if g.aspect == "pad" and W * H > MOST:
        raise ValueError(f"a photo of {w}x{h} px needs a page of {W}x{H}, more than {MOST:,} pixels; scale it down "
                         "or cut it first")
    if g.aspect == "anyres":
        W, H = best_canvas(image.size, g)
        new, corner = fit(image.size, (W, H))
        canvas = Image.new(image.mode, (W, H))                        # black
        canvas.paste(image.resize(new, BICUBIC), corner)
        tiles = [canvas.crop((x, y, x + I, y + I)) for y in range(0, H, I) for x in range(0, W, I)]
        return [image.resize((I, I), BICUBIC), *tiles]              # view 0 is the whole photo, squeezed
    if g.preprocess == "hf":
        new, (x, y) = crop(image.size, I)
        return [image.resize(new, BICUBIC).crop((x, y, x + I, y + I))]
    side = max(w, h)
    square = Image.new(image.mode, (side, side), g.fill if fill is None else fill)
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    return [square.resize((I, I), BICUBIC)]


# ---------------------------------------------------------------------------------------------------- image tokens

def patch_slots(size, g):
    """Which patch each image token shows: int (n, 3) of view, row, column; (-1, -1, -1) is a newline token.

    Where the map of tiles is scaled down, a token shows more than a patch: it gets the one in its middle.

    A photo of 2 : 1 with pinpoints of 2 x 2 views, 3 x 3 patches a view, gets

        view 0, squeezed     the tiles as one map of 6 x 6 patches, after unpad
        0  1  2              .  .  .  .  .  .
        3  4  5              9  10 11 12 13 14  newline 15      the photo fills half of the canvas's height: the
        6  7  8              16 ...          21  newline 22      rows marked "." are padding and give no token
                             ...
    """
    p = g.side
    slots = [(0, row, col) for row in range(p) for col in range(p)]
    if g.aspect == "anyres":
        rows, cols = tile_map(size, g)
        for row in map(rows.nearest, range(rows.out)):
            slots += [(1 + row // p * cols.views + col // p, row % p, col % p)
                      for col in map(cols.nearest, range(cols.out))] + [(-1, -1, -1)]
    return torch.tensor(slots)


@dataclass(frozen=True)
class Axis:
    """Rows (or columns) of the map of all tiles: those patches that are not padding, and how many tokens they become.

    Token i's part of the axis begins at patch start + i * step, and is as long as step: 1, if nothing is scaled down.
    """
    start: int                                     # first patch that is kept, counted over all tiles
    kept: int                                      # patches that are kept
    out: int                                       # tokens
    views: int                                     # tiles

    @property
    def step(self):
        return max(self.kept, 1) / max(self.out, 1)             # 1 where padding leaves nothing

    def nearest(self, i):
        """The patch in the middle of token i's part."""
        return self.start + int((i + 0.5) * self.step)


def tile_map(size, g):
    """AnyRes: the map of all tiles' patches, after unpad -> (rows, columns), an Axis each.

    OneVision (g.most) scales a map of more than `most` views' patches down, to fit; llava_onevision.py does it.
    """
    (w, h), (across, down), p = size, (px // g.image for px in best_canvas(size, g)), g.side
    wide, high = across * p, down * p                               # in patches
    rows, cols = [0, high], [0, wide]                               # first, and how many
    exact = (lambda x: round(x, 7)) if g.preprocess == "hf" else (lambda x: x)  # transformers rounds before int()
    if w / h > wide / high:                                         # padding above and below the photo
        cut = (high - int(exact(h * (wide / w)))) // 2
        rows = [cut, high - 2 * cut]
    else:                                                           # padding left and right of it
        cut = (wide - int(exact(w * (high / h)))) // 2
        cols = [cut, wide - 2 * cut]
    times = math.sqrt(rows[1] * cols[1] / (g.most * p ** 2)) if g.most else 1
    times = times if times > 1.1 else 1                             # the original's threshold
    return Axis(*rows, int(rows[1] // times), down), Axis(*cols, int(cols[1] // times), across)


def slot_rows(slots, side):
    """slots (n, 3) -> each token's row in the flattened features of all views, (n,); -1 for a newline.

    features (N P, C) with the newline vector appended as the last row, indexed by this, are the image tokens.
    """
    view, row, col = slots.unbind(1)
    return torch.where(view < 0, -1, view * side ** 2 + row * side + col)


def affine(size, g):
    """The way back: for each view (sx, sy, dx, dy) with  photo x = sx * view x + dx,  photo y = sy * view y + dy."""
    (w, h), I = size, g.image
    if g.aspect == "anyres":
        W, H = best_canvas(size, g)
        new, (left, top) = fit(size, (W, H))
        sx, sy = w / new[0], h / new[1]
        tiles = [(sx, sy, sx * (x - left), sy * (y - top)) for y in range(0, H, I) for x in range(0, W, I)]
        return [(w / I, h / I, 0, 0), *tiles]
    if g.preprocess == "hf":
        new, (x, y) = crop(size, I)
        return [(w / new[0], h / new[1], x * w / new[0], y * h / new[1])]
    side = max(w, h)
    return [(side / I, side / I, -((side - w) // 2), -((side - h) // 2))]


def patch_boxes(size, g):
    """Where each image token lies on the photo: float (n, 4) of x0, y0, x1, y1; NaN for newlines and padding.

    The place of a patch; where the map of tiles is scaled down, of the token's part of it, see Axis.
    """
    slots, maps = patch_slots(size, g), torch.tensor(affine(size, g))  # (n, 3), (N, 4)
    (w, h), step = size, g.patch
    scale, shift = maps[slots[:, 0], :2], maps[slots[:, 0], 2:]     # a newline's view, -1, reads a row masked below
    corner = slots[:, [2, 1]] * step                                # (n, 2) of x, y in the view
    low, high = scale * corner + shift, scale * (corner + step) + shift
    if g.most:
        rows, cols = tile_map(size, g)
        low[g.side ** 2:], high[g.side ** 2:] = parts_on_photo(rows, cols, maps[1], g)
    limit = torch.tensor([w, h])
    low, high = low.clamp(min=0).minimum(limit), high.clamp(min=0).minimum(limit)
    boxes = torch.cat((low, high), 1)
    boxes[(slots[:, 0] < 0) | (low >= high).any(1)] = math.nan      # nothing of the photo is left of it
    return boxes


def patches_in_boxes(size, boxes, g):
    """Which image tokens show an annotated object: bool (n,), True where the patch has a pixel wholly inside a box.

    A pixel of a view lies wholly inside if a white box on black is still exactly white there after the photo's own
    resizing; a pixel that the box's border crosses comes out grey. This is the paper's rule.
    boxes: list of (x, y, w, h), both edges inclusive; what lies outside the photo is cut off.
    """
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for x, y, w, h in boxes:
        draw.rectangle((max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])), fill=255)
    seen = views(mask, g, fill=g.fill[0])                           # as the paper: red of the fill around the mask
    p, step = g.side, g.patch
    full = np.stack([np.asarray(view)[:p * step, :p * step] == 255 for view in seen])   # without what no patch reads
    inside = torch.from_numpy(full.reshape(-1, p, step, p, step).any((2, 4))).flatten()  # (N P,)
    rows = slot_rows(patch_slots(size, g), p)
    related = inside[rows] & (rows >= 0)
    if g.most:
        related[p ** 2:] = parts_with(full[1:], *tile_map(size, g), step)
    return related


# ---------------------------------------------------------------------------------------------------- scaled down

def parts_on_photo(rows, cols, way, g):
    """Where the tokens of a map of tiles lie on the photo, newlines included -> low and high corner, float (n, 2) each.

    way: from px of the canvas to px of the photo, see `affine`. A part that ends with a tile ends with its last patch.
    """
    def ends(axis):
        at = torch.arange(axis.out + 1, dtype=torch.float64) * axis.step    # in patches, over all tiles
        at = (axis.start + at).round(decimals=9)
        tile = (at / g.side).floor()
        low = tile * g.image + (at - tile * g.side) * g.patch       # in px of the canvas
        last = (at == tile * g.side) & (at > 0)
        high = torch.where(last, (tile - 1) * g.image + g.side * g.patch, low)
        return low[:-1], high[1:]
    (y0, y1), (x0, x1) = ends(rows), ends(cols)
    x0, x1 = (torch.cat((x, x.new_zeros(1))) for x in (x0, x1))     # a newline's place, which patch_boxes takes out
    low, high = (torch.stack(torch.broadcast_tensors(x, y[:, None]), -1).view(-1, 2).float()
                 for x, y in ((x0, y0), (x1, y1)))
    return way[:2] * low + way[2:], way[:2] * high + way[2:]


def parts_with(full, rows, cols, step):
    """Which tokens of a map of tiles have a pixel that is True in full (N, p step, p step) -> bool (n,), False for a
    newline. A pixel belongs to the token whose part its middle lies in."""
    side = full.shape[1]
    whole = full.reshape(rows.views, cols.views, side, side).swapaxes(1, 2).reshape(rows.views * side, -1)

    def token_of(axis, length):                                     # of each pixel along an axis; out of range: padding
        return np.floor(((np.arange(length) + 0.5) / step - axis.start) / axis.step)
    ys, xs = token_of(rows, whole.shape[0]), token_of(cols, whole.shape[1])
    found = np.zeros((rows.out, cols.out + 1), dtype=bool)
    for y in range(rows.out):
        line = whole[ys == y].any(0)                                # (tiles side,)
        found[y, :-1] = [line[xs == x].any() for x in range(cols.out)]
    return torch.from_numpy(found).flatten()
