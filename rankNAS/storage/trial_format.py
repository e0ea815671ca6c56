"""Conversion between our trials and Optuna's.

Optuna's parameters are the layers' choices, its values the objectives, its user attributes the
metrics. Each trial has a checksum, so that a trial damaged on disk is never read as a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, cast

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from rankNAS.allocation import Allocation, Choice
from rankNAS.io.formats import FORMAT, TRIAL_METRICS, current_format, upgraded
from rankNAS.storage.claims import Claim
from rankNAS.strategies.history import Trial

__all__ = ["TrialFormat"]

CHECK = "ranknas:check"  # a unique token, and a checksum
STATES = {
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "pruned": TrialState.PRUNED,
}
NAMES = {state: name for name, state in STATES.items()}


class TrialFormat:
    """Converts our trials to Optuna's, and back.

    Args:
        choices: The choices of each layer as labels.
        format: The format of the study.

    Attributes:
        distributions: Distributions of the parameters.
    """

    def __init__(
        self, choices: Mapping[str, Sequence[str]], format: int = current_format("study")
    ) -> None:
        self.format = format
        self.distributions = {k: CategoricalDistribution(list(v)) for k, v in choices.items()}
        self._parsed = {text: Choice.parse(text) for v in choices.values() for text in v}

    def finished(self, trial: Trial, token: str) -> FrozenTrial:
        """The Optuna form of a finished trial, without a number.

        Args:
            trial: The trial; its number is ignored.
            token: Identifies the trial.
        """
        ended = datetime.now()
        attributes: dict[str, Any] = {TRIAL_METRICS: dict(trial.metrics), **trial.metrics}
        if trial.reason:
            attributes["reason"] = trial.reason
        if trial.weights:
            attributes["weights"] = trial.weights
        if trial.probe:
            attributes["probe"] = True
        attributes["budget_key"] = trial.budget_key
        attributes[CHECK] = [token, _digest(trial, trial.metrics)]
        complete = trial.state == "complete"
        return FrozenTrial(
            number=-1,
            trial_id=-1,
            state=STATES[trial.state],
            value=None,
            values=list(trial.values) if complete else None,
            datetime_start=ended - timedelta(seconds=trial.seconds),
            datetime_complete=ended,
            **self._parameters(trial.allocation),
            user_attrs=attributes,
            # For samplers and the dashboard: a probe need not meet the budget.
            system_attrs={"constraints": (1.0 if trial.probe else 0.0,)},
            intermediate_values={},
        )

    def broken_off(self, claim: Claim) -> FrozenTrial:
        """An Optuna trial that describes an interrupted evaluation; `read` ignores it."""
        return optuna.trial.create_trial(
            state=TrialState.FAIL,
            **self._parameters(claim.allocation),
            user_attrs={"reason": "interrupted", "budget_key": claim.budget_key},
        )

    def read(self, frozen: FrozenTrial) -> tuple[Trial, str] | None:
        """Our form of a finished Optuna trial, with its token; None if RankNAS did not write it.

        Raises:
            ValueError: The trial was altered; the message says how.
        """
        attributes = frozen.user_attrs
        if TRIAL_METRICS not in attributes and CHECK not in attributes:
            return None
        where = f"trial {frozen.number}"
        current = upgraded("study", {FORMAT: self.format, **attributes}, where)
        try:
            choices = frozen.params
            pairs = tuple((layer, self._parsed[choices[layer]]) for layer in self.distributions)
            state = NAMES[frozen.state]
            trial = Trial(
                frozen.number,
                Allocation(pairs),
                cast(Literal["complete", "failed", "pruned"], state),
                tuple(frozen.values or ()) if state == "complete" else (),
                current[TRIAL_METRICS],
                frozen.duration.total_seconds() if frozen.duration else 0.0,
                attributes.get("reason", ""),
                attributes.get("probe", False),
                current.get("budget_key", ""),
                str(attributes.get("weights", "")),
            )
            token, digest = attributes.get(CHECK, ("", None))
            # The checksum covers the metrics as written.
            whole = digest in (None, _digest(trial, attributes[TRIAL_METRICS]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if not whole:
            raise ValueError("it is not what was written")
        return trial, str(token)

    def _parameters(self, allocation: Allocation) -> dict[str, Any]:
        labels = allocation.labels()
        return {"params": labels, "distributions": {k: self.distributions[k] for k in labels}}


def _digest(trial: Trial, metrics: Mapping[str, float]) -> str:
    """Checksum of a stored trial, without its time."""
    stored = [
        trial.allocation.labels(),
        trial.state,
        [float(v) for v in trial.values] if trial.state == "complete" else [],
        dict(metrics),
        trial.reason,
        trial.probe,
        trial.budget_key,
    ] + [trial.weights] * bool(trial.weights)
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]
