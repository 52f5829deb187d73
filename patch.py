"""
patch.py - activation patching: what does a group of tokens carry, and in which layer?

Run     python patch.py                                      60 bundled pairs of pictures that differ in one colour
        python patch.py --image a.jpg --other b.jpg --question "Is the cup red or blue?" --options red,blue
        python patch.py --data *_ChooseAttr.csv --images photos --grey            the boxes' contents made grey instead
        python patch.py --direction noising --part attention --group image "question - options" last
Needs   torch, fork.py, knockout.py and score.py for the functions; the rest of the repository for the command line.
Matches explicit replacement in whole forward passes  (tests/test_patch.py)
Paper   not in arXiv 2411.18620; the method is that of Meng et al. 2022, https://arxiv.org/abs/2202.05262, section 2,
        with the terms of Heimersheim and Nanda 2024, https://arxiv.org/abs/2404.15255

    Knockout asks what an edge moves; patching asks what a position holds. Two prompts differ in the picture alone:
    clean, and the corrupted one, whose answer is another. Both are run. Then one is run again, and in one layer the
    residual stream at one group of positions is replaced by that of the other run:

        denoising   clean into corrupted: where is the clean stream enough to bring the clean answer back?
        noising     corrupted into clean: where is the clean stream needed for it?

    share = (m - m_into) / (m_giver - m_into), with the margins of the patched run, of the run that is patched into, and
    of the run that gives. 0: nothing changed; 1: the giver's margin. A margin is log p(true option) - log p(false
    option), see score.py; without two options, the first tokens of the two runs' own answers stand for them. Stream l
    is the one after l layers: 0 is the embedding, L the last. Attention's and the MLP's outputs are those of layer l,
    which counts from 0.

Shapes  T tokens  s first position of a group  n = T - s  L layers  C width  G groups  V vocabulary

Writes  patch.csv (a row per question, group and layer), patch.png, run.json.
"""
import signal
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from fork import additive, causal, clean_pass, run_branches, unembed
from knockout import window
from score import NO_OPTIONS, Answer, score

PARTS = ("stream", "attention", "mlp")
PAIRS = Path(__file__).parent / "tiny" / "pairs"   # what is asked without --data and --image, see tiny/pairs.py


@torch.inference_mode()
def values_of(decoder, run, part, s=0):
    """What a run (fork.Clean) holds from position s on, in each layer: list of (T - s, C).

    part "stream": the residual stream after 0 to L layers; "attention" and "mlp": what these add to it in each layer.
    """
    if part == "stream":
        return [run.stream[i][0, s:] for i in range(len(decoder.layers) + 1)]
    T, values = run.stream[0].shape[1], []
    mask = additive(causal(T - s, T, run.cos.device))
    for i, layer in enumerate(decoder.layers):
        x = run.stream[i][:, s:]
        q, _, _ = layer.qkv(x, run.cos[s:], run.sin[s:])
        a = layer.attend(q, *run.caches[i], mask)
        values.append((a if part == "attention" else layer.mlp(x + a))[0])
    return values


# ---------------------------------------------------------------------------------------------------- the plain way

@torch.inference_mode()
def patched(decoder, x, positions, values, group, part, layers):
    """A forward pass in which `part` at the positions `group` is replaced, in `layers`, by another run's.

    x (1, T, C) embeddings at positions (T,); values: of that run, see `values_of`. -> the stream after the last layer
    """
    x, (cos, sin) = x.clone(), decoder.rope(positions)
    mask = additive(causal(x.shape[1], device=x.device))
    for i, layer in enumerate(decoder.layers):                      # a layer's own forward, written out
        if part == "stream" and i in layers:
            x[:, group] = values[i][group]
        a = layer.attend(*layer.qkv(x, cos, sin), mask)
        if part == "attention" and i in layers:
            a[:, group] = values[i][group]
        x = x + a
        f = layer.mlp(x)
        if part == "mlp" and i in layers:
            f[:, group] = values[i][group]
        x = x + f
    if part == "stream" and len(decoder.layers) in layers:
        x[:, group] = values[-1][group]
    return x


def plain_patch_ends(decoder, into, giver, positions, groups, part="stream", k=1):
    """What `patch_ends` gives for the last position, by a forward pass for each group and layer."""
    values = values_of(decoder, giver, part)
    points = len(values)                                            # L, or L + 1 for streams
    return [torch.stack([patched(decoder, into.stream[0], positions, values, group, part, window(l, k, points))[0, -1:]
                         for l in range(points)]) for group in groups]


# ---------------------------------------------------------------------------------------------------- all in one pass

@torch.inference_mode()
def patch_ends(decoder, into, giver, groups, part="stream", k=1, read=(-1,), **how):
    """Patch each of `groups`, lists of positions, at each layer in turn -> the stream after the last layer at the
    positions `read`, counted from the end: for each group (L + 1 or L, len(read), C).

    into, giver: fork.Clean of the run that is changed and of the one that gives. k: layers patched at once, the window
    around each. A patch is a branch that forks off `into` with the tokens from the group's first on, see fork.py.
    """
    T, L, stream = into.stream[0].shape[1], len(decoder.layers), into.stream[0]
    points, ends = L + (part == "stream"), {}
    first = [min([*group, T + min(read)]) for group in groups]
    for s in sorted(set(first)):
        mine = [g for g, at in enumerate(first) if at == s]
        hit = torch.zeros(1 + len(mine), T - s, 1, dtype=torch.bool)                # (interventions, n, 1); 0 is none
        for m, g in enumerate(mine, 1):
            hit[m, [i - s for i in groups[g]]] = True
        hit, values = hit.to(stream.device), values_of(decoder, giver, part, s)

        def change(layer, site, x, which, at, hit=hit, values=values):              # see fork.run_branches
            return torch.where(hit[which][:, at], values[layer][at], x) if site == part else x
        mask = additive(causal(T - s, T)).to(stream.device, stream.dtype).expand(len(hit), 1, -1, -1)
        branches = [dict.fromkeys(window(l, k, points), m) for m in range(1, len(hit)) for l in range(points)]
        ends |= zip(mine, run_branches(decoder, into, mask, branches, list(read), change, **how).split(points),
                    strict=True)
    return [ends[g] for g in range(len(groups))]


def token_layers(T, L, groups, k=1):
    """The cost of two clean passes and `patch_ends` for streams: tokens times layers, relative to one clean pass."""
    return 2 + sum((T - min(group)) * (L - 1 - start) + 1           # in the last layer, one token is read
                   for group in groups for l in range(L + 1) if (start := window(l, k, L + 1).start) < L) / (T * L)


# ---------------------------------------------------------------------------------------------------- command line

# More columns may be added later; read them by name.
COLUMNS = ("question_id", "image", "task", "question", "answer", "prediction", "other", "other_prediction", "group",
           "part", "direction", "window", "layer", "margin_clean", "margin_corrupted", "margin_patched", "share")


@dataclass(frozen=True)
class Settings:
    """What the flags of a run say; --help explains each."""
    shared: object                                 # harness.flags.Shared: model, questions, folder, seed
    groups: tuple = ()                             # names of token groups
    corrupt: str = "photo"                         # "photo", "grey" or "noise"
    others: object = None                          # the other photo (a file, or PIL), or the folder of the other photos
    noise: float = 3.0                             # standard deviations of the image tokens' embeddings
    direction: str = "denoising"
    part: str = "stream"
    window: int = 1
    plain: bool = False


def main(argv=None):
    from harness import errors, flags
    with errors.one_line_errors():
        run(parse(flags.Parser(__doc__), argv))


def run(s, load=None):
    """Ask every question, measure it, write its rows; then draw. load: see harness.experiment.Study."""
    from harness import experiment, plots, summary
    study = experiment.Study(s.shared, load, others=s.others)
    study.need_photos("it has no photo to change")
    study.open("patch.csv", COLUMNS, groups=s.groups, corrupt=s.corrupt,
               noise=(s.noise, s.shared.seed) if s.corrupt == "noise" else None, direction=s.direction,
               part=s.part, window=s.window, plain=s.plain)
    for question, result in study.measured(measure, s):             # those without rows: a run can be resumed
        with study.skipping_bad(question):
            study.write(*result())                                  # synced: a crash loses one question at most
    study.finish()
    picture = study.csv.with_suffix(".png")
    drawn = plots.patch(study.csv, picture)
    study.report()
    print(*summary.peaks(drawn, "largest mean share {:.0f} %, at layer {}"),
          f"wrote {study.csv}, {picture} and {study.info}", sep="\n")


def measure(study, question, s):
    """Ask a question about both pictures, and patch one run -> (Asked, rows of patch.csv, {group it lacks: why})."""
    asked, model = study.ask(question), study.model
    if not asked.counts:                                            # right answers, or --all
        return asked, (), {}

    def without(why):
        if asked.strict:
            raise ValueError(f"{asked.where}: {why}")
        return asked, (), {"patching": why}
    if not asked.scored.pair and asked.unpaired != NO_OPTIONS:
        return without(asked.unpaired)
    d, named, lacking = model.decoder, *asked.named(s.groups)
    photo = study.other(question)
    other = clean_pass(d, corrupted(model, asked, photo, s), asked.positions, model.store)
    logits = unembed(d, other.stream[-1][0, -1])
    other_answer = model.words(model.decode(logits[None], other.caches, len(asked.prompt))[0])
    pair = asked.scored.pair or (0, asked.token, logits.argmax().item())
    answer = Answer((asked.token,), pair=pair)

    def margins(ends):
        return score(d, ends, answer)["margin"].tolist()
    clean, bad = (margins(run.stream[-1][:, -1:])[0] for run in (asked.clean, other))
    if pair[1] == pair[2] or abs(clean - bad) < 1e-3:
        return without("the other picture changes neither the answer nor the margin between two options")
    if logits.argmax().item() == asked.token and not (asked.strict or study.shared.data.all):
        return without("the other picture does not change the answer; --all counts such questions, too")
    into, giver, start, end = (other, asked.clean, bad, clean) if s.direction == "denoising" else (
        asked.clean, other, clean, bad)
    # Two ways to the same ends: --plain is short enough to teach from, and what the fast one is tested against.
    groups, how = list(named.values()), (s.part, s.window)
    ends = plain_patch_ends(d, into, giver, asked.positions, groups, *how) if s.plain else patch_ends(
        d, into, giver, groups, *how)
    name = s.corrupt if s.corrupt != "photo" or not isinstance(photo, str | Path) else Path(photo).name
    first = [*asked.first_columns, name, other_answer]
    rows = [[*first, group, s.part, s.direction, s.window, l, clean, bad, margin, (margin - start) / (end - start)]
            for group, part in zip(named, ends, strict=True) for l, margin in enumerate(margins(part))]
    return asked, rows, lacking


def corrupted(model, asked, photo, s):
    """The embeddings (1, T, C) of the corrupted prompt. photo: the other one. ValueError: it is laid out in
    another way than the clean one."""
    p, question = asked.prompt, asked.question
    if s.corrupt == "noise":
        x, image = asked.x.clone(), list(p.image)
        noise = torch.randn(len(image), x.shape[2], generator=torch.Generator().manual_seed(s.shared.seed))
        # The same noise for every question with as many image tokens.
        x[:, image] += s.noise * x[:, image].float().std().to(x.dtype) * noise.to(x)
        return x
    if s.corrupt == "grey":
        photo = question.open()
        for x, y, w, h in question.boxes:
            photo.paste((128, 128, 128), (round(x), round(y), round(x + w), round(y + h)))
    other = model.prompt(question.question, photo)
    if other.size != p.size:                                        # the same tokens would show other places
        raise ValueError(f"{asked.where}: the two photos give different tokens: {p.size[0]}x{p.size[1]} px make "
                         f"{len(p.image)} image tokens, {other.size[0]}x{other.size[1]} px make {len(other.image)}, "
                         "elsewhere; crop one to the size of the other")
    return model.embed(other)


def parse(parser, argv=None):
    """The command line -> Settings."""
    group = parser.add_argument_group("what to patch", "without --data and --image: the pairs of tiny/pairs")
    group.add_argument("--group", nargs="+", action="extend", default=[], metavar="GROUP",
                       help=f"token groups, one after the other: {parser.groups} (default: related_patches "
                            "other_patches question last; without boxes image question last)")
    group.add_argument("--other", metavar="FILE", help="with --image: the other photo, of the same size")
    group.add_argument("--others", metavar="DIR",
                       help="with --data: the folder of the other photos, named as in --images")
    group.add_argument("--grey", action="store_true", help="corrupt the photo itself: its boxes filled with grey")
    group.add_argument("--noise", type=parser.size, metavar="X", nargs="?", const=3.0,
                       help="corrupt the image tokens' embeddings: noise of X times their standard deviation (3)")
    group.add_argument("--direction", choices=("denoising", "noising"), default="denoising",
                       help="denoising: clean into corrupted; noising: corrupted into clean (default: denoising)")
    group.add_argument("--part", choices=PARTS, default="stream", help="what is replaced (default: stream)")
    group.add_argument("--window", type=parser.count, default=1, metavar="K", help="layers patched at once (1)")
    parser.add_shared_flags("out/patch")
    parser.run.add_argument("--plain", action="store_true",
                            help="a forward pass per layer and group: slow, same shares")
    args = parser.parse_args(argv)
    shared = parser.shared(args)
    kinds = [name for name, given in (("photo", args.other or args.others), ("grey", args.grey),
                                      ("noise", args.noise is not None)) if given]
    own = bool(args.image or args.question)
    if len(kinds) > 1:
        raise ValueError("--other or --others, --grey and --noise cannot be combined: give one of them")
    if not args.data and not own and not kinds:                     # the bundled pairs
        shared, kinds = replace(shared, data=replace(shared.data, data=(str(PAIRS / "pairs_ChooseAttr.csv"),),
                                                     images=str(PAIRS / "clean"), limit=args.limit)), ["photo"]
        args.others = str(PAIRS / "other")
    if not kinds:
        raise ValueError(f"what corrupts the run? Give {'--other FILE' if own else '--others DIR'}, --grey or --noise")
    if args.grey and own and not args.box:
        raise ValueError("--grey needs --box X,Y,W,H: what is made grey")
    if (others := args.other if own else args.others) is None and kinds == ["photo"]:
        raise ValueError("--other FILE goes with --image, --others DIR with --data")
    if args.others and not Path(args.others).is_dir():
        raise ValueError(f"--others {args.others}: no such folder")
    if args.data and not args.images:
        raise ValueError("--data needs --images DIR, the folder of their pictures")
    groups = args.group or (("image",) if own and not args.box else ("related_patches", "other_patches")) + (
        "question", "last")
    return Settings(shared, tuple(parser.group(name) for name in groups), kinds[0], others,
                    3.0 if args.noise is None else args.noise,
                    args.direction, args.part, args.window, args.plain)


if __name__ == "__main__":
    main()
