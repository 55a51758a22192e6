"""Tables of measurements: what covers a call, whose word counts, and what a torn file does."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastvit import measurements
from fastvit.measurements import refusal

ROW = {
    "op": "attention",
    "gpu": "NVIDIA H100",
    "dtype": "bfloat16",
    "direction": "fwd",
    "options": "",
    "head_dim": 64,
    "tokens": [50, 272],
    "batch_heads": [12, None],
    "ok": True,
    "ratio": 1.08,
    "date": "2026-11-25",
}
SIZES = {"head_dim": 64, "tokens": 197, "batch_heads": 96}


@pytest.fixture(autouse=True)
def _clear():
    yield
    measurements.clear()


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Writes rows (or text) as the shipped table and as the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(measurements, "_shipped", lambda: [shipped] if shipped.exists() else [])

    def write(*, user=None, shipped_rows=None):
        for path, rows in ((measurements.user_file(), user), (shipped, shipped_rows)):
            if rows is not None:
                path.parent.mkdir(exist_ok=True)
                path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        measurements.clear()

    write()
    return write


def ask(directions=("fwd",), dtype="bfloat16", options="", gpu="NVIDIA H100", **sizes):
    return refusal("attention", gpu, dtype, directions, options, SIZES | sizes)


def test_no_table_covers_nothing(tables):
    assert ask() == "not measured"
    assert not measurements.any_of("attention", "NVIDIA H100")


@pytest.mark.parametrize("place", ["user", "shipped_rows"])
def test_a_row_covers_what_it_names_and_nothing_else(tables, place):
    tables(**{place: [ROW]})
    assert ask() is None
    assert all(ask(**edge) is None for edge in ({"tokens": 50}, {"tokens": 272}, {"batch_heads": 12}))
    for other in (
        *({"tokens": 49}, {"tokens": 273}, {"batch_heads": 11}, {"head_dim": 72}),
        *({"dtype": "float16"}, {"options": "rope"}, {"gpu": "NVIDIA H200"}, {"directions": ("fwd", "bwd")}),
    ):
        assert ask(**other) == "not measured", other
    assert measurements.any_of("attention", "NVIDIA H100")
    assert not measurements.any_of("patch_embed", "NVIDIA H100")


def test_both_directions_are_needed_for_a_gradient(tables):
    tables(user=[ROW, ROW | {"direction": "bwd", "ratio": 0.9}])
    assert ask() is None
    assert ask(directions=("fwd", "bwd")) == "measured at 0.90 times torch's speed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ok": False}, "measured to miss the parity contract"),
        ({"ok": None}, "measured to miss the parity contract"),
        ({"ratio": 0.97}, "measured at 0.97 times torch's speed"),
        ({"ratio": 1.0}, None),
        ({"something_else": [1, 2]}, "not measured"),
    ],
)
def test_a_row_must_be_right_and_no_slower(tables, change, reason):
    tables(user=[ROW | change])
    assert ask() == reason


def both(**sizes):
    """What is asked in eager, and what for a graph."""
    with measurements.for_graphs():
        in_a_graph = ask(**sizes)
    return ask(**sizes), in_a_graph


def test_eager_and_graph_are_two_verdicts(tables):
    said = "measured in eager 0.93, in a graph 1.21 times torch's speed"
    tables(user=[ROW | {"ratio": 0.93, "graphed": 1.21}])
    assert both() == (said, None)
    with measurements.for_graphs():
        assert measurements.any_of("attention", "NVIDIA H100")
        assert ask(tokens=273) == "not measured"
    assert not measurements.any_of("attention", "NVIDIA H100")
    tables(user=[ROW | {"ratio": 1.02, "graphed": 0.87}])
    assert both() == (None, "measured in eager 1.02, in a graph 0.87 times torch's speed")
    tables(user=[ROW | {"ratio": 0.8, "graphed": 0.9, "ok": False}])
    assert both() == ("measured to miss the parity contract",) * 2


def test_a_row_of_one_verdict_says_it_of_both(tables):
    tables(user=[ROW | {"ratio": 0.93}])
    assert both() == ("measured at 0.93 times torch's speed",) * 2
    tables(user=[ROW])
    assert both() == (None, None)


def test_a_row_may_have_no_word_of_one(tables):
    few, many = {"batch_heads": [12, 96]}, {"batch_heads": [12, None]}
    in_graphs = ROW | few | {"ratio": None, "graphed": 1.3}
    tables(user=[in_graphs])
    assert both() == ("not measured", None)
    tables(user=[in_graphs, ROW | many | {"ratio": 0.5, "graphed": None}])
    assert both() == ("measured in eager 0.50, in a graph 1.30 times torch's speed", None)
    assert both(batch_heads=97) == ("measured at 0.50 times torch's speed", "not measured")
    tables(user=[in_graphs | {"ok": False}, ROW])
    assert both() == (None, "measured to miss the parity contract")


def test_for_graphs_is_of_one_thread_and_ends(tables):
    with measurements.for_graphs(), ThreadPoolExecutor(1) as pool:
        with measurements.for_graphs():
            pass
        assert measurements.are_for_graphs()
        assert not pool.submit(measurements.are_for_graphs).result()
    assert not measurements.are_for_graphs()


def test_whoever_captures_gets_what_was_warmed_up(tables, monkeypatch):
    """Kernels that run for the first time in a capture cannot be loaded there: both ask of eager."""
    tables(user=[ROW | {"ratio": 0.93, "graphed": 1.21}])
    warmed_up = ask()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask() == warmed_up
    assert warmed_up is not None


def test_a_compiler_asks_of_eager(tables):
    tables(user=[ROW | {"ratio": 0.93, "graphed": 1.21}, ROW | {"tokens": [273, None]}])
    torch.compiler.reset()
    asked = torch.compile(lambda x: x + 1 if ask(tokens=x.shape[1]) is None else x - 1, backend="eager")
    with measurements.for_graphs():
        assert asked(torch.zeros(1, 197)).eq(-1).all()
        assert asked(torch.zeros(1, 300)).eq(1).all()


def test_the_users_own_row_comes_first(tables):
    tables(user=[ROW | {"ratio": 0.5}], shipped_rows=[ROW])
    assert ask() == "measured at 0.50 times torch's speed"
    tables(user=[ROW], shipped_rows=[ROW | {"ok": False}])
    assert ask() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        '{"op": "attention"}',
        "3",
        "[3]",
        json.dumps([ROW])[:-40],
        '[{"op": "attention"}]',
        "\x00\xff",
    ],
)
def test_a_torn_table_is_one_warning_and_no_more(tables, text):
    tables(user=text, shipped_rows=[ROW])
    with pytest.warns(UserWarning, match="measured.json is not a table of measurements") as caught:
        assert ask() is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() is None


def test_the_shipped_tables_are_tables():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in measurements._shipped():
            assert measurements._read(path)


def test_a_compiler_traces_through_it_once_for_every_batch(tables):
    tables(user=[ROW | {"batch_heads": [1, None]}])

    def function(x):
        reason = ask(tokens=x.shape[1], batch_heads=x.shape[0] * 3)
        return x + 1 if reason is None else x - 1

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 8):
            x = torch.zeros(batch, 197)
            torch._dynamo.mark_dynamic(x, 0)
            assert compiled(x).eq(1).all()
