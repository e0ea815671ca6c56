"""Nothing that is loaded runs code, and no name leads out of its folder."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.allocation import Allocation
from rankNAS.cli import main
from rankNAS.cli.options import CompareOptions, SearchOptions, check_name
from rankNAS.compression.calibration import calibrate
from rankNAS.data.loading import load_data
from rankNAS.exceptions import DataError, UsageError, WeightsError
from rankNAS.hw_models import Host, device_names, make_hardware
from rankNAS.hw_models.profiles import Profile, Terms
from rankNAS.io.files import cache_folder, write_json
from rankNAS.io.formats import current_format
from rankNAS.io.tensors import read_tensors, write_tensors
from rankNAS.models import artifact
from rankNAS.models.weights import load_weights, peek_metadata, trained_model
from rankNAS.objectives import make_objective
from rankNAS.recovery import TrainingConfig, train
from rankNAS.reporting.rows import COLUMNS
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model
from rankNAS.storage.store import StudyStore
from rankNAS.strategies import make_strategy

# ------------------------------------------------------------------------------- the sources

#: Calls that run what they are given, or unpickle it. Some have a form that does not, see below.
BANNED = {
    *("eval", "exec", "__import__", "os.system", "os.popen", "runpy.run_path"),
    *(f"{m}.{f}" for m in ("pickle", "cloudpickle", "dill", "marshal") for f in ("load", "loads")),
    *("pickle.Unpickler", "shelve.open", "joblib.load", "yaml.load", "yaml.unsafe_load"),
    *("pd.read_pickle", "pandas.read_pickle", "numpy.load", "np.load", "torch.load"),
    *("torch.package.PackageImporter", "torch.jit.load", "torch.hub.load", "torch.export.load"),
    "importlib.util.spec_from_file_location",
}
ALLOWED = {
    ("plugins.py", "importlib.util.spec_from_file_location"),  # the user's own argument
    ("export.py", "torch.export.load"),  # what was written a moment ago, to compare it
    ("helpers.py", "pickle.loads"),  # what its parent has written a moment ago, by the digest
}


def dangerous(source: str) -> list[str]:
    """The names of banned calls in a source."""
    tree = ast.parse(source)
    homes: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            homes |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            homes |= {a.asname: a.name for a in node.names if a.asname}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, dot, rest = ast.unparse(node.func).partition(".")
        name = homes.get(head, head) + dot + rest
        safely = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if name == "torch.load" and safely.get("weights_only") is True:
            continue
        if name == "pickle.loads" and ast.unparse(node.args[0]).startswith("pickle.dumps("):
            continue
        if name in BANNED or name.rpartition(".")[2] in ("eval", "exec") and "." not in name:
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import torch\ntorch.load(path, weights_only=False)", "torch.load"),
        ("import torch\ntorch.load(path, weights_only=flag)", "torch.load"),
        ("from torch import load as read\nread(path)", "torch.load"),
        ("import torch as t\nt.load(path)", "torch.load"),
        ("import pickle\npickle.loads(content)", "pickle.loads"),
        ("from pickle import load\nload(file)", "pickle.load"),
        ("import numpy as np\nnp.load(path)", "numpy.load"),
        ("eval(text)", "eval"),
        ("def f():\n    return [exec(x) for x in y]", "exec"),
    ],
)
def test_dangerous_calls_are_recognised(source: str, name: str) -> None:
    assert dangerous(source) == [name]


def test_harmless_calls_are_not() -> None:
    assert not dangerous(
        "import json, pickle, torch\nmodel.eval()\njson.loads(text)\n"
        "torch.load(path, weights_only=True)\npickle.loads(pickle.dumps(x))\nre.compile(text)"
    )


def test_no_source_runs_what_it_loads() -> None:
    root = Path(rankNAS.__path__[0])
    found, read = [], 0
    for folder in (root, *(root / name for name in ("search_spaces", "objectives", "hw_models"))):
        for path in folder.rglob("*.py"):
            calls = {(path.name, name) for name in dangerous(path.read_text("utf-8"))}
            found += [f"{path}: {name}" for name in sorted(calls - ALLOWED)]
            read += 1
    assert not found and read > 60


# --------------------------------------------------------------------------- evil pickles


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


def write_evil(path: Path, trace: Path, writer: str) -> None:
    """The same evil content, as a bare pickle or in one of PyTorch's formats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"weight": Evil(trace), "identity": Evil(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")


writers = pytest.mark.parametrize("writer", ["pickle", "zip", "legacy"])


def linear(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


def samples(width: int = 64) -> TensorDataset:
    x = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.arange(24) % 4)


@writers
def test_the_evil_files_are_evil(tmp_path: Path, trace: Path, writer: str) -> None:
    write_evil(tmp_path / "a.pt", trace, writer)
    if writer == "pickle":
        pickle.loads((tmp_path / "a.pt").read_bytes())
    else:
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert trace.exists()


@writers
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ""])
def test_as_weights(tmp_path: Path, trace: Path, writer: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    write_evil(path, trace, writer)
    with pytest.raises(WeightsError, match=f"weights{suffix}"):
        load_weights(linear(), path)
    assert peek_metadata(path) == {} and not trace.exists()


@writers
def test_as_an_artifact(tmp_path: Path, trace: Path, writer: str) -> None:
    path = tmp_path / "best.safetensors"
    write_evil(path, trace, writer)
    with pytest.raises(WeightsError, match="best"):
        rankNAS.load(path, linear)
    assert not trace.exists()


@writers
def test_as_a_cached_calibration(
    tmp_path: Path, trace: Path, writer: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = linear(), samples().tensors[0]
    space = compile_space(model, x[:1])
    expected = calibrate(model, space, x, cache=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    write_evil(path, trace, writer)
    with caplog.at_level(logging.WARNING):
        found = calibrate(model, space, x, cache=tmp_path / "cache")
    assert str(path) in caplog.text and not trace.exists()
    assert all(
        torch.equal(found[name].input_second_moment, expected[name].input_second_moment)
        for name in expected
    )


@writers
def test_as_a_checkpoint_and_as_a_trained_model(
    trace: Path, writer: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainingConfig(1, batch_size=8, augment=False)

    def trained() -> torch.Tensor:
        model = trained_model("l", linear(), samples(), fingerprint="f", seed=0, config=config)
        return next(model.parameters()).detach().clone()

    expected = trained()
    (path,) = (cache_folder() / "models").iterdir()
    write_evil(path, trace, writer)
    checkpoint = path.with_suffix(".partial.pt")
    write_evil(checkpoint, trace, writer)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(trained(), expected)
    assert str(path) in caplog.text and str(checkpoint) in caplog.text
    assert torch.equal(trained(), expected) and not checkpoint.exists()
    write_evil(checkpoint, trace, writer)
    with pytest.raises(WeightsError, match=r"partial\.pt is no readable.*delete it"):
        train(linear(), samples(), config, checkpoint=checkpoint)  # the user's own: not replaced
    assert not trace.exists()


@writers
def test_as_a_profile(
    tmp_path: Path, trace: Path, writer: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "host.json"
    write_evil(path, trace, writer)
    space = compile_space(linear(), samples().tensors[0][:1])
    with pytest.raises(UsageError, match=r"host\.json' cannot be read"):
        make_hardware(str(path)).bind(None, space)
    cached = Host(shapes=2, repeats=3, seconds=0.0)
    write_evil(cached.path, trace, writer)
    with caplog.at_level(logging.WARNING):
        cached.bind(None, space)
    assert "It is made again" in caplog.text and str(cached.path) in caplog.text
    assert Profile.read(cached.path).stages and not trace.exists()
    for suffix in (".toml", ".csv"):
        other = tmp_path / f"device{suffix}"
        write_evil(other, trace, writer)
        with pytest.raises(UsageError, match=f"device{suffix}"):
            make_hardware(str(other))
    assert not trace.exists()


def test_as_a_batch_of_cifar10(tmp_path: Path, trace: Path) -> None:
    """torchvision unpickles these files, but only those whose MD5 it knows."""
    folder = tmp_path / "cifar-10-batches-py"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        write_evil(folder / name, trace, "pickle")
    with pytest.raises(DataError, match="no intact cifar-10-batches-py"):
        load_data(f"cifar10:{tmp_path}")
    assert not trace.exists()


# -------------------------------------------------- code that a study or a file would smuggle in

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: exit code, and what it printed on stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["ranknas", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        code = stopped.value.code
        return int(code or 0), capfd.readouterr().err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return run


@pytest.fixture
def evil(tmp_path: Path, trace: Path) -> str:
    """The path of a file that leaves a trace when it is imported, under two names."""
    content = (
        f"from pathlib import Path\nPath({str(trace)!r}).touch()\n"
        "from torch import nn\n"
        "def factory(*given, **named):\n    return nn.Sequential(nn.Linear(64, 4))\n"
    )
    for name in ("evil.py", "evil.PY"):
        (tmp_path / name).write_text(content)
    return str(tmp_path / "evil.py")


def stored(folder: Path, /, **changes: Any) -> Path:
    """A study's configuration with some entries replaced."""
    written = {**SearchOptions(study=folder.name).to_json(), "format": current_format("options")}
    write_json(folder / "config.json", written | changes)
    return folder


CODE = ["{evil}:factory", "~/evil.py:factory", "evil.py:factory", "./evil.py:factory"]
FIELDS = ["space", "strategy", "data", "task", "hardware", "objective"]


@pytest.mark.parametrize("spec", CODE)
@pytest.mark.parametrize("field", FIELDS)
def test_a_stored_configuration_runs_no_code(
    run: Run, tmp_path: Path, evil: str, trace: Path, field: str, spec: str
) -> None:
    text = spec.format(evil=evil)
    value: Any = text if field != "objective" else ["accuracy", f"{text}=minimize"]
    folder = stored(tmp_path / "study", **{field: value})
    code, error = run("resume", str(folder))
    assert code == 2 and "--trust-study" in error and "evil.py" in error
    for command in ("show", "export"):
        assert run(command, str(folder))[0] == 2
    assert not trace.exists()


def test_the_configuration_is_refused_for_what_would_run(
    run: Run, tmp_path: Path, evil: str, trace: Path
) -> None:
    """With the flag the same study does run it: the tests above are about something."""
    folder = stored(tmp_path / "study", hardware=f"{evil}:factory", norm="unknown")
    optuna.create_study(storage=f"sqlite:///{folder}/study.db", study_name="study")
    code, error = run("resume", str(folder), "--trust-study", "--quiet")
    assert code == 2 and trace.exists(), error


@pytest.mark.parametrize(
    "change",
    [
        {"space": ["{evil}:factory"]},
        {"space": {"{evil}:factory": 1}},
        {"space": None},
        {"strategy": ["{evil}:factory"]},
        {"strategy": None},
        {"data": ["{evil}:factory"]},
        {"data": None},
        {"hardware": ["{evil}:factory"]},
        {"hardware": 3},
        {"objective": "{evil}:factory"},
        {"objective": [["{evil}:factory"]]},
        {"objective": [None]},
        {"objective": None},
        {"objective": {"{evil}:factory": 1}},
        {"budget": 0.5},
        {"budget": [0.5]},
        {"trials": "40"},
        {"trials": True},
        {"trials": 1.5},
        {"learning_rate": "0.1"},
        {"batch_norm": 1},
        {"image_size": "32"},
        {"exclude": "conv"},
        {"storage": ["sqlite:///x"]},
        {"weights": 3},
        {"code": "{evil}:factory"},
        {"folder": "/"},
        {"__class__": "{evil}:factory"},
    ],
)
def test_a_configuration_of_wrong_types(
    run: Run, tmp_path: Path, evil: str, trace: Path, change: dict[str, Any]
) -> None:
    filled = json.loads(json.dumps(change).replace("{evil}", evil))
    folder = stored(tmp_path / "study", **filled)
    for trust in ([], ["--trust-study"]):
        code, error = run("resume", str(folder), *trust)
        assert code == 2 and "config.json' is damaged" in error, error
        assert next(iter(change)) in error and len(error.splitlines()) == 1
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"study": NaN}'],
)
def test_a_configuration_that_is_no_mapping(run: Run, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "config.json").write_bytes(content)
    for command in ("resume", "dashboard"):
        code, error = run(command, str(folder))
        assert code == 2 and "config.json' is damaged" in error and "Traceback" not in error


@pytest.mark.parametrize("field", [*FIELDS, "weights"])
def test_other_spellings_are_unknown_names(
    run: Run, tmp_path: Path, evil: str, trace: Path, field: str
) -> None:
    for spec in (f"{evil[:-3]}.PY:factory", f"{evil}:not a name", f"{evil} :factory", evil):
        value: Any = [spec] if field == "objective" else spec
        changes = {"trials": 1, "budget": ["0.5"], field: value}
        code, error = run("resume", str(stored(tmp_path / "study", **changes)), "--quiet")
        assert code == 2 and "Traceback" not in error
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"storage": "postgresql://evil.example/db"}, "storage"),
        ({"storage": "mssql+pyodbc:///?odbc_connect=DRIVER=/tmp/evil.so"}, "storage"),
        ({"storage": " sqlite://evil"}, "storage"),
        ({"storage": "SQLITE://x"}, "storage"),
        ({"ray_address": "evil.example:6379"}, "ray_address"),
        ({"ray_address": ""}, "ray_address"),
    ],
)
def test_a_stored_configuration_connects_to_nothing(
    run: Run, tmp_path: Path, change: dict[str, str], named: str
) -> None:
    """A Ray cluster runs code here; a database may, by its driver, and is sent the password."""
    code, error = run("resume", str(stored(tmp_path / "study", **change)))
    assert code == 2 and "--trust-study" in error and f"({named})" in error


def test_studies_in_files_are_trusted() -> None:
    for storage in (None, "sqlite:///study.db", "journal:study.log", "study.db"):
        assert SearchOptions(storage=storage).elsewhere() == []


def network_file(folder: Path, model: dict[str, Any]) -> Path:
    network = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    return artifact.save(network, Allocation.of({}), folder / "best.safetensors", model=model)


BUILT = {"space": "resnet20", "num_classes": 10, "input_shape": [3, 32, 32]}


@pytest.mark.parametrize("spec", CODE)
@pytest.mark.parametrize("where", ["artifact", "result", "both"])
def test_neither_an_artifact_nor_a_result_names_code_that_runs(
    run: Run, tmp_path: Path, evil: str, trace: Path, where: str, spec: str
) -> None:
    bad = BUILT | {"space": spec.format(evil=evil)}
    folder = stored(tmp_path / "study")
    path = network_file(folder, BUILT if where == "result" else bad)
    result = (BUILT if where == "artifact" else bad) | {"solutions": [{"artifact": str(path)}]}
    write_json(folder / "result.json", result)
    code, error = run("export", str(folder))
    assert code == 2
    assert "name it with --space" in error or "give the function that builds it" in error
    if where != "result":
        with pytest.raises(UsageError, match="give the function that builds it"):
            rankNAS.load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "model",
    [
        [1],
        "resnet20",
        3,
        {"space": ["evil.py:factory"], "num_classes": 10, "input_shape": [3, 32, 32]},
        {"space": None, "num_classes": 10, "input_shape": [3, 32, 32]},
        {"space": "resnet20"},
        {"space": "resnet20", "num_classes": "10", "input_shape": [3, 32, 32]},
        {"space": "resnet20", "num_classes": 10, "input_shape": 3},
        {"space": "resnet20", "num_classes": 10, "input_shape": [3, "32", 32]},
    ],
)
def test_an_artifact_that_says_nonsense_about_its_model(
    tmp_path: Path, evil: str, trace: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = network_file(tmp_path, BUILT)
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, metadata | {"model": json.dumps(model)})
    with pytest.raises(WeightsError, match=r"best\.safetensors.* does not say how its model"):
        rankNAS.load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "result",
    [
        [],
        {},
        {"solutions": []},
        {"solutions": [{}]},
        {"solutions": [{"artifact": 3}]},
        {"solutions": [{"artifact": "../best.safetensors"}]},
        {"solutions": [{"artifact": "best.safetensors"}], "space": "resnet20"},
        {"solutions": [{"artifact": "best.safetensors"}], **BUILT, "input_shape": 3},
        {"solutions": [{"artifact": "best.safetensors"}], **BUILT, "num_classes": "x"},
        {"solutions": [{"artifact": ".."}], **BUILT},
        {"solutions": [{"artifact": "a\0b"}], **BUILT},
        {"solutions": [{"artifact": "/etc/passwd"}], **BUILT},
        {"trials": [3]},
        {"trials": [{"state": "complete", "probe": False}]},
        {"trials": [{"state": "complete", "probe": False, "metrics": {}, "allocation": [1]}]},
    ],
)
def test_a_result_that_is_nonsense(run: Run, tmp_path: Path, result: Any) -> None:
    folder = stored(tmp_path / "study")
    write_json(folder / "result.json", result)
    validate = ("profile", "--space", "resnet20", "--hw", device_names()[0], "--study")
    for arguments in (("export", str(folder)), (*validate, str(folder), "--quiet")):
        code, error = run(*arguments)
        assert code == 2 and "Traceback" not in error and error.startswith("ranknas: error: ")


@pytest.mark.parametrize("content", [b"[]", b"3", b"{", b"\xff", b'{"space": []}', b"[" * 99_999])
def test_a_comparison_with_a_damaged_configuration(
    run: Run, tmp_path: Path, content: bytes
) -> None:
    folder = tmp_path / "comparison"
    folder.mkdir()
    (folder / "results.csv").write_text("strategy\n")
    (folder / "config.json").write_bytes(content)
    code, error = run("compare", "--out", str(folder), "--strategies", "uniform", "--quiet")
    assert code == 2 and str(folder) in error and "Traceback" not in error


def test_a_comparison_runs_no_stored_code(
    run: Run, tmp_path: Path, evil: str, trace: Path
) -> None:
    folder = tmp_path / "comparison"
    options = CompareOptions(budget=["0.5"]).to_json() | {"space": f"{evil}:factory"}
    write_json(folder / "config.json", options)
    (folder / "results.csv").write_text(",".join(COLUMNS) + "\n")
    code, error = run("compare", "--out", str(folder), "--strategies", "uniform", "--quiet")
    assert code == 2 and "another configuration: space was" in error and not trace.exists()


# ---------------------------------------------------------------------------------------- names

NAMES = [
    "../../x",
    "/etc/x",
    "a\0b",
    "x" * 300,
    "x" * 5000,
    "con",
    "NUL.txt",
    ".hidden",
    "..",
    "-rf",
    "a/b",
    "a\\b",
    "a\nb",
    "a\n",
    "\u0430\u0455",  # Cyrillic letters that look Latin
    "\uff0e\uff0e\uff0fx",  # a full-width ../x
    "a\u202eb",
    "",
    " ",
    "~root/x",
    "~nobody-at-all/x",
    "$HOME",
    "a:b",
    "*",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """What is below the current folder and its parent, apart from the cache."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return lambda: sorted(p for p in tmp_path.rglob("*") if p != here)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_studies(run: Run, place: Callable[[], list[Path]], name: str) -> None:
    before = place()
    with pytest.raises(UsageError, match="`--study` must be"):
        check_name(name)
    code, error = run("search", f"--study={name}", "--strategy", "random", "--trials", "1")
    assert code == 2 and "`--study` must be" in error and place() == before


@pytest.mark.parametrize(
    "name", ["first", "resnet18-auto-0.5", "params=0.6", "_a", "context", "x" * 120]
)
def test_good_names_of_studies(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("", " ")])
def test_studies_that_are_looked_for(run: Run, place: Callable[[], list[Path]], name: str) -> None:
    before = place()
    for command in ("resume", "show", "export", "dashboard", "report"):
        code, error = run(command, "--", name)
        assert code == 2 and "Traceback" not in error, (command, error)
        assert "there is no study" in error and len(error) < 500
        code, error = run(command, "none", f"--out={name}")
        assert code == 2 and "there is no study" in error and len(error) < 500
    assert place() == before


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x/" * 3000])
def test_folders_that_cannot_be(run: Run, place: Callable[[], list[Path]], name: str) -> None:
    before = place()
    for command in (["search", "--strategy", "random"], ["compare", "--strategies", "uniform"]):
        code, error = run(*command, "--budget", "0.5", f"--out={name}", "--quiet")
        assert code == 2 and "cannot be written" in error and "Traceback" not in error
    assert place() == before


@pytest.mark.parametrize("name", NAMES)
def test_names_of_studies_in_a_storage_are_no_paths(
    place: Callable[[], list[Path]], name: str
) -> None:
    before = place()
    store = StudyStore.open(
        optuna.storages.InMemoryStorage(),
        name or "empty",
        configuration={},
        choices={name: ["dense"]},
        directions=["maximize"],
        resume=False,
    )
    assert store.study.study_name == (name or "empty") and place() == before


@pytest.mark.parametrize("name", NAMES)
def test_names_of_models_data_and_hardware(place: Callable[[], list[Path]], name: str) -> None:
    before = place()
    shape = (3, 32, 32)
    for spec in (name, f"torchvision:{name}", f"timm:{name}"):
        with pytest.raises(UsageError):
            build_model(spec, num_classes=10, input_shape=shape)
    space = compile_space(linear(), samples().tensors[0][:1])
    attempts: list[Callable[[], object]] = [
        lambda: build_model(f"{name}.py:factory", num_classes=10, input_shape=shape),
        lambda: make_strategy(name),
        lambda: make_strategy(f"{name}.py:factory"),
        lambda: make_objective(name),
        lambda: make_objective(f"{name}.py:fn=minimize"),
        lambda: make_hardware(name),
        lambda: make_hardware(f"{name}.toml"),
        lambda: make_hardware(f"{name}.csv"),
        lambda: make_hardware(f"{name}.json").bind(None, space),
        lambda: make_hardware(f"{name}.py:fn"),
        lambda: load_data(name),
        *(
            lambda kind=kind: load_data(f"{kind}:{name}/none")
            for kind in ("parquet", "imagefolder", "cifar10")
        ),
        lambda: load_data(f"{name}.py:factory"),
        lambda: load_weights(linear(), f"{name}.pt"),
        lambda: load_weights(linear(), f"{name}.safetensors"),
        lambda: rankNAS.load(f"{name}.safetensors"),
    ]
    for i, attempt in enumerate(attempts):
        with pytest.raises(UsageError) as caught:
            attempt()
        assert str(caught.value), i
    assert place() == before


class Named(nn.Module):
    """A layer and a whole network, under names that would be paths."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(64, 64))
        self.head = nn.Linear(64, 4)
        self.inner = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: nn.Module = self._modules[self.inner]
        out: torch.Tensor = self.head(torch.relu(inner(x)))
        return out


@pytest.mark.parametrize("name", [n for n in NAMES if n and "." not in n])
def test_names_of_layers_are_no_paths(
    place: Callable[[], list[Path]], tmp_path: Path, name: str
) -> None:
    """Torch allows any name without a dot; files of ours hold names, and are not called so."""
    before = place()
    model, x = Named(name).eval(), samples().tensors[0]
    space = compile_space(model, x[:1])
    assert name in space.layers
    first = calibrate(model, space, x, cache=cache_folder())
    again = calibrate(model, space, x, cache=cache_folder())
    assert torch.equal(first[name].input_second_moment, again[name].input_second_moment)
    config = TrainingConfig(1, batch_size=8, augment=False)
    trained_model(name, model, samples(), fingerprint=name, seed=0, config=config)
    for path in cache_folder().rglob("*"):
        assert path.is_dir() or len(path.stem) <= 64
    assert place() == before
    path = artifact.save(model, Allocation.of({}), tmp_path / "here" / "a.safetensors")
    again_model = artifact.load(path, lambda: Named(name))
    assert torch.equal(again_model(x), model(x))
    assert os.listdir(path.parent) == ["a.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_devices_are_not_in_the_path_of_a_profile(name: str) -> None:
    path = Host()._path(Terms(name, 2, name, name))
    assert path.parent == cache_folder() / "hardware" and len(path.name) == len("host-.json") + 16


@pytest.mark.parametrize("part", NAMES)
def test_the_name_of_an_unnamed_study_is_a_good_one(part: str) -> None:
    for field in ("space", "strategy"):
        options = SearchOptions(out="nowhere", budget=[part], **{field: f"{part}.py:f"})
        name = options.named(resume=False).study
        assert name is not None
        check_name(name)
