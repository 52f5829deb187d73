"""
flow.py - the instruments in a notebook: a model, a photo and a question give a table and a figure.

Use     from flow import load, ask, knock_out
        model = load("llava-tiny")                           a registered name, a hub id or a folder
        ask(model, "photo.jpg", "Is the cup red or blue?")   {"answer": "Red", "p": 0.98, ...}
        knock_out(model, "photo.jpg", "Is the cup red or blue?", edges=["image->question"], options=("red", "blue"))
Needs   the whole repository, a folder beside the notebook or on sys.path
See     docs/own-intervention.md, for interventions that no function here makes

A photo is a file or a PIL picture. `ask` gives a dict; the others give a Result: `rows` is a list of dicts with the
columns of the instrument's CSV, so pandas.DataFrame(result.rows) works; `figure` is matplotlib's, and is shown where
the Result is a cell's last line. Nothing is printed or written. ValueError and FloatingPointError say what is wrong.
"""
import io
import os
from dataclasses import dataclass, field, replace

from PIL import Image

import knockout
import lens
import maps
import patch
from fork import unembed
from groups import parse_edge
from harness import hub, photos, plots
from harness.experiment import Asker
from harness.flags import DataSettings, Shared
from harness.questions import Question
from views import open_image, to_rgb

ONE = Shared(data=DataSettings())                  # what instruments read of their flags: one question, no files


@dataclass(frozen=True)
class Result:
    """What a function of this file gives back."""
    rows: list                                     # dicts: a table
    figure: object = field(repr=False)             # matplotlib.figure.Figure; figure.savefig("x.pdf") keeps it

    def _repr_png_(self):                          # what a notebook shows
        picture = io.BytesIO()
        self.figure.savefig(picture, format="png", dpi=110)
        return picture.getvalue()


@dataclass(frozen=True)
class Shown(Question):
    """A question with its picture at hand, as a file or PIL."""
    photo: object = None

    def open(self):
        if self.photo is None:                     # a text-only model
            return None
        return to_rgb(self.photo) if isinstance(self.photo, Image.Image) else open_image(self.photo)


def one_of(name, value, allowed):
    """ValueError, if an argument is none of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is none of {', '.join(map(str, allowed))}")


def whole(name, value, least=1, most=10 ** 6):
    """ValueError, if an argument is no whole number in a range; None is allowed."""
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise ValueError(f"{name} {value!r} is not a whole number from {least} to {most}")


def load(name="llava-tiny", **how):
    """A registered name, hub id or folder -> a model. how: dtype, device, preprocess, offload, see harness.hub.load."""
    return hub.load(name, **how)


def asked_of(photo, question, answer="", options=(), objects=(), boxes=()):
    """What is known of a question -> Shown. options: both of an "A or B" question; boxes: (x, y, w, h) px. ValueError:
    a photo that is no picture, options that are not two different texts, and the like."""
    if not (photo is None or isinstance(photo, (str, os.PathLike, Image.Image))):
        raise ValueError(f"the photo is a {type(photo).__name__}, not a file or a PIL picture")
    if isinstance(photo, Image.Image) and min(photo.size) < 1:
        raise ValueError("the photo has no pixels")
    options = options if isinstance(options, str) else tuple(filter(None, options))         # a file's may be empty
    if options and (isinstance(options, str) or len(options) != 2 or options[0].lower() == options[1].lower()):
        raise ValueError(f"options {options!r}: give two different texts, as in (\"red\", \"blue\")")
    if any(not isinstance(box, (tuple, list)) for box in boxes):
        raise ValueError(f"boxes {boxes!r}: give a list of (x, y, width, height)")
    right = next((o for o in options if o.lower() == answer.lower()), "")
    wrong = next((o for o in options if right and o != right), "")
    return Shown("notebook", question, answer=answer, task="own question", true_option=right, false_option=wrong,
                 options=() if right else tuple(options), objects=tuple(objects), boxes=tuple(map(tuple, boxes)),
                 photo=photo)


def default_window(model):
    """The paper's 9; 3 for a model of fewer than 18 layers, as on the command line for the bundled ones."""
    return 9 if len(model.decoder.layers) >= 18 else 3


def ask(model, photo, question, top=5, **known):
    """-> dict: answer, p of its first token, and the `top` first tokens with their probabilities. known: see
    `asked_of`."""
    whole("top", top, most=model.decoder.config.vocab)
    asked = Asker(model, ONE).ask(asked_of(photo, question, **known))
    p = unembed(model.decoder, asked.clean.stream[-1][0, -1]).float().softmax(-1).topk(top)
    return {"answer": asked.answer, "p": asked.p, "tokens": len(asked.prompt), "image_tokens": len(asked.prompt.image),
            "top": [(lens.spelt(model, i), v) for v, i in zip(p.values.tolist(), p.indices.tolist(), strict=True)]}


def knock_out(model, photo, question, edges=("image->question", "image->last", "question->last"), *, window=None,
              heads=None, measure="first", control=0, control_of="source", control_step=1, seed=0, **known):
    """Attention knockout, see knockout.py: a row per edge and layer. known: see `asked_of`."""
    for name, value, least in (("window", window, 1), ("control", control, 0), ("control_step", control_step, 1)):
        whole(name, value, least)
    one_of("measure", measure, plots.MEASURES)
    one_of("control_of", control_of, ("source", "target"))
    if not edges or isinstance(edges, str):
        raise ValueError(f"edges {edges!r}: give a list, as in [\"image->question\"]")
    s = knockout.Settings(replace(ONE, seed=seed), tuple(map(parse_edge, edges)), window or default_window(model),
                          None if heads is None else tuple(heads), measure=measure, control=control,
                          control_of=control_of, control_step=control_step)
    rows = measured(knockout, model, asked_of(photo, question, **known), s, knockout.COLUMNS)
    return Result(rows, plots.knockout_figure(rows, measure)[0])


def heads_of(model, photo, question, edge, *, window=1, measure="first", top=10, **known):
    """An edge cut for one head at a time, see heads.py: a row per layer and head."""
    whole("window", window)
    whole("top", top)
    one_of("measure", measure, plots.MEASURES)
    s = knockout.Settings(ONE, (parse_edge(edge),), window, per_head=top, measure=measure)
    rows = measured(knockout, model, asked_of(photo, question, **known), s, knockout.COLUMNS)
    return Result(rows, plots.heads_figure(rows, top, measure)[0])


def lens_of(model, photo, question, *, norm="raw", **known):
    """The logit lens at the last position, see lens.py: a row per layer and spelling of the answer's words."""
    one_of("norm", norm, ("raw", "final"))
    s = lens.Settings(ONE, norm)
    rows = measured(lens, model, asked_of(photo, question, **known), s, lens.COLUMNS["lens.csv"])
    return Result(rows, plots.lens_figure(rows)[0])


def patch_in(model, photo, other, question, groups=("image", "question", "last"), *, direction="denoising",
             part="stream", window=1, **known):
    """Activation patching between two photos, see patch.py: a row per group and layer."""
    whole("window", window)
    one_of("direction", direction, ("denoising", "noising"))
    one_of("part", part, patch.PARTS)
    if not groups or isinstance(groups, str):
        raise ValueError(f"groups {groups!r}: give a list, as in [\"image\", \"last\"]")
    s = patch.Settings(ONE, tuple(groups), "photo", other, direction=direction, part=part, window=window)
    rows = measured(patch, model, asked_of(photo, question, **known), s, patch.COLUMNS, other)
    return Result(rows, plots.patch_figure(rows)[0])


def map_of(model, photo, question, target="last", *, layer=None, window=None, head=None, block=1, measure="first",
           **known):
    """Attention and causal effect of each patch, see maps.py: a row per patch."""
    whole("window", window)
    whole("block", block)
    one_of("measure", measure, maps.VALUES)
    s = maps.Settings(ONE, "both", target, layer, window or default_window(model), head, block, measure)
    shown = asked_of(photo, question, **known)
    rows = measured(maps, model, shown, s, maps.COLUMNS)
    return Result(rows, photos.maps_figure(shown.open(), rows, maps.VALUES[measure]))


def measured(instrument, model, question, settings, columns, other=None):
    """An instrument's own rows of one question, as dicts. other: its other photo."""
    _, rows, _ = instrument.measure(Asker(model, settings.shared, other), question, settings)
    return [dict(zip(columns, row, strict=True)) for row in rows]
