"""Measurements of this machine. What is measured is made up here: timings are no tests."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankNAS.allocation import DENSE, Allocation
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.hw_models import Host, compile_latency, host, make_hardware
from rankNAS.hw_models.base import stages
from rankNAS.hw_models.blocks import combined as _combined
from rankNAS.hw_models.host import general_shapes
from rankNAS.hw_models.networks import place, random_allocations
from rankNAS.hw_models.profiles import Measurement, NetworkFit, Profile, Terms
from rankNAS.hw_models.regression import StageRegression, kind_of, traffic
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.testing import HardwareContract

REST, DENSE_FACTOR, FACTOR = 3e-3, 1.2, 0.9


class TestHost(HardwareContract):
    hardware = Host(repeats=3, seconds=0.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Flatten(),
        nn.Linear(32 * 36, 24),
        nn.Linear(24, 5),
    ).eval()


@cache
def space(policy: RankPolicy | None = None) -> SearchSpace:
    policy = policy or RankPolicy(candidates=60)
    return compile_space(network(), torch.randn(1, 8, 6, 6), policy=policy, min_weights=1)


def truth(shape: LayerShape) -> float:
    """A smooth made-up device: an overhead, work and traffic, slower with groups."""
    macs = shape.cost().macs
    return 2e-5 + macs / 2e9 * shape.groups**0.3 + traffic(shape) / 5e9


class MadeUp:
    """Stands in for the clock: stages take `truth`, networks what the stages explain."""

    def __init__(self, of: SearchSpace) -> None:
        self.space = of
        self.stages: list[LayerShape] = []
        self.networks = 0
        self.fails_after = math.inf
        self.blocks = 0
        self.places: dict[str, float] = {}  # how much longer layers take in the network
        self.slowing = 0.0  # of the machine, from each block of stages to the next
        self.disturbed: dict[
            int, float
        ] = {}  # blocks that are slower, some stages more than others

    def slowness(self, block: int) -> float:
        return 1 + self.slowing * block

    def measure(self, model: Host, timed: Sequence[LayerShape]) -> list[Measurement]:
        if len(self.stages) + len(timed) > self.fails_after:
            raise KeyboardInterrupt
        self.stages += timed
        slow, disturbed = self.slowness(self.blocks), self.disturbed.get(self.blocks, 1.0)
        self.blocks += 1
        times = [
            slow * disturbed ** (0.5 + i / len(timed)) * truth(s) for i, s in enumerate(timed)
        ]
        return [Measurement(t, 0.01 * t, 9) for t in times]

    def drift_monitor(self, runs: Sequence[FakeNetwork], **_: object) -> FakeDriftMonitor:
        return FakeDriftMonitor(runs)

    def built(self, network: nn.Module, allocation: Allocation, x: torch.Tensor) -> FakeNetwork:
        self.networks += 1
        times = []
        for name, choice in allocation.items():
            factor = DENSE_FACTOR if choice == DENSE else FACTOR
            factor *= self.places.get(place(name, choice), 1.0)
            times.append(factor * sum(map(truth, stages(self.space.layers[name], choice))))
        return FakeNetwork(np.array(times))


class FakeNetwork:
    """Its layers take what they take, and it REST more."""

    def __init__(self, times: np.ndarray) -> None:
        self.times = times
        self.total = REST + times.sum()

    def watching(self, _: object) -> FakeNetwork:
        return self

    def seconds(self) -> np.ndarray:
        return self.times


class FakeDriftMonitor:
    """Networks take what they take."""

    def __init__(self, runs: Sequence[FakeNetwork]) -> None:
        self.runs = [run.total for run in runs]
        self.shares = [0.0]

    def after(self, share: float) -> None:
        assert self.shares[-1] <= share <= 1
        self.shares.append(share)

    def seconds(self) -> np.ndarray:
        assert self.shares[-1] == 1
        return np.array(self.runs, dtype=float)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    made = MadeUp(space())
    monkeypatch.setattr(Host, "_measure", lambda self, shapes: made.measure(self, shapes))
    monkeypatch.setattr(host, "built", made.built)
    monkeypatch.setattr(host, "waiting", lambda run, device: run)
    monkeypatch.setattr(host, "DriftMonitor", made.drift_monitor)
    monkeypatch.setattr(host, "LIMIT", 1e-9)
    return made


def bound(path: Path, **options: object) -> Host:
    inputs = torch.randn(1, 8, 6, 6)
    return Host(file=path, **options).bind(network(), space(), inputs)


PROFILES: list[tuple[Host, str]] = []  # the first, and the text of its file


def profiled(path: Path, clock: MadeUp) -> Path:
    """The profile that `bound` makes, which is made once. Needs `clock`."""
    if PROFILES:
        path.write_text(PROFILES[0][1])
    else:
        model = bound(path)
        PROFILES.append((model, path.read_text()))
    return path


def test_a_part_is_measured_and_the_rest_is_predicted(clock: MadeUp, tmp_path: Path) -> None:
    model = bound(tmp_path / "host.json", shapes=60)
    every = {s for x in space().layers.values() for c in x for s in stages(x, c)}
    assert len(clock.stages) < 0.7 * len({replace(s, bias=False) for s in every})
    assert {kind_of(s) for s in clock.stages} == {kind_of(s) for s in every}
    errors = []
    for shape in every:
        seconds, sigma = model.stage(shape)
        errors.append(abs(seconds / truth(replace(shape, bias=False)) - 1))
        assert 0 <= sigma < seconds
    assert np.median(errors) < 0.02 and max(errors) < 0.25


def test_all_is_measured_if_there_is_time(
    clock: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "LIMIT", 1e9)
    monkeypatch.setattr(host, "FITTED", 20)
    path = tmp_path / "host.json"
    model = bound(path, shapes=10)
    every = {s for x in space().layers.values() for c in x for s in stages(x, c)}
    assert set(clock.stages) == {replace(s, bias=False) for s in every}
    for shape, found in Profile.read(path).stages.items():
        assert found.seconds == pytest.approx(truth(shape)) and found.rounds == 18
    for shape in every:
        assert model.stage(shape)[0] == pytest.approx(truth(replace(shape, bias=False)), rel=0.03)
    count = len(clock.stages)
    bound(path, shapes=10)
    # Of another network of the same stages, nothing but the network is measured.
    nested, x = nn.Sequential(network()), torch.randn(1, 8, 6, 6)
    other = compile_space(nested, x, policy=RankPolicy(candidates=60), min_weights=1)
    networks = clock.networks
    clock.space = other
    Host(file=path, shapes=10).bind(nested, other, x)
    assert clock.networks > networks
    assert len(clock.stages) == count


def test_whole_networks_correct_the_sum(clock: MadeUp, tmp_path: Path) -> None:
    model = bound(tmp_path / "host.json", shapes=400)
    tables = compile_latency(model, space())
    for allocation in random_allocations(space(), 5, seed=99):
        expected = clock.built(network(), allocation, torch.zeros(1)).total
        assert tables.predict(allocation)[0] == pytest.approx(expected, rel=0.02)
    assert model.fit.remainder_cost == pytest.approx(REST, rel=0.2)
    dense = clock.built(network(), space().dense, torch.zeros(1))
    assert model.fit.timed == pytest.approx(dense.total, rel=1e-9)


def test_what_layers_take_in_their_place_counts(clock: MadeUp, tmp_path: Path) -> None:
    first, *_, last = space().layers
    operator = space().layers[last].choices[-1].operator
    clock.places = {f"{first} dense": 1.2, f"{last} {operator}": 1.4}
    model = bound(tmp_path / "host.json", shapes=400, networks=60)
    for name, layer in space().layers.items():
        for choice in layer.choices:
            found = model.latency(layer, choice)[0]
            expected = (DENSE_FACTOR if choice == DENSE else FACTOR) * sum(
                map(truth, stages(layer, choice))
            )
            expected *= clock.places.get(place(name, choice), 1.0)
            assert found == pytest.approx(expected, rel=0.08)
    again = Profile.read(tmp_path / "host.json").networks
    assert list(again.values()) == [model.fit]


def ratios(path: Path) -> np.ndarray:
    """Of measurements to what is true, relative to their median."""
    found = np.array([m.seconds / truth(s) for s, m in Profile.read(path).stages.items()])
    return found / np.median(found)


def test_a_machine_that_slows_down_makes_no_difference(clock: MadeUp, tmp_path: Path) -> None:
    clock.slowing = 0.1
    bound(tmp_path / "host.json", shapes=100)
    assert clock.blocks > 10 and set(Counter(clock.stages).values()) == {2}
    np.testing.assert_allclose(ratios(tmp_path / "host.json"), 1, rtol=1e-6)
    for found in Profile.read(tmp_path / "host.json").stages.values():
        assert found.sigma == pytest.approx(0.01 / math.sqrt(2) * found.seconds, rel=1e-3)


def test_what_was_timed_while_something_else_ran_is_left_out(
    clock: MadeUp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock.slowing = 0.01
    clock.disturbed = {2: 18.0, 4: 2.0}
    with caplog.at_level(logging.INFO):
        bound(tmp_path / "host.json", shapes=100)
    assert f"during {2 * host.BLOCK} timings" in caplog.text
    np.testing.assert_allclose(ratios(tmp_path / "host.json"), 1, rtol=1e-3)


def test_stages_timed_twice_tell_how_well_they_are_known() -> None:
    rng = np.random.default_rng(0)
    shapes = [LayerShape(a, b, calls=((1,),)) for a in range(16, 48) for b in range(16, 32)]
    blocks = []
    for _ in range(2):
        order = rng.permutation(len(shapes))
        for start in range(0, len(order), 16):
            slow = math.exp(0.1 * rng.standard_normal())
            noise = np.exp(0.05 * rng.standard_normal(16))
            rows = zip(order[start : start + 16], noise, strict=True)
            blocks.append({shapes[i]: Measurement(slow * e, 1e-3 * slow * e, 5) for i, e in rows})
    found = _combined(blocks)
    left = np.log([m.seconds for m in found.values()])
    (relative,) = {round(m.sigma / m.seconds, 9) for m in found.values()}
    # Of two timings, whose blocks are known from sixteen each.
    assert left.std() == pytest.approx(0.05 / math.sqrt(2), rel=0.15)
    assert relative == pytest.approx(0.05 / math.sqrt(2), rel=0.15)
    assert {m.rounds for m in found.values()} == {10}


def test_a_stage_seen_in_disturbed_blocks_alone_is_kept() -> None:
    shapes = [LayerShape(a, 16, calls=((1,),)) for a in range(16, 26)]
    quiet = [{s: Measurement(1.0, 0.01, 3) for s in shapes[:9]} for _ in range(3)]
    disturbed = {s: Measurement(2.0, 0.02, 3) for s in shapes[5:]}
    found = _combined([*quiet, disturbed])
    assert all(found[s].seconds == pytest.approx(1.0) for s in shapes)
    assert found[shapes[0]].sigma < found[shapes[9]].sigma
    single = {s: Measurement(3.0, 0.03, 3) for s in shapes}
    for shape, measured in _combined([single]).items():
        assert measured.seconds == pytest.approx(3.0) and measured.sigma == pytest.approx(0.03)
        assert shape in single


def test_what_is_in_the_file_is_not_measured_again(clock: MadeUp, tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    first = bound(path, shapes=60)
    stages_then, networks_then = len(clock.stages), clock.networks
    assert stages_then and networks_then
    second = bound(path, shapes=60)
    assert (len(clock.stages), clock.networks) == (stages_then, networks_then)
    tables = [compile_latency(model, space()) for model in (first, second)]
    for name in space().layers:
        assert tables[0].seconds[name].tolist() == tables[1].seconds[name].tolist()
    assert tables[0].remainder_cost == tables[1].remainder_cost


def test_an_interrupted_profile_goes_on(clock: MadeUp, tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    clock.fails_after = 40
    with pytest.raises(KeyboardInterrupt):
        bound(path, shapes=100)
    kept = len(Profile.read(path).stages)
    assert 0 < kept == len(clock.stages) <= 40
    clock.fails_after = math.inf
    bound(path, shapes=100)
    times = Counter(clock.stages)
    assert sorted(set(times.values())) == [1, 2] and list(times.values()).count(1) == kept
    assert len(times) == len(Profile.read(path).stages)


def test_progress_counts_to_the_end(clock: MadeUp, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    inputs = torch.randn(1, 8, 6, 6)
    Host(file=tmp_path / "host.json", shapes=60).bind(
        network(), space(), inputs, lambda *done: seen.append(done)
    )
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1


def test_a_file_alone_predicts_without_measuring(clock: MadeUp, tmp_path: Path) -> None:
    path = tmp_path / "board.json"
    profiled(path, clock)
    expected = compile_latency(PROFILES[0][0], space())
    count = len(clock.stages)
    model = make_hardware(str(path))
    assert model.name == "board"
    found = compile_latency(model.bind(None, space()), space())
    assert len(clock.stages) == count
    for name in space().layers:
        np.testing.assert_allclose(found.seconds[name], expected.seconds[name], rtol=1e-9)


def test_kinds_and_batch_sizes_that_a_file_has_not_seen(
    clock: MadeUp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "board.json"
    plain = RankPolicy(candidates=20, operators=("svd",))
    model = network()
    small = compile_space(model, torch.randn(1, 8, 6, 6), policy=plain, min_weights=1)
    Host(file=path).bind(None, small)
    with caplog.at_level(logging.WARNING):
        make_hardware(str(path)).bind(None, space())
    assert "no layers of the kind 'grouped conv2d'" in caplog.text
    with pytest.raises(UsageError, match="no layers of the kind 'grouped conv2d'.*profile"):
        make_hardware(str(path), strict=True).bind(None, space())
    with pytest.raises(UsageError, match="no inputs at batch size 4"):
        make_hardware(str(path)).bind(None, small.at_batch(4))


def test_other_terms_are_refused(clock: MadeUp, tmp_path: Path) -> None:
    path = profiled(tmp_path / "board.json", clock)
    content = json.loads(path.read_text())
    content["terms"]["threads"] += 3
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="measured with threads"):
        make_hardware(str(path)).bind(None, space())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["stages"][0].update(seconds=-1.0), "takes -1.0 ±"),
        (lambda c: c["stages"][0].update(sigma="x"), "takes .* x seconds"),
        (lambda c: c["stages"][0].pop("seconds"), "KeyError.'seconds'"),
        (lambda c: c["stages"][0].pop("inputs"), "TypeError"),
        (lambda c: c.pop("terms"), "KeyError.'terms'"),
        (lambda c: c.update(format=99), "it has format 99"),
        (
            lambda c: next(iter(c["networks"].values())).update(remainder_cost=-1.0),
            "numbers from 0",
        ),
    ],
)
def test_damaged_files_are_named(
    clock: MadeUp, tmp_path: Path, change: Callable[[dict[str, object]], None], message: str
) -> None:
    path = profiled(tmp_path / "board.json", clock)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message) as caught:
        make_hardware(str(path)).bind(None, space())
    assert "board.json" in str(caught.value)
    with pytest.raises(UsageError, match=message):  # nor is it overwritten by a new profile
        bound(path)


@pytest.mark.parametrize("mask", [0x01, 0x08])
def test_every_flipped_byte_of_a_profile_is_found_or_does_not_matter(
    tmp_path: Path, mask: int
) -> None:
    """A digit of a time would be another time."""
    path = tmp_path / "p.json"
    profile = Profile(Terms("cpu", 2, "channels_last", "2.6"))
    profile = profile.with_stages({LayerShape(8, 4, calls=((3,),)): Measurement(1e-3, 1e-5, 7)})
    profile.with_network("net", NetworkFit(1e-3, 1.1, 0.9, 0.02)).write(path)
    content, found = path.read_bytes(), 0
    expected = Profile.read(path)
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ mask]) + content[i + 1 :])
        try:
            assert Profile.read(path) == expected
        except UsageError as error:
            assert "p.json" in str(error)
            found += 1
    assert found > len(content) / 2


def test_an_edited_profile_says_what_to_do(clock: MadeUp, tmp_path: Path) -> None:
    path = profiled(tmp_path / "board.json", clock)
    content = json.loads(path.read_text())
    content["stages"][0]["seconds"] *= 2
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"board\.json' does not match its checksum.*remove"):
        make_hardware(str(path)).bind(None, space())
    del content["sha256"]  # also how files of earlier versions are
    path.write_text(json.dumps(content))
    make_hardware(str(path)).bind(None, space())


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"[" * 100_000, b"\xff", b"{}", b'{"format": 1}']
)
def test_profiles_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "board.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"board\.json' (cannot be read|is damaged)"):
        make_hardware(str(path)).bind(None, space())


def test_truncated_and_missing_files(clock: MadeUp, tmp_path: Path) -> None:
    path = profiled(tmp_path / "board.json", clock)
    path.write_text(path.read_text()[:-200])
    with pytest.raises(UsageError, match=r"board.json' cannot be read"):
        make_hardware(str(path)).bind(None, space())
    with pytest.raises(UsageError, match=r"none.json' does not exist"):
        make_hardware(str(tmp_path / "none.json")).bind(None, space())


def test_a_damaged_cache_is_made_again(
    clock: MadeUp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path))
    inputs = torch.randn(1, 8, 6, 6)
    path = Host().path
    assert path.parent == tmp_path / "hardware"
    path.parent.mkdir()
    path.write_text("{")
    with caplog.at_level(logging.WARNING):
        Host(shapes=60).bind(network(), space(), inputs)
    assert "It is made again" in caplog.text
    assert Profile.read(path).stages


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    shapes = [LayerShape(8, 4, calls=((3,),)), *general_shapes(2)[:3]]
    profile = Profile(Terms.here(torch.device("cpu")))
    profile = profile.with_stages({s: Measurement(1e-3, 1e-5, 7) for s in shapes})
    fit = NetworkFit(1e-3, 1.1, 0.9, 0.02, timed=1e-2, places={"a svd": 1.1})
    profile = profile.with_network("net", fit)
    profile.write(tmp_path / "p.json")
    assert Profile.read(tmp_path / "p.json") == profile


@pytest.mark.slow
def test_common_shapes_are_measured_on_request(clock: MadeUp, tmp_path: Path) -> None:
    bound(tmp_path / "host.json", general=True)
    assert set(general_shapes(1)) <= set(clock.stages)


def test_without_a_file_each_stage_is_timed_when_asked_for() -> None:
    model = Host(repeats=3, seconds=0.0)
    layer = next(iter(space().layers.values()))
    first = model.latency(layer, layer.choices[1])
    assert model.latency(layer, layer.choices[1]) == first and first[0] > 0
    assert len(model.known) == len(list(stages(layer, layer.choices[1])))


def test_measurements_count_by_how_well_they_are_known() -> None:
    rng = np.random.default_rng(0)
    widths = [16, 24, 32, 48, 64, 80, 96, 112, 128]
    shapes = [LayerShape(a, b, calls=((1,),)) for a in widths for b in widths]
    true = np.array([truth(s) for s in shapes])
    measured = true * np.exp(0.1 * rng.standard_normal(len(true)))
    noisy = StageRegression.fit(shapes, measured.tolist(), (0.1 * measured).tolist())
    found, sigma = noisy.predict(shapes)
    error = np.log(found / true).std()
    assert error < 0.5 * np.log(measured / true).std()
    assert np.median(sigma / found) == pytest.approx(error, rel=0.5)
    # The same, as if they were known exactly: then they are what the stages really take.
    exact = StageRegression.fit(shapes, measured.tolist(), (1e-9 * measured).tolist())
    np.testing.assert_allclose(exact.predict(shapes)[0], measured, rtol=0.01)


def test_the_kernel_may_be_learned_from_a_part() -> None:
    widths = [16, 24, 32, 48, 64, 96, 128]
    shapes = [LayerShape(a, b, calls=((1,),)) for a in widths for b in widths]
    seconds = [truth(s) for s in shapes]
    fitted = StageRegression.fit(shapes, seconds, [0.01 * s for s in seconds], range(0, 49, 2))
    np.testing.assert_allclose(fitted.predict(shapes)[0], seconds, rtol=0.02)


def test_uncertainty_grows_away_from_what_was_measured() -> None:
    widths = [16, 24, 32, 48, 64, 96, 128]
    shapes = [LayerShape(a, b, calls=((1,),)) for a in widths for b in widths]
    seconds = [truth(s) for s in shapes]
    fitted = StageRegression.fit(shapes, seconds, [0.01 * s for s in seconds])
    inside = [LayerShape(40, 80, calls=((1,),)), LayerShape(56, 20, calls=((1,),))]
    outside = [LayerShape(8192, 8192, calls=((64,),))]
    found, sigma = fitted.predict(inside)
    np.testing.assert_allclose(found, [truth(s) for s in inside], rtol=0.05)
    far, far_sigma = fitted.predict(outside)
    assert far_sigma[0] / far[0] > 3 * (sigma / found).max()
