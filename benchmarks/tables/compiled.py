"""torch.compile over accelerated models beside torch.compile over the originals: what `explain` says of it.

python -m fastvit_benchmarks.tables.compiled RESULTS kernels/measured/compiled.json
"""

from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

from .. import files
from ..rows import Row, load

ORIGINAL, OURS = "timm compiled", "fastvit compiled"


def table(rows: list[Row], gpu: str) -> list[dict[str, Any]]:
    """A row for each width and dtype: of the batch at which ours does worst against the compiler's best."""
    calls: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.ok and row.ms_p50 is not None and row.direction == "fwd":
            calls.setdefault(row.call, {})[row.provider] = row
    worst: dict[tuple[int, str], tuple[float, Row]] = {}
    for providers in calls.values():
        originals = [row.ms_p50 for name, row in providers.items() if name.startswith(ORIGINAL)]
        if OURS not in providers or not originals:
            continue
        ours = providers[OURS]
        key, ratio = (width(ours.op), ours.dtype), min(originals) / ours.ms_p50
        worst[key] = min(worst.get(key, (ratio, ours)), (ratio, ours), key=lambda found: found[0])
    return [_row(*key, *found, gpu) for key, found in worst.items()]


def width(name: str) -> int:
    """Of a model of timm."""
    with torch.device("meta"):
        return timm.create_model(name).embed_dim


def _row(width: int, dtype: str, ratio: float, row: Row, gpu: str) -> dict[str, Any]:
    key = {"op": "model", "gpu": gpu, "dtype": dtype, "direction": "fwd", "options": "compiled"}
    notes = {"torch": row.torch, "triton": row.triton or "", "date": row.date, "commit": row.commit or ""}
    return key | {"width": width, "ok": True, "ratio": round(ratio, 3)} | notes


def main(
    results: Annotated[Path, typer.Argument(help="Rows of `fastvit bench model`, measured on this machine.")],
    file: Annotated[Path, typer.Argument(help="Where the table goes.")],
) -> None:
    from fastvit.native_backend import machine_name

    rows = load(results)
    gpu = next((row.gpu for row in rows if row.gpu), None) or machine_name("cpu")
    files.write_rows(file, table(rows, gpu))


if __name__ == "__main__":
    typer.run(main)
