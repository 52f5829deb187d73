"""
prune.py - do the upper layers still need the image? Drop its tokens there; count accuracy, time, FLOPs and memory.

Run     python prune.py                                      the bundled model without the image in its last X layers
        python prune.py --model llava-v1.6-vicuna-13b --data *_ChooseAttr.csv --images photos --last 0 10 20 30
        python prune.py --keep random:16                     all of the image but 16 tokens, drawn by --seed
        python prune.py --suggest out/knockout/knockout.csv  choose X by the curves of that run
Needs   torch, fork.py and knockout.py for the functions; the rest of the repository for the command line.
Paper   https://arxiv.org/abs/2411.18620, figure 14 (its code was never released)

    At layer L - X of the prefill the image tokens leave the residual stream. The layers from there on, and their part
    of the cache, never hold them, and decoding continues with that cache. The other tokens keep their positions: they
    are rotated by the same angles as before. So the result equals cutting every later token off from the image there.

    T = 6 tokens, the image at 1 and 2, L = 4 layers, X = 2:      layers 2, 3    0 . . 3 4 5      4 tokens each
                                                                  layers 0, 1    0 1 2 3 4 5      6 tokens each

Shapes  T tokens  L layers  X layers without the image  H heads  K key heads  D head size  C width

Writes  prune.csv (a row per question and X), prune.png, run.json.
"""
import argparse
import json
import math
import random
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from fork import unembed
from knockout import window


@torch.inference_mode()
def prefill(decoder, x, positions, image, first, stay=()):
    """The decoder's own loop with one difference: from layer `first` on the tokens at `image` are gone.

    x (1, T, C) embeddings at positions (T,), for rope; image: indices into T. stay: the tokens of `image` to leave in,
    or a number n: the n that the last token attends to most in the layer below, as in FastV.
    -> the residual stream after the last layer (1, tokens left, C); each layer's [keys, values], (1, K, its tokens, D);
    the tokens of `image` that stayed. ValueError: stay is a number, but there is no layer below.
    """
    L, caches = len(decoder.layers), [[] for _ in range(len(decoder.layers))]
    if isinstance(stay, int) and first == 0:
        raise ValueError("there is no attention below the first layer to choose by")
    gone = set(image)
    stays = list(image) if first >= L or isinstance(stay, int) else sorted(gone.intersection(stay))
    text, image, stays = (torch.tensor(tokens, dtype=torch.long, device=x.device) for tokens in (
        [t for t in range(x.shape[1]) if t not in gone], list(image), stays))
    cos, sin = decoder.rope(positions)
    for i, layer in enumerate(decoder.layers):
        if i == first:
            left = torch.cat((text, stays)).sort().values           # on the device: the CPU does not wait
            x, cos, sin = x[:, left], cos[left], sin[left]          # each token keeps its own rotation
        last = x[:, -1:]                                            # the last token, as it enters this layer
        x = layer(x, cos, sin, None, caches[i])                     # the order is kept, so plain causal will do
        if isinstance(stay, int) and i + 1 == first < L:
            stays = most_attended(layer, last, cos[-1:], sin[-1:], caches[i], image, stay)
    return x, caches, sorted(stays.tolist())


def most_attended(layer, last, cos, sin, cache, image, n):
    """Those n of the tokens `image` (N,) that the last one, (1, 1, C) entering `layer`, attends to most; mean over
    heads."""
    q = layer.qkv(last, cos, sin)[0]                                # (1, H, 1, D); the keys are in the cache
    paid = layer.weights(q, cache[0], None).float().mean(1)[0, 0]   # (T,)
    return image[paid[image].topk(min(n, len(image))).indices]


def layer_flops(c, start, end):
    """Floating point operations that take the tokens start .. end - 1 of a prompt through a layer.

    A multiplication and an addition count as two. Attention counts as causal: what the mask hides costs nothing.
    """
    # One token: q and o have `heads` heads, k and v have `kv_heads`; the MLP has three matrices.
    weights = 2 * (2 * c.width * c.head_size * (c.heads + c.kv_heads) + 3 * c.width * c.hidden)
    # Token t attends to t + 1 keys, with a product for the score and one for the value: 4 width (t + 1), summed over t.
    return (end - start) * (weights + 2 * c.width * (start + end + 1))


def flops(c, counts):
    """Floating point operations of a prefill. counts: how many tokens go through each layer. One is unembedded."""
    return sum(layer_flops(c, 0, n) for n in counts) + 2 * c.width * c.vocab


def kv_bytes(caches):
    return sum(t.numel() * t.element_size() for cache in caches for t in cache)


# ---------------------------------------------------------------------------------------------------- command line

# More columns may be added later; read them by name.
COLUMNS = ("question_id", "image", "task", "question", "answer", "prediction", "removed_layers", "correct",
           "image_tokens", "seconds", "prefill_flops", "prefill_seconds", "decode_seconds", "kv_bytes", "keep")


@dataclass(frozen=True)
class Settings:
    """What the flags of a run say; --help explains each."""
    shared: object                                 # harness.flags.Shared: model, questions, folder, seed
    last: tuple = ()                               # the X; () leaves the choice to the model's number of layers
    keep: str = "none"
    suggest: str | None = None
    tolerance: float = 1.0
    repeats: int = 3


def main(argv=None):
    from harness import errors, flags
    with errors.one_line_errors():
        run(parse(flags.Parser(__doc__), argv))


def run(s, load=None):
    """Ask every question with and without the image in the last X layers, write its rows; then draw."""
    from harness import experiment, hub, plots, tables
    study = experiment.Study(s.shared, load)
    study.need_photos("it has no image to drop")
    weights = hub.weights_hash(study.checkpoint.files) if s.suggest else None
    removed = choose_removed(s, study.config.text.layers, tables.rows, weights)
    study.open("prune.csv", COLUMNS, last=removed, keep=s.keep, repeats=s.repeats, seed=s.shared.seed)
    for question, result in study.measured(partial(measure, removed=removed, warm=set()), s):
        with study.skipping_bad(question):
            try:
                rows, right = result()
            except experiment.EmptyGroup as e:
                study.lacks(question, f"--keep {s.keep}", e)
                continue
            # Right with the whole image, that is. Only --all shows questions that pruning repairs.
            study.write(question, rows if study.counts(right) else (), right=right)
    study.finish()
    picture = study.csv.with_suffix(".png")
    drawn = plots.prune(study.csv, picture)
    study.report()
    print_table(drawn)
    if not all(question.answer for question in study.questions):
        print("where no answer is known, accuracy is agreement with the answer that the whole image gives")
    print(f"wrote {study.csv}, {picture} and {study.info}")


def choose_removed(s, L, rows, weights):
    """The X that a run measures, 0 among them, as a sorted list. ValueError: more layers than the model has."""
    removed = [suggest(s.suggest, L, s.tolerance, rows, weights)] if s.suggest else s.last
    removed = sorted({0, *(removed or range(0, L, 5 if L > 20 else 1))})        # 0 is every question's baseline
    if removed[-1] > L:
        raise ValueError(f"--last {removed[-1]}: the model has {L} layers")
    if s.keep.startswith("attended") and removed[-1] == L:
        raise ValueError(f"--keep {s.keep} chooses by the attention in the layer below: --last takes up to {L - 1}")
    return removed


def staying(groups, s, key):
    """--keep -> image tokens that stay, or how many. EmptyGroup: the prompt has no such patches, or fewer."""
    kind, _, n = s.keep.partition(":")
    image = groups.positions("image", at_least=max(1, int(n or 0)))
    if kind == "random":                                            # the same tokens whenever the question is asked
        return random.Random(f"{s.shared.seed}/{key}").sample(image, int(n))
    return groups.positions("related_patches") if kind == "related" else int(n) if kind == "attended" else ()


def measure(study, question, s, removed, warm):
    """One question -> (rows of prune.csv, was the answer with the whole image right). EmptyGroup: --keep names patches
    that the prompt lacks. warm: a set, empty until a question was measured; that one has a turn more, to warm up."""
    prompt = question.prompt(study.model)
    stay = staying(question.groups(prompt), s, question.key)
    turns = s.repeats + (not warm)
    warm.add(question.key)
    return rows_of(study.model, question, prompt, take_turns(study.model, prompt, removed, stay, turns), s)


def take_turns(model, prompt, removed, stay, turns):
    """Generate with the image dropped from the last X layers, for every X -> {X: a list of (answer, image tokens left,
    bytes of the cache, seconds of prefill, seconds of decoding), one per turn}."""
    x, image, d, timed = model.embed(prompt), list(prompt.image), model.decoder, {X: [] for X in removed}
    for _ in range(turns):                                          # interleaved: clock drift affects every X alike
        for X in removed:
            a = clock(model)                                        # without the vision tower: the same for every X
            h, caches, left = prefill(d, x, prompt.positions, image, len(d.layers) - X, stay if X else ())
            b, size = clock(model), kv_bytes(caches)
            ids, = model.decode(unembed(d, h[:, -1]), caches, len(prompt))
            timed[X].append((model.words(ids), len(left), size, b - a, clock(model) - b))
    return timed


def clock(model):
    """Seconds that were spent computing, once the device has done what it was asked to."""
    if model.device.type != "cpu":
        getattr(torch, model.device.type).synchronize()
    return time.perf_counter() - model.waited()                     # for layers that lie on disk


def rows_of(model, question, prompt, timed, s):
    """What `take_turns` found -> (rows of prune.csv, was the answer with the whole image right).

    Where no answer is known, the one with the whole image counts as right: what is measured is agreement with it.
    """
    T, n_image, L, rows, whole = len(prompt), len(prompt.image), len(model.decoder.layers), [], timed[0][0][0]
    right = question.right if question.answer else lambda answer: answer == whole
    for X, turns in timed.items():
        answer, left, size = turns[0][:3]
        prefilling, decoding = (median(column) for column in list(zip(*turns[-s.repeats:], strict=True))[3:])
        counts = [T] * (L - X) + [T - n_image + left] * X
        in_a_layer = sum(n - T + n_image for n in counts) / L       # image tokens, on average
        rows.append([*question.first_columns(answer), X, int(right(answer)), in_a_layer, prefilling + decoding,
                     flops(model.decoder.config, counts), prefilling, decoding, size, s.keep])
    return rows, right(whole)


def print_table(drawn):
    head = ("task", "layers", "accuracy", "change", "95 % interval", "time", "FLOPs", "image tokens")
    lines = [(task, str(X), f"{100 * v['accuracy']:.1f} %", f"{100 * v['change']:+.1f}",
              f"{100 * v['low']:+.1f} to {100 * v['high']:+.1f}" if X else "",
              f"{v['time']:.2f}", f"{v['flops']:.2f}", f"{v['tokens']:.1f}")
             for task, by_x in drawn.items() for X, v in by_x.items()]
    wide = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for task, *line in (head, *lines):
        print("  ".join((f"{task:{wide[0]}}", *(f"{cell:>{w}}" for cell, w in zip(line, wide[1:], strict=True)))))
    print("layers: number of top layers without the image; change: percentage points of accuracy against 0 layers, on "
          "the same questions; time (prefill and decoding), FLOPs (prefill): relative to 0 layers; image tokens: mean "
          "over layers")


def suggest(file, L, tolerance, rows, weights=None):
    """A knockout.csv -> X: the number of top layers in which its curves show no effect of an edge from the image.

    A window matters if an edge from the image changes P(answer), on average over the questions of some task, by more
    than `tolerance` percent. X counts the layers from the first layer of the window after the last one that matters.
    weights: the model's hash, which the run.json beside the file, if there is one, has to name. ValueError: the file
    has no edge from the image, is of another model, or the image matters up to the last layer.
    """
    of_model(file, weights)
    changes_at, k, edges = defaultdict(list), 1, set()
    for line, row in enumerate(rows(file, ("edge", "task", "layer", "change_percent", "window")), 2):
        source, _, target = row["edge"].partition("->")
        if source in ("image", "related_patches", "other_patches") and ", random " not in target:   # no --control
            try:
                layer, change, width = int(row["layer"]), float(row["change_percent"]), int(row["window"])
            except ValueError:
                layer, change, width = -1, 0.0, 0
            if layer < 0 or width < 1 or not math.isfinite(change) or edges and width != k:
                raise ValueError(f"--suggest {file}, row {line}: layer, window or change is not a number, or windows "
                                 "of several sizes are in it")
            changes_at[row["edge"], row["task"], layer].append(change)
            k = width
            edges.add(row["edge"])
    if not changes_at:
        raise ValueError(f"--suggest {file}: no edge from the image in it; run knockout.py --edge \"image->question\"")
    n_layers = 1 + max(layer for _, _, layer in changes_at)         # a curve has a point for every layer
    if n_layers != L:
        raise ValueError(f"--suggest {file} is of a model with {n_layers} layers, this one has {L}")
    curves = {(edge, task) for edge, task, _ in changes_at}
    if len(changes_at) != L * len(curves):
        raise ValueError(f"--suggest {file}: a curve does not have a point for every layer")
    matters = [layer for (_, _, layer), changes in changes_at.items() if abs(mean(changes)) > tolerance]
    free = 1 + max(matters, default=-1)                             # the first centre from which on none matters
    first = window(free, k, L).start if free < L else L
    if first == L:
        raise ValueError(f"--suggest {file}: {', '.join(sorted(edges))} changes P(answer) by more than {tolerance:g} % "
                         "up to the last layer, so there is no layer to leave the image out of")
    print(f"{file}: from layer {first} on no window of {k} layers changes P(answer) by more than {tolerance:g} % on "
          f"average ({', '.join(sorted(edges))}): --last {L - first}")
    return L - first


def of_model(file, weights):
    """ValueError: the run.json beside a knockout.csv is of a model with other weights."""
    info = Path(file).with_name("run.json")
    if not info.is_file():                                          # a figure's CSV: its number of layers must do
        return
    try:
        record = json.loads(info.read_text(encoding="utf-8"))
        record = {**record.get("others", {}), record["csv"]: record}.get(Path(file).name, record)
        theirs, name = record["settings"]["weights"], record.get("model")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{info} is not a run's record ({type(e).__name__}: {e})") from e
    if theirs != weights:
        raise ValueError(f"--suggest {file} is of {name}, whose weights are not those of this model")


def parse(parser, argv=None):
    """The command line -> Settings."""
    group = parser.add_argument_group("what to drop")
    group.add_argument("--last", type=whole, nargs="+", metavar="X",
                       help="without the image in the last X layers (default: every fifth X; every X up to 20 layers)")
    group.add_argument("--keep", type=keeping, default="none", metavar="WHICH",
                       help="image tokens that stay: none, related, random:N or attended:N (default: none)")
    group.add_argument("--suggest", metavar="CSV", help="take X from a knockout.csv of this model")
    group.add_argument("--tolerance", type=parser.size, default=1.0, metavar="PERCENT",
                       help="--suggest: the change of P(answer) that does not matter (default: 1)")
    group.add_argument("--repeats", type=parser.count, default=3, metavar="N",
                       help="timings of each X; medians count (default: 3)")
    parser.add_shared_flags("out/prune")
    args = parser.parse_args(argv)
    if args.last and args.suggest:
        raise ValueError("--last and --suggest cannot be combined")
    return Settings(parser.shared(args), tuple(args.last or ()), args.keep, args.suggest, args.tolerance, args.repeats)


def whole(text):
    """argparse type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def keeping(text):
    """argparse type: what --keep takes."""
    kind, _, n = text.partition(":")
    if text not in ("none", "related") and not (kind in ("random", "attended") and n.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: give none, related, random:N or attended:N")
    return text


if __name__ == "__main__":
    main()
