"""
eval_gqa.py - questions: every dataset becomes one kind of record, `Question`, and one rule says if an answer is right.

Run     python eval_gqa.py                                   accuracy on the bundled questions, by group (Table 2)
        python eval_gqa.py --model llava-1.5-7b --questions val_balanced_questions.json --images images --collect six
Needs   llava_min beside it; runs, plots for the command line.
Use     questions = read_csv("GQA_val_..._ChooseAttr.csv", images="photos")
        questions = read_gqa("val_balanced_questions.json", images="images", scene_graphs="val_sceneGraphs.json")
Reads   the paper's six CSV files (FightingFighting/cross-modal-information-flow-in-MLLM, Table 1), GQA's questions and
        scene graphs with Visual Genome's regions, OK-VQA, A-OKVQA, an own picture and question from the command line.
Paper   https://arxiv.org/abs/2411.18620, sections 3.3 and 4.1

What it writes: eval.csv (a row per question), accuracy.csv (a row per group), predictions.json (for GQA's own scorer),
run.json; with --collect the six files of Table 1.
"""
import csv
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from llava_min import open_image, read_json


@dataclass(frozen=True)
class Question:
    """One question about one picture, from any source. Empty fields: the source does not say."""
    id: str
    question: str
    image: Path | None = None
    answer: str = ""                               # lower case
    task: str = ""
    true_option: str = ""
    false_option: str = ""
    options: tuple = ()                            # both, where it is not known which is right
    objects: tuple = ()                            # names of the annotated objects
    boxes: tuple = ()                              # (x, y, w, h) in px of the picture, one per object that is on it
    size: tuple | None = None                      # the picture's width and height that the boxes were drawn for
    captions: str = ""
    answers: tuple = ()                            # of several people: the forms of each one's answer, lower case
    leave_one_out: bool = False                    # how `answers` count, see soft_accuracy
    where: str = ""                                # file and line, for messages

    @property
    def key(self):
        return f"{self.task}/{self.id}"

    def about(self, answer):
        """What every instrument's rows begin with: id, picture, task, question, answer, and what the model said."""
        return [self.id, self.image.name if self.image else "", self.task, self.question, self.answer, answer]

    def right(self, prediction):
        """Does the prediction count as right? Where several people answered, from a soft accuracy of 0.5 on."""
        if self.answers:
            return soft_accuracy(prediction, self.answers, self.leave_one_out) >= 0.5
        return is_right(prediction, self.answer)

    def open(self):
        """The picture as PIL RGB, or None. ValueError: it is missing, broken, or not of the size the boxes are for."""
        if self.image is None:
            return None
        image = open_image(self.image)
        if self.size and image.size != self.size:
            raise ValueError(f"{self.image} is {image.width}x{image.height}, the boxes are for "
                             f"{self.size[0]}x{self.size[1]}")
        return image

    def prompt(self, model, **kwargs):
        """model: llava_min.LLaVA -> Prompt of this question. ValueError names the file and line."""
        try:
            return model.prompt(self.question, self.open() if model.config.vision else None,
                                true_option=self.true_option or None, false_option=self.false_option or None,
                                options=self.options, objects=self.objects, boxes=self.boxes,
                                captions=self.captions or None, **kwargs)
        except ValueError as e:
            raise ValueError(f"{self.where}: {e}" if self.where else str(e)) from e


def is_right(prediction, answer):
    """The paper's rule: the decoded greedy answer, stripped and in lower case, is the answer."""
    return prediction.strip().lower() == answer.strip().lower()


def soft_accuracy(prediction, answers, leave_one_out):
    """VQA's: a third for each of the people who said the same, 1 at most. answers: for each of them a set of forms.

    leave_one_out: the mean over leaving out each one in turn, as VQA and OK-VQA; A-OKVQA counts all of them once.
    """
    said = prediction.strip().lower().rstrip(".")
    same = [said in forms for forms in answers]
    if not leave_one_out:
        return min(1.0, sum(same) / 3)
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / len(same)


# ---------------------------------------------------------------------------------------------------- the paper's CSVs

NEEDED = ("question_id", "img_id", "question", "answer")
OBJECTS = ("central object", "object1", "object2")         # columns "NAME name", "NAME x", "NAME y", "NAME w", "NAME h"


def read_csv(file, images=None, bad=None, limit=None):
    """One of the paper's CSV files, or of that kind -> list of Question, in file order.

    Needed are the columns of NEEDED; there may be "true option" and "false option", "image_w" and "image_h" (px of the
    picture that boxes are for), "captions", and of each of OBJECTS all of "NAME name" and "NAME x", "y", "w", "h" (px).
    "-" is empty. The task is what the file's name has behind its last "_".

    images: directory with {img_id}.jpg, .jpeg or .png. limit: read no more than that. bad: a list that takes the
    messages of rows that cannot be read; without it the first such row is a ValueError. ValueError: file missing or not
    CSV text, a column missing or doubled, no rows.
    """
    file = Path(file)
    task = file.stem.rsplit("_", 1)[-1]
    found, lines = [], {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, strict=True)
            columns = reader.fieldnames or []
            twice = [c for c, n in Counter(columns).items() if n > 1]
            if twice:
                raise ValueError(f"{file} has the column {twice[0]!r} twice")
            missing = [c for c in needed(columns) if c not in columns]
            if missing:
                raise ValueError(f"{file} has no column {', '.join(map(repr, missing))}; it has {columns[:30]}")
            for row in reader:
                if limit and len(found) == limit:
                    break
                try:
                    q = read_row(row, task, images, f"{file}, line {reader.line_num}")
                    if q.id in lines:
                        raise ValueError(f"{q.where}: question_id {q.id} stands on line {lines[q.id]} too")
                    lines[q.id] = reader.line_num
                    found.append(q)
                except ValueError as e:
                    if bad is None:
                        raise
                    bad.append(str(e))
    except OSError as e:
        raise ValueError(f"{file}: {e.strerror}") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{file} is not a CSV file in UTF-8 ({e})") from e
    if not found and not bad:
        raise ValueError(f"{file} has no questions")
    return found


def needed(columns):
    """The columns a file with these columns must have: a box without its height is a damaged file."""
    names = list(NEEDED)
    for name in OBJECTS:
        group = [f"{name} {end}" for end in ("name", "x", "y", "w", "h")]
        names += group if any(c in columns for c in group) else []
    for pair in (["true option", "false option"], ["image_w", "image_h"]):
        names += pair if any(c in columns for c in pair) else []
    return names


def read_row(row, task, images, where):
    if None in row or None in row.values():
        raise ValueError(f"{where}: {'more' if None in row else 'fewer'} fields than the header has columns")

    def number(column):
        try:
            value = float(row[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{where}, column {column!r}: {row[column]!r} is not a number")
        return int(value) if value == int(value) else value

    def text(column):
        return "" if (row.get(column) or "-").strip() == "-" else row[column].strip()

    for column in ("question_id", "img_id", "question"):
        if not text(column):
            raise ValueError(f"{where}, column {column!r}: empty")
    boxes = []
    for name in OBJECTS:
        if any(text(f"{name} {letter}") for letter in "xywh"):
            box = tuple(number(f"{name} {letter}") for letter in "xywh")
            if box[2] < 0 or box[3] < 0:
                raise ValueError(f"{where}: the box of {name} has a negative size")
            boxes.append(box)
    size = (number("image_w"), number("image_h")) if "image_w" in row else None
    return Question(id=text("question_id"), question=row["question"], image=picture(images, text("img_id")),
                    answer=text("answer"), task=task,
                    true_option=text("true option"), false_option=text("false option"),
                    objects=tuple(n for o in OBJECTS if (n := text(f"{o} name"))), boxes=tuple(boxes), size=size,
                    captions=text("captions"), where=where)


# ---------------------------------------------------------------------------------------------------- OK-VQA, A-OKVQA

def read_vqa(file, images=None, bad=None, limit=None):
    """OK-VQA's questions (a dict; annotations beside it) or A-OKVQA's (a list) -> list of Question, in file order.

    images: directory with the COCO pictures under their published names. A-OKVQA's questions that are marked as hard to
    answer directly are left out, as its scorer does. ValueError: a file that is missing, or of another shape.
    """
    raw, file, found = read_json(file, (dict, list)), Path(file), []
    try:
        if isinstance(raw, list):
            for q in raw:
                if q["difficult_direct_answer"] is True:
                    continue
                found.append(vqa_question(q, "A-OKVQA", picture(images, f"{q['image_id']:012}"), [
                    {text.strip().lower()} for text in q["direct_answers"]], False, file))
        else:
            notes = read_json(annotations(file))
            told = {a["question_id"]: a["answers"] for a in notes["annotations"]}
            split = "val2014" if "val2014" in file.name else "train2014"
            for q in raw["questions"]:
                found.append(vqa_question(q, "OK-VQA", picture(images, f"COCO_{split}_{q['image_id']:012}"), [
                    {a[key].strip().lower() for key in ("answer", "raw_answer") if key in a}        # stemmed, and not
                    for a in told[q["question_id"]]], True, file))
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{file}, question {len(found) + 1}: not OK-VQA's or A-OKVQA's format "
                         f"({type(e).__name__}: {e})") from e
    if not found:
        raise ValueError(f"{file} has no question")
    return found[:limit]


def annotations(file):
    """OK-VQA's annotations, which lie beside its questions."""
    return Path(file).with_name(Path(file).name.removeprefix("OpenEnded_").replace("questions", "annotations"))


def vqa_question(q, task, image, answers, leave_one_out, file):
    common = Counter(min(forms, key=len) for forms in answers).most_common(1)[0][0]
    return Question(id=str(q["question_id"]), question=q["question"].strip(), image=image, answer=common, task=task,
                    answers=tuple(map(frozenset, answers)), leave_one_out=leave_one_out,
                    where=f"{file}, question {q['question_id']}")


# ---------------------------------------------------------------------------------------------------- GQA's own files

BUNDLED = Path(__file__).resolve().parent / "tiny" / "val" / "val_balanced_questions.json"  # a drawn world, see tiny.py
# Table 1: (structural, semantic, detailed types) -> task. What is none of them is named by its group of Table 2.
TASKS = {("choose", "attr", "*"): "ChooseAttr", ("choose", "rel", "relChooser"): "ChooseRel",
         ("choose", "cat", "categoryThatChoose categoryThisChoose objThisChoose"): "ChooseCat",
         ("compare", "attr", "twoCommon"): "CompareAttr", ("logical", "obj", "existThatOr existThatOrC"): "LogicalObj",
         ("query", "attr", "positionQuery"): "QueryAttr"}
SIX = tuple(TASKS.values())


def task_of(types):
    """GQA's `types` of a question -> its task of Table 1, or "structural/semantic", its group of Table 2."""
    for (structural, semantic, detailed), task in TASKS.items():
        if (structural, semantic) == (types["structural"], types["semantic"]) and (
                detailed == "*" or types["detailed"] in detailed.split()):
            return task
    return f"{types['structural']}/{types['semantic']}"


def read_gqa(file, images=None, bad=None, limit=None, scene_graphs=None, regions=None, only=SIX):
    """A GQA question file (JSON) -> list of Question, task by task, in file order.

    images: directory with {imageId}.jpg. scene_graphs: GQA's sceneGraphs.json, for boxes and sizes. regions: Visual
    Genome's region_descriptions.json, for captions. only: the tasks wanted, all where None. limit: of each task.
    bad: a list that takes the messages of entries that cannot be read; without it the first is a ValueError.
    ValueError: a file that is missing, no JSON, of another shape, or without a question of these tasks.
    """
    graphs = read_json(scene_graphs) if scene_graphs else {}
    told = defaultdict(list)
    for i, image in enumerate(read_json(regions, list) if regions else ()):
        try:
            for region in image["regions"]:
                told[str(region["image_id"])].append(region["phrase"])
        except (KeyError, TypeError) as e:
            raise ValueError(f"{regions}, image {i}: not Visual Genome's regions ({type(e).__name__}: {e})") from e
    found = {}
    for number, raw in read_json(file).items():
        where = f"{file}, question {number}"
        try:
            task = task_of(raw["types"])
            if only is not None and task not in only or limit and len(found.get(task, ())) == limit:
                continue
            image = str(raw["imageId"])
            graph = graphs.get(image) if task in SIX else None      # the others need no boxes
            q = gqa_question(number, raw, task, picture(images, image), graph, told.get(image, ()), where)
            found.setdefault(task, []).append(q)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            why = e if type(e) is ValueError else f"not GQA's format ({type(e).__name__}: {e})"
            message = f"{where}: {why}"
            if bad is None:
                raise ValueError(message) from e
            bad.append(message)
    if not found and not bad:
        raise ValueError(f"{file} has no question of the tasks {', '.join(only or ('any',))}")
    return [q for task in sorted(found) for q in found[task]]


def gqa_question(number, raw, task, image, graph, told, where):
    """One entry of a GQA question file -> Question: options, object names and boxes come from its program."""
    options, things = program_of(raw)
    size, boxes = None, []
    if graph:
        size = graph["width"], graph["height"]
        absent = [i for _, ids in things for i in ids if i not in graph["objects"]]
        if absent:
            raise ValueError(f"its scene graph has no object {absent[0]}")
        boxes = [tuple(graph["objects"][i][key] for key in "xywh") for _, ids in things for i in ids]
    answer = raw["answer"].strip()
    words = [re.sub("^(to the|in) | of$", "", option) for option in options]            # answers: "left", "front"
    right = next((word for word in words if is_right(word, answer)), "")
    return Question(id=number, question=raw["question"], image=image, answer=answer, task=task,
                    true_option=right, false_option=next((w for w in words if right and w != right), ""),
                    objects=tuple(name for name, _ in things if name not in ("scene", "_")), boxes=tuple(boxes),
                    size=size, captions=". ".join(told), where=where)


def program_of(raw):
    """What a question's program says -> (options, [(name of an object, its ids in the scene graph)])."""
    options, things = (), []
    for step in raw["semantic"]:
        operation, argument = step["operation"], step["argument"].strip()
        name, _, ids = argument.partition("(")
        if operation.startswith("choose"):                          # "red|blue", "cup,in|on,s (7)"
            parts = argument.split(",")
            options = tuple(parts[len(parts) // 2].split("|"))
        if operation == "select" or operation.startswith(("relate", "choose rel", "verify rel")):
            things.append((name.split(",")[0].strip(), [i for i in ids.rstrip(")").split(",") if i.strip("- ")]))
    return options, things


def beside(file):
    """The scene graphs and region descriptions that lie beside a GQA question file under their published names."""
    file = Path(file)
    graphs = file.with_name(f"{file.name.split('_')[0]}_sceneGraphs.json")
    regions = file.with_name("region_descriptions.json")
    return {"scene_graphs": graphs if graphs.exists() else None, "regions": regions if regions.exists() else None}


def read_any(file, images, bad, limit):
    """What --data takes -> list of Question: the paper's CSV, or JSON of GQA, OK-VQA or A-OKVQA."""
    if Path(file).suffix != ".json":
        return read_csv(file, images, bad, limit)
    raw = read_json(file, (dict, list))
    if isinstance(raw, list) or "questions" in raw:
        return read_vqa(file, images, bad, limit)
    return read_gqa(file, images, bad, limit, **beside(file))


def data_files(files):
    """What --data reads: the files and those beside them."""
    near = {Path(file): [*beside(file).values(), annotations(file)] if Path(file).suffix == ".json" else []
            for file in files or ()}
    return [file for first, others in near.items() for file in dict.fromkeys((first, *others))
            if file and (file == first or file.exists())]


def picture(folder, name):
    """The picture file of an id in a folder: .jpg, .jpeg or .png, whichever is there; .jpg where none is."""
    if folder is None:
        return None
    names = [name] if Path(name).suffix else [name + end for end in (".jpg", ".jpeg", ".png")]
    return next((Path(folder) / n for n in names if (Path(folder) / n).exists()), Path(folder) / names[0])


# ---------------------------------------------------------------------------------------------------- command line

def add_data_flags(parser):
    """The flags every script shares for choosing questions."""
    from runs import count
    group = parser.add_argument_group("questions", "without --data and --image: 20 of each task from tiny/val")
    group.add_argument("--data", nargs="+", metavar="FILE", help="the paper's CSVs, or JSON of GQA, OK-VQA, A-OKVQA")
    group.add_argument("--images", metavar="DIR", help="the folder of their pictures, {img_id}.jpg, .jpeg or .png")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of these tasks only, such as {', '.join(SIX[:2])}")
    group.add_argument("--limit", type=count, metavar="N", help="the first N questions of each task")
    group.add_argument("--all", action="store_true", help="count questions the model answers wrongly, too")
    group.add_argument("--skip-bad", action="store_true", help="report rows that cannot be used and go on")
    add_shard_flag(group)
    group.add_argument("--image", metavar="FILE", help="an own picture ...")
    group.add_argument("--question", metavar="TEXT", help="... and the question about it")
    group.add_argument("--answer", metavar="TEXT", help="its answer, if known")
    group.add_argument("--options", metavar="A,B", help='both of an "A or B" question; the one in --answer is true')
    group.add_argument("--object", action="append", default=[], metavar="WORDS", help="an object the question names")
    group.add_argument("--box", action="append", default=[], metavar="X,Y,W,H", help="where an object is, in px")


def add_shard_flag(group):
    from runs import shard
    rank = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    group.add_argument("--shard", type=shard, default=rank, metavar="I/N",
                       help="each N-th question from the I-th on; under torchrun the process's own (all)")


def read_questions(args, bad, vision=True):
    """Parsed flags -> list of Question. bad: takes messages of bad rows under --skip-bad. ValueError: bad input."""
    own = {f"--{n}": getattr(args, n) for n in ("image", "question", "answer", "options", "object", "box")}
    if args.tasks and any(own.values()):
        raise ValueError("--tasks chooses among many questions, not with an own one")
    if not args.data and not any(own.values()):
        args.data, args.images, args.limit = [BUNDLED], BUNDLED.parent / "images", args.limit or 20
    if args.data and any(own.values()):
        raise ValueError(f"{next(n for n, v in own.items() if v)} and --data exclude each other")
    if args.data:
        if vision and not args.images:
            raise ValueError("--data needs --images DIR, the folder of their pictures")
        if args.images and not Path(args.images).is_dir():
            raise ValueError(f"--images {args.images}: no such folder")
        bad, found = bad if args.skip_bad else None, []
        for file in args.data:
            found += read_any(file, args.images, bad, args.limit)
        known = {q.task: None for q in found}
        for task in args.tasks or ():
            if task not in known:
                raise NoTask(f"--tasks {task}: the questions are of {', '.join(known)}")
        found = [q for q in found if not args.tasks or q.task in args.tasks]
        twice = [key for key, n in Counter(q.key for q in found).items() if n > 1]
        if twice:
            raise ValueError(f"--data gives question {twice[0]} twice")
        return found
    return [own_question(args, vision)]


def prepare(args):
    """Parsed flags -> (files of the model, questions, messages of rows left out). ValueError: no question is left."""
    from llava_min import resolve, sees
    bad, files = [], resolve(args.model, args.revision, args.vision_tower)
    questions = read_questions(args, bad, vision=sees(files))
    if not questions:
        raise ValueError(f"no usable question: {bad[0]}")
    return files, questions, bad


def open_run(args, files, questions, name, columns, **settings):
    """The runs.Run of an instrument. settings: what its numbers depend on besides the model and the questions."""
    from llava_min import pick_device, pick_dtype, weights_hash
    from runs import Run, file_hash
    device, single = pick_device(args.device), not args.data
    texts = [f for f in (files.config, files.tokenizer, files.generation, files.tower and files.tower.config) if f]
    return Run(args.out, name, columns, {
        "weights": weights_hash(files), "config": [file_hash(f)[:16] for f in texts], "device": device,
        "dtype": str(pick_dtype(args.dtype, device, files)).removeprefix("torch."), "preprocess": args.preprocess,
        "data": [f"{f.name} {file_hash(f)[:16]}" for f in data_files(args.data)],
        "images": str(Path(args.images).resolve()) if args.images else None,
        "question": {k: v for k, v in vars(questions[0]).items() if k != "image"} if single else None,
        "image": file_hash(questions[0].image)[:16] if single and questions[0].image else None,
        "tasks": args.tasks, "limit": args.limit, "all": args.all, **settings}, shard=args.shard, model=files.name,
        origin=files.origin, revision=files.revision, seed=args.seed)


class NoRows(ValueError):
    """A run came to its end and has measured nothing."""


class NoTask(NoRows):
    """No question is of the task that was asked for."""


def run_all(run, args, files, questions, bad, measure, load=None):
    """Measure every question that the run lacks, and say what was counted and left out.

    measure(model, question, args, strict) -> (rows, note); the note may have "right", where the model was asked, and
    "skipped", a dict of what gave no row and why. load: instead of llava_min.load_files. NoRows: nothing was
    measured.
    """
    from llava_min import load_files
    mine = questions[run.shard[0]::run.shard[1]] if run.shard else questions
    model = (load or load_files)(files, args) if any(q.key not in run.done for q in mine) else None
    for q in run.todo(mine, key=lambda q: q.key):
        try:
            rows, note = measure(model, q, args, strict=not args.data)
        except ValueError as e:
            if not args.skip_bad:
                raise
            bad.append(str(e))
            continue
        run.write(q.key, rows, **note)
    run.finish([q.key for q in questions])
    notes = list(run.done.values())
    known = any(q.answer for q in questions) and all("right" in note for note in notes)
    right = f", {sum(note['right'] for note in notes)} answered right" if known else ""
    print(f"{len(notes)} question{'s' * (len(notes) != 1)}{right}")
    for message in bad:
        print(f"left out: {message}")
    skipped = Counter((what, re.sub(r"'[^']*'|\"[^\"]*\"", "...", why))
                      for note in notes for what, why in note.get("skipped", {}).items())
    for (what, why), n in sorted(skipped.items()):
        print(f"{what}: no row for {n} question{'s' * (n > 1)} ({why})")
    if not run.rows_written():
        wrong = known and not args.all and not any(note["right"] for note in notes)
        raise NoRows("no row was measured: " + (
            "no question was answered right; --all counts the others, too" if wrong else
            "no question has the groups, or none could be used"))


def own_question(args, vision):
    """--image, --question and their companions -> Question."""
    if args.image and not vision:
        raise ValueError("--image: this model is text-only")
    if not args.question or (vision and not args.image):
        raise ValueError(f"{'--image' if not args.question else '--question'} needs "
                         f"{'--question TEXT' if not args.question else '--image FILE'}")
    answer = (args.answer or "").strip()
    options = tuple(o.strip() for o in (args.options or "").split(",") if o.strip())
    if args.options and len(options) != 2:
        raise ValueError(f"--options {args.options}: give two, separated by a comma")
    right = next((o for o in options if is_right(o, answer)), "")
    if answer and options and not right:
        raise ValueError(f"--answer {answer} is not one of --options {args.options}")
    image, boxes = Path(args.image) if args.image else None, []
    size = open_image(image).size if image else None
    for text in args.box:
        try:
            x, y, w, h = box = tuple(map(float, text.split(",")))
        except ValueError:
            raise ValueError(f"--box {text}: give four numbers x,y,w,h") from None
        if not size or not (0 <= x <= x + w <= size[0] and 0 <= y <= y + h <= size[1]):
            raise ValueError(f"--box {text} (x,y,w,h) is not inside the {size[0]}x{size[1]} image" if size else
                             "--box needs --image")
        boxes.append(box)
    return Question(id="own", question=args.question.strip(), image=image, answer=answer.lower(), task="own question",
                    true_option=right, false_option=next((o for o in options if right and o != right), ""),
                    options=() if right else options,
                    objects=tuple(o.strip() for o in args.object if o.strip()), boxes=tuple(boxes), size=size)


# ---------------------------------------------------------------------------------------------------- accuracy on GQA

LLAVA_INSTRUCTION = "\nAnswer the question using a single word or phrase."           # the paper has a space first
STRUCTURES, SEMANTICS = ("verify", "query", "choose", "logical", "compare"), ("obj", "attr", "cat", "rel", "global")


def group_of(task):
    """A Question's task -> its group of Table 2, "structural/semantic"."""
    return next((f"{a}/{b}" for (a, b, _), name in TASKS.items() if name == task), task)


def normalize(prediction, how):
    """What is compared with the answer. "paper": stripped, lower case. "llava": without a full stop at the end, too."""
    text = prediction.strip().lower()
    return text.rstrip(".").strip() if how == "llava" else text


def wilson(right, n, z=1.96):
    """95 % interval of a share: (low, high). Wilson's, which stays within 0 and 1 where few are wrong."""
    p, middle = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


COPIED = 10_000                                    # tokens of the common beginning that `answers` copies at most


def answers(model, prompts, max_new_tokens=16):
    """Greedy answers to questions about one picture -> token ids of each, equal to asking one by one.

    What the prompts begin with, nearly always everything up to the picture's last patch, goes through the model once.
    The rest looks back at it in batches: a question needs a copy of its keys and values, so 16 at once with 620 tokens
    and 4 with AnyRes (on a 13B in float16 8 GB). FloatingPointError: the logits are not numbers.
    """
    import torch
    same = 0                                                        # ids that all begin with; one must be left
    while all(same < len(p.ids) - 1 and p.ids[same] == prompts[0].ids[same] for p in prompts):
        same += 1
    with torch.inference_mode():
        x, past = model.embed(prompts[0]), [[] for _ in model.decoder.layers]
        P = x.shape[1] - len(prompts[0].ids) + same                 # their positions: the picture is one id
        model.decoder(x[:, :P], None, past)
        rest, B = [p.ids[same:] for p in prompts], max(1, COPIED // P)
        batches = (rest[i:i + B] for i in range(0, len(rest), B))
        return [ids for some in batches for ids in answers_behind(model, past, some, max_new_tokens)]


def answers_behind(model, past, rest, max_new_tokens):
    """As `answers`, of B prompts whose beginning has the keys and values `past`: `rest` is the ids that follow it."""
    import torch

    from vicuna import to_mask
    d, B, P = model.decoder, len(rest), past[0][0].shape[2]
    caches = [[t.expand(B, -1, -1, -1) for t in cache] for cache in past]
    lengths = torch.tensor([len(ids) for ids in rest], device=model.device)
    longest = max(map(len, rest))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rest], device=model.device)
    h = d(d.embed_tokens(padded), None, caches)                     # nobody looks ahead at the padding
    h = h[torch.arange(B, device=model.device), lengths - 1]        # (B, C)
    seen = torch.arange(P + longest, device=model.device) < (P + lengths)[:, None]              # (B, S)
    found, open_ = [[] for _ in rest], set(range(B))
    for _ in range(min(max_new_tokens, model.config.text.positions - seen.shape[1])):
        logits = d.lm_head(d.norm(h))
        if not logits.isfinite().all():
            raise FloatingPointError("non-finite logits: the dtype overflows here; use --dtype bfloat16 or float32")
        best = logits.argmax(-1)
        for b, token in enumerate(best.tolist()):
            if token in model.stop:
                open_.discard(b)
            elif b in open_:
                found[b].append(token)
        if not open_:
            break
        seen = torch.cat((seen, torch.ones_like(seen[:, :1])), 1)
        mask, y = to_mask(seen[:, None, None]), d.embed_tokens(best[:, None])
        cos, sin = (t[:, None, None] for t in d.rope(P + lengths))  # each at its own position
        for layer, cache in zip(d.layers, caches, strict=True):
            y = layer(y, cos, sin, mask, cache)
        h, lengths = y[:, -1], lengths + 1
    return found


# ---------------------------------------------------------------------------------------------------- Table 1

def paper_row(q, raw):
    """A question of the six tasks and its entry in GQA's file -> a row of the paper's CSV, as a dict; None where its
    columns cannot hold the question: no object of it is on the picture, or one name stands for several."""
    _, things = program_of(raw)
    slots = OBJECTS[1:] if q.task in ("ChooseRel", "CompareAttr", "LogicalObj") else OBJECTS[:1]
    if not q.boxes or len(things) != len(slots) or any(len(ids) > 1 for _, ids in things):
        return None
    boxes = iter(q.boxes)
    placed = [next(boxes) if ids else ("-",) * 4 for _, ids in things]
    row = {"question_id": q.id, "img_id": raw["imageId"], "question": q.question, "answer": q.answer}
    if q.true_option:
        row |= {"true option": q.true_option, "false option": q.false_option}
    for slot, (name, ids) in zip(slots, things, strict=True):
        row |= {f"{slot} name": name, f"{slot} id": ids[0] if ids else "-"}
    row |= {f"type_{kind}": raw["types"][kind] for kind in ("detailed", "semantic", "structural")}
    row |= {"operations": str(raw["semantic"]), "captions": q.captions, "image_w": q.size[0], "image_h": q.size[1]}
    for slot, box in zip(slots, placed, strict=True):
        row |= {f"{slot} {key}": value for key, value in zip("whxy", (box[2], box[3], box[0], box[1]), strict=True)}
    return row


def collect(folder, file, right, most=1000, seed=0):
    """Table 1: of each task at most `most` questions that a model answered right -> CSVs in the paper's columns, their
    paths. right: list of Question, with boxes, of the GQA question file `file`."""
    import random
    raw, paths, by_task = read_json(file), [], {task: [] for task in SIX}
    for q in right:
        if q.task in SIX and (row := paper_row(q, raw[q.id])):
            by_task[q.task].append(row)
    for task, rows in by_task.items():
        if not rows:
            print(f"{task}: no question was answered right and has its objects on the picture")
            continue
        rows = random.Random(f"{seed}/{task}").sample(rows, min(most, len(rows)))
        paths.append(Path(folder) / f"{Path(file).stem}_{task}.csv")
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(paths[-1], "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return paths


# ---------------------------------------------------------------------------------------------------- command line

def parse(argv=None):
    from llava_min import add_model_flags
    from runs import Parser, count
    parser = Parser(__doc__)
    group = parser.add_argument_group("questions", "the bundled ones without --questions")
    group.add_argument("--questions", metavar="FILE", help="GQA's own JSON")
    group.add_argument("--images", metavar="DIR", help="their pictures, {imageId}.jpg")
    group.add_argument("--limit", type=count, metavar="N", help="the first N questions of each task or group")
    group.add_argument("--skip-bad", action="store_true", help="report entries that cannot be used and go on")
    add_shard_flag(group)
    group = parser.add_argument_group("Table 1")
    group.add_argument("--collect", metavar="DIR",
                       help="write those answered right into this folder, a CSV in the paper's columns for each task")
    group.add_argument("--most", type=count, default=1000, metavar="N", help="of each task at most, by --seed (1000)")
    group.add_argument("--scene-graphs", metavar="FILE", help="GQA's sceneGraphs.json (the one beside the questions)")
    group.add_argument("--regions", metavar="FILE",
                       help="Visual Genome's region_descriptions.json, for captions (the one beside the questions)")
    group = parser.add_argument_group("counting")
    group.add_argument("--prompt", choices=("paper", "llava"), default="paper",
                       help="the paper's instruction, or LLaVA's, without its space (paper)")
    group.add_argument("--normalize", choices=("paper", "llava"), default="paper",
                       help="right is: equal in lower case; llava: without a full stop at the end, too (paper)")
    group.add_argument("--batch", type=count, default=16, metavar="N", help="questions about a picture at once (16)")
    add_model_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default="out/eval_gqa", metavar="DIR", help="folder of the results (out/eval_gqa)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="for --collect (0)")
    args = parser.parse_args(argv)
    if args.questions and not args.images:
        raise ValueError("--questions needs --images DIR, the folder of their pictures")
    args.data, args.images = [args.questions or BUNDLED], args.images or BUNDLED.parent / "images"
    if not Path(args.images).is_dir():
        raise ValueError(f"--images {args.images}: no such folder")
    near = beside(args.data[0])
    args.scene_graphs, args.regions = args.scene_graphs or near["scene_graphs"], args.regions or near["regions"]
    if args.collect and not args.scene_graphs:
        raise ValueError("--collect needs --scene-graphs FILE, for the objects' boxes")
    args.all, args.tasks, args.image = True, None, None
    return args


def main(argv=None, load=None):
    """The command line. argv: the shell's if None. load: instead of llava_min.load_files."""
    from llava_min import load_files, resolve, sees
    args, bad = parse(argv), []
    files = resolve(args.model, args.revision, args.vision_tower)
    if not sees(files):
        raise ValueError(f"--model {args.model} is text-only: it cannot see GQA's pictures")
    about = {"scene_graphs": args.scene_graphs, "regions": args.regions} if args.collect else {}
    whole = read_gqa(args.data[0], args.images, bad if args.skip_bad else None, args.limit, **about, only=None)
    questions = [replace(q, boxes=(), size=None) for q in whole]    # what --collect writes, and asking does not need
    run = open_run(args, files, questions, "eval.csv", EVAL, prompt=args.prompt, normalize=args.normalize)
    questions.sort(key=lambda q: (str(q.image), len(q.question)))                       # a picture's together
    pictures = sorted({str(q.image) for q in questions})
    if run.shard:
        pictures = pictures[run.shard[0]::run.shard[1]]
    mine = set(pictures)
    batch, left = [], [q for q in questions if str(q.image) in mine and q.key not in run.done]
    model = (load or load_files)(files, args) if left else None
    ends = set({q.image: q.key for q in left}.values())             # the last one about each
    for q in run.todo(left, key=lambda q: q.key):
        batch.append(q)
        if q.key in ends or len(batch) == args.batch:
            ask(model, batch, run, args, bad)
            batch = []
    run.finish([q.key for q in questions])
    for message in bad:
        print(f"left out: {message}")
    if not run.rows_written():
        raise ValueError("no question could be asked")
    show_accuracy(run)
    if args.collect:
        from plots import read
        right = {f"{row['task']}/{row['question_id']}" for row in read(run.csv, EVAL) if row["correct"] == "1"}
        for path in collect(args.collect, args.data[0], [q for q in whole if q.key in right], args.most, args.seed):
            print(f"wrote {path}")


EVAL = ("question_id", "image", "task", "question", "answer", "prediction", "correct")


def ask(model, batch, run, args, bad):
    """Ask some questions about one picture and write their rows. ValueError: a picture is missing or broken."""
    instruction = {"instruction": LLAVA_INSTRUCTION} if args.prompt == "llava" else {}
    try:
        prompts = [q.prompt(model, **instruction) for q in batch]
    except ValueError as e:
        if not args.skip_bad:
            raise
        bad.append(str(e))
        return
    for q, ids in zip(batch, answers(model, prompts), strict=True):
        said = normalize(model.words(ids), args.normalize)
        run.write(q.key, [[q.id, q.image.name, q.task, q.question, q.answer, said, int(said == q.answer.lower())]])


def show_accuracy(run):
    """eval.csv -> accuracy.csv, predictions.json for GQA's scorer, and Table 2 on the screen."""
    import json

    from plots import read
    from runs import replace_text
    rows = read(run.csv, EVAL)
    counts = defaultdict(list)
    for row in rows:
        for name in {group_of(row["task"]), row["task"] if row["task"] in SIX else None, "all"} - {None}:
            counts[name].append(int(row["correct"]))
    order = [f"{a}/{b}" for a in STRUCTURES for b in SEMANTICS]
    lines = [("group", "questions", "correct", "accuracy", "low", "high")]
    for name in sorted(counts, key=lambda n: (n == "all", n in SIX, order.index(n) if n in order else 99, n)):
        right, n = sum(counts[name]), len(counts[name])
        lines.append((name, n, right, right / n, *wilson(right, n)))
    file, predictions = run.out / "accuracy.csv", run.out / "predictions.json"
    replace_text(file, "".join(",".join(map(str, line)) + "\n" for line in lines))
    replace_text(predictions, json.dumps([{"questionId": row["question_id"], "prediction": row["prediction"]}
                                          for row in rows], indent=0) + "\n")
    print(f"{'group':14}{'questions':>10}{'accuracy':>10}   95 % interval")
    for name, n, _, share, low, high in lines[1:]:
        print(f"{name:14}{n:>10}{100 * share:>8.2f} %   {100 * low:.2f} to {100 * high:.2f} %")
    print(f"wrote {run.csv}, {file}, {predictions} and {run.info}")


if __name__ == "__main__":
    from runs import cli
    cli(main)
