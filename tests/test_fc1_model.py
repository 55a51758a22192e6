"""Which tile a product with fc1's epilogues takes: what the model says of a shape, or what was measured."""

import ctypes
import itertools

import pytest
from fc1_library import H100, KINDS, call, compiled, compiled_with, needs_compiler
from native_mutants import FC1_MUTANTS

pytestmark = needs_compiler
WIDTHS = (384, 768, 1024)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@pytest.fixture(scope="module")
def fc1(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("fc1"))


def modelled(fc1, shape, kind="forward", multiprocessors=H100):
    end = ctypes.c_int(multiprocessors), ctypes.c_int(KINDS.index(kind))
    return call(fc1.modelled, *shape, *end)


def shape_of(kind, width, batch):
    """A product of a ViT at 224 pixels: QKV's has no activation, every other is of fc1."""
    return 197 * batch, (3 if kind == "folded_linear" else 4) * width, width


def every_row_is_used(fc1):
    """By some product of ViT-S, -B and -L at 224 pixels: no kernel is compiled for nothing."""
    asked = itertools.product(KINDS, WIDTHS, BATCHES)
    assert {modelled(fc1, shape_of(*call), call[0]) for call in asked} == set(range(fc1.tiles()))


def test_every_row_of_the_table_is_used(fc1):
    assert fc1.kinds() == len(KINDS)
    every_row_is_used(fc1)


@pytest.mark.parametrize("multiprocessors", [1, 2, 78, 114, 132])
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_has_the_cheapest_tile(fc1, kind, multiprocessors):
    sizes = (1, 8, 64, 197, 1000, 1576, 50_432, 2**31 - 2000)
    end = ctypes.c_int(multiprocessors), ctypes.c_int(KINDS.index(kind))
    for shape in itertools.product(sizes, (8, 768, 6144), (8, 384, 1536)):
        compiled = [row for row in range(fc1.tiles()) if fc1.compiled(row, KINDS.index(kind))]
        costs = {row: call(fc1.cost, ctypes.c_int(row), *shape, *end) for row in compiled}
        assert costs[modelled(fc1, shape, kind, multiprocessors)] == min(costs.values()) > 0


def small_and_large(fc1):
    """Few rows have low tiles, and many have high ones."""
    few, many = (fc1.tile_rows(modelled(fc1, shape_of("forward", 768, batch))) for batch in (1, 256))
    assert few == 64 < many


def test_few_rows_have_low_tiles(fc1):
    small_and_large(fc1)


def epilogues_hide(fc1):
    """Of many rows an epilogue with an activation hides behind the products of the other warp group."""
    for kind, width in itertools.product(("forward", "folded", "backward"), WIDTHS):
        assert fc1.is_pingpong(modelled(fc1, shape_of(kind, width, 256), kind)), (kind, width)


def test_a_heavy_epilogue_hides_behind_products(fc1):
    epilogues_hide(fc1)


def wide_tiles(fc1):
    """Of many rows tiles are as wide as registers allow, so that operands are read less often."""
    assert fc1.tile_columns(modelled(fc1, shape_of("forward", 768, 256))) == 192


def test_many_rows_have_wide_tiles(fc1):
    wide_tiles(fc1)


def epilogues_have_registers(fc1):
    """A thread has room for more than 128 numbers of a tile in the forward epilogue alone."""
    for row, kind in itertools.product(range(fc1.tiles()), KINDS):
        threads = 128 if fc1.is_pingpong(row) else 256
        held = fc1.tile_rows(row) * fc1.tile_columns(row) / threads
        assert fc1.compiled(row, KINDS.index(kind)) == (held <= 128 or kind == "forward")
    for kind, *sizes in itertools.product(KINDS, WIDTHS, BATCHES):
        assert fc1.compiled(modelled(fc1, shape_of(kind, *sizes), kind), KINDS.index(kind))


def test_epilogues_have_registers(fc1):
    epilogues_have_registers(fc1)


def microseconds(fc1, kind, width, batch):
    """By the model, at the clock that a busy H100 keeps."""
    shape, end = shape_of(kind, width, batch), (ctypes.c_int(H100), ctypes.c_int(KINDS.index(kind)))
    row = ctypes.c_int(modelled(fc1, shape, kind))
    return call(fc1.cost, row, *shape, *end) / 1755


def fast_enough(fc1):
    """fc1 with GELU, ViT-B at a batch of 256. At the peak its products alone are 251 us."""
    assert 251 < microseconds(fc1, "forward", 768, 256) <= 345
    assert microseconds(fc1, "folded_linear", 768, 256) < microseconds(fc1, "folded", 768, 256)
    assert microseconds(fc1, "folded", 768, 256) < microseconds(fc1, "backward", 768, 256)


def test_the_model_reaches_its_target(fc1):
    fast_enough(fc1)


@pytest.fixture
def measured(fc1):
    """The library's table of measured tiles, empty before and after, and a function that asks it."""
    integers = [ctypes.c_int64] * 3
    fc1.fastvit_fc1_measured.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_int64,
        *integers,
        ctypes.c_int,
    ]
    fc1.fastvit_fc1_chosen.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, *integers]

    def chosen(shape, kind="forward", gpu=b"H100"):
        return fc1.fastvit_fc1_chosen(gpu, H100, KINDS.index(kind), *shape)

    fc1.fastvit_fc1_clear()
    yield chosen
    fc1.fastvit_fc1_clear()


def test_a_measured_tile_takes_the_models_place(fc1, measured):
    shape = (50_432, 3072, 768)
    own = modelled(fc1, shape)
    other = (own + 1) % fc1.tiles()
    assert measured(shape) == own
    assert fc1.fastvit_fc1_measured(b"H100", KINDS.index("forward"), 10_000, 50_432, 3072, 768, other)
    assert measured(shape) == measured((10_000, 3072, 768)) == other
    # And of no other call.
    for unlike in ((9_999, 3072, 768), (50_433, 3072, 768), (50_432, 1536, 768), (50_432, 3072, 384)):
        assert measured(unlike) == modelled(fc1, unlike)
    assert measured(shape, gpu=b"H200") == own
    assert measured(shape, kind="backward") == modelled(fc1, shape, "backward")
    # The first row that covers a call decides.
    assert fc1.fastvit_fc1_measured(b"H100", KINDS.index("forward"), 1, 99_999, 3072, 768, own)
    assert measured(shape) == other
    assert measured((9_999, 3072, 768)) == own


@pytest.mark.parametrize(("kind", "tile"), [(-1, 0), (len(KINDS), 0), (0, -1), (0, 99), (3, 2)])
def test_a_kernel_that_is_not_there_is_not_taken(fc1, measured, kind, tile):
    assert not fc1.fastvit_fc1_measured(b"H100", kind, 1, 99, 3072, 768, tile)


def test_every_tile_has_a_name_of_its_own(fc1):
    name = ctypes.create_string_buffer(40)
    names = []
    while fc1.fastvit_fc1_tile_name(len(names), name, len(name)):
        names.append(name.value.decode())
    assert len(names) == len(set(names)) == fc1.tiles()
    assert "128x192 pingpong" in names


def test_what_tma_cannot_address_is_left_to_the_portable_product(fc1):
    def served(rows=197, columns=1536, depth=384, a=4096, b=64):
        return bool(call(fc1.served, rows, columns, depth, ctypes.c_void_p(a), ctypes.c_void_p(b)))

    assert served()
    assert served(rows=1, columns=8, depth=8)
    for unserved in ({"columns": 1540}, {"depth": 380}, {"rows": 0}, {"columns": 0}, {"depth": 0}):
        assert not served(**unserved)
    for unserved in ({"rows": 2**31}, {"columns": 2**31}, {"depth": 2**31}, {"a": 4104}, {"b": 2}):
        assert not served(**unserved)


@pytest.mark.parametrize(("rows", "expected"), [(1, {1}), (64, {1}), (65, {1, 2}), (257, {2, 3, 5})])
def test_partial_sums_have_a_row_for_each_row_of_tiles(fc1, rows, expected):
    assert {call(fc1.rows_of_partials, ctypes.c_int(row), rows) for row in range(fc1.tiles())} == expected


CHECKS = {
    "rows": every_row_is_used,
    "small": small_and_large,
    "hide": epilogues_hide,
    "wide": wide_tiles,
    "spills": epilogues_have_registers,
    "target": fast_enough,
}


@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in FC1_MUTANTS if mutant.check in CHECKS],
    ids=lambda mutant: f"{mutant.file}: {mutant.fault}",
)
def test_red_with_a_fault(mutant, tmp_path):
    faulty = compiled_with(mutant, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[mutant.check](faulty)


def test_every_fault_is_looked_for():
    import test_fc1

    assert {mutant.check for mutant in FC1_MUTANTS} <= CHECKS.keys() | test_fc1.CHECKS.keys()
