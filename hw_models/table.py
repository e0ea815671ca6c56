"""Latency tables of layers measured elsewhere: CSV with the columns ``layer, choice, seconds``.

The optional columns ``batch`` and ``dtype`` describe the measurement; they hold the same value in
every row and are checked. ``sigma`` is the standard deviation of a row. A row whose layer is
``remainder`` (``rest`` in older tables) holds the time outside the layers. Other columns are
ignored.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd

from rankNAS.allocation import Choice
from rankNAS.exceptions import UsageError
from rankNAS.hw_models.base import HardwareModel, Progress, dtype_of
from rankNAS.search_spaces.base import Layer, SearchSpace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankNAS.trees import Inputs

__all__ = ["MeasuredTable"]

logger = logging.getLogger(__name__)
REMAINDER = "remainder", "rest"  # the second is the name in version 0.1
Key = tuple[str, str]


@final
@dataclass(frozen=True)
class MeasuredTable(HardwareModel):
    """Latency in seconds by layer and choice, measured on another device.

    A missing choice is predicted: by linear interpolation between two ranks of the same layer and
    operator; otherwise by a linear fit in multiply-adds to all measurements, with a warning that
    names it.

    Args:
        seconds: Latency by layer and choice.
        sigma: Standard deviations, for the same keys.
        batch: Batch size of the measurement; None if unknown.
        dtype: Dtype of the measurement; None if unknown.
        strict: Raise an error instead of using the linear fit.
        name: The name given by the user.
        slope: Seconds per multiply-add, intercept and residual; set by `bind`.
        warned: Layers and operators already warned about.
    """

    seconds: dict[Key, float]
    sigma: dict[Key, float] = field(default_factory=dict)
    batch: int | None = None
    dtype: str | None = None
    strict: bool = False
    name: str = "table"
    slope: tuple[float, float, float] | None = None
    warned: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def read(cls, path: Path | str, *, strict: bool = False) -> MeasuredTable:
        """The table in a CSV file.

        Raises:
            UsageError: It cannot be read, a column is missing, a row is duplicated, or a number is
                missing or not positive.
        """
        try:
            rows = pd.read_csv(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"table {str(path)!r} cannot be read: {error}.") from None
        if missing := [c for c in ("layer", "choice", "seconds") if c not in rows.columns]:
            raise UsageError(
                f"table {str(path)!r} has no column {missing[0]!r}; it needs layer, choice and "
                f"seconds, and has {', '.join(rows.columns)}."
            )
        keys = list(zip(rows.layer.astype(str), rows.choice.astype(str), strict=True))
        for key, value in zip(keys, rows.seconds, strict=True):
            if not (_is_number(value) and value > 0):
                raise UsageError(
                    f"table {str(path)!r}: layer {key[0]!r} as {key[1]} takes {value} seconds; "
                    "expected a positive number."
                )
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UsageError(f"table {str(path)!r} gives layer {twice[0]!r} as {twice[1]} twice.")
        sigma = rows.sigma if "sigma" in rows.columns else [0.0] * len(rows)
        batch, dtype = (_constant(rows, name, path) for name in ("batch", "dtype"))
        return cls(
            dict(zip(keys, map(float, rows.seconds), strict=True)),
            {k: float(s) for k, s in zip(keys, sigma, strict=True) if _is_number(s) and s > 0},
            None if batch is None else _batch(batch, path),
            dtype,
            strict,
            Path(path).stem,
        )

    def bind(
        self,
        network: nn.Module | None,
        space: SearchSpace,
        inputs: Inputs | Tensor | None = None,
        on_progress: Progress | None = None,
    ) -> MeasuredTable:
        batch = space.batch_size
        if self.batch is not None and self.batch != batch:
            raise UsageError(
                f"table {self.name!r} was measured at batch size {self.batch}, but {batch} is "
                "asked for; measure again, or ask for that batch size."
            )
        for layer in space.layers.values():
            if self.dtype is not None and self.dtype != dtype_of(layer.shape):
                raise UsageError(
                    f"table {self.name!r} was measured with {self.dtype} weights, but layer "
                    f"{layer.name!r} has {dtype_of(layer.shape)}."
                )
        known = {(n, str(c)): x[c].macs for n, x in space.layers.items() for c in x}
        points = [(known[key], value) for key, value in self.seconds.items() if key in known]
        if not points:
            raise UsageError(
                f"table {self.name!r} has none of the model's layers and choices; it has "
                f"{', '.join(list(dict.fromkeys(n for n, _ in self.seconds))[:5])}, the model "
                f"{', '.join(list(space.layers)[:5])}."
            )
        return replace(self, slope=_line(points))

    def latency(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        key = layer.name, str(choice)
        if key in self.seconds:
            return self.seconds[key], self.sigma.get(key, 0.0)
        if (between := self._between(layer, choice)) is not None:
            return between
        if self.strict:
            raise UsageError(
                f"table {self.name!r} has no layer {layer.name!r} as {choice}; measure it, or "
                "allow for a prediction from its multiply-adds (without --strict-hw)."
            )
        if self.slope is None:
            raise UsageError(f"table {self.name!r} has not been bound to a space.")
        self._warn(layer, choice)
        slope, intercept, residual = self.slope
        return intercept + slope * layer[choice].macs, residual

    def remainder_cost(self, space: SearchSpace) -> tuple[float, float]:
        found = [(s, self.sigma.get(k, 0.0)) for k, s in self.seconds.items() if k[0] in REMAINDER]
        return found[0] if found else (0.0, 0.0)

    def _warn(self, layer: Layer, choice: Choice) -> None:
        """Warn once per layer and operator."""
        kind = f"{layer.name!r} as {choice.operator}"
        if kind not in self.warned:
            self.warned.add(kind)
            logger.warning(
                "table %r has not seen layer %s (%s) or ranks around it; such times are predicted "
                "from multiply-adds",
                self.name,
                kind,
                choice,
            )

    def _between(self, layer: Layer, choice: Choice) -> tuple[float, float] | None:
        """Linear interpolation between the nearest measured ranks of the same family."""
        if not choice.rank:
            return None
        below, above = None, None
        for other in layer:
            key = layer.name, str(other)
            family = other.operator, other.rank[:-1]
            if key not in self.seconds or family != (choice.operator, choice.rank[:-1]):
                continue
            rank = other.rank[-1]
            if rank < choice.rank[-1] and (below is None or rank > below[0]):
                below = rank, key
            if rank > choice.rank[-1] and (above is None or rank < above[0]):
                above = rank, key
        if below is None or above is None:
            return None
        share = (choice.rank[-1] - below[0]) / (above[0] - below[0])
        weights = (1 - share, below[1]), (share, above[1])
        seconds = sum(w * self.seconds[key] for w, key in weights)
        return seconds, math.hypot(*(w * self.sigma.get(key, 0.0) for w, key in weights))


def _line(points: list[tuple[int, float]]) -> tuple[float, float, float]:
    """Non-negative slope and intercept of a linear fit, and the residual standard deviation."""
    x, y = np.array(points, dtype=float).T
    slope, intercept = 0.0, float(y.mean())
    if np.ptp(x) > 0:
        slope, intercept = (float(v) for v in np.polyfit(x, y, 1))
    if intercept < 0:
        slope, intercept = float(x @ y / (x @ x)), 0.0
    elif slope < 0:
        slope, intercept = 0.0, float(y.mean())
    return slope, intercept, float(np.std(y - intercept - slope * x))


def _constant(rows: pd.DataFrame, column: str, path: Path | str) -> str | None:
    if column not in rows.columns:
        return None
    values = rows[column].astype(str).unique()
    if len(values) != 1:
        raise UsageError(
            f"table {str(path)!r} mixes figures for {column} {' and '.join(values[:3])}; keep the "
            "rows of one."
        )
    return str(values[0])


def _batch(text: str, path: Path | str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"table {str(path)!r} gives the batch size {text!r}; expected an integer."
        ) from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
