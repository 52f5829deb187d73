"""
harness/photos.py - pictures of one question: words over layers and positions, and what lies on which patch.

Needs   matplotlib and numpy; canvas.py and curves.py beside it.
"""
from collections import defaultdict

import numpy as np

from harness.canvas import COLOURS, figure, finish, in_words, page, save, set_title
from harness.curves import heading


def words(title, columns, cells, shares, picture):
    """A grid of words, layer 0 at the bottom, coloured by probability. title: its lines. cells, shares: a row per
    layer, a column per name in `columns`."""
    shares, longest = np.asarray(shares), max(len(word) for row in (columns, *cells) for word in row)
    wide = max(5.0, 0.8 + len(columns) * max(0.6, 0.09 * longest))
    fig = page(wide, 1.5 + 0.24 * len(cells))
    ax = fig.subplots()
    shown = ax.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    for y, row in enumerate(cells):
        for x, word in enumerate(row):
            ax.text(x, y, word, ha="center", va="center", fontsize=7,
                    color="white" if shares[y, x] > 0.55 else "black")
    ax.set_xticks(range(len(columns)), columns, fontsize=8, rotation=0 if max(map(len, columns)) < 6 else 30)
    ax.set_yticks(range(len(cells)), range(len(cells)), fontsize=7)
    ax.set_ylabel("after layer (0: embedding)", fontsize=9)
    fig.colorbar(shown, label="probability", shrink=0.6)
    set_title(fig, *title)
    save(fig, picture)


def show(ax, image, alpha=1.0):
    """The photo (PIL), for other things to be drawn over."""
    ax.imshow(image, alpha=alpha)
    ax.grid(False)
    ax.axis("off")


def patch_words(image, title, boxes, cells, shares, picture):
    """Words over the patches of a photo, coloured by probability; a panel for each of the two most frequent sizes.

    image: PIL. title: its lines. boxes (n, 4): x0, y0, x1, y1 of each patch on the photo, NaN for none. cells, shares:
    n each.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Rectangle
    sizes = defaultdict(list)                                       # patches of the whole view and of tiles differ
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if x0 == x0:
            sizes[round((x1 - x0) * (y1 - y0), 1)].append(i)
    kinds = sorted(sorted(sizes.values(), key=len)[-2:], key=len)
    fig, axes = figure(len(kinds), "", "", "")
    fig.set_size_inches(fig.get_size_inches() * (1 + max(map(len, kinds)) ** 0.5 / 12))
    set_title(fig, *title)
    for ax, mine in zip(axes, kinds, strict=True):
        show(ax, image, 0.6)
        for i in mine:
            x0, y0, x1, y1 = boxes[i].tolist()
            ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=colormaps["Blues"](shares[i]),
                                   alpha=0.45, edgecolor="white", linewidth=0.3))
            room = 72 * fig.get_figwidth() / len(kinds) * (x1 - x0) / image.width           # points
            ax.text((x0 + x1) / 2, (y0 + y1) / 2, cells[i][:9], ha="center", va="center",
                    fontsize=min(10, room / 6))
        ax.set_title(f"{len(mine)} patches", fontsize=8)
    bar = fig.colorbar(ScalarMappable(cmap="Blues"), ax=axes, shrink=0.7, alpha=0.45)
    bar.set_label("probability of the word", fontsize=8)
    save(fig, picture)


def maps(image, rows, change, picture):
    """map.csv's rows, as dicts, -> a picture: the photo, and over it what is attended to and what a cut changes.

    image: PIL. change: (column, label) of what is drawn of the cuts. AnyRes tiles have panels of their own.
    """
    save(maps_figure(image, rows, change), picture)


def maps_figure(image, rows, change):
    """The same -> the figure."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle
    first = rows[0]
    views = [kind for kind in ([row for row in rows if row["view"] == 0], [row for row in rows if row["view"]]) if kind]
    columns = [c for c in (("attention", "attention, % of a query's total"), change) if first[c[0]] != ""]
    cuts = "all layers" if first["all_layers"] else (
        f"layer {first['layer']}" + (f", window {first['window']}" if first["window"] != 1 else ""))
    fig, axes = figure(1 + len(columns) * len(views), "", "", "")
    set_title(fig, heading(first), f"blocks of the photo \u2192 {first['target']}",
              ", ".join(first[key] for key in ("model", "dtype") if first.get(key)))
    for ax in axes:
        show(ax, image)
    axes[0].set_title("the photo", fontsize=8)
    panels = iter(axes[1:])
    for name, label in columns:
        scale, signed = (100, False) if name == "attention" else (1, True)
        most = max(1e-9, max(abs(scale * row[name]) for row in rows))
        tint, norm = colormaps["RdBu" if signed else "viridis"], Normalize(-most * signed, most)
        for mine in views:
            ax = next(panels)
            for row in mine:
                if row["x0"] != "":                                 # a patch of padding is nowhere on the photo
                    ax.add_patch(Rectangle((row["x0"], row["y0"]), row["x1"] - row["x0"], row["y1"] - row["y0"],
                                           linewidth=0, facecolor=tint(norm(scale * row[name])), alpha=0.8))
            where = (cuts if signed else f"layer {first['layer']}") + ", tiles" * (len(views) > 1 and mine is views[1])
            ax.set_title(f"{label.split(',')[0]}, {where}", fontsize=8)
            fig.colorbar(ScalarMappable(norm, tint), ax=ax, shrink=0.7).set_label(label, fontsize=8)
    return finish(fig)


def groups(image, grouped, boxes, annotated, picture):
    """One question's patch groups on its photo: a panel for the whole view, one for AnyRes tiles.

    image: PIL. grouped: groups.Groups. boxes (n, 4): its patches on the photo. annotated: (x, y, w, h) px.
    """
    from matplotlib.patches import Rectangle
    prompt, named = grouped.prompt, grouped.named
    first = prompt.image.start
    kinds = [k for k in ("base_patches", "tile_patches") if k in named]
    fig, axes = figure(len(kinds), "", "", "")
    set_title(fig, prompt.question, f"{len(named['image'])} image tokens")
    for ax, kind in zip(axes, kinds, strict=True):
        show(ax, image)
        related = set(named.get("related_patches", ()))
        for i in named[kind]:
            x0, y0, x1, y1 = boxes[i - first].tolist()
            if x0 == x0:                                            # NaN: a patch of padding
                ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=i in related, facecolor=COLOURS[1] + "66",
                                       edgecolor="white", linewidth=0.25))
        for x, y, w, h in annotated:
            ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=COLOURS[3], linewidth=1.5))
        related_here = f", {len(related.intersection(named[kind]))} related" if "related_patches" in named else ""
        ax.set_title(f"{in_words(kind)}: {len(named[kind])}{related_here}", fontsize=9)
    save(fig, picture)
