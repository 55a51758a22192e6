"""What the demo found, as frozen rows: the screen, the picture and `--json` are views of it."""

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class ParityRow:
    """Errors of the tokens of `provider` against those of `against`; without numbers, `note` says why."""

    provider: str
    against: str
    max_error: float | None = None
    mean_error: float | None = None
    ok: bool = True
    note: str = ""


@dataclass(frozen=True)
class TimingRow:
    """Milliseconds per image, and how many times the first row's speed; without numbers, `note` says why."""

    provider: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    ratio: float | None = None
    note: str = ""


def in_ms(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


class BackendRow(NamedTuple):
    """Which backend an op ran on here, and why that one."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True)
class DemoResult:
    """All of it. `setting` holds device, dtype, batch size and the machine's facts."""

    model: str
    setting: dict[str, Any]
    parity: tuple[ParityRow, ...]
    timings: tuple[TimingRow, ...]
    backends: tuple[BackendRow, ...]
    picture: str

    @property
    def ok(self) -> bool:
        """Whether every error that could be measured is within the parity contract."""
        return all(row.ok for row in self.parity)

    def to_json(self) -> str:
        """One JSON object; what was not measured is null."""
        backends = [row._asdict() for row in self.backends]
        return json.dumps(asdict(self) | {"backends": backends, "ok": self.ok}, indent=1)
