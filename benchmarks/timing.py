"""What the harness measured of one provider."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """The samples in milliseconds, in the order of the rounds."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.samples, q))

    @property
    def p20(self) -> float:
        return self.quantile(0.2)

    @property
    def p50(self) -> float:
        return self.quantile(0.5)

    @property
    def p80(self) -> float:
        return self.quantile(0.8)
