"""Spectra of layers: what is asked for, what it equals, and that nothing else comes along."""

from __future__ import annotations

import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces import compile_space
from rankNAS.strategies.spectra import (
    channel_groups,
    make_spectra,
    spectral_errors,
)


@pytest.fixture
def factorisation(small_net: nn.Module) -> Factorisation:
    return factorise(small_net, compile_space(small_net, torch.zeros(1, 3, 8, 8)))


def test_every_spectrum_is_that_of_its_layer(factorisation: Factorisation) -> None:
    found = make_spectra(factorisation, ("energy", "outputs", "weight"))
    assert list(found) == list(factorisation.layers)
    for name, own in factorisation.layers.items():
        spectra = found[name]
        assert spectra.layer is own.layer
        # In the norm of the weights, the covariance of the outputs is W W^T.
        W = own.weight.double().flatten(2)
        assert spectra.energy == own.energy == pytest.approx(float(W.square().sum()))
        expected = torch.linalg.eigvalsh(W @ W.mT).flip(-1).sum(0)
        assert spectra.outputs == pytest.approx(expected.tolist(), abs=1e-9)
        groups = {c.rank[0] for c in own.layer.choices if c.operator == "group_svd"}
        assert set(spectra.weight) == groups | {1}
        for k, errors in spectra.weight.items():
            np.testing.assert_array_equal(errors, spectral_errors(own.weight, k))


def test_only_what_is_asked_for_is_computed(factorisation: Factorisation) -> None:
    for found in make_spectra(factorisation, ("energy",)).values():
        assert found.energy is not None and not found.outputs and not found.weight
    with pytest.raises(UsageError, match="no spectrum 'nuclear'; there are energy, outputs"):
        make_spectra(factorisation, ("nuclear",))  # type: ignore[arg-type]


def test_spectra_keep_no_factors_in_memory(small_net: nn.Module) -> None:
    factorisation = factorise(small_net, compile_space(small_net, torch.zeros(1, 3, 8, 8)))
    layer = next(iter(factorisation.layers.values()))
    kept = [weakref.ref(x) for x in (layer, layer.weight, *layer.factors.values())]
    spectra = make_spectra(factorisation, ("energy", "outputs", "weight"))
    del factorisation, layer
    gc.collect()
    assert all(reference() is None for reference in kept)
    assert pickle.loads(pickle.dumps(spectra)) == spectra


def test_channel_groups() -> None:
    assert channel_groups(Choice("svd", (4,))) == 1
    assert channel_groups(Choice("group_svd", (8, 4))) == 8
    assert channel_groups(DENSE) is channel_groups(Choice("tucker2", (2, 2))) is None
