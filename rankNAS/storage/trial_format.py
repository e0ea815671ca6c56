"""Trials as Optuna keeps them.

The parameters are the layers' choices, the values the objectives, the user attributes the metrics.
A checksum goes with each trial, so that what was damaged on disk is never taken for a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
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

CHECK = "ranknas:check"  # a token that no other trial has, and a checksum
STATES = {
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "pruned": TrialState.PRUNED,
}
NAMES = {state: name for name, state in STATES.items()}


class TrialFormat:
    """From our trials to Optuna's, and back.

    Args:
        choices: The choices of each layer as labels.
        format: The format that the study was written in.

    Attributes:
        distributions: Of the parameters.
    """

    def __init__(
        self, choices: Mapping[str, Sequence[str]], format: int = current_format("study")
    ) -> None:
        self.format = format
        self.distributions = {k: CategoricalDistribution(list(v)) for k, v in choices.items()}
        self._parsed = {text: Choice.parse(text) for v in choices.values() for text in v}

    def finished(self, trial: Trial, token: str) -> FrozenTrial:
        """A finished trial of ours as Optuna's, not numbered yet.

        Args:
            trial: Its number is not used.
            token: By which it will be known again.
        """
        ended = datetime.now()
        attributes: dict[str, Any] = {TRIAL_METRICS: dict(trial.metrics), **trial.metrics}
        if trial.reason:
            attributes["reason"] = trial.reason
        if trial.probe:
            attributes["probe"] = True
        attributes["budget_key"] = trial.budget_key
        attributes[CHECK] = [token, _digest(trial)]
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
            # What samplers and the dashboard read: a probe need not meet the budget.
            system_attrs={"constraints": (1.0 if trial.probe else 0.0,)},
            intermediate_values={},
        )

    def broken_off(self, claim: Claim) -> FrozenTrial:
        """A trial of Optuna that says what was not finished; it will not be read as ours."""
        return optuna.trial.create_trial(
            state=TrialState.FAIL,
            **self._parameters(claim.allocation),
            user_attrs={"reason": "interrupted", "budget_key": claim.budget_key},
        )

    def read(self, frozen: FrozenTrial) -> tuple[Trial, str] | None:
        """A finished trial of Optuna as ours with its token; None if it is not ours.

        Raises:
            ValueError: It is not as it was written; the message says what is wrong.
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
            )
            token, digest = attributes.get(CHECK, ("", None))
            # The checksum is of the metrics as they were written.
            whole = digest in (None, _digest(replace(trial, metrics=attributes[TRIAL_METRICS])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if not whole:
            raise ValueError("it is not what was written")
        return trial, str(token)

    def _parameters(self, allocation: Allocation) -> dict[str, Any]:
        labels = allocation.labels()
        return {"params": labels, "distributions": {k: self.distributions[k] for k in labels}}


def _digest(trial: Trial) -> str:
    """A checksum of what is stored of a trial, its time apart."""
    stored = [
        trial.allocation.labels(),
        trial.state,
        [float(v) for v in trial.values] if trial.state == "complete" else [],
        dict(trial.metrics),
        trial.reason,
        trial.probe,
        trial.budget_key,
    ]
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]
