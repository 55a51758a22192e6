"""Losses by step as a picture: the curves above, how far they are from the first below."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

BACKGROUND, TEXT, MUTED = "#0e1116", "#e6edf3", "#8b949e"
COLOURS = ("#8b949e", "#58a6ff", "#f0883e", "#3fb950")


def draw(curves: dict[str, list[float]], file: Path, title: str) -> None:
    """Write a PNG; the first curve is the one that the others are compared with."""
    with matplotlib.rc_context({"font.size": 11, "text.color": TEXT, "axes.labelcolor": TEXT}):
        figure = Figure(figsize=(11, 7), dpi=120, facecolor=BACKGROUND, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        above.set_title(title, loc="left", fontsize=15, color=TEXT)
        first = next(iter(curves))
        for (name, losses), colour in zip(curves.items(), COLOURS, strict=False):
            width = 3.5 if name == first else 1.4
            above.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=width, label=name)
            if name != first:
                pairs = zip(losses, curves[first], strict=True)
                away = [max(abs(a - b) / b, 1e-9) for a, b in pairs]
                below.plot(range(1, len(away) + 1), away, color=colour, linewidth=1.2, label=name)
        above.set_yscale("log")
        above.set_ylabel("loss")
        below.set_yscale("log")
        below.set_ylabel(f"relative distance\nfrom {first}")
        below.set_xlabel("step")
        for axes in (above, below):
            axes.set_facecolor(BACKGROUND)
            axes.tick_params(colors=MUTED)
            axes.grid(visible=True, color="#21262d", linewidth=0.7)
            axes.spines[:].set_color("#30363d")
            axes.legend(facecolor=BACKGROUND, edgecolor="#30363d", labelcolor=TEXT)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, facecolor=BACKGROUND)
