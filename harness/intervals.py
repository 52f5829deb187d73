"""
harness/intervals.py - 95 % intervals: of a mean curve, of a share, of a change in accuracy.

Needs   numpy. Nothing else of this repo: copy it and it works.
"""
import math

import numpy as np

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

    def add(self, curve, interval=True):
        curve = np.asarray(curve, dtype=float)                      # (x,)
        self.n, self.total = self.n + 1, self.total + curve
        if interval:
            weights = self.random.poisson(1.0, DRAWS)
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
