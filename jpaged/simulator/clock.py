"""Clock: virtual time in two 32-bit integers, exact over days.

Pipeline: cost model -> seconds -> [clock] -> times of requests.

After an hour, seconds in float32 are too imprecise for the duration of a step, and the
error of a sum grows with the length of the run. Integers of seconds and microseconds
are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.arithmetic import floor_div

MICROSECONDS = 1_000_000


class VirtualTime(NamedTuple):
    """A point in time, or an array of them."""

    seconds: jax.Array  # i32
    micros: jax.Array  # i32, from 0 to 999,999

    @classmethod
    def zero(cls) -> VirtualTime:
        """Return time 0."""
        return cls(jnp.int32(0), jnp.int32(0))

    @classmethod
    def at(cls, times: np.ndarray) -> VirtualTime:
        """Convert `times`, f64 seconds of at least 0, to the nearest microsecond."""
        micros = np.rint(np.asarray(times, np.float64) * MICROSECONDS).astype(np.int64)
        seconds, micros = np.divmod(micros, MICROSECONDS)
        return cls(jnp.asarray(seconds, jnp.int32), jnp.asarray(micros, jnp.int32))

    def take(self, index: jax.Array) -> VirtualTime:
        """Select entries of an array of times; past the end, the last one."""
        return jax.tree.map(lambda part: part.at[index].get(mode="clip"), self)

    def after(self, duration: jax.Array) -> VirtualTime:
        """Return the time `duration` later, f32 seconds."""
        whole = jnp.floor(duration)
        part = jnp.rint((duration - whole) * MICROSECONDS).astype(jnp.int32)
        micros = self.micros + part
        carry = (micros >= MICROSECONDS).astype(jnp.int32)
        seconds = self.seconds + whole.astype(jnp.int32) + carry
        return VirtualTime(seconds, micros - carry * MICROSECONDS)

    def is_before(self, other: VirtualTime) -> jax.Array:
        """Return bool: this time is strictly earlier than `other`."""
        is_same = self.seconds == other.seconds
        return (self.seconds < other.seconds) | (is_same & (self.micros < other.micros))

    def latest(self, other: VirtualTime) -> VirtualTime:
        """Return the later of the two times."""
        return jax.tree.map(
            lambda a, b: jnp.where(self.is_before(other), b, a), self, other
        )

    @property
    def milliseconds(self) -> jax.Array:
        """Whole milliseconds, i32; they wrap around after 24 days."""
        return self.seconds * 1000 + floor_div(self.micros, 1000)

    def as_seconds(self) -> np.ndarray:
        """Convert to f64 seconds; host only."""
        seconds = np.asarray(self.seconds).astype(np.float64)
        return seconds + np.asarray(self.micros).astype(np.float64) / MICROSECONDS
