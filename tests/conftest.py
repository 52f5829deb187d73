"""What every test file shares: the import path, one thread, and world.py's tiny checkpoints, written once a run."""
import datetime
import functools
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
torch.set_num_threads(1)                           # with tiny tensors more threads only wait for each other,
os.environ.setdefault("OMP_NUM_THREADS", "1")      # here and in the processes that tests start


def pytest_addoption(parser):
    parser.addoption("--reliability", metavar="FILE", help="with -m chaos: write the table of promises into this file")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """After -m chaos: what was promised, how it was tested, how often."""
    from chaos import PROMISES
    if not PROMISES:
        return
    failed = bool(terminalreporter.stats.get("failed"))
    lines = ["| promise | how it is tested | cases |", "|---|---|---|",
             *(f"| {text} | {how} | {n} |" for text, (how, n) in PROMISES.items())]
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__.split('+')[0]}"
    lines += ["", f"`python -m pytest tests -m chaos --reliability docs/reliability.md`, {datetime.date.today()}, "
              f"{machine}: {sum(n for _, n in PROMISES.values())} cases, {'NOT ALL HELD' if failed else 'all held'}."]
    terminalreporter.write_line("\n".join(lines))
    if file := config.getoption("--reliability"):
        before, mark, rest = Path(file).read_text(encoding="utf-8").partition("<!-- table -->\n")
        after = rest.partition("<!-- end -->\n")[2]
        Path(file).write_text(f"{before}{mark}" + "\n".join(lines) + f"\n<!-- end -->\n{after}", encoding="utf-8")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(kind, layout="original", pack="one") -> its folder, written on first use. Shared: read only."""
    import world
    import world_onevision

    @functools.cache
    def folder(kind, layout="original", pack="one"):
        write = world_onevision.write if kind in world_onevision.KINDS else world.write
        return write(tmp_path_factory.mktemp(f"{kind}-{layout}-{pack}"), kind, layout, pack)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint):
    """model(kind) -> a float32 LLaVA on the CPU, loaded on first use. Shared: a test puts back what it changes."""
    import llava_min
    import llava_onevision

    @functools.cache
    def loaded(kind):
        return (llava_onevision if "onevision" in kind else llava_min).load(checkpoint(kind))
    return loaded


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *argv) -> (exit code, stdout, stderr), of a script's main in this process."""
    monkeypatch.delenv("LLAVA_FLOW_TRACEBACK", raising=False)
    from harness.errors import one_line_errors

    def run(main, *argv):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, argv)])
        capsys.readouterr()
        try:
            with one_line_errors():                                 # files that can be copied alone do it at their end
                main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def data(tmp_path):
    """A question file in the paper's columns, with its pictures -> its flags."""
    import world
    from commands import HEADER, ROWS
    world.picture(90, 60).save(tmp_path / "a.jpg")
    world.picture(60, 90).save(tmp_path / "b.jpg")
    (tmp_path / "x_ChooseAttr.csv").write_text("\n".join([HEADER, *ROWS]) + "\n")
    return "--data", tmp_path / "x_ChooseAttr.csv", "--images", tmp_path


@pytest.fixture
def photo(tmp_path):
    import world
    world.picture(90, 60).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"
