"""
check.py - is the cut a cut, and is the model the published one? One table; exit code 1 if a check fails.

Run     python check.py                                                    the bundled model: all that needs no download
        python check.py --model llava-1.5-7b --only prompt                 tokenizer and config alone, no weights
        python check.py --model llava-1.5-7b --images GQA/images           ... and its weights
        python check.py --model llava-1.5-13b --images GQA/images --gqa val_balanced_questions.json
        python check.py --model mine --freeze mine.json                    today's numbers; later: --against mine.json
Takes   the flags of knockout.py that choose model, questions, edges, window and heads, for `cut` and --freeze
Paper   https://arxiv.org/abs/2411.18620, Eq. 7, Table 2

    cut        your questions, with the kernel that the experiments use, and the windows around the first, the middle
               and the last layer: no attention is left on a cut edge; no token before the first target, and no layer
               below the window, changes by a single bit; nor does an empty cut change one; the sweep, all layers in
               one pass, gives the probabilities of the plain loop (in 16 bits both round: only reported). Reported
               for comparison: how much a random source of the same size changes.
    prompt     token ids, positions and related patches of the questions in harness/published.json: they need
               tokenizer and config alone.
    numbers    the answers to these questions, their probabilities with five edges cut in turn, and the logit lens,
               beside those that others measured on the published weights. They need weights and photos.
    greedy     the answer to one picture that the scripts expect which converted the weights of 1.6 and Llama3-NeXT.
    accuracy   accuracy on GQA, by group, beside the paper's Table 2.

For the bundled models, `prompt` and `numbers` compare with tiny/frozen.json, which --freeze wrote. What cannot be
checked is named, with the reason.
"""
import hashlib
import json
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
from fork import additive, causal, probability, unembed
from groups import random_sets
from harness import errors, experiment, flags, hub, runs, tables
from harness.intervals import wilson
from harness.questions import BUNDLED, Question, picture
from knockout import edge_mask, forward, percent, sweep, window
from llava_min import IMAGE, read_json

ROOT = Path(__file__).resolve().parent
FACTS = (ROOT / "harness" / "published.json", ROOT / "tiny" / "frozen.json")
PARTS = ("cut", "prompt", "numbers", "greedy", "accuracy")


@dataclass(frozen=True)
class Check:
    """A line of the table."""
    part: str
    what: str
    ours: str
    wanted: str
    held: bool | None                              # None: reported, not judged


class CannotCheck(ValueError):
    """Why a part, or a question of it, cannot be checked."""


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
    leaked, before, below, apart = [0.0], [0.0], [0.0], [0.0]
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
        apart.append(abs(fast[l] - slow) / slow)

    def logits_with(mask, layers):
        return unembed(decoder, forward(decoder, x, positions, plain, mask, layers)[0, -1])
    base = logits_with(plain, ())
    empty = (logits_with(mask([]), range(L)) - base).abs().max().item()

    pool = experiment.control_pool(source, target, T)
    drawn, = random_sets(pool, min(len(source), len(pool)), 1, seed)
    p, middle = probability(base, token), window(L // 2, k, L)

    def change(places):
        return percent(p, probability(logits_with(mask(places), middle), token))
    exact = x.dtype in (torch.float32, torch.float64)               # in 16 bits both ways round, but differently
    return [("largest contribution over a cut edge", max(leaked), max(leaked) == 0),
            ("largest change of a token before the first target", max(before), max(before) == 0),
            ("largest change in a layer below the window", max(below), max(below) == 0),
            ("largest change of a logit when the source is empty", empty, empty == 0),
            ("largest relative difference of the sweep and the plain loop", max(apart),
             max(apart) < 1e-4 if exact else None),
            (f"change_percent around layer {L // 2}, source of {len(source)} tokens", change(source), None),
            (f"change_percent around layer {L // 2}, {len(drawn)} random tokens instead", change(drawn), None)]


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


def check_cut(s, study, entry):
    """`selfcheck` of every edge of every question -> (list of Check: of each sentence the worst, what was skipped)."""
    worst, changes, lacking = {}, defaultdict(list), {}
    for question in tqdm(study.questions, "cut", file=sys.stderr, dynamic_ncols=True):
        asked = study.ask(question, s.cut.paper_spans, s.cut.subword, s.cut.max_norm)
        cuts, why = replace(asked, strict=False).edges(s.cut.edges)
        lacking |= {f"cut of {edge}, {question.key}: {reason}": None for edge, reason in why.items()}
        for edge, places in cuts.items():
            *checks, change, control = selfcheck(study.model.decoder, asked.x, asked.positions, asked.clean, *places,
                                                 asked.token, s.cut.window, s.cut.heads, s.cut.shared.seed)
            for sentence, value, passed in checks:
                if sentence not in worst or value > worst[sentence][0]:
                    worst[sentence] = value, passed, f"{question.key} {edge}"
            changes[edge].append((change[1], control[1]))
    n = sum(map(len, changes.values()))
    middle = len(study.model.decoder.layers) // 2
    table = [Check("cut", f"{sentence} ({where if value else '1 edge' if n == 1 else f'{n} edges'})", f"{value:.2g}",
                   "0" if "sweep" not in sentence else "-" if passed is None else "below 0.0001", passed)
             for sentence, (value, passed, where) in worst.items()]
    for edge, pairs in changes.items():
        ours, control = np.mean(pairs, 0)
        table.append(Check("cut", f"{edge}, window {s.cut.window} around layer {middle}: change of P; random source",
                           f"{ours:+.3g}; {control:+.3g} %", "-", None))
    return table, list(lacking)


# ---------------------------------------------------------------------------------------------------- against numbers

def question_of(fact, images):
    """A question of a facts file -> Question, its photo in the folder `images`."""
    return Question(id=fact["id"], question=fact["question"], image=picture(images, fact["image"]),
                    answer=fact["answer"], task="check", true_option=fact["true_option"],
                    false_option=fact["false_option"], objects=tuple(fact["objects"]),
                    boxes=tuple(map(tuple, fact["boxes"])), size=tuple(fact["size"]))


def photo_of(fact, images):
    """The photo of a fact -> its path. CannotCheck: it is missing, or another one."""
    if images is None:
        raise CannotCheck(f"it needs the photo {fact['image']}; pass --images DIR")
    file = picture(images, fact["image"])
    if not file.is_file():
        raise CannotCheck(f"{file} is missing" + (f": it is {fact['from']}" if "from" in fact else ""))
    wanted = fact.get("image_sha256")
    if wanted and (found := runs.file_hash(file)) != wanted:
        raise CannotCheck(f"{file} is another photo: its sha256 is {found[:12]}..., not {wanted[:12]}...")
    return file


def prompt_numbers(p, groups, image_id):
    """What can be known of a question without weights, as a facts file has it."""
    ids = [j for i in p.ids for j in ([image_id] * len(p.image) if i == IMAGE else [i])]
    named = groups.named
    return {"ids_sha256": hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest(), "tokens": len(p),
            "image": [p.image.start, p.image.stop], "question": [named["question"][0], named["question"][-1] + 1],
            "last": named["last"][0], "related_patches": named.get("related_patches", [])}


def measured_numbers(model, asked, edges, k):
    """What a facts file says of a question besides: the answer, and its probability with each edge cut at each layer.

    lens_top1: the likeliest token at the last position after each layer, through the final norm.
    """
    d, cuts = model.decoder, asked.edges(edges)[0]
    curves = sweep(d, asked.clean, list(cuts.values()), asked.token, k)
    last = torch.cat([asked.clean.stream[1 + l][0, -1:] for l in range(len(d.layers))])     # (L, C)
    ids, = model.decode(unembed(d, last[-1])[None], asked.clean.caches, len(asked.prompt))
    return {"token": asked.token, "answer_ids": ids, "p_base": asked.p,
            "p_knockout": dict(zip(cuts, curves, strict=True)), "lens_top1": unembed(d, last).argmax(-1).tolist()}


def shell(files):
    """Files without weights -> a LLaVA that can make prompts, and nothing else: its tensors have no values."""
    config = hub.read_config(files)
    with torch.device("meta"):
        model = hub.family(files).LLaVA(config)
    model.tokenizer = config.decoder_file.load_tokenizer(files.tokenizer.parent)
    return model


WHAT = {"ids_sha256": "token ids", "tokens": "number of tokens", "image": "positions of the image",
        "question": "positions of the question", "last": "the last position", "related_patches": "related patches"}


def check_prompts(files, facts):
    """-> list of Check. files: tokenizer and config suffice. facts: a model's entry in a facts file."""
    model, differ = shell(files), defaultdict(list)
    for fact in facts["questions"]:
        p = model.prompt(fact["question"], Image.new("RGB", fact["size"]))      # of the photo, its size alone matters
        ours = prompt_numbers(p, question_of(fact, None).groups(p), facts["image_id"])
        for name in WHAT:
            theirs = fact["prompt"][name]
            differ[name] += [f"{fact['id']}: {brief(ours[name])}, not {brief(theirs)}"] * (ours[name] != theirs)
    n = len(facts["questions"])
    return [Check("prompt", f"{WHAT[name]}, {n} questions", wrong[0] if wrong else "equal", "equal", not wrong)
            for name, wrong in differ.items()]


def brief(value):
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}...{text[-8:]}"


# Two float32 runs of one model differ by rounding alone. In bfloat16, in which the published numbers were measured, a
# step of a logit is 0.125: a probability near 0.75 jumps by 3 % of itself. So shapes are compared there, not digits.
EXACT, ROUNDED = (1e-3, 3e-4, 0.9), (0.12, 0.04, 0.75)


def check_numbers(s, study, entry):
    """-> the same two lists. The bands are shares of the clean probability, for one point and for the mean over the
    layers, and the share of layers at which the lens's likeliest token is the same."""
    model, far, lens, other, base, lacking = study.model, defaultdict(list), [], [], [], []
    exact = entry["dtype"] == hub.dtype_name(model.decoder.norm.weight) == "float32"
    point, mean, layers = EXACT if exact else ROUNDED
    for fact in tqdm(entry["questions"], "numbers", file=sys.stderr, dynamic_ncols=True):
        key, wanted = fact["id"], fact["numbers"]
        try:
            photo_of(fact, s.images)
        except CannotCheck as e:
            lacking.append(f"numbers of question {key}: {e}")
            continue
        edges = [tuple(edge.split("->")) for edge in wanted["p_knockout"]]
        ours = measured_numbers(model, study.ask(question_of(fact, s.images)), edges, entry["window"])
        if ours["answer_ids"] != [i for i in wanted["answer_ids"] if i not in model.stop]:
            other.append(f"{key}: {model.words(ours['answer_ids'])!r}")
        base.append((abs(ours["p_base"] / wanted["p_base"] - 1), key))
        for edge, theirs in wanted["p_knockout"].items():
            apart = np.abs(np.subtract(ours["p_knockout"][edge], theirs)) / wanted["p_base"]
            far[edge].append((apart.max(), apart.mean(), key))
        if "lens_top1" in wanted:
            lens.append((np.mean(np.equal(ours["lens_top1"], wanted["lens_top1"])), key))
    if not base:
        return [], lacking
    (apart, key), n = max(base), len(base)
    checks = [Check("numbers", f"answers to {n} questions", other[0] if other else "equal", "equal", not other),
              Check("numbers", f"P of the first token, largest difference ({key})", f"{100 * apart:.2g} %",
                    f"at most {100 * point:g} %", apart <= point)]
    for edge, differences in far.items():
        (worst, _, key), most = max(differences), max(average for _, average, _ in differences)
        checks.append(Check("numbers", f"{edge}: largest, mean difference of a curve ({key})",
                            f"{100 * worst:.2g}, {100 * most:.2g} %", f"at most {100 * point:g}, {100 * mean:g} %",
                            bool(worst <= point and most <= mean)))
    if lens:
        same, key = min(lens)
        checks.append(Check("numbers", f"logit lens: layers with the same likeliest token ({key})",
                            f"{100 * same:.3g} %", f"at least {100 * layers:g} %", bool(same >= layers)))
    return checks, lacking


WORDS = 12                                         # half precision rounds a long answer onto another path at last


def check_greedy(s, study, entry):
    """-> the same two lists: how many words of a long answer are those that were expected."""
    fact, model = entry["greedy"], study.model
    try:
        p = model.prompt(fact["question"], photo_of(fact, s.images), brief=False)
    except CannotCheck as e:
        return [], [f"greedy: {e}"]
    if list(p.size) != fact["size"]:
        return [], [f"greedy: {fact['image']} is {p.size[0]}x{p.size[1]} px, not {fact['size'][0]}x{fact['size'][1]}"]
    ours, wanted = model.generate(p, 100).split(), fact["answer"].split()
    same = next((i for i, pair in enumerate(zip(ours, wanted, strict=False)) if len(set(pair)) > 1),
                min(len(ours), len(wanted)))
    return [Check("greedy", f"words that are as expected, up to the first other one ({' '.join(ours[:4])} ...)",
                  f"{same} of {len(wanted)}", f"at least {WORDS}", same >= WORDS)], []


def check_accuracy(s, study, entry):
    """-> the same two lists: each group's published accuracy lies in the 99.9 % interval of ours, or not.

    With 95 %, one of fifteen groups would fail on most models that are right.
    """
    if not (s.gqa and s.images):
        return [], ["accuracy: it needs GQA's val_balanced_questions.json and its photos; pass --gqa FILE --images DIR"]
    shared = s.cut.shared
    data = flags.DataSettings(data=(s.gqa,), images=s.images, limit=s.limit, all=True)
    out = Path(shared.out) / "eval_gqa"
    with redirect_stdout(sys.stderr):                               # its own table
        eval_gqa.run(eval_gqa.Settings(replace(shared, data=data, out=str(out))), lambda *_: study.model)
    checks = []
    for row in tables.read(out / "accuracy.csv", ("group", "questions", "correct")):
        if (theirs := entry["accuracy"].get(row["group"])) is not None:
            right, n = int(row["correct"]), int(row["questions"])
            low, high = wilson(right, n, 3.29)
            checks.append(Check("accuracy", f"{row['group']}, {n} questions, with its interval",
                                f"{100 * right / n:.1f} ({100 * low:.1f} to {100 * high:.1f}) %", f"{theirs:g} %",
                                low <= theirs / 100 <= high))
    return checks, []


def read_facts(files):
    """Facts files -> {model: its entry}. ValueError: one is not such a file."""
    facts = {}
    for file in files:
        for name, entry in read_json(file).items():
            ok = isinstance(entry, dict) and isinstance(entry.get("source"), str) and all(
                isinstance(q, dict) and {"id", "image", "size", "prompt", "numbers"} <= q.keys()
                for q in entry.get("questions", ()))
            if not ok:
                raise ValueError(f"{file}: {name!r} is not a model's entry, as `check.py --freeze` writes it")
            facts[name] = entry
    return facts


def freeze(s, study, name):
    """--freeze: write what is measured on the questions of this run, as a facts file."""
    study.need_photos("--freeze writes numbers of questions about photos")
    entry = {"source": f"python check.py --freeze, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}",
             "dtype": hub.dtype_name(study.model.decoder.norm.weight), "window": s.cut.window,
             "image_id": study.model.config.text.vocab, "questions": []}
    for q in tqdm(study.questions, "questions", file=sys.stderr, dynamic_ncols=True):
        asked = study.ask(q, s.cut.paper_spans)
        edges = [edge for edge in s.cut.edges if "->".join(edge) in replace(asked, strict=False).edges([edge])[0]]
        entry["questions"].append({
            "id": q.id, "question": q.question, "answer": q.answer, "true_option": q.true_option,
            "false_option": q.false_option, "objects": q.objects, "boxes": q.boxes, "image": q.image.name,
            "image_sha256": runs.file_hash(q.image), "size": asked.prompt.size,
            "prompt": prompt_numbers(asked.prompt, asked.groups, entry["image_id"]),
            "numbers": measured_numbers(study.model, asked, edges, s.cut.window)})
    others = read_facts([s.freeze]) if Path(s.freeze).exists() else {}
    lines = (f" {json.dumps(key)}: {json.dumps(one)}" for key, one in (others | {name: entry}).items())
    runs.replace_text(Path(s.freeze), "{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {s.freeze}; python check.py --model {s.cut.shared.model.name} --against {s.freeze} compares with it")
    return 0


def show(checks, lacking, source):
    """The table on the screen, and what it leaves open."""
    lines = [("part", "what", "ours", "wanted", "")]
    lines += [(c.part, c.what, c.ours, c.wanted, {None: "", True: "ok", False: "FAILED"}[c.held]) for c in checks]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{text:{w}}" for text, w in zip(line, wide, strict=True)).rstrip())
    if source:
        print(f"the wanted numbers: {source}")
    for reason in lacking:
        print(f"not checked: {reason}")
    judged = [c.held for c in checks if c.held is not None]
    print(f"{len(judged)} checks, {judged.count(False)} failed")


# What measures a part; and the key of a facts file's entry that it needs.
MEASURE = {"cut": check_cut, "numbers": check_numbers, "greedy": check_greedy, "accuracy": check_accuracy}
NEEDS = {"prompt": "questions", "numbers": "questions", "greedy": "greedy", "accuracy": "accuracy"}


# ---------------------------------------------------------------------------------------------------- command line

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
        sys.exit(run(parse(flags.Parser(__doc__), argv)))


def run(s):
    """Check what can be checked, and print the table -> the exit code. ValueError: nothing can be."""
    m = s.cut.shared.model
    name = s.published or {repo: name for name, repo in hub.MODELS.items()}.get(m.name, m.name)
    if s.freeze:
        return freeze(s, experiment.Study(s.cut.shared), name)
    facts, parts = read_facts([s.against] if s.against else FACTS), s.only or PARTS
    if s.published and name not in facts:
        raise ValueError(f"--published {name}: there are numbers of {', '.join(facts)}")
    if s.against and name not in facts and len(facts) == 1:         # a file of one model, whatever it is called today
        name, = facts
    entry, checks, lacking = facts.get(name, {}), [], []
    files = hub.resolve(m.name, m.revision, m.vision_tower, weights=False).files
    if "prompt" in parts and "questions" in entry:
        checks += check_prompts(files, entry)
    rest = [part for part in parts if part == "cut" or part in NEEDS and NEEDS[part] in entry and part != "prompt"]
    try:
        if rest:
            hub.resolve(m.name, m.revision, m.vision_tower)
    except ValueError as e:                                         # the small files are there: they are worth a table
        if not checks:
            raise
        rest, lacking = [], [f"{', '.join(rest)}: {e}"]
    study = experiment.Study(s.cut.shared) if rest else None
    for part in rest:
        more, why = MEASURE[part](s, study, entry)
        checks, lacking = checks + more, lacking + why
    if none := [part for part in parts if NEEDS.get(part, "source") not in {"source", *entry}]:
        lacking.append(f"{', '.join(none)}: nobody's numbers of {name} are at hand")
    if not checks:
        raise ValueError(f"nothing could be checked: {'; '.join(lacking)}")
    show(checks, lacking, entry.get("source"))
    return 1 if any(check.held is False for check in checks) else 0


def parse(parser, argv=None):
    """The command line -> Settings."""
    group = parser.add_argument_group("what to check")
    group.add_argument("--only", nargs="+", choices=PARTS, default=(), metavar="PART",
                       help=f"of {', '.join(PARTS)} (default: all that can be checked)")
    group.add_argument("--published", metavar="NAME", help="which published model --model is, if its name does not say")
    group.add_argument("--gqa", metavar="FILE", help="GQA's val_balanced_questions.json, its photos in --images: the "
                       "first 100 questions of each group (--limit: so many)")
    group.add_argument("--against", metavar="FILE", help="numbers to compare with (harness/published.json, "
                       "tiny/frozen.json)")
    group.add_argument("--freeze", metavar="FILE", help="write this model's numbers on these questions, and stop")
    args = parser.cut_args(argv, "out/check")
    limit, args.limit = args.limit, args.limit or (None if args.data else 1)    # bundled: one question of each task
    cut = knockout.parse(parser, args=args)
    if args.gqa and not args.images:
        raise ValueError("--gqa needs --images DIR, the folder of its photos")
    if args.images and not Path(args.images).is_dir():
        raise ValueError(f"--images {args.images}: no such folder")
    bundled = BUNDLED.parent / "images" if (args.published or args.model) in hub.BUNDLED else None
    return Settings(cut, tuple(args.only), args.images or bundled, args.gqa, limit or 100, args.published, args.against,
                    args.freeze)


if __name__ == "__main__":
    main()
