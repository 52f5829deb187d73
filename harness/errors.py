"""
harness/errors.py - one-line errors, safe printing, patterns of file names; nothing else of this repo is needed.

Use     with one_line_errors():                what a user can cause ends in one line and exit code 2
            run(parse())
        files_of("--data", ["*_Choose*.csv"])  patterns that the shell left as they are
"""
import glob
import os
import signal
import sys
from contextlib import contextmanager


@contextmanager
def one_line_errors():
    """Errors that a user can cause print one line on stderr and exit with code 2 (Ctrl-C: 130).

    A reader of the output that stops early, as `| head` does, ends the process with code 141, like other programs; with
    code 0 if the work was done. LLAVA_FLOW_TRACEBACK=1 in the environment shows where an error came from instead.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:           # a script sets it while it imports torch
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Printable(before[0]), Printable(before[1], needed=False)
    done = False
    try:
        yield
        done = True
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes a run that keeps a run.json in --out", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stdout.discard()
        if not done:
            sys.exit(141)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as e:
        full = isinstance(e, MemoryError) or "out of memory" in str(e) or "can't allocate memory" in str(e)
        if type(e) is RuntimeError and not full or os.environ.get("LLAVA_FLOW_TRACEBACK"):
            raise
        if isinstance(e, OSError) and e.strerror:
            text = f"{e.filename or 'the output'}: {e.strerror}"
            if not e.filename:                                      # a full disk behind `> file`
                sys.stdout.discard()
        elif full:
            text = f"out of memory ({e}); try --offload disk, --dtype bfloat16, a smaller model, or --device cpu"
        else:
            text = str(e)
        text = " ".join(text.split())
        print("error: " + (text if len(text) < 700 else f"{text[:500]} ... {text[-150:]}"), file=sys.stderr)
        sys.exit(2)
    finally:
        sys.stdout, sys.stderr = before


def files_of(flag, given):
    """What a flag that takes several files was given -> list of files. A pattern that the shell did not expand (quoted,
    or on Windows) becomes the sorted names that it matches, unless a file has that very name. ValueError: none does."""
    files = []
    for text in map(os.path.expanduser, given):
        literal = glob.escape(text) == text or os.path.lexists(text)
        if not (names := [text] if literal else sorted(glob.glob(text))):
            raise ValueError(f"{flag} {text}: no file matches this pattern; check its folder, or name the files")
        files += names
    return files


class Printable:
    """stdout or stderr for text from anywhere: control characters, which could steer a terminal, come out as \\x1b.

    A letter that the terminal lacks comes out as "?". A stream that was closed before the program began prints nothing.
    needed: without it, a full disk or a closed pipe behind the stream ends the printing, not the work.
    """

    CONTROL = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\r\t"}

    def __init__(self, stream, needed=True):
        self.needed = needed
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")                        # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text):
        try:
            return self.stream.write(text.translate(self.CONTROL))
        except OSError:
            if self.needed:
                raise
            self.discard()

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            if self.needed:
                raise
            self.discard()

    def discard(self):
        """Print nothing from here on: the file behind the stream takes nothing anymore."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)
