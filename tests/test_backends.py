"""Which backend an op runs on: the table, `use_backend`, and what is said about it."""

import logging
import threading

import op_cases
import pytest
import torch

from fastvit import BackendUnavailable, backends, frames, ops, use_backend
from fastvit.backends import TABLE, Backend, describe, resolve
from fastvit.regimes import OPS

NAMED = [(op, row.name) for op, rows in TABLE.items() for row in rows[:-1]]


def refusal(*args, **kwargs):
    return "not today"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.setattr(backends, "_environment", {})
    monkeypatch.setattr(backends, "_disabled", False)
    monkeypatch.setattr(backends, "_unmeasured", False)


@pytest.fixture
def table(monkeypatch):
    """A table with backends that run and backends that do not, whatever this machine has."""
    runs, refuses = (lambda *args, **kwargs: None), refusal
    rows = {
        "attention": (Backend("triton", refuses), Backend("cuda", runs), Backend("reference", runs)),
        "linear_residual": (Backend("cuda", refuses), Backend("cpp", refuses), Backend("reference", runs)),
        "patch_embed": (Backend("reference", runs),),
    }
    monkeypatch.setattr(backends, "TABLE", rows)
    monkeypatch.setattr(backends, "_said", set())
    return rows


def test_the_table_has_every_op_and_ends_in_a_row_that_always_runs():
    assert tuple(TABLE) == OPS
    for rows in TABLE.values():
        assert rows[-1].name == "reference"
        assert rows[-1].can_run("anything", at="all") is None
        assert len({row.name for row in rows}) == len(rows)


def test_auto_takes_the_first_that_runs(table):
    assert [resolve(op) for op in table] == ["cuda", "reference", "reference"]


@pytest.mark.parametrize(("op", "name"), NAMED)
def test_a_named_backend_runs_or_says_why_not(op, name):
    (row,) = (row for row in TABLE[op] if row.name == name)
    call = op_cases.build(op)
    if op == "attention":  # whose rows see what the op makes of a packed projection
        call = dict.fromkeys("qkv", torch.randn(2, 5, 3, 16))
    reason = row.can_run(**call)
    with use_backend(**{op: name}):
        if reason is None:
            assert resolve(op, **call) == name
            return
        with pytest.raises(BackendUnavailable) as raised:
            resolve(op, **call)
    assert str(raised.value) == f"{op}: backend {name!r} cannot run: {reason}"


def test_auto_takes_only_what_is_worth_it(monkeypatch):
    able = Backend("triton", lambda *args: None, refusal)
    monkeypatch.setitem(backends.TABLE, "attention", (able, TABLE["attention"][-1]))
    assert resolve("attention") == "reference"
    assert describe()[2] == (
        "attention",
        "reference",
        "triton: not today; FASTVIT_UNMEASURED=1 uses it all the same",
    )
    with use_backend("triton"):
        assert resolve("attention") == "triton"
    monkeypatch.setattr(backends, "_unmeasured", True)
    assert resolve("attention") == "triton"


def test_a_named_backend_never_falls_back(table):
    with (
        use_backend("triton"),
        pytest.raises(BackendUnavailable, match="attention: backend 'triton' cannot run: not today"),
    ):
        ops.attention(torch.randn(1, 3, 24), 2)
    with use_backend("cpp"), pytest.raises(BackendUnavailable, match="'cpp' cannot run: not today"):
        ops.linear_residual(torch.ones(1, 1, 1), torch.ones(1, 1), None, torch.ones(1, 1, 1))


def test_ops_without_the_named_backend_resolve_as_auto(table):
    with use_backend("cpp"):
        assert resolve("attention") == "cuda"
        assert resolve("patch_embed") == "reference"
    with use_backend("reference"), use_backend("cpp"):
        assert resolve("attention") == "cuda"


def test_per_op_and_nested(table):
    with use_backend("reference"):
        assert resolve("attention") == "reference"
        with use_backend(attention="cuda"):
            assert resolve("attention") == "cuda"
            assert resolve("linear_residual") == "reference"
            with use_backend(attention="auto"), use_backend():
                assert resolve("attention") == "cuda"
            with use_backend("triton", attention="reference"):
                assert resolve("attention") == "reference"
        assert resolve("attention") == "reference"
    assert resolve("attention") == "cuda"


def test_auto_named_inside_undoes_a_name_outside(table):
    with use_backend("reference"), use_backend("auto"):
        assert resolve("attention") == "cuda"


def test_restored_after_an_exception():
    before = list(frames.stack)
    with pytest.raises(KeyError), use_backend("reference"), use_backend(attention="reference"):
        raise KeyError
    assert frames.stack == before


def test_as_a_decorator(table):
    @use_backend(attention="reference")
    def inside(depth=1):
        return [resolve("attention"), *(inside(depth - 1) if depth else [])]

    assert inside() == ["reference", "reference"]
    assert inside() == ["reference", "reference"]
    assert resolve("attention") == "cuda"


def test_one_object_is_entered_within_itself(table):
    outer, inner = use_backend("reference"), use_backend(attention="cuda")
    with outer, inner:
        with outer:
            assert resolve("attention") == "reference"
        assert resolve("attention") == "cuda"
    assert resolve("attention") == "cuda"
    assert frames.stack == []


def test_holds_for_other_threads():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested("attention")))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("tritom",), {}, "unknown backend 'tritom'; the backends are auto, triton, reference, cuda, cpp"),
        ((), {"attention": "fast"}, "unknown backend 'fast'; the backends are auto,"),
        (
            (),
            {"softmax": "triton"},
            "unknown op 'softmax'; the ops are patch_embed, layer_norm_linear, attention,",
        ),
        ((), {"attention": "cuda"}, "attention has no backend 'cuda'; it has triton, cpp, reference"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(args, kwargs, message):
    with pytest.raises(ValueError, match="unknown|has no backend") as raised:
        use_backend(*args, **kwargs)
    assert str(raised.value).startswith(message)


def test_each_reason_is_said_once(table, caplog):
    caplog.set_level(logging.INFO, "fastvit")
    for _ in range(3):
        resolve("attention")
        resolve("linear_residual")
    assert [record.getMessage() for record in caplog.records] == [
        "attention: not triton: not today",
        "linear_residual: not cuda: not today",
        "linear_residual: not cpp: not today",
    ]


def test_a_named_backend_is_not_commented_on(table, caplog):
    caplog.set_level(logging.INFO, "fastvit")
    with use_backend("cuda", linear_residual="reference"):
        resolve("attention")
        resolve("linear_residual")
    assert caplog.records == []


def test_describe_says_what_resolve_does(table):
    for requested in ("auto", "reference", "cpp", "triton"):
        with use_backend(requested):
            for op, chosen, why in describe():
                if chosen == "unavailable":
                    with pytest.raises(BackendUnavailable) as raised:
                        resolve(op)
                    assert why == str(raised.value)
                else:
                    assert chosen == resolve(op)
    reasons = {op: why for op, _, why in describe()}
    assert "triton: not today" in reasons["attention"]
    assert all(word in reasons["linear_residual"] for word in ("cuda", "cpp", "not today"))
    assert reasons["patch_embed"] == "first in the table"
    with use_backend(attention="reference"):
        assert describe()[0] == ("attention", "reference", "asked for by name")


def test_describe_of_this_machine_is_what_runs_here():
    assert [(op, chosen) for op, chosen, _ in describe()] == [(op, resolve(op)) for op in OPS]


# A block around the compiled call, one within it, and one entered by a decorator.
@pytest.mark.parametrize("place", ["outside", "inside", "decorator"])
def test_compiles_whole_under_use_backend(place):
    def plain(x):
        return ops.attention(x, 2) + 1

    @use_backend("reference")
    def decorated(x):
        return plain(x)

    def inside(x):
        with use_backend("reference"):
            return plain(x)

    torch.compiler.reset()
    function = {"outside": plain, "inside": inside, "decorator": decorated}[place]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 48)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(x), function(x))
    assert frames.stack == []


def test_a_compiled_function_follows_a_change_of_backend(monkeypatch):
    refuses = (Backend("triton", refusal), TABLE["attention"][-1])
    monkeypatch.setitem(backends.TABLE, "attention", refuses)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.attention(x, 2), backend="aot_eager")
    x = torch.randn(2, 5, 48)
    compiled(x)
    with use_backend("triton"), pytest.raises(Exception, match="not today"):
        compiled(x)


def test_leaving_takes_ones_own_frame_not_the_last(table):
    """Another thread may leave between our entering and our leaving."""
    first, second = use_backend("reference"), use_backend(attention="triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    try:
        with pytest.raises(BackendUnavailable):
            resolve("attention")
    finally:
        second.__exit__(None, None, None)
    assert resolve("attention") == "cuda"
