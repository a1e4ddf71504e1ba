"""Arrivals: the times at which requests arrive, in seconds from the start.

Pipeline: [arrivals] -> workload -> system -> step load -> cost model. Host only.

Shape symbols: N requests.
"""

from __future__ import annotations

import numpy as np

QUANTUM_S = 0.01  # arrival times of the paper's driver are multiples of it
_QUANTA_PER_S = 100


def poisson(rate: float, duration: float, seed: int) -> np.ndarray:
    """Sample the arrivals of the paper's driver.

    The number of arrivals in each 10 ms is sampled from a Poisson distribution, and all
    of them arrive at its start. A seed gives exactly the arrivals of the authors.

    Args:
      rate: requests per second.
      duration: seconds, a multiple of 10 ms.
      seed: of NumPy's legacy generator.

    Returns:
      f64[N], seconds, sorted.

    Raises:
      ValueError: rate or duration is not positive, or duration is not a multiple of
        10 ms.

    >>> poisson(rate=0.5, duration=600, seed=0)[:3].tolist()
    [1.49, 5.94, 6.17]

    Source: the driver of the artifact of Kwon et al. 2023, Section 6.1.
    """
    _check_positive(rate=rate, duration=duration)
    num_quanta = round(duration * _QUANTA_PER_S)
    if abs(num_quanta - duration * _QUANTA_PER_S) > 1e-6:
        raise ValueError(
            f"duration: expected a multiple of {QUANTUM_S} s, got {duration}; "
            f"use {max(num_quanta, 1) / _QUANTA_PER_S}"
        )
    # The legacy generator has the stream of the global one, which the driver seeds.
    random = np.random.RandomState(seed)
    counts = random.poisson(rate * QUANTUM_S, size=num_quanta)
    return np.repeat(np.arange(num_quanta) * QUANTUM_S, counts)


def gamma(rate: float, cv: float, duration: float, seed: int) -> np.ndarray:
    """Sample arrivals with gaps from a gamma distribution.

    Args:
      rate: requests per second.
      cv: standard deviation of the gaps divided by their mean. 1 is a Poisson process,
        0 means equal gaps, and values above 1 mean bursts.
      duration: seconds.
      seed: of NumPy's default generator.

    Returns:
      f64[N], seconds, sorted.

    Raises:
      ValueError: rate or duration is not positive, or cv is negative.
    """
    _check_positive(rate=rate, duration=duration)
    if not (cv >= 0 and np.isfinite(cv)):
        raise ValueError(f"cv: expected a number of at least 0, got {cv}")
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
            raise ValueError(f"{name}: expected a positive number, got {number}")
