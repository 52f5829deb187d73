"""
check.py - is the cut a cut, and is the model the published one? One table; exit code 1 if a check fails.

Run     python check.py                                                    the bundled model: all that needs no download
        python check.py --model llava-1.5-7b --only prompt                 tokenizer and config alone, no weights
        python check.py --model llava-1.5-7b --images GQA/images           ... and its weights
        python check.py --model llava-1.5-13b --images GQA/images --gqa val_balanced_questions.json
        python check.py --model mine --freeze mine.json                    today's numbers; later: --against mine.json
Takes   the flags of knockout.py that choose model, questions, edges, window and heads, for `cut` and --freeze
Paper   https://arxiv.org/abs/2411.18620, Eq. 7, Table 2

    cut        your questions, the windows around the first, the middle and the last layer. In the plain loop, with the
               kernel of the experiments, no attention is left on a cut edge; no token before the first target, and no
               layer below the window, changes by a single bit; nor does an empty cut change one. The sweep, all layers
               in one pass, gives the plain loop's probabilities (in 16 bits both round: only reported). Reported for
               comparison: what a random source of the same size changes, or of as many positions as there are.
    prompt     token ids, positions and related patches of the questions in harness/published.json. Needs the tokenizer
               and the config alone.
    numbers    the answers to these questions, their probabilities with five edges cut in turn, and the logit lens,
               beside those that others measured on the published weights. Needs weights and photos.
    greedy     one greedy answer, which transformers' conversion scripts for 1.6 and Llama3-NeXT expect.
    accuracy   accuracy on GQA, by group, beside the paper's Table 2.

For the bundled models, `prompt` and `numbers` compare with tiny/frozen.json, which --freeze wrote. What cannot be
checked is named, with the reason.
"""
import signal
import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import eval_gqa
import knockout
import lens
from fork import additive, causal, probability, unembed
from groups import parse_edge, random_sets
from harness import errors, experiment, facts, flags, hub, runs, tables
from harness.facts import CannotCheck, photo_of, question_of
from harness.intervals import wilson
from knockout import edge_mask, forward, percent, sweep, window


@dataclass(frozen=True)
class Check:
    """A line of the table."""
    part: str
    what: str
    ours: str
    wanted: str
    held: bool | None                              # None: reported, not judged


# ---------------------------------------------------------------------------------------------------- is the cut a cut?

@torch.inference_mode()
def selfcheck(decoder, x, positions, clean, source, target, token, k, heads=None, seed=0):
    """Is the cut what Eq. 7 says? -> list of (sentence, number, passed); passed is None where it is only reported.

    x (1, T, C) at positions (T,); clean: its fork.clean_pass; source, target: lists of positions; k: the window.
    """
    T, L = x.shape[1], len(decoder.layers)
    fast = sweep(decoder, clean, [(source, target)], token, k, heads)[0]

    def mask(places):
        return edge_mask(decoder, T, places, target, heads).to(x.device)
    closed = mask(source)
    plain = additive(causal(T, device=x.device)).expand_as(closed)  # of the same shape, so SDPA picks the same kernel
    cos, sin = decoder.rope(positions)
    leaked, before, below, apart = [0.0], [], [], [0.0]
    for l in {0, L // 2, L - 1}:
        layers = window(l, k, L)
        a = b = x                                                   # the clean run, and the one with the cut
        for i, layer in enumerate(decoder.layers):
            if i in layers:
                leaked.append(carried(layer, b, cos, sin, closed, source, heads)[target].max().item())
            a, b = layer(a, cos, sin, plain), layer(b, cos, sin, closed if i in layers else plain)
            moved = (a - b).abs().amax((0, 2))                      # (T,)
            before += moved[:min(target)].tolist()
            below += moved.tolist() if i < layers.start else []
        slow = probability(unembed(decoder, b[0, -1]), token)
        apart.append(abs(fast[l] - slow) / max(slow, 1e-30))

    def logits_with(blocked, layers):
        return unembed(decoder, forward(decoder, x, positions, plain, blocked, layers)[0, -1])
    base = logits_with(plain, ())
    empty = (logits_with(mask([]), range(L)) - base).abs().max().item()

    pool = experiment.control_pool(source, target, T)
    drawn, = random_sets(pool, min(len(source), len(pool)), 1, seed)
    p, middle = probability(base, token), window(L // 2, k, L)

    def change(places):
        return percent(p, probability(logits_with(mask(places), middle), token))
    exact = x.dtype in (torch.float32, torch.float64)               # in 16 bits both ways round, but differently
    return [("largest contribution over a cut edge", max(leaked), max(leaked) == 0),
            ("largest change of a token before the first target", max(before, default=0.0), nothing(before)),
            ("largest change in a layer below the window", max(below, default=0.0), nothing(below)),
            ("largest change of a logit when the source is empty", empty, empty == 0),
            ("largest relative difference of the sweep and the plain loop", max(apart),
             max(apart) < 1e-4 if exact else None),
            (f"change_percent around layer {L // 2}, source of {len(source)} tokens", change(source), None),
            (f"change_percent around layer {L // 2}, {len(drawn)} random tokens instead", change(drawn), None)]


def nothing(changes):
    """Is there no change among these? None: there was nothing that could change."""
    return max(changes) == 0 if changes else None


def carried(layer, x, cos, sin, mask, source, heads=None):
    """The largest contribution of the source keys to each token's attention output (T,), by the layer's own kernel.

    The values are replaced: 1 at the source keys, in the heads that are cut, and 0 elsewhere. If nothing is carried
    from there, the output is the same as for values that are all 0.
    """
    q, k, v = layer.qkv(x, cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)            # a key head of its own for each query head
    marked = torch.zeros_like(k)
    for head in range(k.shape[1]) if heads is None else heads:
        marked[:, head, source] = 1
    out = layer.attend(q, k, marked, mask) - layer.attend(q, k, torch.zeros_like(k), mask)
    return out[0].abs().amax(-1)


# ---------------------------------------------------------------------------------------------------- the parts

# Each takes (Settings, Study, the model's entry in a facts file), and yields Checks, and texts that say what was not
# checked, and why.

def check_cut(s, study, entry):
    """`selfcheck` of every edge of every question: of each sentence the worst case."""
    worst, changes, lacking = {}, defaultdict(list), defaultdict(list)
    for question in bar(study.questions, "cut"):
        asked = study.ask(question, s.cut.paper_spans, s.cut.subword, s.cut.max_norm)
        cuts, why = replace(asked, strict=False).edges(s.cut.edges)
        for edge, reason in why.items():
            lacking[edge].append(reason)
        for edge, places in cuts.items():
            *checks, change, control = selfcheck(study.model.decoder, asked.x, asked.positions, asked.clean, *places,
                                                 asked.token, s.cut.window, s.cut.heads, s.cut.shared.seed)
            for sentence, value, passed in checks:
                case = passed is not None, value, passed, f"{question.key} {edge}"
                worst[sentence] = max(case, worst.get(sentence, case))
            changes[edge].append((change[1], control[1]))
    n, middle = count(sum(map(len, changes.values())), "edge"), len(study.model.decoder.layers) // 2
    for sentence, (_, value, passed, where) in worst.items():
        wanted = "-" if passed is None else "below 0.0001" if "sweep" in sentence else "0"
        yield Check("cut", f"{sentence} ({where if value else n})", f"{value:.2g}", wanted, passed)
    for edge, pairs in changes.items():
        ours, control = np.mean(pairs, 0)
        yield Check("cut", f"{edge}, window {s.cut.window} around layer {middle}: mean change of P",
                    f"{ours:+.3g} % (random source: {control:+.3g} %)", "-", None)
    for edge, reasons in lacking.items():
        yield f"cut of {edge}, {count(len(reasons), 'question')}: {reasons[0]}"


def shell(files, preprocess):
    """Files without weights -> a LLaVA that can make prompts, and nothing else: its tensors have no values."""
    config = hub.read_config(files, preprocess)
    with torch.device("meta"):
        model = hub.family(files).LLaVA(config)
    model.tokenizer = config.decoder_file.load_tokenizer(files.tokenizer.parent)
    return model


WHAT = {"ids_sha256": "token ids", "tokens": "number of tokens", "image": "positions of the image",
        "question": "positions of the question", "last": "the last position", "related_patches": "related patches"}


def check_prompts(model, entry):
    """The prompts of known questions. model: a `shell` will do."""
    differ = defaultdict(list)
    for fact in entry["questions"]:
        p = model.prompt(fact["question"], Image.new("RGB", fact["size"]))      # of the photo, its size alone matters
        ours = facts.prompt_numbers(p, question_of(fact).groups(p), entry["image_id"])
        for name in WHAT:
            theirs = fact["prompt"][name]
            differ[name] += [f"{fact['id']}: {brief(ours[name])}, not {brief(theirs)}"] * (ours[name] != theirs)
    n = count(len(entry["questions"]), "question")
    for name, different in differ.items():
        yield Check("prompt", f"{WHAT[name]}, {n}", different[0] if different else "equal", "equal", not different)


def brief(value):
    """A value as text that fits into a table."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}...{text[-8:]}"


def measured_numbers(model, asked, edges, k):
    """experiment.Asked -> (what a facts file calls `numbers`, {edge that the question does not have: why})."""
    cuts, lacking = replace(asked, strict=False).edges(edges)
    points = sweep(model.decoder, asked.clean, list(cuts.values()), asked.token, k)
    seen = lens.lens(model.decoder, asked.clean.stream, [-1], "final")[1:, 0]               # (L, V), after each layer
    return {"token": asked.token, "answer_ids": list(asked.answer_ids), "p_base": asked.p,
            "p_knockout": dict(zip(cuts, points, strict=True)), "lens_top1": seen.argmax(-1).tolist()}, lacking


# Two float32 runs of one model differ by rounding alone. In bfloat16, in which the published numbers were measured, a
# step of a logit is 0.125: a probability near 0.75 jumps by 3 % of itself. So shapes are compared there, not digits.
# Shares of the clean probability, for one point and for the mean over the layers; and of layers with the same token.
EXACT, ROUNDED = (1e-3, 3e-4, 1.0), (0.12, 0.04, 0.75)


def check_numbers(s, study, entry):
    """Answers, curves and logit lens of known questions: of each the worst case."""
    model, far, words, other, base = study.model, defaultdict(list), [], [], []
    L, exact = len(model.decoder.layers), entry["dtype"] == hub.dtype_name(model.decoder.norm.weight) == "float32"
    point, mean, share = EXACT if exact else ROUNDED
    for fact in bar(entry["questions"], "numbers"):
        key, wanted = fact["id"], fact["numbers"]
        for what, values in [*wanted["p_knockout"].items(), ("lens_top1", wanted.get("lens_top1", range(L)))]:
            if len(values) != L:
                raise ValueError(f"question {key} of the facts file: {what} has {len(values)} points, but the model "
                                 f"has {L} layers: it is not the model that they are of")
        try:
            photo_of(fact, s.images)
        except CannotCheck as e:
            yield f"numbers of question {key}: {e}"
            continue
        edges = list(map(parse_edge, wanted["p_knockout"]))
        ours, lacking = measured_numbers(model, study.ask(question_of(fact, s.images)), edges, entry["window"])
        yield from (f"numbers of question {key}, {edge}: {why}" for edge, why in lacking.items())
        expected = [i for i in wanted["answer_ids"] if i not in model.stop]
        if (ours["token"], ours["answer_ids"]) != (wanted["token"], expected):
            other.append(f"{key}: {brief(repr(model.words(ours['answer_ids'])))}")
        base.append((abs(ours["p_base"] / wanted["p_base"] - 1), key))
        for edge, points in ours["p_knockout"].items():
            apart = np.abs(np.subtract(points, wanted["p_knockout"][edge])) / wanted["p_base"]
            far[edge].append((apart.max(), apart.mean(), key))
        if "lens_top1" in wanted:
            words.append((np.mean(np.equal(ours["lens_top1"], wanted["lens_top1"])), key))
    if not base:
        return
    (apart, key), n = max(base), count(len(base), "question")
    yield Check("numbers", f"answers, {n}", other[0] if other else "equal", "equal", not other)
    yield Check("numbers", f"P of the first token, {n}: largest difference ({key})", f"{100 * apart:.2g} %",
                f"at most {100 * point:g} %", apart <= point)
    for edge, differences in far.items():
        (worst, _, key), most = max(differences), max(average for _, average, _ in differences)
        n = count(len(differences), "question")
        yield Check("numbers", f"{edge}, {n}: largest, mean difference of a curve ({key})",
                    f"{100 * worst:.2g}, {100 * most:.2g} %", f"at most {100 * point:g}, {100 * mean:g} %",
                    bool(worst <= point and most <= mean))
    if words:
        same, key = min(words)
        n = count(len(words), "question")
        yield Check("numbers", f"logit lens, {n}: layers with the same likeliest token ({key})",
                    f"{100 * same:.3g} %", f"at least {100 * share:g} %", bool(same >= share))


WORDS = 12                                         # half precision rounds a long answer onto another path at last


def check_greedy(s, study, entry):
    """How many words of a long answer are those that were expected."""
    fact, model = entry["greedy"], study.model
    try:
        p = model.prompt(fact["question"], photo_of(fact, s.images), brief=False)
    except CannotCheck as e:
        yield f"greedy: {e}"
        return
    if list(p.size) != fact["size"]:
        yield f"greedy: {fact['image']} is {p.size[0]}x{p.size[1]} px, not {fact['size'][0]}x{fact['size'][1]}"
        return
    ours, wanted = model.generate(p, 100).split(), fact["answer"].split()
    same = next((i for i, pair in enumerate(zip(ours, wanted, strict=False)) if len(set(pair)) > 1),
                min(len(ours), len(wanted)))
    yield Check("greedy", f"words that are as expected, up to the first other one ({' '.join(ours[:4])} ...)",
                f"{same} of {len(wanted)}", f"at least {WORDS}", same >= WORDS)


ENOUGH = 50                                        # questions in a group: fewer say little


def check_accuracy(s, study, entry):
    """Does each group's published accuracy lie in the 99.9 % interval of ours?

    With 95 %, one of fifteen groups would fail on most models that are right.
    """
    if not s.gqa:
        yield "accuracy: it needs GQA's val_balanced_questions.json and its photos; pass --gqa FILE --images DIR"
        return
    shared = s.cut.shared
    data = flags.DataSettings(data=(s.gqa,), images=s.images, limit=s.limit, all=True)
    out = Path(shared.out) / "eval_gqa"
    with redirect_stdout(sys.stderr):                               # its own table
        eval_gqa.run(eval_gqa.Settings(replace(shared, data=data, out=str(out))), lambda *_: study.model)
    rows = {row["group"]: row for row in tables.read(out / "accuracy.csv", ("group", "questions", "correct"))}
    for group, theirs in entry["accuracy"].items():
        if group not in rows:
            yield f"accuracy in {group}: {s.gqa} has no such question"
            continue
        right, n = int(rows[group]["correct"]), int(rows[group]["questions"])
        low, high = wilson(right, n, 3.29)
        yield Check("accuracy", f"{group}, {count(n, 'question')}, with the 99.9 % interval",
                    f"{100 * right / n:.1f} ({100 * low:.1f} to {100 * high:.1f}) %", f"{theirs:g} %",
                    low <= theirs / 100 <= high if n >= ENOUGH else None)


def count(n, thing):
    return f"{n} {thing}{'s' * (n != 1)}"


def bar(items, what):
    """Items under a progress bar."""
    return tqdm(items, what, file=sys.stderr, dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------------- command line

# A part -> (what measures it, the key of a facts file's entry that it needs).
PARTS = {"prompt": (None, "questions"), "cut": (check_cut, None), "numbers": (check_numbers, "questions"),
         "greedy": (check_greedy, "greedy"), "accuracy": (check_accuracy, "accuracy")}


@dataclass(frozen=True)
class Settings:
    """What the flags of a call say; --help explains each."""
    cut: knockout.Settings                         # model and questions, edges, window, heads
    only: tuple = ()
    images: str | None = None
    gqa: str | None = None
    limit: int = 100
    published: str | None = None
    against: str | None = None
    freeze: str | None = None


def main(argv=None):
    with errors.one_line_errors():
        code = run(parse(flags.Parser(__doc__), argv))
    sys.exit(code)


def run(s):
    """Check what can be checked, a part at a time -> the exit code. ValueError: nothing can be."""
    m, table, lacking = s.cut.shared.model, Table(), []
    if s.freeze is not None:
        return freeze(s)
    known = facts.read([s.against] if s.against else facts.FILES)
    name = s.published or {repo: name for name, repo in hub.MODELS.items()}.get(m.name, experiment.short_name(m.name))
    if s.published and name not in known:
        raise ValueError(f"--published {name}: there are numbers of {', '.join(known)}")
    if s.against and name not in known and len(known) == 1:         # a file of one model, whatever it is called today
        name, = known
    entry, parts = known.get(name, {}), s.only or tuple(PARTS)
    if none := [part for part in parts if PARTS[part][1] not in (None, *entry)]:
        which = "" if entry else f"; --published says which model it is, of {', '.join(known)}"
        lacking.append(f"{', '.join(none)}: nobody's numbers of {name} are at hand{which}")
    files = hub.resolve(m.name, m.revision, m.vision_tower, weights=False).files
    if not hub.read_config(files).vision:
        entry, lacking = {}, [*lacking, *(["all but cut: the model is text-only"] if entry else [])]
    if entry.get("preprocess", m.preprocess) != m.preprocess:
        lacking.append(f"prompt, numbers: they were measured with --preprocess {entry['preprocess']}")
        entry = {key: value for key, value in entry.items() if key != "questions"}
    if "prompt" in parts and "questions" in entry:
        table.add(check_prompts(shell(files, m.preprocess), entry))
    rest = [part for part in parts if part != "prompt" and PARTS[part][1] in (None, *entry)]
    try:                                                            # the small files are there: they are worth a table
        study = experiment.Study(s.cut.shared) if rest else None
    except ValueError as e:
        if not table.checks:
            raise
        rest, lacking = [], [*lacking, f"{', '.join(rest)}: {e}"]
    for part in rest:
        lacking += table.add(PARTS[part][0](s, study, entry))
    if not table.checks:
        raise ValueError(f"nothing could be checked: {'; '.join(lacking) or 'there was nothing to check'}")
    if {check.part for check in table.checks} - {"cut"}:
        print(f"the wanted numbers: {entry['source']}")
    for reason in lacking:
        print(f"not checked: {reason}")
    judged = [check.held for check in table.checks if check.held is not None]
    print(f"{count(len(judged), 'check')}, {judged.count(False)} failed")
    return 1 if False in judged else 0


class Table:
    """Prints checks as they are made: what is done is seen, whatever happens later."""

    WIDE = (6, 8, 42, 21)                          # letters of each column but the last; longer cells push the others

    def __init__(self):
        self.checks = []

    def add(self, results):
        """Checks are printed; texts, what was not checked and why, are returned."""
        lacking = []
        for result in results:
            if isinstance(result, str):
                lacking.append(result)
                continue
            if not self.checks:
                self.line("", "part", "ours", "wanted", "what")
            self.checks.append(result)
            verdict = {None: "", True: "ok", False: "FAILED"}[result.held]
            self.line(verdict, result.part, result.ours, result.wanted, result.what)
        return lacking

    def line(self, *cells):
        padded = (f"{cell:{wide}}" for cell, wide in zip(cells, (*self.WIDE, 0), strict=True))
        tqdm.write("  ".join(padded), file=sys.stdout)              # above a progress bar, if there is one


def freeze(s):
    """--freeze: write what is measured on the questions of this run, as a facts file."""
    study, k = experiment.Study(s.cut.shared), s.cut.window
    study.need_photos("--freeze writes numbers of questions about photos")
    m, (name, dtype) = s.cut.shared.model, study.measured_with().values()
    how = {"dtype": dtype, "window": k, "preprocess": m.preprocess, "image_id": study.config.text.vocab}
    before = facts.writable(s.freeze, name, **how)
    entry = {"source": f"python check.py --freeze, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}", **how,
             "questions": []}
    for q in bar(study.questions, "questions"):
        asked = study.ask(q)
        numbers, _ = measured_numbers(study.model, asked, s.cut.edges, k)
        entry["questions"].append({
            "id": q.id, "question": q.question, "answer": q.answer, "true_option": q.true_option,
            "false_option": q.false_option, "objects": q.objects, "boxes": q.boxes, "image": q.image.name,
            "image_sha256": runs.sha256(q.image), "size": asked.prompt.size,
            "prompt": facts.prompt_numbers(asked.prompt, asked.groups, how["image_id"]), "numbers": numbers})
    facts.write(s.freeze, before, name, entry)
    images = study.questions[0].image.parent
    print(f"wrote {s.freeze}; this compares with it:\npython check.py --model {m.name} --only prompt numbers --against "
          f"{s.freeze}" + (f" --images {images}" if images.resolve() != facts.PHOTOS.resolve() else ""))
    return 0


def parse(parser, argv=None):
    """The command line -> Settings."""
    group = parser.add_argument_group("what to check")
    group.add_argument("--only", nargs="+", choices=PARTS, default=(), metavar="PART",
                       help=f"of {', '.join(PARTS)} (default: all that can be checked)")
    group.add_argument("--published", metavar="NAME", help="which published model --model is, if its name does not say")
    group.add_argument("--gqa", metavar="FILE", help="GQA's val_balanced_questions.json, its photos in --images: the "
                       "first 100 questions of each group, or --limit of them")
    group.add_argument("--against", metavar="FILE", help="numbers to compare with (harness/published.json, "
                       "tiny/frozen.json)")
    group.add_argument("--freeze", metavar="FILE", help="write this model's numbers on these questions, and stop")
    parser.add_cut_flags("out/check")
    args = parser.parse_args(argv)
    limit, args.limit = args.limit, args.limit or (None if args.data else 1)    # bundled: one question of each task
    cut = knockout.Settings(parser.shared(args), parser.edges_of(args, knockout.EDGES), args.window or
                            parser.window(args.model), args.heads, args.subword, args.max_norm, args.paper_spans)
    if args.gqa and not args.images:
        raise ValueError("--gqa needs --images DIR, the folder of its photos")
    for flag, there in (("gqa", Path.is_file), ("against", Path.is_file), ("images", Path.is_dir)):
        if (value := getattr(args, flag)) is not None and not there(Path(value)):
            raise ValueError(f"--{flag} {value}: no such {'folder' if flag == 'images' else 'file'}")
    if args.freeze is not None:
        for flag in ("only", "against", "published", "gqa", "heads", "max_norm", "paper_spans"):
            if getattr(args, flag):
                raise ValueError(f"--freeze and --{flag.replace('_', '-')} cannot be combined")
        if args.subword != "first":
            raise ValueError("--freeze is of the answer's first token: leave out --subword")
    if cut.shared.data.shard:
        raise ValueError("check.py is not split into shards: run it once")
    return Settings(cut, tuple(args.only), args.images, args.gqa, limit or 100, args.published, args.against,
                    args.freeze)


if __name__ == "__main__":
    main()
