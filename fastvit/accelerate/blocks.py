"""What our blocks share: the fused ops, and the way back to the original forward."""

from torch import Tensor

from ..layers import direct
from ..layers.halves import AttentionHalf, MlpHalf
from ..layers.plain import Unfused, raise_if_unfused, ran_its_own_forward
from ..layers.regularization import drops
from ..layers.settings import Settings
from .idle import ask, is_served
from .registry import Replacement, library_class


class FusedBlock(Replacement):
    """Mixed into a library's block: the fused ops, or its own forward where something inside is not plain."""

    def gather(self, frozen: bool, *args, **kwargs) -> tuple[AttentionHalf, MlpHalf, dict]:
        """Both halves, and the options of attention, of a call with these arguments.

        Raises:
            Unfused: if the block is to run its own forward.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, *args, **kwargs):
        kind = type(self)  # as it is now: restored, and another thread may exchange it meanwhile
        served = is_served(self, x)
        if served is not False and issubclass(kind, FusedBlock):
            settings = Settings.of(self)
            try:
                raise_if_unfused()
                if isinstance(x, Tensor) and x.ndim != 3:
                    raise Unfused(f"it is called with {x.ndim} dimensions, not [B, N, D]")
                attention, mlp, options = kind.gather(self, settings.frozen, *args, **kwargs)
            except Unfused as reason:
                ran_its_own_forward(reason)
            except (AttributeError, TypeError):  # of methods that went with the class, exchanged meanwhile
                if type(self) is kind:
                    raise
            else:
                if drops(attention.branch.drop_path) or drops(mlp.branch.drop_path):
                    served = True  # it draws numbers, which is no question
                with settings.context():
                    if served or ask(self, x, lambda: mlp(attention(x, **options))):
                        return direct.run(x, attention, mlp, options, settings)
        return library_class(kind).forward(self, x, *args, **kwargs)
