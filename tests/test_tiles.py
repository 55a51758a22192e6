"""The tile tables are whole: every architecture knows every kernel, and every size finds an entry."""

import itertools
import json
import re
from importlib import import_module

import pytest

from fastvit import triton_backend
from fastvit_kernels import tiles

FILES = (*tiles.ARCHITECTURES, "safe")
CLASSES = ("half", "tf32", "ieee")
# What an entry of a kernel may bound; tile() would pass over a misspelt name.
SIZES = {"attention": {"head_dim", "tokens", "load"}, "patch_embed": {"tokens"}}
# No head is wider; every other size has no bound.
LARGEST = {"head_dim": 256, "load": 1}
# Channels a head that `can_run` lets through, without and with a load stage.
LIMITS = dict.fromkeys(("attention_bwd_keys", "attention_bwd_queries"), triton_backend.BACKWARD_LIMITS)
LIMITS["attention_fwd"] = triton_backend.FORWARD_LIMITS
NOTES = {"measured": {"status", "gpu", "date", "commit"}, "modelled": {"status"}}


def entries(arch):
    return [(kernel, entry) for kernel, rows in tiles.table(arch).items() for entry in rows]


def is_own(arch):
    """Whether the architecture has entries of its own, and not another's."""
    return "like" not in json.loads((tiles.FOLDER / f"{arch}.json").read_text())


def sizes_of(kernel):
    return next(names for op, names in SIZES.items() if kernel.startswith(op))


def bounds(kernel, entry):
    """The largest sizes that an entry is for."""
    return {name: entry.get(name, LARGEST.get(name, 10**9)) for name in sizes_of(kernel)}


def test_a_file_for_each_architecture_and_one_for_the_rest():
    assert {path.stem for path in tiles.FOLDER.iterdir()} == set(FILES)


def test_all_files_know_the_same_kernels():
    kernels = {arch: sorted(tiles.table(arch)) for arch in FILES}
    assert kernels == dict.fromkeys(FILES, kernels["safe"])
    assert {op for op in SIZES if any(kernel.startswith(op) for kernel in kernels["safe"])} == set(SIZES)


def test_there_are_few_enough_to_compile_them_all():
    rows = [entry for arch in FILES if is_own(arch) for _, entry in entries(arch)]
    assert len([entry for entry in rows if entry.get("ONE_LAUNCH") != 0]) <= 120


@pytest.mark.parametrize("arch", FILES)
def test_names_and_values_are_known(arch):
    for kernel, entry in entries(arch):
        conditions = {name for name in entry if name.islower()} - {"num_warps", "num_stages"}
        constants = {name: value for name, value in entry.items() if name.isupper()}
        assert entry["status"] in NOTES, entry
        assert conditions - sizes_of(kernel) - {"dtype"} == NOTES[entry["status"]], entry
        assert entry.get("dtype", "half") in CLASSES, entry
        assert all(type(entry[name]) is int and entry[name] >= 0 for name in conditions & sizes_of(kernel)), (
            entry
        )
        assert constants and all(type(value) is int and value >= 0 for value in constants.values()), entry
        blocks = [value for name, value in constants.items() if name.startswith("BLOCK")]
        assert all(value >= 16 and value & (value - 1) == 0 for value in blocks), entry
        assert entry["num_warps"] in (1, 2, 4, 8, 16) and entry["num_stages"] in range(1, 8), entry
        assert len(entry) == len(conditions) + len(constants) + 2, entry


@pytest.mark.parametrize("arch", FILES)
def test_measurements_say_of_what(arch):
    for _, entry in entries(arch):
        if entry["status"] == "measured":
            assert arch != "safe" and entry["gpu"], entry
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry["date"]), entry
            assert re.fullmatch(r"[0-9a-f]{7,40}", entry["commit"]), entry


@pytest.mark.parametrize("arch", FILES)
def test_a_kernel_has_the_same_constants_everywhere(arch):
    """In each entry and each file, so that no architecture meets a name that its kernel does not know."""
    for kernel, entry in entries(arch):
        first = tiles.table("safe")[kernel][0]
        assert {n for n in entry if n.isupper()} == {n for n in first if n.isupper()}, (kernel, entry)


@pytest.mark.parametrize("dtype", CLASSES)
@pytest.mark.parametrize("arch", [*FILES, "sm_75", "sm_86", "sm_103", "sm_121", "cpu"])
def test_every_size_finds_an_entry(arch, dtype):
    for kernel in tiles.table(arch):
        # Entries bound sizes from above only: one that fits the largest fits all.
        for load, head_dim in enumerate(LIMITS.get(kernel, (1,))):
            for tokens, dim in itertools.product((1, 16, 197, 577, 10**9), (1, 32, 72, head_dim)):
                sizes = {"head_dim": min(dim, head_dim), "tokens": tokens, "load": load}
                # Where no tf32 tile keeps its registers, products are exact.
                assert any(fits(kernel, arch, name, sizes) for name in {dtype, dtype.replace("tf32", "ieee")})


def fits(kernel, arch, dtype, sizes):
    try:
        return tiles.tile(kernel, arch, dtype, **sizes)
    except LookupError:
        return None


def test_an_unknown_architecture_takes_the_safe_table():
    assert tiles.table("sm_103") == tiles.table("cpu") == tiles.table("safe")


def test_a_size_that_nothing_fits_is_an_error(monkeypatch):
    row = {"dtype": "half", "tokens": 64, "num_warps": 4, "num_stages": 2, "status": "modelled", "BLOCK": 16}
    monkeypatch.setattr(tiles, "table", lambda arch: {"toy": [row]})
    assert tiles.tile("toy", "cpu", "half", tokens=64) == tiles.Tile({"BLOCK": 16}, 4, 2, "modelled")
    for dtype, tokens in (("half", 65), ("ieee", 64)):
        with pytest.raises(LookupError, match=f"no tile for toy on cpu in {dtype}"):
            tiles.tile("toy", "cpu", dtype, tokens=tokens)


def serves(arch, kernel, entry):
    """The dtype classes in which the entry is the first that fits its own largest sizes."""
    return {dtype for dtype in CLASSES if first_fit(arch, kernel, dtype, bounds(kernel, entry)) is entry}


def first_fit(arch, kernel, dtype, sizes):
    rows = (row for row in tiles.table(arch)[kernel] if row.get("dtype", dtype) == dtype)
    return next(
        (row for row in rows if all(size <= row.get(name, size) for name, size in sizes.items())), None
    )


@pytest.mark.parametrize("arch", FILES)
def test_every_entry_is_reached(arch):
    behind = [(kernel, entry) for kernel, entry in entries(arch) if not serves(arch, kernel, entry)]
    assert behind == [], "another comes first that fits as much"


@pytest.mark.parametrize("op", SIZES)
@pytest.mark.parametrize("arch", FILES)
def test_every_entry_is_compiled_ahead_of_time(arch, op, monkeypatch):
    pytest.importorskip("triton")
    tiles.tile.cache_clear()
    planned, compiled, build = [], set(), tiles._tile
    monkeypatch.setattr(tiles, "_tile", lambda entry: planned.append(id(entry)) or build(entry))
    # Launches are planned one at a time, so what was looked up since the last is the next one's.
    for label, _ in import_module(f"fastvit_kernels.{op}_aot").aot_launches(arch):
        compiled |= {(entry, label.partition(" ")[0]) for entry in planned}
        planned.clear()
        tiles.tile.cache_clear()
    for kernel, entry in entries(arch):
        if kernel.startswith(op):
            missing = {dtype for dtype in serves(arch, kernel, entry) if (id(entry), dtype) not in compiled}
            assert not missing, f"{kernel}: {entry} is not compiled in {', '.join(missing)}"
