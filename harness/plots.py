"""
harness/plots.py - one function for each kind of CSV that a run writes, and the picture that is drawn from it.

Run     python -m harness.plots out/knockout/knockout.csv         draws knockout.png beside it again
        python -m harness.plots A/knockout.csv B/knockout.csv --out both.svg      two runs in one picture
Needs   matplotlib and numpy; canvas.py, curves.py, tables.py, intervals.py and errors.py beside it.
"""
import argparse
import json
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import numpy as np

from harness.canvas import COLOURS, MARKERS, STYLES, figure, finish, in_words, one_scale, page, save, set_title
from harness.curves import NO_PAIR, curves, difference, legend, measured_with
from harness.errors import files_of, one_line_errors
from harness.intervals import paired_interval
from harness.tables import distinct, number, read, rows

# --measure -> (columns of knockout.csv whose difference is drawn, label of the y axis)
MEASURES = {"first": ("change_percent", None, "change of P(answer), %"),
            "answer": ("logp_per_token_knockout", "logp_per_token_base", "change of log P(answer), nats per token"),
            "margin": ("margin_knockout", "margin_base", "change of the margin, nats")}


def is_several(file):
    """Is it a list of files, not one file and not a list of rows?"""
    return isinstance(file, list | tuple) and bool(file) and isinstance(file[0], str | Path)


def run_labels(files):
    """What tells several runs apart, by the run.json beside each: model, dtype, window ...; else their folders."""
    records, places = [], [str(Path(file).parent) for file in files]
    if len(set(places)) < len(files):                               # two files of one folder
        places = list(map(str, files))
    if len({Path(file).resolve() for file in files}) < len(files):
        raise ValueError(f"{files[0]}: the same file is given twice")
    for file in files:
        info = Path(file).with_name("run.json")
        try:
            record = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {"settings": {}}
            record = {record.get("csv"): record, **record.get("others", {})}.get(Path(file).name) or {"settings": {}}
            records.append({"model": record.get("model"), **record["settings"]})
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
            raise ValueError(f"{info} is not a run's record ({type(e).__name__}: {e})") from e
    if not all(len(record) > 1 for record in records):              # of one, nothing is known
        return places
    keys = [key for key in ("model", "dtype", "preprocess", "window", "heads", "subword")
            if len({str(record.get(key)) for record in records}) > 1]
    labels = [", ".join(f"{'' if key in ('model', 'dtype') else key + ' '}{record.get(key)}" for key in keys)
              for record in records]
    return labels if len(set(labels)) == len(files) else places


def measured(file, row, measure):
    """A row of knockout.csv -> its change, by one of MEASURES; None where the question has no two options."""
    return difference(file, row, *MEASURES[measure][:2])


# ---------------------------------------------------------------------------------------------------- kinds of CSV

def knockout(file, picture, measure="first"):
    """knockout.csv -> a picture: a panel per task, a curve per edge, the mean over questions with its 95 % interval.

    Rows of several windows, as in figures 7 and 8, get a panel per edge. file: one CSV, or a list of several runs',
    which are told apart by line style. -> what was drawn: {(task, edge): (layers, mean changes, number of questions)};
    of several windows, edge and window in their place.
    """
    fig, drawn = knockout_figure(file, measure)
    save(fig, picture)
    return drawn


def knockout_figure(file, measure="first"):
    """`knockout` without saving -> (figure, what was drawn). file: also rows in memory, a list of dicts."""
    sources = dict(zip(run_labels(file), file, strict=True)) if is_several(file) else {"": file}
    windows = {window for source in sources.values() for window in distinct(source, "window")}
    by_window = len(windows) > 1 and len(sources) == 1
    value, less, label = MEASURES[measure]
    return curves(sources, "window" if by_window else "edge", value, 1,
                  "Attention knockout, one edge cut around each layer in turn", "layer at the centre of the window",
                  label, 0, panel="edge" if by_window else "task", at_least=(-5, 1) if measure == "first" else None,
                  less=less)


def heads(file, picture, top, measure="first"):
    """heads.csv -> a picture: the mean change when each head alone loses the edge, a row per layer, a column per head.

    -> ([(layer, head)] of the `top` largest changes, lines that list them)
    """
    fig, ranked, lines = heads_figure(file, top, measure)
    save(fig, picture)
    return ranked, lines


def heads_figure(file, top, measure="first"):
    """`heads` without saving -> (figure, the heads, lines)."""
    total, edge, window, questions, label = defaultdict(list), None, None, set(), MEASURES[measure][2]
    for row in rows(file, ("question_id", "task", "edge", "window", "layer", "head", MEASURES[measure][0])):
        place = number(file, row, "layer", whole=True, least=0), number(file, row, "head", whole=True, least=0)
        if (change := measured(file, row, measure)) is not None:
            total[place].append(change)
            edge, window = row["edge"], row["window"]
            questions.add((row["task"], row["question_id"]))
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
    asked, how = measured_with(file, but=("heads", "subword" if measure != "first" else ""))
    set_title(fig, asked, f"{in_words(edge)}, cut for one head at a time (n = {len(questions)})", how)
    lines = [f"rank  layer  head  mean {label}"]
    lines += [f"{rank:4}  {layer:5}  {head:4}  {mean[layer, head]:+.3f}"
              for rank, (layer, head) in enumerate(ranked, 1)]
    return finish(fig), ranked, lines


def lens(file, picture):
    """lens.csv -> a picture: a panel per task, a curve per kind of word, in percent. Returns as `knockout` does."""
    fig, drawn = lens_figure(file)
    save(fig, picture)
    return drawn


def lens_figure(file):
    """`lens` without saving -> (figure, what was drawn)."""
    how = {"raw": "the residual stream as it is (the last layer's through the final norm)",
           "final": "every layer through the final norm"}
    norms = ", ".join(how.get(norm, norm) for norm in distinct(file, "norm"))
    return curves({"": file}, "kind", "probability", 100, f"Logit lens at the last position: {norms}",
                  "after layer (0: embedding)", "probability, %", limits=(-3, 103))


def jaccard(file, picture):
    """jaccard.csv -> a picture: a panel per task, a curve per intervention. Returns as `knockout` does."""
    where = {"->" in name for name in distinct(file, "intervention")}   # edges: a centred window; modules: its start
    title = "The question's likeliest words, with and without an intervention"
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
    """`patch` without saving -> (figure, what was drawn)."""
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
    """prune.csv -> a picture: over X, accuracy with the 95 % interval of its change, a panel per task; time and FLOPs.

    -> {task: {X: dict of n, the number of questions; accuracy; change, from X = 0; low and high, of the change's
    interval; time and flops, as shares of those at X = 0 (medians over questions); tokens: image tokens, mean over
    layers and questions}}
    """
    by_task, what, kept = pruned(file)
    drawn = {task: summary(by_x) for task, by_x in by_task.items()}
    fig, axes = figure(len(drawn) + 1, "", "X: layers without the image", f"{what}, %")
    for ax, (task, by_x) in zip(axes[:-1], drawn.items(), strict=True):
        shares, n = np.array([100 * v["accuracy"] for v in by_x.values()]), by_x[0]["n"]
        ax.plot(list(by_x), shares, color=COLOURS[0], linewidth=1.6, marker="o", markersize=2.5)
        low, high = (np.clip([shares[0] + 100 * v[end] for X, v in by_x.items() if X], 0, 100)
                     for end in ("low", "high"))
        if n > 1:
            ax.fill_between([X for X in by_x if X], low, high, color=COLOURS[0], alpha=0.18, linewidth=0)
        ax.set_title(f"{task} (n = {n})", fontsize=9)
        ax.set_ylim(-3, 103)
    lines = {}
    for i, name in enumerate(("time", "FLOPs of the prefill")):     # of all tasks together
        middle = [100 * np.median([v[2 + i] for by_x in by_task.values() for v in by_x[X]]) for X in by_x]
        lines[f"{name}: median over questions"], = axes[-1].plot(
            list(by_x), middle, color=COLOURS[1 + 3 * i], linestyle=STYLES[i], marker=MARKERS[i], linewidth=1.6,
            markersize=2.5)
    axes[-1].set_title("cost of a question", fontsize=9)
    axes[-1].set_ylabel("% of X = 0", fontsize=9)
    axes[-1].set_ylim(0, max(105, axes[-1].get_ylim()[1]))
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
    asked, how = measured_with(file)
    bands = ["bands: 95 % CI of the change from X = 0"] if max(v[0]["n"] for v in drawn.values()) > 1 else []
    set_title(fig, asked, "Without the image in the last X layers" + (f", keeping {kept}" if kept != "none" else ""),
              "; ".join(filter(None, (how, *bands))))
    legend(fig, lines)
    save(fig, picture)
    return drawn


def pruned(file):
    """prune.csv -> ({task: {X: for each question (is it right, its change from X = 0, time and FLOPs as shares of those
    at X = 0, image tokens)}}, what is called accuracy, what is kept of the image)."""
    needed = ("question_id", "task", "removed_layers", "correct", "seconds", "prefill_flops", "image_tokens")
    by_task, known, kept = defaultdict(lambda: defaultdict(list)), set(), {}
    for (task, question), mine in groupby(rows(file, needed), lambda row: (row["task"], row["question_id"])):
        numbers = {}                                                # X -> correct, seconds, FLOPs, image tokens
        for row in mine:
            X = number(file, row, "removed_layers", whole=True, least=0)
            numbers[X] = [number(file, row, name, least=0) for name in needed[3:]]
            kept[row.get("keep") or "none"] = None
            known.add(bool(row.get("answer", "?")))                 # older CSVs have no such column
        if 0 not in numbers or by_task[task].keys() not in (set(), numbers.keys()):
            raise ValueError(f"{file}: question {question} does not have the same removed_layers as the others, with 0")
        correct, seconds, flops, _ = numbers[0]
        if any(c not in (0, 1) for c, *_ in numbers.values()) or not seconds or not flops:
            raise ValueError(f"{file}: question {question} has a correct that is not 0 or 1, or took no time")
        for X, (c, s, f, tokens) in sorted(numbers.items()):
            by_task[task][X].append((c, c - correct, s / seconds, f / flops, tokens))
    what = {(True,): "accuracy", (False,): "agreement with X = 0", (False, True): "accuracy, or agreement with X = 0"}[
        tuple(sorted(known))]
    return by_task, what, ", ".join(kept)


def summary(by_x):
    """What `pruned` gives of a task -> what `prune` returns of it."""
    before, result = np.mean([v[0] for v in by_x[0]]), {}
    for X, values in by_x.items():
        right, change, time, flops, tokens = np.array(values).T
        low, high = paired_interval(change, before)
        result[X] = {"n": len(values), "accuracy": right.mean(), "change": change.mean(), "low": low, "high": high,
                    "time": np.median(time), "flops": np.median(flops), "tokens": tokens.mean()}
    return result


LARGE = 57.0                                       # the paper's: of CLIP ViT-L/14-336's 576 patches, 3.3 exceed it


def threshold(norms):
    """The norm above which figure 16 leaves patches out: LARGE. If more than one patch in twenty exceeds it, the tower
    is not the paper's, and the limit is the norm that as large a share of patches exceeds as LARGE there."""
    norms = sorted(norms)
    few = sum(norm > LARGE for norm in norms) <= len(norms) / 20
    return LARGE if few else norms[round(len(norms) * (1 - 3.3 / 576)) - 1]


def norms(file, picture):
    """norms.csv -> a picture: a panel per task, a histogram of the norms of a photo's patch features."""
    needed = ("question_id", "task", "norm")
    everything = np.array([number(file, row, "norm", least=0) for row in rows(file, needed)])
    limit, bins = threshold(everything), np.linspace(0, max(60.0, everything.max()), 61)
    by_task = defaultdict(lambda: [0, np.zeros(60), 0])             # questions, patches in each bin, above the limit
    for (task, _), mine in groupby(rows(file, needed), lambda row: (row["task"], row["question_id"])):
        values = np.array([number(file, row, "norm") for row in mine])
        total = by_task[task]
        total[:] = total[0] + 1, total[1] + np.histogram(values, bins)[0], total[2] + (values > limit).sum()
    fig, axes = figure(len(by_task), "", "norm", "patches of a picture")
    for ax, (task, (n, counts, above)) in zip(axes, by_task.items(), strict=True):
        ax.hist(bins[:-1], bins, weights=counts / n, color=COLOURS[0])
        line = ax.axvline(limit, color=COLOURS[1], linewidth=1)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(f"{in_words(task)} (n = {n}), {above / n:.1f} above {limit:.4g}", fontsize=9)
    one_scale(axes)
    asked, how = measured_with(file)
    set_title(fig, asked, "L2 norm of the vision tower's patch features", how)
    legend(fig, {f"{limit:.4g}: above it, figure 16 leaves patches out": line})
    save(fig, picture)


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
    ax.set_xticks(range(len(across)), across, fontsize=8)
    ax.set_yticks(range(len(down)), down, fontsize=8)
    fig.colorbar(shown, label="accuracy, %")
    set_title(fig, "Accuracy by kind of question, with its 95 % CI", measured_with(file)[1])
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
