"""Running moments of the inputs and output gradients of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from rankNAS.compression.patches import folded, patches
from rankNAS.decompositions.norms import Statistics
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import RankNASError
from rankNAS.search_spaces.base import Layer
from rankNAS.tasks.base import at_least_float32

__all__ = ["MomentAccumulator", "counted", "unbiased_covariance"]


class MomentAccumulator:
    """Running sums of one layer over the data, in float64.

    Args:
        layer: The layer.
        generator: Samples the positions of patches; layers may share it.
        inputs: The sums of a layer with the same patches, which then stand for its own.
        absolute: Sum the absolute inputs, as a diagonal matrix, instead of the outer products.
    """

    def __init__(
        self,
        layer: Layer,
        generator: torch.Generator,
        inputs: MomentAccumulator | None = None,
        *,
        absolute: bool = False,
    ) -> None:
        self.layer, self.generator, self._inputs = layer, generator, inputs
        self._absolute = absolute
        self._gradient: Tensor | None = None
        self._gradients = 0
        self._groups = self._tokens = 0
        self._covariance = self._group_mean = _zero()
        self._restart()

    def _restart(self) -> None:
        self._moment = self._mean = _zero()
        self._patches = 0

    def add_input(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the patches of a batch of inputs.

        Args:
            x: The inputs.
            mask: The positions (N, T) that count, for layers whose inputs are (N, T, features).
        """
        if self._inputs is not None:
            return
        P = patches(
            self.layer.shape, counted(self.layer.shape, x, mask), self.generator
        )  # (g, N, n)
        sums = torch.diag_embed(P.abs().sum(1)) if self._absolute else P.mT @ P
        self._moment = self._moment + sums.double()
        self._mean = self._mean + P.sum(1).double()
        self._patches += P.shape[1]
        self._tokens += P.shape[1]

    @property
    def tokens(self) -> int:
        """The number of patches so far."""
        return self._tokens if self._inputs is None else self._inputs.tokens

    def add_gradient(self, gradient: Tensor, mask: Tensor | None = None) -> None:
        """Add the loss gradients at the outputs of a batch; for the mask see `add_input`."""
        shape = self.layer.shape
        gradient = counted(self.layer.shape, gradient, mask)
        if shape.kernel:
            gradient = gradient.movedim(-1 - len(shape.kernel), -1)
        D = gradient.reshape(-1, shape.groups, shape.outputs // shape.groups).transpose(0, 1)
        before = _zero() if self._gradient is None else self._gradient
        self._gradient = before + (D.mT @ D).double()
        self._gradients += D.shape[1]

    def close_group(self) -> None:
        """Pool the covariance and mean of the patches since the last call, then reset."""
        if self._inputs is not None or not self._patches:
            return
        covariance = unbiased_covariance(self._moment, self._mean, self._patches)
        self._covariance = self._covariance + covariance
        self._group_mean = self._group_mean + self._mean / self._patches
        self._groups += 1
        self._restart()

    def statistics(self) -> Statistics:
        """The statistics of all data so far.

        Raises:
            RankNASError: They are not finite.
        """
        gradient = None if self._gradient is None else self._gradient / self._gradients
        result = Statistics(*self._moments(), gradient)
        for tensor in (result.input_second_moment, result.output_gradient_second_moment):
            if tensor is not None and not tensor.isfinite().all():
                raise RankNASError(
                    f"the calibration statistics of layer {self.layer.name!r} are not finite; "
                    "look for NaN or infinity in the calibration data or in the model's "
                    "activations."
                )
        return result

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Second moment and mean, in the element order of the folded weight."""
        if self._inputs is not None:
            return self._inputs._moments()
        order = folded(self.layer.shape)
        if not self._groups:
            moment, mean = self._moment / self._patches, self._mean / self._patches
        else:
            mean = self._group_mean / self._groups
            covariance = self._covariance / self._groups
            moment = covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
        if not self.layer.shape.kernel:  # the order is that of the columns; no second copy
            return moment, mean
        return moment[:, order][:, :, order], mean[:, order]


def counted(shape: LayerShape, x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that count, in at least float32: half precision overflows in sums."""
    x = at_least_float32(x)
    if mask is None or shape.kernel or x.shape[:-1] != mask.shape:
        return x
    return x[mask]


def _zero() -> Tensor:
    """A zero scalar, which can be added to a tensor on any device."""
    return torch.zeros((), dtype=torch.float64)


def unbiased_covariance(
    moment: Tensor,  # (*batch, n, n)
    total: Tensor,  # (*batch, n)
    count: int,
) -> Tensor:  # (*batch, n, n)
    """Unbiased covariance from the sum of outer products and the sum of the samples.

    The divisor is the number of samples minus one; the covariance of a single sample is zero.
    """
    outer = total.unsqueeze(-1) * total.unsqueeze(-2)
    return (moment - outer / count) / max(1, count - 1)
