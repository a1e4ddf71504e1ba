"""Arrivals: when the requests come, in seconds from the start, on the host.

Place on the road: [arrivals] -> workload -> system -> load -> cost model -> clock.
"""

from __future__ import annotations

import numpy as np

QUANTUM_S = 0.01  # the paper's driver counts arrivals in these
_QUANTA_PER_S = 100


def poisson(rate: float, duration: float, seed: int) -> np.ndarray:
    """Arrivals of the paper's driver, f64[N], sorted.

    The number in each 10 ms is drawn from a Poisson distribution, and they come at its
    beginning. A seed gives the very arrivals that it gave the authors.

    Args:
      rate: requests per second.
      duration: seconds, in whole quanta of 10 ms.

    Raises:
      ValueError: a rate or a duration that is not positive, or a fraction of a quantum.

    >>> poisson(rate=0.5, duration=600, seed=0)[:3].tolist()
    [1.49, 5.94, 6.17]

    Source: the driver of the artifact of Kwon et al. 2023, Section 6.1.
    """
    _check_positive(rate=rate, duration=duration)
    num_quanta = round(duration * _QUANTA_PER_S)
    if abs(num_quanta - duration * _QUANTA_PER_S) > 1e-6:
        raise ValueError(
            f"duration: wanted a multiple of {QUANTUM_S} s, got {duration}; "
            f"use {max(num_quanta, 1) / _QUANTA_PER_S}"
        )
    # The legacy generator: its stream is the global one's, which the driver seeded.
    random = np.random.RandomState(seed)
    counts = random.poisson(rate * QUANTUM_S, size=num_quanta)
    return np.repeat(np.arange(num_quanta) * QUANTUM_S, counts)


def gamma(rate: float, cv: float, duration: float, seed: int) -> np.ndarray:
    """Arrivals with gaps from a gamma distribution, f64[N], sorted.

    Args:
      rate: requests per second.
      cv: the gaps' standard deviation divided by their mean: 1 is a Poisson process, 0
        a steady beat; above 1 they come in bursts.
      duration: seconds.

    Raises:
      ValueError: a rate or a duration that is not positive, or a cv below 0.
    """
    _check_positive(rate=rate, duration=duration)
    if not (cv >= 0 and np.isfinite(cv)):
        raise ValueError(f"cv: wanted a number of at least 0, got {cv}")
    random = np.random.default_rng(seed)
    pieces, end = [], 0.0
    while end < duration:
        count = max(16, int(1.2 * rate * (duration - end)))
        if cv == 0:
            gaps = np.full(count, 1 / rate)
        else:
            gaps = random.gamma(cv**-2, cv**2 / rate, size=count)
        pieces.append(end + np.cumsum(gaps))
        end = float(pieces[-1][-1])
    arrivals = np.concatenate(pieces)
    return arrivals[arrivals < duration]


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (number > 0 and np.isfinite(number)):
            raise ValueError(f"{name}: wanted a positive number, got {number}")
