"""Bulk insertion of a finished trial into a database.

Optuna queries the database for each parameter and attribute before it writes it: about fifty
queries, and as many milliseconds, for ten layers. This module inserts the same rows into the same
tables at once, with Optuna's own models. These models are not a public interface. If Optuna's
models or schema differ from the expected ones, Optuna writes the trial itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy
from optuna.distributions import CategoricalDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy.orm import Session

__all__ = ["TrialWriter"]

logger = logging.getLogger(__name__)
SCHEMA = 12  # version of Optuna's tables supported here


class TrialWriter:
    """Writes finished trials of one study.

    Args:
        storage: A storage of any kind.
        study_id: The study's number in it.
        distributions: Distributions of all parameters.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        distributions: Mapping[str, CategoricalDistribution],
    ) -> None:
        self._storage, self._study_id, self._distributions = storage, study_id, distributions
        self._texts = {k: distribution_to_json(d) for k, d in distributions.items()}
        self._models: Any = _models() if isinstance(storage, RDBStorage) else None

    def write(self, trial: FrozenTrial) -> int:
        """Write a trial in one transaction and return its number in the study.

        Args:
            trial: A finished trial without intermediate values.
        """
        if self._models is None:
            written = self._storage.create_new_trial(self._study_id, template_trial=trial)
            return self._storage.get_trial_number_from_id(written)
        assert isinstance(self._storage, RDBStorage)
        with Session(self._storage.engine) as session, session.begin():
            # Other writers wait here until the number is assigned.
            self._models.StudyModel.find_or_raise_by_id(self._study_id, session, for_update=True)
            row = self._models.TrialModel(
                study_id=self._study_id,
                state=trial.state,
                datetime_start=trial.datetime_start,
                datetime_complete=trial.datetime_complete,
            )
            session.add(row)
            session.flush()
            for model, parts in self._parts(trial):
                if parts:
                    rows = [{"trial_id": row.trial_id, **part} for part in parts]
                    session.execute(sqlalchemy.insert(model), rows)
            row.number = number = int(row.count_past_trials(session))
        return number

    def _parts(self, trial: FrozenTrial) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """The dependent rows of a trial by model, without the trial's number."""
        models = self._models
        yield (
            models.TrialParamModel,
            [
                {
                    "param_name": name,
                    "param_value": self._distributions[name].to_internal_repr(value),
                    "distribution_json": self._texts[name],
                }
                for name, value in trial.params.items()
            ],
        )
        stored = [models.TrialValueModel.value_to_stored_repr(v) for v in trial.values or ()]
        yield (
            models.TrialValueModel,
            [{"objective": i, "value": v, "value_type": t} for i, (v, t) in enumerate(stored)],
        )
        for model, attributes in (
            (models.TrialUserAttributeModel, trial.user_attrs),
            (models.TrialSystemAttributeModel, trial.system_attrs),
        ):
            yield model, [{"key": k, "value_json": json.dumps(v)} for k, v in attributes.items()]


def _models() -> Any:
    """Optuna's models; None if they differ from the expected ones."""
    try:
        from optuna.storages._rdb import models

        wanted = {
            models.TrialModel: ("study_id", "state", "number", "datetime_start", "trial_id"),
            models.TrialParamModel: ("trial_id", "param_name", "param_value", "distribution_json"),
            models.TrialValueModel: ("trial_id", "objective", "value", "value_type"),
            models.TrialUserAttributeModel: ("trial_id", "key", "value_json"),
            models.TrialSystemAttributeModel: ("trial_id", "key", "value_json"),
        }
        known = all(hasattr(model, name) for model, names in wanted.items() for name in names)
        if known and models.SCHEMA_VERSION == SCHEMA:
            return models
    except (ImportError, AttributeError):
        pass
    logger.debug("this Optuna has other tables; it writes trials itself")
    return None
