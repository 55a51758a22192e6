"""demo.png: each photo, its features in colour, its attention, and below them the times and the errors."""

import warnings
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from textwrap import shorten

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .features import Sight
from .result import DemoResult, ParityRow, TimingRow, in_ms

BACKGROUND, TEXT, MUTED, QUIET, ACCENT = "#0e1116", "#e6edf3", "#8b949e", "#3b4450", "#f0883e"
DPI, WIDTH, MARGIN, GAP, COLUMNS = 125, 16.0, 0.7, 0.14, 6  # lengths in inches
HEADER, CAPTION, ROW_LABEL, BAR, SECTION, FOOTER = 1.55, 0.34, 0.42, 0.46, 0.65, 0.75
PANEL_TITLE, PANEL_LABEL, PANEL_TEXT = 0.42, 2.55, 1.75
TILE = (WIDTH - 2 * MARGIN - ROW_LABEL - (COLUMNS - 1) * GAP) / COLUMNS
_STYLE = {"font.family": "DejaVu Sans", "font.size": 12, "text.color": TEXT, "text.parse_math": False}
_NOTE = (
    "Features: the first three principal components of the foreground's patches. "
    "Attention: of the class token in the last block, mean over heads. Both at 518 px.\n"
    "Times (median, and 20th to 80th percentile) and errors at 224 px."
)
_LUMA = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class _Bar:
    label: str
    value: float | None
    text: str
    ours: bool
    spread: tuple[float, float] | None = None

    @property
    def end(self) -> float:
        return max(self.value or 0.0, *(self.spread or (0.0, 0.0)))


class _Page:
    """A figure laid out in inches from its upper left corner."""

    def __init__(self, height: float):
        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=BACKGROUND)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        bottom = 1 - (y + height) / self.height
        axes = self.figure.add_axes((x / WIDTH, bottom, width / WIDTH, height / self.height))
        axes.set_axis_off()
        return axes

    def text(self, x: float, y: float, text: str, **style) -> None:
        self.figure.text(x / WIDTH, 1 - y / self.height, text, **style)


def draw(sight: Sight, names: list[str], result: DemoResult, path: str | Path) -> None:
    """Write the picture: bands of up to six photos, then the panels of `result`."""
    timings, errors = _timing_bars(result.timings), _error_bars(result.parity)
    bands = ceil(len(names) / COLUMNS)
    per_band = ceil(len(names) / bands)
    band_height = CAPTION + 3 * TILE + 2 * GAP + SECTION
    panels = PANEL_TITLE + BAR * max(len(timings), len(errors))
    # Warnings: the font may lack glyphs of a photo's name.
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings(action="ignore"):
        page = _Page(HEADER + bands * band_height + panels + FOOTER + MARGIN)
        _header(page, result)
        for band in range(bands):
            chosen = range(band * per_band, min((band + 1) * per_band, len(names)))
            _band(page, HEADER + band * band_height, sight, names, chosen)
        y = HEADER + bands * band_height
        half = (WIDTH - 2 * MARGIN - SECTION) / 2
        _panel(page, MARGIN, y, half, "Milliseconds per image", timings)
        _panel(page, MARGIN + half + SECTION, y, half, "Largest error of any token, float32", errors)
        page.text(MARGIN, page.height - MARGIN, _NOTE, fontsize=10, color=MUTED, va="center")
        page.figure.savefig(path, format="png")


def _header(page: _Page, result: DemoResult) -> None:
    setting = result.setting
    torch_version, batch = f"torch {setting['torch']}", f"batch {setting['batch_size']}"
    facts = (setting["machine"], torch_version, setting["dtype"], batch)
    page.text(MARGIN, MARGIN, setting["title"], fontsize=25, weight="bold", va="center")
    page.text(MARGIN, MARGIN + 0.45, "   ·   ".join(facts), fontsize=13, color=MUTED, va="center")


def _band(page: _Page, top: float, sight: Sight, names: list[str], chosen: range) -> None:
    width = ROW_LABEL + len(chosen) * TILE + (len(chosen) - 1) * GAP
    left = (WIDTH - width) / 2
    for row, label in enumerate(("photo", "patch features", "class attention")):
        middle = top + CAPTION + row * (TILE + GAP) + TILE / 2
        page.text(left + 0.12, middle, label, rotation=90, ha="center", va="center", color=MUTED)
    for column, index in enumerate(chosen):
        x = left + ROW_LABEL + column * (TILE + GAP)
        page.text(x, top + CAPTION / 2 - 0.04, shorten_name(names[index]), va="center", color=TEXT)
        photo = sight.images[index].permute(1, 2, 0) / 255
        for row, image in enumerate((photo, sight.colours[index], overlay(photo, sight.attention[index]))):
            axes = page.axes(x, top + CAPTION + row * (TILE + GAP), TILE, TILE)
            axes.imshow(image.numpy(), interpolation="antialiased")


def shorten_name(name: str, length: int = 24) -> str:
    """A file's name that fits above its tile."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def overlay(photo: Tensor, attention: Tensor) -> Tensor:
    """Attention [S, S] as heat over the photo [S, S, 3] in grey, all in 0..1."""
    heat = torch.from_numpy(matplotlib.colormaps["inferno"](attention.numpy())[..., :3]).float()
    grey = (photo @ _LUMA)[..., None]
    weight = attention[..., None]
    return (0.38 * grey * (1 - weight) + heat * (0.25 + 0.75 * weight)).clamp(0, 1)


def _panel(page: _Page, x: float, y: float, width: float, title: str, bars: list[_Bar]) -> None:
    page.text(x, y + 0.1, title, fontsize=14, weight="bold", va="center")
    left, room = x + PANEL_LABEL, width - PANEL_LABEL - PANEL_TEXT
    axes = page.axes(left, y + PANEL_TITLE, room, BAR * len(bars))
    longest = max((bar.end for bar in bars), default=0.0) or 1.0
    axes.set(xlim=(0, longest), ylim=(len(bars) - 0.5, -0.5))
    for place, bar in enumerate(bars):
        middle = y + PANEL_TITLE + (place + 0.5) * BAR
        weight = "bold" if bar.ours else "normal"
        page.text(x, middle, bar.label, va="center", weight=weight)
        if bar.value is None:
            note = shorten(bar.text, 54, placeholder=" …")
            page.text(left, middle, note, va="center", color=MUTED, style="italic")
            continue
        axes.barh(place, bar.value, height=0.52, color=ACCENT if bar.ours else QUIET)
        if bar.spread is not None:
            axes.plot(bar.spread, (place, place), color=TEXT, linewidth=1.4, solid_capstyle="round")
        page.text(left + room * bar.end / longest + 0.14, middle, bar.text, va="center", weight=weight)


def _timing_bars(rows: tuple[TimingRow, ...]) -> list[_Bar]:
    def bar(row: TimingRow) -> _Bar:
        if row.ms is None:
            return _Bar(row.provider, None, row.note, False)
        text = f"{in_ms(row.ms)} ms" + (f"   {row.ratio:.2f}x" if row.ratio else "")
        return _Bar(row.provider, row.ms, text, row.provider.startswith("fastvit"), (row.ms_p20, row.ms_p80))

    return [bar(row) for row in rows]


def _error_bars(rows: tuple[ParityRow, ...]) -> list[_Bar]:
    def bar(row: ParityRow) -> _Bar:
        label = f"{row.provider.split()[0]} vs {row.against.removeprefix('timm ')}"
        text = row.note if row.max_error is None else f"{row.max_error:.1e}"
        return _Bar(label, row.max_error, text, row.provider.startswith("fastvit"))

    return [bar(row) for row in rows if row.provider.endswith("float32")]
