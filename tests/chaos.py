"""What the hostile tests share: a command in a process of its own that is watched, and seeded damage to its files.

The process is forked from this one, where torch is imported already, so that a case takes a fraction of a second.
"""
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

SECONDS, GIGABYTES = 20, 3                         # no command with hostile input may take more
PROMISES = {}                                      # promise -> [how it is tested, cases]; see conftest.py


@dataclass
class Outcome:
    code: int                                      # -signal where a signal ended it
    out: str
    err: str
    seconds: float
    gigabytes: float
    opened: list                                   # files that Python opened for reading


def run(main, argv, cwd, kill_after=None):
    """main() of a script in a forked process -> Outcome. kill_after: SIGKILL it after so many seconds."""
    cwd, started = Path(cwd), time.monotonic()
    files = [cwd / f".{name}" for name in ("out", "err", "opened")]
    child = os.fork()
    if not child:
        run_child(main, argv, cwd, files)
    status = 0
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        passed = time.monotonic() - started
        if pid:
            break
        if passed > (SECONDS if kill_after is None else kill_after):
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.002)
    out, err, opened = (file.read_text(errors="replace") if file.exists() else "" for file in files)
    return Outcome(os.waitstatus_to_exitcode(status), out, err, passed, usage.ru_maxrss / 2 ** 20, opened.splitlines())


def run_child(main, argv, cwd, files):
    """In the forked process: never returns."""
    code = 1
    try:
        os.chdir(cwd)
        for fd, file in ((1, files[0]), (2, files[1])):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w"), open(2, "w")       # noqa: SIM115
        os.environ.pop("LLAVA_FLOW_TRACEBACK", None)
        opened = open(files[2], "w", buffering=1)                                              # noqa: SIM115
        busy = []

        def watch(event, args):
            if event == "open" and not busy and isinstance(args[0], str | bytes) and "w" not in str(args[1]):
                busy.append(1)
                opened.write(os.path.realpath(os.fsdecode(args[0])).encode(errors="replace").decode() + "\n")
                busy.clear()
        sys.addaudithook(watch)
        sys.argv = [f"{main.__module__}.py", *map(str, argv)]
        from harness.errors import one_line_errors
        with one_line_errors():                                     # files that can be copied alone do it at their end
            main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 120
        os._exit(code)


def survived(outcome, case, outside=()):
    """AssertionError names the case: a traceback, no message, too long, too large, or a file that it must not read."""
    name, o = str(case)[:600], outcome
    assert "Traceback" not in o.err and o.code in (0, 2), (name, o.code, o.err[-3000:])
    errors = re.findall(r"(?:^|[\r\n])error: [^\r\n]*", o.err)
    assert len(errors) == (o.code == 2), (name, o.code, o.err[-3000:])
    assert all(len(line) < 1500 for line in errors), (name, errors)
    assert o.seconds < SECONDS and o.gigabytes < GIGABYTES, (name, o.seconds, o.gigabytes)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", o.out + o.err), (name, o.out + o.err)
    for folder in outside:
        assert not [file for file in o.opened if file.startswith(os.path.realpath(folder))], name


def promise(text, how, cases):
    """Count cases for the table of docs/reliability.md."""
    PROMISES.setdefault(text, [how, 0])[1] += cases


# ---------------------------------------------------------------------------------------------------- damage

ODD = (None, True, False, -1, 0, 1, 1.5, 7, 10 ** 6, 10 ** 30, 1e308, float("inf"), float("nan"), "", "x", "\ud800",
       "\x1b[31m", "../../outside/secret", "/etc/passwd", "</s>", "<image>", [], {}, [[]], [None], {"a": 1}, [1, 2],
       "x" * 200_000)


def places(value, path=()):
    """Every place in a JSON value, as tuples of keys."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


def spoil(value, r, times=1):
    """A copy of a JSON value in which something was replaced, deleted or doubled; and what was done."""
    value, did = json.loads(json.dumps(value)), []
    for _ in range(times):
        path = r.choice([p for p in places(value) if p])
        inside = value
        for key in path[:-1]:
            inside = inside[key]
        how = r.choice(("replace", "replace", "replace", "delete"))
        new = r.choice(ODD)
        if how == "delete":
            del inside[path[-1]]
        else:
            inside[path[-1]] = new
        did.append((how, path, str(new)[:30]))
    return value, did


def spoil_bytes(data, r):
    """Bytes that were cut, overwritten, doubled or mixed up; and what was done."""
    how, at = r.choice(("cut", "flip", "flip", "zero", "insert", "double", "empty")), r.randrange(len(data) + 1)
    if how == "flip":
        spoilt = bytearray(data)
        for _ in range(r.randint(1, 8)):
            spoilt[r.randrange(len(data))] = r.randrange(256)
        return bytes(spoilt), how
    return {"cut": data[:at], "zero": data[:at] + bytes(min(64, len(data) - at)) + data[at + 64:],
            "insert": data[:at] + r.choice((b"\0", b'"', b"\n", b",", b"\xff\xfe", b"[" * 10_000)) + data[at:],
            "double": data[at:] + data, "empty": b""}[how], f"{how} at {at}"


def cases(seed, n):
    """n generators of random numbers, each of its own seed. CHAOS_SEED=2 in the environment gives other cases."""
    return [random.Random(f"{seed}/{i}/{os.environ.get('CHAOS_SEED', '')}") for i in range(n)]
