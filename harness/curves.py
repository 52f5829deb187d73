"""
harness/curves.py - mean curves over layers, with intervals, out of the CSVs of runs: most pictures are of this kind.

Needs   matplotlib and numpy; canvas.py, tables.py and intervals.py beside it.
Paper   https://arxiv.org/abs/2411.18620, the layout of figures 3-5

A picture is drawn from a CSV that a run wrote, never from numbers in memory: it shows what is on disk. The CSV is read
row by row, in memory that does not grow with the number of questions. Each picture says what it was measured with.
"""
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np

from harness.canvas import COLOURS, MARKERS, MOST, STYLES, figure, finish, fitted, in_words, one_scale, set_title
from harness.intervals import FEW, Mean
from harness.tables import distinct, number, rows

NO_PAIR = "--measure margin: no question has a second option; pass --options A,B and --answer A, or measure answer"


# ---------------------------------------------------------------------------------------------------- what was measured

def heading(row):
    """A row -> its question, the answer and its probability."""
    asked = f"{row.get('question', '')} {row.get('prediction', '')}".strip()
    p = row.get("p_base", "")
    return f"{asked}  (P of its {row.get('subword') or 'first'} token: {float(p):.3g})" if p != "" else asked


def measured_with(*files, but=()):
    """CSVs -> (of your own question its `heading`; model, dtype, window, heads and subword as text). Of these, what is
    not the same in the first rows of all is left out, and so is what `but` names."""
    first = [next(iter(rows(file, ()))) for file in files]
    headings = {heading(row) if row.get("task") == "own question" else "" for row in first}
    same = {key: first[0][key] for key in ("model", "dtype", "window", "heads", "subword")
            if key not in but and first[0].get(key) and len({row.get(key) for row in first}) == 1}
    how = {"window": "window {}", "heads": "heads {}", "subword": "the answer's {} token"}
    facts = [how.get(key, "{}").format(value) for key, value in same.items()]
    return headings.pop() if len(headings) == 1 else "", ", ".join(facts).replace("heads all", "all heads")


def difference(file, row, value, less=None):
    """A cell, or what it exceeds the one of the column `less` by; None, if that pair of cells is empty."""
    if less and row[value] == "":
        return None
    return number(file, row, value) - (number(file, row, less) if less else 0)


# ---------------------------------------------------------------------------------------------------- reading

class Series(NamedTuple):
    """What a curve is of: the run, if there are several; the edge, group or kind of word; the random control of it."""
    run: str
    name: str
    control: str = ""


@dataclass
class Panel:
    """What is drawn in a panel."""
    curves: dict = field(default_factory=lambda: defaultdict(Mean))            # Series -> Mean
    sure: dict = field(default_factory=dict)       # (run, question) -> is the answer saturated?


SATURATED = 0.99                                   # a probability from which a cut can hardly change it any more


def gather(sources, series, value, less, scale, panel):
    """CSVs of runs -> ({(panel, edge if it needs a panel of its own): Panel}, {Series: its layers}).

    sources: {label of the run: file, or list of rows}. series, value, less, scale, panel: as for `curves`.
    """
    needed = tuple(dict.fromkeys(("question_id", "task", "layer", series, value, panel, *([less] if less else []))))
    names = {name for file in sources.values() for name in distinct(file, series)}
    n = len({place for file in sources.values() for place in distinct(file, panel)})
    apart = any(", random " in name for name in names) and (        # grey bands need a panel for each edge
        n * sum(", random " not in name for name in names) <= MOST)
    panels, layers, shared = defaultdict(Panel), {}, []
    for run, file in sources.items():
        for (place, name, *question), mine in groupby(rows(file, needed), lambda row: (
                row[panel], row[series], row["task"], row["question_id"], row.get("window"))):
            mine = list(mine)
            points = {number(file, row, "layer", whole=True, least=0): scale * change for row in mine
                      if (change := difference(file, row, value, less)) is not None}
            if not points:
                continue
            name, _, control = name.partition(", random ")
            which, where = Series(run if len(sources) > 1 else "", name, control), (place, name if apart else "")
            if max(points) > 10_000:
                raise ValueError(f"{file}: layer {max(points)} is not one of a model")
            # Controls are measured at a few layers, all other curves at the same ones.
            shared = shared or ([] if control else list(points))
            if list(points) != layers.setdefault(which, list(points)) or not control and list(points) != shared:
                raise ValueError(f"{file} does not have the same layers for every question and {series}")
            panels[where].curves[which].add(list(points.values()), interval=not control)
            panels[where].sure[run, *question] = (
                bool(mine[0].get("p_base")) and number(file, mine[0], "p_base") > SATURATED)
    if not panels:
        raise ValueError(NO_PAIR if less else "there are no rows to draw")
    return panels, layers


# ---------------------------------------------------------------------------------------------------- drawing

def curves(sources, series, value, scale, title, x_label, y_label, level=None, limits=None, at_least=None, panel="task",
           less=None):
    """CSVs of runs -> a panel per value of the column `panel`, a curve over layers per value of `series`: means with
    95 % intervals (see Mean); below FEW questions, each one's own curve instead of the interval.

    sources: {label: file, or list of rows}; where there are several, each has a line style of its own. less: a column
    that is subtracted from `value`; rows in which they are empty are left out. level: where a line marks "no change".
    limits: of the y axis, where the values have limits. at_least: a range that the y axis shows in any case, so that
    differences by rounding do not fill the panel. Series named "NAME, random ..." are controls of NAME: their mean and
    range are drawn in grey. series "window": coloured by a scale.
    -> (figure, {(panel, series): (layers, means, number of questions)})
    """
    panels, layers = gather(sources, series, value, less, scale, panel)
    main = list(dict.fromkeys(s for panel in panels.values() for s in panel.curves if not s.control))
    names, runs = (list(dict.fromkeys(getattr(s, part) for s in main)) for part in ("name", "run"))
    fig, axes = figure(len(panels), title, x_label, y_label)
    drawn, lines = {}, {}
    for ax, (place, shown) in zip(axes, panels.items(), strict=True):
        for s in (s for s in main if s in shown.curves):
            look = looks(names.index(s.name), len(names), runs.index(s.run) if len(runs) > 1 else None,
                         series == "window")
            line = draw_mean(ax, layers[s], shown.curves[s], look)
            if not place[1]:                                        # else the panel's title says what the curve is
                lines.setdefault(in_words(s.name), line)
            key = place[0], ": ".join(filter(None, (s.run, s.name)))
            drawn[key] = layers[s], shown.curves[s].mean().tolist(), shown.curves[s].n
            if random := [other for other in shown.curves if other.control and other[:2] == s[:2]]:
                values, what = np.array([shown.curves[other].mean() for other in random]), random[0].control.split()[0]
                lines[f"{len(values)} random {what}s: mean, lowest and highest"] = draw_controls(
                    ax, layers[random[0]], values, len(layers[s]))
        if level is not None:
            ax.axhline(level, color="#666666", linewidth=0.8, zorder=0)
        ax.set_title(panel_title(place, shown, value, fig.get_figwidth() / ax.get_gridspec().ncols), fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if len(ax.lines[0].get_xdata()) == 1:
            ax.set_xticks(ax.lines[0].get_xdata())
        low, high = limits or ax.get_ylim()
        ax.set_ylim((low, high) if limits or not at_least else (min(low, at_least[0]), max(high, at_least[1])))
    one_scale(axes)
    counts = {mean.n for shown in panels.values() for mean in shown.curves.values()}
    # The other measures are of the whole answer, or of two options: no token is named.
    asked, how = measured_with(*sources.values(), but=(series, "subword" if less else ""))
    bands = ["bands: 95\u00a0%\u00a0CI of\u00a0the\u00a0mean"] * (max(counts) >= FEW) + [
        "thin lines: single questions"] * any(1 < n < FEW for n in counts)
    set_title(fig, asked, title, "; ".join(filter(None, (how, *bands))))
    if series == "window":
        window_scale(fig, axes, names)
    else:
        legend(fig, lines | (run_lines(runs) if len(runs) > 1 else {}))
    return finish(fig), drawn


def panel_title(place, panel, value, inches):
    """The task or edge, how many questions, and whether their answers are saturated."""
    counts = {mean.n for mean in panel.curves.values()}
    n = f"{min(counts)}-{max(counts)}" if len(counts) > 1 else f"{min(counts)}"
    saturated = value == "change_percent" and sum(panel.sure.values()) >= 0.9 * len(panel.sure)
    return f"{fitted(', '.join(filter(None, map(in_words, place))), inches - 1.2, 2)} (n = {n})" + (
        f"\nsaturated: P(answer) > {SATURATED} without a cut" * saturated)


def looks(i, n, run, scale):
    """How the i-th of n series is drawn, in the run of this number (None: there is one run): keywords of plot.

    Colours differ, and so do line styles and markers, since curves may coincide. scale: a colour of a scale instead.
    """
    from matplotlib import colormaps
    colour = colormaps["viridis"](i / max(1, n - 1) * 0.92) if scale else COLOURS[i % len(COLOURS)]
    turn = 0 if scale else i if run is None else run
    return {"color": colour, "linestyle": STYLES[turn % len(STYLES)], "marker": MARKERS[i % len(MARKERS)]}


def draw_mean(ax, layers, mean, look):
    """A mean curve, with its interval or, of few questions, theirs -> its line."""
    line, = ax.plot(layers, mean.mean(), **look, linewidth=1.6, markersize=2.5)
    if mean.n >= FEW:
        ax.fill_between(layers, *mean.interval(), color=look["color"], alpha=0.16, linewidth=0)
    elif mean.n > 1:
        ax.plot(layers, np.transpose(mean.few), linestyle=look["linestyle"], color=look["color"], linewidth=0.5,
                alpha=0.45)
    return line


def draw_controls(ax, layers, values, of):
    """The mean and the range of random controls, values (controls, layers), in grey -> their line. of: how many layers
    the curve has that they are controls of."""
    grey, = ax.plot(layers, values.mean(0), "o", color="#777777", linewidth=0.8, markersize=3.5, zorder=0)
    if len(layers) < of / 2:                                        # a few layers: bars, which promise nothing between
        ax.vlines(layers, values.min(0), values.max(0), color="#aaaaaa", linewidth=5, alpha=0.6, zorder=0)
    else:
        grey.set_linestyle("-")
        ax.fill_between(layers, values.min(0), values.max(0), color="#999999", alpha=0.3, linewidth=0, zorder=0)
    return grey


def legend(fig, lines):
    """lines: {label: matplotlib line}, below the panels, in as many columns as there is room for; more than two rows of
    them make the picture higher."""
    if not lines:
        return
    lines = {fitted(label, fig.get_figwidth() - 1, 1): line for label, line in lines.items()}
    room = int(16 * fig.get_figwidth()) // (8 + max(map(len, lines)))          # letters of 8 points, a piece of line
    columns = min(len(lines), 3, max(1, room))
    fig.set_figheight(fig.get_figheight() + 0.17 * max(0, -(-len(lines) // columns) - 2))
    fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False,
               handlelength=3)


def run_lines(runs):
    """Lines for a legend, which say what each run's line style is: {run: line}."""
    from matplotlib.lines import Line2D
    return {run: Line2D([], [], color="#444444", linewidth=1.6, linestyle=STYLES[i % len(STYLES)])
            for i, run in enumerate(runs)}


def window_scale(fig, axes, windows):
    """The colours of windows, in place of a legend."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    colours = ListedColormap([looks(i, len(windows), None, True)["color"] for i in range(len(windows))])
    bar = fig.colorbar(ScalarMappable(BoundaryNorm(range(len(windows) + 1), len(windows)), colours), ax=axes)
    bar.set_ticks([i + 0.5 for i in range(len(windows))], labels=windows, fontsize=8)
    bar.set_label("window: layers cut at once", fontsize=8)
