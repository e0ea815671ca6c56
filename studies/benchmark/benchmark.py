"""What a trial costs beyond its forward passes, and how long `bo` takes to propose.

    python studies/benchmark/benchmark.py

takes about two minutes on two CPU cores and needs no data: ResNet-20 with random weights on 1,000
random images, and tables of a 20-layer space with random errors. Expected: overhead under 15 % of
the time of a trial, and proposals under 2 s at 50 observations.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from rankNAS.allocation import DENSE, Choice
from rankNAS.evaluation import Evaluator
from rankNAS.network import factorise
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model
from rankNAS.strategies import BayesianOptimisation, History, Random, Trial
from rankNAS.strategies.base import Problem
from rankNAS.tables import make_problem

TRIALS, IMAGES, OBSERVATIONS, LAYERS, CHOICES = 20, 1000, 50, 20, 64


def evaluation() -> None:
    """Overhead of each trial: everything that is not a forward pass."""
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.randint(0, 10, (IMAGES,))
    space = compile_space(model, images[:1])
    started = time.perf_counter()
    factorisation = factorise(model, space)
    print(f"factorise once: {time.perf_counter() - started:.2f} s for {len(space.layers)} layers")
    problem = make_problem(space, factorisation.errors(), {"macs": 0.5})
    for batch_norm in (True, False):
        evaluator = Evaluator(
            factorisation, images, (images, labels), batch_norm=batch_norm, batch_size=250
        )
        shares = []
        for number in range(TRIALS):
            rng = np.random.default_rng(number)
            (allocation,) = Random().propose(problem, History(), 1, rng)
            before = evaluator.timing.forward, evaluator.timing.other
            evaluator.evaluate(allocation)
            forward = evaluator.timing.forward - before[0]
            shares.append((evaluator.timing.other - before[1]) / forward)
        print(
            f"trial overhead, batch norm {'re-estimated' if batch_norm else 'kept'}: "
            f"median {100 * statistics.median(shares):.1f} %, "
            f"largest {100 * max(shares):.1f} % of the forward passes"
        )


def proposals() -> None:
    """Seconds of a proposal of `bo` at 50 observations on 20 layers."""
    rng = np.random.default_rng(0)
    choices = {
        f"layer{i}": (DENSE, *(Choice("svd", (r,)) for r in range(CHOICES - 1, 0, -1)))
        for i in range(LAYERS)
    }
    errors = tuple(np.concatenate([[0], np.sort(rng.random(CHOICES - 1))]) for _ in range(LAYERS))
    costs = tuple(np.linspace(1, 0.02, CHOICES) * (0.1 + rng.random()) for _ in range(LAYERS))
    problem = Problem(choices, errors, {"macs": costs}, {"macs": 0.1}, {"macs": 0.3})
    slopes = 5 * rng.random(LAYERS) ** 3
    strategy, trials, seconds = BayesianOptimisation(), list[Trial](), []
    for number in range(OBSERVATIONS + 5):
        started = time.perf_counter()
        (allocation,) = strategy.propose(
            problem, History(tuple(trials)), 1, np.random.default_rng([0, number])
        )
        seconds.append(time.perf_counter() - started)
        indices = problem.indices(allocation)
        harm = sum(s * e[i] for s, e, i in zip(slopes, errors, indices, strict=True))
        trials.append(Trial(number, allocation, "complete", (-float(harm),)))
    late = seconds[OBSERVATIONS:]
    print(
        f"bo proposal at {OBSERVATIONS} observations, {LAYERS} layers: "
        f"median {statistics.median(late):.2f} s, largest {max(late):.2f} s"
    )


if __name__ == "__main__":
    evaluation()
    proposals()
