"""Rows as a picture: how many times as fast as the first provider each is, and ops on the roofline."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rows import OURS, ROOFS, Row

BAR, MARGIN = 0.26, 1.3  # inches
MARKERS = "osD^vP*X"


def draw(rows: Iterable[Row], path: str | Path) -> None:
    """One chart of bars for each op or model, and a roofline where bytes are counted.

    Args:
        path: a PNG.
    """
    rows = [row for row in rows if row.ok and row.ms_p50 is not None]
    roofs = [row for row in rows if row.op in ROOFS]
    calls: dict[str, dict[tuple, list[Row]]] = {}
    for row in rows:
        if row.op not in ROOFS:
            calls.setdefault(row.op, {}).setdefault(row.call, []).append(row)
    if not calls:
        return
    on_roofline = [row for row in rows if row.op not in ROOFS and row.gbps and row.tflops]
    heights = [_bars(groups) * BAR + MARGIN for groups in calls.values()]
    if on_roofline:
        heights.append(6.0)
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (op, groups) in zip(axes, calls.items(), strict=False):
        _draw_bars(axis, op, list(groups.values()))
    if on_roofline:
        _draw_roofline(axes[-1], on_roofline, roofs)
    first = rows[0]
    about = (first.machine, f"torch {first.torch}", f"commit {first.commit}", first.date)
    figure.suptitle(", ".join(map(str, about)), fontsize=9, color="0.35")
    figure.savefig(path, dpi=110)


def _bars(groups: dict[tuple, list[Row]]) -> float:
    return sum(len(rows) + 1.2 for rows in groups.values())


def _draw_bars(axis: Axes, op: str, groups: list[list[Row]]) -> None:
    """A group of bars for each call, as long as the provider is faster than the first, with eager's."""
    at, ticks, names = 0.0, [], []
    for rows in groups:
        base = rows[0]
        shape = "x".join(map(str, base.shape))
        title = f"{base.direction} {base.dtype}, batch {base.batch}, {shape}: "
        title += f"{base.provider} {base.ms_p50:.4g} ms"
        axis.text(0, at, title, fontsize=8, weight="bold", va="center")
        at += 1
        for row in rows:
            speed = row.speed_over(base)
            colour = "0.72" if row is base else "tab:green" if row.provider.startswith(OURS) else "tab:blue"
            axis.barh(at, speed, height=0.8, color=colour)
            low, high = (speed * row.ms_p50 / ms for ms in (row.ms_p80, row.ms_p20))
            axis.plot([low, high], [at, at], color="0.2", linewidth=1)
            if row.eager_speed is not None:
                axis.plot(row.eager_speed, at, marker="D", markersize=4, color="white", markeredgecolor="0.2")
            roof = "" if row.roofline_pct is None else f"  {row.roofline_pct:.0f}% of the roofline"
            axis.text(max(speed, high), at, f"  {speed:.2f}x{roof}", fontsize=8, va="center")
            ticks.append(at)
            names.append(row.provider)
            at += 1
        at += 0.2
    axis.axvline(1, color="0.5", linewidth=0.8, linestyle=":")
    axis.set_yticks(ticks, names, fontsize=8)
    marks = "line: 20 to 80 % of the rounds"
    if any(row.eager_speed is not None for rows in groups for row in rows):
        marks += "; diamond: as Python calls them"
    axis.set(title=op, xlabel=f"times as fast as the first provider ({marks})")
    axis.set_ylim(at, -0.8)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.2)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_roofline(axis: Axes, rows: list[Row], roofs: list[Row]) -> None:
    """Each row by what it computes for a byte, under what a copy and a product of its dtype reach."""
    intensity = [1e3 * row.tflops / row.gbps for row in rows]
    low, high = min(intensity) / 2, max(intensity) * 2
    copies = [row.gbps for row in roofs if row.op == "copy"]
    for index, (op, provider) in enumerate(dict.fromkeys((row.op, row.provider) for row in rows)):
        own = [row for row in rows if (row.op, row.provider) == (op, provider)]
        points = [1e3 * row.tflops / row.gbps for row in own], [row.tflops for row in own]
        colour = "tab:green" if provider.startswith(OURS) else f"C{index % 10}"
        style = {"marker": MARKERS[index % len(MARKERS)], "s": 28, "alpha": 0.75, "color": colour}
        axis.scatter(*points, label=f"{op}: {provider}", **style)
    for row in roofs:
        if row.op != "matmul" or not copies:
            continue
        knee = 1e3 * row.tflops / max(copies)
        xs = [low, min(max(knee, low), high), high]
        axis.plot(xs, [min(row.tflops, max(copies) * x / 1e3) for x in xs], color="0.3", linewidth=1)
        name = f"{row.dtype}: {row.tflops:.3g} TFLOP/s"
        axis.text(high, row.tflops, name, fontsize=8, va="bottom", ha="right")
    labels = {"xlabel": "FLOPs for each byte that must be moved", "ylabel": "TFLOP/s"}
    axis.set(xscale="log", yscale="log", title="roofline, measured in this run", **labels)
    axis.legend(fontsize=7, ncols=2, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
