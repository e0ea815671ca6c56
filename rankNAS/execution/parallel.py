"""Parallel evaluation by Ray Tune workers, on this machine or on a cluster.

One Tune trial is one worker, and a worker evaluates one allocation after another. Tune places the
workers, assigns their resources and restarts them when they die. Evaluations and outcomes pass
through a mailbox, a small actor (`worker`). An allocation thus costs a round trip of about a
millisecond instead of a Tune trial with its files and bookkeeping. The driver proposes and
records; a resumed search needs no state of Tune. Factors and data are put into Ray's object store
once (`sharing`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rankNAS.deadline import check_time
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.exceptions import RankNASError, UsageError
from rankNAS.execution.scheduler import Evaluation, Executor, Outcome, Pruner
from rankNAS.execution.sharing import sending, shared_bytes
from rankNAS.execution.worker import Mailbox, work
from rankNAS.storage.retries import reason

__all__ = ["Parallel", "Workers"]

logger = logging.getLogger(__name__)
RESTARTS = 1000  # per worker
RETRIES = 2  # of an evaluation whose worker died
WAIT = 1.0  # seconds between checks for timeouts
BEGIN = 600.0  # seconds for the first worker to start
LEAVE = 10.0  # seconds for workers to exit
STORE = 1.5  # size of a local object store, relative to its contents
LEAST_STORE = 128 * 2**20  # bytes


@dataclass(frozen=True)
class Workers:
    """Configuration of parallel evaluation.

    Args:
        count: Number of workers. One worker without a timeout needs no Ray.
        address: Address of a Ray cluster to join: ``auto``, or ``HOST:PORT``. None starts Ray
            locally and stops it at the end.
        gpus: GPUs per worker, a whole number or a fraction below 1; workers with a fraction share
            a GPU.
        timeout: Seconds after which a trial is aborted.

    Raises:
        UsageError: Fewer than one worker, a negative number, or more GPUs than this machine has.
    """

    count: int = 1
    address: str | None = None
    gpus: float = 0.0
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"`workers` must be at least 1, got {self.count}.")
        if not self.gpus >= 0:
            raise UsageError(f"`gpus_per_trial` must not be negative, got {self.gpus:g}.")
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(f"`trial_timeout` must be positive, got {self.timeout:g} seconds.")
        if self.gpus > 1 and not float(self.gpus).is_integer():
            raise UsageError(
                "`gpus_per_trial` must be a whole number or a fraction below 1, got "
                f"{self.gpus:g}."
            )
        if self.gpus and self.address is None and not _ray_runs():
            self.check_gpus(torch.cuda.device_count())

    @property
    def parallel(self) -> bool:
        """Whether Ray is needed."""
        return self.count > 1 or self.address is not None or self.timeout is not None

    def check_gpus(self, present: float) -> None:
        """Raise a UsageError unless so many GPUs are enough; Ray would wait for more for ever."""
        sharing = math.floor(1 / self.gpus + 1e-9)  # workers that share one GPU
        places = int(present) * sharing if self.gpus < 1 else present // self.gpus
        if places < self.count:
            raise UsageError(
                f"`workers` {self.count} with `gpus_per_trial` {self.gpus:g} need more GPUs than "
                f"the {present:g} there are; give fewer workers, or less of a GPU to each."
            )


def _ray_runs() -> bool:
    """Whether Ray is running already, whose own count of GPUs then holds."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


class Parallel(Executor):
    """Executor that evaluates in parallel workers.

    A worker that dies is restarted, and its evaluation is repeated at most twice. A worker that
    exceeds the timeout is killed, and its evaluation fails.

    Args:
        evaluator: The evaluator of each worker; its factors and data are shared.
        workers: Configuration of the workers.
        pruner: Decides which evaluations to stop early; it runs in the mailbox's process.

    Raises:
        UsageError: The cluster cannot be reached, or a user's object cannot be pickled.
    """

    elsewhere = True

    def __init__(
        self, evaluator: Evaluator, workers: Workers, pruner: Pruner | None = None
    ) -> None:
        self.workers, self.slots = workers, workers.count
        self._tasks: dict[int, Evaluation] = {}
        self._tries: dict[int, int] = {}
        self._outbox: list[tuple[int, Evaluation]] = []  # sent with the next exchange
        self._held: dict[int, tuple[int, float]] = {}  # worker: evaluation, start time
        self._actors: dict[int, Any] = {}
        self._deaths: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._leaving = threading.Event()
        self._next = 0
        self._failure: BaseException | None = None
        self._alive, self._begun = False, time.monotonic()
        self._folder = tempfile.mkdtemp(prefix="ranknas-tune-")
        self._joined = _connect(workers, evaluator)
        try:
            self._start(evaluator, pruner)
        except BaseException:
            self.close()
            raise

    def _start(self, evaluator: Evaluator, pruner: Pruner | None) -> None:
        import ray
        from ray import tune

        mailbox: Any = ray.remote(Mailbox)
        self._mailbox = mailbox.options(num_cpus=0, max_concurrency=1000).remote(pruner)
        threads = _threads(self.workers)
        resources = {"CPU": float(threads if self.workers.address else 1)}
        if self.workers.gpus:
            present: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            self.workers.check_gpus(present.get("GPU", 0.0))
            resources["GPU"] = self.workers.gpus
        elif evaluator.device != "cpu":
            logger.warning("workers get no GPU, but are to run on %s", evaluator.device)
        with sending():
            shared = ray.put(evaluator)
        trainable = tune.with_parameters(
            work, shared=[shared], mailbox=self._mailbox, threads=threads, path=list(sys.path)
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space={"worker": tune.grid_search(list(range(self.workers.count)))},
            tune_config=tune.TuneConfig(max_concurrent_trials=self.workers.count),
            run_config=tune.RunConfig(
                name="workers",
                storage_path=self._folder,
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
                callbacks=[_watch(self._deaths, self._leaving)],
                verbose=0,
            ),
        )
        self._tune = threading.Thread(target=self._fit, args=(tuner,), daemon=True)
        self._tune.start()

    def _fit(self, tuner: Any) -> None:
        """Run the workers until they are dismissed; blocks, so it runs in a thread."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuner.fit()
        except BaseException as error:
            self._failure = error

    def submit(self, evaluation: Evaluation) -> None:
        self._tasks[self._next] = evaluation
        self._tries[self._next] = 0
        self._outbox.append((self._next, evaluation))
        self._next += 1

    def wait(self) -> Sequence[Outcome]:
        import ray

        outcomes: list[Outcome] = []
        while self._tasks and not outcomes:
            check_time()
            if not self._tune.is_alive():
                raise RankNASError(f"Ray Tune ended before the trials did: {self._failure}")
            while not self._deaths.empty():  # before events of the restarted worker
                outcomes += self._lost(self._deaths.get())
            outbox, self._outbox = self._outbox, []
            for event in ray.get(self._mailbox.exchange.remote(outbox, WAIT)):
                outcomes += self._heard(*event)
            if not self._alive and time.monotonic() - self._begun > BEGIN:
                raise RankNASError(
                    f"no worker has begun within {BEGIN:g} seconds; do {self.slots} workers fit "
                    "into the memory, and does the cluster have what they ask for?"
                )
            outcomes += self._overdue()
        return outcomes

    def _heard(self, kind: str, worker: int, content: Any) -> list[Outcome]:
        """Process an event and return the outcomes it yields."""
        self._alive = True
        if kind == "unable":
            raise RankNASError(f"workers cannot begin: {content}")
        if kind == "hello":
            self._actors[worker] = content
            return self._lost(worker)
        if kind == "took":
            self._held[worker] = content, time.monotonic()
            return []
        number, outcome = content
        self._held.pop(worker, None)
        return [self._ended(number, outcome)] if number in self._tasks else []

    def _ended(self, number: int, outcome: Outcome) -> Outcome:
        del self._tries[number]
        # Return the submitted evaluation: its allocation is the caller's own object.
        return replace(outcome, evaluation=self._tasks.pop(number))

    def _lost(self, worker: int) -> list[Outcome]:
        """Repeat the evaluation of a worker that died or restarted."""
        number, _ = self._held.pop(worker, (None, 0.0))
        if number is None or number not in self._tasks:
            return []
        self._tries[number] += 1
        if self._tries[number] > RETRIES:
            reason = f"the worker died {RETRIES + 1} times: killed, out of memory, or a crash"
            return [self._ended(number, Outcome(self._tasks[number], "failed", reason=reason))]
        logger.warning("worker %d died; its trial is tried again", worker)
        self._outbox.append((number, self._tasks[number]))
        return []

    def _overdue(self) -> list[Outcome]:
        """Abort evaluations that exceed the timeout."""
        import ray

        limit, found = self.workers.timeout, []
        for worker, (number, since) in list(self._held.items()):
            if limit is None or time.monotonic() - since <= limit or number not in self._tasks:
                continue
            ray.kill(self._actors[worker])
            del self._held[worker]
            reason = f"cut off after {limit:g} seconds (--trial-timeout)"
            failed = Outcome(self._tasks[number], "failed", seconds=limit, reason=reason)
            found.append(self._ended(number, failed))
        return found

    def close(self) -> None:
        import ray

        # Do not wait for busy workers: their trials are no longer needed.
        with contextlib.suppress(Exception):
            ray.get(self._mailbox.go_home.remote(), timeout=LEAVE)
            for worker in self._held:
                ray.kill(self._actors[worker])
            if not self._held:
                self._tune.join(LEAVE)
            self._leaving.set()
            self._tune.join(LEAVE)
            ray.kill(self._mailbox)
        if self._joined:
            ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def _watch(deaths: queue.SimpleQueue[int], leaving: threading.Event) -> Any:
    """A Tune callback that reports the deaths of workers and stops Tune on request."""
    from ray import tune

    class Watch(tune.Callback):
        """The callback; Tune also pickles its callbacks to a file, which is not used."""

        def __init__(self, deaths: Any = None, leaving: Any = None) -> None:
            self.deaths, self.leaving = deaths, leaving

        def __reduce__(self) -> tuple[Any, ...]:
            return type(self), ()

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            # Otherwise Tune would restart a worker that has just died.
            if self.leaving.is_set():
                raise RuntimeError("the workers are not needed any more")

        def on_trial_recover(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            self.deaths.put(int(trial.config["worker"]))

    return Watch(deaths, leaving)


def _threads(workers: Workers) -> int:
    """CPU threads per worker, for one thread per core in total."""
    import ray

    if workers.address is None:
        return max(1, torch.get_num_threads() // workers.count)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, int(resources.get("CPU", 1)) // workers.count)


def _connect(workers: Workers, evaluator: Evaluator) -> bool:
    """Join a cluster or start one locally; return whether to disconnect at the end.

    Raises:
        UsageError: The cluster cannot be reached.
    """
    # Tune and Ray read these at import.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # never join a cluster unasked
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # no resume from Tune's files
    import ray

    for name in ("ray", "ray.air", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we report errors ourselves
    # We report the deaths of workers; Ray would print them on stdout, among the results.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    if ray.is_initialized():
        return False
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if workers.address is not None:
        try:
            ray.init(address=workers.address, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster answers at {workers.address!r} ({reason(error)}); start one "
                "with `ray start --head`, or leave --ray-address out to use this machine alone."
            ) from None
        return True
    ray.init(
        num_cpus=workers.count,
        include_dashboard=False,
        object_store_memory=max(LEAST_STORE, int(STORE * shared_bytes(evaluator))),
        **common,
    )
    return True
