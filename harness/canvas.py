"""
harness/canvas.py - what all pictures share: panels on one scale, titles that say what was measured, words, fonts.

Needs   matplotlib. Nothing else of this repo: copy it and it works.

No backend is chosen, and no global setting of matplotlib's is changed: a notebook keeps its own.
"""
import os
import textwrap
import unicodedata
from functools import cache
from pathlib import Path

# Okabe and Ito's colours, which colour-blind readers can tell apart. Curves may coincide: dashes let the one beneath
# show through.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (8, 4)), (0, (2, 3)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Letters that the first font lacks come from the next one that is installed.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Arial Unicode MS", "Microsoft YaHei",
         "Hiragino Sans", "PingFang SC", "WenQuanYi Micro Hei", "Noto Sans Arabic", "Noto Sans Devanagari",
         "Segoe UI Emoji", "Noto Emoji")
WORDS = {"answer_lower": "answer, lower case", "answer_capitalized": "Answer, capitalised",
         "false_lower": "false option, lower case", "false_capitalized": "False option, capitalised",
         "no attention": "without attention", "no mlp": "without the MLP"}


def in_words(name):
    """An edge, a group or a kind of word from a CSV -> as a legend has it."""
    return WORDS.get(name, name.replace("->", " \u2192 ").replace("_wo_", " without ").replace("_", " "))


def page(width, height):
    """An empty figure, in inches. Not pyplot's: that would open windows, and choose a backend for a whole notebook."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


MOST = 60                                          # panels in a picture


def figure(panels, title, x_label, y_label):
    """An empty figure of so many panels -> (figure, list of axes). ValueError: there are more than MOST."""
    if panels > MOST:
        raise ValueError(f"{title}: {panels} panels are too many for a picture")
    columns = 4 if panels in (7, 8) else min(panels, 3)
    rows = -(-panels // columns)
    width = 5.0 if panels == 1 else 3.6
    fig = page(width * columns + 0.4, 2.9 * rows + 1.0)
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=8)
    for ax in axes[panels:]:
        ax.set_visible(False)
    for i in range(panels):
        if i + columns >= panels:                                   # the lowest panel of its column
            axes[i].set_xlabel(x_label, fontsize=9)
        if i % columns == 0:
            axes[i].set_ylabel(y_label, fontsize=9)
    set_title(fig, title)
    return fig, axes[:panels]


def set_title(fig, *lines):
    """The figure's heading: lines of text, each wrapped at the figure's width, and cut off where it fills three."""
    fig.suptitle("\n".join(fitted(line, fig.get_figwidth()) for line in lines if line), fontsize=9)


def fitted(text, inches, most=3):
    """Text of 9 points in at most so many lines of this width; the rest becomes "..."."""
    wide = sum(1 + (unicodedata.east_asian_width(c) in "WF" or ord(c) not in letters()) for c in text)
    room = max(12, int(13 * inches * len(text) / max(1, wide)))     # letters in a line; those of some scripts are wide
    return "\n".join(textwrap.wrap(text, room, max_lines=most, placeholder=" ..."))


def one_scale(axes):
    """Give panels of one quantity the same y axis, so that their heights can be compared."""
    ends = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


@cache
def fonts():
    """Those of FONTS that are installed."""
    from matplotlib import font_manager
    there = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in FONTS if name in there]


@cache
def letters():
    """The letters that can be drawn."""
    from matplotlib import font_manager, ft2font
    return {c for name in fonts() for c in ft2font.FT2Font(font_manager.findfont(name)).get_charmap()}


def drawable(text):
    """Text with a box in place of each letter that no font has, so that none is left out silently."""
    return "".join(c if c == "\n" else " " if c.isspace() else c if c.isprintable() and ord(c) in letters() else
                   "\u25a1" for c in text)


def finish(fig):
    """The last step of every picture, whose texts may be anyone's: set fallback fonts, and turn mathtext off, so that $
    is printed as $. -> fig"""
    from matplotlib.text import Text
    for text in fig.findobj(Text):
        text.set_parse_math(False)
        text.set_fontfamily(fonts())
        text.set_text(drawable(text.get_text()))
    return fig


def save(fig, file):
    """Finish a picture and write it, whole or not at all; the same picture is the same file. OSError names it."""
    from matplotlib import rc_context
    file = Path(file)
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{file}: a picture's name ends in .png, .svg or .pdf")
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".new.{os.getpid()}.{file.name}")         # the ending says which format it has
    try:
        with rc_context({"svg.hashsalt": "llava-flow"}):
            finish(fig).savefig(new, dpi=150, metadata=undated)
        os.replace(new, file)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(file)) from e
    finally:
        new.unlink(missing_ok=True)
