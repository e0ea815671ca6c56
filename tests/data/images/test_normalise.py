from __future__ import annotations

import pytest

from rankNAS.data.images.normalise import normalization_from_metadata, parse_normalization
from rankNAS.data.loading import load_data
from rankNAS.exceptions import DataError


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        (None, "0.485/0.456/0.406,0.229/0.224/0.225"),
        ("ImageNet", "0.485/0.456/0.406,0.229/0.224/0.225"),
        ("cifar10", "0.4914/0.4822/0.4465,0.247/0.2435/0.2616"),
        ("0.5,0.25", "0.5/0.5/0.5,0.25/0.25/0.25"),
        ("0.1/0.2/0.3,0.4", "0.1/0.2/0.3,0.4/0.4/0.4"),
        ("0.1/0.2/0.3, 0.4/0.5/0.6", "0.1/0.2/0.3,0.4/0.5/0.6"),
        ("0.1,0.2,0.3,0.4,0.5,0.6", "0.1/0.2/0.3,0.4/0.5/0.6"),
    ],
)
def test_normalisations(spec: str | None, canonical: str) -> None:
    assert parse_normalization(spec).spec == canonical
    assert parse_normalization(canonical).spec == canonical


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "imagnet",
        "0.5",
        "0.5,0",
        "0.5,-1",
        "nan,1",
        "0.5,inf",
        "0.1/0.2,0.5",
        "1,2,3",
        "a,b",
        "120,60",
    ],
)
def test_bad_normalisations(spec: str) -> None:
    with pytest.raises(
        DataError, match=rf"the normalisation '{spec}' is none of imagenet, cifar10"
    ):
        load_data("digits", normalize=spec)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        (
            "RGB/255 normalised by mean (0.485,0.456,0.406), std (0.229,0.224,0.225)",
            "0.485/0.456/0.406,0.229/0.224/0.225",
        ),
        ('{"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}', "0.5/0.4/0.3,0.2/0.2/0.1"),
        ("mean=0.5 std=2.5e-1", "0.5/0.5/0.5,0.25/0.25/0.25"),
        ("means .5/.4/.3, standard deviation .2", "0.5/0.4/0.3,0.2/0.2/0.2"),
        ("RGB/255", None),
        ("mean (0.5,0.5,0.5)", None),
        ("the meaning of std is unknown", None),
        ("", None),
    ],
)
def test_normalisation_from_metadata(text: str, spec: str | None) -> None:
    assert normalization_from_metadata(text) == spec
    assert spec is None or parse_normalization(spec).spec == spec


def test_normalisation_from_metadata_for_other_pixels_is_refused() -> None:
    with pytest.raises(DataError, match="give means in"):
        normalization_from_metadata("mean (123.7,116.3,103.5), std (58.4,57.1,57.4)")
