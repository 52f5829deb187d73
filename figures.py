"""
figures.py - the paper's figures by their numbers, on any model and any questions.

Run     python figures.py --list                             every figure, what it shows, what it costs
        python figures.py 3 4 5                              on the bundled model and questions
        python figures.py 7 --model llava-1.5-13b --data *_ChooseAttr.csv --images photos
        python figures.py all --limit 50
Needs   the whole of this repository
Paper   https://arxiv.org/abs/2411.18620

Figures that need the same pass over the questions share it. A pass is a run of knockout.py, lens.py or prune.py in a
folder of its own, and goes on where it stopped when it is called again.

What it writes, for each figure: figure_N.csv (the rows behind it), figure_N.png, figure_N.pdf; in runs/ the passes.
"""
import csv
import hashlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import knockout
import lens
import plots
import prune
from knockout import token_layers, window


@dataclass(frozen=True)
class Figure:
    about: str
    model: str                                     # the one that the paper shows
    kind: str                                      # knockout, lens, jaccard or prune: what is run and how it is drawn
    edges: tuple = ()
    flags: tuple = ()                              # what the script gets besides
    windows: tuple = ()                            # a panel for each, instead of one for each task
    tasks: tuple = ()                              # () is all six


LAST = ("question->last", "image->last", "last->last")
PATCHES = ("related_patches->question", "other_patches->question")
PARTS = ("true_option", "false_option", "options", "question_wo_options", "objects", "question_wo_objects")
WINDOWS = (1, 3, 5, 7, 9, 11, 15)
MODELS = {3: "llava-1.5-13b", 20: "llava-1.5-7b", 24: "llava-v1.6-vicuna-7b", 28: "llama3-llava-next-8b"}
FIGURES = {}
for first, model in MODELS.items():
    FIGURES |= {first: Figure("question, image, last -> last", model, "knockout", LAST),
                first + 1: Figure("image -> question", model, "knockout", ("image->question",)),
                first + 2: Figure("related, other patches -> question", model, "knockout", PATCHES),
                first + 3: Figure("logit lens of the answer", model, "lens")}
BIG = MODELS[3]
FIGURES |= {
    7: Figure("question, image -> last, several windows", BIG, "knockout", LAST[:2], windows=WINDOWS,
              tasks=("ChooseAttr",)),
    8: Figure("image -> question, several windows", BIG, "knockout", ("image->question",), windows=WINDOWS,
              tasks=("ChooseAttr",)),
    9: Figure("figure 3 at the answer's last sub-word", BIG, "knockout", LAST, ("--subword", "last")),
    10: Figure("figure 4 at the answer's last sub-word", BIG, "knockout", ("image->question",), ("--subword", "last")),
    11: Figure("figure 5 at the answer's last sub-word", BIG, "knockout", PATCHES, ("--subword", "last")),
    12: Figure("the question's words without a module", BIG, "jaccard", flags=("--modules",)),
    13: Figure("the question's words without a module", MODELS[20], "jaccard", flags=("--modules",)),
    14: Figure("no image tokens in the last layers: accuracy, time", "llava-v1.6-vicuna-13b", "prune"),
    32: Figure("parts of the question -> last", BIG, "knockout", tuple(f"{part}->last" for part in PARTS)),
    33: Figure("parts of the question -> options, objects", BIG, "knockout", (
        "question_wo_options->true_option", "question_wo_options->false_option", "question_wo_objects->objects")),
    **{number: Figure(f"{source} -> parts of the question", BIG, "knockout", tuple(f"{source}->{p}" for p in PARTS))
       for number, source in ((34, "image"), (35, "other_patches"), (36, "related_patches"))},
    37: Figure("the question's words without image -> question", BIG, "jaccard", ("image->question",),
               tasks=("ChooseAttr",))}
FIGURES |= {
    15: Figure("norms of the patches' features", BIG, "norms"),
    16: Figure("figure 5 without patches of a norm above 57", BIG, "knockout", PATCHES, ("--max-norm", "57")),
    17: Figure("captions, question -> last, text only", "vicuna-1.5-13b", "knockout", ("captions->last", LAST[0]))}
FIGURES = dict(sorted(FIGURES.items()))
OF_TEXT = (17,)                                    # for text-only models; all others need a picture


def norms(argv, load):
    """One pass of figure 15: the norm of every patch's feature, a row each."""
    import llava_min
    from eval_gqa import add_data_flags, open_run, prepare, run_all
    from runs import Parser
    parser = Parser(norms.__doc__)
    llava_min.add_model_flags(parser)
    add_data_flags(parser)
    parser.add_argument("--out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    def measure(model, q, args, strict):
        p = q.prompt(model)
        return [[q.id, q.image.name, q.task, patch, value] for patch, value in enumerate(model.patch_norms(p).tolist())
                if not math.isnan(value)], {}                       # a newline has no feature
    files, questions, bad = prepare(args)
    run = open_run(args, files, questions, "norms.csv", ("question_id", "image", "task", "patch", "norm"))
    run_all(run, args, files, questions, bad, measure, load)


SCRIPTS = {"knockout": (knockout.main, "knockout.csv", plots.knockout), "lens": (lens.main, "lens.csv", plots.lens),
           "jaccard": (lens.main, "jaccard.csv", plots.jaccard), "prune": (prune.main, "prune.csv", plots.prune),
           "norms": (norms, "norms.csv", plots.norms)}


def passes(figure):
    """The passes over the questions that a figure needs: list of (kind, flags), its edges left out."""
    flags = (*figure.flags, *(("--tasks", *figure.tasks) if figure.tasks else ()))
    return [(figure.kind, (*flags, "--window", str(k)) if k else flags) for k in figure.windows or (None,)]


def plan(numbers):
    """Figure numbers -> {pass: edges of all figures that share it}, in order."""
    found = defaultdict(dict)
    for figure in map(FIGURES.get, numbers):
        for one in passes(figure):
            found[one] |= dict.fromkeys(figure.edges)
    return {one: tuple(edges) for one, edges in found.items()}


def folder(one, edges):
    """A pass's folder under runs/: another for each set of edges, so that no call is refused for a former one's."""
    kind, flags = one
    name = re.sub("[^a-z0-9]+", "-", " ".join((kind, *flags))).strip("-")
    return f"{name}-{hashlib.sha256(' '.join(edges).encode()).hexdigest()[:8]}" if edges else name


def rows_of(figure, runs):
    """A figure's rows out of the CSVs of its passes -> (header, rows)."""
    head, rows = None, []
    for one in passes(figure):
        with open(runs[one] / SCRIPTS[figure.kind][1], newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            head = head or reader.fieldnames
            rows += [row for row in reader if row.get("edge", row.get("intervention")) in (figure.edges or (
                row.get("intervention"), None))]
    return head, rows


def cost(figure):
    """A figure's clean forwards per question, for a prompt of the paper's model: 620 tokens (1.5) or 2,235 (AnyRes), 35
    from the question on, 12 of them its own."""
    L, T = 40 if "13b" in figure.model else 32, 620 if "1.5" in figure.model else 2235
    first = {"last": T - 1, **dict.fromkeys(("question", *PARTS), T - 35)}
    targets = [((), (first[edge.split("->")[1]],)) for edge in figure.edges]
    total = 0
    for _, flags in passes(figure):
        k = int(flags[flags.index("--window") + 1]) if "--window" in flags else 9
        if figure.kind in ("lens", "knockout") or figure.edges:
            total += token_layers(T, L, targets, k)
        elif figure.kind == "jaccard":
            total += 1 + 2 * sum(35 * (L - window(l + k // 2, k, L).start) for l in range(L)) / (T * L)
        elif figure.kind == "prune":
            image = 576 if T == 620 else 2191
            total += 3 * sum(1 - X * image / (L * T) for X in range(0, L, 5))           # three repeats
    return total


def main():
    from eval_gqa import NoRows
    args = parse()
    if args.list:
        return show_list()
    numbers = list(FIGURES) if "all" in args.figures else sorted({int(n) for n in args.figures})
    if "all" in args.figures:                                       # 13, 20 to 31: the same passes on other models
        from llava_min import resolve, sees
        seen = sees(resolve(args.model, args.revision, args.vision_tower))
        numbers = [n for n in numbers if (n not in OF_TEXT) == seen and not 20 <= n <= 31 and n != 13]
    out, runs, models = Path(args.out), {}, {}

    def load(files, args):
        from llava_min import load_files
        if not models:
            models["one"] = load_files(files, args)
        return models["one"]
    todo = plan(numbers)
    for i, (one, edges) in enumerate(todo.items(), 1):
        kind, flags = one
        script, flags = SCRIPTS[kind][0], [*flags, *(("--edge", *edges) if edges else ())]
        runs[one] = out / "runs" / folder(one, edges)
        print(f"pass {i} of {len(todo)}: {script.__module__}.py {' '.join(flags)}")
        try:
            script([*flags, *args.passed_on, "--out", str(runs[one])], load)
        except SystemExit as stop:                                  # a shard, and not the last one to finish
            if stop.code:
                raise
        except NoRows as e:                                         # the other figures need not wait for this one
            print(f"pass {i}: {e}")
    missing = [one for one in todo if not (runs[one] / SCRIPTS[one[0]][1]).exists()]
    if missing:
        return print("the last shard to finish draws the figures")
    for number in numbers:
        figure = FIGURES[number]
        head, rows = rows_of(figure, runs)
        if not rows:
            print(f"figure {number}: no question has its groups")
            continue
        file = out / f"figure_{number}.csv"
        with open(file, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, head, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        for suffix in (".png", ".pdf"):
            SCRIPTS[figure.kind][2](file, file.with_suffix(suffix), **({"panel": "window"} if figure.windows else {}))
        print(f"figure {number}, {figure.about}: {file}, .png, .pdf")


def show_list():
    print(f"{'figure':8}{'shows':55}{'the paper shows':24}{'clean forwards a question':>26}")
    for number, figure in FIGURES.items():
        print(f"{number:<8}{figure.about:55}{figure.model:24}{cost(figure):>26.1f}")
    together = Figure("", BIG, "knockout", (*LAST, "image->question", *PATCHES))
    print(f"Figures of the same pass share its clean forward: 3, 4 and 5 together cost {cost(together):.1f}.")


def parse():
    """The command line -> args, with args.passed_on: the flags that every pass gets."""
    from eval_gqa import add_data_flags
    from llava_min import add_model_flags
    from runs import Parser
    parser = Parser(__doc__)
    parser.add_argument("figures", nargs="*", metavar="N", help="figure numbers, or all")
    parser.add_argument("--list", action="store_true", help="show what there is and stop")
    add_model_flags(parser)
    add_data_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default="out/figures", metavar="DIR", help="folder of the results (out/figures)")
    group.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    odd = [n for n in args.figures if n != "all" and not (n.isdecimal() and int(n) in FIGURES)]
    if odd or not (args.figures or args.list):
        raise ValueError(f"{'figure ' + odd[0] if odd else 'which figure?'}: there are {', '.join(map(str, FIGURES))}, "
                         "and all")
    passed_on = []
    for name, value in vars(args).items():
        if name == "shard":
            passed_on += ["--shard", "{}/{}".format(*value)] if value else []
        elif name not in ("figures", "list", "out") and value != parser.get_default(name):
            flag, values = "--" + name.replace("_", "-"), value if isinstance(value, list) else [value]
            for group in [values] if name in ("data", "tasks") else [[v] for v in values]:
                passed_on += [flag, *(str(v) for v in group if v is not True)]
    args.passed_on = passed_on
    return args


if __name__ == "__main__":
    from runs import cli
    cli(main)
