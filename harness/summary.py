"""
harness/summary.py - the lines that a run prints at its end, and the name of knockout.py's CSV.

Needs   numpy; plots.py, tables.py and runs.py beside it.
"""
from collections import defaultdict

import numpy as np

from harness.plots import MEASURES, measured
from harness.runs import text_hash
from harness.tables import rows


def csv_name(s, config):
    """The CSV that a run with knockout.Settings s writes. ValueError: --per-head asks for more heads than there are."""
    every = config.layers * len(s.heads or range(config.heads))
    if s.per_head > every:
        raise ValueError(f"--per-head {s.per_head}: there are {every} heads to rank")
    if s.joint:                                                     # more questions may rank other heads first
        return f"joint_{s.measure}_{len(s.joint)}_{text_hash(str(s.joint))[:6]}.csv"
    return "heads.csv" if s.per_head else "knockout.csv"


LINES = 10                                         # so many of a run's curves are printed


def peaks(drawn, text, rank=abs, least=0, nothing=""):
    """What a function of plots.py returned -> lines, one for each of the LINES curves with the highest peaks.

    drawn: {(task, name): (layers, means, number of questions)}. text: a format of the peak and its layer. rank(value):
    how high it is; below `least`, `nothing` is said instead.
    """
    tops = [(*max(zip(mean, layers, strict=True), key=lambda pair: rank(pair[0])), task, name, n)
            for (task, name), (layers, mean, n) in drawn.items()]
    tops.sort(key=lambda top: -rank(top[0]))
    for value, layer, task, name, n in tops[:LINES]:
        peak = nothing if nothing and rank(value) < least else text.format(value, layer)
        yield f"{task}, {name}: {peak} (n = {n})"
    if len(tops) > LINES:
        yield f"{len(tops) - LINES} more curves: see the picture"


def knockout_lines(drawn, measure="first"):
    """What plots.knockout returned -> those lines."""
    unit, least, shown = ("%", 0.05, "{:+.1f}") if measure == "first" else ("nats", 0.0005, "{:+.3f}")
    return peaks(drawn, f"largest mean change {shown} {unit}, around layer {{}}", abs, least,
                 f"no change of {least:g} {unit} in any layer")


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
