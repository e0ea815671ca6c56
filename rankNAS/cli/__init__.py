"""The command line. Each command imports what it needs when it runs: ``--help`` loads no torch."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="ranknas",
    help="Search the ranks of low-rank compressed networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Space = Annotated[
    str,
    typer.Option(help="A built-in space, torchvision:NAME, timm:NAME or path/to/file.py:factory."),
]
Out = Annotated[str, typer.Option(help="Folder of the studies' folders.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Study = Annotated[str, typer.Argument(help="Name of a study in --out, or path of its folder.")]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        help="Fraction kept of the dense --cost, or COST=FRACTION. Repeatable, to hold together. "
        "Several, as 0.5,0.3, are answered one after the other."
    ),
]
Cost = Annotated[
    str, typer.Option(help="What a bare --budget bounds: macs, params, weight_bytes, latency.")
]
Objective = Annotated[
    list[str] | None,
    typer.Option(help="A name (see `ranknas objectives`) or file.py:function[=minimize]."),
]
Data = Annotated[
    str, typer.Option(help="digits, parquet:DIR, imagefolder:DIR, cifar10:DIR or file.py:factory.")
]
Normalize = Annotated[
    str | None,
    typer.Option(
        help="imagenet, cifar10 or MEAN,STD. Default: the weights' metadata, else imagenet."
    ),
]
ImageSize = Annotated[int | None, typer.Option(help="Resize images to this side.")]
Weights = Annotated[
    str | None,
    typer.Option(help="safetensors or state-dict file, or 'pretrained'. Default: train first."),
]
Trials = Annotated[int, typer.Option(help="Trials for each budget, in all; probes come on top.")]
Finetune = Annotated[int, typer.Option(help="Epochs of training of each chosen network.", min=0)]
Distill = Annotated[
    float, typer.Option(help="Weight of distillation from the dense model in trainings.")
]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of trainings.")]
ErrorNorm = Annotated[
    str, typer.Option(help="Norm of the decompositions: fisher, input, pooled or weight.")
]
Operators = Annotated[
    str | None, typer.Option(help="Comma-separated: svd,spatial_svd,tucker2,group_svd.")
]
Candidates = Annotated[int, typer.Option(help="Most choices of a layer before pruning.")]
MultipleOf = Annotated[int, typer.Option(help="Ranks are multiples of this.")]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Regular expression of layers to leave dense.")
]
Calibration = Annotated[int, typer.Option(help="Training samples for statistics.")]
Validation = Annotated[int, typer.Option(help="Training samples for the objectives.")]
BatchNorm = Annotated[bool, typer.Option(help="Correct batch norms after truncation.")]
Sequential = Annotated[
    bool, typer.Option(help="Fit each layer of the answers to the inputs that it really has.")
]
Hardware = Annotated[
    str,
    typer.Option(
        help="For latency: a name (see `ranknas hardware`), a device file (.toml, .json), a table "
        "of measured layers (.csv) or file.py:function(layer, choice) -> seconds."
    ),
]
LatencyBatch = Annotated[int, typer.Option(help="Inputs of the forward pass that is timed.")]
StrictHw = Annotated[
    bool, typer.Option("--strict-hw", help="Fail where a table has not seen a layer or choice.")
]
LatencySteps = Annotated[
    float | None,
    typer.Option(
        help="Drop ranks than which a larger one is as fast, within this fraction of the time."
    ),
]
OnlyFaster = Annotated[
    bool, typer.Option("--only-faster", help="Drop choices that are not faster than dense.")
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="sqlite:///FILE, journal:FILE (for network file systems) or the URL of a database, "
        "as postgresql://USER@HOST/NAME; its password may be in RANKNAS_STORAGE_PASSWORD. "
        "Default: study.db in the study's folder, or as before."
    ),
]
Device = Annotated[str, typer.Option(help="Where to run, for example cuda.")]
Workers = Annotated[
    int | None, typer.Option(help="Trials evaluated at the same time, by Ray.", min=1)
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join: auto or HOST:PORT. Default: start Ray here."),
]
GpusPerTrial = Annotated[
    float, typer.Option(help="GPUs of each worker; a fraction shares one.", min=0)
]
TrialTimeout = Annotated[
    float | None, typer.Option(help="Seconds after which a trial is cut off, as failed.")
]
EarlyStopping = Annotated[
    bool,
    typer.Option(
        "--early-stopping",
        help="Give up trials that are behind after a part of --trial-epochs, or without these on "
        "a part of the validation data.",
    ),
]
TrialEpochs = Annotated[
    int,
    typer.Option(
        help="Epochs of training of each trial's network before it is measured, with --distill "
        "and --learning-rate.",
        min=0,
    ),
]
TrialSamples = Annotated[
    int, typer.Option(help="Training samples of each of the --trial-epochs.", min=2)
]
TrustStorage = Annotated[
    bool,
    typer.Option("--trust-study", help="Open the storage that the study's options name."),
]
DEFAULT_OUT = "ranknas-studies"


@app.command()
def search(
    space: Space = "resnet18",
    strategy: Annotated[
        str, typer.Option(help="A name (see `ranknas strategies`) or path/to/file.py:factory.")
    ] = "auto",
    budget: Budget = None,
    cost: Cost = "macs",
    objective: Objective = None,
    data: Data = "digits",
    normalize: Normalize = None,
    image_size: ImageSize = None,
    weights: Weights = None,
    trials: Trials = 40,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    study: Annotated[
        str | None, typer.Option(help="Name of the study. Default: a new one.")
    ] = None,
    storage: Storage = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the study if it exists.")
    ] = False,
    out: Out = DEFAULT_OUT,
    finetune: Finetune = 0,
    distill: Distill = 0.5,
    learning_rate: LearningRate = 0.01,
    norm: ErrorNorm = "fisher",
    operators: Operators = None,
    candidates: Candidates = 256,
    multiple_of: MultipleOf = 1,
    exclude: Exclude = None,
    calibration: Calibration = 1024,
    validation: Validation = 1024,
    batch_norm: BatchNorm = True,
    sequential: Sequential = True,
    hardware: Hardware = "host",
    latency_batch: LatencyBatch = 1,
    strict_hw: StrictHw = False,
    latency_tolerance: LatencySteps = None,
    require_speedup: OnlyFaster = False,
    device: Device = "cpu",
    workers: Workers = 1,
    ray_address: RayAddress = None,
    gpus_per_trial: GpusPerTrial = 0.0,
    trial_timeout: TrialTimeout = None,
    early_stopping: EarlyStopping = False,
    trial_epochs: TrialEpochs = 0,
    trial_samples: TrialSamples = 2048,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search the ranks of a network under a budget, or several, and keep the result."""
    from rankNAS.cli.options import SearchOptions
    from rankNAS.cli.searching import run_search

    options = SearchOptions(
        space=space,
        strategy=strategy,
        budget=budget or [],
        cost=cost,
        objective=objective or ["accuracy"],
        data=data,
        normalize=normalize,
        image_size=image_size,
        weights=weights,
        trials=trials,
        seed=seed,
        study=study,
        storage=storage,
        out=out,
        finetune=finetune,
        distill=distill,
        learning_rate=learning_rate,
        norm=norm,
        operators=operators,
        candidates=candidates,
        multiple_of=multiple_of,
        exclude=exclude or [],
        calibration=calibration,
        validation=validation,
        batch_norm=batch_norm,
        sequential=sequential,
        hardware=hardware,
        latency_batch=latency_batch,
        strict_hw=strict_hw,
        latency_tolerance=latency_tolerance,
        require_speedup=require_speedup,
        device=device,
        workers=workers or 1,
        ray_address=ray_address,
        gpus_per_trial=gpus_per_trial,
        trial_timeout=trial_timeout,
        early_stopping=early_stopping,
        trial_epochs=trial_epochs,
        trial_samples=trial_samples,
    )
    run_search(options, resume=resume, as_json=json, quiet=quiet)


@app.command()
def compare(
    space: Space = "resnet18",
    strategies: Annotated[
        str, typer.Option(help="Comma-separated names (see `ranknas strategies`), or 'all'.")
    ] = "all",
    budget: Budget = None,
    cost: Cost = "macs",
    objective: Objective = None,
    data: Data = "digits",
    normalize: Normalize = None,
    image_size: ImageSize = None,
    weights: Weights = None,
    trials: Trials = 40,
    seeds: Annotated[int, typer.Option(help="Repeat with the seeds 0, 1, … below this.")] = 3,
    out: Annotated[
        str, typer.Option(help="Folder of the result. What it has is not searched again.")
    ] = "ranknas-comparison",
    finetune: Finetune = 0,
    finetune_samples: Annotated[
        int | None, typer.Option(help="Training samples of --finetune. Default: all.", min=1)
    ] = None,
    distill: Distill = 0.5,
    learning_rate: LearningRate = 0.01,
    norm: ErrorNorm = "fisher",
    operators: Operators = None,
    candidates: Candidates = 256,
    multiple_of: MultipleOf = 1,
    exclude: Exclude = None,
    calibration: Calibration = 1024,
    validation: Validation = 1024,
    batch_norm: BatchNorm = True,
    sequential: Sequential = True,
    hardware: Hardware = "host",
    latency_batch: LatencyBatch = 1,
    strict_hw: StrictHw = False,
    latency_tolerance: LatencySteps = None,
    require_speedup: OnlyFaster = False,
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare strategies on equal terms, over budgets (default 0.5) and seeds.

    Writes results.csv, summary.md and comparison.png.
    """
    from rankNAS.cli.comparing import run_compare
    from rankNAS.cli.options import CompareOptions

    options = CompareOptions(
        space=space,
        strategies=strategies,
        budget=budget or ["0.5"],
        cost=cost,
        objective=objective or ["accuracy"],
        data=data,
        normalize=normalize,
        image_size=image_size,
        weights=weights,
        trials=trials,
        seeds=seeds,
        out=out,
        finetune=finetune,
        finetune_samples=finetune_samples,
        distill=distill,
        learning_rate=learning_rate,
        norm=norm,
        operators=operators,
        candidates=candidates,
        multiple_of=multiple_of,
        exclude=exclude or [],
        calibration=calibration,
        validation=validation,
        batch_norm=batch_norm,
        sequential=sequential,
        hardware=hardware,
        latency_batch=latency_batch,
        strict_hw=strict_hw,
        latency_tolerance=latency_tolerance,
        require_speedup=require_speedup,
        device=device,
    )
    run_compare(options, as_json=json, quiet=quiet)


@app.command()
def resume(
    study: Study,
    out: Out = DEFAULT_OUT,
    trials: Annotated[
        int | None, typer.Option(help="Trials for each budget, in all. Default: as before.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Other bounds on the same costs. Default: as before. Repeatable."),
    ] = None,
    storage: Storage = None,
    workers: Workers = None,
    trust_study: Annotated[
        bool,
        typer.Option("--trust-study", help="Run the Python files that the study's options name."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a study, with the options it was started with, or with another budget."""
    from rankNAS.cli.searching import run_resume

    given = {"trials": trials, "budget": budget, "storage": storage, "workers": workers}
    changes = {name: value for name, value in given.items() if value is not None}
    run_resume(study, out, changes, trust_study=trust_study, as_json=json, quiet=quiet)


@app.command()
def show(
    study: Study,
    out: Out = DEFAULT_OUT,
    top: Annotated[int, typer.Option(help="How many trials to list.")] = 10,
    json: Json = False,
) -> None:
    """Show a study: its result, its best trials and the chosen ranks."""
    from rankNAS.cli.showing import run_show

    run_show(study, out, top, as_json=json)


@app.command(name="compile")
def compile_(
    space: Space = "resnet18",
    num_classes: Annotated[int, typer.Option(help="Classes of the model.")] = 1000,
    image_size: Annotated[int | None, typer.Option(help="Side of the input image.")] = None,
    operators: Operators = None,
    candidates: Candidates = 256,
    multiple_of: MultipleOf = 1,
    exclude: Exclude = None,
    json: Json = False,
) -> None:
    """Print the search space of a model: layers, choices, costs, and what stays dense and why."""
    from rankNAS.cli.listing import run_compile

    run_compile(
        space, num_classes, image_size, operators, candidates, multiple_of, exclude or [], json
    )


@app.command()
def export(
    study: Study,
    out: Out = DEFAULT_OUT,
    format: Annotated[str, typer.Option(help="safetensors, onnx or pt2.")] = "safetensors",
    output: Annotated[str | None, typer.Option(help="File to write.")] = None,
    space: Annotated[
        str | None, typer.Option(help="file.py:factory, for a study of a model of your own.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Which answer of a study of several budgets. Default: the first."),
    ] = None,
    json: Json = False,
) -> None:
    """Export the network of a study, reload it and compare outputs."""
    from rankNAS.cli.exporting import run_export

    run_export(study, out, format, output, space, budget or [], as_json=json)


@app.command()
def report(
    study: Study,
    out: Out = DEFAULT_OUT,
    output: Annotated[
        str | None, typer.Option(help="File to write. Default: report.html in the study's folder.")
    ] = None,
    trust_study: TrustStorage = False,
    json: Json = False,
) -> None:
    """Write one HTML file about a study that needs no network: tables, figures, configuration."""
    from rankNAS.cli.reporting import run_report

    run_report(study, out, output, trust_study=trust_study, as_json=json)


@app.command()
def dashboard(
    study: Study,
    out: Out = DEFAULT_OUT,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than this let other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 for a free one.", min=0, max=65535)
    ] = 8080,
    trust_study: TrustStorage = False,
) -> None:
    """Open a study in optuna-dashboard (needs the extra `dashboard`)."""
    from rankNAS.cli.serving import run_dashboard

    run_dashboard(study, out, host, port, trust_study=trust_study)


@app.command()
def spaces(json: Json = False) -> None:
    """List the built-in search spaces."""
    from rankNAS.cli.listing import run_spaces

    run_spaces(json)


@app.command()
def strategies(json: Json = False) -> None:
    """List the strategies."""
    from rankNAS.cli.listing import run_strategies

    run_strategies(json)


@app.command()
def objectives(json: Json = False) -> None:
    """List the objectives."""
    from rankNAS.cli.listing import run_objectives

    run_objectives(json)


@app.command()
def profile(
    space: Space = "resnet18",
    hw: Annotated[
        str, typer.Option(help="host to measure; or any hardware model, to --validate it.")
    ] = "host",
    batch: Annotated[int, typer.Option(help="Inputs of a forward pass.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="PyTorch's CPU threads. Default: as many as it takes.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Device file (.json) for --hardware. Default: in the cache."),
    ] = None,
    shapes: Annotated[
        int, typer.Option(help="Shapes of the space to time in any case; more if there is time.")
    ] = 320,
    general: Annotated[
        bool, typer.Option("--general", help="Time common shapes too, for other spaces.")
    ] = False,
    validate: Annotated[
        int, typer.Option(help="Measure so many random allocations end to end.", min=0)
    ] = 0,
    seconds: Annotated[float, typer.Option(help="Most time for --validate.", min=0)] = 600.0,
    study: Annotated[
        str | None, typer.Option(help="Validate on the best allocations of this study, too.")
    ] = None,
    studies: Annotated[str, typer.Option(help="Folder of the studies.")] = DEFAULT_OUT,
    seed: Annotated[int, typer.Option(help="Of the random allocations.")] = 0,
    num_classes: Annotated[int, typer.Option(help="Of the model.")] = 10,
    image_size: ImageSize = None,
    operators: Operators = None,
    candidates: Candidates = 256,
    multiple_of: MultipleOf = 1,
    exclude: Exclude = None,
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the layers of a space on this machine; compare predictions with whole networks."""
    from rankNAS.cli.profiling import ProfileOptions, run_profile

    options = ProfileOptions(
        space=space,
        hw=hw,
        batch=batch,
        threads=threads,
        out=out,
        shapes=shapes,
        general=general,
        validate=validate,
        seconds=seconds,
        study=study,
        studies=studies,
        seed=seed,
        num_classes=num_classes,
        image_size=image_size,
        operators=operators,
        candidates=candidates,
        multiple_of=multiple_of,
        exclude=exclude or [],
        device=device,
    )
    run_profile(options, as_json=json, quiet=quiet)


@app.command()
def hardware(json: Json = False) -> None:
    """List the hardware models and devices that latency can be predicted for."""
    from rankNAS.cli.listing import run_hardware

    run_hardware(json)


def _version(wanted: bool) -> None:
    if wanted:
        from rankNAS import __version__

        typer.echo(f"ranknas {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Search the ranks of low-rank compressed networks."""


def main() -> None:
    """Run the command line; mistakes of the user exit with 2 and one line, no traceback."""
    from rankNAS.exceptions import RankNASError, UsageError
    from rankNAS.io.files import is_full

    _own_stdout()
    try:
        app()
    except UsageError as error:
        _fail(error, 2)
    except RankNASError as error:
        _fail(error, 1)
    except BrokenPipeError:  # the reader of a pipe, `head` say, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # of a file that is not ours to write in one step, or a folder
        if not is_full(error):
            raise
        name = "" if error.filename is None else f" for {error.filename!r}"
        _fail(f"no room{name}: {error.strerror}. Make some, and run the same again.", 2)


def _own_stdout() -> None:
    """Keep stdout to ourselves: what C libraries print, as HiGHS does at times, goes to stderr."""
    before = sys.__stdout__
    if before is None or sys.stdout is not before:  # somebody else's already
        return
    try:
        own = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # closed, or no file
        return
    buffering = 1 if os.isatty(own) else -1
    encoding, errors = before.encoding, before.errors
    sys.stdout = open(own, "w", buffering, encoding=encoding, errors=errors)  # noqa: SIM115


def _fail(error: Exception | str, code: int) -> None:
    typer.echo(f"ranknas: error: {error}", err=True)
    sys.exit(code)
