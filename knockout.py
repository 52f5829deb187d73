"""
knockout.py - attention knockout: how much does an answer need one group of tokens to attend to another, and where?

Run     python knockout.py --model llava-1.5-7b --src image --tgt question
        python knockout.py --data *_ChooseAttr.csv --images photos --edge "image->last" "question->last"
        python knockout.py --image photo.jpg --question "Is the cup red or blue?" --options red,blue --groups
        python knockout.py --edge "image->last" --heads 0,3 --plain
Needs   torch, and fork.py beside it, for the functions; the rest of the repository for the command line.
Matches the paper's own code, every layer, edge and window of its golden runs  (tests/test_golden.py)
Paper   https://arxiv.org/abs/2411.18620, Eq. 3-7, section 3.2; figures 3-5 are this script's picture

    edge "source->target": in the k layers around layer l, no query at a target position attends to a key at a source
    position. p_base and p_knockout are the probabilities of the model's own first answer token, without and with the
    cut; change_percent = (p_knockout - p_base) / p_base * 100. A curve has one point for every l.

    Layers count from 0, and a row's layer is its window's centre. token is a vocabulary id, k the window's size.

Shapes  T tokens  s first target position  n = T - s tokens from there on  L layers  C width  H heads  V vocabulary

Writes  knockout.csv (a row per question, edge and layer), knockout.png, run.json.
"""
import signal
from dataclasses import dataclass

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from fork import additive, causal, not_finite, probability, run_branches, to_mask, unembed


def cut(keep, source, target, heads=None):
    """Eq. 7: queries at `target` no longer attend to keys at `source`. keep (n, T) bool -> (n, T).

    source: columns of keep, a list of positions; target: rows of keep, positions less T - n, which is 0 if n = T.

    cut(causal(3), [0], [2]) is  1 0 0
                                 1 1 0
                                 0 1 1
    heads: a list, to cut the edge for these heads alone; keep is then given and returned as (H, n, T).
    """
    keep = keep.clone()                                             # the caller's stays as it is
    source, target = (torch.tensor(p, dtype=torch.long, device=keep.device) for p in (source, target))
    if heads is None:
        keep[target[:, None], source] = False                       # every query in target, every key in source
    else:
        keep[torch.tensor(heads, device=keep.device)[:, None, None], target[:, None], source] = False
    return keep                                                     # softmax gives their weight to the other keys


def window(layer, k, L):
    """The k layers around `layer`: layer - floor(k/2) .. layer + ceil(k/2) - 1, clipped to the model's L layers."""
    # Clipped, so the first and last points of a curve cut fewer than k layers. This is what the paper's code does.
    return range(max(0, layer - k // 2), min(L, layer + (k + 1) // 2))


def check_edge(decoder, T, source, target, heads=None):
    """ValueError says why this edge cannot be cut in a prompt of T tokens. An empty source may be: it cuts nothing."""
    H, outside = decoder.config.heads, [i for i in (*source, *target) if not 0 <= i < T]
    if not target:
        raise ValueError("no query is given: the target is empty")
    if outside:
        raise ValueError(f"position {outside[0]} is not in the prompt, which has {T} tokens")
    for head in heads or ():
        if not 0 <= head < H:
            raise ValueError(f"head {head} is asked for, but the decoder has heads 0 to {H - 1}")
    if heads is not None and not heads:
        raise ValueError("no head is given: with heads=None, the edge is cut for all")


def edge_mask(decoder, T, source, target, heads=None, first=0):
    """The additive mask of a cut edge, (T, T), or (H, T, T) if it is cut for some heads alone.

    first: only the queries from this position on, (T - first, T); no target may come before it. ValueError: see
    check_edge, or a query is left with nothing to attend to.
    """
    check_edge(decoder, T, source, target, heads)
    keep = causal(T - first, T)
    if heads is not None:                                           # a mask per head, most of them plain causal
        keep = keep.expand(decoder.config.heads, -1, -1)
    return to_mask(cut(keep, source, [t - first for t in target], heads))


def percent(p_base, p_knockout):
    """Relative change in percent: (p2 - p1) / p1 * 100."""
    return (p_knockout - p_base) / p_base * 100


# ---------------------------------------------------------------------------------------------------- the plain way

@torch.inference_mode()
def forward(decoder, x, positions, plain, blocked, layers):
    """The decoder's own loop with one difference: the layers in `layers` get the `blocked` mask.

    x (1, T, C) embeddings at positions (T,); plain (causal) and blocked: additive masks (T, T) or (H, T, T).
    -> the residual stream after the last layer (1, T, C)
    """
    cos, sin = decoder.rope(positions)
    for i, layer in enumerate(decoder.layers):
        # No hook and no patched module: the mask is an argument of every layer, and this line is the intervention.
        x = layer(x, cos, sin, blocked if i in layers else plain)
    return x


def curve(decoder, x, positions, source, target, token, k, heads=None):
    """One edge's knockout curve, one forward pass per layer -> the probability of `token` for each layer.

    x (1, T, C) embeddings at positions (T,); source, target: lists of positions; k: layers in a window; heads: cut the
    edge for these alone. ValueError: see `edge_mask`. FloatingPointError: the dtype overflows. `sweep` is tested
    against this.
    """
    T, L = x.shape[1], len(decoder.layers)
    plain = additive(causal(T, device=x.device))                    # explicit, so that SDPA takes one kernel for all
    blocked = edge_mask(decoder, T, source, target, heads).to(x.device)
    # Only the layers from the window on differ from the clean run, and only tokens from the first target on: everything
    # else is computed again and again. That is what `sweep` saves.
    runs = (forward(decoder, x, positions, plain, blocked, window(l, k, L)) for l in range(L))
    return [probability(unembed(decoder, h[0, -1]), token) for h in runs]


# ---------------------------------------------------------------------------------------------------- all in one pass

def sweep(decoder, clean, cuts, token, k, heads=None, **how):
    """The curves of all `cuts`, a list of (source, target), as `curve` gives them -> for each cut L probabilities.

    clean: the result of fork.clean_pass. how: at_once, passed on to fork.run_branches. Errors: as `curve`.
    """
    if not cuts:
        return []
    L = len(decoder.layers)
    ends = cut_ends(decoder, clean, cuts, [window(l, k, L) for l in range(L)], heads, **how)
    p = unembed(decoder, ends).float().softmax(-1)[..., token]      # (cuts, L)
    if not p.isfinite().all():                                      # only here does the CPU wait for the device
        raise not_finite("probability", ends.dtype)
    return p.tolist()


@torch.inference_mode()
def cut_ends(decoder, clean, cuts, windows, heads=None, **how):
    """Make each of `cuts` in each of `windows` -> the last position's stream after the last layer, (cuts, windows, C).

    windows: ranges of layers, sorted by first layer. A cut in a window is a branch that forks off the clean pass with
    the tokens from the first target position s on (see fork.py). The branches of all cuts with the same s run together.
    """
    T, stream, ends, order = clean.stream[0].shape[1], clean.stream[0], [], []
    for edge in cuts:
        check_edge(decoder, T, *edge, heads)
    for s in sorted({min(target) for _, target in cuts}):           # figures 3-5: the question's first, and `last`
        mine = [i for i, (_, target) in enumerate(cuts) if min(target) == s]
        # Only the last n = T - s queries get a mask. With all of them and one per head, AnyRes would need gigabytes.
        keep = causal(T - s, T) if heads is None else causal(T - s, T).expand(decoder.config.heads, -1, -1)
        keeps = [keep] + [cut(keep, cuts[i][0], [t - s for t in cuts[i][1]], heads) for i in mine]
        masks = to_mask(torch.stack(keeps)).to(stream.device, stream.dtype)     # (1 + cuts, n, T), or (.., H, n, T)
        masks = masks.view(len(keeps), -1, T - s, T)                # (1 + cuts, 1 or H, n, T); the first cuts nothing
        branches = [(1 + c, layers) for layers in windows for c in range(len(mine))]
        ends.append(run_branches(decoder, clean, masks, branches, [-1], **how).view(len(windows), len(mine), -1))
        order += mine
    back = [order.index(i) for i in range(len(cuts))]               # from the order of s to the order of `cuts`
    return torch.cat(ends, 1)[:, back].transpose(0, 1)


def token_layers(T, L, cuts, k):
    """The cost of a clean pass and `sweep` together: tokens times layers, relative to the clean pass alone."""
    return 1 + sum((T - min(target)) * (L - 1 - window(l, k, L).start) + 1      # in the last layer, one token is read
                   for _, target in cuts for l in range(L)) / (T * L)


# ---------------------------------------------------------------------------------------------------- command line

# More columns may be added later; read them by name.
COLUMNS = ("question_id", "image", "task", "question", "answer", "prediction", "token", "edge", "window", "layer",
           "p_base", "p_knockout", "change_percent")
EDGES = ("question->last", "image->last", "last->last", "image->question", "related_patches->question",
         "other_patches->question")                # figures 3, 4 and 5; the last two need boxes


@dataclass(frozen=True)
class Settings:
    """What the flags of a run say; --help explains each."""
    shared: object                                 # harness.flags.Shared: model, questions, folder, seed
    edges: tuple                                   # (source, target), names of token groups
    window: int = 9
    heads: tuple | None = None
    subword: str = "first"
    max_norm: float | None = None
    paper_spans: bool = False
    plain: bool = False
    groups: bool = False


def main(argv=None):
    from harness import errors, flags
    with errors.one_line_errors():
        run(parse(flags.Parser(__doc__), argv))


def run(s, load=None):
    """Ask every question, measure it, write its rows; then draw. load: see harness.experiment.Study."""
    from harness import experiment, plots
    study = experiment.Study(s.shared, load)
    if s.groups:
        return show_groups(study, s, plots.groups)
    study.open("knockout.csv", COLUMNS, edges=["->".join(edge) for edge in s.edges], window=s.window,
               paper_spans=s.paper_spans, heads=s.heads, subword=s.subword, plain=s.plain, max_norm=s.max_norm)
    for question, result in study.measured(measure, s):             # those without rows: a run can be resumed
        with study.skipping_bad(question):
            study.write(*result())                                  # synced: a crash loses one question at most
    study.finish()
    picture = study.csv.with_suffix(".png")
    drawn = plots.knockout(study.csv, picture)
    study.report()
    for (task, edge), (layers, mean, n) in drawn.items():
        change, layer = max(zip(mean, layers, strict=True), key=lambda pair: abs(pair[0]))
        print(f"{task}, {edge}: largest mean change {change:+.1f} %, around layer {layer} (n = {n})")
    print(f"wrote {study.csv}, {picture} and {study.info}")


def measure(study, question, s):
    """Ask a question, and cut its edges -> (Asked, rows of knockout.csv, {edge that it does not have: why})."""
    asked, decoder = study.ask(question, s.paper_spans, s.subword, s.max_norm), study.model.decoder
    if not asked.counts:                                            # as in the paper: only right answers, or --all
        return asked, (), {}
    cuts, lacking = asked.edges(s.edges)                            # {"image->question": (positions, positions)}
    for edge, places in cuts.items():
        refuse_blind(*places, f"{asked.where} {edge}")
    how = asked.token, s.window, s.heads
    # Two ways to the same curves: --plain is short enough to teach from, and what the fast one is tested against.
    curves = [curve(decoder, asked.x, asked.positions, *places, *how) for places in cuts.values()] if s.plain else (
        sweep(decoder, asked.clean, list(cuts.values()), *how))
    rows = [[*asked.first_columns, asked.token_text, edge, s.window, layer, asked.p, p, percent(asked.p, p)]
            for edge, points in zip(cuts, curves, strict=True) for layer, p in enumerate(points)]
    return asked, rows, lacking


def refuse_blind(source, target, name):
    """Raise ValueError, naming the edge, if its cut leaves a query without a key. No mask is built."""
    first = next(i for i in range(max(source) + 2) if i not in source)          # the first key that is not cut
    if min(target) < first:
        raise ValueError(f"{name}: query position(s) {[t for t in target if t < first][:4]} would attend to nothing: "
                         "every key is cut")


def parse(parser, argv=None):
    """The command line -> Settings."""
    group = parser.add_argument_group("what to cut")
    group.add_argument("--src", metavar="GROUP", help=f"keys to hide: a token group, {parser.groups}")
    group.add_argument("--tgt", metavar="GROUP", help="the queries they are hidden from: another group")
    group.add_argument("--edge", nargs="+", action="extend", default=[], metavar="A->B",
                       help="several edges in one run (default: those of figures 3-5)")
    group.add_argument("--window", type=parser.count, metavar="K",
                       help="layers cut at once (default: 9; 3 for the bundled models, which have 10 layers)")
    group.add_argument("--heads", type=parser.numbers, metavar="H,H", help="for these heads alone (default: all)")
    group.add_argument("--subword", choices=("first", "last"), default="first",
                       help="measure the answer's first token, or its last one, given the others (default: first)")
    group.add_argument("--max-norm", type=parser.size, metavar="X",
                       help="leave patches of a larger feature norm out of related and other patches (figure 16)")
    group.add_argument("--paper-spans", action="store_true", help="find words as the paper's code does: hat in What")
    parser.add_shared_flags("out/knockout")
    parser.run.add_argument("--plain", action="store_true", help="a forward pass per layer and edge: slow, same curves")
    parser.run.add_argument("--groups", action="store_true", help="show the first question's token groups and stop")
    args = parser.parse_args(argv)
    if bool(args.src) != bool(args.tgt):
        raise ValueError("--src and --tgt go together")
    edges = [f"{args.src}->{args.tgt}"] * bool(args.src) + args.edge
    if not edges and not args.groups:                               # without --box there are no patch groups
        edges = EDGES if args.box or not args.question else EDGES[:4]
    return Settings(parser.shared(args), parser.edges(edges), args.window or parser.window(args.model), args.heads,
                    args.subword, args.max_norm, args.paper_spans, args.plain, args.groups)


def show_groups(study, s, draw):
    """--groups: the token groups of the first question, as a table and on its photo."""
    question = study.questions[0]
    prompt = question.prompt(study.model)
    groups = question.groups(prompt, s.paper_spans)
    picture = study.out / "groups.png"
    if prompt.size:
        draw(question.open(), groups, study.patch_boxes(prompt), question.boxes, picture)
    print(groups.table(dict.fromkeys(name for edge in s.edges for name in edge if name not in groups.named)))
    if prompt.size:
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()
