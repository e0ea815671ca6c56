"""Contract tests for authors of extensions, as test classes, and small problems. Needs pytest.

Subclass one in a test file and set the object to test::

    class TestMyOperator(OperatorContract):
        operator = MyOperator()

    class TestMyStrategy(StrategyContract):
        strategy = MyStrategy()

    class TestMyHardware(HardwareContract):
        hardware = MyHardware()

    class TestMyObjective(ObjectiveContract):
        objective = MyObjective()

    class TestMyTask(TaskContract):
        task = MyTask()

        def model(self):
            return MyModel().eval()

        def batch(self):
            return {"inputs": torch.ones(8, 3), "labels": torch.zeros(8)}

RankNAS applies the same classes to its own extensions.
"""

from rankNAS.testing.hardware import HardwareContract
from rankNAS.testing.objectives import ObjectiveContract
from rankNAS.testing.operators import (
    LAYERS,
    LayerCase,
    OperatorContract,
    definition_of_error,
    random_statistics,
)
from rankNAS.testing.problems import random_problem, random_trial
from rankNAS.testing.strategies import StrategyContract
from rankNAS.testing.tasks import TaskContract

__all__ = [
    "LAYERS",
    "HardwareContract",
    "LayerCase",
    "ObjectiveContract",
    "OperatorContract",
    "StrategyContract",
    "TaskContract",
    "definition_of_error",
    "random_problem",
    "random_statistics",
    "random_trial",
]
