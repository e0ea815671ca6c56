"""Factors in files: one for each layer, written as it is made, and read as a mapped file.

A file holds what allocations need, in single precision: slices up to the largest rank on offer,
and the numbers of which tables are made. It has no weight, which the model holds. A layer whose
file has the same key is not factorised again.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rankNAS.allocation import Choice
from rankNAS.compression.factors import LayerFactors
from rankNAS.decompositions import OPERATORS, ErrorNorm, Factors
from rankNAS.decompositions.layer_view import LayerView
from rankNAS.decompositions.nested import NestedBasis
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.decompositions.svd import PairFactors, TwoStageFactors
from rankNAS.exceptions import WeightsError
from rankNAS.io.fingerprints import fingerprint
from rankNAS.io.tensors import damaged, read_tensors, write_tensors
from rankNAS.search_spaces.base import Layer

__all__ = ["FactorStore", "read_factors", "take_parameters"]

logger = logging.getLogger(__name__)
VERSION = 1
KEPT = 64 << 30  # bytes of the factors of earlier searches that stay
NESTED = ("basis", "columns", "scale", "L", "M")


class FactorStore:
    """The folder of the factors of one model, with one norm and one set of statistics.

    Args:
        folder: The folder of all stores.
        key: Of everything that factors depend on besides the layer and its choices.
        moments: Whether to keep the moments of the layers' outputs, for the spectra of strategies.
    """

    def __init__(self, folder: Path, key: str, *, moments: bool = False) -> None:
        self.folder, self._key, self._moments = folder / key, key, moments
        _remove_old(folder, self.folder)

    def within(self, key: str) -> FactorStore:
        """The store of further factors in the same folder, for example of one allocation."""
        found = copy.copy(self)
        found._key, found._moments = f"{self._key} {key}", False
        return found

    def put(
        self, found: LayerFactors, offered: Layer | None = None, *, whole: bool = False
    ) -> LayerFactors:
        """Write the factors of a layer; the same factors, in single precision and mapped.

        Args:
            found: The factors.
            offered: The layer with all choices that were offered, by which `get` finds them.
            whole: Whether to store the bias, and the weight of a layer without factors, which
                may differ from the model's.

        Raises:
            WriteError: The disk is full.
        """
        dtype = torch.float64 if found.weight.dtype == torch.float64 else torch.float32
        factors = {name: f.slim(dtype) for name, f in found.factors.items()}
        tensors: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for name, own in factors.items():
            content, described[name] = _encoded(own)
            tensors |= {f"{name}.{part}": tensor for part, tensor in content.items()}
        if found.norm.mean is not None:
            tensors["mean"] = found.norm.mean
        others = {"H": found.norm.H}
        if self._moments:
            others["moment"] = found.moment
        tensors |= {name: x.to(dtype) for name, x in others.items() if x is not None}
        if whole and found.bias is not None:
            tensors["bias"] = found.bias
        if whole and not factors:
            tensors["weight"] = found.weight
        about = {
            "choices": [str(c) for c in found.layer.choices],
            "energy": found.energy,
            "factors": described,
        }
        path = self._path(offered or found.layer)
        write_tensors(path, tensors, {"about": json.dumps(about)})
        return _decoded(replace(found, file=path), _mapped(path), about)

    def get(self, layer: Layer, model: nn.Module) -> LayerFactors | None:
        """The factors of a layer that an earlier search has written; None if there are none.

        Args:
            layer: The layer with all choices that are offered.
            model: The model, which holds the weight.
        """
        path = self._path(layer)
        if not path.exists():
            return None
        try:
            read_tensors(path)  # checks the content
            found = read_factors(path, layer, model)
        except (WeightsError, KeyError, ValueError) as error:
            logger.warning("the factors in %s are unreadable and are made again: %s", path, error)
            return None
        os.utime(self.folder)
        return found

    def in_file(self, module: nn.Module, name: str) -> nn.Module:
        """A decomposed layer with its weights in a mapped file, which the next network replaces.

        They are private: a change of them does not change the file, and takes memory then.
        """
        path = self.folder / f"{fingerprint({}, name)}.network"
        write_tensors(path, module.state_dict())
        take_parameters(module, _mapped(path))
        return module

    def put_parameters(self, name: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write the parameters of a module; the same ones, mapped.

        Raises:
            WriteError: The disk is full.
        """
        path = self._path_of(name)
        write_tensors(path, {key: x.detach().contiguous() for key, x in parameters.items()})
        return _mapped(path)

    def parameters(self, name: str) -> dict[str, Tensor] | None:
        """The parameters that `put_parameters` has written, mapped; None if there are none."""
        path = self._path_of(name)
        if not path.exists():
            return None
        try:
            read_tensors(path)  # checks the content
        except WeightsError as error:
            logger.warning("the weights in %s are unreadable and are made again: %s", path, error)
            return None
        return _mapped(path)

    def _path_of(self, name: str) -> Path:
        return self.folder / f"{fingerprint({}, f'{VERSION} {self._key} {name}')}.block"

    def _path(self, layer: Layer) -> Path:
        choices = " ".join(map(str, layer.choices))
        salt = f"{VERSION} {self._key} {layer.name} {layer.shape} {choices} {self._moments}"
        return self.folder / f"{fingerprint({}, salt)}.safetensors"


def read_factors(path: Path, layer: Layer, model: nn.Module) -> LayerFactors:
    """The factors of a layer in a file, which is mapped.

    Args:
        path: The file.
        layer: The layer with all choices of the file, or more.
        model: The model, which holds the weight.

    Raises:
        WeightsError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(dict(file.metadata())["about"])
    except Exception as error:  # a damaged header can raise any error in the reader
        raise damaged(path, error) from error
    view = LayerView(model.get_submodule(layer.name), [""])
    kept = layer.restrict([Choice.parse(text) for text in about["choices"]])
    weight = layer.shape.fold(view.weight)
    bare = LayerFactors(kept, weight, view.bias, ErrorNorm(), {}, about["energy"], None, path)
    return _decoded(bare, _mapped(path), about)


def take_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters of a module by tensors, which are not copied."""
    for key, tensor in tensors.items():
        parent, _, child = key.rpartition(".")
        own = module.get_submodule(parent)
        trained = own.get_parameter(child).requires_grad
        setattr(own, child, nn.Parameter(tensor, trained))


def _encoded(factors: Factors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of factors by name, and what else there is."""
    if isinstance(factors, PairFactors):
        return {"left": factors.left, "right": factors.right}, {"errors": factors.errors}
    assert isinstance(factors, TwoStageFactors), type(factors).__name__
    tensors = {
        f"{k}.{name}": getattr(nested, name)
        for k, nested in factors.bases.items()
        for name in NESTED
    }
    bases = {
        str(k): [nested.energy, nested.jitter, factors.errors[k]]
        for k, nested in factors.bases.items()
    }
    return tensors, {"bases": bases}


def _decoded(
    found: LayerFactors, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> LayerFactors:
    """The factors of a layer with the tensors and numbers of a file."""
    factors = {
        name: _factors(name, found.layer.shape, tensors, described)
        for name, described in about["factors"].items()
    }
    norm = ErrorNorm(None, tensors.get("H"), tensors.get("mean"))
    return replace(
        found,
        norm=norm,
        factors=factors,
        moment=tensors.get("moment"),
        weight=tensors.get("weight", found.weight),
        bias=tensors.get("bias", found.bias),
    )


def _factors(
    name: str, shape: LayerShape, tensors: Mapping[str, Tensor], described: Mapping[str, Any]
) -> Factors:
    operator = OPERATORS[name]
    if "errors" in described:
        left, right = (tensors[f"{name}.{part}"] for part in ("left", "right"))
        return PairFactors(operator, shape, left, right, described["errors"])
    bases, errors = {}, {}
    for k, (energy, jitter, found) in described["bases"].items():
        parts = {part: tensors[f"{name}.{k}.{part}"] for part in NESTED}
        bases[int(k)] = NestedBasis(**parts, HM=parts["M"], energy=energy, jitter=jitter)
        errors[int(k)] = found
    return TwoStageFactors(operator, shape, bases, errors)


def _mapped(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _remove_old(folder: Path, own: Path) -> None:
    """Remove the stores that were used least recently, beyond a bound on the bytes of all."""
    try:
        others = [path for path in folder.iterdir() if path.is_dir() and path != own]
    except OSError:
        return
    total = 0
    for path in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True):
        total += sum(file.stat().st_size for file in path.iterdir())
        if total > KEPT:
            shutil.rmtree(path, ignore_errors=True)
