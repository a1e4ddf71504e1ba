"""Clock: virtual time, exact over days, in two 32-bit integers.

Place on the road: cost model -> seconds -> [clock] -> times of requests.

A float32 of seconds is a step off after an hour, and what a run adds up would depend on
its length. Whole seconds and microseconds do not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MICROSECONDS = 1_000_000


class Clock(NamedTuple):
    """A moment, or an array of them."""

    seconds: jax.Array  # i32
    micros: jax.Array  # i32, from 0 to below a million

    @classmethod
    def zero(cls) -> Clock:
        """The moment 0."""
        return cls(jnp.int32(0), jnp.int32(0))

    @classmethod
    def at(cls, times: np.ndarray) -> Clock:
        """The moments `times`, f64 seconds from 0 on, to the nearest microsecond."""
        micros = np.rint(np.asarray(times, np.float64) * MICROSECONDS).astype(np.int64)
        seconds, micros = np.divmod(micros, MICROSECONDS)
        return cls(seconds.astype(np.int32), micros.astype(np.int32))

    def take(self, index: jax.Array) -> Clock:
        """Of an array of moments those at `index`; behind the last, the last."""
        return jax.tree.map(lambda part: part.at[index].get(mode="clip"), self)

    def after(self, duration: jax.Array) -> Clock:
        """The moment `duration` f32 seconds later."""
        whole = jnp.floor(duration)
        part = jnp.rint((duration - whole) * MICROSECONDS).astype(jnp.int32)
        micros = self.micros + part
        carry = (micros >= MICROSECONDS).astype(jnp.int32)
        seconds = self.seconds + whole.astype(jnp.int32) + carry
        return Clock(seconds, micros - carry * MICROSECONDS)

    def is_before(self, other: Clock) -> jax.Array:
        """bool: strictly earlier."""
        is_same = self.seconds == other.seconds
        return (self.seconds < other.seconds) | (is_same & (self.micros < other.micros))

    def latest(self, other: Clock) -> Clock:
        """The later of the two."""
        return jax.tree.map(
            lambda a, b: jnp.where(self.is_before(other), b, a), self, other
        )

    def as_seconds(self) -> np.ndarray:
        """f64 seconds; host side."""
        seconds = np.asarray(self.seconds).astype(np.float64)
        return seconds + np.asarray(self.micros).astype(np.float64) / MICROSECONDS
