"""
figures.py - the paper's figures and tables by their numbers, on any model and any questions.

Run     python figures.py --list                             every figure and table, what it needs, what it costs
        python figures.py 3 4 5 table2                       on the bundled model and questions
        python figures.py 7 --model llava-1.5-13b --data *_ChooseAttr.csv --images photos
        python figures.py 18 --model llava-1.5-13b --data aokvqa_v1p0_val.json --images val2017
        python figures.py all --limit 50
Needs   the whole of this repository
Paper   https://arxiv.org/abs/2411.18620

Figures that need the same pass over the questions share it. A pass is a run of knockout.py, lens.py or prune.py in a
folder of its own, and goes on where it stopped when it is called again.

What it writes, for each figure: figure_N.csv (the rows behind it), figure_N.png, figure_N.pdf (18 and 19 have another
three, figure_N_lens); for tables table_N.csv, for table 1 also table_1/, the questions in the paper's columns, and for
table 2 a picture; in runs/ the passes.
"""
import csv
import hashlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace
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
    needs: str = ""                                # what questions must come with


LAST = ("question->last", "image->last", "last->last")
PATCHES = ("related_patches->question", "other_patches->question")
PARTS = ("true_option", "false_option", "options", "question_wo_options", "objects", "question_wo_objects")
WINDOWS = (1, 3, 5, 7, 9, 11, 15)
MODELS = {3: "llava-1.5-13b", 20: "llava-1.5-7b", 24: "llava-v1.6-vicuna-7b", 28: "llama3-llava-next-8b"}
BOXES, WORDS = "boxes", "options or objects"
FIGURES = {}
for first, model in MODELS.items():
    FIGURES |= {first: Figure("question, image, last -> last", model, "knockout", LAST),
                first + 1: Figure("image -> question", model, "knockout", ("image->question",)),
                first + 2: Figure("related, other patches -> question", model, "knockout", PATCHES, needs=BOXES),
                first + 3: Figure("logit lens of the answer", model, "lens", needs="answers")}
BIG = MODELS[3]
FIGURES |= {
    7: Figure("question, image -> last, several windows", BIG, "knockout", LAST[:2], windows=WINDOWS,
              tasks=("ChooseAttr",)),
    8: Figure("image -> question, several windows", BIG, "knockout", ("image->question",), windows=WINDOWS,
              tasks=("ChooseAttr",)),
    9: Figure("figure 3 at the answer's last sub-word", BIG, "knockout", LAST, ("--subword", "last")),
    10: Figure("figure 4 at the answer's last sub-word", BIG, "knockout", ("image->question",), ("--subword", "last")),
    11: Figure("figure 5 at the answer's last sub-word", BIG, "knockout", PATCHES, ("--subword", "last"), needs=BOXES),
    12: Figure("the question's words without a module", BIG, "jaccard", flags=("--modules",)),
    13: Figure("the question's words without a module", MODELS[20], "jaccard", flags=("--modules",)),
    14: Figure("no image tokens in the last layers: accuracy, time", "llava-v1.6-vicuna-13b", "prune", needs="answers"),
    15: Figure("norms of the patches' features", BIG, "norms"),
    16: Figure("figure 5 without patches of a large norm", BIG, "knockout", PATCHES, needs=BOXES),
    17: Figure("captions, question -> last, text only", "vicuna-1.5-13b", "knockout", ("captions->last", LAST[0]),
               needs="captions"),
    **{number: Figure(f"{name}: figures 3, 4 and 6", BIG, "knockout", (*LAST, "image->question"), needs=name)
       for number, name in ((18, "A-OKVQA"), (19, "OK-VQA"))},
    32: Figure("parts of the question -> last", BIG, "knockout", tuple(f"{p}->last" for p in PARTS), needs=WORDS),
    33: Figure("parts of the question -> options, objects", BIG, "knockout", (
        "question_wo_options->true_option", "question_wo_options->false_option", "question_wo_objects->objects"),
        needs=WORDS),
    **{number: Figure(f"{source} -> parts of the question", BIG, "knockout", tuple(f"{source}->{p}" for p in PARTS),
                      needs=needs)
       for number, source, needs in ((34, "image", WORDS), (35, "other_patches", f"{BOXES}, {WORDS}"),
                                     (36, "related_patches", f"{BOXES}, {WORDS}"))},
    37: Figure("the question's words without image -> question", BIG, "jaccard", ("image->question",),
               tasks=("ChooseAttr",))}
FIGURES = dict(sorted(FIGURES.items()))
OF_TEXT, OF_OTHER_DATA = (17,), (18, 19)           # for text-only models; for --data of that dataset
TABLES = {"table1": "questions of the six tasks answered right", "table2": "accuracy in GQA's fifteen groups"}


def pictures(numbers):
    """Figure numbers -> {what the files are called: Figure}."""
    found = {}
    for n in numbers:
        found[f"figure_{n}"] = FIGURES[n]
        if n in OF_OTHER_DATA:
            found[f"figure_{n}_lens"] = FIGURES[6]
    return found


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


def plan(figures):
    """Figures -> {pass: edges of all figures that share it}, in order."""
    found = defaultdict(dict)
    for figure in figures:
        for one in passes(figure):
            found[one] |= dict.fromkeys(figure.edges)
    return {one: tuple(edges) for one, edges in found.items()}


def folder(one, edges):
    """A pass's folder under runs/: another for each set of edges, so that no call is refused for a former one's."""
    kind, flags = one
    name = re.sub("[^A-Za-z0-9]+", "-", " ".join((kind, *flags))).strip("-")
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
    """A figure's clean forwards per question, for the paper's median prompt: 642 tokens (1.5) or 2,354 (AnyRes), 29 of
    them from the question on."""
    L, T = 40 if "13b" in figure.model else 32, 642 if "1.5" in figure.model else 2354
    first = {"last": T - 1, **dict.fromkeys(("question", *PARTS), T - 29)}
    targets = [((), (first[edge.split("->")[1]],)) for edge in figure.edges]
    total = 0
    for _, flags in passes(figure):
        k = int(flags[flags.index("--window") + 1]) if "--window" in flags else 9
        if figure.kind in ("lens", "knockout") or figure.edges:
            total += token_layers(T, L, targets, k)
        elif figure.kind == "jaccard":
            total += 1 + 2 * sum(29 * (L - window(l + k // 2, k, L).start) for l in range(L)) / (T * L)
        elif figure.kind == "prune":
            image = 576 if T == 642 else 2288
            total += 3 * sum(1 - X * image / (L * T) for X in range(0, L, 5))           # three repeats
    return total


def threshold(file):
    """The norm above which figure 16 leaves patches out, from figure 15's rows.

    The paper's 57 belongs to CLIP ViT-L/14-336, where 3.3 of 576 patches exceed it. More than one in twenty above it
    means another tower: then it is the norm that 3.3 of 576 exceed there.
    """
    found = sorted(float(row["norm"]) for row in plots.read(file, ("norm",)))
    few = sum(norm > 57 for norm in found) <= len(found) / 20
    return 57.0 if few else found[round(len(found) * (1 - 3.3 / 576)) - 1]


def whole_gqa(args):
    """Are the questions those of one file of GQA's, all of its tasks? The bundled ones are."""
    from llava_min import read_json
    if args.tasks or args.image or args.question or args.data and (
            len(args.data) > 1 or Path(args.data[0]).suffix != ".json"):
        return False
    raw = read_json(Path(args.data[0]), (dict, list)) if args.data else {}
    return isinstance(raw, dict) and "questions" not in raw


def accuracy(argv, load):
    """The pass of tables 1 and 2: eval_gqa.py, with its name for --data, and which counts all questions anyway."""
    import eval_gqa
    eval_gqa.main(["--questions" if arg == "--data" else arg for arg in argv if arg != "--all"], load)


def of_one_model():
    """The figures' numbers, without those that are an earlier figure on another model: 13, 20 to 31."""
    return sorted({replace(figure, model=""): n for n, figure in reversed(FIGURES.items())}.values())


def choose(args):
    """What was asked for -> (figure numbers, names of tables). ValueError: the questions are not of its kind."""
    from llava_min import resolve, sees
    if "all" in args.figures:
        seen = sees(resolve(args.model, args.revision, args.vision_tower))
        return ([n for n in of_one_model() if (n not in OF_TEXT) == seen and n not in OF_OTHER_DATA
                 and set(FIGURES[n].tasks) <= set(args.tasks or FIGURES[n].tasks)],
                list(TABLES) if seen and whole_gqa(args) else [])
    numbers = sorted({int(n) for n in args.figures if n not in TABLES})
    tables = [t for t in TABLES if t in args.figures]
    left = [n for n in numbers if args.tasks and not set(FIGURES[n].tasks) <= set(args.tasks)]
    if left:
        raise ValueError(f"figure {left[0]} is of {', '.join(FIGURES[left[0]].tasks)}, which --tasks leaves out")
    other = next((n for n in numbers if n in OF_OTHER_DATA and not args.data), None)
    if other:
        raise ValueError(f"figure {other} is of {FIGURES[other].needs}: give its questions with --data, and --images")
    if tables and not whole_gqa(args):
        raise ValueError(f"{tables[0]} is of one JSON file of GQA's, all of it: give it with --data, without --tasks")
    return numbers, tables


def main():
    from eval_gqa import NoRows, NoTask
    args = parse()
    if args.list:
        return show_list()
    numbers, tables = choose(args)
    out, models, chosen, runs, drawn, empty = Path(args.out), {}, pictures(numbers), {}, set(), []

    def load(files, args):
        from llava_min import load_files
        if not models:
            models["one"] = load_files(files, args)
        return models["one"]

    def run(script, argv, to):
        """One pass into a folder. A figure's own task stands above those of the command line."""
        own = "--tasks" in argv
        asked = () if own or not args.tasks else ("--tasks", *args.tasks)
        try:
            script([*argv, *args.passed_on, *asked, "--out", str(to)], load)
        except SystemExit as stop:                                  # a shard, and not the last one to finish
            if stop.code:
                raise
        except NoRows as e:                                         # the other figures need not wait for this one
            if isinstance(e, NoTask) and not own:
                raise
            empty.append(e)
            print(f"{to}: {e}")
    if "figure_16" in chosen:
        most, file = args.max_norm, out / "runs" / "norms" / "norms.csv"
        if most is None:
            run(norms, [], file.parent)
            most = threshold(file) if file.exists() else None
        if most is None:
            print("figure 16 needs the norms of all shards: ask for it again when they are there")
            del chosen["figure_16"]
        else:
            print(f"figure 16 leaves out patches of a norm above {most:g}")
            chosen["figure_16"] = replace(chosen["figure_16"], flags=("--max-norm", f"{most:g}"))
    todo = plan(chosen.values())
    for i, (one, edges) in enumerate(todo.items(), 1):
        kind, flags = one
        script, flags = SCRIPTS[kind][0], [*flags, *(("--edge", *edges) if edges else ())]
        runs[one] = out / "runs" / folder(one, edges)
        print(f"pass {i} of {len(todo)}: {script.__module__}.py {' '.join(flags)}")
        run(script, flags, runs[one])
        for name, figure in chosen.items():
            if name not in drawn and all(other in runs for other in passes(figure)):
                drawn.add(name)
                show_figure(name, figure, runs, out)
    if empty and not tables and not any((out / f"{name}.csv").exists() for name in chosen):
        raise empty[0]
    if tables:
        run(accuracy, ("--collect", str(out / "table_1")) if "table1" in tables else (), out / "runs" / "eval_gqa")
        show_tables(tables, out / "runs" / "eval_gqa", out)


def show_figure(name, figure, runs, out):
    """A figure's three files from its passes, if these are complete."""
    if any(not (runs[one] / SCRIPTS[one[0]][1]).exists() for one in passes(figure)):
        return print(f"{name}: a pass of it is not complete (of shards, the last to finish draws it)")
    head, rows = rows_of(figure, runs)
    if not rows:
        return print(f"{name}: no question has its groups")
    file = out / f"{name}.csv"
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, head, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(SCRIPTS[figure.kind][2], file)
    print(f"{name}, {figure.about}: {file}, .png, .pdf")


def show_tables(tables, evaluated, out):
    """Tables 1 and 2 from the folder of eval_gqa.py, if that is complete."""
    if not (evaluated / "accuracy.csv").exists():
        return print(f"{' and '.join(tables)}: the last shard to finish writes them")
    if "table1" in tables:
        print(f"table_1, {TABLES['table1']}: {write_table_1(out, evaluated / 'eval.csv')}")
    if "table2" in tables:
        file = out / "table_2.csv"
        file.write_bytes((evaluated / "accuracy.csv").read_bytes())
        draw(plots.accuracy, file)
        print(f"table_2, {TABLES['table2']}: {file}, .png, .pdf")


def draw(picture, file):
    for suffix in (".png", ".pdf"):
        picture(file, file.with_suffix(suffix))


def write_table_1(out, answers):
    """Table 1 from the rows of eval_gqa.py and the files it collected -> table_1.csv, its path."""
    from eval_gqa import SIX
    asked, file = plots.read(answers, ("task", "correct")), out / "table_1.csv"
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("task", "questions", "answered right", "collected", "example"))
        for task in SIX:
            right = [row["correct"] for row in asked if row["task"] == task]
            rows = [row for part in (out / "table_1").glob(f"*_{task}.csv") for row in plots.read(part, ("question",))]
            example = f"{rows[0]['question']} {rows[0]['answer']}" if rows else ""
            writer.writerow((task, len(right), right.count("1"), len(rows), example))
    return file


def show_list():
    print(f"{'figure':8}{'shows':53}{'questions with':27}{'the paper shows':23}{'clean forwards a question'}")
    for number, figure in FIGURES.items():
        forwards = sum(map(cost, pictures([number]).values()))
        print(f"{number:<8}{figure.about:53}{figure.needs:27}{figure.model:23}{forwards:.1f}")
    for name, about in TABLES.items():
        print(f"{name:8}{about:53}{'GQA' + ', boxes' * (name == 'table1'):27}{BIG:23}less than 1")
    together = Figure("", BIG, "knockout", (*LAST, "image->question", *PATCHES))
    print(f"Figures of the same pass share its clean forward: 3, 4 and 5 together cost {cost(together):.1f}. Tables "
          "ask all questions about a picture behind one pass over it.")


def parse():
    """The command line -> args, with args.passed_on: the flags that every pass gets, but for --tasks."""
    from eval_gqa import add_data_flags
    from llava_min import add_model_flags
    from runs import Parser
    parser = Parser(__doc__)
    parser.add_argument("figures", nargs="*", metavar="N", help="figure numbers, table1, table2, or all")
    parser.add_argument("--list", action="store_true", help="show what there is and stop")
    parser.add_argument("--max-norm", type=float, metavar="X",
                        help="figure 16: patches of a larger norm are left out (57; of another tower 0.6 %% of them)")
    add_model_flags(parser)
    add_data_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default="out/figures", metavar="DIR", help="folder of the results (out/figures)")
    group.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    odd = [n for n in args.figures if n not in ("all", *TABLES) and not (n.isdecimal() and int(n) in FIGURES)]
    if odd or not (args.figures or args.list):
        raise ValueError(f"{'figure ' + odd[0] if odd else 'which figure?'}: there are {', '.join(map(str, FIGURES))}, "
                         f"{', '.join(TABLES)}, and all")
    passed_on = []
    for name, value in vars(args).items():
        if name == "shard":
            passed_on += ["--shard", "{}/{}".format(*value)] if value else []
        elif name not in ("figures", "list", "max_norm", "out", "tasks") and value != parser.get_default(name):
            flag, values = "--" + name.replace("_", "-"), value if isinstance(value, list) else [value]
            for group in [values] if name == "data" else [[v] for v in values]:
                passed_on += [flag, *(str(v) for v in group if v is not True)]
    args.passed_on = passed_on
    return args


if __name__ == "__main__":
    from runs import cli
    cli(main)
