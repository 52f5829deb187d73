"""
harness/plots.py - pictures from the CSVs of runs, all in one style.

Run     python -m harness.plots out/knockout/knockout.csv         draws knockout.png beside it again
Needs   matplotlib and numpy. Nothing else of this repo: copy it and it works.
Paper   https://arxiv.org/abs/2411.18620, the layout of figures 3-5

A picture is drawn from a CSV that a run wrote, never from numbers in memory: it shows what is on disk. The CSV is read
row by row, in memory that does not grow with the number of questions, and no matplotlib backend is chosen.
"""
import argparse
import csv
import math
import os
import sys
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def page(width, height):
    """An empty figure, in inches. Not pyplot's: that would open windows, and choose a backend for a whole notebook."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def figure(panels, title, x_label, y_label):
    """An empty figure of so many panels -> (figure, list of axes)."""
    if panels > 60:
        raise ValueError(f"{title}: {panels} panels are too many for a picture")
    columns = min(panels, 3)
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
    fig.suptitle(title, fontsize=10, parse_math=False)              # a question may hold a dollar sign
    return fig, axes[:panels]


DRAWS, FEW = 1000, 10                              # resamples of the bootstrap; fewer curves are shown one by one


class Mean:
    """The mean of curves and its 95 % interval, from one pass over them: a bootstrap whose memory does not grow.

    Each of DRAWS resamples takes a curve 0, 1, 2, .. times, as a Poisson draw of mean 1 says, and keeps two sums. The
    interval is the middle 95 % of the resamples' means. They are means of measured values, so it stays within their
    bounds: no change below -100 %, no probability above 100 %.
    """

    def __init__(self):
        self.n, self.total, self.few = 0, 0, []
        self.random, self.weights, self.sums = np.random.default_rng(0), np.zeros(DRAWS), 0

    def add(self, curve):
        curve = np.asarray(curve, dtype=float)                      # (x,)
        weights = self.random.poisson(1.0, DRAWS)
        self.n, self.total = self.n + 1, self.total + curve
        self.weights, self.sums = self.weights + weights, self.sums + weights[:, None] * curve    # (DRAWS, x)
        self.few = [*self.few, curve][:FEW]

    def mean(self):
        return self.total / self.n

    def interval(self):
        """-> low, high, (x,) each."""
        drawn = self.weights > 0
        return np.percentile(self.sums[drawn] / self.weights[drawn, None], (2.5, 97.5), axis=0)


def wilson(right, n, z=1.96):
    """The 95 % interval of a share: (low, high). Wilson's, which stays within 0 and 1 where few answers are wrong."""
    p, middle = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_interval(changes, before):
    """The 95 % interval of a change in accuracy, (low, high); before + low and before + high are shares, too.

    changes (n,): each question's, -1, 0 or 1. before: the accuracy that it is a change from.

    Where every answer was right before, it is Wilson's interval of the share that still is. Otherwise half an
    observation is added to each of the four cells, right or wrong before by right or wrong after (Agresti and Min
    2005): without it, twenty questions without a change would give an interval of no width.
    """
    changes = np.asarray(changes, dtype=float)
    if before == 1:
        low, high = wilson((changes == 0).sum(), len(changes))
        return low - 1, high - 1
    n = len(changes) + 2
    mean, squares = changes.sum() / n, ((changes ** 2).sum() + 1) / n
    half = 1.96 * np.sqrt((squares - mean ** 2) / n)
    return max(-before, mean - half), min(1 - before, mean + half)


def rows(file, needed, empty=False):
    """A run's CSV -> its rows as dicts, one by one. ValueError: it cannot be read, lacks a column, or has no rows and
    `empty` does not allow that."""
    if Path(file).exists() and not Path(file).is_file():
        raise ValueError(f"{file} is not a file, but a folder, a pipe or a device")
    try:
        with open(file, newline="", encoding="utf-8") as f:
            row = None
            for row in csv.DictReader(f):
                missing = [c for c in needed if row.get(c) is None]
                if missing:
                    raise ValueError(f"{file} has no column {', '.join(missing)}, or a row is cut off")
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{file} is not a run's CSV ({getattr(e, 'strerror', None) or e})") from e
    if row is None and not empty:
        raise ValueError(f"{file} has no rows")


def read(file, needed):
    """The same as a list."""
    return list(rows(file, needed))


def distinct(file, column):
    """The values of a column, each once, in the order in which they come."""
    return list(dict.fromkeys(row[column] for row in rows(file, (column,))))


def number(file, row, column, whole=False, least=-1e30):
    """A cell as a number. ValueError: it is none, or none that can be drawn."""
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not least <= value <= 1e30 or whole and value != int(value):
        raise ValueError(f"{file}: {column} {row[column][:30]!r} is not a number that can be drawn")
    return int(value) if whole else value


def save(fig, file):
    """Write a picture, whole or not at all. OSError names it."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".new.{os.getpid()}.{file.name}")         # the ending says which format it has
    try:
        fig.savefig(new, dpi=150)
        os.replace(new, file)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(file)) from e
    finally:
        new.unlink(missing_ok=True)


def knockout(file, picture):
    """knockout.csv -> a picture: a panel per task, a curve per edge, the mean over questions with its 95 % interval.

    Rows of several windows, as in figures 7 and 8, get a panel per window. -> what was drawn: {(panel, edge): (layers,
    mean changes in percent, number of questions)}
    """
    windows = distinct(file, "window")
    panel = "task" if len(windows) == 1 else "window"
    title = "Attention knockout" + (f", window {windows[0]}" if panel == "task" else "")
    return curves(file, picture, "edge", "change_percent", 1, title, "layer at the centre of the window",
                  "change of P(answer), %", 0, at_least=(-5, 1), panel=panel)


def lens(file, picture):
    """lens.csv -> a picture: a panel per task, a curve per kind of word, in percent. Returns as `knockout` does."""
    how = {"raw": "the residual stream as it is (the last layer's through the final norm)",
           "final": "every layer through the final norm"}
    norms = ", ".join(how.get(norm, norm) for norm in distinct(file, "norm"))
    return curves(file, picture, "kind", "probability", 100, f"Logit lens at the last position: {norms}",
                  "after layer (0: embedding)", "probability, %", limits=(-3, 103))


def jaccard(file, picture):
    """jaccard.csv -> a picture: a panel per task, a curve per intervention. Returns as `knockout` does."""
    where = {"->" in name for name in distinct(file, "intervention")}   # edges: a centred window; modules: its start
    return curves(file, picture, "intervention", "jaccard", 1,
                  f"The question's likeliest words with and without, window {', '.join(distinct(file, 'window'))}", {
                      (True,): "layer at the centre of the window", (False,): "first layer of the window",
                      (False, True): "window's first layer (edges: its centre)"}[tuple(sorted(where))],
                  "Jaccard similarity", 1, limits=(-0.03, 1.03))


def prune(file, picture):
    """prune.csv -> a picture: a panel per task; accuracy with the 95 % interval of its change, time and FLOPs over X.

    -> {task: {X: dict of accuracy; change, from X = 0; low and high, of the change's interval; time and flops, as
    shares of those at X = 0 (medians over questions); tokens: image tokens, mean over layers and questions}}
    """
    needed = ("question_id", "task", "removed_layers", "correct", "seconds", "prefill_flops", "image_tokens")
    by_task, known, keeps = defaultdict(lambda: defaultdict(list)), set(), {}
    for (task, question), mine in groupby(rows(file, needed), lambda row: (row["task"], row["question_id"])):
        numbers = {}                                                # X -> correct, seconds, FLOPs, image tokens
        for row in mine:
            X = number(file, row, "removed_layers", whole=True, least=0)
            numbers[X] = [number(file, row, name, least=0) for name in needed[3:]]
            keeps[row.get("keep") or "none"] = None
            known.add(bool(row.get("answer", "?")))
        if 0 not in numbers or by_task[task].keys() not in (set(), numbers.keys()):
            raise ValueError(f"{file}: question {question} does not have the same removed_layers as the others, with 0")
        correct, seconds, flops, _ = numbers[0]
        if any(c not in (0, 1) for c, *_ in numbers.values()) or not seconds or not flops:
            raise ValueError(f"{file}: question {question} has a correct that is not 0 or 1, or took no time")
        for X, (c, s, f, tokens) in sorted(numbers.items()):
            by_task[task][X].append((c, c - correct, s / seconds, f / flops, tokens))
    drawn = defaultdict(dict)
    for task, by_x in by_task.items():
        before = np.mean([v[0] for v in by_x[0]])
        for X, values in by_x.items():
            right, change, time, flops, tokens = np.array(values).T
            low, high = paired_interval(change, before)
            drawn[task][X] = {"accuracy": right.mean(), "change": change.mean(), "low": low, "high": high,
                              "time": np.median(time), "flops": np.median(flops), "tokens": tokens.mean()}
    what = {(True,): "accuracy", (False,): "agreement with X = 0", (False, True): "accuracy, or agreement with X = 0"}[
        tuple(sorted(known))]
    keep = ", ".join(keeps)
    title = "Without the image in the last X layers" + ("" if keep == "none" else f", keeping {keep}")
    fig, axes = figure(len(by_task), title, "X", "%")
    for ax, (task, by_x) in zip(axes, drawn.items(), strict=True):
        xs = list(by_x)
        for key, colour, label in (("accuracy", COLOURS[0], what), ("time", COLOURS[1], "time, % of X = 0"),
                                   ("flops", COLOURS[4], "prefill FLOPs, % of X = 0")):
            values = np.array([100 * v[key] for v in by_x.values()])
            line, = ax.plot(xs, values, color=colour, linewidth=1.6, marker="o", markersize=2.5, label=label)
            if key == "accuracy":
                low, high = (np.clip([values[0] + 100 * v[end] for X, v in by_x.items() if X], 0, 100)
                             for end in ("low", "high"))
                ax.fill_between([X for X in xs if X], low, high, color=colour, alpha=0.18, linewidth=0)
        ax.set_title(f"{task} (n = {len(by_task[task][0])})", fontsize=9, parse_math=False)
        ax.set_ylim(0, 105 * max(1, *(max(v["time"], v["flops"]) for v in by_x.values())))
        ax.xaxis.get_major_locator().set_params(integer=True)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save(fig, picture)
    return drawn


def norms(file, picture):
    """norms.csv -> a picture: a panel per task, a histogram of the norms of a photo's patch features."""
    needed = ("question_id", "task", "norm")
    edges = np.linspace(0, max(60.0, *(number(file, row, "norm", least=0) for row in rows(file, needed))), 61)
    by_task = defaultdict(lambda: [0, np.zeros(60), 0])             # questions, patches in each bin, above 57
    for (task, _), mine in groupby(rows(file, needed), lambda row: (row["task"], row["question_id"])):
        values = np.array([number(file, row, "norm") for row in mine])
        counts = by_task[task]
        counts[:] = counts[0] + 1, counts[1] + np.histogram(values, edges)[0], counts[2] + (values > 57).sum()
    fig, axes = figure(len(by_task), "L2 norm of the vision tower's patch features", "norm", "patches of a picture")
    for ax, (task, (n, bins, above)) in zip(axes, by_task.items(), strict=True):
        ax.hist(edges[:-1], edges, weights=bins / n, color=COLOURS[0])
        ax.axvline(57, color=COLOURS[1], linewidth=1)               # the paper's threshold
        ax.set_yscale("log")
        ax.set_title(f"{task} (n = {n}), {above / n:.1f} above 57", fontsize=9, parse_math=False)
    save(fig, picture)


def curves(file, picture, series, value, scale, title, x_label, y_label, level=None, limits=None, at_least=None,
           panel="task"):
    """A run's CSV -> a panel per value of the column `panel`, a curve over layers per value of `series`: means with
    95 % intervals (see Mean); below FEW questions, each one's own curve instead of the interval.

    level: where a line marks "no change". limits: of the y axis, where the values have limits. at_least: a range that
    the y axis shows in any case, so that differences by rounding do not fill the panel.
    -> {(panel, series): (layers, means, number of questions)}
    """
    needed = tuple(dict.fromkeys(("question_id", "task", "layer", series, value, panel)))
    by_panel, layers, drawn, lines = defaultdict(lambda: defaultdict(Mean)), None, {}, {}
    for (place, name, *_), mine in groupby(rows(file, needed), lambda row: (
            row[panel], row[series], row["task"], row["question_id"], row.get("window"))):
        points = {number(file, row, "layer", whole=True, least=0): scale * number(file, row, value) for row in mine}
        layers = layers or list(points)
        if list(points) != layers:
            raise ValueError(f"{file} does not have the same layers for every question and {series}")
        by_panel[place if panel == "task" else f"{panel} {place}"][name].add(list(points.values()))
    names = list(dict.fromkeys(name for named in by_panel.values() for name in named))
    fig, axes = figure(len(by_panel), title, x_label, y_label)
    for ax, (place, named) in zip(axes, by_panel.items(), strict=True):
        counts = [mean.n for mean in named.values()]
        for name, mean in named.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            style = ("-", "--", ":")[names.index(name) // len(COLOURS) % 3]
            lines[name], = ax.plot(layers, mean.mean(), style, color=colour, linewidth=1.6, marker="o", markersize=2.5)
            if mean.n < FEW:
                ax.plot(layers, np.transpose(mean.few), style, color=colour, linewidth=0.5, alpha=0.45)
            else:
                ax.fill_between(layers, *mean.interval(), color=colour, alpha=0.18, linewidth=0)
            drawn[place, name] = layers, mean.mean().tolist(), mean.n
        if limits:
            ax.set_ylim(limits)
        if at_least:
            low, high = ax.get_ylim()
            ax.set_ylim(min(low, at_least[0]), max(high, at_least[1]))
        if level is not None:
            ax.axhline(level, color="#666666", linewidth=0.8, zorder=0)
        n = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"
        ax.set_title(f"{place} (n = {n})", fontsize=9, parse_math=False)
        ax.xaxis.get_major_locator().set_params(integer=True)
    legend = fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 3),
                        fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save(fig, picture)
    return drawn


def accuracy(file, picture):
    """Table 2 from an accuracy.csv: structure by semantics; each cell has accuracy, interval, number of questions."""
    table = [row for row in read(file, ("group", "questions", "accuracy", "low", "high")) if "/" in row["group"]]
    if not table:
        raise ValueError(f"{file} has none of GQA's groups")
    down, across = (list(dict.fromkeys(row["group"].split("/")[i] for row in table)) for i in range(2))
    shares = np.full((len(down), len(across)), np.nan)
    fig = page(1.6 + 1.25 * len(across), 1.4 + 0.6 * len(down))
    ax = fig.subplots()
    for row in table:
        y, x = (names.index(name) for names, name in zip((down, across), row["group"].split("/")[:2], strict=True))
        shares[y, x], low, high = (100 * number(file, row, key) for key in ("accuracy", "low", "high"))
        ax.text(x, y, f"{shares[y, x]:.1f}\n{low:.0f} to {high:.0f}\nn = {row['questions']}", ha="center", va="center",
                fontsize=7, color="white" if shares[y, x] > 60 else "black")
    shown = ax.imshow(shares, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    ax.set_xticks(range(len(across)), across, fontsize=8, parse_math=False)
    ax.set_yticks(range(len(down)), down, fontsize=8, parse_math=False)
    fig.colorbar(shown, label="accuracy, %")
    fig.suptitle("Accuracy by kind of question, with 95 % intervals", fontsize=10)
    save(fig, picture)


def words(title, columns, cells, shares, picture):
    """A grid of words, layer 0 at the bottom, coloured by probability. cells, shares: a row per layer, a
    column per name in `columns`."""
    shares, longest = np.asarray(shares), max(len(word) for row in (columns, *cells) for word in row)
    wide = max(5.0, 0.8 + len(columns) * max(0.6, 0.09 * longest))
    fig = page(wide, 1.5 + 0.24 * len(cells))
    ax = fig.subplots()
    shown = ax.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    for y, row in enumerate(cells):
        for x, word in enumerate(row):
            ax.text(x, y, drawable(word), ha="center", va="center", fontsize=7, parse_math=False,
                    color="white" if shares[y, x] > 0.55 else "black")
    ax.set_xticks(range(len(columns)), [drawable(name) for name in columns], fontsize=8,
                  rotation=0 if longest < 6 else 30)
    for label in ax.get_xticklabels():
        label.set_parse_math(False)
    ax.set_yticks(range(len(cells)), range(len(cells)), fontsize=7)
    ax.set_ylabel("after layer (0: embedding)", fontsize=9)
    fig.colorbar(shown, label="probability", shrink=0.6)
    fig.suptitle(title, fontsize=9, parse_math=False)
    save(fig, picture)


def patch_words(image, title, boxes, cells, shares, picture):
    """Words over the patches of a photo, coloured by probability; a panel for each of the two most frequent sizes.

    image: PIL. boxes (n, 4): x0, y0, x1, y1 of each patch on the photo, NaN for none. cells, shares: n each.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle
    sizes = defaultdict(list)                                       # patches of the whole view and of tiles differ
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if x0 == x0:
            sizes[round((x1 - x0) * (y1 - y0), 1)].append(i)
    kinds = sorted(sorted(sizes.values(), key=len)[-2:], key=len)
    fig, axes = figure(len(kinds), title, "", "")
    fig.set_size_inches(fig.get_size_inches() * (1 + max(map(len, kinds)) ** 0.5 / 12))
    for ax, mine in zip(axes, kinds, strict=True):
        ax.imshow(image, alpha=0.6)
        ax.grid(False)
        ax.axis("off")
        for i in mine:
            x0, y0, x1, y1 = boxes[i].tolist()
            ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=colormaps["Blues"](shares[i]),
                                   alpha=0.45, edgecolor="white", linewidth=0.3))
            room = 72 * fig.get_figwidth() / len(kinds) * (x1 - x0) / image.width           # points
            ax.text((x0 + x1) / 2, (y0 + y1) / 2, drawable(cells[i])[:9], ha="center", va="center",
                    fontsize=min(10, room / 6), parse_math=False)
        ax.set_title(f"{len(mine)} patches", fontsize=8)
    save(fig, picture)


def drawable(text):
    """Text with a box in place of each letter that the picture's font lacks, so that none is left out silently."""
    from matplotlib import font_manager, ft2font
    font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))
    return "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "\u25a1" for c in text)


def groups(image, grouped, boxes, annotated, picture):
    """One question's patch groups on its photo: a panel for the whole view, one for AnyRes tiles.

    image: PIL. grouped: groups.Groups. boxes (n, 4): its patches on the photo. annotated: (x, y, w, h) px.
    """
    from matplotlib.patches import Rectangle
    prompt, named = grouped.prompt, grouped.named
    first = prompt.image.start
    kinds = [k for k in ("base_patches", "tile_patches") if k in named]
    fig, axes = figure(len(kinds), f"{prompt.question}\n{len(named['image'])} image tokens", "", "")
    for ax, kind in zip(axes, kinds, strict=True):
        ax.imshow(image)
        ax.grid(False)
        ax.axis("off")
        related = set(named.get("related_patches", ()))
        for i in named[kind]:
            x0, y0, x1, y1 = boxes[i - first].tolist()
            if x0 == x0:                                            # NaN: a patch of padding
                ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=i in related, facecolor=COLOURS[1] + "66",
                                       edgecolor="white", linewidth=0.25))
        for x, y, w, h in annotated:
            ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=COLOURS[3], linewidth=1.5))
        related_here = f", {len(related.intersection(named[kind]))} related" if "related_patches" in named else ""
        ax.set_title(f"{kind}: {len(named[kind])}{related_here}", fontsize=9)
    save(fig, picture)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", metavar="CSV", help="a run's or a figure's CSV, whatever instrument wrote it")
    parser.add_argument("--out", metavar="PNG", help="the picture's file (beside the CSV)")
    args = parser.parse_args()
    picture = args.out or Path(args.csv).with_suffix(".png")
    draw = {"kind": lens, "intervention": jaccard, "removed_layers": prune, "group": accuracy,
            "patch": norms}
    head = read(args.csv, ())[0]
    next((draw[column] for column in draw if column in head), knockout)(args.csv, picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
