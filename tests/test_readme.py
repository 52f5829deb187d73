"""python -m pytest tests/test_readme.py

What README.md says of the files is so.
"""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_line_counts_in_the_table_are_within_a_tenth_and_no_file_is_left_out():
    told = {name: int(lines) for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE)}
    assert set(told) == {file.name for file in ROOT.glob("*.py")}
    for name, lines in told.items():
        assert abs(len((ROOT / name).read_text(encoding="utf-8").splitlines()) / lines - 1) < 0.1, name


def test_every_flag_and_group_the_readme_names_exists():
    code = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("*.py"))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--nproc-per-node"}:        # torchrun's
        assert f'"{flag}"' in code, flag
    import llava_min
    groups = README.split("**Token groups**")[1].split("- **Many")[0]
    for name in re.findall(r"`([a-z_]+)`", groups):
        assert name in llava_min.NAMES, name


def test_every_file_that_a_page_links_to_or_shows_is_there():
    for page in (ROOT / "README.md", ROOT / "tiny" / "README.md", ROOT / "docs" / "figures.md"):
        text = page.read_text(encoding="utf-8")
        heads = {re.sub(r"[^a-z0-9]+", "-", head.lower()) for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert links, page
        for link in links:
            if link.startswith("#"):
                assert link[1:] in heads, (page, link)
            elif not link.startswith("https://"):
                assert (page.parent / link).exists(), (page, link)


def test_the_gallery_shows_every_figure_that_the_bundled_models_can_draw():
    import figures
    text = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    told = {int(n) for n in re.findall(r"^### Figure (\d+)$", text, re.MULTILINE)} | {9, 10, 11}      # one section
    anyres = {24, 25, 26, 27}
    assert told == {*figures.of_one_model(), *anyres} - {*figures.OF_TEXT, *figures.OF_OTHER_DATA}
