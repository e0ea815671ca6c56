"""Every kind of source becomes samples: each item once, in an order of its own or of a seed."""

from __future__ import annotations

import pickle
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from rankNAS.data.samples import Samples
from rankNAS.exceptions import DataError
from rankNAS.tasks import Custom
from rankNAS.trees import size_of

N = 10
X = torch.arange(N).float()[:, None] * torch.ones(3)
Y = torch.arange(N)


class Map(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        if row >= N:
            raise IndexError
        return X[row], int(Y[row])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter((X[i], int(Y[i])) for i in range(N))


class Columns:
    """A data set like those of HuggingFace: items are dicts of Python lists and text."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": [float(row)] * 3, "text": f"row {row}", "label": row}


def pairs() -> list[Any]:
    return [(X[i], int(Y[i])) for i in range(N)]


def collate(items: list[Any]) -> Any:
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


def generator() -> Iterator[Any]:
    for rows in (slice(0, 4), slice(4, 5), slice(5, N)):
        yield X[rows], Y[rows]


SOURCES: dict[str, Callable[[], Any]] = {
    "map-style": Map,
    "list": pairs,
    "tensor data set": lambda: TensorDataset(X, Y),
    "tuple of tensors": lambda: (X, Y),
    "loader": lambda: DataLoader(Map(), batch_size=3),
    "loader that drops": lambda: DataLoader(Map(), batch_size=4, shuffle=True, drop_last=True),
    "loader with collate": lambda: DataLoader(Map(), batch_size=3, collate_fn=collate),
    "loader with batches": lambda: DataLoader(
        Map(), batch_sampler=BatchSampler(SequentialSampler(Y), 4, False)
    ),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=4),
    "loader without batches": lambda: DataLoader(
        list(generator()),
        batch_size=None,  # type: ignore[arg-type]
    ),
    "stream": Stream,
    "generator": generator,
    "subset": lambda: Subset(Subset(TensorDataset(X.flip(0), Y.flip(0)), range(N)), range(N)),
    "columns": Columns,
    "dict of tensors": lambda: {"x": X, "label": Y},
    "HuggingFace batch": lambda: UserDict({"x": X, "label": Y}),
}


def labels(batch: Any) -> Tensor:
    found = batch[1] if isinstance(batch, tuple | list) else batch["label"]
    x = batch[0] if isinstance(batch, tuple | list) else batch.get("x", batch.get("input_ids"))
    assert torch.equal(x[:, 0].long(), found)
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_every_sample_is_read_once(name: str) -> None:
    samples = Samples.of(SOURCES[name]())
    assert len(samples) == N
    for size in (1, 3, 7, 100):
        for even in (True, False):
            batches = list(samples.batches(size, even=even))
            found = torch.cat([labels(batch) for batch in batches])
            assert sorted(found.tolist()) == list(range(N))
            assert max(map(size_of, batches)) <= (max(size, 3) if even else size)
            shuffled = [
                torch.cat([labels(b) for b in samples.batches(size, shuffle_seed=s, even=even)])
                for s in (0, 0, 1)
            ]
            assert torch.equal(shuffled[0], shuffled[1])
            assert not torch.equal(shuffled[0], shuffled[2])
            assert sorted(shuffled[0].tolist()) == list(range(N))
            sequence = samples.batched(size, even=even)
            assert torch.equal(torch.cat([labels(b) for b in sequence]), found)
            assert sequence.sizes == [size_of(batch) for batch in batches]


@pytest.mark.parametrize("name", SOURCES)
def test_items_parts_and_copies(name: str) -> None:
    samples = Samples.of(SOURCES[name]())
    order = [
        int(item["label"] if isinstance(item, dict | UserDict) else item[1]) for item in samples
    ]
    assert sorted(order) == list(range(N))
    wanted = torch.tensor([7, 2, 3])
    taken = samples.take(wanted)
    drawn = samples.subsample(4, seed=3)
    assert len(drawn) == 4
    assert drawn.order.tolist() == samples.subsample(4, seed=3).order.tolist()
    assert (drawn.order.diff() > 0).all()
    assert samples.subsample(N, seed=0) is samples
    for part in (taken, taken.kept(), pickle.loads(pickle.dumps(taken)), drawn, drawn.kept(0)):
        positions = wanted if len(part) == 3 else drawn.order
        found = torch.cat([labels(batch) for batch in part.batches(2)])
        assert sorted(found.tolist()) == sorted(order[i] for i in positions.tolist())


@pytest.mark.parametrize("name", ["subset", "choosing"])
def test_subsets_keep_their_items_and_their_order(name: str) -> None:
    rows = [8, 1, 1, 5]
    source: Any = Subset(Map(), rows)
    if name == "choosing":
        source = DataLoader(Map(), batch_size=2, sampler=SubsetRandomSampler(rows))
    found = Samples.of(source)
    assert labels(found.batch()).tolist() == rows
    assert labels(found.take(torch.tensor([3, 0])).batch()).tolist() == [5, 8]


def test_subclasses_keep_their_own_items() -> None:
    class Changed(Subset[Any]):
        def __getitem__(self, row: int) -> Any:
            x, y = Map()[self.indices[row]]
            return -x, y

        def __getitems__(self, rows: list[int]) -> list[Any]:
            return [self[row] for row in rows]

    class Doubled(TensorDataset):
        def __getitem__(self, row: int) -> Any:
            x, y = (part[row] for part in self.tensors)
            return 2 * x, y

    assert torch.equal(Samples.of(Changed(Map(), [3, 4])).batch()[0], -X[3:5])
    assert torch.equal(Samples.of(Doubled(X, Y)).batch()[0], 2 * X)


@given(st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_even_batches(count: int, size: int) -> None:
    sequence = Samples.of(torch.arange(count)).batched(size, even=True)
    assert torch.equal(torch.cat(list(sequence)), torch.arange(count))
    assert max(sequence.sizes) - min(sequence.sizes) <= 1
    assert max(sequence.sizes) <= max(size, 3)
    assert min(sequence.sizes) > 1 or count == 1


@given(st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_a_number_of_batches(samples: int, count: int) -> None:
    sequence = Samples.of(torch.arange(samples)).batched(1, count=count)
    assert len(sequence) == min(count, samples)
    assert torch.equal(torch.cat(list(sequence)), torch.arange(samples))


def ragged() -> list[Any]:
    return [(torch.full((2 + i % 3,), float(i)), i) for i in range(N)]


def padded(items: list[Any]) -> Any:
    x = nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True, padding_value=-1)
    return x, torch.tensor([y for _, y in items])


@pytest.mark.parametrize("seed", [None, 0])
def test_ragged_items_go_into_batches_of_their_length(seed: int | None) -> None:
    samples = Samples.of(ragged())
    assert not samples.uniform
    batches = list(samples.batches(3, shuffle_seed=seed))
    assert all(x.shape[1] == 2 + int(y[0]) % 3 for x, y in batches)
    assert sorted(int(i) for _, y in batches for i in y) == list(range(N))
    with pytest.raises(DataError, match="collate_fn"):
        samples.batch()
    assert sorted(int(i) for _, y in samples.kept().batches(3) for i in y) == list(range(N))
    assert len(samples.example(8)[1]) == 4


def test_a_collate_function_pads_ragged_items() -> None:
    for samples in (
        Samples.of(ragged(), padded),
        Samples.of(DataLoader(ragged(), collate_fn=padded)),  # type: ignore[arg-type]
        Samples.of(ragged(), padded).kept(),
    ):
        assert samples.uniform
        x, y = samples.batch()
        assert x.shape == (N, 4)
        assert y.tolist() == list(range(N))
        assert ((x == y[:, None]) | (x == -1)).all()


def test_a_map_style_data_set_of_a_rare_length_says_what_it_needs() -> None:
    class Rare(Map):
        def __getitem__(self, row: int) -> Any:
            return torch.zeros(4 if row == 4 else 3), row

    with pytest.raises(DataError, match="collate_fn"):
        list(Samples.of(Rare()).batches(4))


def detection(sizes: list[int]) -> Any:
    images = [torch.rand(3, 8 + i, 9) for i in sizes]
    return images, [{"boxes": torch.full((i % 3, 4), float(i))} for i in sizes]


def test_batches_of_detection_data() -> None:
    def listed(items: list[Any]) -> Any:
        return [x for x, _ in items], [t for _, t in items]

    data = list(zip(*detection(list(range(N))), strict=True))
    loader: Any = DataLoader(data, batch_size=3, collate_fn=listed)  # type: ignore[arg-type]
    for samples in (
        Samples.of(data, listed),  # type: ignore[arg-type]
        Samples.of(loader),
        Samples.of(detection(rows) for rows in ([0, 1, 2, 3], [4], [5, 6, 7, 8, 9])),
        Samples.of(loader).kept(),
    ):
        assert len(samples) == N
        assert samples[4][0].shape == (3, 12, 9)
        seen: list[int] = []
        for images, boxes in samples.batches(2, shuffle_seed=4):
            assert len(images) == len(boxes) <= 2
            for x, found in zip(images, boxes, strict=True):
                i = x.shape[1] - 8
                assert found["boxes"].shape == (i % 3, 4)
                assert (found["boxes"] == i).all()
                seen.append(i)
        assert sorted(seen) == list(range(N))


def test_a_custom_task_on_detection_data() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 2, 3)

        def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
            return [{"score": self.convolution(x[None]).mean((0, 2, 3))} for x in images]

    def missed(output: Any, batch: Any) -> float:
        assert len(output) == len(batch[1])
        counts = [len(target["boxes"]) for target in batch[1]]
        return sum(counts) / len(counts)

    model = Detector().eval()
    samples = Samples.of([detection([0, 1]), detection([2]), detection([3, 4, 5])].__iter__())
    task = Custom(metrics={"missed": (missed, "minimise")})
    task = task.bound(samples.example(2), model)
    sums: dict[str, Tensor] = {}
    for batch in samples.batches(2):
        with torch.no_grad():
            prediction = task.run(model, batch)
        for name, value in prediction.sums(prediction).items():
            sums[name] = sums.get(name, torch.zeros(())) + value
    found = task.finish(sums)
    assert found["missed"] == pytest.approx(1.0)
    assert found["distance"] == 0


def test_text_beside_tensors_in_memory() -> None:
    kept = Samples.of(Columns()).kept()
    assert kept[3]["text"] == "row 3"
    assert [b["text"] for b in kept.batches(4)][2] == ["row 8", "row 9"]


def test_inner_pairs_of_a_loader_are_cut_by_samples() -> None:
    data = TensorDataset(X, -X, Y)
    items = [((a, b), y) for a, b, y in data]
    sampler = BatchSampler(SequentialSampler(items), 2, False)
    samples = Samples.of(DataLoader(items, batch_sampler=sampler))  # type: ignore[arg-type]
    for (a, b), y in samples.batches(1):
        assert a.shape == b.shape == (1, 3)
        assert torch.equal(a[:, 0].long(), y)
        assert torch.equal(a, -b)


def test_placed_and_held_batches() -> None:
    samples = Samples.of((X, Y))
    assert torch.equal(samples.placed(lambda b: (b[0] + 1, b[1])).batch()[0], X + 1)
    mapped = Samples.of(Map())
    assert mapped.placed(lambda b: b) is mapped
    sequence = samples.batched(4, place=lambda b: (b[0] * 2, b[1]))
    assert [len(y) for _, y in sequence[1:]] == [4, 2]
    assert torch.equal(sequence[-1][0], 2 * X[8:])
    assert sequence[0][0] is sequence[0][0]


def test_batches_too_large_to_keep_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankNAS.data.samples.HELD", 50)
    sequence = Samples.of((X, Y)).batched(4, place=lambda b: (b[0] * 2, b[1]))
    assert sequence[0][0] is not sequence[0][0]
    assert torch.equal(torch.cat([y for _, y in sequence]), Y)
    assert [len(y) for _, y in sequence[-2:]] == [4, 2]
    assert pickle.loads(pickle.dumps(Samples.of((X, Y)).batched(4))).sizes == [4, 4, 2]


def test_an_iterable_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankNAS.data.stores.MOST_BYTES", 1000)

    def endless() -> Iterator[Any]:
        while True:
            yield X, Y

    with pytest.raises(DataError, match="iterable of more than"):
        Samples.of(endless())


@pytest.mark.parametrize(
    "source",
    [
        [],
        Subset(Map(), []),
        iter(()),
        DataLoader(Map(), sampler=SubsetRandomSampler([])),
        torch.zeros(0, 3),
        3,
        "digits",
        {"train": Map()},
    ],
)
def test_sources_of_no_use(source: Any) -> None:
    with pytest.raises(DataError) as error:
        Samples.of(source, where="train")
    assert "train" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, -1])
def test_batch_sizes_of_no_use(size: int) -> None:
    with pytest.raises(DataError, match="positive"):
        Samples.of((X, Y)).batches(size)


# --------------------------------------------------------------------------- faulty items


class Faulty(Map):
    """One item cannot be read."""

    def __getitem__(self, row: int) -> Any:
        if row == 7:
            raise OSError("image file is truncated")
        return super().__getitem__(row)


@pytest.mark.parametrize("collate", [None, torch.utils.data.default_collate])
def test_an_item_that_cannot_be_read_is_named(collate: Any) -> None:
    samples = Samples.of(Subset(Faulty(), range(2, N)), collate, "train")
    with pytest.raises(DataError, match=r"item 7 of the train split .*OSError: image file is tr"):
        list(samples.batches(4))
    with pytest.raises(DataError, match="item 7 of the train split cannot be read"):
        samples.kept()


def test_a_part_of_an_iterable_that_cannot_be_read_is_named() -> None:
    def batches() -> Iterator[Any]:
        yield X[:4], Y[:4]
        raise ValueError("bad record")

    with pytest.raises(DataError, match=r"part 1 of the data split .*ValueError: bad record"):
        Samples.of(batches())


def test_a_collate_function_that_fails_names_its_items() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items])[:, 5]

    with pytest.raises(DataError, match=r"raised IndexError: .* for the items 0, 1, 2, 3 of the"):
        next(Samples.of(Map(), collate, "data").batches(4))
    with pytest.raises(DataError, match=r"for the items 0, 1, 2, 3, 4, 5, 6, 7, … of the"):
        Samples.of(Map(), collate).batch()


def test_items_of_different_sizes_are_named() -> None:
    """A look at eight of them does not find the fourth."""

    class Images(Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, row: int) -> Any:
            return torch.zeros(3, 8, 7 if row == 4 else 8), 0

    with pytest.raises(
        DataError,
        match=r"item 4 has \[0\] \(3, 8, 7\), .* but item 0 has \[0\] \(3, 8, 8\).*resize",
    ):
        Samples.of(Images(), where="train").batch()
