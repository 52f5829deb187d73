"""
harness/plots.py - pictures from the CSVs of runs, all in one style.

Run     python -m harness.plots out/knockout/knockout.csv         draws knockout.png beside it again
        python -m harness.plots A/knockout.csv B/knockout.csv --out both.svg      two runs in one picture
Needs   matplotlib and numpy, and errors.py and intervals.py beside it.
Paper   https://arxiv.org/abs/2411.18620, the layout of figures 3-5

A picture is drawn from a CSV that a run wrote, never from numbers in memory: it shows what is on disk. The CSV is read
row by row, in memory that does not grow with the number of questions, and no matplotlib backend is chosen.
"""
import argparse
import csv
import json
import math
import os
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import numpy as np

from harness.errors import files_of, one_line_errors
from harness.intervals import FEW, Mean, paired_interval

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


def rows(file, needed, empty=False):
    """A run's CSV -> its rows as dicts, one by one; rows in memory are given as they are. ValueError: it cannot be
    read, lacks a column, or has no rows and `empty` does not allow that."""
    if not isinstance(file, str | Path):
        yield from file
        return
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


# --measure -> (columns of knockout.csv whose difference is drawn, label of the y axis)
MEASURES = {"first": ("change_percent", None, "change of P(answer), %"),
            "answer": ("logp_per_token_knockout", "logp_per_token_base", "change of log P(answer), nats per token"),
            "margin": ("margin_knockout", "margin_base", "change of the margin, nats")}

NO_PAIR = "--measure margin: no question has a second option; pass --options A,B and --answer A, or measure answer"


def knockout(file, picture, measure="first"):
    """knockout.csv -> a picture: a panel per task, a curve per edge, the mean over questions with its 95 % interval.

    Rows of several windows, as in figures 7 and 8, get a panel per window. file: one CSV, or a list of several runs',
    which are told apart by line style. -> what was drawn: {(panel, edge): (layers, mean changes, number of questions)}
    """
    fig, drawn = knockout_figure(file, measure)
    save(fig, picture)
    return drawn


def knockout_figure(file, measure="first"):
    """The same -> (figure, what was drawn). file: also rows that were measured in memory, a list of dicts."""
    sources = dict(zip(run_labels(file), file, strict=True)) if is_several(file) else {"": file}
    seen = list(dict.fromkeys(window for source in sources.values() for window in distinct(source, "window")))
    panel = "task" if len(seen) == 1 or len(sources) > 1 else "window"
    title = "Attention knockout" + (f", window {seen[0]}" if len(seen) == 1 else "")
    value, less, label = MEASURES[measure]
    return curves(sources, "edge", value, 1, title, "layer at the centre of the window", label, 0, panel=panel,
                  at_least=(-5, 1) if measure == "first" else None, less=less)


def is_several(file):
    """Is it a list of files, not one file and not a list of rows?"""
    return isinstance(file, list | tuple) and bool(file) and isinstance(file[0], str | Path)


def run_labels(files):
    """What tells several runs apart, by the run.json beside each: model, dtype, window ...; else their folders."""
    told, places = [], [str(Path(file).parent) for file in files]
    if len(set(places)) < len(files):                               # two files of one folder
        places = list(map(str, files))
    if len(set(places)) < len(files):
        raise ValueError(f"{files[0]}: the same file is given twice")
    for file in files:
        info = Path(file).with_name("run.json")
        try:
            record = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {"settings": {}}
            record = {record.get("csv"): record, **record.get("others", {})}.get(Path(file).name) or {"settings": {}}
            told.append({"model": record.get("model"), **record["settings"]})
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
            raise ValueError(f"{info} is not a run's record ({type(e).__name__}: {e})") from e
    if not all(len(one) > 1 for one in told):                       # of one, nothing is known
        return places
    keys = [key for key in ("model", "dtype", "preprocess", "window", "heads", "subword")
            if len({str(one.get(key)) for one in told}) > 1]
    labels = [", ".join(f"{'' if key in ('model', 'dtype') else key + ' '}{one.get(key)}" for key in keys)
              for one in told]
    return labels if len(set(labels)) == len(files) else places


def measured(file, row, measure):
    """A row of knockout.csv -> its change, by one of MEASURES; None where the question has no two options."""
    return difference(file, row, *MEASURES[measure][:2])


def difference(file, row, value, less=None):
    """A cell, or what it exceeds the one of the column `less` by; None, if that pair of cells is empty."""
    if less and row[value] == "":
        return None
    return number(file, row, value) - (number(file, row, less) if less else 0)


def heads(file, picture, top, measure="first"):
    """heads.csv -> a picture: the mean change when each head alone loses the edge, a row per layer, a column per head.

    -> ([(layer, head)] of the `top` largest changes, lines that list them)
    """
    fig, ranked, lines = heads_figure(file, top, measure)
    save(fig, picture)
    return ranked, lines


def heads_figure(file, top, measure="first"):
    """The same -> (figure, the heads, lines)."""
    total, edge, window, asked, label = defaultdict(list), None, None, {}, MEASURES[measure][2]
    for row in rows(file, ("question_id", "task", "edge", "window", "layer", "head", MEASURES[measure][0])):
        place = number(file, row, "layer", whole=True, least=0), number(file, row, "head", whole=True, least=0)
        if (change := measured(file, row, measure)) is not None:
            total[place].append(change)
            edge, window, asked[row["task"], row["question_id"]] = row["edge"], row["window"], None
    if not total:
        raise ValueError(NO_PAIR)
    if max(map(max, total)) > 10_000:
        raise ValueError(f"{file}: layer or head {max(map(max, total))} is not one of a model")
    mean = np.full(np.max(list(total), axis=0) + 1, np.nan)
    for place, values in total.items():
        mean[place] = np.mean(values)
    most = max(1e-9, np.nanmax(np.abs(mean)))
    ranked = sorted(total, key=lambda place: -abs(mean[place]))[:top]
    fig = page(max(6.0, 2.0 + 0.28 * mean.shape[1]), 1.6 + 0.2 * mean.shape[0])
    ax = fig.subplots()
    shown = ax.imshow(mean, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
    for rank, (layer, head) in enumerate(ranked, 1):
        ax.text(head, layer, rank, ha="center", va="center", fontsize=7,
                color="white" if abs(mean[layer, head]) > 0.6 * most else "black")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("head", fontsize=9)
    ax.set_ylabel("layer" if window == "1" else f"layer at the centre of the window of {window}", fontsize=9)
    fig.colorbar(shown, label=f"mean {label}")
    fig.suptitle(f"{edge}, cut for one head at a time (n = {len(asked)})", fontsize=9, parse_math=False)
    lines = [f"rank  layer  head  mean {label}"]
    lines += [f"{rank:4}  {layer:5}  {head:4}  {mean[layer, head]:+.3f}"
              for rank, (layer, head) in enumerate(ranked, 1)]
    return fig, ranked, lines


def lens(file, picture):
    """lens.csv -> a picture: a panel per task, a curve per kind of word, in percent. Returns as `knockout` does."""
    fig, drawn = lens_figure(file)
    save(fig, picture)
    return drawn


def lens_figure(file):
    """The same -> (figure, what was drawn)."""
    how = {"raw": "the residual stream as it is (the last layer's through the final norm)",
           "final": "every layer through the final norm"}
    norms = ", ".join(how.get(norm, norm) for norm in distinct(file, "norm"))
    return curves({"": file}, "kind", "probability", 100, f"Logit lens at the last position: {norms}",
                  "after layer (0: embedding)", "probability, %", limits=(-3, 103))


def jaccard(file, picture):
    """jaccard.csv -> a picture: a panel per task, a curve per intervention. Returns as `knockout` does."""
    where = {"->" in name for name in distinct(file, "intervention")}   # edges: a centred window; modules: its start
    title = f"The question's likeliest words with and without, window {', '.join(distinct(file, 'window'))}"
    fig, drawn = curves({"": file}, "intervention", "jaccard", 1, title,
                        {(True,): "layer at the centre of the window", (False,): "first layer of the window",
                         (False, True): "window's first layer (edges: its centre)"}[tuple(sorted(where))],
                        "Jaccard similarity", 1, limits=(-0.03, 1.03))
    save(fig, picture)
    return drawn


def patch(file, picture):
    """patch.csv -> a picture: a panel per task, a curve per group of tokens, in percent. Returns as `knockout` does."""
    fig, drawn = patch_figure(file)
    save(fig, picture)
    return drawn


def patch_figure(file):
    """The same -> (figure, what was drawn)."""
    part, direction, window = (distinct(file, name)[0] for name in ("part", "direction", "window"))
    what = {"denoising": "clean into corrupted", "noising": "corrupted into clean"}[direction]
    title = f"Activation patching, {what}: " + {"stream": "the residual stream", "attention": "attention's output",
                                                "mlp": "the MLP's output"}[part]
    title += f", {window} layers at once" if str(window) != "1" else ""
    fig, drawn = curves({"": file}, "group", "share", 100, title,
                        "after layer (0: embedding)" if part == "stream" else "layer",
                        "margin recovered, %" if direction == "denoising" else "margin lost, %", 0, at_least=(-5, 105))
    for ax in fig.axes:
        ax.axhline(100, color="#666666", linewidth=0.8, linestyle=":", zorder=0)
    return fig, drawn


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


SATURATED = 0.99                                   # a probability from which a cut can hardly change it any more


def curves(sources, series, value, scale, title, x_label, y_label, level=None, limits=None, at_least=None, panel="task",
           less=None):
    """CSVs of runs -> a panel per value of the column `panel`, a curve over layers per value of `series`: means with
    95 % intervals (see Mean); below FEW questions, each one's own curve instead of the interval.

    sources: {label: file, or list of rows}; where there are several, each has a line style of its own. less: a column
    that is subtracted from `value`; rows in which they are empty are left out. level: where a line marks "no change".
    limits: of the y axis, where the values have limits. at_least: a range that the y axis shows in any case, so that
    differences by rounding do not fill the panel. Series named "NAME, random ..." are controls of NAME: their mean and
    range are drawn in grey.
    -> (figure, {(panel, series): (layers, means, number of questions)})
    """
    needed = tuple(dict.fromkeys(("question_id", "task", "layer", series, value, panel, *([less] if less else []))))
    names = {name for file in sources.values() for name in distinct(file, series)}
    controls = any(", random " in name for name in names)
    panels = len({place for file in sources.values() for place in distinct(file, panel)})
    apart = controls and panels * sum(", random " not in name for name in names) <= 60
    by_panel, layers, drawn, lines = defaultdict(lambda: defaultdict(Mean)), {}, {}, {}
    sure = defaultdict(dict)                                        # panel -> {question: is it sure of its answer?}
    for label, file in sources.items():
        for (place, name, *question), mine in groupby(rows(file, needed), lambda row: (
                row[panel], row[series], row["task"], row["question_id"], row.get("window"))):
            mine = list(mine)
            points = {number(file, row, "layer", whole=True, least=0): scale * change for row in mine
                      if (change := difference(file, row, value, less)) is not None}
            if not points:
                continue
            place, control = place if panel == "task" else f"{panel} {place}", ", random " in name
            place = place, name.partition(", random ")[0] if apart else ""          # grey bands need a panel each
            name = (f"{label}: {name}" if label and len(sources) > 1 else name, label)
            if list(points) != layers.setdefault(name, list(points)) or not control and (
                    list(points) != layers.setdefault(None, list(points))):
                raise ValueError(f"{file} does not have the same layers for every question and {series}")
            by_panel[place][name].add(list(points.values()), interval=not control)
            sure[place][tuple(question)] = bool(mine[0].get("p_base")) and number(file, mine[0], "p_base") > SATURATED
    if not by_panel:
        raise ValueError(NO_PAIR)
    curve = [name for name in dict.fromkeys(name for named in by_panel.values() for name in named)
             if ", random " not in name[0]]
    plain = list(dict.fromkeys(name.removeprefix(f"{label}: ") for name, label in curve))
    labels = list(dict.fromkeys(label for _, label in curve))
    fig, axes = figure(len(by_panel), title, x_label, y_label)
    for ax, (place, named) in zip(axes, by_panel.items(), strict=True):
        counts = [mean.n for mean in named.values()]
        for name in (name for name in curve if name in named):
            mean, i = named[name], plain.index(name[0].removeprefix(f"{name[1]}: "))
            colour = COLOURS[i % len(COLOURS)]
            style = ("-", "--", ":", "-.")[(i // len(COLOURS) if len(labels) == 1 else labels.index(name[1])) % 4]
            lines[name[0]], = ax.plot(layers[name], mean.mean(), style, color=colour, linewidth=1.6, marker="o",
                                      markersize=2.5)
            if mean.n < FEW:
                ax.plot(layers[name], np.transpose(mean.few), style, color=colour, linewidth=0.5, alpha=0.45)
            else:
                ax.fill_between(layers[name], *mean.interval(), color=colour, alpha=0.18, linewidth=0)
            drawn[place[0], name[0]] = layers[name], mean.mean().tolist(), mean.n
            if random := [other for other in named if other[0].startswith(f"{name[0]}, random ")]:
                values, at = np.array([named[other].mean() for other in random]), layers[random[0]]
                grey, = ax.plot(at, values.mean(0), "o", color="#777777", linewidth=0.8, markersize=3.5, zorder=0)
                if len(at) < len(layers[name]) / 2:                 # a few layers: bars, which promise nothing between
                    ax.vlines(at, values.min(0), values.max(0), color="#aaaaaa", linewidth=5, alpha=0.6, zorder=0)
                else:
                    grey.set_linestyle("-")
                    ax.fill_between(at, values.min(0), values.max(0), color="#999999", alpha=0.3, linewidth=0, zorder=0)
                what = random[0][0].split(", random ")[1].split()[0]
                lines[f"{len(values)} random {what}s: mean, lowest and highest"] = grey
        if limits:
            ax.set_ylim(limits)
        if at_least:
            low, high = ax.get_ylim()
            ax.set_ylim(min(low, at_least[0]), max(high, at_least[1]))
        if level is not None:
            ax.axhline(level, color="#666666", linewidth=0.8, zorder=0)
        n = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"
        saturated = value == "change_percent" and sum(sure[place].values()) >= 0.9 * len(sure[place])
        note = f"\nsaturated: P(answer) > {SATURATED} without a cut" * saturated
        ax.set_title(f"{', '.join(filter(None, place))} (n = {n}){note}", fontsize=9, parse_math=False)
        ax.xaxis.get_major_locator().set_params(integer=True)
    room = int(16 * fig.get_figwidth()) // (8 + max(map(len, lines)))       # characters of 8 points, and a line's piece
    columns = min(len(lines), 3, max(1, room))
    legend = fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize=8,
                        frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return fig, drawn


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", metavar="CSV", nargs="+",
                        help="a run's or a figure's CSV, whatever instrument wrote it; several of knockout.py's")
    parser.add_argument("--out", metavar="FILE", help="the picture: .png, .svg or .pdf (a .png beside the first CSV)")
    parser.add_argument("--measure", choices=MEASURES, default="first", help="of knockout.csv: see knockout.py --help")
    args = parser.parse_args()
    args.csv = files_of("CSV", args.csv)
    file, picture = args.csv[0], args.out or Path(args.csv[0]).with_suffix(".png")
    draw = {"kind": lens, "intervention": jaccard, "removed_layers": prune, "share": patch, "group": accuracy,
            "patch": norms}
    first = [next(rows(f, ())) for f in args.csv]                   # of each the first row; none: it says so
    drawing = [next((draw[column] for column in draw if column in row), None) for row in first]
    if odd := [f for f, row in zip(args.csv, first, strict=True) if row.get("layer") == "" or "attention" in row]:
        raise ValueError(f"{odd[0]}: what this run wrote is not drawn from its CSV alone")
    if len(args.csv) > 1 and (any(drawing) or any(row.get("head") for row in first)):
        raise ValueError("several runs in one picture: knockout.csv of each")
    if drawing[0]:
        drawing[0](file, picture)
    elif first[0].get("head"):
        heads(file, picture, 10, args.measure)
    else:
        knockout(args.csv if len(args.csv) > 1 else file, picture, args.measure)
    print(f"wrote {picture}")


if __name__ == "__main__":
    with one_line_errors():
        main()
