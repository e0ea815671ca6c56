"""``ranknas search`` and ``ranknas resume``."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from rankNAS.budget import parse_budget
from rankNAS.cli.options import SearchOptions, read_options, study_folder
from rankNAS.cli.output import Reporter, percent, print_json, print_table, reporting
from rankNAS.data import Data, load_data, normalization_from_metadata, split
from rankNAS.engine import Settings, search
from rankNAS.evaluation import test_metrics
from rankNAS.exceptions import UsageError
from rankNAS.files import write_json
from rankNAS.hw_models import make_hardware
from rankNAS.objectives import make_objective
from rankNAS.plugins import is_plugin
from rankNAS.recovery.training import TrainingConfig, default_config, train
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.search_spaces.zoo import build_model
from rankNAS.strategies import make_strategy
from rankNAS.strategies.base import Trial
from rankNAS.study import Study
from rankNAS.tables import make_problem
from rankNAS.weights import load_weights, peek_metadata, pretrained_weights, trained_model

__all__ = ["run_resume", "run_search"]


def run_resume(
    study: str,
    out: str,
    trials: int | None,
    *,
    trust_study: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Go on with a study from the options in its folder."""
    options = read_options(study_folder(study, out))
    if (code := options.code()) and not trust_study:
        raise UsageError(
            f"the study's options name Python files ({', '.join(code)}), whose code would run; "
            "add --trust-study if you trust them."
        )
    if trials is not None:
        options = replace(options, trials=trials)
    run_search(options, resume=True, as_json=as_json, quiet=quiet)


def run_search(options: SearchOptions, *, resume: bool, as_json: bool, quiet: bool) -> None:
    """Search, test, fine-tune, keep and print."""
    started = time.perf_counter()
    options = options.named(resume)
    settings = _checked(options)
    _check_writable(options.folder)
    with reporting(quiet) as reporter:
        data = _data(options)
        model, space = _model(options, data, settings, reporter)
        study = _search(options, settings, data, model, space, reporter, resume)
        reporter.say("testing the dense and the compressed network")
        result = _keep(options, study, model, reporter)
    result["seconds"] = round(time.perf_counter() - started, 2)
    write_json(options.folder / "result.json", result)
    if as_json:
        print_json(result)
    else:
        _print(options, result)


def _checked(options: SearchOptions) -> Settings:
    """Everything that can be wrong with the options themselves, before any work is done."""
    parse_budget(options.budget, options.cost)
    make_strategy(options.strategy)
    make_hardware(options.hardware)
    for objective in options.objective:
        make_objective(objective)
    if options.trials < 1:
        raise UsageError(f"`--trials` must be at least 1, got {options.trials}.")
    policy = RankPolicy(options.candidates, options.multiple_of)
    if options.operators:
        policy = replace(policy, operators=tuple(options.operators.split(",")))
    return Settings(
        metric=options.metric,  # type: ignore[arg-type]
        calibration=options.calibration,
        validation=options.validation,
        batch_norm=options.batch_norm,
        policy=policy,
    )


def _check_writable(folder: Path) -> None:
    """Raise a UsageError if the folder cannot be made or written, without making it."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {str(folder)!r} cannot be written; give another --out.")


def _data(options: SearchOptions) -> Data:
    normalize = options.normalize
    of_file = options.weights not in (None, "pretrained")
    if normalize is None and of_file and not is_plugin(options.data):
        texts = peek_metadata(Path(str(options.weights))).values()
        normalize = next(filter(None, map(normalization_from_metadata, texts)), None)
    return load_data(options.data, normalize=normalize, image_size=options.image_size)


def _model(
    options: SearchOptions, data: Data, settings: Settings, reporter: Reporter
) -> tuple[nn.Module, SearchSpace]:
    """The trained dense model and its space; the budget is checked before any training."""
    if data.num_classes is None:
        raise UsageError(
            f"the command line searches classifiers, and {options.data} has no class labels; use "
            "the Python API with objectives of your own."
        )
    torch.manual_seed(options.seed)
    model = build_model(
        options.space, num_classes=data.num_classes, input_shape=data.input_shape
    ).eval()
    example = torch.zeros(1, *data.input_shape)
    space = compile_space(model, example, policy=settings.policy, exclude=options.exclude)
    budget = parse_budget(options.budget, options.cost)
    budget.pop("latency", None)
    make_problem(space, None, budget).check()
    if options.weights == "pretrained":
        model.load_state_dict(pretrained_weights(options.space, data.num_classes))
    elif options.weights is not None:
        load_weights(model, options.weights)
    else:
        _train_dense(options, data, model, space.dense_cost.macs, settings, reporter)
    return model, space


def _train_dense(
    options: SearchOptions,
    data: Data,
    model: nn.Module,
    macs: int,
    settings: Settings,
    reporter: Reporter,
) -> None:
    splits = split(
        data, calibration=settings.calibration, validation=settings.validation, seed=options.seed
    )
    images = len(splits.training)  # type: ignore[arg-type]
    trained_model(
        options.space,
        model,
        splits.training,
        fingerprint=f"{data.fingerprint}-{options.seed}-{len(splits.validation[1])}",
        seed=options.seed,
        config=default_config(macs, images, flip=data.flip),
        device=options.device,
        on_step=lambda step, total, loss: reporter.stage("train", step, total, f"loss {loss:.3f}"),
    )


def _search(
    options: SearchOptions,
    settings: Settings,
    data: Data,
    model: nn.Module,
    space: SearchSpace,
    reporter: Reporter,
    resume: bool,
) -> Study:
    def on_trial(trial: Trial, best: Trial | None) -> None:
        note = "" if best is None else f"best {options.objective[0]} {best.values[0]:.4f}"
        reporter.stage("trials", trial.number + 1, options.trials, note)

    budget = parse_budget(options.budget, options.cost)
    folder = options.folder
    fresh = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        study = search(
            model,
            data,
            objectives=options.objective,
            budget=budget,
            strategy=options.strategy,
            n_trials=options.trials,
            storage=options.storage_url,
            name=options.study or "",
            seed=options.seed,
            resume=resume,
            settings=settings,
            hardware=options.hardware,
            space=space,
            device=options.device,
            on_progress=reporter.stage,
            on_record=lambda: write_json(folder / "config.json", options.to_json()),
            on_trial=on_trial,
        )
    except KeyboardInterrupt:
        resume_with = f"ranknas resume {options.study} --out {options.out}"
        reporter.say(f"interrupted; finished trials are kept. Go on with: {resume_with}")
        sys.exit(130)
    finally:
        with suppress(OSError):  # nothing is left of a search that never began
            for path in fresh:
                path.rmdir()
    study.model = {
        "space": options.space,
        "num_classes": data.num_classes,
        "input_shape": list(data.input_shape),
    }
    return study


def _keep(
    options: SearchOptions, study: Study, model: nn.Module, reporter: Reporter
) -> dict[str, Any]:
    """Write the artifacts and return the result document."""
    folder, best = options.folder, study.best
    network = study.materialise()
    write_json(folder / "best.json", best.allocation.labels())
    artifact = study.save(folder / "best.safetensors", network=network)
    study.to_pandas().to_csv(folder / "trials.csv", index=False)
    test = study.test(network)
    dense_test = test_metrics(copy.deepcopy(model), study.splits.test, device=options.device)
    result: dict[str, Any] = {
        "study": options.study,
        "strategy": options.strategy,
        "space": options.space,
        "num_classes": study.data.num_classes,
        "input_shape": list(study.data.input_shape),
        "budget": dict(study.problem.budget),
        "cost": options.cost,
        "dense": _summary(study.dense, dense_test),
        "best": _summary(best.metrics, test) | {"allocation": best.allocation.labels()},
        "trials": [_trial(t) for t in study.trials],
        "pareto_front": [t.number for t in study.pareto_front()],
        "layers": {
            name: {"macs": layer.costs[0].macs, "best_macs": layer[best.allocation[name]].macs}
            for name, layer in study.evaluator.factorisation.space.layers.items()
        },
        "artifact": str(artifact),
    }
    if options.finetune:
        result["finetuned"] = _finetune(options, study, model, network, reporter)
        result["artifact"] = result["finetuned"]["artifact"]
    return result


def _finetune(
    options: SearchOptions,
    study: Study,
    model: nn.Module,
    network: nn.Module,
    reporter: Reporter,
) -> dict[str, Any]:
    """Train the chosen network; measured like the others, kept beside them."""
    config = TrainingConfig(
        options.finetune,
        learning_rate=options.learning_rate,
        distill=options.distill,
        flip=study.data.flip,
        seed=options.seed,
    )
    started = time.perf_counter()
    train(
        network,
        study.splits.training,
        config,
        teacher=copy.deepcopy(model) if options.distill > 0 else None,
        device=options.device,
        on_step=lambda step, total, loss: reporter.stage(
            "finetune", step, total, f"loss {loss:.3f}"
        ),
    )
    seconds = time.perf_counter() - started
    validation = test_metrics(network, study.splits.validation, device=options.device)
    test = test_metrics(network, study.splits.test, device=options.device)
    artifact = study.save(options.folder / "finetuned.safetensors", network=network.cpu())
    return {
        "epochs": options.finetune,
        "accuracy": validation["accuracy"],
        "test_accuracy": test["accuracy"],
        "seconds": round(seconds, 2),
        "artifact": str(artifact),
    }


def _summary(metrics: Any, test: dict[str, float]) -> dict[str, Any]:
    named = {"accuracy": metrics.get("accuracy"), "test_accuracy": test.get("accuracy")}
    return named | {k: v for k, v in metrics.items() if k not in named}


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "values": list(trial.values),
        "metrics": dict(trial.metrics),
        "allocation": trial.allocation.labels(),
        "seconds": round(trial.seconds, 3),
        **({"reason": trial.reason} if trial.reason else {}),
    }


def _print(options: SearchOptions, result: dict[str, Any]) -> None:
    dense, best = result["dense"], result["best"]
    costs = [n for n in ("macs", "params", "weight_bytes", "predicted_latency") if n in best]
    rows = [
        [name, f"{dense[name]:.4f}", f"{best[name]:.4f}"] for name in ("accuracy", "test_accuracy")
    ]
    rows += [[n, percent(dense, dense, n), percent(best, dense, n)] for n in costs]
    if "finetuned" in result:
        tuned = result["finetuned"]
        for row, name in zip(rows[:2], ("accuracy", "test_accuracy"), strict=True):
            row.append(f"{tuned[name]:.4f}")
        for row in rows[2:]:
            row.append("same")
    bounds = ", ".join(f"{k} <= {v:g}" for k, v in result["budget"].items()) or "no budget"
    columns = ["", "dense", "compressed", *(["fine-tuned"] if "finetuned" in result else [])]
    print_table(f"{result['study']}: {bounds} of the dense model", columns, rows)
    typer.echo(f"{len(result['trials'])} trials, {result['seconds']:.0f} s")
    typer.echo(f"network  {result['artifact']}")
    typer.echo(f"details  ranknas show {result['study']} --out {options.out}")


def load_result(folder: Path) -> dict[str, Any]:
    """The result document of a finished search.

    Raises:
        UsageError: The search has not finished.
    """
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        raise UsageError(
            f"study {folder.name!r} has no result yet; go on with: ranknas resume {folder.name} "
            f"--out {folder.parent}"
        ) from None
    return result
