"""
knockout.py - attention knockout: how much does an answer need one group of tokens to attend to another, and where?

Run     python knockout.py --model llava-1.5-7b --src image --tgt question
        python knockout.py --data *_ChooseAttr.csv --images photos --edge "image->last" "question->last"
        python knockout.py --image photo.jpg --question "Is the cup red or blue?" --options red,blue --groups
        python knockout.py --edge "image->last" --heads 0,3 --plain
        python knockout.py --edge "image->question" --per-head --measure margin
Needs   torch, and fork.py beside it, for the functions; the rest of the repository for the command line.
Matches the paper's own code, every layer, edge and window of its golden runs  (tests/test_golden.py)
Paper   https://arxiv.org/abs/2411.18620, Eq. 3-7, section 3.2; figures 3-5 are this script's picture

    edge "source->target": in the k layers around layer l, no query at a target position attends to a key at a source
    position. p_base and p_knockout are the probabilities of the model's own first answer token, without and with the
    cut; change_percent = (p_knockout - p_base) / p_base * 100. A curve has one point for every l. Layers count from 0;
    a row's layer is its window's centre. token is a vocabulary id, k the window's size. score.py has other measures.

Shapes  T tokens  s first target position  n = T - s tokens from there on  L layers  C width  H heads  V vocabulary

Writes  knockout.csv (a row per question, edge and layer), knockout.png, run.json; --per-head: heads.*, joint_*.csv.
"""
import signal
from dataclasses import dataclass, replace
from typing import NamedTuple

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from fork import additive, causal, not_finite, probability, run_branches, to_mask, unembed


def cut(keep, source, target, heads=None):
    """Eq. 7: queries at `target` no longer attend to keys at `source`. keep (n, T) bool -> (n, T).

    source: columns of keep, a list of positions; target: rows of keep, the last n queries: row r is position r + T - n.

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


class Cut(NamedTuple):
    """An edge, and the places where to cut it: a branch for each."""
    source: list                                   # positions of keys
    target: list                                   # positions of queries
    places: list                                   # of {layer: heads that lose the edge there; None is all}


def windows(k, L, heads=None):
    """Cut.places of a curve: the k layers around each layer in turn."""
    return [dict.fromkeys(window(l, k, L), heads) for l in range(L)]


def check_edge(decoder, T, source, target, heads=None):
    """ValueError says why this edge cannot be cut in a prompt of T tokens. An empty source may be: it cuts nothing."""
    H, outside = decoder.config.heads, [i for i in (*source, *target) if not 0 <= i < T]
    if not target:
        raise ValueError("no query is given: the target is empty")
    if outside:
        raise ValueError(f"position {outside[0]} is not in the prompt, which has {T} tokens")
    if odd := [head for head in heads or () if not 0 <= head < H]:
        raise ValueError(f"head {odd[0]} is asked for, but the decoder has heads 0 to {H - 1}")
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
    ends = plain_ends(decoder, x, positions, Cut(source, target, windows(k, len(decoder.layers), heads)))
    return [probability(unembed(decoder, end[-1]), token) for end in ends]


def plain_ends(decoder, x, positions, edge, read=(-1,)):
    """What `cut_ends` does for one Cut, with the same heads in all of its places, by one forward pass for each."""
    plain = additive(causal(x.shape[1], device=x.device))           # explicit, so that SDPA takes one kernel for all
    heads = next(iter(edge.places[0].values()))
    blocked = edge_mask(decoder, x.shape[1], edge.source, edge.target, heads).to(x.device)
    # Only the layers from the window on differ from the clean run, and only tokens from the first target on: everything
    # else is computed again and again. That is what `sweep` saves.
    runs = (forward(decoder, x, positions, plain, blocked, layers) for layers in edge.places)
    return torch.stack([h[0, read] for h in runs])


# ---------------------------------------------------------------------------------------------------- all in one pass

def sweep(decoder, clean, cuts, token, k, heads=None, **how):
    """The curves of all `cuts`, a list of (source, target), as `curve` gives them -> for each cut L probabilities.

    clean: the result of fork.clean_pass. how: at_once, passed on to fork.run_branches. Errors: as `curve`.
    """
    if not cuts:
        return []
    places = windows(k, len(decoder.layers), None if heads is None else tuple(heads))
    ends = torch.stack(cut_ends(decoder, clean, [Cut(*edge, places) for edge in cuts], **how))[:, :, 0]
    p = unembed(decoder, ends).float().softmax(-1)[..., token]      # (cuts, L)
    if not p.isfinite().all():                                      # only here does the CPU wait for the device
        raise not_finite("probability", ends.dtype)
    return p.tolist()


@torch.inference_mode()
def cut_ends(decoder, clean, cuts, read=(-1,), **how):
    """Make each Cut of a list in each of its places -> the stream after the last layer at the positions `read`, counted
    from the end: for each Cut (branches, len(read), C).

    A Cut in one place is a branch that forks off the clean pass with the tokens from the first target position s on
    (see fork.py). The branches of all cuts with the same s run together.
    """
    T, stream, H, ends = clean.stream[0].shape[1], clean.stream[0], decoder.config.heads, {}
    # What fork.py numbers as interventions: (number of the Cut, heads).
    kinds = dict.fromkeys((i, heads) for i, c in enumerate(cuts) for place in c.places for heads in place.values())
    for i, heads in kinds:
        check_edge(decoder, T, cuts[i].source, cuts[i].target, heads)
    first = [min([*c.target, T + min(read)]) for c in cuts]         # what is read is in the branch
    for s in sorted(set(first)):                                    # figures 3-5: the question's first, and `last`
        mine, keys = [i for i, at in enumerate(first) if at == s], [key for key in kinds if first[key[0]] == s]
        # Only the last n = T - s queries get a mask. With all of them and one per head, AnyRes would need gigabytes.
        keep, by_head = causal(T - s, T), any(heads is not None for _, heads in keys)
        keep = keep.expand(H, -1, -1) if by_head else keep
        keeps = [keep] + [cut(keep, cuts[i].source, [t - s for t in cuts[i].target],
                              range(H) if by_head and heads is None else heads) for i, heads in keys]
        masks = to_mask(torch.stack(keeps)).to(stream.device, stream.dtype)     # (M, n, T), or (M, H, n, T)
        masks = masks.view(len(keeps), -1, T - s, T)                # (M, 1 or H, n, T); the first cuts nothing
        number = {key: 1 + i for i, key in enumerate(keys)}
        branches = [{l: number[i, heads] for l, heads in place.items()} for i in mine for place in cuts[i].places]
        parts = run_branches(decoder, clean, masks, branches, list(read), **how)
        ends |= zip(mine, parts.split([len(cuts[i].places) for i in mine]), strict=True)
    return [ends[i] for i in range(len(cuts))]


def token_layers(T, L, cuts, k, layers=None):
    """The cost of a clean pass and a `sweep` (at some layers): tokens x layers, relative to the clean pass alone."""
    return 1 + sum((T - min(target)) * (L - 1 - window(l, k, L).start) + 1      # in the last layer, one token is read
                   for _, target in cuts for l in layers or range(L)) / (T * L)


# ---------------------------------------------------------------------------------------------------- command line

# More columns may be added later; read them by name. From answer_tokens on: see score.py.
COLUMNS = ("question_id", "image", "task", "question", "answer", "prediction", "token", "edge", "window", "layer",
           "p_base", "p_knockout", "change_percent", "answer_tokens", "logp_base", "logp_knockout",
           "logp_per_token_base", "logp_per_token_knockout", "margin_base", "margin_knockout", "head")
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
    measure: str = "first"
    control: int = 0
    control_of: str = "source"
    control_step: int | None = None
    per_head: int = 0                              # how many of the heads that matter most are then cut together
    joint: tuple = ()                              # those: (layer, head)


def main(argv=None):
    from harness import errors, flags
    with errors.one_line_errors():
        run(parse(flags.Parser(__doc__), argv))


def run(s, load=None):
    """Ask every question, measure it, write its rows; then draw. load: see harness.experiment.Study."""
    from harness import experiment, photos, plots, summary
    study = experiment.Study(s.shared, load)
    if s.groups:
        return study.show_groups(s.edges, s.paper_spans, photos.groups)
    study.open(summary.csv_name(s, study.config.text), COLUMNS, edges=["->".join(edge) for edge in s.edges],
               window=s.window, heads=s.heads, paper_spans=s.paper_spans, subword=s.subword, plain=s.plain,
               max_norm=s.max_norm, joint=(*s.joint, s.shared.seed) if s.joint else None,
               control=(s.control, s.control_of, s.control_step, s.shared.seed) if s.control else None)
    for question, result in study.measured(measure, s):             # those without rows: a run can be resumed
        with study.skipping_bad(question):
            study.write(*result())                                  # synced: a crash loses one question at most
    study.finish()
    picture = study.csv.with_suffix(".png")
    if s.joint:
        return print(*summary.joint_lines(study.csv, s.measure), f"wrote {study.csv}", sep="\n")
    top, lines = plots.heads(study.csv, picture, s.per_head, s.measure) if s.per_head else (
        (), summary.knockout_lines(plots.knockout(study.csv, picture, s.measure), s.measure))
    study.report()
    print(*lines, f"wrote {study.csv}, {picture} and {study.info}", sep="\n")
    if s.per_head:                                                  # the ranking is that of all questions
        run(replace(s, per_head=0, joint=top), lambda *_: study.model)


def measure(study, question, s):
    """Ask a question, and cut its edges -> (Asked, rows of knockout.csv, {edge that it does not have: why})."""
    asked, d = study.ask(question, s.paper_spans, s.subword, s.max_norm, whole=True), study.model.decoder
    if not asked.counts:                                            # as in the paper: only right answers, or --all
        return asked, (), {}
    edges, lacking = asked.edges(s.edges, s.measure)                # {"image->question": (positions, positions)}
    jobs = [job for edge, places in edges.items() for job in jobs_of(d, asked, edge, *places, s, lacking)]
    read, cuts = asked.scored.read, [job[-1] for job in jobs]
    # Two ways to the same ends: --plain is short enough to teach from, and what the fast one is tested against.
    ends = [plain_ends(d, asked.x, asked.positions, c, read) for c in cuts] if s.plain else (
        cut_ends(d, asked.clean, cuts, read))
    points = asked.points(d, torch.cat(ends)) if cuts else ()
    first, what = [*asked.first_columns, asked.token_text], [(edge, l, head) for edge, ls, head, _ in jobs for l in ls]
    return asked, [[*first, edge, s.window, layer, asked.p, p, percent(asked.p, p), *more, head]
                   for (edge, layer, head), (p, *more) in zip(what, points, strict=True)], lacking


def jobs_of(decoder, asked, edge, source, target, s, lacking):
    """What is cut for one edge -> list of (name of the edge, the rows' layers, their head, Cut)."""
    from heads import alone, top_and_random
    L, H, k = len(decoder.layers), decoder.config.heads, s.window
    everywhere = windows(k, L, s.heads)
    if s.joint:
        return [(f"{edge}, {name}", [""], "", Cut(source, target, [place]))
                for name, place in top_and_random(everywhere, s.heads or range(H), s.joint, asked.draw).items()]
    if s.per_head:
        return [(edge, range(L), h, Cut(source, target, alone(everywhere, h))) for h in s.heads or range(H)]
    return [(edge, range(L), "", Cut(source, target, everywhere)), *(
        (name, layers, "", Cut(*places, [everywhere[l] for l in layers]))
        for name, layers, places in asked.controls(edge, source, target, s, L, lacking))]


def parse(parser, argv=None):
    """The command line -> Settings."""
    parser.add_cut_flags("out/knockout", "; 1 with --per-head")
    parser.add_experiment_flags()
    args = parser.parse_args(argv)
    parser.check_experiment(args)
    edges = parser.edges_of(args, () if args.groups else EDGES)
    k = args.window or (1 if args.per_head else parser.window(args.model))
    return Settings(parser.shared(args), edges, k, args.heads, args.subword, args.max_norm, args.paper_spans,
                    args.plain, args.groups, args.measure, args.control, args.control_of, args.control_step,
                    args.per_head)


if __name__ == "__main__":
    main()
