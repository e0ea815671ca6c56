"""The record of a search: an Optuna study that can be killed at any moment.

A trial is written in one transaction when it ends, so there is never half a trial, and nothing to
clean up after a crash. Its parameters are the layers' choices, its values the objectives, its user
attributes the metrics. The configuration is a user attribute of the study; going on with another
one is refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from rankNAS.allocation import Allocation, Choice
from rankNAS.exceptions import StudyError
from rankNAS.objectives.base import Direction
from rankNAS.strategies.base import History, Trial

__all__ = ["Record", "study_names"]

CONFIGURATION, CHOICES, METRICS = "ranknas:configuration", "ranknas:choices", "ranknas:metrics"


@dataclass(frozen=True)
class Record:
    """An open study.

    Args:
        study: The Optuna study.
        choices: The choices of each layer as labels: the distributions of the parameters.
    """

    study: optuna.Study
    choices: Mapping[str, Sequence[str]]

    @classmethod
    def open(
        cls,
        storage: str | optuna.storages.BaseStorage | None,
        name: str,
        *,
        configuration: Mapping[str, Any],
        choices: Mapping[str, Sequence[str]],
        directions: Sequence[Direction],
        resume: bool,
    ) -> Record:
        """Open or make a study.

        Args:
            storage: Any Optuna storage or URL; None keeps the study in memory.
            name: The study's name in the storage.
            configuration: What must not change between sessions; JSON values.
            choices: Labels of each layer's choices. A resumed study keeps those it was made with.
            directions: Of the objectives.
            resume: Whether an existing study may be gone on with.

        Raises:
            StudyError: The storage cannot be read, the study exists and `resume` is false, or it
                was made with another configuration.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=list(directions), load_if_exists=True
            )
            attributes = study.user_attrs
        except (sqlalchemy.exc.SQLAlchemyError, OSError, ValueError, RuntimeError) as error:
            raise StudyError(f"the study storage cannot be used: {_first_line(error)}") from error
        if CONFIGURATION not in attributes:
            if study.get_trials(deepcopy=False):
                raise StudyError(f"study {name!r} exists and was not made by RankNAS.")
            study.set_user_attr(CHOICES, {k: list(v) for k, v in choices.items()})
            study.set_user_attr(CONFIGURATION, dict(configuration))
            return cls(study, choices)
        if not resume:
            raise StudyError(
                f"study {name!r} exists already, with {len(study.get_trials(deepcopy=False))} "
                "trials: add --resume to go on with it, or give another --study name."
            )
        _check_configuration(name, attributes[CONFIGURATION], configuration)
        return cls(study, attributes[CHOICES])

    def add(self, trial: Trial, objectives: Sequence[str]) -> None:
        """Write a finished trial, in one transaction."""
        ended = datetime.now()
        labels = trial.allocation.labels()
        attributes: dict[str, Any] = {METRICS: dict(trial.metrics), **trial.metrics}
        if trial.reason:
            attributes["reason"] = trial.reason
        if trial.probe:
            attributes["probe"] = True
        attributes["target"] = trial.target
        complete = trial.state == "complete"
        frozen = FrozenTrial(
            number=-1,
            trial_id=-1,
            state=TrialState.COMPLETE if complete else TrialState.FAIL,
            value=None,
            values=list(trial.values) if complete else None,
            datetime_start=ended - timedelta(seconds=trial.seconds),
            datetime_complete=ended,
            params=labels,
            distributions={k: CategoricalDistribution(list(self.choices[k])) for k in labels},
            user_attrs=attributes,
            # What samplers and the dashboard read: a probe need not meet the budget.
            system_attrs={"constraints": (1.0 if trial.probe else 0.0,)},
            intermediate_values={},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.add_trial(frozen)

    def history(self) -> History:
        """All finished trials, oldest first."""
        trials = []
        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.state not in (TrialState.COMPLETE, TrialState.FAIL):
                continue
            labels = {layer: frozen.params[layer] for layer in self.choices}
            complete = frozen.state == TrialState.COMPLETE
            trials.append(
                Trial(
                    frozen.number,
                    Allocation.of({k: Choice.parse(v) for k, v in labels.items()}),
                    "complete" if complete else "failed",
                    tuple(frozen.values or ()) if complete else (),
                    frozen.user_attrs.get(METRICS, {}),
                    frozen.duration.total_seconds() if frozen.duration else 0.0,
                    frozen.user_attrs.get("reason", ""),
                    frozen.user_attrs.get("probe", False),
                    frozen.user_attrs.get("target", ""),
                )
            )
        return History(tuple(trials))


def study_names(storage: str) -> list[str]:
    """The names of all studies in a storage.

    Raises:
        StudyError: The storage cannot be read.
    """
    try:
        return optuna.get_all_study_names(storage)
    except (sqlalchemy.exc.SQLAlchemyError, OSError, ValueError, RuntimeError) as error:
        raise StudyError(f"the study storage cannot be used: {_first_line(error)}") from error


def _check_configuration(name: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    given = json.loads(json.dumps(dict(given)))
    differing = sorted(k for k in {*stored, *given} if stored.get(k) != given.get(k))
    if differing:
        listed = "; ".join(f"{k} was {stored.get(k)!r}, is {given.get(k)!r}" for k in differing)
        raise StudyError(
            f"study {name!r} exists with another configuration: {listed}. Give the same options, "
            "or another --study name."
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
