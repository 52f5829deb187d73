"""
harness/summary.py - what a run of knockout.py is called, and the lines that it prints at its end.

Needs   numpy; plots.py and runs.py beside it.
"""
from collections import defaultdict

import numpy as np

from harness.plots import MEASURES, measured, rows
from harness.runs import text_hash


def csv_name(s, config):
    """The CSV that a run with knockout.Settings s writes. ValueError: --per-head asks for more heads than there are."""
    every = config.layers * len(s.heads or range(config.heads))
    if s.per_head > every:
        raise ValueError(f"--per-head {s.per_head}: there are {every} heads to rank")
    if s.joint:                                                     # more questions may rank other heads first
        return f"joint_{s.measure}_{len(s.joint)}_{text_hash(str(s.joint))[:6]}.csv"
    return "heads.csv" if s.per_head else "knockout.csv"


LINES = 10                                         # so many of a run's curves are printed


def knockout_lines(drawn, measure="first"):
    """What `knockout` returns -> a line for each of the curves that change most: its largest mean change."""
    unit, least = ("%", 0.05) if measure == "first" else ("nats", 0.0005)
    peaks = [(*max(zip(mean, layers, strict=True), key=lambda pair: abs(pair[0])), task, edge, n)
             for (task, edge), (layers, mean, n) in drawn.items()]
    peaks.sort(key=lambda peak: -abs(peak[0]))
    for change, layer, task, edge, n in peaks[:LINES]:
        shown = f"{change:+.1f}" if measure == "first" else f"{change:+.3f}"
        yield (f"{task}, {edge}: largest mean change {shown} {unit}, around layer {layer} (n = {n})"
               if abs(change) >= least else f"{task}, {edge}: no change of {least:g} {unit} in any layer (n = {n})")
    if len(peaks) > LINES:
        yield f"{len(peaks) - LINES} more curves change less than these: see the picture"


def joint_lines(file, measure="first"):
    """joint.csv -> a line that compares the heads that rank first, cut together, with random sets of as many."""
    change = defaultdict(list)
    for row in rows(file, ("edge", MEASURES[measure][0])):
        if (value := measured(file, row, measure)) is not None:
            change[row["edge"]].append(value)
    (first, top), *others = ((name, np.mean(values)) for name, values in change.items())
    values = [value for _, value in others]
    edge, _, what = first.rpartition(", ")
    return [f"{edge}, the {what} together: {top:+.3f} (n = {len(change[first])}); {len(values)} random sets of as "
            f"many: {np.mean(values):+.3f}, from {min(values):+.3f} to {max(values):+.3f} ({MEASURES[measure][2]})"]
