"""The model card of a written folder: what was kept, what was measured, how it loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankNAS.allocation import DENSE, Allocation
from rankNAS.decompositions.shapes import EXACT_COSTS

__all__ = ["card_text"]

FOLDER = """```python
from transformers import {auto}

model = {auto}.from_pretrained("FOLDER", trust_remote_code=True)
```

`trust_remote_code` runs `modeling_ranknas.py` of this folder, which builds the smaller layers.
`rankNAS.load("FOLDER")` loads the same network and runs no code of the folder."""
ADAPTERS = """```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("FOLDER/base"), "FOLDER")
```

The folder `base` has zeros in place of the decomposed weights, and each adapter is the product of
the two factors of its layer. The base is as large as the dense model: this form is for training
the factors with `peft`. Without the adapters the base computes nothing of use."""


def card_text(
    form: str,
    name: str,
    auto: str,
    allocation: Allocation,
    dense: Mapping[str, Any],
    measured: Mapping[str, Any],
    command: str,
    dtype: str | None = None,
) -> str:
    """The text of a model card.

    Args:
        form: ``hf`` or ``peft``.
        name: The name of the dense model's class.
        auto: The class of ``transformers`` that loads the folder.
        allocation: The choice of each layer.
        dense: Numbers of the dense model by name.
        measured: The same of the network.
        command: The command that made the network.
        dtype: The data type that the weights were converted to; None if they were not.
    """
    stored = f" The weights are stored as {dtype}, and were measured before." if dtype else ""
    decomposed = sum(choice != DENSE for choice in allocation.values())
    loading = (FOLDER if form == "hf" else ADAPTERS).format(auto=auto)
    return f"""---
library_name: {"transformers" if form == "hf" else "peft"}
tags: [low-rank, ranknas]
---

# {name} with low-rank layers

{decomposed} of the {len(allocation)} layers that could be decomposed are chains of smaller layers.
RankNAS chose their ranks.

{_table(dense, measured)}

Names with `test_` are of the test data; the others are of validation data, or counted.{stored}

## Loading

{loading}

## Command

```sh
{command}
```
"""


def _table(dense: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    rows = ["| | dense | compressed | kept |", "|---|---|---|---|"]
    for name, value in measured.items():
        own = dense.get(name)
        if not isinstance(value, int | float) or not isinstance(own, int | float):
            continue
        kept = f"{100 * value / own:.1f} %" if name in EXACT_COSTS and own else ""
        rows.append(f"| {name} | {_text(own)} | {_text(value)} | {kept} |")
    return "\n".join(rows)


def _text(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.5g}"
