"""Gaussian-process regression of stage latency, fitted to a subset of the stages.

The log-latency of a stage is a linear function of the logarithms of its work, traffic and sizes,
plus a Gaussian process of these features and of the fill of the vector units, plus an independent
effect per stage. Measurements are shrunk according to their noise: a search would otherwise
select stages whose measured time is too short (winner's curse).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, solve_triangular

from rankNAS.decompositions import LayerShape
from rankNAS.threads import one_thread

if TYPE_CHECKING:
    from sklearn.gaussian_process.kernels import Kernel

__all__ = ["StageRegression", "kind_of", "traffic"]

Array = npt.NDArray[np.float64]
RIDGE = 1e-3
VECTOR = 16  # assumed number of channels per vector operation


@dataclass(frozen=True)
class StageRegression:
    """Gaussian-process posterior of stage latency.

    Args:
        kinds: Kinds of the fitted stages, see `kind_of`.
        centre: Mean of the features, (features,).
        scale: Scale of the features, (features,).
        weights: Weights of the linear part, the constant last.
        kernel: Covariance of the residual of the linear part, without the effect per stage.
        own: Variance of the effect per stage.
        places: Row of each measured stage in the following arrays.
        Z: Features, (stages, features).
        factor: Cholesky factor of the covariance of the measurements, (stages, stages).
        alpha: Inverse covariance times the residual of the linear part, (stages,).
    """

    kinds: frozenset[str]
    centre: Array
    scale: Array
    weights: Array
    kernel: Kernel
    own: float
    places: dict[LayerShape, int]
    Z: Array
    factor: Array
    alpha: Array

    @classmethod
    def fit(
        cls,
        shapes: Sequence[LayerShape],
        seconds: Sequence[float],
        sigma: Sequence[float],
        learned: Sequence[int] | None = None,
    ) -> StageRegression:
        """The regression fitted to measured stages, each with one call.

        Args:
            shapes: At least one; all different.
            seconds: Their latencies.
            sigma: Standard deviations of the latencies.
            learned: The stages used to learn the kernel, the slow part; all by default.
        """
        # Imported here: few users of hardware models need it.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        some = np.arange(len(shapes)) if learned is None else np.array(learned)
        X = np.array([_features(shape) for shape in shapes])
        centre, scale = X[some].mean(0), X[some].std(0)
        scale[scale < 1e-9] = 1.0
        Z = (X - centre) / scale
        y = np.log(np.array(seconds, dtype=float))
        A = np.column_stack([Z, np.ones(len(Z))])
        penalty = RIDGE * len(some) * np.diag([*np.ones(Z.shape[1]), 0.0])
        weights = np.linalg.solve(A[some].T @ A[some] + penalty, A[some].T @ y[some])
        left = y - A @ weights
        noise = (np.array(sigma) / np.array(seconds)).clip(1e-3, 1.0) ** 2
        kernel = ConstantKernel(0.03, (1e-4, 10)) * Matern(
            np.full(Z.shape[1], 2.0), (0.1, 1e3), nu=2.5
        ) + WhiteKernel(1e-3, (1e-6, 1.0))
        process = GaussianProcessRegressor(kernel, alpha=noise[some], random_state=0)
        with warnings.catch_warnings(), one_thread():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale reaches its bound
            process.fit(Z[some], left[some])
        smooth, own = process.kernel_.k1, float(process.kernel_.k2.noise_level)
        factor = np.linalg.cholesky(smooth(Z) + np.diag(own + noise))
        alpha = cho_solve((factor, True), left)
        kinds = frozenset(kind_of(shape) for shape in shapes)
        places = {shape: i for i, shape in enumerate(shapes)}
        return cls(kinds, centre, scale, weights, smooth, own, places, Z, factor, alpha)

    def predict(self, shapes: Sequence[LayerShape]) -> tuple[Array, Array]:
        """Latency of stages in seconds and standard deviations, each (stages,)."""
        X = np.array([_features(shape) for shape in shapes])
        Z = (X - self.centre) / self.scale
        covariance = self.kernel(Z, self.Z)
        for row, shape in enumerate(shapes):
            if shape in self.places:
                covariance[row, self.places[shape]] += self.own
        mean = np.column_stack([Z, np.ones(len(Z))]) @ self.weights + covariance @ self.alpha
        explained = (solve_triangular(self.factor, covariance.T, lower=True) ** 2).sum(0)
        variance = self.kernel.diag(Z) + self.own - explained
        seconds: Array = np.exp(mean)
        return seconds, seconds * np.sqrt(variance.clip(0))


def kind_of(shape: LayerShape) -> str:
    """Kind of a stage: its number of dimensions, and whether it has groups."""
    name = {0: "linear", 1: "conv1d", 2: "conv2d"}.get(len(shape.kernel), "convolution")
    if math.prod(shape.kernel) == 1 and shape.kernel:
        name = f"pointwise {name}"
    return f"grouped {name}" if shape.groups > 1 else name


def traffic(shape: LayerShape) -> int:
    """Bytes of inputs, outputs and weights, each read or written once."""
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
