"""
plots.py - pictures from the CSVs, one look for all of them.

Needs   matplotlib and numpy. Nothing else of this repo: copy it and it works.
Run     python plots.py out/knockout/knockout.csv                 draws knockout.png beside it, again
Paper   https://arxiv.org/abs/2411.18620, the layout of figures 3-5

A picture is drawn from a CSV that a run wrote, never from numbers in memory: what is shown is what is on disk.
"""
import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

# Okabe and Ito's colours: told apart by colour-blind readers, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def figure(panels, title, x_label, y_label):
    """An empty figure with a panel per task: (figure, list of axes)."""
    import matplotlib
    matplotlib.use("Agg")                                           # a file, never a window
    from matplotlib import pyplot as plt
    columns = min(panels, 3)
    rows = -(-panels // columns)
    width = 5.0 if panels == 1 else 3.6
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns + 0.4, 2.9 * rows + 1.0), squeeze=False,
                             layout="constrained")
    axes = list(axes.flat)
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


def mean_interval(values):
    """values (n, x) -> mean and half-width of its 95 % interval (1.96 standard errors): (x,) each, 0 where n = 1."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    return values.mean(0), 1.96 * values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(values.shape[1])


def read(file, needed):
    """A run's CSV -> list of dict. ValueError: not readable, or a column is missing."""
    try:
        with open(file, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{file} is not a run's CSV ({getattr(e, 'strerror', None) or e})") from e
    missing = [c for c in needed if not rows or c not in rows[0]]
    if missing:
        raise ValueError(f"{file} has no rows" if not rows else f"{file} has no column {', '.join(missing)}")
    return rows


def save(fig, file):
    from matplotlib import pyplot as plt
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def knockout(file, picture):
    """knockout.csv -> a picture: a panel per task, a curve per edge, mean over questions with its 95 % interval.

    -> what was drawn: {(task, edge): (layers, mean changes in percent, number of questions)}
    """
    rows = read(file, ("task", "edge", "window", "layer", "change_percent", "question_id"))
    curves = defaultdict(lambda: defaultdict(dict))                 # task -> edge -> question -> {layer: change}
    for line, row in enumerate(rows, 2):
        question = curves[row["task"]][row["edge"]].setdefault((row["question_id"], row["window"]), {})
        try:
            question[int(row["layer"])] = float(row["change_percent"])
        except (TypeError, ValueError):
            raise ValueError(f"{file}, row {line}: layer or change_percent is not a number") from None
    if len({tuple(q) for by_edge in curves.values() for questions in by_edge.values() for q in questions.values()}) > 1:
        raise ValueError(f"{file} does not have the same layers for every question and edge")
    edges = list(dict.fromkeys(row["edge"] for row in rows))
    window = ", ".join(dict.fromkeys(row["window"] for row in rows))
    fig, axes = figure(len(curves), f"Attention knockout, window {window}", "layer at the centre of the window",
                       "change of P(answer), %")
    lines, drawn = {}, {}
    for ax, (task, by_edge) in zip(axes, curves.items(), strict=True):
        counts = []
        for edge, questions in by_edge.items():
            layers = sorted({l for q in questions.values() for l in q})
            values = [[q[l] for l in layers] for q in questions.values()]
            mean, half = mean_interval(values)
            colour = COLOURS[edges.index(edge) % len(COLOURS)]
            style = ("-", "--", ":")[edges.index(edge) // len(COLOURS) % 3]
            lines[edge], = ax.plot(layers, mean, style, color=colour, linewidth=1.6, marker="o", markersize=2.5)
            ax.fill_between(layers, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
            counts.append(len(values))
            drawn[task, edge] = layers, mean.tolist(), len(values)
        ax.axhline(0, color="#666666", linewidth=0.8, zorder=0)
        n = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"
        ax.set_title(f"{task} (n = {n})", fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True)
    legend = fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 3),
                        fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save(fig, picture)
    return drawn


def groups(image, prompt, boxes, annotated, picture):
    """One question's patch groups on its photo: a panel for the whole view, one for AnyRes tiles.

    image: PIL. prompt: llava_min.Prompt. boxes (n, 4): its patches on the photo. annotated: (x, y, w, h) px.
    """
    from matplotlib.patches import Rectangle
    first, named = prompt.groups["image"][0], prompt.groups
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
    parser.add_argument("csv", metavar="CSV", help="a knockout.csv")
    parser.add_argument("--out", metavar="PNG", help="the picture's file (beside the CSV)")
    args = parser.parse_args()
    picture = args.out or Path(args.csv).with_suffix(".png")
    knockout(args.csv, picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
