"""One budget for a whole run, divided as it goes: what is left over the rows that are left."""

import time
from collections.abc import Callable
from statistics import mean

FIRST_COMPILE = 20.0  # seconds: it also loads the compiler and precompiles headers
_COMPILE = 3.0  # seconds that compiling one candidate takes, until measured
_FIXED = 1.0  # seconds to prove a row and make its inputs, until a row was not compiled
_LEAST = 0.1  # seconds of timing below which a ratio is not worth printing


class Budget:
    """`seconds` for `rows` rows, each timed for at most `most` seconds.

    Compiling is what a short budget does without first, and in the order of rank: an op's main row
    is compiled before the other rows of any op are.
    """

    def __init__(
        self,
        seconds: float,
        ranks: list[int],
        most: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock, self.most = clock, most
        self.end = clock() + seconds
        self.ranks = list(ranks)  # of the rows that are still to come
        self._fixed: list[float] = []
        self._compiles: list[float] = []

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - self.clock()

    def enough(self) -> bool:
        """Whether another row fits: none is begun that would end late."""
        return self.left >= self._overhead + _LEAST

    def timing(self) -> float:
        """Seconds to time the next row for."""
        share = self.left / max(len(self.ranks), 1) - self._overhead
        return min(max(share, _LEAST), self.most)

    def compiles(self) -> bool:
        """Whether the next row may be compiled, which leaves the later rows their share."""
        rank = self.ranks[0]
        spare = self.left - len(self.ranks) * (self._overhead + self.most / 2)
        before = sum(other < rank for other in self.ranks[1:])
        price = self._price
        if not self._compiles:
            price += FIRST_COMPILE
        return spare >= price + before * self._price

    def spent(self, seconds: float, timing: float, compiled: bool) -> None:
        """Tells that a row took `seconds`, `timing` of which it was given, compiled or not."""
        self.ranks.pop(0)
        extra = max(seconds - timing, 0.0)
        if not compiled:
            self._fixed.append(extra)
        elif self._compiles or extra < FIRST_COMPILE:
            self._compiles.append(max(extra - self._overhead, 0.1))
        else:
            self._compiles.append(_COMPILE)  # the first one says nothing about the next

    @property
    def _overhead(self) -> float:
        return mean(self._fixed[-20:]) if self._fixed else _FIXED

    @property
    def _price(self) -> float:
        return mean(self._compiles[-20:]) if self._compiles else _COMPILE
