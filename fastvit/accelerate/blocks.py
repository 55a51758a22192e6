"""What our blocks share: the settings of `accelerate`, and the way back to the original forward."""

from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .. import recording
from ..backends import use_backend
from ..layers.halves import AttentionHalf, MlpHalf
from ..layers.plain import Unfused

SETTINGS = "_fastvit"


class Settings(NamedTuple):
    """What `accelerate` was told. ``reference_ops`` run as torch's own; ``fold`` allows folded weights."""

    fold: bool = False
    reference_ops: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> "Settings":
        """Those of the module, which pickles and copies with it."""
        return module.__dict__.get(SETTINGS, _DEFAULT)

    def context(self) -> Any:
        """In which the ops run."""
        return (
            use_backend(**dict.fromkeys(self.reference_ops, "reference"))
            if self.reference_ops
            else nullcontext()
        )


_DEFAULT = Settings()


class FusedBlock:
    """Mixed into a library's block: the fused ops, or its own forward where something inside is not plain."""

    original: ClassVar[type[nn.Module]]

    def gather(self, fold: bool, *args, **kwargs) -> tuple[AttentionHalf, MlpHalf, dict]:
        """Both halves, and the options of attention, of a call with these arguments.

        Raises:
            Unfused: if the block is to run its own forward.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, *args, **kwargs):
        settings = Settings.of(self)
        try:
            attention, mlp, options = self.gather(settings.fold, *args, **kwargs)
        except Unfused as reason:
            recording.ran_its_own_forward(reason)
            return super().forward(x, *args, **kwargs)
        with settings.context():
            return mlp(attention(x, **options))
