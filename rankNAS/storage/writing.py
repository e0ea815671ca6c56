"""Writing a finished trial into a database, in few statements.

Optuna asks the database about each parameter and attribute of a trial before it writes it: some
fifty queries, and as many milliseconds, for ten layers. Here the same rows, by Optuna's own
models, go into the same tables at once. The models are no public interface, so with an Optuna that
has others, or another schema, Optuna writes the trial itself.
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
SCHEMA = 12  # of Optuna's tables, that this was written for


class TrialWriter:
    """Writes finished trials of one study.

    Args:
        storage: Of any kind.
        study_id: The study's number in it.
        distributions: Of all parameters.
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
        """Write a trial, in one transaction; its number in the study.

        Args:
            trial: Finished; without intermediate values.
        """
        if self._models is None:
            written = self._storage.create_new_trial(self._study_id, template_trial=trial)
            return self._storage.get_trial_number_from_id(written)
        assert isinstance(self._storage, RDBStorage)
        with Session(self._storage.engine) as session, session.begin():
            # Other writers wait here until the number is taken.
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
        """The rows of a trial but the one of the trial itself, by model, without its number."""
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
    """Optuna's models; None if they are not those that are expected."""
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
