"""Files that are damaged, hostile or no checkpoint: refused in one line, unexecuted, the model untouched."""

import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import FORMATS, Tiny, in_both_formats, refusal, save
from hypothesis import given
from hypothesis import strategies as st

from fastvit.checkpoint import read_state_dict
from fastvit.errors import CheckpointError

GARBAGE = [b"\0" * 4096, b"{}", b"PK\x03\x04" + b"x" * 99, b"\x80\x04.", b"<html>404</html>"]
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


@pytest.fixture
def path(tmp_path, request):
    return tmp_path / f"weights.{getattr(request, 'param', 'safetensors')}"


def test_absent_empty_and_irregular_files(tmp_path):
    absent, empty = tmp_path / "absent.pt", tmp_path / "empty.pt"
    empty.touch()
    with pytest.raises(CheckpointError, match=r"absent\.pt: No such file"):
        read_state_dict(absent)
    with pytest.raises(CheckpointError, match="null"):
        read_state_dict("nul\0.pt")
    assert refusal(empty).endswith("is empty")
    assert "is a directory" in refusal(tmp_path)


@in_both_formats
@pytest.mark.parametrize("tenths", range(10))
def test_truncated_at_each_tenth(path, tenths):
    model = Tiny()
    whole = save(model.state_dict(), path).read_bytes()
    path.write_bytes(whole[: len(whole) * tenths // 10])
    assert "\n" not in refusal(path, model)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**62, 10**6, 0])
def test_safetensors_header_length_is_not_believed(path, length):
    whole = save(Tiny().state_dict(), path).read_bytes()
    path.write_bytes(struct.pack("<Q", length) + whole[8:])
    refusal(path)


@in_both_formats
@pytest.mark.parametrize("content", GARBAGE)
def test_garbage(path, content):
    path.write_bytes(content)
    assert "\n" not in refusal(path)


class Executes:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class ExecutesByShell(Executes):
    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("evil", [Executes, ExecutesByShell])
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["leaf", "wrapper", "key", "whole"])
def test_pickles_are_refused_and_not_executed(tmp_path, evil, protocol, where):
    marker = tmp_path / "executed"
    bomb = evil(marker)
    held = {"leaf": {"a": bomb}, "wrapper": {"state_dict": bomb}, "key": {(bomb,): 1}, "whole": bomb}[where]
    files = [
        tmp_path / "zip.pt",
        tmp_path / "legacy.pt",
        tmp_path / "bare.pkl",
        tmp_path / "bare.safetensors",
    ]
    torch.save(held, files[0], pickle_protocol=protocol)
    torch.save(held, files[1], pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    for file in files[2:]:
        file.write_bytes(pickle.dumps(held, protocol))
    for file in files:
        assert "\n" not in refusal(file)
    assert not marker.exists()


def test_the_refusal_names_what_the_pickle_asked_for(tmp_path):
    torch.save({"a": ExecutesByShell("x")}, tmp_path / "evil.pt")
    assert "is refused: it asks for posix.system" in refusal(tmp_path / "evil.pt")


def test_no_environment_variable_opens_the_unsafe_way(tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    torch.save({"a": Executes(marker)}, tmp_path / "evil.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refusal(tmp_path / "evil.pt")
    assert not marker.exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "plain.pt")
    bomb = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "unpacks to 4" in refusal(bomb)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("held", "complaint"),
    [
        ({"a": torch.ones(1), "b": 3, "c": [torch.ones(1)]}, "more than dense tensors: b (int), c (list)"),
        ({"model": {"state_dict": {"a": torch.ones(1)}}}, "more than dense tensors: state_dict (dict)"),
        ({"a": torch.ones(2, device="meta")}, "a (a tensor without data)"),
        ({"a": torch.eye(2).to_sparse()}, "a (torch.sparse_coo)"),
        ({3: torch.ones(1)}, "a key that is no name: 3"),
        ({"a\x1b[2J\n": torch.ones(1)}, r"a key that is no name: 'a\x1b[2J\n'"),
        ({}, "holds no tensors"),
        ({"model": {}}, "holds no tensors"),
        (torch.ones(1), "holds one Tensor"),
        ([torch.ones(1)], "holds one list"),
    ],
)
def test_files_that_hold_something_else(tmp_path, held, complaint):
    torch.save(held, tmp_path / "other.pt")
    assert complaint in refusal(tmp_path / "other.pt")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@given(
    magic=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]),
    rest=st.binary(max_size=200),
    suffix=st.sampled_from(FORMATS),
)
def test_random_bytes_are_refused(scratch, magic, rest, suffix):
    path = scratch / f"random.{suffix}"
    path.write_bytes(magic + rest)
    assert "\n" not in refusal(path)


@given(data=st.data(), suffix=st.sampled_from(FORMATS))
def test_damaged_bytes_are_refused_or_read_as_tensors(scratch, data, suffix):
    path = scratch / f"damaged.{suffix}"
    content = bytearray(save({"a": torch.ones(3), "b": torch.ones(2, 2)}, path).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_state_dict(path).values())
    except CheckpointError as error:
        assert str(path) in str(error)
