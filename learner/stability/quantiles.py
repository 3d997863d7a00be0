"""Quantiles of importance ratios from counts, so that ranks add counts and never send tokens."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Final

SMALLEST, LARGEST, NUM_STEPS = 1e-4, 20.0, 120
"""Log-ratios between these, either sign, are told apart to a tenth of their size; smaller ones count as zero."""
_SIZES: Final = [SMALLEST * (LARGEST / SMALLEST) ** (number / (NUM_STEPS - 1)) for number in range(NUM_STEPS)]
EDGES: Final[tuple[float, ...]] = (*(-size for size in reversed(_SIZES)), *_SIZES)
"""Ascending log-ratios; bin i holds those above EDGES[i-1] up to EDGES[i], the last one those above all: len(EDGES) + 1 bins."""
SHARES: Final = {"ratio_p01": 0.01, "ratio_p10": 0.1, "ratio_p50": 0.5, "ratio_p90": 0.9, "ratio_p99": 0.99}


def quantile(counts: Sequence[float], share: float) -> float:
    """The log-ratio below which a `share` of the tokens counted lies, by interpolation in its bin; 0 if there are none."""
    total = sum(counts)
    if total <= 0:
        return 0.0
    sums, running = [], 0.0
    for count in counts:
        running += count
        sums.append(running)
    wanted = share * total
    index = min(bisect.bisect_left(sums, wanted), len(counts) - 1)
    if index == NUM_STEPS:
        return 0.0
    low, high = EDGES[max(index - 1, 0)], EDGES[min(index, len(EDGES) - 1)]
    inside = (wanted - (sums[index] - counts[index])) / counts[index] if counts[index] else 0.0
    return low + (high - low) * inside


def ratio_quantiles(counts: Sequence[float]) -> dict[str, float]:
    """Importance ratios by name, from the counts of their logarithms."""
    return {name: math.exp(quantile(counts, share)) for name, share in SHARES.items()}
