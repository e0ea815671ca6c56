"""Times of stages that were not measured, from those that were: a Gaussian process.

The logarithm of a stage's time is a linear function of the logarithms of its work, its traffic and
its sizes, plus a Gaussian process of these and of how its channels fill the vector units.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rankNAS.decompositions import LayerShape

if TYPE_CHECKING:
    from sklearn.gaussian_process import GaussianProcessRegressor

__all__ = ["StageRegression", "kind_of", "traffic"]

Array = npt.NDArray[np.float64]
RIDGE = 1e-3
VECTOR = 16  # channels that vector units work on at once, whatever their exact width


@dataclass(frozen=True)
class StageRegression:
    """The posterior of a Gaussian process on stages.

    Args:
        kinds: Of the stages it was fitted to, see `kind_of`.
        centre: Of the features, (features,).
        scale: Likewise.
        weights: Of the linear part, with its constant last.
        process: Fitted to what the linear part leaves.
    """

    kinds: frozenset[str]
    centre: Array
    scale: Array
    weights: Array
    process: GaussianProcessRegressor

    @classmethod
    def fit(
        cls, shapes: Sequence[LayerShape], seconds: Sequence[float], sigma: Sequence[float]
    ) -> StageRegression:
        """Fit to measured stages, each with one call.

        Args:
            shapes: At least one.
            seconds: Their times.
            sigma: Standard deviations of these.
        """
        # Not at the top: few of those who use hardware models need it.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        X = np.array([_features(shape) for shape in shapes])
        centre, scale = X.mean(0), X.std(0)
        scale[scale < 1e-9] = 1.0
        Z = (X - centre) / scale
        y = np.log(np.array(seconds, dtype=float))
        A = np.column_stack([Z, np.ones(len(Z))])
        penalty = RIDGE * len(Z) * np.diag([*np.ones(Z.shape[1]), 0.0])
        weights = np.linalg.solve(A.T @ A + penalty, A.T @ y)
        noise = (np.array(sigma) / np.array(seconds)).clip(1e-3, 1.0) ** 2
        kernel = ConstantKernel(0.03, (1e-4, 10)) * Matern(
            np.full(Z.shape[1], 2.0), (0.1, 1e3), nu=2.5
        ) + WhiteKernel(1e-3, (1e-6, 1.0))
        process = GaussianProcessRegressor(kernel, alpha=noise, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound
            process.fit(Z, y - A @ weights)
        kinds = frozenset(kind_of(shape) for shape in shapes)
        return cls(kinds, centre, scale, weights, process)

    def predict(self, shapes: Sequence[LayerShape]) -> tuple[Array, Array]:
        """Seconds of stages and their standard deviations, each (stages,)."""
        X = np.array([_features(shape) for shape in shapes])
        Z = (X - self.centre) / self.scale
        mean, deviation = self.process.predict(Z, return_std=True)
        seconds: Array = np.exp(np.column_stack([Z, np.ones(len(Z))]) @ self.weights + mean)
        return seconds, seconds * deviation


def kind_of(shape: LayerShape) -> str:
    """What a predictor must have seen of a stage: its dimensions, and whether it has groups."""
    name = {0: "linear", 1: "conv1d", 2: "conv2d"}.get(len(shape.kernel), "convolution")
    if math.prod(shape.kernel) == 1 and shape.kernel:
        name = f"pointwise {name}"
    return f"grouped {name}" if shape.groups > 1 else name


def traffic(shape: LayerShape) -> int:
    """Bytes read and written once: inputs, outputs and weights."""
    inputs = shape.inputs * sum(math.prod(call) for call in shape.calls)
    outputs = shape.outputs * sum(math.prod(call) for call in shape.output_calls())
    return shape.itemsize * (inputs + outputs + shape.outputs * shape.width)


def _features(shape: LayerShape) -> list[float]:
    g = shape.groups
    inputs, outputs = shape.inputs // g, shape.outputs // g
    positions = sum(math.prod(call) for call in shape.output_calls())
    kernel = tuple(shape.kernel) + (1,) * (2 - len(shape.kernel))
    sizes = [shape.cost().macs, traffic(shape), inputs, outputs, g, positions, *kernel]
    logarithms = [math.log(size) for size in sizes]
    filled = [(-n % VECTOR) / VECTOR for n in (inputs, outputs)]
    strided = float(any(s > 1 for s in shape.stride))
    return [*logarithms, *filled, strided, float(len(shape.kernel))]
