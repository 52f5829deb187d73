"""
harness/experiment.py - what instruments share: one loop over the questions, and one rule for which of them count.

Use     study = Study(settings.shared)
        study.open("knockout.csv", COLUMNS, window=9)
        for question, result in study.measured(measure, settings):
            with study.skipping_bad(question):
                study.write(*result())             what measure(study, question, settings) returns: (Asked, rows, {})
        study.finish()
Needs   hub.py, questions.py, runs.py beside it; llava_min.py, groups.py, views.py, fork.py, score.py and offload.py
Paper   https://arxiv.org/abs/2411.18620, section 4.1: only questions that the model answers correctly count
"""
import math
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path

import torch

import llava_min
import offload
from fork import Clean, clean_pass, extend, probability, unembed
from groups import EmptyGroup, Groups, random_sets
from harness import hub, runs
from harness.questions import NoRows, Question, data_files, picture, read_questions
from score import Answer, columns, option_pair, options_of, score
from views import patch_boxes, slot_rows

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
    answer_ids: tuple                              # its tokens, without the end token
    scored: Answer                                 # its tokens, see score.py
    unpaired: str                                  # why there is no margin between two options; "": there is one
    token: int                                     # the token that is measured: the answer's first, or its last
    token_text: str
    p: float                                       # its probability
    right: bool
    counts: bool                                   # does the question go into the results?
    strict: bool                                   # does a missing group raise an error?
    seed: int = 0                                  # of what is drawn

    @property
    def first_columns(self):
        return self.question.first_columns(self.answer)

    @property
    def where(self):
        return self.question.where or self.question.question

    def edges(self, edges, measure="first"):
        """Names of groups (source, target) -> ({edge: positions of both}, {edge that it does not have: why}).
        ValueError: a query would attend to nothing; or your own question has no margin, which is measured."""
        cuts, lacking = {}, {}
        if measure == "margin" and self.strict and self.unpaired:
            raise ValueError(f"--measure margin: {self.unpaired}")
        for edge in edges:
            try:
                source, target = map(self.groups.positions, edge)
                if min(source) > max(target):
                    raise EmptyGroup(f"{'->'.join(edge)}: {edge[1]} comes before {edge[0]} here, and a decoder attends "
                                     "only to what came before: there is nothing to cut")
                keys = {*range(max(source) + 2)} - {*source}        # what the cut leaves; the last one is always there
                if blind := [t for t in target if t < min(keys)]:
                    raise ValueError(f"{self.where} {'->'.join(edge)}: query position(s) {blind[:4]} would attend to "
                                     "nothing: every key is cut")
                cuts["->".join(edge)] = source, target
            except EmptyGroup as e:
                if self.strict:
                    raise
                lacking["->".join(edge)] = str(e)
        return cuts, lacking

    def base(self, decoder):
        """The measures of the answer with nothing changed: score.score's dict, of single numbers."""
        return score(decoder, self.clean.stream[-1][0, self.scored.read], self.scored)

    def points(self, decoder, ends):
        """Streams after the last layer at the positions that predict the answer, (n, m, C) -> n lists: p, and what
        score.COLUMNS names."""
        return columns(self.base(decoder), score(decoder, ends, self.scored), self.scored)

    def named(self, names):
        """Names of groups -> ({name: positions}, {group that it does not have: why})."""
        found, lacking = {}, {}
        for name in names:
            try:
                found[name] = self.groups.positions(name)
            except EmptyGroup as e:
                if self.strict:
                    raise
                lacking[name] = str(e)
        return found, lacking

    def controls(self, edge, source, target, s, L, lacking):
        """--control: edges like this one with random positions in place of its source or target -> list of (name,
        layers at which it is cut, (source, target)). s: knockout.Settings.

        They depend on the seed, the question and the edge alone. If the pool is too small for so many different sets,
        there is none, and `lacking` says why.
        """
        pool = control_pool(source, target, self.x.shape[1], s.control_of)
        try:
            sets = self.draw(pool, len(source if s.control_of == "source" else target), s.control, edge)
        except EmptyGroup as e:
            if self.strict:
                raise EmptyGroup(f"--control {s.control} of {edge}: {e}") from e
            lacking[f"control of {edge}"] = str(e)
            return []
        return [(f"{edge}, random {s.control_of} {i}", control_layers(L, s.control_step),
                 (some, target) if s.control_of == "source" else (source, some)) for i, some in enumerate(sets, 1)]

    def draw(self, pool, size, n, what):
        """n random sets, see groups.random_sets: others for each question and `what`."""
        return random_sets(pool, size, n, f"{self.seed}/{self.question.key}/{what}")


def control_pool(source, target, T, of="source"):
    """The positions that an edge's random sources, or targets, are drawn from.

    Sources: what the last target may attend to, but targets, and but position 0, an attention sink. Targets: what comes
    after the first source, but sources.
    """
    return sorted({*range(1, max(target))} - {*target} if of == "source" else {*range(min(source) + 1, T)} - {*source})


def control_layers(L, step=None):
    """The layers at which controls are measured: every step-th; else three, a third of the model apart, up to the last
    one, since N controls at every layer cost as much as N edges."""
    return list(range(0, L, step)) if step else sorted({max(0, L * i // 3 - 1) for i in (1, 2, 3)})


def short_name(model):
    """--model -> a registered name or hub id as it is; of a folder, its own name."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def load_model(m, checkpoint=None):
    """ModelSettings -> LLaVA, and one line on stderr that names the model, its size, dtype and device."""
    checkpoint = checkpoint or hub.resolve(m.name, m.revision, m.vision_tower)
    model = hub.load(checkpoint, dtype=m.dtype, device=m.device, preprocess=m.preprocess, offload=m.offload)
    print(hub.describe(model, checkpoint), file=sys.stderr)
    return model


class Asker:
    """A model that is asked questions."""

    single = True                                  # is there one question, which always counts?

    def __init__(self, model, shared, others=None):
        """shared: flags.Shared, of which the seed and `strict` are used. others: see `other`."""
        self.model, self.shared, self.others = model, shared, others

    def other(self, question):
        """A question's other photo, or None: in the folder `others` under the first one's name, with any of three
        endings; `others` itself where the question is from no file."""
        if self.others is None or not self.shared.data.data:
            return self.others
        name = question.image.relative_to(self.shared.data.images)
        same = Path(self.others) / name
        return same if same.exists() else picture(self.others, str(name.with_suffix("")))

    def counts(self, right):
        """The paper's rule: a question counts if the model answers it right. With --all every question counts, and your
        own question always does."""
        return right or self.single or self.shared.data.all

    def ask(self, question, paper_spans=False, subword="first", max_norm=None, whole=False):
        """Question -> Asked. The arguments are the flags of the same names.

        whole: append the model's answer without its last token; the group `last` is then every position that predicts a
        token of the answer. subword "last": append it, too, but `last` is the one position that predicts its last
        token. FloatingPointError: a value is not finite.
        """
        model, d = self.model, self.model.decoder
        prompt = question.prompt(model)
        groups = question.groups(prompt, paper_spans)
        if max_norm is not None and prompt.size:
            groups = without_large(groups, patch_norms(model, prompt), max_norm)
        x, positions = model.embed(prompt), prompt.positions
        clean = clean_pass(d, x, positions, model.store)
        logits = unembed(d, clean.stream[-1][0, -1])
        ids, = model.decode(logits[None], clean.caches, len(prompt))
        answer, answer_ids, first = model.words(ids), tuple(ids), logits.argmax().item()
        right, measured = question.right(answer), -1 if subword == "last" else 0
        ids = (ids or [first]) if whole or measured else [first]    # an empty answer is its end token
        if len(ids) > 1:
            more = d.embed_tokens(torch.tensor([ids[:-1]], device=x.device))
            after = positions[..., -1:] + 1 + torch.arange(len(ids) - 1, device=x.device)
            clean = extend(d, clean, more, after, model.store)
            x, positions = torch.cat((x, more), 1), torch.cat((positions, after), -1)
            predict = list(range(len(prompt) - 1, x.shape[1]))      # the positions that predict a token of the answer
            groups = groups.having("last", predict[-1:] if measured else predict)
            logits = unembed(d, clean.stream[-1][0, predict[measured]])
        pair, why = option_pair(model.tokenizer, ids, answer, *options_of(
            answer, question.answer, question.true_option, question.false_option, question.options))
        return Asked(question, prompt, groups, x, positions, clean, answer, answer_ids,
                     Answer(tuple(ids), measured, pair), why, ids[measured],
                     model.tokenizer.id_to_token(ids[measured]), probability(logits, ids[measured]),
                     right, self.counts(right), self.single and self.shared.strict, self.shared.seed)

    def patch_boxes(self, prompt):
        """Where each image token lies on the photo, see views.patch_boxes: (n, 4) in px."""
        return patch_boxes(prompt.size, prompt.geometry)


class Study(Asker):
    """The questions of one run, asked one by one: resumable, each one's rows on disk before the next is asked."""

    def __init__(self, shared, load=None, read=read_questions, others=None):
        """load(model settings, checkpoint) -> LLaVA, called once and only if a question is left. read: instead of
        `read_questions`. others: see `other`. ValueError: no question is left."""
        m, d = shared.model, shared.data
        self.shared, self.bad, self.load, self.run, self.others = shared, [], load or load_model, None, others
        self.checkpoint = hub.resolve(m.name, m.revision, m.vision_tower)
        self.config = hub.read_config(self.checkpoint.files, m.preprocess)
        self.single, self.out = not d.data, Path(shared.out)
        self.questions = read(d, self.bad if d.skip_bad else None, bool(self.config.vision))
        if not self.questions:
            raise ValueError(f"no usable question: {self.bad[0]}")

    @cached_property
    def model(self):
        return self.load(self.shared.model, self.checkpoint)

    def need_photos(self, why):
        """ValueError, with `why`: the model is text-only."""
        if not self.config.vision:
            raise ValueError(f"--model {self.shared.model.name} is text-only: {why}")

    def measured_with(self, heads=None, subword=None, **settings):
        """What every row says of its run, so that a CSV, and its picture, can be read alone: {column: text}. Of a model
        in a folder, the folder's name. heads, subword: where the instrument has them; "all" is every head."""
        m = self.shared.model
        dtype = hub.pick_dtype(m.dtype, hub.pick_device(m.device), self.checkpoint.files)
        how = {"model": short_name(m.name), "dtype": str(dtype).removeprefix("torch.")}
        if subword:
            how |= {"subword": subword, "heads": ",".join(map(str, heads)) if heads else "all"}
        return how

    def open(self, name, columns, order=list, **settings):
        """Open, or resume, the run's files. settings: what its numbers depend on, besides model and questions.

        columns: those of `measured_with` follow them. order(questions) -> them in the order of the CSV. ValueError: a
        picture is missing, and see runs.Run.
        """
        m, d, files = self.shared.model, self.shared.data, self.checkpoint.files
        device = hub.pick_device(m.device)
        texts = [f for f in (files.config, files.tokenizer, files.generation, files.tower and files.tower.config) if f]
        self.how = self.measured_with(**settings)
        self.run = runs.Run(self.shared.out, name, (*columns, *self.how), {
            "weights": hub.weights_hash(files), "config": list(map(runs.file_hash, texts)), "device": device,
            "dtype": self.how["dtype"], "preprocess": m.preprocess,
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
                for file in filter(None, (q.image, self.other(q)) if self.config.vision else ()):
                    pictures[file] = pictures.get(file) or picture_hash(file)
                usable.append(q)
        if not usable:
            raise ValueError(f"no usable question: {self.bad[0]}")
        self.questions = usable
        return {q.key: {"question": runs.text_hash(repr(q.facts())),
                        **({"picture": pictures[q.image]} if q.image in pictures else {}),
                        **({"other": pictures[self.other(q)]} if self.others else {})} for q in order(usable)}

    @property
    def csv(self):
        return self.run.csv

    @property
    def info(self):
        return self.run.info

    def todo(self, questions=None):
        """Yield the questions that have no rows yet, under a progress bar. questions: those to choose from (default:
        this shard's)."""
        for question, in self.batches(1, questions):
            yield question

    def batches(self, size=None, questions=None):
        """The same, in lists. size: how many in each (default: --together, or as many as the memory allows)."""
        if questions is None:
            i, n = self.run.shard or (0, 1)
            questions = self.questions[i::n]
        if any(q.key not in self.run.done for q in questions):
            _ = self.model                                          # loaded before the bar appears
            size = size or self.at_once()
        yield from self.run.batches(questions, lambda q: q.key, size or 1)

    def at_once(self):
        """How many questions go through the layers together; loads the model."""
        return self.shared.model.together or hub.together(self.model)

    def measured(self, measure, s):
        """Yield each question that has no rows yet, and a function that returns what measure(study, question, s) does,
        or raises its error. Where layers are not in memory, several questions are measured together before."""
        for batch in self.batches():
            yield from zip(batch, offload.together(self.model, partial(measure, self, s=s), batch), strict=True)

    def together(self, do, items):
        """The same for any items: yield each, and a function that returns what do(item) does, or raises its error."""
        items = iter(items)
        while batch := list(islice(items, 1)):                      # the first one loads the model, if there is any
            batch += islice(items, self.at_once() - 1)
            yield from zip(batch, offload.together(self.model, do, batch), strict=True)

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

    def show_groups(self, edges, paper_spans, draw):
        """--groups: the token groups of the first question, as a table and on its photo."""
        question = self.questions[0]
        prompt = question.prompt(self.model)
        groups = question.groups(prompt, paper_spans)
        picture = self.out / "groups.png"
        if prompt.size:
            draw(question.open(), groups, self.patch_boxes(prompt), question.boxes, picture)
        print(groups.table(dict.fromkeys(name for edge in edges for name in edge if name not in groups.named)))
        if prompt.size:
            print(f"wrote {picture}")

    def lacks(self, question, what, error):
        """Record that a question has no rows because a group is missing. If it is the only one, raise the error."""
        if self.single and self.shared.strict:
            raise error
        self.write(question, (), {what: str(error)}, right=False)

    def write(self, asked, rows, lacking=None, right=None):
        """A finished question's rows, on disk when this returns. asked: an Asked, or a Question with `right` given."""
        note, question = {} if right is None else {"right": right}, asked
        if isinstance(asked, Asked):
            note, question = {"right": asked.right}, asked.question
        if self.single and rows and "prediction" in self.run.columns:          # what `report` says first
            note["answer"] = rows[0][self.run.columns.index("prediction")]
            note |= {"p": [asked.token_text, asked.p]} if isinstance(asked, Asked) else {}
        self.run.write(question.key, [[*row, *self.how.values()] for row in rows], **note,
                       **({"skipped": lacking} if lacking else {}))

    def finish(self):
        """Close the run; draw its pictures next, then let `report` say what was counted. NoRows: nothing was
        measured."""
        self.run.finish()
        if not self.run.rows_written():
            notes = self.run.done.values()
            wrong = self.known() and not self.shared.data.all and not any(note["right"] for note in notes)
            self.report()
            raise NoRows("no row was measured: " + (
                "no question was answered right; --all counts the others, too" if wrong else
                "no question has the groups, or none could be used"))

    def known(self):
        """Is it known of every finished question whether it was answered right?"""
        return any(q.answer for q in self.questions) and all("right" in note for note in self.run.done.values())

    def report(self):
        """Say what was counted and left out."""
        notes = list(self.run.done.values())
        right = f", {sum(note['right'] for note in notes)} answered right" if self.known() else ""
        if self.single and notes and "answer" in notes[0]:
            p = ["P of {!r}: {:.3g}".format(*notes[0]["p"])] if "p" in notes[0] else []
            known = ["which is right" if notes[0]["right"] else "which is wrong"] if self.known() else []
            more = f"   ({', '.join(p + known)})" if p or known else ""
            print(f"{self.questions[0].question} {notes[0]['answer']}{more}")
        else:
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
