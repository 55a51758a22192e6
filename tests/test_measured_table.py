"""From measured calls to a table: which sizes its rows cover, and what they say of them."""

import dataclasses
import itertools
import json
import random

import pytest

from fastvit import measurements
from fastvit_benchmarks.tables import measure_cpu
from fastvit_benchmarks.tables.measured_table import Point, table

NOTES = {
    "gpu": "NVIDIA H100",
    "torch": "2.14.1",
    "triton": "3.8.0",
    "date": "2026-11-25",
    "commit": "abc1234",
}


def point(width, rows, ratio=1.2, ok=True, **how):
    known = {"op": "layer_norm_mlp", "dtype": "bfloat16", "direction": "fwd", "options": ""} | how
    sizes = known.pop("sizes", {"width": width, "rows": rows})
    return Point(**known, sizes=sizes, ok=ok, ratio=ratio)


@pytest.fixture
def auto(tmp_path, monkeypatch):
    """What `auto` finds in a table of these points: None, or why ours is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "shipped.json"
    monkeypatch.setattr(measurements, "_shipped", lambda: [file])

    def write(points, least=1.0):
        file.write_text(json.dumps(table(points, NOTES, least)))
        measurements.clear()

        def ask(op="layer_norm_mlp", dtype="bfloat16", options="", directions=("fwd",), **sizes):
            return measurements.refusal(op, "NVIDIA H100", dtype, directions, options, sizes)

        return ask

    yield write
    measurements.clear()


GRID = [point(width, rows) for width in (384, 768, 1024) for rows in (197, 1576, 50432)]


def changed(width, rows, **how):
    return [point(width, rows, **how) if p.sizes == {"width": width, "rows": rows} else p for p in GRID]


def test_sizes_between_measured_ones_are_covered(auto):
    ask = auto(GRID)
    for width, rows in itertools.product((384, 500, 768, 1000, 1024), (197, 400, 1576, 50432, 10**7)):
        assert ask(width=width, rows=rows) is None, (width, rows)


def test_sizes_outside_are_not(auto):
    ask = auto(GRID)
    for sizes in ({"width": 383, "rows": 197}, {"width": 1025, "rows": 197}, {"width": 768, "rows": 196}):
        assert ask(**sizes) == "not measured"
    assert ask(width=768, rows=197, dtype="float16") == "not measured"
    assert ask(width=768, rows=197, options="scaled") == "not measured"
    assert ask(width=768, rows=197, directions=("fwd", "bwd")) == "not measured"
    assert ask(op="layer_norm_linear", width=768, rows=197) == "not measured"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"ok": False}, "measured to miss the parity contract"),
        ({"ratio": 0.9}, "measured at 0.90 times torch's speed"),
        ({"ratio": 0.9996}, "measured at 1.00 times torch's speed"),  # which is not as fast
    ],
    ids=str,
)
def test_what_is_wrong_or_slower_is_left_up_to_the_next_good_one(auto, how, said):
    ask = auto(changed(768, 1576, **how))
    assert ask(width=768, rows=1576) == said
    for width, rows in ((700, 1576), (768, 1000), (768, 2000), (900, 5000), (500, 300)):
        assert ask(width=width, rows=rows) == said, (width, rows)
    # What was measured itself is as it was, and so is what lies between good ones.
    for width, rows in ((768, 197), (768, 50432), (384, 197), (384, 1576), (384, 900), (1024, 10**6)):
        assert ask(width=width, rows=rows) is None, (width, rows)


def test_a_row_says_the_worst_of_its_corners():
    (row, *others) = table(changed(768, 1576, ratio=1.05), NOTES)
    assert row == {
        "op": "layer_norm_mlp",
        "gpu": "NVIDIA H100",
        "dtype": "bfloat16",
        "direction": "fwd",
        "options": "",
        "width": [384, 768],
        "rows": [197, None],
        "ok": True,
        "ratio": 1.05,
    } | {name: value for name, value in NOTES.items() if name != "gpu"}
    assert [(other["width"], other["ratio"]) for other in others] == [([768, 1024], 1.05)]


def test_wrong_and_slower_have_rows_that_say_so():
    rows = table([point(768, 197, ok=False, ratio=0.0), point(768, 1576, ratio=0.8)], NOTES)
    assert [(row["ok"], row["ratio"], row["rows"]) for row in rows] == [
        (False, 0.0, [197, 1576]),
        (True, 0.8, [1576, None]),
    ]


def test_a_good_point_among_bad_ones_is_itself_alone(auto):
    points = [point(w, r, ratio=0.8) for w in (384, 768, 1024) for r in (197, 1576, 12608)]
    ask = auto([point(768, 1576) if p.sizes == {"width": 768, "rows": 1576} else p for p in points])
    assert ask(width=768, rows=1576) is None
    assert all(ask(width=768, rows=rows) for rows in (1575, 1577, 197))
    assert ask(width=769, rows=1576)


def test_batches_of_two_sizes_need_not_be_the_same(auto):
    """As with 197 and 257 tokens, which give other numbers of rows."""
    ask = auto([point(384, 100), point(384, 1000, 0.9), point(768, 200), point(768, 2000)])
    assert ask(width=500, rows=150) == "not measured"  # below the fewest of one of them
    assert ask(width=768, rows=5000) is None
    assert ask(width=384, rows=5000) == "measured at 0.90 times torch's speed"
    assert ask(width=500, rows=500) == "measured at 0.90 times torch's speed"


def test_attention_is_exact_in_its_head_dim(auto):
    def of(head_dim, tokens, heads, ratio=1.2):
        sizes = {"head_dim": head_dim, "tokens": tokens, "batch_heads": heads}
        return point(0, 0, ratio, op="attention", sizes=sizes)

    points = [of(64, n, h) for n in (197, 257) for h in (12, 3072)] + [of(72, 256, 16)]
    ask = auto(points)
    assert ask(op="attention", head_dim=64, tokens=200, batch_heads=768) is None
    assert ask(op="attention", head_dim=68, tokens=200, batch_heads=768) == "not measured"
    assert ask(op="attention", head_dim=72, tokens=256, batch_heads=500) is None
    assert ask(op="attention", head_dim=72, tokens=257, batch_heads=500) == "not measured"


def test_the_inner_width_goes_with_the_width(auto):
    sizes = [{"width": w, "hidden": 4 * w, "rows": r} for w in (384, 768) for r in (197, 1576)]
    ask = auto([point(0, 0, options="fused", sizes=size) for size in sizes])
    assert ask(options="fused", width=500, hidden=2000, rows=300) is None
    assert ask(options="fused", width=768, hidden=4096, rows=300) == "not measured"


def in_a_graph(ask, **sizes):
    with measurements.for_graphs():
        return ask(**sizes)


def test_eager_and_graph_are_bounded_each_by_itself(auto):
    """Small calls gain in a graph alone, large ones in both; and one loses in a graph alone."""
    ratios = {197: (0.5, 1.3), 1576: (1.1, 1.2), 12608: (1.2, 1.2), 50432: (1.1, 0.9)}
    points = [point(w, rows, e, graphed=g) for w in (384, 768) for rows, (e, g) in ratios.items()]
    ask = auto(points)
    for width in (384, 500, 768):
        assert all(ask(width=width, rows=rows) is None for rows in (1576, 5000, 20000, 10**6))
        assert all(in_a_graph(ask, width=width, rows=rows) is None for rows in (197, 900, 1576, 12608))
        assert ask(width=width, rows=900).startswith("measured in eager 0.50, in a graph 1.20")
        assert in_a_graph(ask, width=width, rows=20000).startswith("measured in eager 1.10, in a graph 0.90")
    assert ask(width=384, rows=196) == in_a_graph(ask, width=384, rows=196) == "not measured"


def test_what_is_the_same_in_both_is_one_row():
    assert table([point(w, r, graphed=1.2) for w in (384, 768) for r in (197, 1576)], NOTES) == table(
        [point(w, r) for w in (384, 768) for r in (197, 1576)], NOTES
    )
    (row,) = table([point(768, rows, 1.1, graphed=2.0) for rows in (197, 1576)], NOTES)
    assert (row["ratio"], row["graphed"]) == (1.1, 2.0)
    assert list(row)[-6:] == ["ratio", "graphed", "torch", "triton", "date", "commit"]


@pytest.mark.parametrize("seed", range(20))
def test_each_verdict_is_that_of_a_table_of_its_own(auto, seed):
    draw = random.Random(seed)
    speeds = (0.7, 0.9, 1.1, 1.3)
    grid = [(w, r) for w in (384, 768, 1024) for r in (197, 1576, 12608)]
    both = [
        point(w, r, draw.choice(speeds), draw.random() > 0.1, graphed=draw.choice(speeds)) for w, r in grid
    ]
    eager = [dataclasses.replace(p, graphed=None) for p in both]
    graphs = [dataclasses.replace(p, ratio=p.graphed, graphed=None) for p in both]
    sizes = list(itertools.product((384, 500, 768, 900, 1024), (100, 197, 900, 1576, 5000, 12608, 10**5)))

    def taken(points, ask):
        asked = auto(points)
        return [ask(asked, width=width, rows=rows) is None for width, rows in sizes]

    def in_eager(asked, **sizes):
        return asked(**sizes)

    assert taken(both, in_eager) == taken(eager, in_eager)
    assert taken(both, in_a_graph) == taken(graphs, in_eager)


def kept_of_a_cpu(found):
    """The rows of a CPU's table, by what was measured: torch's time over ours, the host's share included."""
    host = measure_cpu.HOST_MS
    seen = {case: measure_cpu.Measured(True, ratio, 1.0 - host) for case, ratio in found.items()}
    made = table(measure_cpu.points(seen), NOTES, least=measure_cpu.RATIO)
    return [row for row in made if row["ratio"] >= measure_cpu.RATIO]


def of_a_cpu(op, ratios, beside=""):
    sizes = [(width, rows) for width in measure_cpu.WIDTHS[:2] for rows in measure_cpu.ROWS]
    cases = [measure_cpu.Variant("fwd", "float32", 1, rows, width, op, beside) for width, rows in sizes]
    return dict(zip(cases, ratios, strict=True))


def test_the_cpu_s_table_leaves_out_what_is_slower_than_its_margin():
    kept = kept_of_a_cpu(of_a_cpu("layer_norm_linear", (0.9, 1.2, 1.04, 1.3)))
    assert [(row["width"], row["rows"], row["ratio"]) for row in kept] == [([192, 384], [1576, None], 1.2)]


def test_where_the_mlp_is_served_the_other_products_pay_no_host_time():
    mlp = of_a_cpu("layer_norm_mlp", (0.5, 0.5, 1.3, 1.3))
    residual = of_a_cpu("linear_residual", (1.0, 1.0, 1.0, 0.7))
    kept = kept_of_a_cpu(mlp | residual)
    found = [(row["op"], row["width"], row["rows"], row["ratio"]) for row in kept]
    one = ("linear_residual", [384, 384], [197, 197], 1.25)
    assert found == [("layer_norm_mlp", [384, 384], [197, None], 1.3), one]
    # An MLP with LayerScale says nothing of a block without.
    scaled = of_a_cpu("layer_norm_mlp", (1.3,) * 4, "scaled")
    assert {row["op"] for row in kept_of_a_cpu(scaled | residual)} == {"layer_norm_mlp"}


def test_what_is_wrong_on_a_cpu_has_no_ratio():
    assert measure_cpu.Measured(False, 2.0, 1.0).ratio() == 0.0
