"""What our blocks share: the fused ops, and the way back to the original forward."""

from torch import Tensor

from .. import backends
from ..layers.halves import AttentionHalf, MlpHalf, run_attention, run_mlp
from ..layers.plain import Unfused, ran_its_own_forward
from ..layers.settings import Settings
from .idle import became_idle, is_idle
from .registry import Replacement, outlives_restore


class FusedBlock(Replacement):
    """Mixed into a library's block: the fused ops, or its own forward where something inside is not plain."""

    def gather(self, fold: bool, *args, **kwargs) -> tuple[AttentionHalf, MlpHalf, dict]:
        """Both halves, and the options of attention, of a call with these arguments.

        Raises:
            Unfused: if the block is to run its own forward.
        """
        raise NotImplementedError

    @outlives_restore
    def forward(self, x: Tensor, *args, **kwargs):
        if is_idle(self, x):
            return super().forward(x, *args, **kwargs)
        settings = Settings.of(self)
        served = backends.served()
        try:
            if isinstance(x, Tensor) and x.ndim != 3:
                raise Unfused(f"it is called with {x.ndim} dimensions, not [B, N, D]")
            attention, mlp, options = self.gather(settings.fold, *args, **kwargs)
        except Unfused as reason:
            ran_its_own_forward(reason)
            return super().forward(x, *args, **kwargs)
        with settings.context():
            out = run_mlp(run_attention(x, attention, settings, **options), mlp, settings)
        if became_idle(self, x, backends.served() > served):
            return super().forward(x, *args, **kwargs)
        return out
