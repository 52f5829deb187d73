"""
tiny/panel.py - the panel in the README: figures 3 and 4 for one task, with notes on how to read them.

Run     python -m tiny.panel                     measures in out/panel, and draws docs/panel.svg
Needs   the whole of this repository
"""
from pathlib import Path

import knockout
from harness import canvas, flags, plots
from harness.errors import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
TASK = "ChooseRel"
# edge -> the note at its curve, where it stands, and the first layer that it is about.
NOTES = {"image->question": ("the question reads the image here:\n{:.0f} % of P(answer) are lost without", (4, -60), 0),
         "question->last": ("the last position reads the question here: {:.0f} %", (3.1, -88), 0),
         "image->last": ("it need not read\nthe image itself:\n{:.1f} % at most", (6.6, -34), 7)}


def draw(csv, picture):
    """knockout.csv of TASK -> the annotated panel. Where a note points, and its number, are the peak of the curve."""
    fig, drawn = plots.knockout_figure(csv)
    fig.set_size_inches(7.4, 4.2)
    ax = fig.axes[0]
    for edge, (note, place, first) in NOTES.items():
        layers, means, _ = drawn[TASK, edge]
        change, layer = min((mean, layer) for mean, layer in zip(means, layers, strict=True) if layer >= first)
        colour = next(line.get_color() for line in ax.lines if list(line.get_ydata()) == means)
        ax.annotate(note.format(abs(change)), (layer, change), place, color=colour, fontsize=8.5,
                    arrowprops={"arrowstyle": "->", "color": colour, "shrinkB": 4})
    canvas.save(fig, picture)


def main():
    flags.Parser(__doc__).parse_args()
    out = ROOT / "out" / "panel"
    knockout.main(["--edge", *NOTES, "--tasks", TASK, "--out", str(out)])
    draw(out / "knockout.csv", ROOT / "docs" / "panel.svg")
    print(f"wrote {ROOT / 'docs' / 'panel.svg'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
