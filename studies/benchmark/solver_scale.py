"""Processor seconds and gaps of the solvers at 1,000 layers of 64 choices within three budgets.

    python studies/benchmark/solver_scale.py

needs no data. Tables are random, or realistic: convex errors of spectra, costs that grow with the
rank and are correlated between the budgets.
"""

from __future__ import annotations

import time

import numpy as np

from rankNAS.solver.min_max import min_max
from rankNAS.solver.min_sum import min_sum
from rankNAS.solver.tables import Array

LAYERS, CHOICES = 1000, 64


def random_tables(rng: np.random.Generator) -> tuple[list[Array], list[list[Array]]]:
    """Values and three costs without any structure."""
    value = [rng.random(CHOICES) for _ in range(LAYERS)]
    return value, [[rng.random(CHOICES) for _ in range(LAYERS)] for _ in range(3)]


def realistic_tables(rng: np.random.Generator) -> tuple[list[Array], list[list[Array]]]:
    """Tails of spectra against MACs, parameters and a latency in steps of ranks."""
    value: list[Array] = []
    costs: list[list[Array]] = [[], [], []]
    for _ in range(LAYERS):
        size, pixels = int(rng.choice([256, 512, 1024])), float(rng.choice([1, 4, 16]))
        k = np.arange(1, size + 1)
        spectrum = k ** -rng.uniform(0.6, 4.0) * np.exp(-rng.uniform(0, 8) * k / size)
        ranks = np.unique(np.linspace(1, size / 2, CHOICES - 1).round().astype(int))
        value.append(np.append(0, 1 - np.cumsum(spectrum)[ranks - 1] / spectrum.sum()))
        params = size * np.append(size, 1.99 * ranks)
        steps = np.append(size, 32 * np.ceil(2 * ranks / 32))
        for table, cost in zip(costs, (pixels * params, params, size * steps), strict=True):
            table.append(cost)
    return value, costs


def main() -> None:
    """Solve both kinds at two tightnesses."""
    for name, make in (("random", random_tables), ("realistic", realistic_tables)):
        for fraction in (0.5, 0.3):
            value, costs = make(np.random.default_rng(0))
            limits = [
                (fraction + 0.03 * i) * sum(float(c[0] if name == "realistic" else 1) for c in t)
                for i, t in enumerate(costs)
            ]
            for solver in (min_sum, min_max):
                started = time.process_time()
                found = solver(value, costs, limits)
                seconds = time.process_time() - started
                print(
                    f"{name} {fraction:g} {solver.__name__}: {seconds:.2f} s, value "
                    f"{found.value:.6g}, gap {found.gap:.2g}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
