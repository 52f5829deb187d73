"""
harness/experiment.py - what instruments share: flags, one loop over the questions, one rule for which of them count.

Use     study = Study(settings.shared)
        study.open("knockout.csv", COLUMNS, window=9)
        for question in study.todo():
            with study.skipping_bad(question):
                asked = study.ask(question)
                study.write(asked, rows_of(asked) if asked.counts else ())
        study.finish()
Needs   hub.py, questions.py and runs.py beside it; llava_min.py, groups.py, views.py and fork.py
Paper   https://arxiv.org/abs/2411.18620, section 4.1: only questions that the model answers correctly count
"""
import argparse
import math
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path

import torch

import llava_min
from fork import Clean, clean_pass, probability, unembed
from groups import NAMES, EmptyGroup, Groups, parse_edge
from harness import hub, runs
from harness.questions import BUNDLED, SIX, NoRows, Question, data_files, read_questions
from views import slot_rows

# ---------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class ModelSettings:
    """The flags that choose a model."""
    name: str = "llava-tiny"
    revision: str | None = None
    vision_tower: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    preprocess: str = "llava"


@dataclass(frozen=True)
class DataSettings:
    """The flags that choose questions: either files of them, or one from the command line."""
    data: tuple = ()
    images: str | None = None
    tasks: tuple = ()
    limit: int | None = None
    all: bool = False
    skip_bad: bool = False
    shard: tuple | None = None                     # (i, n): every n-th question, starting at the i-th
    image: str | None = None
    question: str | None = None
    answer: str | None = None
    options: str | None = None
    object: tuple = ()
    box: tuple = ()

    def __post_init__(self):
        given = [name for name in ("image", "question", "answer", "options", "object", "box") if getattr(self, name)]
        if given and self.tasks:
            raise ValueError(f"--tasks selects from question files; it cannot be combined with --{given[0]}")
        if given and self.data:
            raise ValueError(f"--{given[0]} and --data cannot be combined")


@dataclass(frozen=True)
class Shared:
    """What every instrument's settings hold."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings(data=(str(BUNDLED),), images=str(BUNDLED.parent / "images"), limit=20)
    out: str = "out"
    seed: int = 0
    strict: bool = True                            # is a group that your own question lacks an error?


# Where the parts of a prompt stand. A group that is not named here may reach over several of them.
PLACE = {"system": 0, "image": 1, "related_patches": 1, "other_patches": 1, "base_patches": 1, "tile_patches": 1,
         "newlines": 1, "captions": 1, "question": 2, "true_option": 2, "false_option": 2, "options": 2, "objects": 2,
         "question_wo_options": 2, "question_wo_objects": 2, "instruction": 3, "last": 4}
PAPER_EDGES = ("question->last", "image->last", "last->last", "image->question", "related_patches->question",
               "other_patches->question")          # figures 3, 4 and 5; the last two need boxes


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as --help, one-line errors, and the flags that instruments share."""

    groups = ", ".join(NAMES) + ", text:WORDS, a+b or a-b"

    def __init__(self, doc, **how):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **how)

    def error(self, message):
        print(f"error: {' '.join(message.split())} (--help shows the flags)", file=sys.stderr)
        sys.exit(2)

    @staticmethod
    def count(text):
        """argparse type: a whole number from 1."""
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
        return int(text)

    @staticmethod
    def numbers(text):
        """argparse type: whole numbers from 0, separated by commas -> sorted tuple."""
        parts = text.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of heads like 0,3")
        return tuple(sorted(set(map(int, parts))))

    @staticmethod
    def shard(text):
        """argparse type: "I/N" -> (I, N), None for the whole. torchrun sets the default, by RANK and WORLD_SIZE."""
        i, _, n = text.partition("/")
        if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
        return (int(i), int(n)) if int(n) > 1 else None

    @staticmethod
    def size(text):
        """argparse type: a number from 0."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
        return value

    @staticmethod
    def edges(texts):
        """Edges as a user writes them -> tuple of (source, target), canonical names, each once. ValueError: the target
        comes before the source in every prompt, so there is nothing to cut.

        Their order does not depend on how they were given: the paper's first, then by name. So the rows of a run that
        is resumed with the same edges in another order have one order, and are computed together.
        """
        edges = set(map(parse_edge, texts))
        for source, target in edges:
            if PLACE.get(source, 0) > PLACE.get(target, 4):
                raise ValueError(f"{source}->{target}: {target} comes before {source} in the prompt, and a decoder "
                                 "attends only to what came before, so there is no such edge to cut")
        order = {edge: i for i, edge in enumerate(PAPER_EDGES)}
        return tuple(sorted(edges, key=lambda edge: (order.get("->".join(edge), len(order)), edge)))

    @staticmethod
    def window(model):
        """The window where none is asked for: the paper's 9; 3 for the bundled models, which have 10 layers."""
        return 3 if model in hub.BUNDLED else 9

    def add_model_flags(self):
        group = self.add_argument_group("model")
        group.add_argument("--model", default="llava-tiny", metavar="NAME",
                           help=f"{', '.join([*hub.BUNDLED, *hub.MODELS])}, a hub id or a folder (llava-tiny)")
        group.add_argument("--revision", metavar="REV", help="hub branch, tag or commit (main)")
        group.add_argument("--vision-tower", metavar="NAME",
                           help="folder or hub id, where the checkpoint names another or has none")
        group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
        group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                           help="auto: float32 if config.json says so (llava-tiny), else float16 on a GPU, bfloat16 on "
                                "a CPU")
        group.add_argument("--preprocess", choices=("llava", "hf"), default="llava",
                           help="pixels as the original LLaVA or transformers")

    def add_data_flags(self):
        group = self.add_argument_group("questions", "without --data and --image: 20 of each task from tiny/val")
        group.add_argument("--data", nargs="+", metavar="FILE", help="the paper's CSVs; JSON of GQA, OK-VQA, A-OKVQA")
        group.add_argument("--images", metavar="DIR", help="the folder of their pictures, {img_id}.jpg, .jpeg or .png")
        group.add_argument("--tasks", nargs="+", metavar="TASK", help=f"only these tasks, such as {', '.join(SIX[:2])}")
        group.add_argument("--limit", type=self.count, metavar="N", help="the first N questions of each task")
        group.add_argument("--all", action="store_true", help="count questions the model answers wrongly, too")
        group.add_argument("--skip-bad", action="store_true", help="report rows that cannot be used, and continue")
        self.add_shard_flag(group)
        group.add_argument("--image", metavar="FILE", help="your own picture ...")
        group.add_argument("--question", metavar="TEXT", help="... and the question about it")
        group.add_argument("--answer", metavar="TEXT", help="its answer, if known")
        group.add_argument("--options", metavar="A,B", help='both of an "A or B" question; the one in --answer is true')
        group.add_argument("--object", action="append", default=[], metavar="WORDS",
                           help="an object that the question names")
        group.add_argument("--box", action="append", default=[], metavar="X,Y,W,H", help="where an object is, in px")

    def add_shard_flag(self, group):
        rank = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
        try:
            if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
                raise ValueError("one without the other")
            self.shard(rank)
        except (ValueError, argparse.ArgumentTypeError) as e:
            raise ValueError(f"RANK and WORLD_SIZE in the environment, as torchrun sets them, are no shard: {e}") from e
        group.add_argument("--shard", type=self.shard, default=rank, metavar="I/N",
                           help="every N-th question, starting at the I-th (default: all; torchrun sets it)")

    def add_run_flags(self, out):
        self.run = self.add_argument_group("run")
        self.run.add_argument("--out", default=out, metavar="DIR", help=f"folder of the results ({out})")
        self.run.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")

    def add_shared_flags(self, out):
        """Those of the model, the questions and the run; more of the last can follow in self.run."""
        self.add_model_flags()
        self.add_data_flags()
        self.add_run_flags(out)

    @staticmethod
    def model(args):
        return ModelSettings(args.model, args.revision, args.vision_tower, args.device, args.dtype, args.preprocess)

    def shared(self, args):
        """Parsed flags -> Shared. Without --data and a question of your own, the bundled questions are asked."""
        given = {f.name: getattr(args, f.name) for f in fields(DataSettings)}
        given = {name: tuple(value or ()) if name in ("data", "tasks", "object", "box") else value
                 for name, value in given.items()}
        if not any(given[name] for name in ("data", "image", "question", "answer", "options", "object", "box")):
            given |= {"data": (str(BUNDLED),), "images": str(BUNDLED.parent / "images"), "limit": args.limit or 20}
        return self.shared_of(args, **given)

    def shared_of(self, args, **data):
        """Parsed flags of the model and the run, and DataSettings' fields, -> Shared."""
        return Shared(self.model(args), DataSettings(**data), args.out, args.seed)


# ---------------------------------------------------------------------------------------------------- asking

@dataclass(frozen=True, eq=False)
class Asked:
    """A question that the model was asked: what an instrument needs to measure it."""
    question: Question
    prompt: llava_min.Prompt
    groups: Groups
    x: torch.Tensor                                # embeddings (1, T, C)
    positions: torch.Tensor                        # (T,), for the decoder's rope
    clean: Clean                                   # residual stream and caches with nothing changed
    answer: str                                    # the model's own, as text
    token: int                                     # the token that is measured: the answer's first, or its last
    token_text: str
    p: float                                       # its probability
    right: bool
    counts: bool                                   # does the question go into the results?
    strict: bool                                   # does a missing group raise an error?

    @property
    def first_columns(self):
        return self.question.first_columns(self.answer)

    @property
    def where(self):
        return self.question.where or self.question.question

    def edges(self, edges):
        """Names of groups (source, target) -> ({edge: positions of both}, {edge that it does not have: why})."""
        cuts, lacking = {}, {}
        for edge in edges:
            try:
                source, target = map(self.groups.positions, edge)
                if min(source) > max(target):
                    raise EmptyGroup(f"{'->'.join(edge)}: {edge[1]} comes before {edge[0]} here, and a decoder attends "
                                     "only to what came before: there is nothing to cut")
                cuts["->".join(edge)] = source, target
            except EmptyGroup as e:
                if self.strict:
                    raise
                lacking["->".join(edge)] = str(e)
        return cuts, lacking


def load_model(m, checkpoint=None):
    """ModelSettings -> LLaVA, and one line on stderr that names the model, its size, dtype and device."""
    checkpoint = checkpoint or hub.resolve(m.name, m.revision, m.vision_tower)
    model = hub.load(checkpoint, dtype=m.dtype, device=m.device, preprocess=m.preprocess)
    print(hub.describe(model, checkpoint), file=sys.stderr)
    return model


class Study:
    """The questions of one run, asked one by one: resumable, each one's rows on disk before the next is asked."""

    def __init__(self, shared, load=None, read=read_questions):
        """load(model settings, checkpoint) -> LLaVA, called once and only if a question is left. read: instead of
        `read_questions`. ValueError: no question is left."""
        m, d = shared.model, shared.data
        self.shared, self.bad, self.load, self.run = shared, [], load or load_model, None
        self.checkpoint = hub.resolve(m.name, m.revision, m.vision_tower)
        self.config = llava_min.read_config(self.checkpoint.files, m.preprocess)
        self.single, self.out = not d.data, Path(shared.out)
        self.questions = read(d, self.bad if d.skip_bad else None, bool(self.config.vision))
        if not self.questions:
            raise ValueError(f"no usable question: {self.bad[0]}")

    @cached_property
    def model(self):
        return self.load(self.shared.model, self.checkpoint)

    def open(self, name, columns, order=list, **settings):
        """Open, or resume, the run's files. settings: what its numbers depend on, besides model and questions.

        order(questions) -> them in the order of the CSV. ValueError: a picture is missing, and see runs.Run.
        """
        m, d, files = self.shared.model, self.shared.data, self.checkpoint.files
        device = hub.pick_device(m.device)
        texts = [f for f in (files.config, files.tokenizer, files.generation, files.tower and files.tower.config) if f]
        self.run = runs.Run(self.shared.out, name, columns, {
            "weights": hub.weights_hash(files), "config": list(map(runs.file_hash, texts)), "device": device,
            "dtype": str(hub.pick_dtype(m.dtype, device, files)).removeprefix("torch."), "preprocess": m.preprocess,
            "all": d.all, **settings}, self.inputs(order), shard=d.shard, model=m.name,
            origin=self.checkpoint.origin, revision=self.checkpoint.revision, seed=self.shared.seed,
            data=[f"{f.name} {runs.file_hash(f)}" for f in data_files(d.data)], images=d.images,
            question=self.questions[0].facts() if self.single else None, tasks=d.tasks or None, limit=d.limit)

    def inputs(self, order):
        """{key: hashes of what the question's rows depend on}, in the CSV's order. Under --skip-bad, questions whose
        picture is missing are dropped; else that is a ValueError, before hours were spent on the others."""
        pictures, usable = {}, []
        for q in self.questions:
            with self.skipping_bad(), q.named():
                if q.image and self.config.vision and q.image not in pictures:
                    pictures[q.image] = picture_hash(q.image)
                usable.append(q)
        if not usable:
            raise ValueError(f"no usable question: {self.bad[0]}")
        self.questions = usable
        return {q.key: {"question": runs.text_hash(repr(q.facts())),
                        **({"picture": pictures[q.image]} if q.image in pictures else {})} for q in order(usable)}

    @property
    def csv(self):
        return self.run.csv

    @property
    def info(self):
        return self.run.info

    def todo(self, questions=None):
        """Yield the questions that have no rows yet, under a progress bar. questions: those to choose from (default:
        this shard's)."""
        if questions is None:
            i, n = self.run.shard or (0, 1)
            questions = self.questions[i::n]
        if any(q.key not in self.run.done for q in questions):
            _ = self.model                                          # loaded before the bar appears
        yield from self.run.todo(questions, key=lambda q: q.key)

    @contextmanager
    def skipping_bad(self, question=None):
        """Under --skip-bad, a question that cannot be used is noted and the run continues; else the error ends it.

        An error about a value that is not finite gets the question's name, and the layer where there is one.
        """
        try:
            yield
        except (ValueError, FloatingPointError) as e:
            if question and isinstance(e, FloatingPointError):
                e = self.located(question, e)
            if not self.shared.data.skip_bad:
                self.close()
                raise e
            self.bad.append(str(e))
        except BaseException:
            self.close()
            raise

    def close(self):
        """Leave the folder to others. A notebook keeps an error, and with it this run, until the next one."""
        if self.run:
            self.run.close()

    def located(self, question, error):
        """A value that is not finite -> the same error with the question and the first layer that has one."""
        try:
            prompt = question.prompt(self.model)
            clean_pass(self.model.decoder, self.model.embed(prompt), prompt.positions)
        except FloatingPointError as e:
            error = e
        return FloatingPointError(f"{question.where or question.key}: {error}")

    def counts(self, right):
        """The paper's rule: a question counts if the model answers it right. With --all every question counts, and your
        own question always does."""
        return right or self.single or self.shared.data.all

    def ask(self, question, paper_spans=False, subword="first", max_norm=None):
        """Question -> Asked. The arguments are the flags of the same names."""
        model, d = self.model, self.model.decoder
        prompt = question.prompt(model)
        groups = question.groups(prompt, paper_spans)
        if max_norm is not None and prompt.size:
            groups = without_large(groups, patch_norms(model, prompt), max_norm)
        x, positions = model.embed(prompt), prompt.positions
        clean = clean_pass(d, x, positions)
        logits = unembed(d, clean.stream[-1][0, -1])
        (ids,), token = model.decode(logits[None], clean.caches, len(prompt)), logits.argmax().item()
        if subword == "last" and len(ids) > 1:
            # The answer's other tokens follow the prompt; `last` is the position that predicts its last one.
            more = d.embed_tokens(torch.tensor([ids[:-1]], device=x.device))
            x, token = torch.cat((x, more), 1), ids[-1]
            after = positions[..., -1:] + 1 + torch.arange(len(ids) - 1, device=x.device)
            positions = torch.cat((positions, after), -1)
            groups = groups.having("last", [x.shape[1] - 1])
            clean = clean_pass(d, x, positions)
            logits = unembed(d, clean.stream[-1][0, -1])
        answer = model.words(ids)
        right = question.right(answer)
        return Asked(question, prompt, groups, x, positions, clean, answer, token, model.tokenizer.id_to_token(token),
                     probability(logits, token), right, self.counts(right), self.single and self.shared.strict)

    def lacks(self, question, what, error):
        """Record that a question has no rows because a group is missing. If it is the only one, raise the error."""
        if self.single and self.shared.strict:
            raise error
        self.write(question, (), {what: str(error)}, right=False)

    def write(self, asked, rows, lacking=None, right=None):
        """A finished question's rows, on disk when this returns. asked: an Asked, or a Question with `right` given."""
        right, question = (asked.right, asked.question) if isinstance(asked, Asked) else (right, asked)
        self.run.write(question.key, rows, **({} if right is None else {"right": right}),
                       **({"skipped": lacking} if lacking else {}))

    def finish(self):
        """Close the run; draw its pictures next, then let `report` say what was counted. NoRows: nothing was
        measured."""
        self.run.finish()
        if not self.run.rows_written():
            notes = self.run.done.values()
            known = any(q.answer for q in self.questions) and all("right" in note for note in notes)
            wrong = known and not self.shared.data.all and not any(note["right"] for note in notes)
            self.report()
            raise NoRows("no row was measured: " + (
                "no question was answered right; --all counts the others, too" if wrong else
                "no question has the groups, or none could be used"))

    def report(self):
        """Say what was counted and left out."""
        notes = list(self.run.done.values())
        known = any(q.answer for q in self.questions) and all("right" in note for note in notes)
        right = f", {sum(note['right'] for note in notes)} answered right" if known else ""
        print(f"{len(notes)} question{'s' * (len(notes) != 1)}{right}")
        if (wide := self.run.settings.get("window", 0)) > (L := self.config.text.layers):
            print(f"note: a window of {wide} layers is wider than the model, which has {L}: it is clipped everywhere")
        self.print_bad()
        skipped = Counter((what, re.sub(r"'[^']*'|\"[^\"]*\"", "...", why))
                          for note in notes for what, why in note.get("skipped", {}).items())
        for (what, why), n in sorted(skipped.items()):
            print(f"{what}: no row for {n} question{'s' * (n > 1)} ({why})")

    def print_bad(self):
        for message in self.bad:
            print(f"left out: {message}")


@torch.inference_mode()
def patch_norms(model, p):
    """LLaVA, Prompt -> L2 norm of the tower's feature at each image token, (n,); NaN for newlines (figure 15)."""
    rows = slot_rows(p.slots, p.geometry.side).to(model.device)
    return model.patch_features(p).float().norm(dim=-1)[rows].masked_fill(rows < 0, math.nan)


def picture_hash(file):
    """A picture's hash, computed once while the file stays as it is. ValueError: there is no such picture."""
    if not Path(file).is_file():
        raise ValueError(f"{file}: " + ("not a file" if Path(file).exists() else "no such picture"))
    stat = os.stat(file)
    return hash_of(file, stat.st_size, stat.st_mtime_ns)


@cache
def hash_of(file, size, changed):
    return runs.file_hash(file)


def without_large(groups, norms, most):
    """Take patches of a norm above `most` out of related_patches and other_patches (figure 16). norms (n,)."""
    large = {groups.prompt.image.start + i for i in (norms > most).nonzero().flatten().tolist()}
    for name in ("related_patches", "other_patches"):
        if name in groups.named:
            left = [i for i in groups.named[name] if i not in large]
            groups = groups.having(name, left, f"every patch has a norm above {most:g}")
    return groups
