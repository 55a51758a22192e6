"""Tables of measurements: what covers a call, whose word counts, and what a torn file does."""

import json
import warnings

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
