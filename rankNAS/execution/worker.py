"""The worker loop, and the mailbox between workers and the driver."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.execution.scheduler import Evaluation, Outcome, Pruner, execute
from rankNAS.memory import give_back

__all__ = ["Mailbox", "work"]

REPORT = 1.0  # seconds between a worker's reports to Tune


class Mailbox:
    """Actor that queues evaluations for workers and their outcomes for the driver."""

    def __init__(self, pruner: Pruner | None) -> None:
        self._rule = pruner
        self._tasks: asyncio.Queue[tuple[int, Evaluation] | None] = asyncio.Queue()
        self._events: list[tuple[str, int, Any]] = []
        self._news = asyncio.Event()
        self._home = False
        self._lives: dict[int, int] = {}  # by worker, number of starts

    def _tell(self, *event: Any) -> None:
        self._events.append(event)
        self._news.set()

    async def go_home(self) -> None:
        """Dismiss all workers."""
        self._home = True
        self._tasks.put_nowait(None)

    async def hello(self, worker: int, actor: Any) -> tuple[int, bool]:
        """Register a started worker; return its number of starts, and whether pruning is on."""
        self._lives[worker] = self._lives.get(worker, 0) + 1
        self._tell("hello", worker, actor)
        return self._lives[worker], self._rule is not None

    async def unable(self, worker: int, reason: str) -> None:
        """Report that a worker cannot start."""
        self._tell("unable", worker, reason)

    async def take(self, worker: int, life: int) -> tuple[int, Evaluation] | None:
        """The next evaluation; None to exit."""
        found = await self._tasks.get()
        if found is None or self._home:
            self._tasks.put_nowait(None)  # for the next worker
            return None
        if life != self._lives[worker]:  # the caller died while it waited
            self._tasks.put_nowait(found)
            return None
        self._events.append(("took", worker, found[0]))  # no reason to wake the driver
        return found

    async def done(
        self, worker: int, life: int, number: int, outcome: Outcome
    ) -> tuple[int, Evaluation] | None:
        """Deliver an outcome and take the next evaluation."""
        self._tell("done", worker, (number, outcome))
        return await self.take(worker, life)

    async def should_continue(
        self, budget_key: str, step: int, metrics: Mapping[str, float]
    ) -> bool:
        """Whether to continue an evaluation."""
        return self._rule is None or self._rule(budget_key, step, metrics)

    async def exchange(
        self, evaluations: Sequence[tuple[int, Evaluation]], seconds: float
    ) -> list[tuple[str, int, Any]]:
        """Queue evaluations; return the events since the last call, once there is one."""
        for evaluation in evaluations:
            self._tasks.put_nowait(evaluation)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()
        events, self._events = self._events, []
        return events


def work(
    config: dict[str, Any], shared: list[Any], mailbox: Any, threads: int, path: list[str]
) -> None:
    """The worker loop: evaluates until dismissed."""
    import ray
    from ray import tune

    sys.path += [entry for entry in path if entry not in sys.path]  # for the model's own module
    torch.set_num_threads(threads)
    worker = int(config["worker"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            evaluator: Evaluator = ray.get(shared[0])
        except Exception as error:
            ray.get(mailbox.unable.remote(worker, f"{type(error).__name__}: {error}"))
            return
    give_back()
    life, stops = ray.get(mailbox.hello.remote(worker, ray.get_runtime_context().current_actor))

    def pruner(budget_key: str, step: int, metrics: Mapping[str, float]) -> bool:
        return bool(ray.get(mailbox.should_continue.remote(budget_key, step, metrics)))

    finished, reported = 0, 0.0
    found = ray.get(mailbox.take.remote(worker, life))
    while found is not None:
        number, evaluation = found
        try:
            outcome = execute(evaluator, evaluation, pruner if stops else None)
        except (Exception, SystemExit) as error:
            # As text: the driver does not need the exception and may be unable to unpickle it.
            reason = f"{type(error).__name__}: {error}"
            outcome = Outcome(evaluation, "failed", reason=reason)
        finished += 1
        if time.monotonic() - reported > REPORT:
            reported = time.monotonic()
            tune.report({"finished": finished})
            give_back()
        found = ray.get(mailbox.done.remote(worker, life, number, outcome))
