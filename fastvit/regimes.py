"""Inputs on which wrong numerics show: the data regimes of the parity contract.

No tolerance finds a kernel without its tail mask on ordinary data; where every logit is negative, any
tolerance does. Each regime is such a place, and an op is judged in all that concern it.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, product
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]

TOKENS = (1, 2, 17, 50, 196, 197, 257, 577)
HEAD_DIMS = (32, 48, 64, 72, 80, 88, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("patch_embed", "layer_norm_linear", "attention", "linear_residual", "layer_norm_mlp")

_NORM_OPS = ("layer_norm_linear", "layer_norm_mlp")


@dataclass(frozen=True)
class Shape:
    """Sizes of an op's inputs: N tokens, of them ``prefix`` no patches; ``width`` is D, and K and O too."""

    batch: int = 2
    tokens: int = 17
    width: int = 64
    heads: int = 2
    head_dim: int = 32
    hidden: int = 128
    patch: int = 4
    prefix: int = 1


@dataclass(frozen=True)
class Regime:
    """A kind of data: what shows there, how ordinary inputs become it in place, and where it applies."""

    shows: str
    alter: Callable[[str, Inputs, torch.dtype], None]
    ops: tuple[str, ...] = OPS
    dtypes: tuple[torch.dtype, ...] = DTYPES
    sizes: Mapping[str, int] = field(default_factory=dict)

    def inputs(
        self, op: str, dtype: torch.dtype, *, seed: int = 0, device: torch.device | str = "cpu", **sizes: int
    ) -> Inputs:
        """Keyword arguments for ``op``'s reference, rounded to ``dtype``; the same for the same seed.

        ``sizes`` are fields of ``Shape``, under those the regime itself fixes. q, k and v [B, N, H, d] are
        views of one packed tensor [B, N, 3, H, d].

        Raises:
            ValueError: the regime does not concern this op in this dtype.
        """
        if op not in self.ops or dtype not in self.dtypes:
            raise ValueError(f"not a regime of {op} in {dtype}: it concerns {self.ops} in {self.dtypes}")
        inputs = _BUILDERS[op](Shape(**{**sizes, **self.sizes}), torch.Generator().manual_seed(seed))
        self.alter(op, inputs, dtype)
        if op == "attention":
            packed = torch.stack([inputs[name] for name in "qkv"], dim=2).to(device, dtype)
            inputs |= dict(zip("qkv", packed.unbind(2), strict=True))
        return _cast({name: t.to(device) for name, t in inputs.items()}, dtype)


def float64(inputs: Inputs) -> Inputs:
    """The same numbers for the oracle: floating tensors in float64, masks of bool as they are."""
    return _cast(inputs, torch.float64)


def regimes_of(op: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the regimes in which ``op`` is judged in ``dtype``."""
    return tuple(name for name, regime in REGIMES.items() if op in regime.ops and dtype in regime.dtypes)


def pairwise(allowed: Callable[[dict], bool] | None = None, /, **axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Cells of a grid in which any two values of different axes meet at least once; of one axis, every value.

    Greedy and deterministic: always the cell that adds most. A pair that no ``allowed(cell)`` holds is left
    out. All cells are listed to choose from, so this is for a handful of axes.
    """
    cells, pairs = [], []
    for places in product(*(range(len(values)) for values in axes.values())):
        cell = {name: values[place] for (name, values), place in zip(axes.items(), places, strict=True)}
        if allowed is None or allowed(cell):
            cells.append(cell)
            pairs.append(set(combinations(enumerate(places), min(2, len(axes)))))
    unmet = set().union(*pairs)
    chosen = []
    # What a cell adds only shrinks, so a promise that still holds is the best there is.
    promises = [(-len(adds), place) for place, adds in enumerate(pairs)]
    while unmet:
        promise, place = heapq.heappop(promises)
        adds = pairs[place] & unmet
        if len(adds) == -promise:
            chosen.append(cells[place])
            unmet -= adds
        else:
            heapq.heappush(promises, (-len(adds), place))
    return chosen


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    # A tensor already of the dtype is returned as it is, which keeps q, k and v views of their packed tensor.
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def _patch_embed(shape: Shape, generator: torch.Generator) -> Inputs:
    randn = partial(torch.randn, generator=generator)
    patches = max(1, shape.tokens - shape.prefix)
    prefix = shape.tokens - patches
    rows = max(n for n in range(1, math.isqrt(patches) + 1) if patches % n == 0)
    height, width = rows * shape.patch, patches // rows * shape.patch
    inputs = {
        "images": randn(shape.batch, 3, height, width),
        "weight": randn(shape.width, 3, shape.patch, shape.patch) / math.sqrt(3 * shape.patch**2),
        "bias": randn(shape.width) / 8,
        "pos_embed": randn(1, shape.tokens, shape.width) / 8,
    }
    return inputs | ({"prefix": randn(1, prefix, shape.width)} if prefix else {})


def _layer_norm_linear(shape: Shape, generator: torch.Generator) -> Inputs:
    randn = partial(torch.randn, generator=generator)
    return {
        "x": randn(shape.batch, shape.tokens, shape.width),
        **_norm(shape.width, randn),
        "weight": randn(shape.width, shape.width) / math.sqrt(shape.width),
        "bias": randn(shape.width) / 8,
    }


def _attention(shape: Shape, generator: torch.Generator) -> Inputs:
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    return {name: torch.randn(size, generator=generator) for name in "qkv"}


def _linear_residual(shape: Shape, generator: torch.Generator) -> Inputs:
    randn = partial(torch.randn, generator=generator)
    return {
        "x": randn(shape.batch, shape.tokens, shape.width),
        "weight": randn(shape.width, shape.width) / math.sqrt(shape.width),
        "bias": randn(shape.width) / 8,
        "residual": randn(shape.batch, shape.tokens, shape.width),
        "layer_scale": 1 + randn(shape.width) / 8,
    }


def _layer_norm_mlp(shape: Shape, generator: torch.Generator) -> Inputs:
    randn = partial(torch.randn, generator=generator)
    return {
        "x": randn(shape.batch, shape.tokens, shape.width),
        **_norm(shape.width, randn),
        "fc1_weight": randn(shape.hidden, shape.width) / math.sqrt(shape.width),
        "fc1_bias": randn(shape.hidden) / 8,
        "fc2_weight": randn(shape.width, shape.hidden) / math.sqrt(shape.hidden),
        "fc2_bias": randn(shape.width) / 8,
        "layer_scale": 1 + randn(shape.width) / 8,
    }


def _norm(width: int, randn: Callable[..., torch.Tensor]) -> Inputs:
    return {"norm_weight": 1 + randn(width) / 8, "norm_bias": randn(width) / 8}


_BUILDERS = {
    "patch_embed": _patch_embed,
    "layer_norm_linear": _layer_norm_linear,
    "attention": _attention,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
}
_DATA = {"patch_embed": ["images"], "attention": ["q", "k", "v"]}  # elsewhere x


def _ordinary(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    pass


def _amplified(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    for data in _data(op, inputs):
        data *= 4


def _logits_negative(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    # The mean logit is then -4 sqrt(d), eight of its standard deviations below zero at d = 32.
    inputs["q"] += 2
    inputs["k"] -= 2


def _logits_of_amplitude_100(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    inputs["q"] *= 10
    inputs["k"] *= 10


def _mean_offset(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    offset = 1e3 if dtype == torch.float32 else 30
    inputs["x"] += offset
    if op == "layer_norm_mlp":
        # As large as the offset that the residual carries past it, or rounding the sum would hide the branch.
        inputs["layer_scale"] *= offset


def _small_std(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    inputs["x"] *= 3e-3


def _constant_row(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    # One, because its sums are exact in any order: the variance is zero for every right kernel.
    for row in _last_rows(op, inputs):
        row.fill_(1)


def _outlier_row(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    for row in _last_rows(op, inputs):
        row *= 100


def _masked(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    attended = _attended(inputs["q"])
    bias = torch.randn(attended.shape, generator=torch.Generator().manual_seed(2))
    inputs["attn_mask"] = bias.masked_fill(~attended, -math.inf)


def _masked_bool(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    inputs["attn_mask"] = _attended(inputs["q"])


def _attended(q: torch.Tensor) -> torch.Tensor:
    """Keys of each query [B, 1, N, N]: some three of four, always its own; none at all for the middle one."""
    batch, tokens = q.shape[:2]
    attended = torch.rand(batch, 1, tokens, tokens, generator=torch.Generator().manual_seed(1)) > 0.25
    attended |= torch.eye(tokens, dtype=torch.bool)
    attended[:, :, tokens // 2] = False
    return attended


def _data(op: str, inputs: Inputs) -> list[torch.Tensor]:
    return [inputs[name] for name in _DATA.get(op, ("x",))]


def _last_rows(op: str, inputs: Inputs) -> list[torch.Tensor]:
    """The last token (of images: the last patch) of each data tensor: it lies in a kernel's ragged tile."""
    patch = inputs["weight"].shape[-1] if op == "patch_embed" else 0
    return [data[..., -patch:, -patch:] if patch else data[:, -1] for data in _data(op, inputs)]


REGIMES = {
    "randn": Regime("gross errors, and in float32 a scale or a GELU that is slightly wrong", _ordinary),
    "amplitude_4": Regime("softmax and GELU away from their linear part", _amplified),
    "logits_negative": Regime("keys past the end counted in", _logits_negative, ops=("attention",)),
    "logits_100": Regime(
        "exponentials that overflow",
        _logits_of_amplitude_100,
        ops=("attention",),
        dtypes=(torch.float16,),
    ),
    "mean_offset": Regime("statistics in low precision or in one pass", _mean_offset, ops=_NORM_OPS),
    "small_std": Regime("a wrong eps", _small_std, ops=_NORM_OPS),
    "width_16": Regime("an unbiased variance", _ordinary, ops=_NORM_OPS, sizes={"width": 16}),
    "constant_row": Regime("a variance that is zero, or just below", _constant_row),
    "outlier_row": Regime("a row that spills into others", _outlier_row),
    "masked": Regime("-inf less -inf in a wholly masked row", _masked, ops=("attention",)),
    "masked_bool": Regime("the same with a mask of bool", _masked_bool, ops=("attention",)),
}
