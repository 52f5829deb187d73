"""
eval_gqa.py - accuracy on GQA (Table 2), and collecting the questions of the paper's six tasks (Table 1).

Run     python eval_gqa.py                                   accuracy on the bundled questions, by group (Table 2)
        python eval_gqa.py --model llava-1.5-7b --questions val_balanced_questions.json --images images --collect six
Needs   llava_min.py beside it for `answers`; the rest of the repository for the command line.
Matches GQA's groups and file formats; answers equal those asked one by one  (tests/test_eval.py)
Paper   https://arxiv.org/abs/2411.18620, section 4.1, Tables 1 and 2

    GQA asks some ten questions about each photo. Their prompts differ only after the image, so the shared prefix goes
    through the model once, and what follows it in each prompt as one batch.

Shapes  B prompts  T tokens of the longest suffix  P tokens of the shared prefix  S = P + T  C width  K key heads
        D head size  V vocabulary

Writes  eval.csv (a row per question), accuracy.csv (a row per group), predictions.json (for GQA's own scorer),
        run.json; with --collect the six files of Table 1.
"""
import json
import random
import signal
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

COPIED = 10_000                                    # tokens of the shared prefix that `answers` copies at a time


@torch.inference_mode()
def answers(model, prompts, max_new_tokens=16):
    """Greedy answers to B prompts about one photo -> B lists of token ids, equal to asking one by one.

    Every prompt of a batch needs a copy of the shared prefix's keys and values; a batch is as large as COPIED allows:
    16 prompts of LLaVA-1.5, 4 of AnyRes, 8 GB on a 13B in float16. FloatingPointError: the logits are not finite.
    """
    same = 0                                                        # leading ids that all share; each keeps one more
    while all(same < len(p.ids) - 1 and p.ids[same] == prompts[0].ids[same] for p in prompts):
        same += 1
    x, past = model.embed(prompts[0]), [[] for _ in range(len(model.decoder.layers))]
    P = x.shape[1] - len(prompts[0].ids) + same                     # in tokens: the image is one id, but many tokens
    model.decoder(x[:, :P], prompts[0].positions[:P], None, past)   # fills `past` with keys and values
    B = max(1, COPIED // P)
    batches = (prompts[i:i + B] for i in range(0, len(prompts), B))
    return [ids for some in batches for ids in continued(model, past, some, same, max_new_tokens)]


def continued(model, past, prompts, same, max_new_tokens):
    """As `answers`, for prompts whose first `same` ids have gone through the model.

    past: their [keys, values] in each layer, (1, K, P, D).
    """
    d, B, P = model.decoder, len(prompts), past[0][0].shape[2]
    caches = [[t.expand(B, -1, -1, -1) for t in cache] for cache in past]      # a view; the first append copies it
    suffixes = [p.ids[same:] for p in prompts]
    lengths = torch.tensor([len(ids) for ids in suffixes], device=model.device)
    T = max(map(len, suffixes))
    padded = torch.tensor([ids + [0] * (T - len(ids)) for ids in suffixes], device=model.device)
    positions = max(prompts, key=len).positions[P:]
    h = d(d.embed_tokens(padded), positions, None, caches)          # right padding is safe under a causal mask
    h = h[torch.arange(B, device=model.device), lengths - 1]        # (B, C), at each prompt's last token
    keep = torch.arange(P + T, device=model.device) < (P + lengths)[:, None]            # (B, S), without the padding
    return model.decode(d.lm_head(d.norm(h)), caches, P + lengths, max_new_tokens, keep)


# ---------------------------------------------------------------------------------------------------- counting

LLAVA_INSTRUCTION = "\nAnswer the question using a single word or phrase."           # the paper's has a space first
STRUCTURES, SEMANTICS = ("verify", "query", "choose", "logical", "compare"), ("obj", "attr", "cat", "rel", "global")


def normalize(prediction, how):
    """What is compared with the answer. "paper": stripped, lower case. "llava": without a full stop at the end, too."""
    text = prediction.strip().lower()
    return text.rstrip(".").strip() if how == "llava" else text


def accuracy(rows, group_of, tasks, interval):
    """Rows of eval.csv -> rows of accuracy.csv: (group, questions, correct, accuracy, low, high), Table 2's order.

    interval(right, n) -> low, high.
    """
    counts = defaultdict(list)                                      # a question counts in its group, its task and "all"
    for row in rows:
        for name in {group_of(row["task"]), row["task"] if row["task"] in tasks else None, "all"} - {None}:
            counts[name].append(int(row["correct"]))
    order = [f"{a}/{b}" for a in STRUCTURES for b in SEMANTICS]
    names = sorted(counts, key=lambda n: (n == "all", n in tasks, order.index(n) if n in order else 99, n))
    table = ((name, len(counts[name]), sum(counts[name])) for name in names)
    return [(name, n, right, right / n, *interval(right, n)) for name, n, right in table]


# ---------------------------------------------------------------------------------------------------- Table 1

def paper_row(q, raw):
    """A question of the six tasks, and its entry in GQA's file, -> a row of the paper's CSV as a dict.

    None where the columns cannot hold it: no object is on the photo, or a name means several objects.
    """
    from harness.questions import OBJECTS, program_of
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
    """Table 1: write at most `most` questions of each task, of those that a model answered right, as CSVs -> paths.

    right: list of Question, with boxes, from the GQA question file `file`. The columns are the paper's.
    """
    from harness import questions, runs
    raw, paths, by_task = questions.read_json(file), [], {task: [] for task in questions.SIX}

    def file_of(task):
        return Path(folder) / f"{Path(file).stem}_{task}.csv"
    for q in right:
        if q.task in questions.SIX and (row := paper_row(q, raw[q.id])):
            by_task[q.task].append(row)
    for task, rows in by_task.items():
        if not rows:
            print(f"{task}: no question was answered right and has its objects on the photo")
            file_of(task).unlink(missing_ok=True)                   # of an earlier call
            continue
        rows = random.Random(f"{seed}/{task}").sample(rows, min(most, len(rows)))
        paths.append(file_of(task))
        Path(folder).mkdir(parents=True, exist_ok=True)
        runs.replace_text(paths[-1], runs.csv_text([rows[0], *(row.values() for row in rows)]))
    return paths


# ---------------------------------------------------------------------------------------------------- command line

COLUMNS = ("question_id", "image", "task", "question", "answer", "prediction", "correct")


@dataclass(frozen=True)
class Settings:
    """What the flags of a run say; --help explains each."""
    shared: object                                 # harness.flags.Shared: model, questions, folder, seed
    scene_graphs: Path | None = None
    regions: Path | None = None
    collect: str | None = None
    most: int = 1000
    prompt: str = "paper"
    normalize: str = "paper"
    batch: int = 16


def main(argv=None):
    from harness import errors, flags, questions
    with errors.one_line_errors():
        run(parse(flags.Parser(__doc__), questions, argv))


def run(s, load=None):
    """Ask all questions, those about one photo together, and write their rows; then compute accuracy."""
    from harness import experiment, intervals, questions, runs, tables

    def read(d, bad, vision):                                       # all groups of Table 2, not the six tasks alone
        if not vision:
            raise ValueError(f"--model {s.shared.model.name} is text-only: it cannot see GQA's pictures")
        boxes = {"scene_graphs": s.scene_graphs, "regions": s.regions} if s.collect else {}
        return questions.read_gqa(d.data[0], d.images, bad, d.limit, **boxes, only=None)
    study = experiment.Study(s.shared, load, read)
    study.open("eval.csv", COLUMNS, by_photo, prompt=s.prompt, normalize=s.normalize)
    for batch, result in study.together(partial(ask, study, s), batches(study, s.batch)):
        try:
            write(study, s, batch, result())
        except (ValueError, FloatingPointError):                    # one of them is bad: which?
            for q in batch:
                with study.skipping_bad(q):
                    write(study, s, [q], ask(study, s, [q]))
        except BaseException:                                       # Ctrl-C: a notebook can go on in the same folder
            study.close()
            raise
    study.run.finish()
    if not study.run.rows_written():
        raise ValueError("no question could be asked")
    rows = tables.read(study.csv, COLUMNS)
    paths = []                                                      # all files first: a reader may stop at any line
    if s.collect:
        right = {f"{row['task']}/{row['question_id']}" for row in rows if row["correct"] == "1"}
        chosen = [q for q in study.questions if q.key in right]
        paths = collect(s.collect, s.shared.data.data[0], chosen, s.most, s.shared.seed)
    table = accuracy(rows, questions.group_of, questions.SIX, intervals.wilson)
    write_results(study, rows, table, runs)
    for path in paths:
        print(f"wrote {path}")
    study.print_bad()


def ask(study, s, batch):
    """Ask questions about one photo -> for each the ids of its answer."""
    instruction = {"instruction": LLAVA_INSTRUCTION} if s.prompt == "llava" else {}
    return answers(study.model, [q.prompt(study.model, **instruction) for q in batch])


def write(study, s, batch, answered):
    """The rows of questions, from the ids of their answers."""
    for q, ids in zip(batch, answered, strict=True):
        answer = normalize(study.model.words(ids), s.normalize)
        study.write(q, [[*q.first_columns(answer), int(answer == q.answer.lower())]])


def by_photo(questions):
    """Questions without what --collect alone needs, those about one photo together, short ones first."""
    bare = (replace(q, boxes=(), size=None, captions="") for q in questions)
    return sorted(bare, key=lambda q: (str(q.image), len(q.question)))


def batches(study, size):
    """Yield lists of questions about one photo, at most `size` long. A shard has each n-th photo."""
    questions, (i, n) = by_photo(study.questions), study.run.shard or (0, 1)
    mine = set(sorted({str(q.image) for q in questions})[i::n])
    left = [q for q in questions if str(q.image) in mine and q.key not in study.run.done]
    last = set({q.image: q.key for q in left}.values())             # the last question about each photo
    batch = []
    for q in study.todo(left):
        batch.append(q)
        if q.key in last or len(batch) == size:                     # no batch spans two photos
            yield batch
            batch = []


def write_results(study, rows, table, runs):
    """accuracy.csv, predictions.json for GQA's scorer, and Table 2 on the screen."""
    file, predictions = study.run.out / "accuracy.csv", study.run.out / "predictions.json"
    head = ("group", "questions", "correct", "accuracy", "low", "high")
    runs.replace_text(file, runs.csv_text(runs.widened(head, table, study.how)))
    predicted = [{"questionId": row["question_id"], "prediction": row["prediction"]} for row in rows]
    runs.replace_text(predictions, json.dumps(predicted, indent=0) + "\n")
    print(f"{'group':14}{'questions':>10}{'accuracy':>10}   95 % interval")
    for name, n, _, share, low, high in table:
        print(f"{name:14}{n:>10}{100 * share:>8.2f} %   {100 * low:.2f} to {100 * high:.2f} %")
    print(f"wrote {study.csv}, {file}, {predictions} and {study.info}")


def parse(parser, questions, argv=None):
    """The command line -> Settings. questions: harness.questions."""
    group = parser.add_argument_group("questions", "the bundled ones without --questions")
    group.add_argument("--questions", metavar="FILE", help="GQA's own JSON")
    group.add_argument("--images", metavar="DIR", help="their pictures, {imageId}.jpg")
    group.add_argument("--limit", type=parser.count, metavar="N", help="the first N questions of each task or group")
    group.add_argument("--skip-bad", action="store_true", help="report entries that cannot be used, and continue")
    parser.add_shard_flag(group)
    group = parser.add_argument_group("Table 1")
    group.add_argument("--collect", metavar="DIR",
                       help="write those answered right into this folder, a CSV in the paper's columns for each task")
    group.add_argument("--most", type=parser.count, default=1000, metavar="N",
                       help="of each task at most, drawn by --seed (1000)")
    group.add_argument("--scene-graphs", metavar="FILE", help="GQA's sceneGraphs.json (the one beside the questions)")
    group.add_argument("--regions", metavar="FILE",
                       help="Visual Genome's region_descriptions.json, for captions (the one beside the questions)")
    group = parser.add_argument_group("counting")
    group.add_argument("--prompt", choices=("paper", "llava"), default="paper",
                       help="the paper's instruction, or LLaVA's, which has no space in front (default: paper)")
    group.add_argument("--normalize", choices=("paper", "llava"), default="paper",
                       help="an answer is right if equal in lower case; llava also ignores a final full stop")
    group.add_argument("--batch", type=parser.count, default=16, metavar="N",
                       help="questions about a picture at once (16)")
    parser.add_model_flags()
    parser.add_run_flags("out/eval_gqa")
    args = parser.parse_args(argv)
    if args.questions and not args.images:
        raise ValueError("--questions needs --images DIR, the folder of their pictures")
    file, images = args.questions or questions.BUNDLED, args.images or questions.BUNDLED.parent / "images"
    if not Path(images).is_dir():
        raise ValueError(f"--images {images}: no such folder")
    near = questions.beside(file)
    graphs, regions = args.scene_graphs or near["scene_graphs"], args.regions or near["regions"]
    if args.collect and not graphs:
        raise ValueError("--collect needs --scene-graphs FILE, for the objects' boxes")
    shared = parser.shared_of(args, data=(str(file),), images=str(images), limit=args.limit, all=True,
                              skip_bad=args.skip_bad, shard=args.shard)
    return Settings(shared, graphs, regions, args.collect, args.most, args.prompt, args.normalize, args.batch)


if __name__ == "__main__":
    main()
