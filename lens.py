"""
lens.py - what does the model know at which layer? The logit lens, and which module put it there.

Run     python lens.py                                       the answer's words at the last position (figure 6)
        python lens.py --top 5 --image photo.jpg --question "What is this?"    the likeliest words after each layer
        python lens.py --top 1 --at image --layer 5 --image photo.jpg --question "What is this?"   words on the photo
        python lens.py --modules                             without attention, without the MLP (figure 12)
        python lens.py --edge "image->question"              without looking at the image (figure 37)
Needs   torch, and knockout.py beside it, for the functions; the rest of the repository for the command line.
Matches the lens of the paper's own code on its golden runs  (tests/test_golden.py)
Paper   https://arxiv.org/abs/2411.18620, Eq. 8 (lens), Eq. 9 (Jaccard), section 5.3 and appendix D

    lens: softmax(E h^l), the words that the residual stream after layer l would end in if the model stopped there.
    Jaccard of an intervention: of the 10 likeliest words at the question's positions after the last layer, how many
    are the same with and without it: |both| / |either|, 1 where it changes nothing.

    Layers: lens 0 is the embedding, l the stream after l layers, L the model's output; for a Jaccard they count from 0,
    and a window starts at its row's layer without a module, and is centred on it without an edge.

Shapes  T tokens  L layers  C width  n positions  V vocabulary  B branches

What it writes: lens.csv, top.csv or jaccard.csv, a picture of the same name, run.json.
"""
import torch

from knockout import blocked, branches, causal, finite, forward, start, to_mask, unembed, window


@torch.inference_mode()
def lens(decoder, stream, positions, norm="raw"):
    """Eq. 8: probabilities (L + 1, n, V), float32, of every word at n positions, after the embedding and each layer.

    stream: of knockout.clean_pass. norm "raw", as the paper's code: the residual stream as it is, but the last through
    the model's final norm. "final": all of them through that norm.
    """
    h = torch.stack([x[0, positions] for x in stream])              # (L + 1, n, C)
    h = decoder.norm(h) if norm == "final" else torch.cat((h[:-1], decoder.norm(h[-1:])))
    return decoder.lm_head(h).float().softmax(-1)


def likeliest(decoder, x, K=10):
    """x (B, n, C) after the last layer -> B sets of ids: the K likeliest words of each of the n rows, all together."""
    return [set(ids) for part in x.split(8) for ids in unembed(decoder, part).topk(K).indices.flatten(1).tolist()]


def jaccard(a, b):
    """Eq. 9: |a and b| / |a or b| of two sets."""
    return len(a & b) / len(a | b)


# ---------------------------------------------------------------------------------------------------- interventions

MODULES = ("attention", "mlp")


@torch.inference_mode()
def without(decoder, x, rows, module, layers):
    """The plain way: a forward pass in which `module` adds nothing at `rows` in `layers`. x (1, T, C) -> (1, T, C)

    h^l = h^(l-1) + a^l + f^l (Eq. 1), with a^l = 0 ("attention") or f^l = 0 ("mlp") there.
    """
    cos, sin = decoder.rope(torch.arange(x.shape[1], device=x.device))
    mask = to_mask(causal(x.shape[1], device=x.device))
    for i, layer in enumerate(decoder.layers):
        a = layer.self_attn(layer.input_layernorm(x), cos, sin, mask)
        if module == "attention" and i in layers:
            a[:, rows] = 0
        x = x + a
        f = layer.mlp(layer.post_attention_layernorm(x))
        if module == "mlp" and i in layers:
            f[:, rows] = 0
        x = x + f
    return x


def onward(layer, k, L):
    """The k layers from `layer` on (appendix D: a module knockout's window starts there, it is not centred)."""
    return range(layer, min(layer + k, L))


@torch.inference_mode()
def module_curves(decoder, stream, caches, question, k):
    """Without a module at `question` in the k layers from l on: {"attention" | "mlp": Jaccard of its words, each l}.

    All of it in one pass, see knockout.sweep.
    """
    T, L, s = stream[0].shape[1], len(decoder.layers), min(question)
    mask = to_mask(causal(T - s, T)).to(stream[0].device, stream[0].dtype)
    gates = torch.ones(3, 2, T - s, 1)                              # of three interventions, the first is none
    for m in range(2):
        gates[1 + m, m, [i - s for i in question]] = 0
    cuts = [(1 + m, onward(l, k, L)) for l in range(L) for m in range(2)]
    found = compare(decoder, stream, caches, mask.expand(3, 1, -1, -1), cuts, question, gates.to(mask))
    return {name: found[m::2] for m, name in enumerate(MODULES)}


@torch.inference_mode()
def edge_curve(decoder, stream, caches, source, target, question, k):
    """With an edge cut in the k layers around l: Jaccard of the words at `question`, each l (figure 37)."""
    T, L, s = stream[0].shape[1], len(decoder.layers), min(target)
    masks = torch.stack((to_mask(causal(T - s, T)), blocked(decoder, T, source, target, first=s)))[:, None]
    return compare(decoder, stream, caches, masks.to(stream[0].device, stream[0].dtype),
                   [(1, window(l, k, L)) for l in range(L)], question)


def compare(decoder, stream, caches, masks, cuts, question, gates=None):
    """Jaccard for each of `cuts`, see knockout.branches, against one more branch, with which nothing is done.

    That one goes through the same kernels; in bfloat16 another rounding could already change the tenth word.
    """
    s = masks.shape[3] - masks.shape[2]
    later = [i for i in question if i >= s]                         # no branch changes what comes before
    if not later:
        return [1.0] * len(cuts)
    x = branches(decoder, stream, caches, masks, [(0, range(0, 0)), *cuts], [i - s for i in later], gates)
    before = stream[-1][:, [i for i in question if i < s]].expand(len(x), -1, -1)
    clean, *others = likeliest(decoder, torch.cat((before, x), 1))
    return [jaccard(clean, other) for other in others]


# ---------------------------------------------------------------------------------------------------- command line

ABOUT = ("question_id", "image", "task", "question", "answer", "prediction")
COLUMNS = {"lens.csv": (*ABOUT, "layer", "kind", "word", "token", "probability", "norm"),
           "top.csv": (*ABOUT, "position", "at", "layer", "rank", "token", "probability", "norm"),
           "jaccard.csv": (*ABOUT, "intervention", "window", "layer", "jaccard")}


def tracked(q, answer):
    """The words that the lens follows -> list of (kind, word): a Choose question's two options, else its answer; what
    the model says where no answer is known."""
    words = [("answer", q.true_option or q.answer or answer.lower()), ("false", q.false_option)]
    return [(f"{kind}_{form}", spelt) for kind, word in words if word
            for form, spelt in (("lower", word), ("capitalized", word.capitalize()))]


def measure_lens(model, q, args, strict):
    """Question -> (rows of lens.csv, note for the run's summary)."""
    _, _, (stream, _), _, _, answer = start(model, q, args)
    right = q.right(answer)
    if not (right or args.all or strict):
        return [], {"right": False}
    p, rows = lens(model.decoder, stream, [-1], args.norm)[:, 0], []
    for kind, word in tracked(q, answer):
        token = model.tokenizer.encode(word, add_special_tokens=False).ids[0]           # as the paper: the first one's
        for layer, value in enumerate(p[:, token].tolist()):
            rows.append([*q.about(answer), layer, kind, word, model.tokenizer.id_to_token(token), finite(value),
                         args.norm])
    return rows, {"right": right}


def measure_jaccard(model, q, args, strict):
    """Question -> (rows of jaccard.csv, note for the run's summary). strict: a group that is empty is an error."""
    from llava_min import EmptyGroup
    p, x, clean, _, _, answer = start(model, q, args)
    right = q.right(answer)
    if not (right or args.all or strict):
        return [], {"right": False}
    d, question, L = model.decoder, p.positions("question"), len(model.decoder.layers)

    def plainly(runs):
        whole, = likeliest(d, clean[0][-1][:, question])
        return [jaccard(whole, other) for h in runs for other in likeliest(d, h[:, question])]
    curves, skipped = {}, {}
    if args.modules and args.plain:
        curves = {f"no {m}": plainly(without(d, x, question, m, onward(l, args.window, L)) for l in range(L))
                  for m in MODULES}
    elif args.modules:
        curves = {f"no {m}": c for m, c in module_curves(d, *clean, question, args.window).items()}
    for edge in args.edges:
        try:
            source, target = map(p.positions, edge)
        except EmptyGroup as e:
            if strict:
                raise
            skipped["->".join(edge)] = str(e)
            continue
        if args.plain:
            whole = to_mask(causal(x.shape[1], device=x.device))
            mask = blocked(d, x.shape[1], source, target).to(x.device)
            curves["->".join(edge)] = plainly(forward(d, x, whole, mask, window(l, args.window, L)) for l in range(L))
        else:
            curves["->".join(edge)] = edge_curve(d, *clean, source, target, question, args.window)
    rows = [[*q.about(answer), what, args.window, layer, value] for what, curve in curves.items()
            for layer, value in enumerate(curve)]
    return rows, {"right": right, "skipped": skipped}


def main(argv=None, load=None):
    """The command line. argv: the shell's if None. load: instead of llava_min.load_files."""
    from pathlib import Path

    import llava_min
    import plots
    from eval_gqa import open_run, prepare, run_all
    args = parse(argv)
    files, questions, bad = prepare(args)
    if args.top:
        return show_top(llava_min.load_files(files, args), questions[0], args)
    if args.modules or args.edges:
        run = open_run(args, files, questions, "jaccard.csv", COLUMNS["jaccard.csv"], modules=args.modules,
                       edges=["->".join(e) for e in args.edges], window=args.window, plain=args.plain,
                       paper_spans=args.paper_spans)
        run_all(run, args, files, questions, bad, measure_jaccard, load)
        drawn = plots.jaccard(run.csv, run.csv.with_suffix(".png"))
        for (task, what), (layers, mean, n) in drawn.items():
            low, layer = min(zip(mean, layers, strict=True))
            print(f"{task}, {what}: lowest mean Jaccard {low:.2f}, at layer {layer} (n = {n})")
    else:
        run = open_run(args, files, questions, "lens.csv", COLUMNS["lens.csv"], norm=args.norm,
                       paper_spans=args.paper_spans)
        run_all(run, args, files, questions, bad, measure_lens, load)
        drawn = plots.lens(run.csv, run.csv.with_suffix(".png"))
        for (task, kind), (layers, mean, n) in drawn.items():
            high, layer = max(zip(mean, layers, strict=True))
            print(f"{task}, {kind}: highest mean probability {high:.1f} %, after layer {layer} (n = {n})")
    print(f"wrote {run.csv}, {Path(run.csv).with_suffix('.png')} and {run.info}")


def parse(argv=None):
    """The command line -> args, with args.edges as (source, target) pairs of canonical group names."""
    from eval_gqa import add_data_flags
    from llava_min import BUNDLED, add_model_flags, parse_edge
    from runs import Parser, count
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to look at", "without these: the answer's words at the last position")
    group.add_argument("--norm", choices=("raw", "final"), default="raw",
                       help="lens: the residual stream as it is, as the paper, or through the model's final norm (raw)")
    group.add_argument("--top", type=count, metavar="K", help="the first question's K likeliest words after each layer")
    group.add_argument("--at", default="last", metavar="GROUP", help="where, with --top: any token group (last)")
    group.add_argument("--layer", type=int, metavar="N",
                       help="with --top --at image: after which layer, 0 to L (the last)")
    group.add_argument("--modules", action="store_true", help="Jaccard without attention, without the MLP")
    group.add_argument("--edge", nargs="+", action="extend", default=[], metavar="A->B",
                       help="Jaccard with an edge cut, several in one run")
    group.add_argument("--window", type=count, metavar="K",
                       help="layers of an intervention (9; 3 of the 10 layers of the bundled models)")
    group.add_argument("--paper-spans", action="store_true", help="find words as the paper's code does: hat in What")
    add_model_flags(parser)
    add_data_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default="out/lens", metavar="DIR", help="folder of the results (out/lens)")
    group.add_argument("--plain", action="store_true", help="Jaccard: a forward pass per point, slow, the same curves")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="for run.json; nothing is random here (0)")
    args = parser.parse_args(argv)
    if bool(args.top) + bool(args.modules or args.edge) > 1:
        raise ValueError("--top and --modules or --edge exclude each other")
    if (args.at != "last" or args.layer is not None) and not args.top:
        raise ValueError(f"{'--at' if args.at != 'last' else '--layer'} goes with --top")
    args.edges = list(dict.fromkeys(map(parse_edge, args.edge)))
    args.window = args.window or (3 if args.model in BUNDLED else 9)
    args.subword, args.max_norm = "first", None
    return args


# ---------------------------------------------------------------------------------------------------- the top words

@torch.inference_mode()
def top_words(decoder, stream, positions, K, norm):
    """The lens's K likeliest tokens -> probabilities and ids, (L + 1, n, K) each. A few positions at a time: a
    distribution over all words for each layer and patch would not fit."""
    parts = [lens(decoder, stream, positions[i:i + 16], norm).topk(K) for i in range(0, len(positions), 16)]
    return torch.cat([p.values for p in parts], 1).cpu(), torch.cat([p.indices for p in parts], 1).cpu()


def show_top(model, q, args):
    """--top: one question's likeliest words after each layer, as a table, top.csv and a picture."""
    import csv
    from pathlib import Path

    import plots
    from llava_min import patch_boxes
    p, _, (stream, _), _, _, answer = start(model, q, args)
    places, L = p.positions(args.at), len(model.decoder.layers)
    patches = set(places) <= set(p.groups.get("image", ()))
    if args.layer is not None and not (patches and 0 <= args.layer <= L):
        raise ValueError(f"--layer takes 0 to {L}" if patches else f"--layer is for patches, not for --at {args.at}")
    if not patches and len(places) > 60:
        raise ValueError(f"--at {args.at} has {len(places)} tokens: too many for a table, take a smaller group")
    if args.top > model.decoder.config.vocab:
        raise ValueError(f"--top {args.top}: the vocabulary has {model.decoder.config.vocab} words")
    values, ids = top_words(model.decoder, stream, places, args.top, args.norm)
    words = [[[spelt(model, i) for i in row] for row in rows] for rows in ids.tolist()]  # [layer][place][rank]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "top.csv", "w", newline="", encoding="utf-8") as f:
        write = csv.writer(f, lineterminator="\n").writerow
        write(COLUMNS["top.csv"])
        for layer in range(L + 1):
            for n, place in enumerate(places):
                for rank in range(args.top):
                    write([*q.about(answer), place, p.tokens[place], layer, 1 + rank,
                           model.tokenizer.id_to_token(ids[layer, n, rank].item()),
                           finite(values[layer, n, rank].item()), args.norm])
    print(f"{q.question} {answer}   ({args.norm} lens at {args.at})")
    if patches:
        layer = L if args.layer is None else args.layer
        print_common(words)
        plots.patch_words(q.open(), f"{q.question} {answer}\n{args.norm} lens after layer {layer} of {L}",
                          patch_boxes(p.size, model.config)[[i - p.groups["image"][0] for i in places]],
                          [row[0] for row in words[layer]], values[layer, :, 0].tolist(), out / "top.png")
    else:
        one = len(places) == 1                                      # columns: ranks of one place, or places
        heads = [f"{1 + k}." for k in range(args.top)] if one else [repr(p.tokens[i])[1:-1] for i in places]
        cells = [rows[0] if one else [row[0] for row in rows] for rows in words]
        shares = values[:, 0] if one else values[:, :, 0]
        print_table(heads, cells, shares.tolist())
        plots.words(f"{q.question} {answer}\n{args.norm} lens at {args.at}", heads, cells, shares.tolist(),
                    out / "top.png")
    print(f"wrote {out / 'top.csv'} and {out / 'top.png'}")


def spelt(model, token):
    """A token as a reader would write it; what is no text of its own as the vocabulary has it."""
    text = model.tokenizer.decode([token], skip_special_tokens=False).strip()
    return text if text and text.isprintable() and text != "\ufffd" else model.tokenizer.id_to_token(token)


def print_table(heads, cells, shares):
    """Rows from layer 0 up, a column per head: the word and its probability in percent."""
    text = [[f"{word} {100 * share:.0f}" for word, share in zip(*row, strict=True)]
            for row in zip(cells, shares, strict=True)]
    wide = [max(len(row[i]) for row in (heads, *text)) for i in range(len(heads))]
    for label, row in (("layer", heads), *((str(i), row) for i, row in enumerate(text))):
        print(f"{label:>5}  " + "  ".join(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True)).rstrip())


def print_common(words):
    """For each layer the words that are the likeliest at the most patches."""
    from collections import Counter
    for layer, rows in enumerate(words):
        common = Counter(row[0] for row in rows).most_common(6)
        print(f"{layer:>5}  " + ", ".join(f"{word} at {n}" for word, n in common) + f"   of {len(rows)} patches")


if __name__ == "__main__":
    from runs import cli
    cli(main)
