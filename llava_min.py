"""
llava_min.py - LLaVA-1.5, LLaVA-1.6 and Llama3-LLaVA-NeXT: a picture and a question become one residual stream.

Needs   torch, safetensors, tokenizers, pillow, numpy, and beside it clip_vit.py, vicuna.py and llama3.py;
        huggingface_hub to fetch a published model.
Run     python llava_min.py --model llava-1.5-7b --image photo.jpg --question "Is the cup red or blue?"
Matches the original LLaVA (haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT)  (tests/test_golden.py)
Paper   LLaVA-1.5, https://arxiv.org/abs/2310.03744; token groups as in https://arxiv.org/abs/2411.18620

    photo ──> views ──> CLIP ──> projector ──┐
    question ──> template ──> token ids ─────┴──> prompt, embeddings (1, T, C) + token groups ──> decoder ──> logits

Shapes  B batch (1)  T tokens  C width  V vocabulary  N views of one photo  P patches of a view  I side of a view in px

Left out on purpose: several images or turns in one prompt, batches, training.
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, groupby
from pathlib import Path

import torch
from torch import nn

import clip_vit
import llama3
import vicuna

IMAGE = -200                                       # the id that stands for the picture until its patches are spliced in

MODELS = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
          "llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
          "llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
          "llama3-llava-next-8b": "llava-hf/llama3-llava-next-8b-hf", "vicuna-1.5-13b": "lmsys/vicuna-13b-v1.5"}
BUNDLED = {name: Path(__file__).resolve().parent / "tiny" / name for name in ("llava-tiny", "llava-tiny-anyres")}

# The words around the user's message, as LLaVA's conversation.py has them: (before, after). The end-of-prompt newline
# of the second is the paper's own addition (its code appends " \n" to the whole prompt of llama3-llava-next-8b).
VICUNA_V1 = ("A chat between a curious user and an artificial intelligence assistant. "
             "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ", " ASSISTANT:")
LLAVA_LLAMA_3 = ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
                 "You are a helpful language and vision assistant. You are able to understand the visual content "
                 "that the user provides, and assist the user with a variety of tasks using natural language."
                 "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
                 "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n")
INSTRUCTION = " \nAnswer the question using a single word or phrase."  # the paper's, with its space before the newline


# ---------------------------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class Config:
    text: vicuna.Config | llama3.Config
    vision: clip_vit.Config | None = None          # None: a text-only model (Vicuna-1.5)
    aspect: str = "pad"                            # "pad": one square view (1.5); "anyres": photo + tiles (1.6, NeXT)
    pinpoints: tuple = ()                          # tile canvases AnyRes may choose from, (width, height) in px
    layer: int = -2                                # which hidden state of the vision tower is read
    preprocess: str = "llava"                      # "llava": the original's pixels; "hf": transformers' own variant

    @classmethod
    def from_json(cls, raw, tower=None):
        """The checkpoint's config.json, in the original LLaVA or the transformers layout, as a dict -> Config.

        tower: the vision tower's own config as a dict, where the checkpoint's does not describe it (original layout).
        ValueError names a setting that would change the arithmetic.
        """
        if "text_config" in raw:
            return cls.from_hf(raw)
        if not raw.get("mm_vision_tower"):
            return cls(decoder_file(raw).Config.from_json(raw))
        aspect = raw.get("image_aspect_ratio") or "square"
        check({"mm_patch_merge_type": "flat", **raw}, mm_projector_type="mlp2x_gelu", mm_vision_select_feature="patch",
              mm_use_im_start_end=False, mm_use_im_patch_token=False, mm_resampler_type=None,
              mm_patch_merge_type="spatial_unpad" if aspect == "anyres" else "flat")
        if aspect not in ("pad", "anyres"):
            raise ValueError(f"config.json sets image_aspect_ratio={aspect!r}; pad and anyres are implemented")
        return cls(decoder_file(raw).Config.from_json(raw), clip_vit.Config.from_json(tower), aspect,
                   tuple(map(tuple, raw.get("image_grid_pinpoints") or ())), raw.get("mm_vision_select_layer", -2))

    @classmethod
    def from_hf(cls, raw):
        check(raw, vision_feature_select_strategy="default", projector_hidden_act="gelu", quantization_config=None,
              multimodal_projector_bias=True, use_image_newline_parameter=True, tie_word_embeddings=False)
        kind, layer = raw.get("model_type"), raw.get("vision_feature_layer", -2)
        if kind not in ("llava", "llava_next") or not isinstance(layer, int):
            raise ValueError(f"config.json sets model_type={kind!r}, vision_feature_layer={layer!r}; "
                             "llava and llava_next with one layer are implemented")
        text = dict(raw.get("text_config") or {})
        tower = raw.get("vision_config") or {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                                             "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
        # The conversion gave <image> the first id after the real vocabulary and padded the tables to a multiple of 64
        # with random rows: cutting them off here keeps them out of every softmax.
        text["vocab_size"] = raw.get("image_token_index", raw.get("image_token_id", 32000))
        pinpoints = raw.get("image_grid_pinpoints") or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        return cls(decoder_file(text).Config.from_json(text), clip_vit.Config.from_json(tower),
                   "anyres" if kind == "llava_next" else "pad", tuple(map(tuple, pinpoints)), layer)


def validate(c):
    """ValueError names a size that no model can have."""
    parts = [c.text] + [c.vision] * bool(c.vision)
    bad = {k: v for part in parts for k, v in vars(part).items() if isinstance(v, bool) or not v > 0}
    if bad or any(part.width % part.heads for part in parts) or c.text.width // c.text.heads % 2:
        raise ValueError(f"its sizes do not make a model: {bad or parts}")
    if c.vision and (type(c.layer) is not int or not -c.vision.layers - 1 <= c.layer <= c.vision.layers):
        raise ValueError(f"vision layer {c.layer!r} is not one of the tower's {c.vision.layers}")
    if c.vision and c.vision.image % c.vision.patch:
        raise ValueError(f"a view of {c.vision.image} px is not made of patches of {c.vision.patch}")
    if c.aspect == "anyres" and not (c.pinpoints and all(
            len(p) == 2 and all(type(v) is int and v > 0 and v % c.vision.image == 0 for v in p) for p in c.pinpoints)):
        raise ValueError(f"image_grid_pinpoints {c.pinpoints} are not multiples of the view's {c.vision.image} px")


def decoder_file(raw):
    """Grouped keys mean llama3.py, else vicuna.py: read from the config's numbers, never from a name."""
    heads = raw.get("num_attention_heads", 32)
    return vicuna if (raw.get("num_key_value_heads") or heads) == heads else llama3


def check(raw, **plain):
    odd = {key: raw[key] for key, value in plain.items() if raw.get(key) not in (None, value)}
    if odd:
        raise ValueError(f"config.json sets {odd}; only {({key: plain[key] for key in odd})} is implemented")


# ---------------------------------------------------------------------------------------------------- photo -> views

def open_image(file):
    """A picture file -> PIL RGB image, upright. ValueError names a file that is missing, broken, huge or no picture."""
    import warnings

    from PIL import Image, ImageOps, UnidentifiedImageError
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16"):                   # 16-bit grey: convert() would clip it to white
                    import numpy as np
                    image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
                if image.mode in ("I", "F"):
                    raise ValueError(f"its pixels are of Pillow's mode {image.mode!r}; save it with 8 bits a channel")
                return image.convert("RGB")
        except FileNotFoundError:
            raise ValueError(f"{file}: no such picture") from None
        except UnidentifiedImageError:
            raise ValueError(f"{file} is not a picture (or of a kind Pillow cannot read)") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"{file} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down first") from None
        except (OSError, SyntaxError, ValueError) as e:             # what Pillow raises for broken data
            raise ValueError(f"{file} cannot be read as a picture: {e}") from None


def best_canvas(size, c):
    """AnyRes: the tile canvas (W, H) that keeps most of the photo's pixels, then wastes least (LLaVA mm_utils.py)."""
    w, h = size
    canvases = [(b, a) if c.preprocess == "hf" else (a, b) for a, b in c.pinpoints]  # transformers: (height, width)

    def merit(canvas):
        scale = min(canvas[0] / w, canvas[1] / h)
        kept = min(int(w * scale) * int(h * scale), w * h)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)                                 # the first of equals


def fit(size, canvas):
    """Size of a photo scaled to fit a canvas, and where it is pasted, centred: (w, h), (left, top)."""
    (w, h), (W, H) = size, canvas
    new = (W, min(math.ceil(h * (W / w)), H)) if W / w < H / h else (min(math.ceil(w * (H / h)), W), H)
    return new, ((W - new[0]) // 2, (H - new[1]) // 2)


def shortest(size, side):
    """transformers' LLaVA-1.5: scale the short edge to `side`, cut out the centre: (w, h), (left, top) of the cut."""
    w, h = size
    new = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    return new, ((new[0] - side) // 2, (new[1] - side) // 2)


def views(image, c, fill=tuple(int(255 * m) for m in clip_vit.MEAN)):
    """A PIL image -> its N square PIL views of I px: 1 for "pad"; the whole photo, then tiles row by row, for AnyRes.

    The same code runs on photos and on the one-channel masks that find the patches inside a box.
    """
    from PIL import Image
    I, BICUBIC = c.vision.image, Image.Resampling.BICUBIC
    w, h = image.size
    if c.aspect == "anyres":
        canvas = best_canvas(image.size, c)
        new, corner = fit(image.size, canvas)
        page = Image.new(image.mode, canvas)                        # black
        page.paste(image.resize(new, BICUBIC), corner)
        tiles = [page.crop((x, y, x + I, y + I)) for y in range(0, canvas[1], I) for x in range(0, canvas[0], I)]
        return [image.resize((I, I), BICUBIC), *tiles]              # the whole photo is squeezed, not padded
    if c.preprocess == "hf":
        new, (x, y) = shortest(image.size, I)
        return [image.resize(new, BICUBIC).crop((x, y, x + I, y + I))]
    side = max(w, h)
    page = Image.new(image.mode, (side, side), fill)
    page.paste(image, ((side - w) // 2, (side - h) // 2))
    return [page.resize((I, I), BICUBIC)]


def affine(size, c):
    """The way back: for each view (sx, sy, dx, dy) with  photo x = sx * view x + dx,  photo y = sy * view y + dy."""
    (w, h), I = size, c.vision.image
    if c.aspect == "anyres":
        W, H = best_canvas(size, c)
        new, (left, top) = fit(size, (W, H))
        sx, sy = w / new[0], h / new[1]
        tiles = [(sx, sy, sx * (x - left), sy * (y - top)) for y in range(0, H, I) for x in range(0, W, I)]
        return [(w / I, h / I, 0, 0), *tiles]
    if c.preprocess == "hf":
        new, (x, y) = shortest(size, I)
        return [(w / new[0], h / new[1], x * w / new[0], y * h / new[1])]
    side = max(w, h)
    return [(side / I, side / I, -((side - w) // 2), -((side - h) // 2))]


def patch_slots(size, c):
    """Which patch each image token shows: int (n, 3) of view, row, column; (-1, -1, -1) is an AnyRes newline.

    n is the number of image tokens of a photo of this size. AnyRes: the whole photo's patches first, then the tiles' as
    one map, cut back to the photo's shape (unpad_image), with a newline after each row (llava_arch.py).
    """
    p, I = c.vision.side, c.vision.image
    slots = [(0, row, col) for row in range(p) for col in range(p)]
    if c.aspect == "anyres":
        (w, h), (W, H) = size, best_canvas(size, c)
        wide, high = W // I * p, H // I * p                         # the map, in patches
        rows, cols = range(high), range(wide)
        exact = (lambda x: round(x, 7)) if c.preprocess == "hf" else (lambda x: x)  # transformers rounds before int()
        if w / h > wide / high:
            cut = (high - int(exact(h * (wide / w)))) // 2
            rows = range(cut, high - cut)
        else:
            cut = (wide - int(exact(w * (high / h)))) // 2
            cols = range(cut, wide - cut)
        for row in rows:
            slots += [(1 + row // p * (W // I) + col // p, row % p, col % p) for col in cols] + [(-1, -1, -1)]
    return torch.tensor(slots)


def patch_boxes(size, c):
    """Where each image token lies: float (n, 4) of x0, y0, x1, y1 in photo px, NaN for newlines and padding."""
    slots, maps = patch_slots(size, c), torch.tensor(affine(size, c))  # (n, 3), (N, 4)
    step, (w, h) = c.vision.patch, size
    scale, shift = maps[slots[:, 0], :2], maps[slots[:, 0], 2:]     # view -1 picks a row that is masked below
    corner = slots[:, [2, 1]] * step                                # (n, 2) of x, y in the view
    low, high = scale * corner + shift, scale * (corner + step) + shift
    limit = torch.tensor([w, h])
    low, high = low.clamp(min=0).minimum(limit), high.clamp(min=0).minimum(limit)
    boxes = torch.cat((low, high), 1)
    boxes[(slots[:, 0] < 0) | (low >= high).any(1)] = math.nan
    return boxes


def patches_in_boxes(size, boxes, c):
    """bool (n,): image tokens whose patch holds a pixel that lies wholly inside a box (the paper's rule).

    boxes: (x, y, w, h) in photo px, edges included, cut off at the photo's border. A pixel lies wholly inside if it is
    still exactly full after the photo's own resizing, whose antialiasing greys every pixel that a border crosses.
    """
    import numpy as np
    from PIL import Image, ImageDraw
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for x, y, w, h in boxes:
        draw.rectangle((max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])), fill=255)
    full = np.stack([np.asarray(view) == 255 for view in views(mask, c, fill=int(255 * clip_vit.MEAN[0]))])  # (N, I, I)
    p, step = c.vision.side, c.vision.patch
    inside = torch.from_numpy(full.reshape(-1, p, step, p, step).any((2, 4)))  # (N, p, p)
    slots = patch_slots(size, c)
    return inside[slots[:, 0], slots[:, 1], slots[:, 2]] & (slots[:, 0] >= 0)


# ---------------------------------------------------------------------------------------------------- words -> spans

IRREGULAR = {"man": "men", "child": "children", "person": "people", "mouse": "mice", "foot": "feet", "tooth": "teeth",
             "goose": "geese", "he": "him", "she": "her", "they": "them"}


def forms(word):
    """A name, then the other shapes it takes in a question: plurals, and the pronouns' object case."""
    found = [word, word + "s", word + "es"]
    for end, plural in {"y": "ies", "f": "ves", "fe": "ves", **IRREGULAR}.items():
        if word.endswith(end) and (end not in ("he", "she", "they") or word == end):
            found.append(word[:len(word) - len(end)] + plural)
    return found


def occurrences(words, text):
    """Character spans [start, end) where `words` stands in text as whole words, whatever the case."""
    return [m.span() for m in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE)]


def name_spans(names, text):
    """Find several names in one question: dict name -> character spans, or a str: why there are none.

    Whole words only ("hat" is not in "What"). If the name itself is absent its plural counts. Longer names are found
    first and keep their words: beside "bed sheet", "bed" means another bed.
    """
    taken, spans = [], {}
    for name in sorted(set(names), key=len, reverse=True):
        hits = next((hits for form in forms(name) if (hits := occurrences(form, text))), [])
        free = [(a, b) for a, b in hits if not any(a < d and c < b for c, d in taken)]
        spans[name] = free or f"{name!r} is not a word of the question"
        taken += free
    return spans


def option_spans(options, text):
    """The options of an "... A or B ..." question -> dict option -> one span in a list, or a str: why there is none.

    An option that stands twice is the one nearest to the word "or"; equally near ones are refused.
    """
    ors, result = occurrences("or", text), {}
    for option, spans in name_spans(options, text).items():
        near = spans if isinstance(spans, str) else sorted(
            (min((max(a - d, c - b) for c, d in ors), default=0), (a, b)) for a, b in spans)
        if isinstance(near, str):
            result[option] = near
        elif len(near) > 1 and near[0][0] == near[1][0]:
            result[option] = f"{option!r} stands more than once in the question"
        else:
            result[option] = [near[0][1]]
    return result


# ---------------------------------------------------------------------------------------------------- token groups

ALIASES = {"central object": "objects", "image central object": "related_patches",
           "image without central object": "other_patches", "image pad": "newlines",
           "image original patch": "base_patches", "image hd patch indice": "tile_patches+newlines",
           "image without central object with pad": "image-related_patches",
           "image central object in hd patch indice": "related_patches-base_patches",
           "image hd patch without central object indice": "tile_patches+newlines-related_patches",
           "question without options": "question_wo_options"}
NAMES = ("image", "question", "last", "true_option", "false_option", "options", "objects", "question_wo_options",
         "question_wo_objects", "related_patches", "other_patches", "captions", "system", "instruction", "newlines",
         "base_patches", "tile_patches")
ATOM = re.compile(r"\s*(text:.+?(?=\s+[+-]\s|$)|[^+-]+?)\s*([+-]|$)", re.IGNORECASE)


class EmptyGroup(ValueError):
    """The group exists but not for this question: a dataset skips the edge, a single question stops."""


def parse_group(text):
    """"image - related_patches" -> [("+", "image"), ("-", "related_patches")]; the paper's own names are understood.

    In `text:WORDS` an operator needs a space on both sides: words may hold hyphens. ValueError lists the legal names.
    """
    terms, at, sign = [], 0, "+"
    while at < len(text) or not terms:
        m = ATOM.match(text, at)
        if not m:
            raise ValueError(f"cannot read the token group {text!r}; write name, a+b or a-b")
        name = m[1] if m[1].lower().startswith("text:") else m[1].lower().replace("_", " ")
        if name.lower().startswith("text:"):
            terms.append((sign, "text:" + name[5:].strip()))
        elif name in ALIASES:
            inner = parse_group(ALIASES[name])
            if "-" in ALIASES[name] and (terms or m[2]):            # x - (a - b) is not x - a + b: no brackets here
                raise ValueError(f"{m[1]!r} is {ALIASES[name]} and cannot be combined further")
            terms += [(sign if s == "+" else s, n) for s, n in inner]
        elif name.replace(" ", "_") in NAMES:
            terms.append((sign, name.replace(" ", "_")))
        else:
            raise ValueError(f"unknown token group {m[1]!r}; the groups are {', '.join(NAMES)}, "
                             "text:WORDS, a+b and a-b")
        at, sign = m.end(), m[2]
        if at == len(text) and sign:
            raise ValueError(f"the token group {text!r} ends in {sign!r}")
    return terms


def canonical(text):
    """The house spelling of a group: canonical("Image Central Object") == "related_patches"."""
    terms = parse_group(text)
    space = " " if any(name.startswith("text:") for _, name in terms) else ""
    return "".join(f"{space}{sign}{space}{name}" for sign, name in terms).removeprefix(f"{space}+{space}")


def parse_edge(text):
    """"Image->Question" -> ("image", "question"): the first group's keys are cut from the second's queries (Eq. 7)."""
    source, arrow, target = text.partition("->")
    if not arrow or not source.strip() or not target.strip():
        raise ValueError(f"cannot read the edge {text!r}; write SOURCE->TARGET, as in image->question")
    return canonical(source.strip()), canonical(target.strip())


@dataclass
class Prompt:
    """One question as the model reads it. T counts the sequence after the picture's patches took their places."""
    text: str                                      # the whole prompt, <image> once if there is a picture
    question: str
    ids: list                                      # token ids; IMAGE where the picture goes
    tokens: list                                   # the T tokens as the vocabulary spells them; "" for patches
    spans: list                                    # T character spans of `text`; None for patches and the added BOS
    start: int = 0                                 # where the question starts in `text`
    groups: dict = field(default_factory=dict)     # name -> sorted positions
    absent: dict = field(default_factory=dict)     # name -> why this question does not have the group
    pixels: torch.Tensor | None = None             # (N, 3, I, I) float32
    slots: torch.Tensor | None = None              # (n, 3), see patch_slots
    size: tuple | None = None                      # the photo's width and height in px

    def __len__(self):
        return len(self.tokens)

    def put(self, name, *parts):
        """Record a group as the union of parts: positions each, or a str that says why there are none."""
        why = next((part for part in parts if isinstance(part, str)), None)
        found = [] if why else sorted({i for part in parts for i in part})
        if found:
            self.groups[name] = found
        else:
            self.absent[name] = why or "no token of this prompt is in it"

    def at(self, start, end):
        """Positions of the tokens that overlap the characters [start, end) of `text`."""
        return [i for i, span in enumerate(self.spans) if span and span[0] < end and start < span[1]]

    def words(self, found):
        """Character spans in the question -> positions; a str (why there are none) passes through."""
        if isinstance(found, str):
            return found
        return [i for a, b in found for i in self.at(self.start + a, self.start + b)]

    def paper_span(self, words):
        """The released code's find_token_range: the first raw substring hit in the joined tokens after the picture.

        -> positions, or a str. Kept for parity: it finds "hat" in "What".
        """
        first = self.groups["image"][-1] + 1 if "image" in self.groups else 0
        pieces = [re.sub("[▁Ġ]", " ", t).replace("Ċ", "\n") for t in self.tokens[first:]]
        start = "".join(pieces).find(words)
        ends = list(accumulate(map(len, pieces)))
        hit = [first + i for i, end in enumerate(ends) if end > start and end - len(pieces[i]) < start + len(words)]
        return hit if start >= 0 else f"{words!r} is not in the question"

    def table(self, extra=()):
        """The token groups as text: name, number of tokens, positions, what they say. extra: groups of one's own."""
        lines = [("group", "tokens", "positions", "text")]
        for name in (*NAMES, *extra):
            try:
                found = self.positions(name)
            except EmptyGroup as e:
                lines.append((name, "0", "-", "(" + str(e).partition(": ")[2] + ")"))
                continue
            runs = [[i for _, i in run] for _, run in groupby(enumerate(found), key=lambda pair: pair[1] - pair[0])]
            places = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
            spans = [[s for s in map(self.spans.__getitem__, run) if s] for run in runs]
            words = [self.text[s[0][0]:s[-1][1]].strip(" ") for s in spans if s]
            lines.append((name, str(len(found)), clip(places, 44), clip(" | ".join(words), 60)))
        wide = [max(len(line[i]) for line in lines) for i in range(3)]
        head = f"{len(self)} tokens" + (f", photo {self.size[0]}x{self.size[1]}" if self.size else "")
        rows = (f"{a:{wide[0]}}  {b:>{wide[1]}}  {c:{wide[2]}}  {d}".rstrip() for a, b, c, d in lines)
        return "\n".join([head, *rows])

    def positions(self, text):
        """A group's sorted positions. ValueError: no such group; EmptyGroup: not for this question, and why."""
        chosen = set()
        for sign, name in parse_group(text):
            if name.startswith("text:"):
                found = self.words(occurrences(name[5:], self.question))
                if not found:
                    raise EmptyGroup(f"{name}: not whole words of the question {self.question!r}")
            elif name not in self.groups:
                raise EmptyGroup(f"{name}: {self.absent.get(name, 'this prompt has no image')}")
            else:
                found = self.groups[name]
            chosen = chosen.union(found) if sign == "+" else chosen.difference(found)
        if not chosen:
            raise EmptyGroup(f"{text}: no token of this prompt is in it")
        return sorted(chosen)


def clip(text, width):
    text = repr(text)[1:-1]                                         # newlines as \\n
    return text if len(text) <= width else text[:width // 2 - 2] + " .. " + text[-(width - width // 2 - 2):]


def tokenize(tokenizer, text, bos):
    """Prompt text -> (ids, character spans), each piece around <image> on its own as the original does.

    tokenizer_image_token (LLaVA mm_utils.py) encodes each piece with special tokens and, if the first then starts with
    BOS, takes the first id off every piece and puts one BOS in front. Two consequences are kept: a Llama-2 piece has
    its own leading space, and a Llama-3 tokenizer that adds BOS gives two (the template holds one), while one that
    does not loses the newline after the picture.
    """
    pieces = text.split("<image>")
    encoded = [tokenizer.encode(piece) for piece in pieces]
    drop = int(encoded[0].ids[:1] == [bos])
    ids, spans, at = [bos] * drop, [None] * drop, 0
    for i, (piece, e) in enumerate(zip(pieces, encoded, strict=True)):
        if i:
            ids, spans, at = ids + [IMAGE], spans + [None], at + len("<image>")
        ids += e.ids[drop:]
        spans += [(a + at, b + at) for a, b in e.offsets[drop:]]
        at += len(piece)
    return ids, spans


# ---------------------------------------------------------------------------------------------------- the model

class LLaVA(nn.Module):
    """Vision tower, projector and decoder, with the original's parameter names. `load` fills one."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.decoder = self.decoder_file.Decoder(c.text)
        if c.vision:
            self.vision_tower = clip_vit.CLIP(c.vision)
            self.mm_projector = nn.Sequential(nn.Linear(c.vision.width, c.text.width), nn.GELU(),
                                              nn.Linear(c.text.width, c.text.width))
        if c.aspect == "anyres":
            self.image_newline = nn.Parameter(torch.zeros(c.text.width))
        self.tokenizer, self.stop, self.source = None, set(), None  # set by `load`

    @property
    def device(self):
        return self.decoder.norm.weight.device

    # -------- question -> prompt

    def prompt(self, question, image=None, *, true_option=None, false_option=None, options=(), objects=(), boxes=(),
               captions=None, brief=True, instruction=INSTRUCTION, paper_spans=False):
        """A question about a PIL image (None for a text-only model) -> Prompt with its token groups.

        true_option, false_option: the right and the wrong one of an "A or B" question; options: both, where nobody says
        which is right. objects: names in the question; boxes: (x, y, w, h) px of what they show. captions: text in the
        picture's place (appendix G). brief: ask for one word, with `instruction`; where that is the paper's own, end
        as its code does. paper_spans: find words as its code does.
        ValueError: an image for a text-only model or none for another, a box outside the photo, a prompt too long.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        question.encode()                                           # ValueError: a shell's bytes that are no text
        if "<image>" in question:
            raise ValueError("the question holds <image>, which stands for the picture; leave it out")
        if (image is None) == bool(self.config.vision):
            raise ValueError("this model needs an image" if image is None else
                             "this model is text-only: it takes no image")
        llama_3 = self.tokenizer.token_to_id("<|start_header_id|>") is not None
        before, after = LLAVA_LLAMA_3 if llama_3 else VICUNA_V1
        instruction = instruction if brief else ""
        if instruction != INSTRUCTION:
            after = after.removesuffix(" \n")                       # the paper's addition, too
        context = "<image>\n" if image is not None else f"{captions}\n" if captions else ""
        text = before + context + question + instruction + after
        ids, spans = tokenize(self.tokenizer, text, self.tokenizer.token_to_id(self.decoder_file.BOS))
        p = Prompt(text, question, ids, ["" if i == IMAGE else self.tokenizer.id_to_token(i) for i in ids], spans)
        if image is not None:
            self.place_image(p, image, boxes)
        if max(ids) >= self.config.text.vocab:
            raise ValueError(f"the tokenizer gives id {max(ids)}, the model knows {self.config.text.vocab}: "
                             "they are not of one model")
        if len(p) > self.config.text.positions:
            raise ValueError(f"the prompt has {len(p)} tokens, the model takes {self.config.text.positions}")

        p.start = len(before) + len(context)
        end = p.start + len(question)
        p.put("system", range(p.groups["image"][0] if image is not None else p.at(len(before), len(text))[0]))
        p.put("captions", [] if image is not None or not captions else p.at(len(before), len(before) + len(captions)))
        p.put("question", p.paper_span(question) if paper_spans else p.at(p.start, end))
        p.put("instruction", p.at(end, end + len(instruction)))
        p.put("last", [len(p) - 1])
        self.name_words(p, true_option, false_option, [o for o in (true_option, false_option, *options) if o], objects,
                        paper_spans)
        return p

    def name_words(self, p, true_option, false_option, options, objects, paper_spans):
        """Record the groups of single words, and the question without them."""
        if paper_spans:
            option = word = {w: p.paper_span(w) for w in (*options, *objects)}
        else:
            option = {w: p.words(found) for w, found in option_spans(options, p.question).items()}
            word = {w: p.words(found) for w, found in name_spans(objects, p.question).items()}
        unknown = "the question has no options, or it is not known which is right (--options A,B --answer A tell)"
        p.put("true_option", option[true_option] if true_option else unknown)
        p.put("false_option", option[false_option] if false_option else unknown)
        p.put("options", *(option[w] for w in options) if options else [
            "the question has no options (--options A,B tells)"])
        p.put("objects", *(word[w] for w in objects) if objects else [
            "no object is named for this question (--object WORDS tells)"])
        for part in ("options", "objects"):
            rest = set(p.groups.get("question", ())) - set(p.groups.get(part, ()))
            p.put(f"question_wo_{part}", p.absent.get(part) or rest)

    def place_image(self, p, image, boxes):
        """Give the picture its positions in p, in place of IMAGE, and record the groups of patches."""
        c, (w, h) = self.config, image.size
        for x, y, wide, high in boxes:
            if wide < 0 or high < 0 or x >= w or y >= h or x + wide < 0 or y + high < 0:
                raise ValueError(f"box {x},{y},{wide},{high} (x,y,w,h) lies outside the {w}x{h} image")
        first, p.size = p.ids.index(IMAGE), image.size
        p.pixels = torch.stack([clip_vit.to_pixels(view) for view in views(image, c)])
        p.slots = patch_slots(image.size, c)
        n, view = len(p.slots), p.slots[:, 0]
        p.tokens[first:first + 1], p.spans[first:first + 1] = [""] * n, [None] * n

        def at(chosen):
            return (chosen.nonzero().flatten() + first).tolist()
        p.put("image", range(first, first + n))
        p.put("base_patches", at(view == 0))
        p.put("tile_patches", at(view > 0) or "only AnyRes models have tiles")
        p.put("newlines", at(view < 0) or "only AnyRes models have newlines")
        related = patches_in_boxes(image.size, boxes, c) if boxes else None
        unknown = "the question has no annotated box (--box X,Y,W,H tells)"
        p.put("related_patches",
              unknown if related is None else at(related) or "no patch has a pixel wholly inside a box")
        p.put("other_patches", unknown if related is None else at(~related & (view >= 0)))

    @property
    def decoder_file(self):
        return vicuna if isinstance(self.config.text, vicuna.Config) else llama3

    # -------- prompt -> residual stream -> logits

    def image_features(self, p):
        """Prompt -> its image tokens (n, C): patch features through the projector, newline vectors between rows.

        The tower runs in its own dtype, see `load`.
        The reference rounds pixels to the decoder's dtype first; ours does not.
        """
        tower, newline = self.vision_tower, getattr(self, "image_newline", None)
        features = tower(p.pixels.to(self.device), self.config.layer)[:, 1:]  # (N, P, vision C), class token dropped
        features = self.mm_projector(features.to(self.decoder.norm.weight.dtype)).flatten(0, 1)  # (N P, C)
        if newline is not None:
            features = torch.cat((features, newline[None]))         # its row is the last
        view, row, col = p.slots.to(self.device).unbind(1)
        side = self.config.vision.side
        return features[torch.where(view < 0, len(features) - 1, view * side ** 2 + row * side + col)]

    @torch.inference_mode()
    def patch_norms(self, p):
        """Prompt -> L2 norm of the tower's feature of each image token, (n,) float32; NaN for newlines (figure 15)."""
        norms = self.vision_tower(p.pixels.to(self.device), self.config.layer)[:, 1:].float().norm(dim=-1).flatten()
        view, row, col = p.slots.to(self.device).unbind(1)
        side = self.config.vision.side
        at = (view * side ** 2 + row * side + col).clamp(min=0)
        return norms[at].masked_fill(view < 0, math.nan)

    @torch.inference_mode()
    def embed(self, p):
        """Prompt -> embeddings (1, T, C): the residual stream at layer 0, h^0."""
        def words(ids):
            return self.decoder.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        if IMAGE not in p.ids:
            return words(p.ids)[None]
        cut = p.ids.index(IMAGE)
        return torch.cat((words(p.ids[:cut]), self.image_features(p), words(p.ids[cut + 1:])))[None]

    def forward(self, p, mask=None):
        """Prompt -> logits (1, T, V). mask: additive, broadcastable to (1, H, T, T); None is plain causal."""
        return self.decoder.lm_head(self.decoder.norm(self.decoder(self.embed(p), mask)))

    @torch.inference_mode()
    def prefill(self, x, mask=None):
        """Embeddings x (1, T, C) -> (logits of the last position (V,), caches for `decode`)."""
        caches = [[] for _ in self.decoder.layers]
        h = self.decoder(x, mask, caches)
        return self.decoder.lm_head(self.decoder.norm(h[0, -1])), caches

    @torch.inference_mode()
    def decode(self, logits, caches, max_new_tokens):
        """Greedy decoding after `prefill`, which it continues in place -> list of ids, without the end token.

        FloatingPointError: the logits are not numbers.
        """
        ids, room = [], self.config.text.positions - caches[0][0].shape[2]
        while len(ids) < min(max_new_tokens, room):
            if not logits.isfinite().all():
                raise FloatingPointError("non-finite logits: the weights are broken or --dtype is too narrow for them; "
                                         "try --dtype bfloat16 or float32")
            best = logits.argmax(-1).item()
            if best in self.stop:
                break
            ids.append(best)
            if len(ids) < max_new_tokens:
                x = self.decoder.embed_tokens(torch.tensor([[best]], device=self.device))
                logits = self.decoder.lm_head(self.decoder.norm(self.decoder(x, None, caches)[0, -1]))
        return ids

    def generate(self, p, max_new_tokens=16):
        """Prompt -> greedy answer as text."""
        return self.words(self.decode(*self.prefill(self.embed(p)), max_new_tokens))

    def words(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------------- finding the files

WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # not timm's, which lie beside


@dataclass
class Files:
    """Everything a load needs, found before anything is loaded. Paths are local."""
    name: str                                      # what was asked for
    origin: str                                    # the hub id or the folder it came from
    revision: str | None = None                    # the hub commit
    config: Path | None = None
    tokenizer: Path | None = None
    generation: Path | None = None
    weights: list = field(default_factory=list)
    tower: "Files | None" = None                   # the vision tower's config, and its weights if needed


def pick(get, kind):
    """A checkpoint's files by get(name) -> Path or None -> (Files fields, names that are missing).

    kind: "model"; "tower" for a vision tower; "tower config" for its config alone.
    """
    found, missing = {}, []

    def first(slot, *names, need=True):
        found[slot] = next((path for name in names if (path := get(name))), None)
        if need and not found[slot]:
            missing.append(" or ".join(names))

    if kind == "model":
        first("config", "config.json")
        first("tokenizer", "tokenizer.json", "tokenizer.model")
        first("generation", "generation_config.json", need=False)
    else:
        first("config", "open_clip_config.json", "config.json")
    open_clip = found["config"] and found["config"].name == "open_clip_config.json"
    index = next((path for name in (OPEN_CLIP_WEIGHTS if open_clip else WEIGHTS) if (path := get(name))), None)
    if kind == "tower config":
        found["weights"] = []
    elif index is None:
        missing.append("model.safetensors, or its index and shards")
    elif index.suffix == ".json":
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{index} is not an index of shards ({e})") from e
        found["weights"] = [get(shard) for shard in shards]
        missing += [shard for shard, path in zip(shards, found["weights"], strict=True) if not path]
    else:
        found["weights"] = [index]
    return found, missing


def find(name, kind="model", revision=None):
    """A folder or a hub id -> Files; what the cache lacks is downloaded. ValueError says what is missing."""
    folder = BUNDLED.get(name) or Path(os.path.expanduser(name))    # Path's own raises where there is no such user
    if name and folder.is_dir():
        if revision:
            raise ValueError(f"--revision {revision}: {name} is a folder, and only the hub keeps revisions")
        found, missing = pick(lambda f: folder / f if (folder / f).is_file() else None, kind)
        if not missing:
            return Files(name, str(folder), **found)
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    if name in BUNDLED:
        raise ValueError(f"{name} lies in the llava-flow repository, but not in {folder}; get tiny/ from there, too")
    repo = MODELS.get(name, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or name.startswith("."):
        raise ValueError(f"{name or 'an empty name'} is neither a folder, a hub id (owner/name), nor one of "
                         f"{', '.join([*BUNDLED, *MODELS])}")
    try:
        from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise ValueError(f"{name} is not a folder; to fetch it from the hub, pip install huggingface_hub") from None

    def cached(file):
        path = try_to_load_from_cache(repo, file, revision=revision)
        return Path(path) if isinstance(path, str) else None

    def lacking(why):
        pin = f" --revision {revision}" if revision else ""
        return ValueError(f"{name}: {', '.join(pick(cached, kind)[1])} of {repo} not in the cache "
                          f"{constants.HF_HUB_CACHE}; run `hf download {repo}{pin}` where there is a network, "
                          f"or pass a folder that has them ({why})")

    found, missing = pick(cached, kind)
    if missing:
        if constants.HF_HUB_OFFLINE:
            raise lacking("HF_HUB_OFFLINE is set")
        try:                                                        # one request tells what the repository holds
            listed = {f.rfilename for f in HfApi().model_info(repo, revision=revision, timeout=15).siblings}

            def offered(file):                                      # an index is fetched: it names the shards
                if file.endswith(".index.json") and file in listed:
                    return Path(hf_hub_download(repo, file, revision=revision))
                return Path(file) if file in listed else None

            chosen = pick(offered, kind)[0]
            wanted = [chosen["config"], chosen.get("tokenizer"), chosen.get("generation"), *chosen.get("weights", ())]
            snapshot_download(repo, revision=revision, allow_patterns=[str(file) for file in wanted if file])
        except GatedRepoError:
            raise ValueError(f"{repo} is gated: accept its licence on its hub page, then set HF_TOKEN") from None
        except RevisionNotFoundError:
            raise ValueError(f"{repo} has no revision {revision}; --revision takes a branch, tag or commit that its "
                             "hub page lists") from None
        except RepositoryNotFoundError:
            raise ValueError(f"{repo} is neither a folder nor on the hub (if it is private: set HF_TOKEN)") from None
        except Exception as e:                                      # each hub version has its own network errors
            first = (str(e) or type(e).__name__).splitlines()[0]
            said = " ".join((getattr(e, "server_message", None) or "").split())     # the hub's own words, if it spoke
            raise lacking(f"hub: {first}{said and ': '}{said}") from e
        found, missing = pick(cached, kind)
        if missing:
            raise ValueError(f"{repo} has no {', '.join(missing)}")
    return Files(name, repo, found["config"].parent.name, **found)  # .../snapshots/COMMIT/config.json


def tensor_names(files):
    """Names of all tensors in .safetensors or .bin files, from their headers."""
    from safetensors import safe_open
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as f:
                    names = list(f.keys())
            else:
                names = list(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except Exception as e:                                      # each format has its own error classes
            raise ValueError(f"{file} is damaged ({e}); fetch it again") from e
        yield from names


def resolve(name, revision=None, vision_tower=None):
    """--model, --revision and --vision-tower -> Files of the model and, where it needs one, of its vision tower."""
    def find_tower(tower, kind):
        try:
            return find(tower, kind)
        except ValueError as e:
            raise ValueError(f"the vision tower of {name}: {e}; --vision-tower takes a folder or hub id") from e

    if vision_tower:
        find_tower(vision_tower, "tower config")                    # a slip here should not cost the model's download
    files = find(name, "model", revision)
    raw = read_json(files.config)
    if raw.get("mm_vision_tower") and "text_config" not in raw:     # original layout: the tower is elsewhere
        inside = any("vision_tower" in tensor for tensor in tensor_names(files.weights))
        files.tower = find_tower(vision_tower or raw["mm_vision_tower"], "tower config" if inside else "tower")
    return files


def sees(files):
    """Is it a model with a vision tower? Read from its config.json."""
    raw = read_json(files.config)
    return bool("text_config" in raw or raw.get("mm_vision_tower"))


def layers(files):
    """How many layers the decoder has. Read from its config.json."""
    raw = read_json(files.config)
    return raw.get("text_config", raw).get("num_hidden_layers", 32)


def read_json(file, kind=dict):
    """A JSON file -> dict, or list where that is the kind wanted. ValueError: it holds something else."""
    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file} is not JSON ({e})") from e
    if not isinstance(raw, kind):
        raise ValueError(f"{file} is not a JSON {'list' if kind is list else 'object'}")
    return raw


def weights_hash(files):
    """sha256 over the sha256 of every weight file. The hub's cache names a file by its sha256: those are not read."""
    total = hashlib.sha256()
    for file in [*files.weights, *(files.tower.weights if files.tower else [])]:
        # One hop: the blob it links to is named by the sha256. Where repositories share blobs, that blob is a link too,
        # to a file that is named by another hash.
        name = os.path.basename(os.readlink(file)) if os.path.islink(file) else ""
        if not re.fullmatch("[0-9a-f]{64}", name):
            with open(file, "rb") as f:
                name = hashlib.file_digest(f, "sha256").hexdigest()
        total.update(name.encode())
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------------- loading

# Checkpoint name -> ours: the original's layout, transformers' hub layout, what transformers 4.52 to 5 keep and write.
RENAME = [(r"^(model\.)?(vision_tower\.)+(vision_model\.)?", "vision_tower."),
          (r"^(model\.)?multi_modal_projector\.linear_1\.", "mm_projector.0."),
          (r"^(model\.)?multi_modal_projector\.linear_2\.", "mm_projector.2."),
          (r"^(model\.)?(mm_projector\.|image_newline$)", r"\2"),
          (r"^(language_model\.)?(model\.)?lm_head\.", "decoder.lm_head."),
          (r"^(model\.)?(language_model\.)?(model\.)?(embed_tokens|layers|norm)\.", r"decoder.\4.")]


SKIP = r"rotary_emb\.inv_freq$|^(model\.)?vision_tower\..*(post_layernorm\.(weight|bias)|position_ids)$"  # not used


def rename(name):
    for pattern, ours in RENAME:
        new, hits = re.subn(pattern, ours, name)
        if hits:
            return new
    return name


def load(name, *, dtype="auto", device="auto", revision=None, vision_tower=None, preprocess="llava"):
    """A registered name, a hub id or a folder -> LLaVA in eval mode, its tokenizer in `.tokenizer`.

    dtype, device: names as on the command line. The 1.5 tower is kept in float32 whatever dtype says, as the reference
    does (it was frozen and is loaded on its own there); the tower of 1.6 and NeXT has the decoder's dtype.
    ValueError: what is missing, damaged, or does not fit.
    """
    files = name if isinstance(name, Files) else resolve(name, revision, vision_tower)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device, files)
    raw = read_json(files.config)
    try:
        config = replace(Config.from_json(raw, read_json(files.tower.config) if files.tower else None),
                         preprocess=preprocess)
        validate(config)
    except ValueError as e:
        raise ValueError(f"{files.config}: {e}") from e
    except (KeyError, TypeError, AttributeError, ArithmeticError) as e:
        raise ValueError(f"{files.config} cannot be read as a model's config ({type(e).__name__}: {e})") from e
    with torch.device("meta"):                                      # no memory until the shapes are known
        model = LLaVA(config).to(dtype)
    if config.vision and config.aspect == "pad":
        model.vision_tower.float()
    model = model.to_empty(device=device).eval().requires_grad_(False)
    vocab = config.text.vocab
    cut = ((n, t[:vocab] if n.endswith(("embed_tokens.weight", "lm_head.weight")) else t)
           for n, t in vicuna.read(files.weights))
    tower = ((f"vision_tower.{clip_vit.rename(n)}", t)
             for n, t in clip_vit.split_qkv(vicuna.read(files.tower.weights if files.tower else []))
             if not re.search(clip_vit.SKIP, n))
    try:
        vicuna.load_into(model, chain(cut, tower), rename, SKIP)
    except ValueError as e:
        raise ValueError(f"{files.name}: {e}") from e
    model.source, model.tokenizer = files, model.decoder_file.load_tokenizer(files.tokenizer.parent)
    if model.tokenizer.token_to_id(model.decoder_file.BOS) is None:
        raise ValueError(f"{files.tokenizer} has no {model.decoder_file.BOS}: it is not this model's tokenizer")
    model.tokenizer.no_truncation()
    model.tokenizer.no_padding()
    ends = [raw.get("eos_token_id"), (read_json(files.generation) if files.generation else {}).get("eos_token_id"),
            *map(model.tokenizer.token_to_id, model.decoder_file.EOS)]
    model.stop = {i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None}
    return model


def pick_device(name):
    """--device -> "cuda", "mps" or "cpu". Under torchrun each process takes the GPU of its own number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch sees no Apple GPU here; use --device cpu")
    return name


def pick_dtype(name, device, files):
    """--dtype -> torch dtype. auto: float32 where config.json asks for it, else half precision as suits the device."""
    if isinstance(name, torch.dtype):
        return name
    raw = read_json(files.config)
    if name == "auto" and "float32" in (raw.get("torch_dtype"), raw.get("dtype")):
        return torch.float32
    return getattr(torch, {"cpu": "bfloat16"}.get(device, "float16") if name == "auto" else name)


# ---------------------------------------------------------------------------------------------------- command line

def add_model_flags(parser):
    """The flags every script shares for choosing a model."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="llava-tiny", metavar="NAME",
                       help=f"{', '.join([*BUNDLED, *MODELS])}, a hub id or a folder (llava-tiny)")
    group.add_argument("--revision", metavar="REV", help="hub branch, tag or commit (main)")
    group.add_argument("--vision-tower", metavar="NAME",
                       help="folder or hub id, where the checkpoint names another or has none")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                       help="auto: float32 if config.json says so (llava-tiny), else float16 on a GPU, bfloat16 on cpu")
    group.add_argument("--preprocess", choices=("llava", "hf"), default="llava",
                       help="pixels as the original LLaVA or transformers")


def load_files(files, args):
    """Files and parsed flags -> LLaVA, and one line on stderr that says what they came to."""
    model = load(files, dtype=args.dtype, device=args.device, preprocess=args.preprocess)
    print(describe(model), file=sys.stderr)
    return model


def describe(model):
    c, files = model.config, model.source
    where = f"{files.origin}@{files.revision[:8]}" if files.revision else files.origin
    tower = "" if not c.vision else ", vision tower " + (
        files.tower.origin if files.tower and files.tower.weights else "in the checkpoint") + (
        f" in {model.vision_tower.pre_layrnorm.weight.dtype}".replace("torch.", ""))
    return (f"model {files.name} ({where}): {c.text.layers} layers, width {c.text.width}, "
            f"{str(model.decoder.norm.weight.dtype).removeprefix('torch.')} on {model.device}{tower}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--image", metavar="FILE")
    parser.add_argument("--question", metavar="TEXT", help="without it, the first of the bundled ones")
    parser.add_argument("--tokens", metavar="N", type=int, default=16, help="longest answer (16)")
    parser.add_argument("--long", action="store_true",
                        help="ask the question alone, without the paper's request for one word")
    parser.error = lambda message: vicuna.fail(f"{message[:300]} (--help shows the flags)")
    args = parser.parse_args()
    if args.tokens < 1:
        raise ValueError("--tokens takes a number from 1")
    if not args.question:
        if args.image:
            raise ValueError("--image needs --question TEXT")
        world = Path(__file__).resolve().parent / "tiny" / "val"
        first = next(iter(read_json(world / "val_balanced_questions.json").values()))
        args.question, args.image = first["question"], world / "images" / f"{first['imageId']}.jpg"
        print(f"{args.image}: {args.question}")
    image = open_image(args.image) if args.image else None
    model = load_files(resolve(args.model, args.revision, args.vision_tower), args)
    print(model.generate(model.prompt(args.question, image, brief=not args.long), args.tokens))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                        # "?" for a letter that the terminal lacks
    try:
        main()
    except (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as e:
        vicuna.fail(e)
