"""
maps.py - a question's photo, patch by patch: what the model attends to, and what the answer depends on.

Run     python maps.py --image photo.jpg --question "Is the cup red or blue?" --options red,blue
        python maps.py --map attention --layer 5 --head 2                  a bundled picture, one layer and head
        python maps.py --map knockout --tgt last --block 2 --measure margin           2 x 2 patches at a time
Needs   torch, fork.py, knockout.py and score.py for the functions; the rest of the repository for the command line.
Matches the layers' own attention weights, and knockout.py's curves of the same patches  (tests/test_maps.py)
Paper   Eq. 3 for attention; Eq. 7 for the cuts, with one patch as the source: not in arXiv 2411.18620

    attention    how much the queries at a group of tokens attend to each patch in one layer: its weight, or a block's
                 sum, as the mean over queries and over heads (or of one head). A query's weights add up to 1.
    knockout     each patch (or block of patches) -> group is cut alone, in the window around a layer or in all layers:
                 what that changes in the answer. Attention shows what is attended to; only the cut shows what the
                 answer depends on.

Shapes  T tokens  m queries  L layers  H heads  n image tokens  B blocks

Writes  map.csv (a row per block), map.png into --out; an earlier map there is overwritten, and there is no run.json.
"""
import signal
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from fork import additive, causal
from knockout import Cut, cut_ends, percent, window
from score import score

TOGETHER = 128                                     # cuts that are made in one pass: bounds the memory of branches


def attention(decoder, clean, layer, queries, head=None):
    """How much each of m `queries`, positions, attends to each token in one layer: (m, T), the mean over heads or one
    head. Rows add up to 1. clean: of fork.clean_pass. ValueError: there is no such layer or head."""
    L, H = len(decoder.layers), decoder.config.heads
    if not 0 <= layer < L:
        raise ValueError(f"layer {layer} is asked for, but the decoder has layers 0 to {L - 1}")
    if head is not None and not 0 <= head < H:
        raise ValueError(f"head {head} is asked for, but the decoder has heads 0 to {H - 1}")
    return next(attention_by_layer(decoder, clean, queries, [layer], head))


def attention_by_layer(decoder, clean, queries, layers, head=None):
    """Yield the same, (m, T), for each of `layers`, in increasing order."""
    mask = additive(causal(clean.stream[0].shape[1], device=clean.cos.device)[queries])     # (m, T)
    for i, block in enumerate(decoder.layers):                      # in order: layers may lie on disk, see offload.py
        if i in layers:
            with torch.inference_mode():
                q, _, _ = block.qkv(clean.stream[i][:, queries], clean.cos[queries], clean.sin[queries])
                weights = block.weights(q, clean.caches[i][0], mask)[0].float()     # (H, m, T)
            yield weights.mean(0) if head is None else weights[head]


def blocks_of(slots, side=1):
    """Image tokens in blocks of side x side patches -> list of lists of their numbers. slots (n, 3): view, row, column
    of each, see views.patch_slots. A block lies in one view; newlines are in none."""
    blocks = defaultdict(list)
    for i, (view, row, column) in enumerate(slots.tolist()):
        if view >= 0:
            blocks[view, row // side, column // side].append(i)
    return list(blocks.values())


def cut_blocks(decoder, clean, blocks, target, places, answer, bar=iter):
    """Cut each of B blocks -> target alone in each of the `places`, blocks and target being lists of positions -> dict
    of p, logp and margin of score.py, (B, places) each. places: of {layer: heads}, see knockout.Cut. bar: shows how far
    it is, as tqdm does."""
    found, together = defaultdict(list), max(1, TOGETHER // len(places))
    for at in bar(range(0, len(blocks), together)):
        cuts = [Cut(block, target, places) for block in blocks[at:at + together]]
        for name, value in score(decoder, torch.stack(cut_ends(decoder, clean, cuts, answer.read)), answer).items():
            found[name].append(value)
    return {name: None if values[0] is None else torch.cat(values) for name, values in found.items()}


def changes(decoder, asked, blocks, target, places, bar=iter):
    """What `cut_blocks` changes in the answer of an experiment.Asked -> dict, float64, (B, places) each: p; change, p's
    in percent; logp, of the whole answer, per token; margin, None without two options."""
    base = asked.base(decoder)
    cut = {name: value if value is None else value.double()
           for name, value in cut_blocks(decoder, asked.clean, blocks, target, places, asked.scored, bar).items()}
    return {"p": cut["p"], "change": percent(asked.p, cut["p"]),
            "logp": (cut["logp"] - base["logp"].double()) / len(asked.scored.ids),
            "margin": None if cut["margin"] is None else cut["margin"] - base["margin"].double()}


# ---------------------------------------------------------------------------------------------------- command line

# More columns may be added later; read them by name. attention is that of `layer`; the cuts are in the window around
# it, or in all layers. view 0 is the whole photo, tiles follow. block counts from 0; x0 .. y1: its place on the photo.
COLUMNS = ("question_id", "image", "task", "question", "answer", "prediction", "target", "layer", "all_layers",
           "window", "head", "view", "block", "x0", "y0", "x1", "y1", "attention", "p_base", "p_knockout",
           "change_percent", "change_logp_per_token", "change_margin")
VALUES = {"first": ("change_percent", "change of P(answer), %"),
          "answer": ("change_logp_per_token", "change of log P(answer), nats per token"),
          "margin": ("change_margin", "change of the margin, nats")}


@dataclass(frozen=True)
class Settings:
    """What the flags of a run say; --help explains each."""
    shared: object                                 # harness.flags.Shared: model, question, folder, seed
    map: str = "both"                              # "attention", "knockout" or "both"
    target: str = "last"
    layer: int | None = None                       # None: of knockout, all layers; of attention, the middle one
    window: int = 9
    head: int | None = None
    block: int = 1
    measure: str = "first"


def main(argv=None):
    from harness import errors, flags
    with errors.one_line_errors():
        run(parse(flags.Parser(__doc__), argv))


def run(s, load=None):
    """Ask the first question, make its map, write and draw it. load: see harness.experiment.Study."""
    from tqdm import tqdm

    from harness import experiment, photos, runs
    study = experiment.Study(s.shared, load)
    study.need_photos("it has no map")
    for question in study.questions:                                # the first; under --skip-bad, the first usable one
        with study.skipping_bad():
            asked, rows, _ = measure(study, question, s, partial(tqdm, unit="pass", dynamic_ncols=True))
            break
    else:
        raise ValueError(f"no usable question: {study.bad[0]}")
    study.out.mkdir(parents=True, exist_ok=True)
    file, picture = study.out / "map.csv", study.out / "map.png"
    columns, *rows = table = runs.widened(COLUMNS, rows, study.measured_with())
    runs.replace_text(file, runs.csv_text(table))
    photos.maps(question.open(), [dict(zip(columns, row, strict=True)) for row in rows], VALUES[s.measure], picture)
    print(f"{question.question} {asked.answer} ({100 * asked.p:.1f} %)")
    print(f"wrote {file} and {picture}")


def measure(study, question, s, bar=iter):
    """Ask a question, and map it -> (Asked, rows of map.csv, {})."""
    asked, d = study.ask(question, whole=True), study.model.decoder
    p, L, target = asked.prompt, len(d.layers), asked.groups.positions(s.target)
    if max(target) < p.image.start:
        raise ValueError(f"--tgt {s.target} comes before the image, and attends to nothing of it")
    if s.measure == "margin" and s.map != "attention" and not asked.scored.pair:
        raise ValueError(f"--measure margin: {asked.unpaired}")
    blocks, boxes = blocks_of(p.slots, s.block), study.patch_boxes(p)
    positions, empty = [[p.image.start + i for i in block] for block in blocks], [""] * len(blocks)
    attended, cells = empty, [empty] * 5
    where = L // 2 if s.layer is None else s.layer
    if not 0 <= where < L:
        raise ValueError(f"--layer {where}: the model has layers 0 to {L - 1}")
    if s.map != "knockout":
        mass = attention(d, asked.clean, where, target, s.head).mean(0)
        attended = [mass[block].sum().item() for block in positions]
    if s.map != "attention":
        place = dict.fromkeys(range(L) if s.layer is None else window(where, s.window, L),
                              None if s.head is None else (s.head,))
        cells = [[asked.p] * len(blocks), *(empty if v is None else v[:, 0].tolist() for v in changes(
            d, asked, positions, target, [place], bar).values())]
    first = [*asked.first_columns, s.target, where, int(s.layer is None), "" if s.layer is None else s.window,
             "" if s.head is None else s.head]
    rows = [[*first, p.slots[block[0], 0].item(), i, *outline(boxes[block]), attended[i], *(cell[i] for cell in cells)]
            for i, block in enumerate(blocks)]
    return asked, rows, {}


def outline(boxes):
    """Boxes (n, 4) of a block's patches -> x0, y0, x1, y1 around those that are on the photo; empty if none is."""
    boxes = boxes[~boxes.isnan().any(1)]
    return [*boxes[:, :2].amin(0).tolist(), *boxes[:, 2:].amax(0).tolist()] if len(boxes) else [""] * 4


def parse(parser, argv=None):
    """The command line -> Settings."""
    group = parser.add_argument_group("what to map", "of the first question")
    group.add_argument("--map", choices=("attention", "knockout", "both"), default="both", help="(default: both)")
    group.add_argument("--tgt", default="last", metavar="GROUP",
                       help=f"the queries: a token group, {parser.groups} (last)")
    group.add_argument("--layer", type=int, metavar="N", help="attention in this layer (default: the middle one), cuts "
                       "in the window around it (default: in all layers)")
    group.add_argument("--window", type=parser.count, metavar="K",
                       help="layers cut at once, with --layer (default: 9; 3 for the bundled models)")
    group.add_argument("--head", type=int, metavar="H", help="one head alone (default: the mean over all; all are cut)")
    group.add_argument("--block", type=parser.count, default=1, metavar="N", help="blocks of N x N patches (1)")
    group.add_argument("--measure", choices=VALUES, default="first", help="what is drawn, see knockout.py (first)")
    parser.add_shared_flags("out/maps")
    args = parser.parse_args(argv)
    return Settings(parser.shared(args), args.map, parser.group(args.tgt), args.layer, args.window or
                    parser.window(args.model), args.head, args.block, args.measure)


if __name__ == "__main__":
    main()
