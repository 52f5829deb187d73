"""python -m pytest tests/test_tour.py

docs/tour.md shows the files' own lines, prints and draws what it says, and becomes a notebook that runs. To write what
has changed: python tests/tour.py --write.
"""
import json
import os
import subprocess
import sys
import time

import pytest
from PIL import Image
from tour import PAGE, ROOT, SETUP, difference, included, linked, notebook, run, with_lines, with_results

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_included_lines_are_those_of_the_files():
    assert with_lines(TEXT) == TEXT
    assert TEXT.count("<!-- from ") >= 10


def test_lines_are_found_by_name_and_by_how_they_begin():
    assert included("vicuna.py: attend, without its docstring") == (
        "def attend(q, k, v, mask):\n    return attention_weights(q, k, mask) @ v\n")
    two = included('vicuna.py: Block.forward, "x = x" to "return"; PAPER_END').splitlines()
    assert two[:3] == ["x = x + self.attend(q, k, v, mask)", "return x + self.mlp(x)", ""]
    assert two[3].startswith("PAPER_END = ") and len(two) == 4
    for wrong in ("vicuna.py: nothing", "vicuna.py: Block.nothing", 'vicuna.py: causal, "S" to "nothing"', "vicuna.py"):
        with pytest.raises(ValueError):
            included(wrong)


@pytest.mark.slow
def test_the_page_prints_and_draws_what_it_says(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    start = time.process_time()
    new = with_results(TEXT, tmp_path)
    assert not difference(TEXT, new)
    assert time.process_time() - start < 60
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == sorted(file.name for file in (PAGE.parent / "tour").iterdir()) and drawn
    for name in drawn:
        ours = PAGE.parent / "tour" / name
        assert f"(tour/{name})" in TEXT and ours.stat().st_size <= 60_000
        with Image.open(ours) as a, Image.open(tmp_path / name) as b:
            assert a.size == b.size and len(b.getcolors()) > 5


def test_texts_differ_by_words_and_by_numbers_but_not_by_rounding():
    assert not difference("P  0.9989, -0.0 %\n", "P 0.9971,  0.0 %\n")
    for a, b in (("12.0", "12.5"), ("3 layers", "4 layers"), ("a 1.0", "b 1.0"), ("1.0", "1.0 2.0"), ("-1.0", "1.0")):
        assert difference(a, b), (a, b)


@pytest.mark.slow
def test_the_notebook_is_valid_and_its_cells_run_in_order(monkeypatch, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: no notebook")
    file = tmp_path / "out" / "tour.ipynb"
    subprocess.run([sys.executable, ROOT / "tests" / "tour.py", "--notebook", file], check=True, capture_output=True)
    book = nbformat.read(file, as_version=4)
    nbformat.validate(book)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "tests")                               # a folder below the repository's, as out/ is
    names, shown = {}, []
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        printed, value = run(cell.source, names)
        assert not difference("".join(out.text for out in cell.outputs if out.output_type == "stream"), printed)
        shown += [value] if value is not None else []
        assert (value is not None) == any(out.output_type == "display_data" for out in cell.outputs)
    assert os.getcwd() == str(ROOT)                                 # the first cell went there
    assert len(shown) == 3 and all(value._repr_png_()[:4] == b"\x89PNG" for value in shown)     # what Jupyter shows


def test_the_notebook_keeps_the_files_lines_as_text_and_has_no_dead_links():
    pytest.importorskip("nbformat", reason="nbformat is not installed: no notebook")
    cells = notebook(TEXT).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert included("knockout.py: cut, without its docstring") in text and "](tour/" not in text and "](#" not in text
    assert "](manual.md" not in text and json.dumps(notebook(TEXT)) == json.dumps(notebook(TEXT))
    assert linked("[a](../b.md) [c](#c) [d](https://d)", "https://x/y") == (
        "[a](https://x/y/blob/HEAD/docs/../b.md) c [d](https://d)")


def test_without_the_repository_the_first_cell_fetches_it_or_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match="set REPOSITORY"):
        exec(SETUP.format(repository=""), {})
    calls = []

    def fetch(command, check):
        calls.append(command)
        if command[0] == "git":
            (tmp_path / "llava-flow").mkdir()
            (tmp_path / "llava-flow" / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    monkeypatch.setattr(subprocess, "run", fetch)
    exec(SETUP.format(repository="https://example.org/NAME/llava-flow"), {})
    assert [call[0] for call in calls] == ["git", sys.executable] and "tokenizers" in calls[1]
    assert os.getcwd() == str(tmp_path / "llava-flow") == sys.path[0]
