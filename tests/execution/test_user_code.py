"""Objectives and models that exit, print, or leave a search with nothing to try."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.exceptions import ObjectiveError, StudyError
from rankNAS.objectives import Objective

X = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(96) % 4


def net(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 4)]
    return nn.Sequential(*layers).eval()


def searched(model: nn.Module | None = None, **options: Any) -> rankNAS.Study:
    given: dict[str, Any] = {"budget": {"macs": 0.6}, "strategy": "random", "n_trials": 3}
    return rankNAS.search(
        model or net(),
        (TensorDataset(X, Y), TensorDataset(X, Y)),
        settings=rankNAS.Settings(calibration=32, validation=32),
        **given | options,
    )


class Exiting:
    """Exits at its second call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, network: nn.Module, data: Any) -> float:
        self.calls += 1
        if self.calls == 2:
            sys.exit(0)
        return 1.0


def test_an_objective_that_exits_is_a_failed_trial() -> None:
    study = searched(objectives=["accuracy", Objective(Exiting(), name="mine")])
    assert [trial.state for trial in study.trials] == ["complete", "failed", "complete"]
    assert "objective 'mine' called sys.exit(0)" in study.trials[1].reason


def test_a_model_that_exits_is_a_failed_trial() -> None:
    armed: list[bool] = []

    class Quitting(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            if bool(x.isfinite().all()) and armed:  # which no trace can follow
                sys.exit(5)
            for layer in self:
                x = layer(x)
            return x

    with pytest.raises(ObjectiveError, match=r"3 trials in a row .*sys.exit\(5\)"):
        searched(Quitting(*net()), on_record=lambda: armed.append(True), n_trials=9)


def test_what_user_code_prints_is_not_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def loud(network: nn.Module, data: Any) -> float:
        print("from the objective")
        return 1.0

    searched(objectives=["accuracy", Objective(loud)])
    found = capsys.readouterr()
    assert not found.out and found.err.count("from the objective") == 3


def test_a_small_space_says_why_it_stops(caplog: pytest.LogCaptureFixture) -> None:
    study = searched(n_trials=3000)
    made = len(study.trials)
    assert made < 3000
    words = [r.getMessage() for r in caplog.records if "stops after" in r.getMessage()]
    assert len(words) == 1
    assert f"strategy 'random' stops after {made} of 3000 trials for macs<=0.6" in words[0]
    caplog.clear()
    searched(n_trials=40, strategy="solve")
    assert "stops after" not in caplog.text


@pytest.mark.parametrize("strategy", ["solve", "auto"])
def test_one_calibration_sample_corrects_no_statistics(
    strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    model(X)
    study = rankNAS.search(
        model.eval(),
        (TensorDataset(X, Y), TensorDataset(X, Y)),
        budget={"macs": 0.6},
        strategy=strategy,
        n_trials=2,
        settings=rankNAS.Settings(calibration=1, validation=32),
    )
    assert "two calibration samples" in caplog.text
    network: Any = study.materialise()
    assert torch.equal(network[1].running_var, model[1].running_var)  # type: ignore[arg-type]


class OwnNorm(nn.Module):
    """Running statistics outside PyTorch's batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x - self.running_mean
        return y


def test_statistics_that_are_not_corrected_are_said(caplog: pytest.LogCaptureFixture) -> None:
    searched(net(OwnNorm), n_trials=1)
    assert "running statistics of 2 modules, such as '1', are kept" in caplog.text
    caplog.clear()
    searched(net(lambda: nn.BatchNorm1d(64)), n_trials=1)
    assert "running statistics" not in caplog.text


def test_a_trained_model_with_weight_norm_is_searched() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = torch.nn.utils.weight_norm(nn.Conv1d(8, 64, 3))
    layers = [first, nn.ReLU(), nn.Conv1d(64, 64, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    x = torch.randn(96, 8, 16)
    model(x).sum().backward()
    study = rankNAS.search(
        model.eval(),
        (TensorDataset(x, Y), TensorDataset(x, Y)),
        budget={"macs": 0.8},
        strategy="solve",
        settings=rankNAS.Settings(calibration=32, validation=32),
    )
    assert study.materialise()(x).shape == (96, 4)


def test_another_activation_with_the_same_weights_does_not_resume(tmp_path: Any) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    searched(storage=storage)
    assert len(searched(storage=storage, resume=True, n_trials=5).trials) == 5
    with pytest.raises(StudyError, match="outputs of the model on the same data differ"):
        searched(net(nn.Tanh), storage=storage, resume=True, n_trials=7)


def test_a_setting_that_outputs_hardly_show_does_not_resume(tmp_path: Any) -> None:
    storage, tanh = f"sqlite:///{tmp_path}/study.db", partial(nn.GELU, "tanh")
    x = X[:8]
    torch.testing.assert_close(net(nn.GELU)(x), net(tanh)(x), atol=1e-3, rtol=0)
    searched(net(nn.GELU), storage=storage)
    compiled = torch.compile(net(nn.GELU), backend="eager")
    assert len(searched(compiled, storage=storage, resume=True, n_trials=4).trials) == 4
    with pytest.raises(StudyError, match=r"modules of the model differ \(GELU.*tanh.* instead of"):
        searched(net(tanh), storage=storage, resume=True, n_trials=5)


def test_a_study_from_before_outputs_were_kept_resumes(tmp_path: Any) -> None:
    import optuna

    from rankNAS.storage.store import CONFIGURATION

    storage = f"sqlite:///{tmp_path}/study.db"
    searched(storage=storage)
    study = optuna.load_study(study_name="study", storage=storage)
    kept = dict(study.user_attrs[CONFIGURATION])
    assert kept.pop("outputs") and kept.pop("modules")
    study.set_user_attr(CONFIGURATION, kept)
    assert len(searched(storage=storage, resume=True, n_trials=4).trials) == 4
