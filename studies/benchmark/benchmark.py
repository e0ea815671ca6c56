"""What a trial costs beyond its forward passes; how long `bo` and the solver take.

    python studies/benchmark/benchmark.py

takes about two minutes on two CPU cores and needs no data: ResNet-20 with random weights on 1,000
random images, and tables of a 20-layer space with random errors. Expected: overhead under 15 % of
the time of a trial, proposals under 2 s at 50 observations, and allocations of 100 layers of 64
choices within two budgets in under 5 s.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.data.samples import Samples
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model
from rankNAS.solver.min_max import min_max
from rankNAS.solver.min_sum import min_sum
from rankNAS.strategies import BayesianOptimisation, History, Random, Trial
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.tables import build_problem
from rankNAS.tasks import infer_task

TRIALS, IMAGES, OBSERVATIONS, LAYERS, CHOICES, TABLES = 20, 1000, 50, 20, 64, 5


def evaluation() -> None:
    """Overhead of each trial: everything that is not a forward pass."""
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.randint(0, 10, (IMAGES,))
    data, space = Samples.of((images, labels)), compile_space(model, images[:1])
    task = infer_task(model, data.example(2))
    started = time.perf_counter()
    factorisation = factorise(model, space)
    print(f"factorise once: {time.perf_counter() - started:.2f} s for {len(space.layers)} layers")
    problem = build_problem(space, factorisation.errors(), {"macs": 0.5})
    for batch_norm in (True, False):
        evaluator = Evaluator(
            factorisation, task, data, data, batch_norm=batch_norm, batch_size=250
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


def allocations() -> None:
    """Processor seconds of an exact allocation of 100 layers on MACs and parameters."""
    seconds: dict[str, list[float]] = {"least total": [], "least worst": []}
    gaps = []
    for seed in range(TABLES):
        rng = np.random.default_rng(seed)
        value, macs, params = [], [], []
        for _ in range(100):
            # The squared error of rank r is the tail of a spectrum between power law and decay.
            size, pixels = int(rng.choice([64, 128, 256, 512])), rng.choice([1, 4, 16, 64])
            k = np.arange(1, size + 1)
            spectrum = k ** -rng.uniform(0.6, 4.0) * np.exp(-rng.uniform(0, 8) * k / size)
            ranks = np.unique(np.linspace(1, size / 2, CHOICES - 1).round().astype(int))
            tail = 1 - np.cumsum(spectrum)[ranks - 1] / spectrum.sum()
            value.append(np.append(0, tail))
            params.append(size * np.append(size, 1.99 * ranks))
            macs.append(pixels * params[-1])
        costs = [macs, params]
        for fractions in ((0.5, 0.5), (0.3, 0.35), (0.15, 0.2)):
            limits = [f * sum(c[0] for c in t) for f, t in zip(fractions, costs, strict=True)]
            started = time.process_time()
            gaps.append(min_sum(value, costs, limits).gap)
            seconds["least total"].append(time.process_time() - started)
            started = time.process_time()
            min_max(value, costs, limits)
            seconds["least worst"].append(time.process_time() - started)
    for name, taken in seconds.items():
        print(
            f"{name} error, 100 layers of {CHOICES} choices, two budgets, one thread: "
            f"median {statistics.median(taken):.2f} s, largest {max(taken):.2f} s"
        )
    print(f"largest proven gap of the least total: {max(gaps):.2g}")


if __name__ == "__main__":
    evaluation()
    proposals()
    allocations()
