"""
knockout.py - attention knockout: how much does the answer need one group of tokens to read another, layer by layer?

Run     python knockout.py --model llava-1.5-7b --src image --tgt question
        python knockout.py --data *_ChooseAttr.csv --images photos --edge "image->last" "question->last"
        python knockout.py --image photo.jpg --question "Is the cup red or blue?" --options red,blue --groups
        python knockout.py --edge "image->last" --heads 0,3 --plain
Needs   torch for the functions; llava_min and its neighbours, eval_gqa, runs, plots for the command line.
Matches the paper's own code, every layer, edge and window of its golden runs  (tests/test_golden.py)
Paper   https://arxiv.org/abs/2411.18620, Eq. 3-7, section 3.2; figures 3-5 are this script's picture

    edge "source->target": in the k layers around layer l, no query at a target position may look at a key at a source
    position. p_base, p_knockout: probability of the model's own first answer token without and with the cut.
    change_percent = (p_knockout - p_base) / p_base * 100, one point for every l.

    Layers count from 0, and a row's layer is its window's centre. token is a vocabulary id, k the window's size.

Shapes  T tokens  S keys in view  L layers  C width  H heads  D head size  V vocabulary  s first target row
        n = T - s rows from there on  B branches  M interventions, the first of them none

A decoder is vicuna.Decoder, llama3.Decoder or what has their attributes: layers, rope, norm, lm_head, config.heads and,
for all in one pass, the parts of a layer that `branch_layer` names.

What it writes: knockout.csv (a row per question, edge and layer), knockout.png, run.json.
"""
import math

import torch


def causal(T, S=None, device=None):
    """keep (T, S), True = may look, for T queries that are the last of S positions.

    causal(3) is  1 0 0
                  1 1 0
                  1 1 1
    """
    S = T if S is None else S
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def cut(keep, source, target, heads=None):
    """Eq. 7: queries at `target` may not look at keys at `source`. keep (T, T) bool, position lists -> keep (T, T).

    cut(causal(3), [0], [2]) is  1 0 0
                                 1 1 0
                                 0 1 1
    heads: of these heads alone, given and returned is then a keep (H, T, T).
    """
    keep = keep.clone()
    source, target = (torch.tensor(p, dtype=torch.long, device=keep.device) for p in (source, target))
    if heads is None:
        keep[target[:, None], source] = False
    else:
        keep[torch.tensor(heads, device=keep.device)[:, None, None], target[:, None], source] = False
    return keep


def to_mask(keep):
    """bool keep (..., T, S), True = may look -> the paper's additive M (Eq. 4, 7): 0 keeps an edge, -inf cuts it.

    Combine masks as bools and convert once, here: the most negative finite number twice is -inf.
    ValueError names the query rows that would see nothing (their softmax is NaN).
    """
    blind = ~keep.any(-1)
    if blind.any():
        first = keep.shape[-1] - keep.shape[-2]                     # the rows are the last T of S positions
        rows = sorted({first + row for row in blind.nonzero()[:, -1].tolist()})
        raise ValueError(f"query position(s) {rows[:4]} may look at nothing: every key is cut")
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -math.inf)


def window(layer, k, L):
    """The k layers around `layer`: layer - floor(k/2) .. layer + ceil(k/2) - 1, clipped to the model's L."""
    return range(max(0, layer - k // 2), min(L, layer + (k + 1) // 2))


def blocked(decoder, T, source, target, heads=None, first=0):
    """The additive mask of a cut: (T, T), or (H, T, T) where it is for some heads alone; of it the rows from `first`
    on, which is no later than the target's first. ValueError: no such head."""
    keep, target, H = causal(T - first, T), [i - first for i in target], decoder.config.heads
    if heads is None:
        return to_mask(cut(keep, source, target))
    if max(heads) >= H:
        raise ValueError(f"head {max(heads)} is asked for, but the decoder has heads 0 to {H - 1}")
    return to_mask(cut(keep.expand(H, -1, -1), source, target, heads))


@torch.inference_mode()
def forward(decoder, x, clean, blocked, layers):
    """The decoder's own loop with one difference: the layers in `layers` get the `blocked` mask.

    x (1, T, C) embeddings; clean, blocked additive masks (T, T) or (H, T, T) -> the last residual stream (1, T, C)
    """
    cos, sin = decoder.rope(torch.arange(x.shape[1], device=x.device))
    for i, layer in enumerate(decoder.layers):
        x = layer(x, cos, sin, blocked if i in layers else clean)
    return x


@torch.inference_mode()
def unembed(decoder, x):
    """Residual stream after the last layer (..., C) -> logits (..., V)."""
    return decoder.lm_head(decoder.norm(x))


def curve(decoder, x, source, target, token, k, heads=None):
    """One edge's knockout curve, the plain way, one forward pass per layer -> probability of `token` for each layer.

    x (1, T, C) embeddings; source, target: lists of positions; token: a vocabulary id; k: layers in a window; heads:
    cut the edge for these alone. ValueError: a row is left nothing to look at, or there is no such head.
    FloatingPointError: the dtype overflows. It is what `sweep` is tested against.
    """
    T, L = x.shape[1], len(decoder.layers)
    clean, mask = to_mask(causal(T, device=x.device)), blocked(decoder, T, source, target, heads).to(x.device)
    runs = (forward(decoder, x, clean, mask, window(l, k, L)) for l in range(L))
    return [probability(unembed(decoder, h[0, -1]), token) for h in runs]


def probability(logits, token):
    """Eq. 6, softmax in float32. FloatingPointError: not a number (float16 overflows in some models)."""
    return finite(logits.float().softmax(-1)[token].item())


def finite(p):
    if not math.isfinite(p):
        raise FloatingPointError("non-finite probability: the dtype overflows here; use --dtype bfloat16 or float32")
    return p


def percent(p_base, p_knockout):
    """Relative change in percent: (p2 - p1) / p1 * 100."""
    return (p_knockout - p_base) / p_base * 100


# ---------------------------------------------------------------------------------------------------- all in one pass

@torch.inference_mode()
def clean_pass(decoder, x):
    """x (1, T, C) -> (stream, caches) of the model left alone.

    stream: the residual stream that enters each layer and that leaves the last, L + 1 of (1, T, C). caches: each
    layer's keys and values, L of [k, v].
    """
    stream, caches = [x], [[] for _ in decoder.layers]
    mask = to_mask(causal(x.shape[1], device=x.device))             # so that its kernel is the one of the cut runs
    cos, sin = decoder.rope(torch.arange(x.shape[1], device=x.device))
    for layer, cache in zip(decoder.layers, caches, strict=True):
        stream.append(layer(stream[-1], cos, sin, mask, cache))
    return stream, caches


@torch.inference_mode()
def sweep(decoder, stream, caches, cuts, token, k, heads=None, rows=512):
    """The curves of all `cuts`, a list of (source, target), as `curve` gives them, for a few forward passes in all.

    -> for each cut the L probabilities of `token`. stream, caches: from `clean_pass`; decoding may have added to the
    caches, what is behind the T tokens is not looked at. rows: see `branches`. Errors: as `curve`.
    """
    L = len(decoder.layers)
    ends = cut_ends(decoder, stream, caches, cuts, [window(l, k, L) for l in range(L)], heads, rows)
    p = unembed(decoder, ends).float().softmax(-1)[..., token]
    return [list(map(finite, points)) for points in p.tolist()]     # the first wait for the device


@torch.inference_mode()
def cut_ends(decoder, stream, caches, cuts, windows, heads=None, rows=512):
    """Each of `cuts` made in each of `windows`: the residual stream in which the last position ends (cuts, windows, C).

    windows: ranges of layers, sorted by the first. The rest is as in `sweep`.

    Attention looks back only. So a cut leaves the rows before its first target row s as they are in the clean pass,
    and rows from s on, too, below the window. Each cut in each window is therefore a *branch*: it leaves the clean
    stream at its window's first layer, with the n = T - s rows from s on, and looks back at the clean keys and values.
    The branches of all cuts with the same s go through a layer together.
    """
    T, ends, order = stream[0].shape[1], [], []
    for s in sorted({min(target) for _, target in cuts}):
        own = [i for i, (_, target) in enumerate(cuts) if min(target) == s]
        masks = [to_mask(causal(T - s, T))] + [blocked(decoder, T, *cuts[i], heads, s) for i in own]
        masks = torch.stack([m.expand(1 if heads is None else decoder.config.heads, -1, -1) for m in masks])
        masks = masks.to(stream[0].device, stream[0].dtype)         # (1 + cuts, 1 or H, n, T), the clean one first
        each = [(1 + c, layers) for layers in windows for c in range(len(own))]
        ends.append(branches(decoder, stream, caches, masks, each, [-1], rows=rows).view(len(windows), len(own), -1))
        order += own
    return torch.cat(ends, 1)[:, [order.index(i) for i in range(len(cuts))]].transpose(0, 1)


def token_layers(T, L, cuts, k):
    """How many tokens go through how many layers in a clean pass and `sweep`, in units of that clean pass."""
    return 1 + sum((T - min(target)) * (L - 1 - window(l, k, L).start) + 1           # one in the last layer
                   for _, target in cuts for l in range(L)) / (T * L)


def branches(decoder, stream, caches, masks, cuts, keep, gates=None, rows=512):
    """The residual stream (B, len(keep), C) in which the rows `keep` of B branches end, each with an intervention.

    cuts: for each branch the number of its intervention and its layers, sorted by the first. masks (M, 1 or H, n, T) of
    intervention 0, which is none, 1, .. gates (M, 2, n, 1): what attention's and the MLP's outputs are multiplied with,
    row by row. rows: how many go through a layer at once; fewer read the weights more often, more need more memory and,
    on CPUs, longer row by row: 512 take 0.91 to 0.99 of the time of 1,024 (`bench.py tree`). What the branches carry
    from layer to layer, (B, n, C), is held for all of them. ValueError: the branches are not sorted.
    """
    starts = [layers.start for _, layers in cuts]
    if starts != sorted(starts):
        raise ValueError("branches must come sorted by their first layer")
    n, T = masks.shape[2:]
    cos, sin = decoder.rope(torch.arange(T - n, T, device=masks.device))
    which = torch.tensor([[m if i in layers else 0 for m, layers in cuts] for i in range(len(decoder.layers))])
    which, keep = (t.to(masks.device) for t in (which, torch.tensor(keep)))     # (L, B), here: no waiting in the loop
    x = stream[0][:, T - n:].expand(0, -1, -1)                      # (B, n, C), no branch yet
    for i, layer in enumerate(decoder.layers):
        new = starts.count(i)
        x = torch.cat((x, stream[i][:, T - n:].expand(new, -1, -1)))
        past, wanted = [t[:, :, :T - n] for t in caches[i]], slice(None)
        if i + 1 == len(decoder.layers):
            wanted = keep                                           # no layer is left that would look at the others
        parts = max(1, math.ceil(len(x) / max(1, rows // n)))       # as even as can be: few rows are slow, each
        x = torch.cat([branch_layer(layer, some, cos, sin, past, masks, w, gates, wanted) if len(some) else some
                       for some, w in zip(x.tensor_split(parts), which[i, :len(x)].tensor_split(parts), strict=True)])
    return x


TREE_ROWS = 256                                    # see branch_layer; 58 to 512 differ by 5 % at most (`bench.py tree`)


def branch_layer(layer, x, cos, sin, past, masks, which, gates=None, rows=slice(None)):
    """One decoder layer for B branches x (B, n, C) with a common past [k, v] (1, H, s, D) -> `rows` of (B, n, C).

    which (B,): the branches' interventions.

    Attention takes TREE_ROWS rows at a time as one sequence, past branch branch ..., whose mask keeps branches apart
    (tree attention): a batch would need a copy of the past for each branch, one sequence of all of them would spend
    most of its time on what the mask hides. A branch alone takes up to 9 % longer at 7B and 13B widths.
    """
    attention, few = layer.self_attn, max(1, TREE_ROWS // x.shape[1])
    q, k, v = attention.qkv(layer.input_layernorm(x), cos, sin)     # (B, H, n, D)
    parts = zip(*(t.split(few) for t in (q[:, :, rows], k, v, which)), strict=True)
    out = torch.cat([tree(attention.kernel, *qkv, past, masks[w][:, :, rows]) for *qkv, w in parts])
    a, f = (1, 1) if gates is None else gates[which][:, :, rows].unbind(1)
    x = x[:, rows] + a * attention.o_proj(out.transpose(1, 2).flatten(2))
    return x + f * layer.mlp(layer.post_attention_layernorm(x))


def tree(kernel, q, k, v, past, mask):
    """Attention of B branches on past and self, as one sequence. q (B, H, m, D), k and v (B, H, n, D), mask
    (B, 1 or H, m, s + n) -> (B, H, m, D)"""
    B, H, m, D = q.shape
    M, s, n = mask.shape[1], past[0].shape[2], k.shape[2]

    def line(t):
        return t.transpose(0, 1).reshape(1, t.shape[1], -1, D)      # one branch after the other
    k, v = (torch.cat((old, line(new)), 2) for old, new in zip(past, (k, v), strict=True))
    k, v = (t.repeat_interleave(H // t.shape[1], 1) if H > t.shape[1] else t for t in (k, v))  # grouped keys
    own = mask.new_full((M, B, m, B, n), -math.inf)
    own.diagonal(0, 1, 3).copy_(mask[..., s:].permute(1, 2, 3, 0))  # only a branch's own rows are not hidden
    mask = torch.cat((mask[..., :s].transpose(0, 1).reshape(M, B * m, s), own.reshape(M, B * m, B * n)), -1)
    return kernel(line(q), k, v, mask[None]).view(H, B, m, D).transpose(0, 1)


# ---------------------------------------------------------------------------------------------------- selfcheck

@torch.inference_mode()
def selfcheck(decoder, x, clean, source, target, token, k, heads=None, seed=0):
    """Is the cut what Eq. 7 says? -> list of (sentence, measured, passed); passed is None where it is to compare.

    Measured on the kernel that the experiment uses, with the window around the first, the middle and the last layer.
    clean: x's clean_pass. The sweep is held against the plain loop at these layers.
    """
    T, L = x.shape[1], len(decoder.layers)
    fast = sweep(decoder, *clean, [(source, target)], token, k, heads)[0]

    def mask(places):
        return blocked(decoder, T, places, target, heads).to(x.device)
    closed = mask(source)
    whole = to_mask(causal(T, device=x.device)).expand_as(closed)   # of the same shape: the kernel takes the same path
    cos, sin = decoder.rope(torch.arange(T, device=x.device))
    leaked, before, below, apart = [0.0], [0.0], [0.0], [0.0]
    for l in {0, L // 2, L - 1}:
        layers = window(l, k, L)
        a = b = x                                                   # the clean run and the one with the cut
        for i, layer in enumerate(decoder.layers):
            if i in layers:
                seen = attention_on(layer, b, cos, sin, closed, source)[:, target]
                leaked.append((seen if heads is None else seen[heads]).max().item())
            a, b = layer(a, cos, sin, whole), layer(b, cos, sin, closed if i in layers else whole)
            moved = (a - b).abs().amax((0, 2))                      # (T,)
            before += moved[:min(target)].tolist()
            below += moved.tolist() if i < layers.start else []
        plain = probability(unembed(decoder, b[0, -1]), token)
        apart.append(abs(fast[l] - plain) / plain)

    def run(mask, layers):
        return unembed(decoder, forward(decoder, x, whole, mask, layers)[0, -1])
    base = run(whole, ())
    empty = (run(mask([]), range(L)) - base).abs().max().item()

    pool = [i for i in range(1, max(target)) if i not in target]    # position 0 soaks up attention in any model
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = sorted(pool[i] for i in order[:len(source)])
    p, middle = probability(base, token), window(L // 2, k, L)

    def change(places):
        return percent(p, probability(run(mask(places), middle), token))
    exact = x.dtype in (torch.float32, torch.float64)               # else both round, each in its own way
    return [("attention still paid over a cut edge, largest", max(leaked), max(leaked) == 0),
            ("change of a row before the first target row, largest", max(before), max(before) == 0),
            ("change of a row in a layer below the window, largest", max(below), max(below) == 0),
            ("change of a logit when the source is empty, largest", empty, empty == 0),
            ("probability by the sweep against the plain loop's, relative, largest", max(apart),
             max(apart) < 1e-4 if exact else None),
            (f"change_percent around layer {L // 2}, source of {len(source)} tokens", change(source), None),
            (f"change_percent around layer {L // 2}, {len(drawn)} random tokens instead", change(drawn), None)]


def attention_on(layer, x, cos, sin, mask, source):
    """How much attention each row pays to the source keys, by the layer's own kernel: (H, T)."""
    q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)            # grouped keys serve several heads
    marked = torch.zeros_like(k)
    marked[:, :, source] = 1                                        # as values: the output is the attention on them
    return layer.self_attn.kernel(q, k, marked, mask)[0, :, :, 0]


# ---------------------------------------------------------------------------------------------------- command line

COLUMNS = ("question_id", "image", "task", "question", "answer", "prediction", "token", "edge", "window", "layer",
           "p_base", "p_knockout", "change_percent")
EDGES = ("question->last", "image->last", "last->last", "image->question", "related_patches->question",
         "other_patches->question")                # figures 3, 4 and 5; the last two need boxes


def start(model, q, args):
    """One question, ready to be cut -> (prompt, embeddings, its clean pass, token, probability of it, the answer).

    token: the answer's first. With --subword last its last (figures 9-11): the answer's other tokens then follow the
    prompt, and the group `last` is the position that predicts it.
    """
    p, d = q.prompt(model, paper_spans=args.paper_spans), model.decoder
    if args.max_norm is not None and p.size:
        leave_out(p, model.patch_norms(p), args.max_norm)
    x = model.embed(p)
    stream, caches = clean_pass(d, x)
    logits = unembed(d, stream[-1][0, -1])
    ids, token = model.decode(logits, caches, 16), logits.argmax().item()
    if args.subword == "last" and len(ids) > 1:
        x, token = torch.cat((x, d.embed_tokens(torch.tensor([ids[:-1]], device=x.device))), 1), ids[-1]
        p.groups["last"] = [x.shape[1] - 1]
        stream, caches = clean_pass(d, x)
        logits = unembed(d, stream[-1][0, -1])
    return p, x, (stream, caches), token, probability(logits, token), model.words(ids)


def leave_out(p, norms, most):
    """Take the patches of a larger norm out of the groups related_patches and other_patches (figure 16)."""
    large = {p.groups["image"][0] + i for i in (norms > most).nonzero().flatten().tolist()}
    for name in ("related_patches", "other_patches"):
        if name in p.groups:
            p.put(name, [i for i in p.groups.pop(name) if i not in large] or f"every patch has a norm above {most:g}")


def measure(model, q, args, strict):
    """Question -> (rows of knockout.csv, note for the run's summary). strict: a group that is empty is an error."""
    from llava_min import EmptyGroup
    p, x, clean, token, p_base, answer = start(model, q, args)
    right = q.right(answer)
    if not (right or args.all or strict):
        return [], {"right": False}
    rows, skipped, cuts = [], {}, {}
    for edge in args.edges:
        try:
            cuts[edge] = [p.positions(group) for group in edge]
            blocked(model.decoder, x.shape[1], *cuts[edge], args.heads, min(cuts[edge][1]))
        except EmptyGroup as e:
            if strict:
                raise
            skipped["->".join(edge)] = str(e)
        except ValueError as e:
            raise ValueError(f"{q.where or q.question} {'->'.join(edge)}: {e}") from e
    how = token, args.window, args.heads
    curves = [curve(model.decoder, x, *c, *how) for c in cuts.values()] if args.plain else (
        sweep(model.decoder, *clean, list(cuts.values()), *how) if cuts else [])
    for edge, points in zip(cuts, curves, strict=True):
        for layer, p_cut in enumerate(points):
            rows.append([*q.about(answer), model.tokenizer.id_to_token(token), "->".join(edge), args.window, layer,
                         p_base, p_cut, percent(p_base, p_cut)])
    return rows, {"right": right, "skipped": skipped}


def main(argv=None, load=None):
    """The command line. argv: the shell's if None. load: instead of llava_min.load_files."""
    import llava_min
    import plots
    from eval_gqa import open_run, prepare, run_all
    args = parse(argv)
    files, questions, bad = prepare(args)
    if args.groups or args.selfcheck:
        model = llava_min.load_files(files, args)
        return show_groups(model, questions[0], args) if args.groups else show_selfcheck(model, questions, args)
    run = open_run(args, files, questions, "knockout.csv", COLUMNS, edges=["->".join(e) for e in args.edges],
                   window=args.window, paper_spans=args.paper_spans, heads=args.heads, subword=args.subword,
                   plain=args.plain, max_norm=args.max_norm)
    run_all(run, args, files, questions, bad, measure, load)
    picture = run.csv.with_suffix(".png")
    for (task, edge), (layers, mean, n) in plots.knockout(run.csv, picture).items():
        change, layer = max(zip(mean, layers, strict=True), key=lambda pair: abs(pair[0]))
        print(f"{task}, {edge}: largest mean change {change:+.1f} %, around layer {layer} (n = {n})")
    print(f"wrote {run.csv}, {picture} and {run.info}")


def parse(argv=None):
    """The command line -> args, with args.edges as (source, target) pairs of canonical group names."""
    from eval_gqa import add_data_flags
    from llava_min import BUNDLED, NAMES, add_model_flags, parse_edge
    from runs import Parser, count
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to cut")
    group.add_argument("--src", metavar="GROUP", help="keys to hide: a token group, " + ", ".join(NAMES) +
                       ", text:WORDS, a+b or a-b")
    group.add_argument("--tgt", metavar="GROUP", help="the queries they are hidden from: another group")
    group.add_argument("--edge", nargs="+", action="extend", default=[], metavar="A->B",
                       help="several edges in one run (those of figures 3-5)")
    group.add_argument("--window", type=count, metavar="K",
                       help="layers cut at once (9; for llava-tiny and llava-tiny-anyres, which have 10, 3)")
    group.add_argument("--heads", type=heads, metavar="H,H", help="cut it for these heads only, of every layer (all)")
    group.add_argument("--subword", choices=("first", "last"), default="first",
                       help="measure the answer's first token, or its last behind the others (first)")
    group.add_argument("--max-norm", type=float, metavar="X",
                       help="leave patches of a larger feature norm out of related and other patches (figure 16)")
    group.add_argument("--paper-spans", action="store_true", help="find words as the paper's code does: hat in What")
    add_model_flags(parser)
    add_data_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default="out/knockout", metavar="DIR", help="folder of the results (out/knockout)")
    group.add_argument("--plain", action="store_true", help="a forward pass per layer and edge: slow, the same curves")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="for --selfcheck's random source (0)")
    group.add_argument("--groups", action="store_true", help="show the first question's token groups and stop")
    group.add_argument("--selfcheck", action="store_true",
                       help="check that a cut edge carries no attention and nothing else moves, and stop")
    args = parser.parse_args(argv)
    if bool(args.src) != bool(args.tgt):
        raise ValueError("--src and --tgt go together")
    edges = [f"{args.src}->{args.tgt}"] * bool(args.src) + args.edge
    if not edges and not args.groups:
        edges = EDGES if args.box or not args.question else EDGES[:4]
    args.edges = list(dict.fromkeys(map(parse_edge, edges)))
    args.window = args.window or (3 if args.model in BUNDLED else 9)
    return args


def heads(text):
    """argparse type: whole numbers from 0, separated by commas -> sorted list."""
    import argparse
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of heads like 0,3")
    return sorted(set(map(int, parts)))


def show_groups(model, q, args):
    """--groups: the token groups of one question, as a table and as a picture."""
    import plots
    p = q.prompt(model, paper_spans=args.paper_spans)
    print(p.table([group for group in dict.fromkeys(g for edge in args.edges for g in edge) if group not in p.groups]))
    if p.size:
        from pathlib import Path

        from llava_min import patch_boxes
        picture = Path(args.out) / "groups.png"
        plots.groups(q.open(), p, patch_boxes(p.size, model.config), q.boxes, picture)
        print(f"wrote {picture}")


def show_selfcheck(model, questions, args):
    """--selfcheck: print what was measured; a check that fails ends with exit code 1."""
    import sys

    from llava_min import EmptyGroup
    failed = checked = 0
    for q in questions:
        p, x, clean, token, _, _ = start(model, q, args)
        for edge in args.edges:
            try:
                results = selfcheck(model.decoder, x, clean, *map(p.positions, edge), token, args.window, args.heads,
                                    args.seed)
            except EmptyGroup as e:
                print(f"{q.key}  {'->'.join(edge)}: skipped, {e}")
                continue
            print(f"{q.key}  {'->'.join(edge)}, window {args.window}")
            for sentence, value, passed in results:
                print(f"  {'      ' if passed is None else 'ok    ' if passed else 'FAILED'}  {sentence}: {value:.6g}")
                failed += passed is False
            checked += 1
    if not checked:
        raise ValueError("no edge could be checked: the questions do not have the groups")
    print(f"{checked} edges checked, {failed} checks failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    from runs import cli
    cli(main)
