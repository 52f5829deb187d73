"""
prune.py - do the upper layers still need the image? Drop its tokens there; count accuracy, time, FLOPs and memory.

Run     python prune.py                                      the bundled model without the image in its last X layers
        python prune.py --model llava-v1.6-vicuna-13b --data *_ChooseAttr.csv --images photos --last 0 10 20 30
        python prune.py --keep random:16                     all of the image but 16 tokens, drawn by --seed
        python prune.py --suggest out/knockout/knockout.csv  from the layer on from which that run says it is not needed
Needs   torch, and knockout.py beside it, for the functions; the rest of the repository for the command line.
Paper   https://arxiv.org/abs/2411.18620, figure 14 (its code was never released)

    At layer L - X of the prefill the image's rows leave the residual stream. The layers from there on hold no keys of
    them, in the cache neither, and decoding goes on with that cache. Positions stay: what is left is turned by the same
    angles as before. So it equals cutting every later token off from the image in these layers.

Shapes  T tokens  L layers  X layers without the image  H heads  D head size  C width

What it writes: prune.csv (a row per question and X), prune.png, run.json.
"""
import math
import time

import torch

from knockout import unembed


@torch.inference_mode()
def prefill(decoder, x, image, first, keep=()):
    """The decoder's own loop with one difference: from layer `first` on the rows `image` are gone.

    x (1, T, C), image: positions -> the last residual stream (1, rows left, C); caches, [k, v] (1, H, rows, D) of the
    rows that each layer saw; the image positions that stayed. keep: those of them that stay, or how many: then those
    that the last position attended to most in the layer below (as FastV does). ValueError: there is no layer below.
    """
    T, caches, below = x.shape[1], [[] for _ in decoder.layers], None
    cos, sin = decoder.rope(torch.arange(T, device=x.device))
    for i, layer in enumerate(decoder.layers):
        if i == first:
            if isinstance(keep, int):
                keep = most_attended(decoder.layers[i - 1], below, cos[-1:], sin[-1:], caches[i - 1], image, keep)
            gone = set(image).difference(keep)
            rows = torch.tensor([j for j in range(T) if j not in gone], device=x.device)
            x, cos, sin = x[:, rows], cos[rows], sin[rows]
        below = x[:, -1:]
        x = layer(x, cos, sin, None, caches[i])                     # what is left is in order: plain causal
    return x, caches, sorted(set(image).intersection(keep)) if first < len(decoder.layers) else list(image)


def most_attended(layer, last, cos, sin, cache, image, n):
    """The n positions of `image` that the last position, which enters `layer` as `last` (1, 1, C), attends to most."""
    if not cache:
        raise ValueError("there is no attention below the first layer to choose by")
    q = layer.self_attn.qkv(layer.input_layernorm(last), cos, sin)[0]               # (1, H, 1, D)
    k = cache[0].repeat_interleave(q.shape[1] // cache[0].shape[1], 1)              # (1, H, T, D)
    paid = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).float().softmax(-1).mean(1)[0, 0]       # (T,)
    return [image[i] for i in paid[image].topk(min(n, len(image))).indices.tolist()]


@torch.inference_mode()
def decode(model, x, caches, position, max_new_tokens=16):
    """Greedy decoding after `prefill` -> token ids, without the end token. position: of the first new token, T whatever
    was dropped. FloatingPointError: the logits are not numbers."""
    d, ids = model.decoder, []
    logits = unembed(d, x[0, -1])
    while len(ids) < max_new_tokens:
        best = logits.argmax().item()
        if not logits[best].isfinite():
            raise FloatingPointError("non-finite logits: the dtype overflows here; use --dtype bfloat16 or float32")
        if best in model.stop:
            break
        ids.append(best)
        h = d.embed_tokens(torch.tensor([[best]], device=x.device))
        cos, sin = d.rope(torch.tensor([position], device=x.device))
        for layer, cache in zip(d.layers, caches, strict=True):
            h = layer(h, cos, sin, None, cache)                     # one new row sees all that its layer holds
        logits, position = unembed(d, h[0, -1]), position + 1
    return ids


def layer_flops(c, start, end):
    """Floating point operations that take rows start .. end - 1 through a layer, multiply and add counted as two.
    Attention is counted as causal: what the mask hides costs nothing."""
    size = c.width // c.heads
    weights = 2 * (2 * c.width * size * (c.heads + c.kv_heads) + 3 * c.width * c.hidden)            # for one row
    return (end - start) * (weights + 2 * c.width * (start + end + 1))


def flops(c, rows):
    """Those of a prefill. rows: how many each layer has. The last row is unembedded."""
    return sum(layer_flops(c, 0, n) for n in rows) + 2 * c.width * c.vocab


def kv_bytes(caches):
    return sum(t.numel() * t.element_size() for cache in caches for t in cache)


# ---------------------------------------------------------------------------------------------------- command line

COLUMNS = ("question_id", "image", "task", "question", "answer", "prediction", "removed_layers", "correct",
           "image_tokens", "seconds", "prefill_flops", "prefill_seconds", "decode_seconds", "kv_bytes", "keep")


def clock(device):
    """Seconds, once the device has done what it was asked to."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def kept(p, args, key):
    """--keep -> positions that stay, or how many. EmptyGroup: the question has no such patches."""
    kind, _, n = args.keep.partition(":")
    if kind == "random":
        import random
        return random.Random(f"{args.seed}/{key}").sample(p.groups["image"], min(int(n), len(p.groups["image"])))
    return p.positions("related_patches") if kind == "related" else int(n) if kind == "attended" else ()


def measure(model, q, args, strict):
    """Question -> (rows of prune.csv, note for the run's summary). strict: a group that is empty is an error."""
    from statistics import median

    from llava_min import EmptyGroup
    p = q.prompt(model)
    image, d = p.positions("image"), model.decoder
    x, T, L = model.embed(p), len(p), len(model.decoder.layers)
    try:
        keep = kept(p, args, q.key)
    except EmptyGroup as e:
        if strict:
            raise
        return [], {"right": False, "skipped": {f"--keep {args.keep}": str(e)}}
    found = {X: [] for X in args.last}
    for turn in range(args.repeats + args.warm):                    # all X in turns: what drifts, drifts for all
        for X in args.last:
            a = clock(x.device)
            h, caches, left = prefill(d, x, image, L - X, keep if X else ())
            b, size = clock(x.device), kv_bytes(caches)
            ids = decode(model, h, caches, T)
            if turn >= args.warm:
                found[X].append((ids, left, size, b - a, clock(x.device) - b))
    args.warm = 0                                                   # the first question has warmed up
    rows, right = [], q.right(model.words(found[0][0][0]))
    if not (right or args.all or strict):
        return [], {"right": False}
    for X, runs in found.items():
        ids, left, size = runs[0][:3]
        before, after = (median(column) for column in list(zip(*runs, strict=True))[3:])
        counts = [T] * (L - X) + [T - len(image) + len(left)] * X
        answer = model.words(ids)
        rows.append([*q.about(answer), X, int(q.right(answer)),
                     sum(n - T + len(image) for n in counts) / L, before + after, flops(d.config, counts), before,
                     after, size, args.keep])
    return rows, {"right": right}


def main(argv=None, load=None):
    """The command line. argv: the shell's if None. load: instead of llava_min.load_files."""
    import llava_min
    import plots
    from eval_gqa import open_run, prepare, run_all
    args = parse(argv)
    files, questions, bad = prepare(args)
    if not llava_min.sees(files):
        raise ValueError(f"--model {args.model} is text-only: it has no image to drop")
    L = llava_min.layers(files)
    if args.suggest:
        args.last = [suggest(args.suggest, L, args.tolerance)]
    args.last = sorted({0, *(args.last or range(0, L, 5 if L > 20 else 1))})
    if args.last[-1] > L:
        raise ValueError(f"--last {args.last[-1]}: the model has {L} layers")
    if args.keep.startswith("attended") and args.last[-1] == L:
        raise ValueError(f"--keep {args.keep} chooses by the attention below the cut: --last takes up to {L - 1}")
    run = open_run(args, files, questions, "prune.csv", COLUMNS, last=args.last, keep=args.keep, repeats=args.repeats,
                   seed=args.seed)
    run_all(run, args, files, questions, bad, measure, load)
    picture = run.csv.with_suffix(".png")
    head = ("task", "layers", "accuracy", "change", "95 % interval", "time", "FLOPs", "image tokens")
    lines = [(task, str(X), f"{100 * v['accuracy']:.1f} %", f"{100 * v['change']:+.1f}",
              f"{100 * v['low']:+.1f} to {100 * v['high']:+.1f}" if X else "",
              f"{v['time']:.2f}", f"{v['flops']:.2f}", f"{v['tokens']:.1f}")
             for task, by_x in plots.prune(run.csv, picture).items() for X, v in by_x.items()]
    wide = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for task, *line in (head, *lines):
        print("  ".join((f"{task:{wide[0]}}", *(f"{cell:>{w}}" for cell, w in zip(line, wide[1:], strict=True)))))
    print("layers: how many, from the top, have no image; change: of accuracy, in points, against 0 of the same "
          "questions; time (prefill and decoding) and prefill FLOPs: shares of those at 0; image tokens: mean over "
          "layers")
    print(f"wrote {run.csv}, {picture} and {run.info}")


def suggest(file, L, tolerance):
    """A knockout.csv -> X: how many layers from the top no image edge matters in, by its curves.

    A window matters where an edge from the image changes P(answer), on average over the questions of some task, by
    more than `tolerance` percent. X counts the layers of the windows above the highest one that does. ValueError: the
    file has no edge from the image, or is of another model.
    """
    from collections import defaultdict
    from statistics import mean

    from knockout import window
    from plots import read
    found, k, edges = defaultdict(list), 1, set()
    for row in read(file, ("edge", "task", "layer", "change_percent", "window")):
        if row["edge"].split("->")[0] in ("image", "related_patches", "other_patches"):
            found[row["edge"], row["task"], int(row["layer"])].append(float(row["change_percent"]))
            k = int(row["window"])
            edges.add(row["edge"])
    if not found:
        raise ValueError(f"--suggest {file}: no edge from the image in it; run knockout.py --edge \"image->question\"")
    layers = 1 + max(layer for _, _, layer in found)
    if layers != L:
        raise ValueError(f"--suggest {file} is of a model with {layers} layers, this one has {L}")
    matters = [layer for (_, _, layer), changes in found.items() if abs(mean(changes)) > tolerance]
    free = 1 + max(matters, default=-1)                             # the first centre from which on none matters
    first = window(free, k, L).start if free < L else L
    print(f"{file}: from layer {first} on no window of {k} layers changes P(answer) by more than {tolerance:g} % on "
          f"average ({', '.join(sorted(edges))}): --last {L - first}")
    return L - first


def parse(argv=None):
    from eval_gqa import add_data_flags
    from llava_min import add_model_flags
    from runs import Parser, count
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to drop")
    group.add_argument("--last", type=whole, nargs="+", metavar="X",
                       help="without the image in the last X layers (every fifth X; all X of a small model)")
    group.add_argument("--keep", type=keeping, default="none", metavar="WHICH",
                       help="image tokens that stay: none, related (patches), random:N, attended:N (none)")
    group.add_argument("--suggest", metavar="CSV", help="take X from a knockout.csv of this model")
    group.add_argument("--tolerance", type=float, default=1.0, metavar="PERCENT",
                       help="--suggest: the change of P(answer) that does not matter (1)")
    group.add_argument("--repeats", type=count, default=3, metavar="N", help="timings of each X; medians count (3)")
    add_model_flags(parser)
    add_data_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default="out/prune", metavar="DIR", help="folder of the results (out/prune)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="for --keep random (0)")
    args = parser.parse_args(argv)
    if args.last and args.suggest:
        raise ValueError("--last and --suggest exclude each other")
    args.warm = 1
    return args


def whole(text):
    """argparse type: a whole number from 0."""
    import argparse
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def keeping(text):
    """argparse type: what --keep takes."""
    import argparse
    kind, _, n = text.partition(":")
    if text not in ("none", "related") and not (kind in ("random", "attended") and n.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: give none, related, random:N or attended:N")
    return text


if __name__ == "__main__":
    from runs import cli
    cli(main)
