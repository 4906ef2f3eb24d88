"""Axes: from numbers to pixels, and the ticks between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis from `low` at pixel `start` to `high` at pixel `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; values outside are drawn at the end that they left."""
        value = min(max(value, self.low), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis, about six."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def linear_scale(values: Sequence[float], start: float, stop: float, *, from_zero: bool = False) -> Scale:
    """A linear axis with some air around finite values."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(0.0 if from_zero else low - air, high + air, start, stop)


def log_scale(values: Sequence[float], start: float, stop: float) -> Scale:
    """A logarithmic axis with some air around positive values."""
    low, high = min(values), max(values)
    air = max((high / low) ** 0.06, 1.25)
    return Scale(low / air, high * air, start, stop, log=True)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**d for d in decades if low <= 10.0**d <= high]
    if len(whole) > 8:
        return whole[:: math.ceil(len(whole) / 8)]
    if len(whole) >= 3:
        return whole
    finer = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return finer if len(finer) >= 2 else _linear_ticks(low, high)


def tick_text(value: float) -> str:
    """A tick's number, short."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.6g}"
