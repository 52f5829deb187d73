"""python -m pytest tests/test_readme.py

What README.md and docs/ say of the code is so.
"""
import re
import sys
from pathlib import Path

import pytest

import figures
import groups
from harness import hub

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "tiny" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, MANUAL = (page.read_text(encoding="utf-8") for page in (PAGES[0], ROOT / "docs" / "manual.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_the_line_counts_in_the_table_are_within_a_tenth_and_no_file_is_left_out():
    counts = {name: int(lines) for name, lines in re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.MULTILINE)}
    files = {str(file.relative_to(ROOT)) for part in ("*.py", "harness/*.py") for file in ROOT.glob(part)}
    assert set(counts) == files - {"harness/__init__.py"}
    for name, lines in counts.items():
        assert abs(len((ROOT / name).read_text(encoding="utf-8").splitlines()) / lines - 1) < 0.1, name


@every_page
def test_every_flag_that_a_page_names_exists(page):
    code = "".join(file.read_text(encoding="utf-8") for part in ("*.py", "harness/*.py", "tiny/*.py")
                   for file in ROOT.glob(part))
    text = page.read_text(encoding="utf-8")
    others = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port",
              "--help", "--reliability"}        # torchrun's, argparse's, the tests'
    for flag in set(re.findall(r"(?<![\w|-])--[a-z][a-z-]+", text)) - others:
        assert f'"{flag}"' in code, flag


@every_page
def test_every_script_that_a_page_runs_exists(page):
    for script in re.findall(r"python ([a-z]\w+\.py)", page.read_text(encoding="utf-8")):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m ((?:harness|tiny)\.\w+)", page.read_text(encoding="utf-8")):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_manual_lists_every_model_and_every_token_group():
    table = MANUAL.split("## Token groups")[1].split("##")[0]
    first = "".join(re.findall(r"^\| (.+?) \|", table, re.MULTILINE))
    assert set(re.findall(r"`([a-z_]+)`", first)) == set(groups.NAMES)
    assert {*hub.MODELS, *hub.BUNDLED} <= set(re.findall(r"`([\w.-]+)`", MANUAL.split("## Questions")[0]))


@every_page
def test_every_file_that_a_page_links_to_or_shows_is_there(page):
    text = page.read_text(encoding="utf-8")
    heads = {re.sub(r"[^a-z0-9]+", "-", head.lower()) for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in heads, (page, link)
        elif not link.startswith("https://"):
            assert (page.parent / link).exists(), (page, link)


def test_the_gallery_shows_every_figure_that_the_bundled_models_can_draw():
    text = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    shown = {int(n) for n in re.findall(r"^### Figure (\d+)$", text, re.MULTILINE)} | {9, 10, 11}     # one section
    anyres = {24, 25, 26, 27}
    assert shown == {*figures.of_one_model(), *anyres} - {*figures.OF_TEXT, *figures.OF_OTHER_DATA}


def test_the_readmes_python_runs_on_the_bundled_model(monkeypatch, capsys):
    """With the bundled model and one of its pictures in place of the published model and photo.jpg."""
    code = README.split("```python\n")[1].split("```")[0]
    photo = ROOT / "tiny" / "val" / "images" / "20000000.jpg"
    code = code.replace("llava-1.5-7b", "llava-tiny").replace('"photo.jpg"', repr(str(photo)))
    exec(compile(code, "README.md", "exec"), {})
    swept, plain = capsys.readouterr().out.splitlines()
    assert eval(swept)[0] == pytest.approx(eval(plain), rel=1e-5) and len(eval(swept)) == 2
    assert "transformers" not in sys.modules
