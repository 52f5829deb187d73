"""
harness/questions.py - reads every dataset into one class, `Question`, which also decides if an answer is right.

Use     questions = read_csv("GQA_val_..._ChooseAttr.csv", images="photos")
        questions = read_gqa("val_balanced_questions.json", images="images", scene_graphs="val_sceneGraphs.json")
Reads   the paper's six CSV files (FightingFighting/cross-modal-information-flow-in-MLLM, Table 1), GQA's questions and
        scene graphs with Visual Genome's regions, OK-VQA, A-OKVQA
Needs   llava_min.py, groups.py and views.py
Paper   https://arxiv.org/abs/2411.18620, sections 3.3 and 4.1
"""
import csv
import math
import re
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from groups import token_groups
from llava_min import read_json
from views import open_image


@dataclass(frozen=True)
class Question:
    """One question about one photo, from any source. A field is empty where the source does not say."""
    id: str
    question: str
    image: Path | None = None
    answer: str = ""                               # the expected one, compared without regard to case
    task: str = ""
    true_option: str = ""
    false_option: str = ""
    options: tuple = ()                            # both, where it is not known which is right
    objects: tuple = ()                            # names of the annotated objects
    boxes: tuple = ()                              # (x, y, w, h) in px of the photo, one per object that is on it
    size: tuple | None = None                      # width and height of the photo that the boxes were drawn on
    captions: str = ""
    answers: tuple = ()                            # where several people answered: for each, a set of forms
    leave_one_out: bool = False                    # how `answers` count, see soft_accuracy
    where: str = ""                                # file and line, for messages

    def __post_init__(self):
        """ValueError: a field that is not what it should be, whatever file it came from."""
        for name in ("id", "question", "answer", "task", "true_option", "false_option", "captions"):
            check_text(name, getattr(self, name))
        for name, words in (("options", self.options), ("objects", self.objects),
                            ("answers", [form for forms in self.answers for form in forms])):
            for word in words:
                check_text(name, word)
        for box in self.boxes:
            if len(box) != 4 or not all(type(v) in (int, float) and math.isfinite(v) for v in box) or min(box[2:]) < 0:
                raise ValueError(f"the box {shown(box)} is not four numbers x, y, width, height")
        if self.size and not all(type(v) is int and v > 0 for v in self.size):
            raise ValueError(f"the photo's size {shown(self.size)} is not two whole numbers")

    def facts(self):
        """All that is known of it, as JSON; of the picture its name alone."""
        return vars(self) | {"image": self.image.name if self.image else None, "where": None,
                             "answers": list(map(sorted, self.answers))}

    @property
    def key(self):
        return f"{self.task}/{self.id}"

    def first_columns(self, prediction):
        """The first columns of every instrument's rows: id, photo, task, question, answer, the model's answer."""
        return [self.id, self.image.name if self.image else "", self.task, self.question, self.answer, prediction]

    def right(self, prediction):
        """Does the prediction count as right? Where several people answered, a soft accuracy of at least 0.5 counts."""
        if self.answers:
            return soft_accuracy(prediction, self.answers, self.leave_one_out) >= 0.5
        return is_right(prediction, self.answer)

    def open(self):
        """The photo as PIL RGB, or None. ValueError: it is missing, broken, or not of the size that the boxes need."""
        if self.image is None:
            return None
        image = open_image(self.image)
        if self.size and image.size != self.size:
            raise ValueError(f"{self.image} is {image.width}x{image.height}, the boxes are for "
                             f"{self.size[0]}x{self.size[1]}")
        return image

    def prompt(self, model, **how):
        """The prompt that a llava_min.LLaVA makes of this question. ValueError names the question's file and line."""
        with self.named():
            return model.prompt(self.question, self.open() if model.config.vision else None,
                                captions=self.captions or None, **how)

    def groups(self, prompt, paper_spans=False):
        """The token groups of that prompt, from what is known of this question. Errors as above."""
        with self.named():
            return token_groups(prompt, true_option=self.true_option or None, false_option=self.false_option or None,
                                options=self.options, objects=self.objects, boxes=self.boxes, paper_spans=paper_spans)

    @contextmanager
    def named(self):
        try:
            yield
        except ValueError as e:
            raise ValueError(f"{self.where}: {e}" if self.where else str(e)) from e


LONGEST = 30_000                                   # characters of a text: readers of CSV files stop at 131,072


def check_text(name, value):
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}, not a text")
    if len(value) > LONGEST:
        raise ValueError(f"{name} has {len(value):,} characters, more than {LONGEST:,}: {shown(value)}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name} holds half of a character (a lone surrogate): {shown(value)}")


def shown(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + " ..."


def is_right(prediction, answer):
    """The paper's rule: the decoded greedy answer, stripped and in lower case, is the answer."""
    return prediction.strip().lower() == answer.strip().lower()


def soft_accuracy(prediction, answers, leave_one_out):
    """VQA's accuracy: a third for each person who gave this answer, at most 1. answers: for each person a set of forms.

    leave_one_out: the mean over leaving out each person in turn, as VQA and OK-VQA do; A-OKVQA counts all at once.
    """
    answer = prediction.strip().lower().rstrip(".")
    same = [answer in forms for forms in answers]
    if not leave_one_out:
        return min(1.0, sum(same) / 3)
    return sum(min(1.0, (sum(same) - agrees) / 3) for agrees in same) / len(same)


# ---------------------------------------------------------------------------------------------------- the paper's CSVs

NEEDED = ("question_id", "img_id", "question", "answer")
OBJECTS = ("central object", "object1", "object2")         # columns "NAME name", "NAME x", "NAME y", "NAME w", "NAME h"


def read_csv(file, images=None, bad=None, limit=None):
    """One of the paper's CSV files, or one like it -> list of Question, in file order.

    Columns: NEEDED, and optionally "true option" and "false option"; "image_w" and "image_h", px of the photo that the
    boxes were drawn on; "captions"; for each of OBJECTS "NAME name" with "NAME x", "y", "w" and "h", px. "-" is empty.
    The task is the part of the file's name after its last "_".

    images: the folder with {img_id}.jpg, .jpeg or .png. limit: read this many rows. bad: a list for the messages of
    rows that cannot be read; without it, the first such row is a ValueError. ValueError: the file is missing or no CSV
    text, a column is missing or doubled, there are no rows.
    """
    file = Path(file)
    task = file.stem.rsplit("_", 1)[-1]
    questions, lines = [], {}
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a file, but a folder, a pipe or a device")
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
                if limit and len(questions) == limit:
                    break
                try:
                    q = read_row(row, task, images, f"{file}, line {reader.line_num}")
                    if q.id in lines:
                        raise ValueError(f"{q.where}: question_id {q.id} is already on line {lines[q.id]}")
                    lines[q.id] = reader.line_num
                    questions.append(q)
                except ValueError as e:
                    if bad is None:
                        raise
                    bad.append(str(e))
    except OSError as e:
        raise ValueError(f"{file}: {e.strerror}") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{file} is not a CSV file in UTF-8 ({e})") from e
    if not questions and not bad:
        raise ValueError(f"{file} has no questions")
    return questions


def needed(columns):
    """The columns that a file with these columns must have: a box without its height is a damaged file."""
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
    try:
        return Question(id=text("question_id"), question=row["question"], image=picture(images, text("img_id")),
                        answer=text("answer"), task=task,
                        true_option=text("true option"), false_option=text("false option"),
                        objects=tuple(n for o in OBJECTS if (n := text(f"{o} name"))), boxes=tuple(boxes), size=size,
                        captions=text("captions"), where=where)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e


# ---------------------------------------------------------------------------------------------------- OK-VQA, A-OKVQA

# What a field of another type than the published files have comes to, while it is read.
MISREAD = (KeyError, TypeError, AttributeError, ValueError, IndexError)


def read_vqa(file, images=None, bad=None, limit=None):
    """OK-VQA's questions (a dict; its annotations beside it) or A-OKVQA's (a list) -> list of Question, in file order.

    images: the folder of COCO's photos under their published names. A-OKVQA's questions that are marked as hard to
    answer directly are left out, as by its scorer. limit, bad: as for read_csv. ValueError: a file is of another
    format; OSError: it is missing.
    """
    raw, file, questions = read_json(file, (dict, list)), Path(file), []
    ok_vqa, given = isinstance(raw, dict), {}
    try:
        entries = list(raw["questions"] if ok_vqa else raw)
        if ok_vqa:                                                  # both spellings of an answer count
            given = {a["question_id"]: [{a[key] for key in ("answer", "raw_answer") if key in a} for a in a["answers"]]
                     for a in read_json(annotations(file))["annotations"]}
    except MISREAD as e:
        raise ValueError(f"{file}: not OK-VQA's or A-OKVQA's format ({type(e).__name__}: {e})") from e
    split = "val2014" if "val2014" in file.name else "train2014"
    for number, q in enumerate(entries, 1):
        if limit and len(questions) == limit:
            break
        try:
            if ok_vqa:
                photo, answers = f"COCO_{split}_{q['image_id']:012d}", given[q["question_id"]]
            elif q["difficult_direct_answer"] is True:
                continue
            else:
                photo, answers = f"{q['image_id']:012d}", [{text} for text in q["direct_answers"]]
            questions.append(vqa_question(q, ok_vqa, picture(images, photo), answers, file))
        except MISREAD as e:
            message = f"{file}, question {number}: not OK-VQA's or A-OKVQA's format ({type(e).__name__}: {e})"
            if bad is None:
                raise ValueError(message) from e
            bad.append(message)
    if not questions and not bad:
        raise ValueError(f"{file} has no question")
    return questions


def annotations(file):
    """The file of OK-VQA's annotations, beside its questions."""
    return Path(file).with_name(Path(file).name.removeprefix("OpenEnded_").replace("questions", "annotations"))


def vqa_question(q, ok_vqa, image, answers, file):
    if not answers:
        raise ValueError("it has no answer")
    answers = [frozenset(form.strip().lower() for form in forms) for forms in answers]
    common = Counter(min(forms, key=len) for forms in answers).most_common(1)[0][0]
    return Question(id=str(q["question_id"]), question=q["question"].strip(), image=image, answer=common,
                    task="OK-VQA" if ok_vqa else "A-OKVQA", answers=tuple(answers), leave_one_out=ok_vqa,
                    where=f"{file}, question {q['question_id']}")


# ---------------------------------------------------------------------------------------------------- GQA's own files

BUNDLED = Path(__file__).resolve().parents[1] / "tiny" / "val" / "val_balanced_questions.json"  # see tiny/world.py

# Table 1: (structural, semantic, detailed types) -> task. Other questions are named by their group of Table 2.
TASKS = {("choose", "attr", "*"): "ChooseAttr", ("choose", "rel", "relChooser"): "ChooseRel",
         ("choose", "cat", "categoryThatChoose categoryThisChoose objThisChoose"): "ChooseCat",
         ("compare", "attr", "twoCommon"): "CompareAttr", ("logical", "obj", "existThatOr existThatOrC"): "LogicalObj",
         ("query", "attr", "positionQuery"): "QueryAttr"}
SIX = tuple(TASKS.values())


def task_of(types):
    """GQA's `types` of a question -> its task of Table 1, or "structural/semantic", its group of Table 2."""
    for name in ("structural", "semantic", "detailed"):
        check_text(name, types[name])
    for (structural, semantic, detailed), task in TASKS.items():
        if (structural, semantic) == (types["structural"], types["semantic"]) and (
                detailed == "*" or types["detailed"] in detailed.split()):
            return task
    return f"{types['structural']}/{types['semantic']}"


def group_of(task):
    """A Question's task -> its group in Table 2, "structural/semantic"."""
    return next((f"{a}/{b}" for (a, b, _), name in TASKS.items() if name == task), task)


def read_gqa(file, images=None, bad=None, limit=None, scene_graphs=None, regions=None, only=SIX):
    """A GQA question file (JSON) -> list of Question, task by task, in file order.

    images: the folder with {imageId}.jpg. scene_graphs: GQA's sceneGraphs.json, for boxes and sizes. regions: Visual
    Genome's region_descriptions.json, for captions. only: the tasks to read; None is all. limit: questions per task.
    bad: a list for the messages of entries that cannot be read; without it, the first such entry is a ValueError.
    ValueError: a file is no JSON, of another format, or without a question of these tasks. OSError: it is missing.
    """
    graphs = read_json(scene_graphs) if scene_graphs else {}
    phrases = defaultdict(list)
    for i, image in enumerate(read_json(regions, list) if regions else ()):
        try:
            for region in image["regions"]:
                phrases[str(region["image_id"])].append(region["phrase"])
        except MISREAD as e:
            raise ValueError(f"{regions}, image {i}: not Visual Genome's regions ({type(e).__name__}: {e})") from e
    questions = {}
    for number, raw in read_json(file).items():
        where = f"{file}, question {number}"
        try:
            task = task_of(raw["types"])
            if only is not None and task not in only or limit and len(questions.get(task, ())) == limit:
                continue
            image = str(raw["imageId"])
            graph = graphs.get(image) if task in SIX else None      # the others need no boxes
            q = gqa_question(number, raw, task, picture(images, image), graph, phrases.get(image, ()), where)
            questions.setdefault(task, []).append(q)
        except MISREAD as e:
            why = e if type(e) is ValueError else f"not GQA's format ({type(e).__name__}: {e})"
            message = f"{where}: {why}"
            if bad is None:
                raise ValueError(message) from e
            bad.append(message)
    if not questions and not bad:
        raise ValueError(f"{file} has no question of the tasks {', '.join(only or ('any',))}")
    return [q for task in sorted(questions) for q in questions[task]]


def gqa_question(number, raw, task, image, graph, phrases, where):
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
    words = [re.sub("^(to the|in) | of$", "", option) for option in options]            # answers say "left", "front"
    right = next((word for word in words if is_right(word, answer)), "")
    return Question(id=number, question=raw["question"], image=image, answer=answer, task=task,
                    true_option=right, false_option=next((w for w in words if right and w != right), ""),
                    objects=tuple(name for name, _ in things if name not in ("scene", "_")), boxes=tuple(boxes),
                    size=size, captions=". ".join(phrases), where=where)


def program_of(raw):
    """A question's program -> (its options, [(name of an object, its ids in the scene graph)])."""
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
    """The scene graphs and region descriptions beside a GQA question file, under their published names."""
    file = Path(file)
    graphs = file.with_name(f"{file.name.split('_')[0]}_sceneGraphs.json")
    regions = file.with_name("region_descriptions.json")
    return {"scene_graphs": graphs if graphs.exists() else None, "regions": regions if regions.exists() else None}


def read_any(file, images, bad, limit):
    """A file that --data takes -> list of Question: the paper's CSV, or JSON of GQA, OK-VQA or A-OKVQA."""
    if Path(file).suffix != ".json":
        return read_csv(file, images, bad, limit)
    raw = read_json(file, (dict, list))
    if isinstance(raw, list) or "questions" in raw:
        return read_vqa(file, images, bad, limit)
    return read_gqa(file, images, bad, limit, **beside(file))


def data_files(files):
    """The files that --data reads: those given, and the ones beside them."""
    near = {Path(file): [*beside(file).values(), annotations(file)] if Path(file).suffix == ".json" else []
            for file in files or ()}
    return [file for first, others in near.items() for file in dict.fromkeys((first, *others))
            if file and (file == first or file.exists())]


def picture(folder, name):
    """The photo of an id in a folder: .jpg, .jpeg or .png, whichever is there; .jpg where none is. ValueError: the name
    leads out of the folder."""
    if folder is None:
        return None
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or max(map(len, parts)) > 200:
        raise ValueError(f"the picture's name {shown(name)} is not that of a file in {folder}")
    names = [name] if Path(name).suffix else [name + end for end in (".jpg", ".jpeg", ".png")]
    return next((Path(folder) / n for n in names if (Path(folder) / n).exists()), Path(folder) / names[0])


# ---------------------------------------------------------------------------------------------------- from flags

class NoRows(ValueError):
    """A run came to its end and has measured nothing."""


class NoTask(NoRows):
    """No question is of the task that was asked for."""


def read_questions(d, bad=None, vision=True):
    """flags.DataSettings -> list of Question. bad: see read_csv. ValueError: bad input."""
    if not d.data:
        return [own_question(d, vision)]
    if vision and not d.images:
        raise ValueError("--data needs --images DIR, the folder of their pictures")
    if d.images and not Path(d.images).is_dir():
        raise ValueError(f"--images {d.images}: no such folder")
    questions = [q for file in d.data for q in read_any(file, d.images, bad, d.limit)]
    known = {q.task: None for q in questions}
    for task in d.tasks:
        if task not in known:
            raise NoTask(f"--tasks {task}: the questions are of {', '.join(known)}")
    questions = [q for q in questions if not d.tasks or q.task in d.tasks]
    twice = [key for key, n in Counter(q.key for q in questions).items() if n > 1]
    if twice:
        raise ValueError(f"--data gives question {twice[0]} twice")
    return questions


def own_question(d, vision):
    """--image, --question and their companions -> Question."""
    if d.image and not vision:
        raise ValueError("--image: this model is text-only")
    if not d.question or (vision and not d.image):
        raise ValueError(f"{'--image' if not d.question else '--question'} needs "
                         f"{'--question TEXT' if not d.question else '--image FILE'}")
    answer = (d.answer or "").strip()
    options = tuple(o.strip() for o in (d.options or "").split(",") if o.strip())
    if d.options and len({o.lower() for o in options}) != 2:
        raise ValueError(f"--options {d.options}: give two different ones, separated by a comma")
    right = next((o for o in options if is_right(o, answer)), "")
    if answer and options and not right:
        raise ValueError(f"--answer {answer} is not one of --options {d.options}")
    image = Path(d.image) if d.image else None
    size = open_image(image).size if image else None
    return Question(id="own", question=d.question.strip(), image=image, answer=answer.lower(), task="own question",
                    true_option=right, false_option=next((o for o in options if right and o != right), ""),
                    options=() if right else options, objects=tuple(o.strip() for o in d.object if o.strip()),
                    boxes=tuple(own_box(text, size) for text in d.box), size=size)


def own_box(text, size):
    """--box "x,y,w,h" -> four numbers. ValueError: it is not inside the photo."""
    try:
        x, y, w, h = box = tuple(map(float, text.split(",")))
    except ValueError:
        raise ValueError(f"--box {text}: give four numbers x,y,w,h") from None
    if not size:
        raise ValueError("--box needs --image")
    if not (0 <= x <= x + w <= size[0] and 0 <= y <= y + h <= size[1]):
        raise ValueError(f"--box {text} (x,y,w,h) is not inside the {size[0]}x{size[1]} image")
    return box
