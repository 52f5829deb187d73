"""
lens.py - what does the model know at which layer? The logit lens, and which module put it there.

Run     python lens.py                                       the answer's words at the last position (figure 6)
        python lens.py --top 5 --image photo.jpg --question "What is this?"    the most probable words after each layer
        python lens.py --top 1 --at image --layer 5 --image photo.jpg --question "What is this?"   words on the photo
        python lens.py --modules                             without attention, without the MLP (figure 12)
        python lens.py --edge "image->question"              without an edge (figure 37)
Needs   torch, fork.py and knockout.py for the functions; the rest of the repository for the command line.
Matches the lens of the paper's own code on its golden runs  (tests/test_golden.py)
Paper   https://arxiv.org/abs/2411.18620, Eq. 8 (lens), Eq. 9 (Jaccard), section 5.3 and appendix D

    lens      softmax(E h^l): the words that the model would predict if the residual stream after layer l were its last.
    Jaccard   of an intervention: collect the 10 most probable words at every question position after the last layer in
              one set, once without and once with it; the size of the intersection over that of the union. 1: no change.

    Layers of the lens: 0 is the embedding, l the stream after l layers, L the model's output. Layers of an intervention
    count from 0: its window starts at its row's layer for a module, and is centred on it for an edge.

Shapes  T tokens  L layers  C width  n positions  V vocabulary  B branches

Writes  lens.csv, top.csv or jaccard.csv, a picture of the same name, run.json.
"""
import signal
from collections import Counter
from dataclasses import dataclass

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from fork import additive, causal, finite, not_finite, run_branches, unembed
from knockout import edge_mask, forward, window


@torch.inference_mode()
def lens(decoder, stream, at, norm="raw"):
    """Eq. 8: probabilities (L + 1, n, V), float32, of every word at the n positions `at`, after each layer.

    stream: of fork.clean_pass. norm "raw", as the paper's code: the residual stream as it is, but the last one through
    the model's final norm. "final": all of them through that norm.
    """
    h = torch.stack([x[0, at] for x in stream])                     # (L + 1, n, C); the first is the embedding
    # lm_head was trained on a normed stream. The raw one's length differs from layer to layer, and the softmax of a
    # longer vector is sharper: compare the two before you read a probability as certainty.
    h = decoder.norm(h) if norm == "final" else torch.cat((h[:-1], decoder.norm(h[-1:])))
    return decoder.lm_head(h).float().softmax(-1)


@torch.inference_mode()
def top_words(decoder, stream, at, K, norm):
    """The K most probable tokens of the lens -> probabilities and ids, (L + 1, n, K) each."""
    # 16 positions at a time: the probabilities of all words, for each layer and patch, would not fit into memory.
    parts = [lens(decoder, stream, at[i:i + 16], norm).topk(K) for i in range(0, len(at), 16)]
    return torch.cat([p.values for p in parts], 1).cpu(), torch.cat([p.indices for p in parts], 1).cpu()


# ---------------------------------------------------------------------------------------------------- Jaccard

def word_sets(decoder, x, K=10):
    """x (B, n, C) after the last layer -> B sets of ids: the K most probable words of each of n positions, as one."""
    sets = []
    for part in x.split(8):                                         # logits (B, n, V) of all would not fit into memory
        values, ids = unembed(decoder, part).topk(K)
        if not values.isfinite().all():                             # NaN counts as the largest
            raise not_finite("logits", x.dtype)
        sets += map(set, ids.flatten(1).tolist())
    return sets


def jaccard(a, b):
    """Eq. 9: |a and b| / |a or b| of two sets."""
    return len(a & b) / len(a | b)


MODULES = ("attention", "mlp")


@torch.inference_mode()
def without(decoder, x, positions, off, module, layers):
    """The plain way: a forward pass in which `module` adds nothing at the positions `off`, in the layers `layers`.

    h^l = h^(l-1) + a^l + f^l (Eq. 1), with a^l = 0 ("attention") or f^l = 0 ("mlp") there. x (1, T, C) -> (1, T, C)
    """
    cos, sin = decoder.rope(positions)
    mask = additive(causal(x.shape[1], device=x.device))
    for i, layer in enumerate(decoder.layers):                      # a layer's own forward, written out
        a = layer.attend(*layer.qkv(x, cos, sin), mask)
        if module == "attention" and i in layers:
            a[:, off] = 0
        x = x + a
        f = layer.mlp(x)                                            # of the stream with what attention added
        if module == "mlp" and i in layers:
            f[:, off] = 0
        x = x + f
    return x


def onward(layer, k, L):
    """The k layers from `layer` on: a module knockout's window starts there, it is not centred (appendix D)."""
    return range(layer, min(layer + k, L))


@torch.inference_mode()
def module_curves(decoder, clean, question, k):
    """Eq. 9 without one module at the positions `question`, in the k layers from l on.

    -> {"attention": Jaccard for each l, "mlp": the same}, all in one pass, see fork.py. The gates of a prompt of 6
    tokens whose question is at positions 2, 3 and 4 (the branches hold positions 2 to 5):

        intervention        attention's output    the MLP's output
        0  nothing          1 1 1 1               1 1 1 1
        1  no attention     0 0 0 1               1 1 1 1
        2  no MLP           1 1 1 1               0 0 0 1
    """
    T, L, s = clean.stream[0].shape[1], len(decoder.layers), min(question)
    mask = additive(causal(T - s, T)).to(clean.stream[0].device, clean.stream[0].dtype)  # no edge is cut
    gates = torch.ones(3, 2, T - s, 1)                              # (interventions, attention and MLP, tokens, 1)
    for m in range(2):
        gates[1 + m, m, [i - s for i in question]] = 0
    gates = gates.to(mask)

    def change(layer, site, x, which, at):                          # see fork.run_branches
        return x if site == "stream" else x * gates[which, MODULES.index(site)][:, at]
    branches = [dict.fromkeys(onward(l, k, L), 1 + m) for l in range(L) for m in range(2)]
    points = compare(decoder, clean, mask.expand(3, 1, -1, -1), branches, question, change)
    return {name: points[m::2] for m, name in enumerate(MODULES)}    # branches alternate between the two


@torch.inference_mode()
def edge_curve(decoder, clean, source, target, question, k):
    """Eq. 9 with an edge cut in the k layers around l: Jaccard of the words at `question`, for each l (figure 37)."""
    T, L, s, stream = clean.stream[0].shape[1], len(decoder.layers), min(target), clean.stream[0]
    masks = torch.stack((additive(causal(T - s, T)), edge_mask(decoder, T, source, target, first=s)))[:, None]
    branches = [dict.fromkeys(window(l, k, L), 1) for l in range(L)]
    return compare(decoder, clean, masks.to(stream.device, stream.dtype), branches, question)


def compare(decoder, clean, masks, branches, question, change=None):
    """Jaccard of the words at `question` for each of `branches` (see fork.run_branches), against one more branch.

    Nothing is done in that one, but it goes through the same kernels: in bfloat16 other rounding alone could change
    the tenth word.
    """
    s = masks.shape[3] - masks.shape[2]
    later = [i for i in question if i >= s]                         # what comes before s is the same in all branches
    if not later:
        return [1.0] * len(branches)
    x = run_branches(decoder, clean, masks, [{}, *branches], [i - s for i in later], change)
    # Question tokens before s belong to every branch's set of words, unchanged.
    before = clean.stream[-1][:, [i for i in question if i < s]].expand(len(x), -1, -1)
    base, *others = word_sets(decoder, torch.cat((before, x), 1))
    return [jaccard(base, other) for other in others]


# ---------------------------------------------------------------------------------------------------- command line

# More columns may be added later; read them by name.
FIRST = ("question_id", "image", "task", "question", "answer", "prediction")
COLUMNS = {"lens.csv": (*FIRST, "layer", "kind", "word", "token", "probability", "norm"),
           "top.csv": (*FIRST, "position", "at", "layer", "rank", "token", "probability", "norm"),
           "jaccard.csv": (*FIRST, "intervention", "window", "layer", "jaccard")}


@dataclass(frozen=True)
class Settings:
    """What the flags of a run say; --help explains each."""
    shared: object                                 # harness.flags.Shared: model, questions, folder, seed
    norm: str = "raw"
    top: int | None = None
    at: str = "last"
    layer: int | None = None
    modules: bool = False
    edges: tuple = ()                              # (source, target), names of token groups
    window: int = 9
    paper_spans: bool = False
    plain: bool = False


def main(argv=None):
    from harness import errors, flags
    with errors.one_line_errors():
        run(parse(flags.Parser(__doc__), argv))


def run(s, load=None):
    """Ask every question, measure it, write its rows; then draw. load: see harness.experiment.Study."""
    from harness import experiment, photos, plots, runs, summary
    study = experiment.Study(s.shared, load)
    if s.top:
        return show_top(study, s, photos, runs)
    jaccards = bool(s.modules or s.edges)
    if jaccards:
        study.open("jaccard.csv", COLUMNS["jaccard.csv"], modules=s.modules, edges=["->".join(e) for e in s.edges],
                   window=s.window, plain=s.plain, paper_spans=s.paper_spans)
    else:
        study.open("lens.csv", COLUMNS["lens.csv"], norm=s.norm, paper_spans=s.paper_spans)
    for question, result in study.measured(measure, s):             # those without rows: a run can be resumed
        with study.skipping_bad(question):
            study.write(*result())                                  # synced: a crash loses one question at most
    study.finish()
    picture = study.csv.with_suffix(".png")
    drawn = (plots.jaccard if jaccards else plots.lens)(study.csv, picture)
    study.report()
    text, rank = ("lowest mean Jaccard {:.2f}, at layer {}", lambda value: -value) if jaccards else (
        "highest mean probability {:.1f} %, after layer {}", lambda value: value)
    print(*summary.peaks(drawn, text, rank), f"wrote {study.csv}, {picture} and {study.info}", sep="\n")


def measure(study, question, s):
    """Ask a question, and read or change it -> (Asked, rows, {edge that it does not have: why})."""
    asked = study.ask(question, s.paper_spans)
    if not asked.counts:                                            # as in the paper: only right answers, or --all
        return asked, (), {}
    return asked, *(measure_jaccard if s.modules or s.edges else measure_lens)(study.model, asked, s)


def measure_lens(model, asked, s):
    """A question that was asked -> (rows of lens.csv, nothing that it lacks)."""
    p, rows = lens(model.decoder, asked.clean.stream, [-1], s.norm)[:, 0], []        # (L + 1, V)
    for kind, word in tracked(asked):
        token = model.tokenizer.encode(word, add_special_tokens=False).ids[0]           # its first, as in the paper
        for layer, value in enumerate(p[:, token].tolist()):
            rows.append([*asked.first_columns, layer, kind, word, model.tokenizer.id_to_token(token), 
                         finite(value, asked.x.dtype), s.norm])
    return rows, {}


def tracked(asked):
    """The words that the lens follows -> list of (kind, word): a Choose question's two options, else its answer; what
    the model says where no answer is known."""
    q = asked.question
    words = [("answer", q.true_option or q.answer or asked.answer.lower()), ("false", q.false_option)]
    return [(f"{kind}_{form}", spelt) for kind, word in words if word
            for form, spelt in (("lower", word), ("capitalized", word.capitalize()))]


def measure_jaccard(model, asked, s):
    """A question that was asked -> (rows of jaccard.csv, {edge that it does not have: why})."""
    d, question, L = model.decoder, asked.groups.positions("question"), len(model.decoder.layers)
    cuts, lacking = asked.edges(s.edges)
    if s.plain:                                                     # slow, short, and what the fast way is tested by
        curves = plain_curves(d, asked, question, cuts, s)
    else:
        modules = module_curves(d, asked.clean, question, s.window) if s.modules else {}
        curves = {f"no {name}": points for name, points in modules.items()}
        curves |= {edge: edge_curve(d, asked.clean, *places, question, s.window) for edge, places in cuts.items()}
    return [[*asked.first_columns, what, s.window, layer, value] for what, points in curves.items()
            for layer, value in zip(range(L), points, strict=True)], lacking


def plain_curves(d, asked, question, cuts, s):
    """--plain: the same curves, one forward pass for each point."""
    x, positions, T, L = asked.x, asked.positions, asked.x.shape[1], len(d.layers)
    base, = word_sets(d, asked.clean.stream[-1][:, question])

    def jaccards(runs):
        return [jaccard(base, other) for h in runs for other in word_sets(d, h[:, question])]
    curves = {f"no {m}": jaccards(without(d, x, positions, question, m, onward(l, s.window, L)) for l in range(L))
              for m in MODULES if s.modules}
    plain = additive(causal(T, device=x.device))
    for edge, places in cuts.items():
        mask = edge_mask(d, T, *places).to(x.device)
        curves[edge] = jaccards(forward(d, x, positions, plain, mask, window(l, s.window, L)) for l in range(L))
    return curves


def parse(parser, argv=None):
    """The command line -> Settings."""
    group = parser.add_argument_group("what to read", "without these: the answer's words at the last position")
    group.add_argument("--norm", choices=("raw", "final"), default="raw",
                       help="raw: the stream as it is, as in the paper; final: through the final norm (default: raw)")
    group.add_argument("--top", type=parser.count, metavar="K",
                       help="the first question's K most probable words after each layer")
    group.add_argument("--at", default="last", metavar="GROUP", help="with --top: any token group (default: last)")
    group.add_argument("--layer", type=int, metavar="N",
                       help="with --top --at image: after which layer, 0 to L (default: the last)")
    group.add_argument("--modules", action="store_true", help="Jaccard without attention, without the MLP")
    group.add_argument("--edge", nargs="+", action="extend", default=[], metavar="A->B",
                       help="Jaccard with an edge cut, several in one run")
    group.add_argument("--window", type=parser.count, metavar="K",
                       help="layers of an intervention (default: 9; 3 for the bundled models, which have 10 layers)")
    group.add_argument("--paper-spans", action="store_true", help="find words as the paper's code does: hat in What")
    parser.add_shared_flags("out/lens")
    parser.run.add_argument("--plain", action="store_true", help="Jaccard: a forward pass per point, slow, same curves")
    args = parser.parse_args(argv)
    if bool(args.top) + bool(args.modules or args.edge) > 1:
        raise ValueError("--top cannot be combined with --modules or --edge")
    if (args.at != "last" or args.layer is not None) and not args.top:
        raise ValueError(f"{'--at' if args.at != 'last' else '--layer'} goes with --top")
    return Settings(parser.shared(args), args.norm, args.top, args.at, args.layer, args.modules,
                    parser.edges(args.edge), args.window or parser.window(args.model), args.paper_spans, args.plain)


# ---------------------------------------------------------------------------------------------------- --top

def show_top(study, s, photos, runs):
    """The first question's most probable words after each layer, as a table, top.csv and a picture."""
    model, asked = study.model, study.ask(study.questions[0], s.paper_spans)
    p, places, L = asked.prompt, asked.groups.positions(s.at), len(model.decoder.layers)
    patches = set(places) <= set(p.image)                           # drawn on the photo, else as a table of words
    if s.layer is not None and not (patches and 0 <= s.layer <= L):
        raise ValueError(f"--layer takes 0 to {L}" if patches else f"--layer is for patches, not for --at {s.at}")
    if not patches and len(places) > 60:
        raise ValueError(f"--at {s.at} has {len(places)} tokens: too many for a table, take a smaller group")
    if s.top > model.decoder.config.vocab:
        raise ValueError(f"--top {s.top}: the vocabulary has {model.decoder.config.vocab} words")
    values, ids = top_words(model.decoder, asked.clean.stream, places, s.top, s.norm)       # (L + 1, n, K)
    words = [[[spelt(model, i) for i in row] for row in rows] for rows in ids.tolist()]  # [layer][place][rank]
    file, picture = study.out / "top.csv", study.out / "top.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [[*asked.first_columns, place, p.tokens[place], layer, 1 + rank,
             model.tokenizer.id_to_token(ids[layer, n, rank].item()),
             finite(values[layer, n, rank].item(), asked.x.dtype), s.norm]
            for layer in range(L + 1) for n, place in enumerate(places) for rank in range(s.top)]
    how = study.measured_with()
    runs.replace_text(file, runs.csv_text(runs.widened(COLUMNS["top.csv"], rows, how)))
    title, notes = f"{asked.question.question} {asked.answer}", ", ".join(how.values())
    heading = f"{title}   ({s.norm} lens at {s.at})"                # printed once the files are there
    if patches:                                                     # hundreds of places: one layer's words fit
        layer = L if s.layer is None else s.layer
        photos.patch_words(asked.question.open(), (title, f"{s.norm} lens after layer {layer} of {L}", notes),
                          study.patch_boxes(p)[[i - p.image.start for i in places]], [row[0] for row in words[layer]],
                          values[layer, :, 0].tolist(), picture)
        print(heading)
        print_common(words)
    else:
        single = len(places) == 1                                   # columns: the ranks of one place, or the places
        titles = [f"{1 + k}." for k in range(s.top)] if single else [repr(p.tokens[i])[1:-1] for i in places]
        cells = [rows[0] if single else [row[0] for row in rows] for rows in words]
        shares = values[:, 0] if single else values[:, :, 0]
        photos.words((title, f"{s.norm} lens at {s.at}", notes), titles, cells, shares.tolist(), picture)
        print(heading)
        print_table(titles, cells, shares.tolist())
    print(f"wrote {file} and {picture}")


def spelt(model, token):
    """A token as a reader would write it; as the vocabulary has it where it is no printable text by itself."""
    text = model.tokenizer.decode([token], skip_special_tokens=False).strip()
    return text if text and text.isprintable() and text != "\ufffd" else model.tokenizer.id_to_token(token)


def print_table(titles, cells, shares):
    """A row per layer, from 0 up, a column per title: the word and its probability in percent."""
    text = [[f"{word} {100 * share:.0f}" for word, share in zip(*row, strict=True)]
            for row in zip(cells, shares, strict=True)]
    wide = [max(len(row[i]) for row in (titles, *text)) for i in range(len(titles))]
    for label, row in (("layer", titles), *((str(i), row) for i, row in enumerate(text))):
        print(f"{label:>5}  " + "  ".join(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True)).rstrip())


def print_common(words):
    """For each layer the words that are the most probable at the most patches."""
    for layer, rows in enumerate(words):
        common = Counter(row[0] for row in rows).most_common(6)
        print(f"{layer:>5}  " + ", ".join(f"{word} at {n}" for word, n in common) + f"   of {len(rows)} patches")


if __name__ == "__main__":
    main()
