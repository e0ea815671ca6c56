"""Many workers: Ray Tune runs them, here or on a cluster.

A trial of Tune is one worker, which evaluates one allocation after the other: Tune places the
workers, gives them their resources and starts them again when they die. What to evaluate and what
came of it goes through a mailbox, a small actor, so that an allocation costs a round trip of about
a millisecond and not a trial of Tune, with its files and its bookkeeping (`worker`). The driver
proposes and records; nothing of Tune's is needed to go on with a search. The factors and the
data are put into Ray's object store once (`sharing`).
"""

from __future__ import annotations

import contextlib
import logging
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

from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.exceptions import RankNASError, UsageError
from rankNAS.execution.scheduler import Evaluation, Executor, Outcome, Pruner
from rankNAS.execution.sharing import sending, shared_bytes
from rankNAS.execution.worker import Mailbox, work
from rankNAS.storage.retries import reason

__all__ = ["Parallel", "Workers"]

logger = logging.getLogger(__name__)
RESTARTS = 1000  # of a worker
RETRIES = 2  # of a task whose worker died
WAIT = 1.0  # seconds between looks at how long tasks have been running
BEGIN = 600.0  # seconds for the first worker to begin
LEAVE = 10.0  # seconds that workers may take to go home
STORE = 1.5  # size of a local object store, relative to what goes into it
LEAST_STORE = 128 * 2**20  # bytes


@dataclass(frozen=True)
class Workers:
    """How trials are run in parallel.

    Args:
        count: Workers. One, without a timeout, needs no Ray.
        address: Of a Ray cluster to join: ``auto``, or ``HOST:PORT``. None starts Ray here and
            stops it in the end.
        gpus: GPUs of a worker; a fraction shares one.
        timeout: Seconds after which a trial is cut off.

    Raises:
        UsageError: Fewer than one worker, or a negative number.
    """

    count: int = 1
    address: str | None = None
    gpus: float = 0.0
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"`workers` must be at least 1, got {self.count}.")
        if self.gpus < 0:
            raise UsageError(f"`gpus_per_trial` must not be negative, got {self.gpus:g}.")
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(f"`trial_timeout` must be positive, got {self.timeout:g} seconds.")

    @property
    def parallel(self) -> bool:
        """Whether Ray is needed."""
        return self.count > 1 or self.address is not None or self.timeout is not None


class Parallel(Executor):
    """Evaluates in workers.

    A worker that dies is started again, and its task is done again, at most twice more; a worker
    that takes longer than the timeout is killed, and its task has failed.

    Args:
        evaluator: What each worker gets; its factors and data are shared.
        workers: How many, and where.
        pruner: Says which evaluations are not worth finishing; it lives beside the mailbox.

    Raises:
        UsageError: The cluster cannot be reached, or something of the user's cannot be sent.
    """

    def __init__(
        self, evaluator: Evaluator, workers: Workers, pruner: Pruner | None = None
    ) -> None:
        self.workers, self.slots = workers, workers.count
        self._tasks: dict[int, Evaluation] = {}
        self._tries: dict[int, int] = {}
        self._outbox: list[tuple[int, Evaluation]] = []  # goes along when news are asked for
        self._held: dict[int, tuple[int, float]] = {}  # worker: its task, and since when
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
        """Run the workers until they are sent home: in a thread, as it does not return before."""
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
            if not self._tune.is_alive():
                raise RankNASError(f"Ray Tune ended before the trials did: {self._failure}")
            while not self._deaths.empty():  # before the worker's successor is heard of
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
        """Take in an event; what it ends."""
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
        # The task that was submitted, whose allocation is the one that the caller knows.
        return replace(outcome, evaluation=self._tasks.pop(number))

    def _lost(self, worker: int) -> list[Outcome]:
        """A worker died, or begins again: what it held before is to be done again."""
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
        """Cut off what takes too long."""
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

        # Whoever is busy is not waited for: its trial is not wanted any more.
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
    """A callback of Tune's that tells of workers' deaths, and ends Tune when it is time."""
    from ray import tune

    class Watch(tune.Callback):
        """What Tune calls; it writes its callbacks to a file too, which nobody reads."""

        def __init__(self, deaths: Any = None, leaving: Any = None) -> None:
            self.deaths, self.leaving = deaths, leaving

        def __reduce__(self) -> tuple[Any, ...]:
            return type(self), ()

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            # A worker that has just died would keep Tune busy with the next one.
            if self.leaving.is_set():
                raise RuntimeError("the workers are not needed any more")

        def on_trial_recover(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            self.deaths.put(int(trial.config["worker"]))

    return Watch(deaths, leaving)


def _threads(workers: Workers) -> int:
    """Of each worker, so that all together have one a core."""
    import ray

    if workers.address is None:
        return max(1, torch.get_num_threads() // workers.count)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, int(resources.get("CPU", 1)) // workers.count)


def _connect(workers: Workers, evaluator: Evaluator) -> bool:
    """Join a cluster, or start one here; whether we have to leave it.

    Raises:
        UsageError: The cluster cannot be reached.
    """
    # Tune and Ray read these when they are imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # never a cluster that nobody asked for
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # we do not go on from Tune's files
    import ray

    for name in ("ray", "ray.air", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we say ourselves what goes wrong
    # What workers die of is ours to say; this prints it on stdout, in the midst of results.
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
