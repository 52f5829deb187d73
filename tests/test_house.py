"""python -m pytest tests/test_house.py

The rooms: which file imports which, how long they are, and how far it is from a command to the line that matters.
"""
import ast
import re
import sys
from pathlib import Path

import pytest

import fork
import knockout

ROOT = Path(__file__).resolve().parents[1]
FILES = {str(file.relative_to(ROOT)): file
         for part in ("*.py", "harness/*.py", "tiny/*.py") for file in ROOT.glob(part)}
OURS = {Path(name).stem for name in FILES if "/" not in name} | {"harness", "tiny"}

# What a file may import of ours when it is imported itself. The command lines of instruments import harness/ in `main`
# and `run`, so that their functions can be copied without it.
ROOMS = {"vicuna.py": set(), "llama3.py": set(), "clip_vit.py": set(), "views.py": set(), "fork.py": set(),
         "siglip_vit.py": set(), "qwen2.py": set(),
         "llava_min.py": {"vicuna", "llama3", "clip_vit", "views"},
         "llava_onevision.py": {"llava_min", "qwen2", "siglip_vit", "vicuna", "views"},
         "groups.py": {"views"}, "heads.py": set(), "score.py": {"fork"}, "knockout.py": {"fork"},
         "lens.py": {"fork", "knockout"}, "prune.py": {"fork", "knockout"}, "eval_gqa.py": {"llava_min"},
         "patch.py": {"fork", "knockout", "score"}, "maps.py": {"fork", "knockout", "score"},
         "harness/runs.py": set(), "harness/intervals.py": set(), "harness/errors.py": set(),
         "harness/canvas.py": set(), "harness/tables.py": set(),
         "harness/curves.py": {"harness.canvas", "harness.intervals", "harness.tables"},
         "harness/plots.py": {"harness.canvas", "harness.curves", "harness.errors", "harness.intervals",
                              "harness.tables"},
         "harness/photos.py": {"harness.canvas", "harness.curves"},
         "harness/facts.py": {"groups", "llava_min", "harness.questions", "harness.runs"},
         "harness/summary.py": {"harness.plots", "harness.runs", "harness.tables"},
         "offload.py": {"llava_min", "vicuna"},
         "harness/hub.py": {"llava_min", "llava_onevision", "vicuna", "offload", "harness.errors"},
         "harness/flags.py": {"groups", "harness.errors", "harness.hub", "harness.questions"},
         "harness/questions.py": {"llava_min", "groups", "views"},
         "harness/experiment.py": {"llava_min", "groups", "fork", "offload", "score", "views", "harness.hub",
                                   "harness.questions", "harness.runs"}}


def imports(name):
    """[(module of ours, is it inside a function?)] of a file."""
    tree, found = ast.parse(FILES[name].read_text(encoding="utf-8")), []
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{a.name}" for a in node.names] if node.module in ("harness", "tiny") else [
                node.module]
        found += [(m, id(node) in inside) for m in modules if m.partition(".")[0] in OURS]
    return found


@pytest.mark.parametrize("name", ROOMS)
def test_a_file_imports_only_what_its_room_allows(name):
    assert {module for module, inside in imports(name) if not inside} <= ROOMS[name]


def test_no_files_import_each_other_in_a_circle():
    graph = {name.removesuffix(".py").replace("/", "."): {m for m, _ in imports(name)} for name in FILES}
    finished = set()

    def visit(module, path):
        assert module not in path, [*path, module]
        if module not in finished:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            finished.add(module)
    for module in graph:
        visit(module, ())


def test_few_imports_of_ours_stand_inside_functions():
    lines = [(name, text) for name, file in FILES.items() for text in file.read_text(encoding="utf-8").splitlines()
             if re.match(rf"\s+(from|import) ({'|'.join(OURS)})\b", text)]
    assert len(lines) <= 15 and {name for name, _ in lines} == {"knockout.py", "lens.py", "prune.py", "eval_gqa.py",
                                                                "patch.py", "maps.py"}


def test_no_file_is_longer_than_500_lines_and_the_two_that_are_read_first_are_shorter():
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()}
    lengths |= {f"tests/{file.name}": len(file.read_text(encoding="utf-8").splitlines())
                for file in (ROOT / "tests").glob("*.py")}
    assert max(lengths.values()) <= 500, max(lengths, key=lengths.get)
    assert lengths["knockout.py"] <= 300 and lengths["llava_min.py"] <= 480


def in_bytes(call):
    """Is a call of `open` one for bytes, whichever mode its second argument comes to?"""
    modes = [node.value for node in ast.walk(call.args[1]) if isinstance(node, ast.Constant)] if call.args[1:] else []
    return bool(modes) and all(isinstance(mode, str) and "b" in mode for mode in modes)


def test_every_text_is_read_and_written_as_utf_8_whatever_the_machines_own_encoding_is():
    for name, file in FILES.items():
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            what, named = ast.unparse(call.func).rpartition(".")[2], {k.arg: k.value for k in call.keywords}
            text = what in ("read_text", "write_text", "fdopen", "TextIOWrapper") or ast.unparse(call.func) in (
                "open", "io.open") and not in_bytes(call)
            assert not text or "encoding" in named, f"{name}, line {call.lineno}: {ast.unparse(call)}"
            pipes = "encoding" not in named and any(isinstance(v := named.get(key), ast.Constant) and v.value is True
                                                    for key in ("text", "universal_newlines"))
            assert not pipes, f"{name}, line {call.lineno}: text from another process, in an encoding that is not named"


def line_of(name, text):
    return 1 + FILES[name].read_text(encoding="utf-8").splitlines().index(text)


def test_what_a_reader_came_for_stands_near_the_top():
    assert line_of("knockout.py", f"{' ' * 8}keep[target[:, None], source] = False".ljust(68) +
                   "# every query in target, every key in source") <= 60
    assert line_of("llava_min.py", "class LLaVA(nn.Module):") <= 200


def test_from_main_to_equation_7_it_is_five_calls_at_most(call, data, checkpoint, tmp_path):
    """Frames of this repository between knockout.main and knockout.cut, while a question is measured."""
    depths = []

    def watch(frame, event, arg):
        if event == "call" and frame.f_code is knockout.cut.__code__:
            stack, f = [], frame
            while f is not None and f.f_code is not knockout.main.__code__:
                ours = Path(f.f_code.co_filename).parent in (ROOT, ROOT / "harness")    # not a .venv inside ROOT
                if ours and f.f_code.co_name != "<listcomp>":
                    stack.append(f.f_code.co_name)
                f = f.f_back
            depths.append(stack)
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--limit", 1, "--edge", "image->question")
    for flags in ((), ("--plain",)):
        sys.setprofile(watch)
        try:
            code, _, err = call(knockout.main, *argv, *flags, "--out", tmp_path / f"out{len(flags)}")
        finally:
            sys.setprofile(None)
        assert code == 0, err
    assert depths and max(map(len, depths)) <= 5, max(depths, key=len)


def test_the_masks_have_one_home_outside_the_files_that_are_copied_alone():
    assert all(getattr(knockout, name) is getattr(fork, name) for name in ("to_mask", "additive", "causal"))
    for name, file in FILES.items():
        if name not in ("vicuna.py", "llama3.py", "qwen2.py", "fork.py"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"^def (causal|additive|to_mask)\b", text, re.MULTILINE), name
