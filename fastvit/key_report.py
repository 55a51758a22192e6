"""How a checkpoint's keys and shapes compare with a model's, said so that the next step is plain."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

HEAD = "head."
Shape = tuple[int, ...]


@dataclass(frozen=True)
class KeyReport:
    """Every key that does not fit. Rows of `wrong_shape` are (key, the model's shape, the file's shape)."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, Shape, Shape], ...] = ()
    hint: str = ""

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        if self.ok:
            return "every key fits"
        shapes = [f"{key}: model {list(ours)}, file {list(found)}" for key, ours, found in self.wrong_shape]
        lines = [
            *_group("missing from the file", self.missing),
            *_group("not in the model", self.unexpected),
            *_group("of another shape", shapes),
        ]
        return "\n".join(lines + [f"hint: {self.hint}"] * bool(self.hint))


def _group(name: str, rows: Sequence[str]) -> list[str]:
    return [f"{len(rows)} {name}:", *(f"  {row}" for row in rows)] if rows else []


def compare(model_state: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> KeyReport:
    """Each key in which a model's `state_dict()` and a file's differ, and a hint if the cause is plain."""
    report = KeyReport(
        missing=tuple(key for key in model_state if key not in state),
        unexpected=tuple(key for key in state if key not in model_state),
        wrong_shape=tuple(
            (key, tuple(ours.shape), tuple(state[key].shape))
            for key, ours in model_state.items()
            if key in state and ours.shape != state[key].shape
        ),
    )
    return replace(report, hint=_hint(report, model_state))


def _hint(report: KeyReport, model_state: Mapping[str, Tensor]) -> str:
    wrong = {key: (ours, found) for key, ours, found in report.wrong_shape}
    differing = [*report.missing, *report.unexpected, *wrong]
    if differing == ["pos_embed"] and wrong:
        return _positions_hint(*wrong["pos_embed"], model_state)
    if not all(key.startswith(HEAD) for key in differing):
        return ""
    if differing == list(report.missing):
        return "pass num_classes=0 for a checkpoint without a head"
    if differing == list(report.unexpected):
        return "the file has a head, the model has none: pass num_classes, or strict=False to leave it out"
    if differing == list(wrong) and "head.weight" in wrong:
        classes = wrong["head.weight"][1][0]
        return f"the file's head has {classes} classes: pass num_classes={classes}"
    return ""


def _positions_hint(ours: Shape, found: Shape, model_state: Mapping[str, Tensor]) -> str:
    prefix = sum(model_state[key].shape[1] for key in ("cls_token", "reg_token") if key in model_state)
    have, want = _grid(ours, prefix), _grid(found, prefix)
    projection = model_state.get("patch_embed.proj.weight")
    if ours[-1] != found[-1] or have is None or want in (None, have) or projection is None:
        return ""
    return (
        f"positions for a {want}x{want} grid, the model has {have}x{have}: build the model with "
        f"img_size={want * projection.shape[-1]} and call set_input_size, or use create_model(..., img_size=)"
    )


def _grid(shape: Shape, prefix: int) -> int | None:
    """The side of the square grid behind positions [1, N, D], whether or not prefix tokens have some too."""
    for patches in (shape[-2] - prefix, shape[-2]):
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return math.isqrt(patches)
    return None
