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
folder of its own; called again, it resumes.

Writes  figure_N.csv (the plotted rows), figure_N.png, figure_N.pdf; for 18 and 19 also figure_N_lens. table_N.csv; for
        table 1 also the folder table_1/ with its questions, for table 2 also a picture. runs/: the passes.
"""
import functools
import hashlib
import math
import re
import signal
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import eval_gqa
import knockout
import lens
import prune
from harness import errors, experiment, flags, hub, plots, tables
from harness.flags import Shared
from harness.questions import BUNDLED, SIX, NoRows, NoTask, beside
from harness.runs import csv_text, naming, replace_text
from knockout import token_layers, window
from llava_min import read_config, read_json


@dataclass(frozen=True)
class Figure:
    title: str
    model: str                                     # the one that the paper shows
    kind: str                                      # which pass it needs, see PASSES
    edges: tuple = ()
    how: tuple = ()                                # (name, value) pairs of that instrument's settings
    windows: tuple = ()                            # a panel for each, instead of one for each task
    tasks: tuple = ()                              # () is all six
    needs: str = ""                                # what the questions must come with


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
    9: Figure("figure 3 at the answer's last sub-word", BIG, "knockout", LAST, (("subword", "last"),)),
    10: Figure("figure 4 at the answer's last sub-word", BIG, "knockout", ("image->question",), (("subword", "last"),)),
    11: Figure("figure 5 at the answer's last sub-word", BIG, "knockout", PATCHES, (("subword", "last"),), needs=BOXES),
    12: Figure("the question's words without a module", BIG, "jaccard", how=(("modules", True),)),
    13: Figure("the question's words without a module", MODELS[20], "jaccard", how=(("modules", True),)),
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
OF_TEXT, OF_OTHER_DATA = (17,), (18, 19)           # figures of text-only models, and of questions of other datasets
TABLES = {"table1": "questions of the six tasks answered right", "table2": "accuracy in GQA's fifteen groups"}


def pictures(numbers):
    """Figure numbers -> {name of the figure's files: Figure}."""
    named = {}
    for n in numbers:
        named[f"figure_{n}"] = FIGURES[n]
        if n in OF_OTHER_DATA:
            named[f"figure_{n}_lens"] = FIGURES[6]
    return named


# ---------------------------------------------------------------------------------------------------- passes

def knockout_pass(shared, edges, load, window=None, **how):
    k = window or flags.Parser.window(shared.model.name)
    knockout.run(knockout.Settings(shared, tuple(tuple(edge.split("->")) for edge in edges), k, **how), load)


def lens_pass(shared, edges, load, window=None, **how):
    k = window or flags.Parser.window(shared.model.name)
    lens.run(lens.Settings(shared, edges=tuple(tuple(edge.split("->")) for edge in edges), window=k, **how), load)


def prune_pass(shared, edges, load):
    prune.run(prune.Settings(shared), load)


def norms_pass(shared, edges, load):
    """Figure 15: the norm of every patch's feature, a row each."""
    study = experiment.Study(shared, load)
    study.open("norms.csv", ("question_id", "image", "task", "patch", "norm"))
    for q in study.todo():
        with study.skipping_bad(q):
            norms = experiment.patch_norms(study.model, q.prompt(study.model)).tolist()
            study.write(q, [[q.id, q.image.name, q.task, patch, value] for patch, value in enumerate(norms)
                            if not math.isnan(value)])              # a newline has no feature
    study.finish()
    study.report()


def accuracy_pass(shared, collect, load, limit):
    """Run eval_gqa.py for tables 1 and 2. It counts wrong answers, too. Its default data are all bundled questions."""
    near = beside(shared.data.data[0])
    shared = replace(shared, data=replace(shared.data, all=True, limit=limit))
    eval_gqa.run(eval_gqa.Settings(shared, near["scene_graphs"], near["regions"], collect), load)


# kind -> (what is run, the CSV that it writes, how that is drawn)
PASSES = {"knockout": (knockout_pass, "knockout.csv", plots.knockout), "lens": (lens_pass, "lens.csv", plots.lens),
          "jaccard": (lens_pass, "jaccard.csv", plots.jaccard), "prune": (prune_pass, "prune.csv", plots.prune),
          "norms": (norms_pass, "norms.csv", plots.norms)}


def passes(figure):
    """The passes over the questions that a figure needs: list of (kind, settings as pairs), without edges: figures that
    have the same pass run theirs together."""
    how = (*figure.how, *((("tasks", figure.tasks),) if figure.tasks else ()))
    return [(figure.kind, (*how, ("window", k)) if k else how) for k in figure.windows or (None,)]


def plan(figures):
    """Figures -> {pass: edges of all figures that share it}, in order."""
    edges_of = defaultdict(dict)
    for figure in figures:
        for a_pass in passes(figure):
            edges_of[a_pass] |= dict.fromkeys(figure.edges)
    return {a_pass: tuple(edges) for a_pass, edges in edges_of.items()}


def spelt(pair):
    """("window", 9) -> "window 9", and so on."""
    name, value = pair
    values = () if value is True else value if isinstance(value, tuple) else (value,)
    return " ".join((name, *(f"{v:.17g}" if isinstance(v, float) else str(v) for v in values)))


def folder(a_pass, edges):
    """A pass's folder under runs/: one for each set of edges, so that a run with other edges is not refused."""
    kind, how = a_pass
    name = re.sub("[^A-Za-z0-9]+", "-", " ".join((kind, *map(spelt, how)))).strip("-")
    return f"{name}-{hashlib.sha256(' '.join(edges).encode()).hexdigest()[:8]}" if edges else name


def rows_of(figure, runs):
    """Yield a figure's rows, as dicts, out of the CSVs of its passes."""
    for a_pass in passes(figure):
        for row in tables.rows(runs[a_pass] / PASSES[figure.kind][1], (), empty=True):
            if row.get("edge", row.get("intervention")) in (figure.edges or (row.get("intervention"), None)):
                yield row


def cost(figure):
    """A figure's clean forwards per question, for the paper's median prompt: 642 tokens (1.5) or 2,354 (AnyRes), 29 of
    them from the question on."""
    L, T = 40 if "13b" in figure.model else 32, 642 if "1.5" in figure.model else 2354
    first = {"last": T - 1, **dict.fromkeys(("question", *PARTS), T - 29)}
    targets = [((), (first[edge.split("->")[1]],)) for edge in figure.edges]
    total = 0
    for _, how in passes(figure):
        k = dict(how).get("window", 9)
        if figure.kind in ("lens", "knockout") or figure.edges:
            total += token_layers(T, L, targets, k)
        elif figure.kind == "jaccard":
            total += 1 + 2 * sum(29 * (L - window(l + k // 2, k, L).start) for l in range(L)) / (T * L)
        elif figure.kind == "prune":
            image = 576 if T == 642 else 2288
            total += 3 * sum(1 - X * image / (L * T) for X in range(0, L, 5))           # three repeats
    return total


# ---------------------------------------------------------------------------------------------------- command line

@dataclass(frozen=True)
class Settings:
    """What the flags of a call say; --help explains each."""
    shared: Shared
    figures: tuple = ()                            # as asked for: numbers, tables, "all"
    list: bool = False
    max_norm: float | None = None
    limit: int | None = None                       # as asked for: without --data, `shared` has 20 instead of None


def main(argv=None):
    with errors.one_line_errors():
        run(parse(flags.Parser(__doc__), argv))


def run(s):
    """Run the passes that the figures need, each figure drawn as soon as its own are complete; then the tables."""
    if s.list:
        return show_list()
    numbers, chosen_tables = choose(s)
    out, chosen, runs, drawn, empty = Path(s.shared.out), pictures(numbers), {}, {}, []
    load = functools.cache(experiment.load_model)                   # one model for all passes

    def do(one_pass, what, to, tasks=None, **how):
        """One pass into a folder. what: its edges (for tables, --collect). A figure's own tasks replace --tasks.

        A question of your own is of no task; where it lacks the groups of one figure, the others are drawn.
        """
        data = replace(s.shared.data, tasks=(tasks or s.shared.data.tasks) if s.shared.data.data else ())
        try:
            one_pass(replace(s.shared, data=data, out=str(to), strict=False), what, load, **how)
        except SystemExit as stop:                                  # a shard, and not the last one to finish
            if stop.code:
                raise
        except NoRows as e:                                         # the other figures need not wait for this one
            if isinstance(e, NoTask) and not tasks:
                raise
            empty.append(e)
            print(f"{to}: {e}")
    if "figure_16" in chosen:
        most, file = s.max_norm, out / "runs" / "norms" / "norms.csv"
        if most is None:
            do(norms_pass, (), file.parent)
            norms = [float(row["norm"]) for row in tables.rows(file, ("norm",))] if file.exists() else ()
            most = float(f"{plots.threshold(norms):g}") if norms else None      # what is printed, to the digit
        if most is None:
            print("figure 16 needs the norms of all shards: ask for it again when they are there")
            del chosen["figure_16"]
        else:
            print(f"figure 16 leaves out patches of a norm above {most:g}")
            chosen["figure_16"] = replace(chosen["figure_16"], how=(("max_norm", most),))
    todo = plan(chosen.values())
    for i, (a_pass, edges) in enumerate(todo.items(), 1):
        kind, how = a_pass
        runs[a_pass] = out / "runs" / folder(a_pass, edges)
        print(f"pass {i} of {len(todo)}: {', '.join((kind, *map(spelt, how), *edges))}")
        do(PASSES[kind][0], edges, runs[a_pass], **dict(how))
        for name, figure in chosen.items():
            if name not in drawn and all(other in runs for other in passes(figure)):
                drawn[name] = show_figure(name, figure, runs, out)
    if empty and not chosen_tables and not any(drawn.values()):
        raise empty[0]
    if chosen_tables:
        collect, folder_of = str(out / "table_1") if "table1" in chosen_tables else None, out / "runs" / "eval_gqa"
        do(accuracy_pass, collect, folder_of, limit=s.limit)
        show_tables(chosen_tables, folder_of, out, Path(s.shared.data.data[0]).stem)


def of_one_model():
    """The figures' numbers, without those that are an earlier figure on another model: 13, 20 to 31."""
    return sorted({replace(figure, model=""): n for n, figure in reversed(FIGURES.items())}.values())


def choose(s):
    """What was asked for -> (figure numbers, names of tables). ValueError: the questions are not of its kind."""
    tasks = s.shared.data.tasks
    if "all" in s.figures:
        m = s.shared.model
        vision = bool(read_config(hub.resolve(m.name, m.revision, m.vision_tower).files).vision)
        return ([n for n in of_one_model() if (n not in OF_TEXT) == vision and n not in OF_OTHER_DATA
                 and set(FIGURES[n].tasks) <= set(tasks or FIGURES[n].tasks)],
                list(TABLES) if vision and whole_gqa(s.shared.data) else [])
    numbers = sorted({int(n) for n in s.figures if n not in TABLES})
    tables = [t for t in TABLES if t in s.figures]
    excluded = [n for n in numbers if tasks and not set(FIGURES[n].tasks) <= set(tasks)]
    if excluded:
        raise ValueError(f"figure {excluded[0]} needs {', '.join(FIGURES[excluded[0]].tasks)}; --tasks leaves that out")
    other = next((n for n in numbers if n in OF_OTHER_DATA and s.shared.data.data == (str(BUNDLED),)), None)
    if other:
        raise ValueError(f"figure {other} needs {FIGURES[other].needs}: give its questions with --data, and --images")
    if tables and not whole_gqa(s.shared.data):
        raise ValueError(f"{tables[0]} needs one whole JSON file of GQA's: give it with --data, without --tasks")
    return numbers, tables


def whole_gqa(d):
    """Are the questions those of one file of GQA's, all of its tasks? The bundled ones are."""
    if d.tasks or len(d.data) != 1 or Path(d.data[0]).suffix != ".json":
        return False
    raw = read_json(d.data[0], (dict, list))
    return isinstance(raw, dict) and "questions" not in raw


def show_figure(name, figure, runs, out):
    """A figure's three files from its passes, if these are complete -> was it drawn?"""
    if any(not (runs[a_pass] / PASSES[a_pass[0]][1]).exists() for a_pass in passes(figure)):
        return print(f"{name}: not drawn, a pass is incomplete (with shards, the last one to finish draws it)")
    file, rows = out / f"{name}.csv", rows_of(figure, runs)
    first = next(rows, None)
    if first is None:
        print(f"{name}: no question has its groups")
        for ending in (".csv", ".png", ".pdf"):                     # of an earlier call, with other questions
            (out / f"{name}{ending}").unlink(missing_ok=True)
        return False
    with naming(file), open(file, "w", newline="", encoding="utf-8") as f:
        f.write(csv_text([first]))                                  # its keys: the header
        for row in chain([first], rows):
            f.write(csv_text([row.values()]))
    draw(PASSES[figure.kind][2], file)
    print(f"{name}, {figure.title}: {file}, .png, .pdf")
    return True


def show_tables(tables, evaluated, out, stem):
    """Tables 1 and 2 from the folder of eval_gqa.py, if that is complete. stem: of the question file's name."""
    if not (evaluated / "accuracy.csv").exists():
        return print(f"{' and '.join(tables)}: the last shard to finish writes them")
    if "table1" in tables:
        print(f"table_1, {TABLES['table1']}: {write_table_1(out, evaluated / 'eval.csv', stem)}")
    if "table2" in tables:
        file = out / "table_2.csv"
        file.write_bytes((evaluated / "accuracy.csv").read_bytes())
        draw(plots.accuracy, file)
        print(f"table_2, {TABLES['table2']}: {file}, .png, .pdf")


def draw(picture, file):
    for suffix in (".png", ".pdf"):
        picture(file, file.with_suffix(suffix))


def write_table_1(out, answers, stem):
    """Table 1 from the rows of eval_gqa.py and the files it collected -> table_1.csv, its path. stem: of the question
    file's name, with which theirs begin."""
    asked, file = tables.read(answers, ("task", "correct")), out / "table_1.csv"
    table = [("task", "questions", "answered right", "collected", "example")]
    for task in SIX:
        right, part = [row["correct"] for row in asked if row["task"] == task], out / "table_1" / f"{stem}_{task}.csv"
        rows = tables.read(part, ("question",)) if part.exists() else []
        example = f"{rows[0]['question']} {rows[0]['answer']}" if rows else ""
        table.append((task, len(right), right.count("1"), len(rows), example))
    replace_text(file, csv_text(table))
    return file


def show_list():
    print(f"{'figure':8}{'shows':53}{'questions with':27}{'the paper shows':23}{'clean forwards a question'}")
    for number, figure in FIGURES.items():
        forwards = sum(map(cost, pictures([number]).values()))
        print(f"{number:<8}{figure.title:53}{figure.needs:27}{figure.model:23}{forwards:.1f}")
    for name, title in TABLES.items():
        print(f"{name:8}{title:53}{'GQA' + ', boxes' * (name == 'table1'):27}{BIG:23}less than 1")
    together = Figure("", BIG, "knockout", (*LAST, "image->question", *PATCHES))
    print(f"Figures of the same pass share its clean forward: 3, 4 and 5 together cost {cost(together):.1f}. Tables "
          "ask all questions about a photo after one pass over it.")


def parse(parser, argv=None):
    """The command line -> Settings."""
    parser.add_argument("figures", nargs="*", metavar="N", help="figure numbers, table1, table2, or all")
    parser.add_argument("--list", action="store_true", help="show what there is and stop")
    parser.add_argument("--max-norm", type=parser.size, metavar="X",
                        help="figure 16: leave out patches of a larger norm (default: 57; for a tower other than CLIP "
                             "ViT-L, the norm that 0.6 %% of patches exceed)")
    parser.add_shared_flags("out/figures")
    args = parser.parse_args(argv)
    odd = [n for n in args.figures if n not in ("all", *TABLES) and not (n.isdecimal() and int(n) in FIGURES)]
    if odd or not (args.figures or args.list):
        raise ValueError(f"{'no figure ' + odd[0] if odd else 'which figure?'}: choose from "
                         f"{', '.join(map(str, FIGURES))}, {', '.join(TABLES)} and all")
    return Settings(parser.shared(args), tuple(args.figures), args.list, args.max_norm, args.limit)


if __name__ == "__main__":
    main()
