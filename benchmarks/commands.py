"""What `fastvit bench` does behind its command line."""

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from . import bench_ops, op_screen, roofline
from .harness import machine
from .outputs import Outputs
from .rows import check_providers


def share(text: str | None) -> float | None:
    """ "5%" as 0.05.

    Raises:
        ValueError: for what is not a percentage.
    """
    if text is None:
        return None
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{text!r} is not a percentage: write --fail-if-slower 5%")
    return number / 100


def outputs(baseline: Path | None, fail_if_slower: str | None, resume: bool, **files: Path | None) -> Outputs:
    """The files of a command.

    Raises:
        ValueError, OSError: as ``Outputs``, and for a limit without a baseline.
    """
    if fail_if_slower is not None and baseline is None:
        raise ValueError("--fail-if-slower needs --baseline FILE: the rows of an earlier run, kept by --json")
    return Outputs(baseline=baseline, slower=share(fail_if_slower), resume=resume, **files)


def bench_ops_command(
    console: Console,
    device: torch.device,
    ops: list[str],
    dtypes: list[str],
    words: str,
    quick: bool,
    rounds: int,
    kept: Outputs,
    only: list[str],
) -> int:
    """Ops, by these providers alone if any are named; returns the exit status."""
    cases = bench_ops.by(only, bench_ops.cases(ops, device, dtypes, words, quick), device)
    return op_screen.run(cases, device, console, kept, rounds=rounds)


def bench_models_command(
    console: Console,
    device: torch.device,
    names: list[str],
    batch_sizes: list[int],
    dtypes: list[str],
    rounds: int,
    kept: Outputs,
    *,
    only: list[str],
    training: bool = False,
    engines: bool = False,
    max_autotune: bool = False,
) -> int:
    """Whole models of timm at inference or training, by these providers alone if any are named.

    Returns:
        The exit status.
    """
    import timm

    from . import bench_model, bench_train, model_peers

    if unknown := [name for name in names if not timm.is_model(name)]:
        raise ValueError(f"timm has no model {unknown[0]!r}; `timm.list_models()` names them")
    if unknown := [name for name in dtypes if name not in roofline.DTYPES]:
        raise ValueError(f"unknown dtype {unknown[0]!r}; the dtypes are {', '.join(roofline.DTYPES)}")
    peers = (*model_peers.TORCH, *([model_peers.MAX_AUTOTUNE] if max_autotune else []), *model_peers.OURS)
    peers += model_peers.ENGINES if engines else ()
    makers = bench_train.providers(max_autotune)
    check_providers(only, makers if training else [peer.name for peer in peers])
    if only:
        makers = {name: maker for name, maker in makers.items() if name in only}
        peers = tuple(peer for peer in peers if peer.name in only)

    here = machine()
    console.print(f"{escape(here.name)}, torch {here.torch}, Triton {here.triton}")
    try:
        roofs = roofline.rows(device, tuple(dtypes))
        kept.keep(roofs)
        console.print(op_screen.limits(roofs))
        for name in names:
            for dtype in dtypes:
                for batch_size in batch_sizes:
                    subject = bench_model.Subject(name, batch_size, dtype, device)
                    if training:
                        bench_train.run(subject, makers, rounds, console, kept)
                    else:
                        bench_model.run(subject, peers, rounds, console, kept)
    except KeyboardInterrupt:
        return kept.finish(console, stopped=True)
    return kept.finish(console)
