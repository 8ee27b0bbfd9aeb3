"""Contrasts of independent samples: Welch's standard error, Satterthwaite's degrees of freedom, Holm's correction.

A contrast is a sum of means, each times a factor. Welch, Biometrika 34 (1947); Satterthwaite, Biometrics Bulletin 2
(1946); Holm, Scandinavian Journal of Statistics 6 (1979).
"""

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import NamedTuple

from scipy.stats import t as student

Sample = tuple[float, Sequence[float]]  # factor, values


class Estimate(NamedTuple):
    """A contrast; `error` is its standard error, None where a sample has a single value."""

    mean: float
    error: float | None
    freedom: float

    def interval(self, level: float) -> tuple[float, float] | None:
        """The two-sided confidence interval, e.g. of level 0.95."""
        if self.error is None:
            return None
        half = float(student.isf((1 - level) / 2, self.freedom)) * self.error
        return self.mean - half, self.mean + half

    def p_value(self, bound: float) -> float:
        """Two-sided, for the hypothesis that the contrast is `bound`; 1 if there is no standard error."""
        distance = abs(self.mean - bound)
        if self.error is None or distance == 0 or math.isinf(bound):
            return 0.0 if math.isinf(bound) and self.error is not None else 1.0
        return 0.0 if self.error == 0 else float(2 * student.sf(distance / self.error, self.freedom))


def contrast(samples: Sequence[Sample]) -> Estimate:
    """The sum of factor * mean(values)."""
    mean = sum(factor * fmean(values) for factor, values in samples)
    if any(len(values) < 2 for _, values in samples):
        return Estimate(mean, None, 0.0)
    parts = [(factor**2 * variance(values) / len(values), len(values) - 1) for factor, values in samples]
    total = sum(part for part, _ in parts)
    below = sum(part**2 / freedom for part, freedom in parts)
    return Estimate(mean, math.sqrt(total), total**2 / below if below else math.inf)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: one is below alpha where Holm's step-down procedure rejects at alpha."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def seeds_to_decide(estimate: Estimate, seeds: int, distance: float, alpha: float) -> int | None:
    """About how many seeds per group would separate the contrast from a bound at `distance`, with effect and spread as
    they are; None above 1000.

    Args:
        seeds: of the groups of `estimate`, the fewest.
    """
    if estimate.error is None or distance == 0:
        return None
    for count in range(max(2, seeds), 1001):
        scale = math.sqrt(seeds / count)
        freedom = estimate.freedom * count / seeds
        if float(student.isf(alpha / 2, freedom)) * estimate.error * scale < distance:
            return count
    return None
