"""`fastvit bench ops`: every op beside torch's own, torch.compile and other libraries' kernels."""

from importlib import import_module

import torch

from fastvit.backends import TABLE

from .op_bench import Case
from .op_screen import Providers
from .roofline import DTYPES
from .rows import check_providers

OPS = tuple(TABLE)


def cases(
    ops: list[str], device: torch.device, dtypes: list[str], words: str, quick: bool
) -> list[tuple[Case, Providers]]:
    """Those whose title has all the words, each with the function that knows its providers.

    Args:
        ops: names of ops; none stands for all.
        dtypes: of ``DTYPES``; none stands for all that the device is used with.
        quick: a handful of each op.

    Raises:
        ValueError: for an unknown op or dtype, or if no case is left.
    """
    for kind, names, known in (("op", ops, OPS), ("dtype", dtypes, DTYPES)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"unknown {kind} {unknown[0]!r}; the {kind}s are {', '.join(known)}")
    chosen = tuple(dtypes or (DTYPES if device.type == "cuda" else ("float32", "bfloat16")))
    found = []
    for op in ops or OPS:
        bench = import_module(f".bench_{op}", __package__)
        wanted = bench.cases(device, quick, chosen)
        found += [(case, bench.providers) for case in wanted if set(words.split()) <= set(case.title.split())]
    if not found:
        raise ValueError(
            f"no case's title has all of the words {words!r}; a title is like {_some_title(device)!r}"
        )
    return found


def by(
    names: list[str], cases: list[tuple[Case, Providers]], device: torch.device
) -> list[tuple[Case, Providers]]:
    """The cases with these providers alone, without those that have none of them; no name stands for all.

    Raises:
        ValueError: for a name that none of the cases knows, or if no case is left.
    """
    if not names:
        return cases
    given = [(case, *providers(case, device)) for case, providers in cases]
    check_providers(names, dict.fromkeys(name for _, offered, left in given for name in (*offered, *left)))
    found = []
    for case, offered, left in given:
        own = tuple({name: one[name] for name in one if name in names} for one in (offered, left))
        if own[0]:
            found.append((case, lambda case, device, own=own: own))
    if not found:
        why = next(reason for _, _, left in given for name, reason in left.items() if name in names)
        raise ValueError(f"no case has {', '.join(names)} here: {why}")
    return found


def _some_title(device: torch.device) -> str:
    return next(iter(import_module(".bench_attention", __package__).cases(device, True, ("float32",)))).title
