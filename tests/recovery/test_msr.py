"""Spectra that are pressed before their truncation: gradients, truncations, the whole recipe."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from chain_cases import CASES
from recipe_jobs import JOBS, classification, regression
from torch import Tensor, nn

from rankNAS.exceptions import UsageError
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.msr import Msr, Prehab, SpectralPenalty, decomposed, input_roots, take_dense
from rankNAS.recovery.recover import run_recipe
from rankNAS.recovery.restart import blocks_of, rebuilt
from rankNAS.recovery.spectra import Moment, truncated_chain, unfoldings, whitenable


def penalty_of(recipe: Msr, dense: nn.Linear, rank: int, root: Tensor | None = None) -> Any:
    network = nn.Sequential(dense)
    stages = (
        nn.Linear(dense.in_features, rank, bias=False),
        nn.Linear(rank, dense.out_features),
    )
    return SpectralPenalty(recipe, network, {"0": stages}, {} if root is None else {"0": root})


def diagonal(*values: float) -> nn.Linear:
    layer = nn.Linear(len(values), len(values))
    layer.weight.data = torch.diag(torch.tensor(values, dtype=torch.float32))
    return layer


def test_the_gradient_in_closed_form() -> None:
    """T-B1 and T-B2: diag(4, 3, 2, 1) at rank 2."""
    penalty = penalty_of(Msr(), diagonal(4, 3, 2, 1), 2)
    assert float(penalty.of("0").detach()) == pytest.approx(3 / 7)
    wanted = torch.diag(torch.tensor([-3 / 49, -3 / 49, 1 / 7, 1 / 7]))
    torch.testing.assert_close(penalty.gradient("0"), wanted)
    full = penalty_of(Msr(), diagonal(4, 3, 2, 1), 4)
    assert not full.gradient("0").any()  # nothing is beyond the rank


def test_a_whitened_penalty_is_that_of_the_product() -> None:
    root = torch.linalg.cholesky(torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0])))[None]
    whitened = penalty_of(Prehab(), diagonal(4, 3, 2, 1), 2, root)
    plain = penalty_of(Prehab(), diagonal(4, 6, 6, 4), 2)
    assert float(whitened.of("0").detach()) == pytest.approx(float(plain.of("0").detach()))
    scaled = plain.gradient("0") * torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(whitened.gradient("0"), scaled)


def test_the_gradient_is_kept_for_some_steps_and_added_to_that_of_the_loss() -> None:
    dense = diagonal(4, 3, 2, 1)
    penalty = penalty_of(Msr(strength=0.5, refresh=2), dense, 2)
    first = penalty.gradient("0")
    for step in range(3):
        dense.weight.grad = torch.ones(4, 4)
        penalty.before_step(0.1)
        wanted = first if step < 2 else penalty.gradient("0")
        torch.testing.assert_close(dense.weight.grad, 1 + 0.5 * wanted)
        dense.weight.data[0, 0] += 1
        penalty.after_step(step)
    dense.weight.grad = None  # a layer without a gradient stays as it is
    penalty.before_step(0.1)
    assert dense.weight.grad is None


@pytest.mark.parametrize("kind", CASES)
def test_a_layer_of_the_rank_is_truncated_without_error(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[kind]
    first, second, dense = (module.double() for module in make())
    x = torch.randn(shape, dtype=torch.float64)
    U, V = (torch.randn_like(factor) for factor in blocks_of((first, second)))
    chain = rebuilt((first, second), U, V)
    dense.weight.data = _weight_of((first, second), chain, dense)
    found = truncated_chain((first, second), dense)
    torch.testing.assert_close(found(x), dense(x))


def _weight_of(stages: Any, chain: Any, dense: Any) -> Tensor:
    """The weight of the dense layer whose blocks are the products of a chain's factors."""
    U, V = blocks_of(tuple(chain))
    variable = torch.zeros_like(dense.weight, requires_grad=True)
    layer = copy.deepcopy(dense)
    del layer.weight
    layer.weight = variable
    ((blocks, _),) = unfoldings(stages, layer)
    # The blocks are a permutation of the weight, whose transpose is its inverse.
    (weight,) = torch.autograd.grad((blocks * (U @ V)).sum(), variable)
    return weight


def tucker() -> tuple[Any, nn.Conv2d]:
    stages = (
        nn.Conv2d(6, 3, 1, bias=False),
        nn.Conv2d(3, 2, 3, padding=1, bias=False),
        nn.Conv2d(2, 5, 1),
    )
    dense = nn.Conv2d(6, 5, 3, padding=1)
    A, core, B = (stage.weight for stage in stages)
    weight = torch.einsum("pc,qphw,oq->ochw", A[:, :, 0, 0], core, B[:, :, 0, 0])
    dense.weight.data = weight.detach()
    return stages, dense


def test_tucker_chains() -> None:
    torch.manual_seed(0)
    stages, dense = tucker()
    (first, p), (last, q) = unfoldings(stages, dense)
    assert (p, q) == (3, 2)
    assert torch.linalg.matrix_rank(first[0]) == 3
    assert torch.linalg.matrix_rank(last[0]) == 2
    x = torch.randn(2, 6, 7, 7)
    torch.testing.assert_close(truncated_chain(stages, dense)(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_whitening_gives_the_least_error(kind: str) -> None:
    """In the norm of the inputs it is the tail of the whitened spectrum."""
    torch.manual_seed(0)
    make, shape = CASES[kind]
    first, second, dense = (module.double() for module in make())
    assert whitenable((first, second))
    scale = torch.logspace(0, 2, shape[1], dtype=torch.float64)
    scale = scale[:, None, None] if len(shape) == 4 else scale
    x = torch.randn(40, *shape[1:], dtype=torch.float64) * scale
    moment = Moment(first)
    moment.add(x)
    root = moment.root()
    ((W, rank),) = unfoldings((first, second), dense)
    W = W.detach()
    tail = torch.linalg.svdvals(W @ root)[:, rank:].square().sum()
    errors = []
    for chain in (truncated_chain((first, second), dense, r) for r in (root, None)):
        U, V = blocks_of(tuple(chain))
        errors.append(float(((W - U @ V) @ root).square().sum()))
    assert errors[0] == pytest.approx(float(tail), rel=1e-6)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_norm_of_the_inputs_is_the_error_of_the_outputs(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[kind]
    first, second, dense = (module.double() for module in make())
    x = torch.randn(40, *shape[1:], dtype=torch.float64)
    moment = Moment(first)
    moment.add(x)
    chain = truncated_chain((first, second), dense, moment.root())
    error = float((dense(x) - chain(x)).detach().square().sum()) / moment.count
    ((W, rank),) = unfoldings((first, second), dense)
    tail = torch.linalg.svdvals(W[0].detach() @ moment.root()[0])[rank:].square().sum()
    assert error == pytest.approx(float(tail), rel=1e-3)


def test_what_cannot_be_whitened() -> None:
    stages, _ = tucker()
    assert not whitenable(stages)
    circular = nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular", bias=False)
    assert not whitenable((circular, nn.Conv2d(2, 4, 1)))


@pytest.mark.parametrize("recipe", [Msr(epochs=2), Prehab(epochs=2)])
@pytest.mark.parametrize("kind", JOBS)
def test_the_first_training_starts_from_the_dense_network(recipe: Msr, kind: str) -> None:
    job = JOBS[kind]()
    layers = decomposed(job)
    take_dense(job, layers)
    assert job.dense is not None
    batch = job.data.example(4)
    job.network.eval()
    outputs = [job.task.inputs_of(batch).run(m) for m in (job.network, job.dense.eval())]
    torch.testing.assert_close(outputs[0], outputs[1])
    roots = input_roots(job, layers) if recipe.whiten else {}
    press = SpectralPenalty(recipe, job.network, layers, roots)
    assert all(press.gradient(path).isfinite().all() for path in layers)


def test_pressed_spectra_are_lower_and_the_form_stays() -> None:
    tails = {}
    for strength in (1e-9, 10.0):
        job = regression()
        layers = decomposed(job)
        form = {n: p.shape for n, p in job.network.state_dict().items()}
        recipe = Msr(epochs=8, strength=strength, speed="plain", ema=0.0)

        def measure(number: int) -> None:
            if not number:
                press = SpectralPenalty(recipe, job.network, layers, {})  # noqa: B023
                tails[strength] = sum(float(press.of(path).detach()) for path in layers)  # noqa: B023

        run_recipe(recipe, job, on_member=measure)
        assert {n: p.shape for n, p in job.network.state_dict().items()} == form
    assert tails[10.0] < 0.5 * tails[1e-9]


def test_a_network_without_decomposed_layers() -> None:
    job = classification()
    assert job.dense is not None
    job.network.load_state_dict(job.network.state_dict())
    dense = copy.deepcopy(job.dense)
    bare = type(job)(dense, job.data, job.task, job.dense)
    with pytest.raises(UsageError, match="no decomposed layer"):
        run_recipe(Msr(epochs=2), bare)


def test_an_odd_recipe() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        Msr(epochs=1)
    with pytest.raises(UsageError, match="msr or stable"):
        Msr(penalty="nuclear")  # type: ignore[arg-type]
    assert isinstance(Msr(), Distil)
