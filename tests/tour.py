"""
tests/tour.py - docs/tour.md: the lines it includes, the blocks it runs, and its notebook.

Run     python tests/tour.py --write                     include the lines again, run the blocks, draw the pictures
        python tests/tour.py --notebook out/tour.ipynb   the page as a notebook, for Jupyter and Colab
Needs   the whole repository; nbformat for the notebook

A comment before a block says which definitions of ours it holds: functions, methods, classes or constants.

    <!-- from knockout.py: cut -->
    <!-- from vicuna.py: causal, without its docstring; attend -->     several, a blank line between them
    <!-- from vicuna.py: Block.forward, "x = x" to "return" -->        the lines from the first that begins with the one
                                                                       text to the next that begins with the other

Every other python block is run, all in one namespace. A block without a language after it is what it prints; a picture
after that is what its last line gives, which a notebook shows.
"""
import argparse
import ast
import base64
import contextlib
import io
import os
import re
import sys
import textwrap
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tour.md"
REPOSITORY = ""                                    # where the notebook fetches the code: https://github.com/NAME/llava-flow

BLOCK = re.compile(r"(?:<!-- from (?P<source>.+?) -->\n)?```python\n(?P<code>.*?)```\n"
                   r"(?:\n```\n(?P<printed>.*?)```\n)?"
                   r"(?P<shown>\n!\[[^\]]*\]\((?P<picture>[\w/]+\.png)\)\n)?", re.DOTALL)
PART = re.compile(r'(?P<name>[\w.]+)(?:, (?P<bare>without its docstring)|, "(?P<first>.+)" to "(?P<last>.+)")?')


# ---------------------------------------------------------------------------------------------------- included lines

def included(source):
    """What a comment names, "FILE: PART; PART", -> those lines. ValueError: there are none."""
    file, _, parts = source.partition(": ")
    return "\n".join(lines_of(file, part) for part in parts.split("; "))


def lines_of(file, part):
    """One definition, or some of its lines, without their common indent."""
    m = PART.fullmatch(part)
    if not m:
        raise ValueError(f"cannot read {part!r} of <!-- from {file} ... -->")
    text = (ROOT / file).read_text(encoding="utf-8")
    node, lines = ast.parse(text), text.splitlines()
    for name in m["name"].split("."):
        inside = [n for n in node.body if name == getattr(n, "name", None) or (
            isinstance(n, ast.Assign) and name in [getattr(t, "id", None) for t in n.targets])]
        if not inside:
            raise ValueError(f"{file} has no {m['name']}")
        node = inside[0]
    chosen = lines[node.lineno - 1:node.end_lineno]
    if m["bare"]:
        doc = node.body[0]
        chosen = lines[node.lineno - 1:doc.lineno - 1] + lines[doc.end_lineno:node.end_lineno]
    if m["first"]:
        starts, ends = ([i for i, line in enumerate(chosen) if line.strip().startswith(m[end])]
                        for end in ("first", "last"))
        ends = [i for i in ends if starts and i >= starts[0]]
        if not ends:
            raise ValueError(f"{file}, {m['name']}: no line {m['first']!r} with a line {m['last']!r} after it")
        chosen = chosen[starts[0]:ends[0] + 1]
    return textwrap.dedent("\n".join(chosen)) + "\n"


def with_lines(page):
    """The page with every included block as its file has it now."""
    return BLOCK.sub(lambda m: m[0] if not m["source"] else
                     f"<!-- from {m['source']} -->\n```python\n{included(m['source'])}```\n", page)


# ---------------------------------------------------------------------------------------------------- runs

def run(code, names):
    """Run a block in the namespace `names` -> (what it prints, the value of its last line or None)."""
    tree, out = ast.parse(code), io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(out):
        exec(compile(tree, "tour.md", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "tour.md", "eval"), names) if last else None
    return out.getvalue(), value


def with_results(page, folder):
    """The page with what its blocks print now. Their pictures are drawn into `folder`."""
    names = {}

    def renew(m):
        if m["source"]:
            return m[0]
        printed, value = run(m["code"], names)
        if (value is not None) != bool(m["picture"]):
            raise ValueError(f"a block gives {value!r} and the page shows {m['picture']}:\n{m['code']}")
        if m["picture"]:
            picture = Image.open(io.BytesIO(value._repr_png_())).convert("RGB")
            few = picture.quantize(256, dither=Image.Dither.NONE)   # a palette: a third of the bytes
            few.save(Path(folder) / Path(m["picture"]).name, optimize=True)
        printed = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
        return f"```python\n{m['code']}```\n" + (f"\n```\n{printed}```\n" if printed else "") + (m["shown"] or "")
    return BLOCK.sub(renew, page)


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def difference(a, b):
    """The first difference of two texts, "" if there is none. Numbers with a point may differ by 2 %, by 0.02 or
    by their last digit: another machine rounds differently. How many spaces there are does not matter."""
    a, b = (re.sub(" ?\n", "\n", re.sub("[ \t]+", " ", text)) for text in (a, b))
    for x, y in zip(NUMBER.split(a), NUMBER.split(b), strict=False):
        if x != y:
            return f"{x!r} is now {y!r}"
    for x, y in zip(NUMBER.findall(a), NUMBER.findall(b), strict=True):
        _, point, digits = x.partition(".")
        room = max(0.02, 0.02 * abs(float(x)), 1.01 * 10 ** -len(digits)) if point else 0
        if abs(float(x) - float(y)) > room:
            return f"{x} is now {y}"
    return ""


# ---------------------------------------------------------------------------------------------------- notebook

SETUP = '''# Finds the code in a folder above this notebook; where there is none, as in Colab, fetches it.
import os
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = "{repository}"  # "https://github.com/NAME/llava-flow": the repository that this notebook belongs to

here = next((folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "knockout.py").exists()), None)
if here is None:
    if not REPOSITORY:
        raise ValueError("there is no llava-flow in a folder above this notebook: set REPOSITORY to its address, "
                         "or put the notebook into its folder")
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "llava-flow"], check=True)
    here = Path("llava-flow").resolve()
    needed = tomllib.loads((here / "pyproject.toml").read_text())["project"]["dependencies"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *needed], check=True)  # only what is missing
os.chdir(here)
sys.path.insert(0, str(here))'''


def linked(text, repository):
    """Links to the repository's files -> addresses; where none is known, their names. Those within the page -> text."""
    text = re.sub(r"\[([^\]]+)\]\(#[^)]+\)", r"\1", text)
    return re.sub(r"\[([^\]]+)\]\((?!https:)([^)]+)\)",
                  rf"[\1]({repository}/blob/HEAD/docs/\2)" if repository else r"\1 (docs/\2)", text)


def notebook(page, repository=REPOSITORY):
    """The page -> a notebook: a cell for each block that is run, with what it prints and shows; the rest is text."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
    cells, at = [new_code_cell(SETUP.format(repository=repository))], 0
    for m in [m for m in BLOCK.finditer(page) if not m["source"]]:
        outputs = [new_output("stream", name="stdout", text=m["printed"])] if m["printed"] else []
        if m["picture"]:
            data = base64.b64encode((PAGE.parent / m["picture"]).read_bytes()).decode()
            outputs.append(new_output("display_data", {"image/png": data}))
        cells += [new_markdown_cell(linked(page[at:m.start()].strip(), repository)),
                  new_code_cell(m["code"].rstrip(), outputs=outputs)]
        at = m.end()
    cells.append(new_markdown_cell(linked(page[at:].strip(), repository)))
    for i, cell in enumerate(cells):                                # nbformat's own ids are random
        cell.id = f"cell-{i}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=[cell for cell in cells if cell.source], metadata=kernel)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="refresh docs/tour.md and docs/tour/*.png")
    parser.add_argument("--notebook", type=Path, metavar="FILE", help="write the notebook")
    args = parser.parse_args()
    if args.write:
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        (ROOT / "docs" / "tour").mkdir(exist_ok=True)
        page = with_results(with_lines(PAGE.read_text(encoding="utf-8")), ROOT / "docs" / "tour")
        PAGE.write_text(page, encoding="utf-8")
    if args.notebook:
        import nbformat
        args.notebook.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook(PAGE.read_text(encoding="utf-8")), args.notebook)
        print(f"wrote {args.notebook}")
    if not (args.write or args.notebook):
        parser.print_help()


if __name__ == "__main__":
    main()
