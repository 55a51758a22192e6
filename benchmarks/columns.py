"""Rows as a CSV file: models under the names that timm's own tables have, ops under those of the JSON."""

import csv
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from .rows import Row

INFER = ("samples_per_sec", "step_time", "batch_size", "img_size", "gmacs")
TRAIN = INFER[:-1]
COMMON = ("provider", "dtype", "ok", "reason", "error_ratio", "peak_mb")
COMMON += ("cpu", "gpu", "torch", "commit", "date")


def save_csv(rows: Iterable[Row], path: str | Path) -> None:
    """A table of the rows; those of models if there are any, else all."""
    rows = list(rows)
    made = [_of_model(row) for row in rows if is_model(row)] or [_of_op(row) for row in rows]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in made for name in row)))
        writer.writeheader()
        writer.writerows(made)


def is_model(row: Row) -> bool:
    """Its ``shape`` is then an image's: channels, height, width."""
    return parameters(row.op) is not None


def _of_model(row: Row) -> dict:
    kind = "infer" if row.direction == "fwd" else "train"
    rate = None if row.ms_p50 is None else round(1e3 * row.batch / row.ms_p50, 2)
    step = None if row.ms_p50 is None else round(row.ms_p50, 3)
    # Multiply-adds of one image, in 10^9.
    gmacs = None if row.tflops is None else round(row.tflops * row.ms_p50 / 2 / row.batch, 2)
    values = dict(zip(INFER, (rate, step, row.batch, row.shape[-1], gmacs), strict=True))
    named = {f"{kind}_{name}": values[name] for name in (INFER if kind == "infer" else TRAIN)}
    count = round(parameters(row.op) / 1e6, 2)
    direction = {} if row.direction == "fwd" else {"direction": row.direction}
    return (
        {"model": row.op} | direction | named | {"param_count": count} | {n: getattr(row, n) for n in COMMON}
    )


def _of_op(row: Row) -> dict:
    return asdict(row) | {"shape": "x".join(map(str, row.shape))}


@cache
def parameters(name: str) -> int | None:
    """How many parameters a model of timm has, or None if it has none of that name."""
    try:
        import timm
        import torch
    except ImportError:
        return None
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
