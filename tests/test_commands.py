"""python -m pytest tests/test_commands.py

Every command that a page or the top of a file shows is run: on the bundled model and one question of each task, with
bundled files in place of yours.
"""
import ast
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "tiny" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = [file for part in ("*.py", "harness/*.py", "tiny/*.py") for file in sorted(ROOT.glob(part))]
VAL, PAIRS = ROOT / "tiny" / "val", ROOT / "tiny" / "pairs"

# What is not run here, and why.
ELSEWHERE = {"torchrun": "needs several processes: test_runs.py", "bench": "minutes to hours, on a quiet machine",
             "tiny.train": "hours: test_train.py", "tiny.world": "test_tiny.py", "tiny.pairs": "test_patch.py",
             "tiny.panel": "writes into docs: test_pictures.py", "pytest": "this is it",
             "harness.smollm2": "needs its weights: test_real.py",
             "clip_vit": "needs a tower: test_clip_vit.py", "siglip_vit": "needs a tower: test_onevision_own.py",
             "vicuna": "needs a decoder alone: test_decoders.py", "llama3": "the same", "qwen2": "the same",
             "llava_onevision": "needs its weights: test_onevision_own.py"}
# What a reader puts in place of ... -> what stands there now.
MINE = {"photo.jpg": VAL / "images" / "20000000.jpg", "a.jpg": PAIRS / "clean" / "20000000.png",
        "b.jpg": PAIRS / "other" / "20000000.png", "*.csv": PAIRS / "pairs_*.csv", "photos": PAIRS / "clean",
        "*_ChooseAttr.csv": PAIRS / "pairs_*Attr.csv", "GQA/images": VAL / "images", "images": VAL / "images",
        "val_balanced_questions.json": VAL / "val_balanced_questions.json", "FOLDER": ROOT / "tiny" / "llava-tiny",
        "$(python -m harness.hub llava-1.5-7b)": ROOT / "tiny" / "llava-tiny",
        "out/knockout/knockout.csv": "k/knockout.csv", "FILE.csv": "k/knockout.csv", "A/knockout.csv": "k/knockout.csv",
        "B/knockout.csv": "k2/knockout.csv", "Is the cup red or blue?": "Is the cross pink or brown?",
        "red,blue": "pink,brown"}


def commands():
    """{command: the page that shows it}."""
    shown = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = re.findall(r"^(?:\$ )?((?:python|torchrun) .+)$", text, re.MULTILINE)
        lines += [" ".join(command.split()) for command in re.findall(r"`((?:python|torchrun) [^`]+)`", text)]
        shown |= {re.split(r" +#", line)[0].strip(): page.name for line in lines}
    for file in FILES:
        for line in (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines():
            if found := re.search(r"((?:python|torchrun) .+)", line):
                shown.setdefault(re.split(r" {2,}", found[1])[0], file.name)
    return shown


def parts(command):
    """A command -> (its module, argv)."""
    words = shlex.split(re.sub(r"\$\(.*?\)", lambda found: shlex.quote(found[0]), command))
    if words[0] == "torchrun":
        return "torchrun", words
    return (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])


COMMANDS = {command: page for command, page in commands().items() if parts(command)[0] not in ELSEWHERE}
LIMITED = ("knockout", "lens", "prune", "patch", "explain", "figures", "eval_gqa", "tiny.score")


def test_the_commands_are_found():
    assert len(COMMANDS) > 45 and {"python knockout.py", "python figures.py all --limit 50", "python explain.py",
                                   "python check.py --model llava-1.5-7b --only prompt"} <= set(COMMANDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the run of knockout.py that later commands read, twice."""
    import knockout
    folder = tmp_path_factory.mktemp("commands")
    knockout.main(["--limit", "1", "--edge", "image->last", "question->last", "--out", str(folder / "k")])
    shutil.copytree(folder / "k", folder / "k2")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_a_page_shows_runs(call, monkeypatch, folder, tmp_path, command):
    name, words = parts(command)
    monkeypatch.chdir(folder)
    argv = [str(MINE.get(word, word)) for word in words]
    for flag, value in (("--model", "llava-tiny"), ("--limit", 1)):
        if flag in argv and argv[argv.index(flag) + 1] not in ("llava-tiny-anyres", str(MINE["FOLDER"])):
            argv[argv.index(flag) + 1] = value
    if name == "harness.hub":
        argv = ["llava-tiny"]
    if name == "llava_min" and "--question" not in argv:
        argv += ["--question", "Is it red?", "--image", MINE["photo.jpg"]]
    if "--data" in argv and "aokvqa" in command:
        pytest.skip("A-OKVQA's questions are not here: test_questions.py reads its format")
    if "--at" in argv and "objects" in argv and "--image" not in argv:
        argv += ["--image", MINE["photo.jpg"], "--question", "Is the cross large?", "--object", "cross"]
    if name == "prune" and "--last" in argv:
        argv[argv.index("--last") + 1:argv.index("--last") + 5] = [0, 2]
    if name in LIMITED and "--image" not in argv and "--limit" not in argv:
        argv += ["--limit", 1]
    own = {"--image", "--data", "--tasks", "--list", "table2", "--suggest"} & set(map(str, argv))
    if name in ("knockout", "lens", "prune", "figures", "check", "explain") and not own:
        argv += ["--tasks", "ChooseAttr"]                           # minutes less
    if name in (*LIMITED, "maps", "check") and name != "tiny.score" and "--list" not in argv:
        argv += ["--out", tmp_path / "out", *(["--all"] if name not in ("eval_gqa", "check") else [])]
    code, stdout, err = call(importlib.import_module(name).main, *argv)
    assert code == 0 and stdout, (argv, stdout, err)
