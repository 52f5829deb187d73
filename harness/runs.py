"""
harness/runs.py - a long run that can be stopped: progress bar, a durable write per question, resume, run.json.

Needs   tqdm, and torch for what run.json says of the machine. Nothing else of this repo: copy it and it works.
Use     run = Run(out, "knockout.csv", COLUMNS, settings, {q.key: {"picture": file_hash(q.image)} for q in questions})
        for question in run.todo(questions, key=lambda q: q.key):
            run.write(question.key, rows)
        run.finish()

Files in the folder `out`:
    NAME.csv       the rows of every finished question; a question's rows arrive in one write and are synced to disk
    NAME.progress  one JSON line per finished question: its key, where its rows end in the CSV, a hash of them, hashes
                   of what they depend on, and a note. Bytes after the last recorded end come from a crash and are
                   dropped when the run is resumed
    run.json       settings, command line, versions, times: where the numbers come from

What a question's rows depend on is the settings and its own inputs, not how many questions were asked: a run of 20
questions can be continued with 30. When it is finished its CSV is, byte for byte, that of a run that asked 30 at once.
"""
import csv
import gc
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "pillow", "matplotlib")
ELSE = "use another --out, or delete that one"


class Run:
    """One run's files. ValueError: the folder holds a run with other settings or inputs, or files that are not a
    run's, or files that were changed by hand."""

    def __init__(self, out, name, columns, settings, inputs, shard=None, **extra):
        """out: folder, made if absent. name: "x.csv". columns: its header. settings: all that the numbers depend on.

        inputs: {key of a question: {what its rows depend on besides: a hash}}, of all questions, in the CSV's order.
        shard: (i, n): this process does every n-th question, starting at the i-th. Its files lie in a subfolder of
        `out` until the last shard to finish merges them all. extra: further entries of run.json, which may differ when
        a run is resumed.
        """
        self.columns, self.settings = list(columns), json.loads(json.dumps(settings))
        self.inputs, self.asked = inputs, text_hash(json.dumps(inputs))
        self.name, self.whole, self.fresh, self.began = name, Path(out), 0, time.time()
        merged = bool(shard) and self.merged()
        self.shard = None if merged else shard                      # after the merge there is only the whole run
        self.out = shard_folder(self.whole, *shard) if self.shard else self.whole
        self.csv, self.info = self.out / name, self.out / "run.json"
        self.journal = self.csv.with_suffix(".progress")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(self.out, wait=merged)
        if merged:
            print(f"all shards are merged in {self.csv}")
        for file in (self.csv, self.journal, self.info):
            if file.exists() and not file.is_file():
                raise ValueError(f"{file} is not a file, but a folder, a pipe or a device; use another --out")
        old, clash = self.old_run(self.out)
        self.recover()
        # done: key -> note, of every finished question, in the order of their rows
        self.done, end, journal = finished(self.csv, self.journal, self.columns)
        clash = clash or self.changed()
        if clash and self.rows_written():
            raise ValueError(clash)
        calls = old.get("calls", [])
        if clash or not self.done:                                  # there is nothing to lose: start over
            self.done, calls, end, journal = {}, [], 0, ""
        replace_text(self.journal, journal)
        with naming(self.csv):
            self.rows = open(self.csv, "r+b" if self.csv.exists() else "w+b")      # noqa: SIM115, closed by close
            self.rows.truncate(end)
            self.rows.seek(end)
        with naming(self.journal):
            self.log = open(self.journal, "a", encoding="utf-8")                               # noqa: SIM115
        call = {"command": sys.argv, "started": now(), "versions": versions(), "machine": machine()}
        self.record = {"csv": name, **extra, "settings": self.settings, "asked": self.asked, "calls": [*calls, call],
                       "questions": len(self.done)} | ({"shards": old["shards"]} if "shards" in old else {})
        self.record["others"] = others(self.info, name)
        write_json(self.info, self.record)
        if end == 0:
            self.note({"rows": 0} | self.append([self.columns]))

    def old_run(self, folder):
        """The record of this CSV in the folder's run.json -> (the record, {} if there is none; how its settings differ,
        or None)."""
        info, file = folder / "run.json", folder / self.name
        if not info.exists():
            if file.exists() and file.stat().st_size:
                raise ValueError(f"{file} has no run.json beside it, so it cannot be resumed; use another --out")
            return {}, None
        try:
            old = records(info).get(self.name)
            if old is None:
                if file.exists() and file.stat().st_size:
                    raise KeyError(self.name)
                return {}, None
            theirs, calls = dict(old["settings"]), list(old["calls"])
            if not all(isinstance(call, dict) for call in calls):
                raise TypeError("calls")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise ValueError(f"{info} is not a run's record ({type(e).__name__}: {e}); use another --out") from e
        return old, next((f"{folder} holds a run with {key} = {show(theirs.get(key))}, this one has "
                          f"{show(self.settings.get(key))}; {ELSE}"
                          for key in {**theirs, **self.settings} if theirs.get(key) != self.settings.get(key)), None)

    def changed(self):
        """How the finished questions' inputs differ from today's, or None."""
        for key, note in self.done.items():
            if key not in self.inputs:
                return (f"{self.out} holds rows of question {key}, which is not asked now (it holds {len(self.done)} "
                        f"questions, this call asks {len(self.inputs)}); {ELSE}")
            for what in {**note["inputs"], **self.inputs[key]}:
                if note["inputs"].get(what) != self.inputs[key].get(what):
                    return (f"{self.csv}: the {what} of question {key} is not the one that its rows were computed "
                            f"from; {ELSE}")
        return None

    def merged(self):
        """Are all shards finished and merged? ValueError: `whole` holds a run that these shards do not make up."""
        file = self.whole / self.name
        if not file.exists():
            return False
        old, clash = self.old_run(self.whole)
        if not clash and old.get("asked") != self.asked:
            clash = (f"{self.whole} holds a run of other questions ({old.get('questions')} finished, this call asks "
                     f"{len(self.inputs)}); {ELSE}")
        if not clash and "finished" not in old["calls"][-1]:
            clash = f"{self.whole} holds an unfinished run without --shard: finish that, or {ELSE}"
        if clash:
            raise ValueError(clash)
        return True

    def rows_written(self):
        """How many rows the finished questions have in the CSV."""
        return sum(note["rows"] for note in self.done.values())

    def todo(self, items, key):
        """Yield the items that are not finished yet, under a progress bar that counts all of them."""
        for item, in self.batches(items, key, 1):
            yield item

    def batches(self, items, key, size):
        """The same, in lists of at most `size` items."""
        from tqdm import tqdm
        items = list(items)
        left = [item for item in items if key(item) not in self.done]
        with tqdm(total=len(items), initial=len(items) - len(left), unit="question", file=sys.stderr,
                  dynamic_ncols=True) as bar:
            for at in range(0, len(left), size):
                yield left[at:at + size]
                bar.update(len(left[at:at + size]))

    def write(self, key, rows, **note):
        """The rows (lists, in column order) of one finished question: on disk when this returns."""
        self.done[key] = {"key": key, "rows": len(rows), **self.append(rows), "inputs": self.inputs[key], **note}
        self.note(self.done[key])
        self.fresh += 1

    def append(self, rows):
        """Rows, into the CSV -> where they end there, and their hash."""
        assert all(len(row) == len(self.columns) for row in rows), (self.columns, rows[0])
        data = csv_text(rows).encode()
        with naming(self.csv):
            self.rows.write(data)
            self.rows.flush()
            os.fsync(self.rows.fileno())
        return {"end": self.rows.tell(), "hash": text_hash(data)}

    def note(self, line):
        with naming(self.journal):
            self.log.write(json.dumps(line) + "\n")                 # after the rows, which count only with this line
            self.log.flush()
            os.fsync(self.log.fileno())

    def close(self):
        """Close the files. What is written stays, and the run can be resumed."""
        self.rows.close()
        self.log.close()
        self.lock.close()

    def finish(self):
        """Close the files and complete run.json.

        A shard that is not the last one to finish ends the process here. The last one merges the files of all shards
        into those that one process would have written, and becomes that run.
        """
        if [key for key in self.inputs if key in self.done] != list(self.done):
            self.arrange([(self.csv, self.done)], self.out)
        self.record["questions"] = len(self.done)
        self.record["calls"][-1] |= {"finished": now(), "seconds": round(time.time() - self.began, 1),
                                     "questions": self.fresh}
        write_json(self.info, self.record)
        self.close()
        if self.shard:
            i, n = self.shard
            left = self.merge()
            if left is not None:
                print(f"shard {i} of {n} is done; " + (f"the last one to finish merges them (left: "
                      f"{', '.join(map(str, left))})" if left else f"all are merged in {self.whole / self.name}"))
                sys.exit(0)

    def arrange(self, parts, folder):
        """Write the rows of `parts`, [(CSV, {key: note})], into folder's CSV and journal, in the order of `inputs`.

        A crash leaves the old CSV and journal, or the new journal and NAME.csv.new, see `recover`.
        """
        head, new, places = header(self.columns), Path(f"{folder / self.name}.new"), {}
        for file, notes in parts:
            start = len(head)
            for key, note in notes.items():                         # as they follow each other in that file
                places[key], start = (file, start, note), note["end"]
        lines = [{"rows": 0, "end": len(head), "hash": text_hash(head)}]
        with naming(new), ExitStack() as stack:
            sources = {file: stack.enter_context(open(file, "rb")) for file, _ in parts}
            f = stack.enter_context(open(new, "wb"))
            f.write(head)
            for file, start, note in (places[key] for key in self.inputs if key in places):
                sources[file].seek(start)
                f.write(sources[file].read(note["end"] - start))
                lines.append(note | {"end": f.tell()})
            f.flush()
            os.fsync(f.fileno())
        replace_text(folder / self.journal.name, "".join(json.dumps(line) + "\n" for line in lines))
        os.replace(new, folder / self.name)
        self.done = {line["key"]: line for line in lines[1:]}

    def recover(self):
        """If a crash came between the two last steps of `arrange`, take the last one."""
        new = Path(f"{self.csv}.new")
        if new.exists() and self.journal.exists():
            try:
                finished(new, self.journal, self.columns, whole=True)
            except ValueError:                                      # the crash came earlier: the old files are in place
                return
            os.replace(new, self.csv)

    def merge(self):
        """Merge the shards if all have finished and none has merged them yet.

        -> None if this call did; the numbers of the unfinished shards; [] if another process has merged them.
        """
        gate = Lock(self.whole, wait=True)
        try:
            if self.merged():
                return []
            calls, parts, left = [], [], []
            for j in range(self.shard[1]):
                folder = shard_folder(self.whole, j, self.shard[1])
                old, clash = self.old_run(folder)
                if clash or old.get("asked") != self.asked or "finished" not in old["calls"][-1]:
                    left.append(j)
                    continue
                calls += old["calls"]
                file = folder / self.name
                parts.append((file, finished(file, file.with_suffix(".progress"), self.columns)[0]))
            if left:
                return left
            self.out, self.csv, self.info = self.whole, self.whole / self.name, self.whole / "run.json"
            count = len({key for _, notes in parts for key in notes})
            self.record |= {"calls": calls, "questions": count, "shards": self.shard[1],
                            "others": others(self.info, self.name)}
            write_json(self.info, self.record)
            self.arrange(parts, self.whole)                         # last: where there is a CSV, it is whole
            return None
        finally:
            gate.close()


def records(info):
    """A run.json -> {CSV: its record}. A folder may hold several CSVs; the latest one's record is on top, the others'
    are in "others". ValueError: it is not a run's."""
    try:
        top = json.loads(info.read_text(encoding="utf-8"))
        return {**top.get("others", {}), top["csv"]: top}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{info} is not a run's record ({type(e).__name__}: {e}); use another --out") from e


def others(info, name):
    """The records of the other CSVs in a run.json, {} if there is none."""
    found = records(info) if info.exists() else {}
    return {csv: {k: v for k, v in record.items() if k != "others"} for csv, record in found.items() if csv != name}


def finished(file, journal, columns, whole=False):
    """A CSV and its journal -> ({key: note} of every finished question; where the last one's rows end in the CSV; the
    journal's text up to there).

    What a crash leaves at the end of either file does not count; with `whole`, there must be nothing of that kind.
    ValueError: one of the two was damaged otherwise, or changed by hand.
    """
    head, size = header(columns), file.stat().st_size if file.exists() else 0
    if not journal.exists():
        if size > len(head):
            raise ValueError(f"{journal} is gone, and {file} cannot be resumed without it; use another --out")
        return {}, 0, ""
    text = journal.read_text(encoding="utf-8", errors="replace")
    done, end, kept = {}, 0, []
    damaged = f"{journal} is damaged: {file} cannot be resumed; use another --out"
    with open(file, "rb") if file.exists() else io.BytesIO() as f:
        lines = text.split("\n")                                    # the last one is torn, or empty
        for i, line in enumerate(lines[:-1]):
            try:
                note = json.loads(line)
            except (ValueError, RecursionError) as e:
                if i + 2 == len(lines) and (kept or size <= len(head)) and not whole:         # a crash spoilt it
                    break
                raise ValueError(damaged) from e
            if not valid(note, end, first=not kept) or note.get("key") in done:
                raise ValueError(damaged)
            if note["end"] > size:                                  # the CSV is shorter than noted: believe the CSV
                break
            piece = f.read(note["end"] - end)
            if text_hash(piece) != note["hash"]:
                raise ValueError(f"{file}: the rows of question {note['key']} are not those that were written; use "
                                 "another --out" if kept else f"{file} has other columns than this version writes; "
                                 "use another --out")
            if not kept and piece != head:
                raise ValueError(f"{file} has other columns than {columns}; use another --out")
            end = note["end"]
            kept.append(line + "\n")
            if "key" in note:
                done[note["key"]] = note
    if whole and "".join(kept) != text:
        raise ValueError(damaged)
    if not kept and size > len(head):
        raise ValueError(f"{journal} is empty, and {file} cannot be resumed without it; use another --out")
    return done, end, "".join(kept)


def valid(note, end, first):
    """Is this a line that a run can have written, after one that ends at `end`? The first is the header's."""
    return (isinstance(note, dict) and type(note.get("end")) is int and note["end"] >= end
            and isinstance(note.get("hash"), str) and type(note.get("rows")) is int and note["rows"] >= 0
            and (first and "key" not in note or not first and isinstance(note.get("key"), str)
                 and texts(note.get("inputs")) and type(note.get("right", True)) is bool
                 and texts(note.get("skipped", {}))))


def texts(value):
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def header(columns):
    return csv_text([columns]).encode()


def csv_text(rows):
    """Rows as CSV, a line each, ended by a newline; floats come out as repr, in full precision."""
    lines = []
    for row in rows:                                                # "\r\n": so that a field with either is quoted
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow(row)
        lines.append(line.getvalue()[:-2] + "\n")
    return "".join(lines)


def shard_folder(out, i, n):
    return Path(out) / f"shard-{i}-of-{n}"


class Lock:
    """Keeps a second process out of a folder until this one ends or closes it. ValueError: another one is in there."""

    def __init__(self, folder, wait=False):
        self.file = None
        try:
            import fcntl
        except ImportError:                                         # Windows has no such locks: nothing is locked
            return
        self.file, how = os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(self.file, how)
        except BlockingIOError:
            gc.collect()                                            # a run of this process that ended in an error?
            try:
                fcntl.flock(self.file, how)
            except BlockingIOError:
                raise ValueError(f"another process is writing {folder}; wait for it, or use another --out") from None

    def close(self):
        if self.file is not None:
            os.close(self.file)
        self.file = None

    __del__ = close


@contextmanager
def naming(file):
    """An OSError inside names the file: that of a full disk does not by itself."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(file)) from e


def show(value):
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) < 150 else text[:140] + " ..."


def widened(head, rows, more):
    """A CSV's head and rows, and {column: its value in every row} -> the whole table, the head first."""
    return [(*head, *more), *((*row, *more.values()) for row in rows)]


def text_hash(data):
    """The first 16 hex digits of a text's sha256: enough to notice a change."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:16]


def file_hash(file):
    """The same of a file's bytes. Errors: as of `sha256`."""
    return sha256(file)[:16]


def sha256(file):
    """A file's sha256, all of it. ValueError: it is missing, or a folder, pipe or device. OSError: it is unreadable."""
    if not Path(file).is_file():
        raise ValueError(f"{file}: " + ("not a file" if Path(file).exists() else "no such file"))
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def write_json(file, value):
    replace_text(file, json.dumps(value, indent=1) + "\n")


def replace_text(file, text):
    """Write a file such that a crash leaves either the old one or the new one, whole."""
    new = Path(f"{file}.new")
    with naming(file):
        with open(new, "w", encoding="utf-8", newline="") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, file)


def versions():
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return installed | {"git": git_commit()}


def git_commit():
    """The commit of the checkout that this file lies in, with "+" if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*args):                                                 # without optional locks, it writes nothing
        done = subprocess.run(["git", "--no-optional-locks", "-C", root, *args], capture_output=True)
        return os.fsdecode(done.stdout.strip())                     # a path, as Python spells it, whatever the encoding
    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:       # installed inside somebody else's checkout
            return None
        commit = git("rev-parse", "--verify", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if commit else None
    except OSError:                                                 # no git on this machine
        return None


def machine():
    import torch
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}
