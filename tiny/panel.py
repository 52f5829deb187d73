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
# edge -> the note, with the number of its curve's peak; where it stands; where it points to (None: the peak's).
NOTES = {"image->question": ("the question reads the image here:\n{:.0f} % of P(answer) are lost without",
                             (4, -60), None),
         "question->last": ("the last position reads the question here: {:.0f} %", (3.1, -88), None),
         "image->last": ("it need not read\nthe image itself:\n{:.1f} % at most", (6.6, -34), 8)}


def draw(csv, picture):
    """knockout.csv of TASK -> the annotated panel."""
    fig, drawn = plots.knockout_figure(csv)
    fig.set_size_inches(7.4, 4.2)
    ax = fig.axes[0]
    for edge, (note, place, at) in NOTES.items():
        layers, means, _ = drawn[TASK, edge]
        lost, peak = min(zip(means, layers, strict=True))
        layer = peak if at is None else at
        colour = next(line.get_color() for line in ax.lines if list(line.get_ydata()) == means)
        ax.annotate(note.format(abs(lost)), (layer, means[layers.index(layer)]), place, color=colour, fontsize=8.5,
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
