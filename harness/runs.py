"""
harness/runs.py - a long run that can be stopped: progress bar, a durable write per question, resume, run.json.

Needs   tqdm, and torch for what run.json says of the machine. Nothing else of this repo: copy it and it works.
Use     run = Run(out, "knockout.csv", COLUMNS, settings)
        for question in run.todo(questions, key=lambda q: q.key):
            run.write(question.key, rows)
        run.finish()

Files in the folder `out`:
    NAME.csv       the rows of every finished question; a question's rows arrive in one write and are synced to disk
    NAME.progress  one JSON line per finished question: its key, where its rows end in the CSV, and a note. Bytes after
                   the last recorded end come from a crash and are dropped when the run is resumed
    run.json       settings, command line, versions, times: where the numbers come from
"""
import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "pillow", "matplotlib")


class Run:
    """One run's files. ValueError: the folder holds a run with other settings, or files that are not a run's."""

    def __init__(self, out, name, columns, settings, shard=None, **extra):
        """out: folder, made if absent. name: "x.csv". columns: its header. settings: all that the numbers depend on.

        shard: (i, n): this process does every n-th item, starting at the i-th. Its files lie in a subfolder of `out`
        until the last shard to finish merges them all. extra: further entries of run.json, which may differ when a run
        is resumed.
        """
        self.whole, self.shard = Path(out), shard
        self.out = shard_folder(self.whole, *shard) if shard else self.whole
        self.csv = self.out / name
        self.journal, self.info = self.csv.with_suffix(".progress"), self.out / "run.json"
        self.columns, self.settings = list(columns), json.loads(json.dumps(settings))
        self.done, self.fresh, self.began = {}, 0, time.time()      # done: key -> note, of every finished question
        self.out.mkdir(parents=True, exist_ok=True)
        calls, clash = self.old_run()
        self.rows = open(self.csv, "r+b" if self.csv.exists() else "w+b")          # noqa: SIM115, closed by close
        lock(self.rows)
        end = self.read_journal()
        if clash and self.rows_written():
            raise ValueError(clash)
        if clash or not self.done:                                  # there is nothing to lose: start over
            self.done, calls, end = {}, [], 0
        self.rows.truncate(end)
        self.rows.seek(end)
        self.log = open(self.journal, "w" if end == 0 else "a", encoding="utf-8")  # noqa: SIM115
        call = {"command": sys.argv, "started": now(), "versions": versions(), "machine": machine()}
        self.record = {**extra, "settings": self.settings, "calls": [*calls, call], "questions": len(self.done)}
        write_json(self.info, self.record)
        if end == 0:
            self.append([self.columns])
            self.note({"end": self.rows.tell()})

    def old_run(self):
        """An earlier run.json, if there is one -> (its list of calls, how its settings differ or None)."""
        if not self.info.exists():
            if self.csv.exists() and self.csv.stat().st_size:
                raise ValueError(f"{self.csv} has no run.json beside it, so it cannot be resumed; use another --out")
            return [], None
        try:
            old = json.loads(self.info.read_text(encoding="utf-8"))
            theirs, calls = dict(old["settings"]), list(old["calls"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{self.info} is not a run's record ({type(e).__name__}: {e}); use another --out") from e
        clash = next((f"{self.out} holds a run with {key} = {show(theirs.get(key))}, this one has "
                      f"{show(self.settings.get(key))}; use another --out, or delete that one"
                      for key in {**theirs, **self.settings} if theirs.get(key) != self.settings.get(key)), None)
        return calls, clash

    def read_journal(self):
        """Fill `done` -> where the last finished question's rows end in the CSV (0: nothing is there yet)."""
        end, size = 0, self.csv.stat().st_size
        if not self.journal.exists():
            if size:
                raise ValueError(f"{self.journal} is gone, and {self.csv} cannot be resumed without it; use another "
                                 "--out")
            return 0
        text, lines = self.journal.read_text(encoding="utf-8", errors="replace"), []
        for line in text.splitlines():
            try:
                note = json.loads(line)
                if note["end"] > size:                              # the CSV is shorter than noted: believe the CSV
                    break
                end = note["end"]
            except (ValueError, KeyError, TypeError) as e:
                if line == text.splitlines()[-1] and lines:         # a crash cut it off
                    break
                raise ValueError(f"{self.journal} is damaged: {self.csv} cannot be resumed; use another --out") from e
            lines.append(line + "\n")
            if "key" in note:
                self.done[note["key"]] = note
        if size > len(",".join(self.columns)) + 1 and not lines:
            raise ValueError(f"{self.journal} is empty, and {self.csv} cannot be resumed without it; use another --out")
        if "".join(lines) != text:
            replace_text(self.journal, "".join(lines))
        return end

    def rows_written(self):
        """How many rows the finished questions have in the CSV."""
        return sum(note.get("rows", 0) for note in self.done.values())

    def todo(self, items, key):
        """Yield the items that are not finished yet, under a progress bar that counts all of them."""
        from tqdm import tqdm
        items = list(items)
        with tqdm(total=len(items), initial=sum(key(item) in self.done for item in items), unit="question",
                  file=sys.stderr, dynamic_ncols=True) as bar:
            for item in items:
                if key(item) not in self.done:
                    yield item
                    bar.update()

    def write(self, key, rows, **note):
        """The rows (lists, in column order) of one finished question: on disk when this returns."""
        self.append(rows)
        self.done[key] = {"key": key, "end": self.rows.tell(), "rows": len(rows), **note}
        self.note(self.done[key])
        self.fresh += 1

    def append(self, rows):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)       # floats come out as repr, in full precision
        try:
            self.rows.write(text.getvalue().encode())
            self.rows.flush()
            os.fsync(self.rows.fileno())
        except OSError as e:                                        # a full disk: name the file
            raise OSError(e.errno, e.strerror, str(self.csv)) from e

    def note(self, line):
        self.log.write(json.dumps(line) + "\n")                     # after the rows, which count only with this line
        self.log.flush()
        os.fsync(self.log.fileno())

    def close(self):
        """Close the files. What is written stays, and the run can be resumed."""
        self.rows.close()
        self.log.close()

    def finish(self, order=()):
        """Close the files and complete run.json.

        A shard that is not the last one to finish ends the process here. The last one merges the files of all shards
        into those that one process would have written, and becomes that run. order: the keys of all items.
        """
        self.close()
        self.record["questions"] = len(self.done)
        self.record["calls"][-1] |= {"finished": now(), "seconds": round(time.time() - self.began, 1),
                                     "questions": self.fresh}
        write_json(self.info, self.record)
        if self.shard and not self.merge(order):
            where = self.whole / self.csv.name
            print(f"shard {self.shard[0]} of {self.shard[1]} is done; " + (
                f"all are merged in {where}" if where.exists() else "the last one to finish merges them"))
            sys.exit(0)

    def merge(self, order):
        """Merge the shards if all have finished and none has merged them yet -> True if this call did."""
        name, calls, notes, pieces = self.csv.name, [], {}, {}
        with open(self.whole / "shards.lock", "w") as gate:
            lock(gate, wait=True)
            if (self.whole / name).exists():
                return False
            for j in range(self.shard[1]):
                folder = shard_folder(self.whole, j, self.shard[1])
                if not (folder / "run.json").exists():
                    return False
                record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
                if "finished" not in record["calls"][-1] or record["settings"] != self.settings:
                    return False
                calls += record["calls"]
                text, start = (folder / name).read_bytes(), 0
                for line in (folder / name).with_suffix(".progress").read_text(encoding="utf-8").splitlines():
                    note = json.loads(line)
                    piece, start = text[start:note["end"]], note["end"]
                    if "key" in note:
                        notes[note["key"]], pieces[note["key"]] = note, piece
                    else:
                        head = piece
            text, lines = [head], [{"end": len(head)}]
            for key in (key for key in order if key in pieces):
                text.append(pieces[key])
                lines.append(notes[key] | {"end": lines[-1]["end"] + len(pieces[key])})
            self.out, self.csv, self.info = self.whole, self.whole / name, self.whole / "run.json"
            self.done = {line["key"]: line for line in lines[1:]}
            self.record |= {"calls": calls, "questions": len(self.done), "shards": self.shard[1]}
            replace_text(self.csv.with_suffix(".progress"), "".join(json.dumps(line) + "\n" for line in lines))
            write_json(self.info, self.record)
            replace_text(self.csv, b"".join(text).decode())         # last: where there is a CSV, it is whole
        return True


def shard_folder(out, i, n):
    return Path(out) / f"shard-{i}-of-{n}"


def lock(file, wait=False):
    """Keep a second process out of a run's files until this one ends. ValueError: another one is writing them."""
    try:
        import fcntl
    except ImportError:                                             # Windows has no such locks: nothing is locked
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise ValueError(f"another process is writing {file.name}; wait for it, or use another --out") from None


def show(value):
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) < 150 else text[:140] + " ..."


def file_hash(file):
    """sha256 of a file's bytes, as hex. OSError: it cannot be read."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def write_json(file, value):
    replace_text(file, json.dumps(value, indent=1) + "\n")


def replace_text(file, text):
    """Write a file such that a crash leaves either the old one or the new one, whole."""
    new = Path(f"{file}.new")
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
    def git(*args):
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "--verify", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if commit else None
    except OSError:                                                 # no git on this machine
        return None


def machine():
    import torch
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}
