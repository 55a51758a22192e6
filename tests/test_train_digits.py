"""Training on the digits: it learns as torch's ops do, and nothing that stops it loses what it has."""

import copy
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from native_calls import needs_library

from fastvit import CheckpointError
from fastvit_benchmarks import digits, train_digits
from fastvit_benchmarks.curves import draw
from fastvit_benchmarks.train_digits import OTHER, OURS, TORCH, Curve
from fastvit_benchmarks.trainer import Trainer, TrainingError

STEPS = 60


@pytest.fixture(scope="module")
def data():
    return digits.load()


@pytest.fixture(scope="module")
def model():
    return digits.build()


def trainer(model, data, file, steps=20, **options):
    given = {"batch_size": 32, "save_every": 5, "augment": digits.noisy}
    return Trainer(copy.deepcopy(model), *data[:2], file, steps, **given | options)


@needs_library()
def test_the_losses_are_torchs(tmp_path):
    # On one thread, as workers run beside this one: what two add to it, the whole script shows.
    curves = {name: train_digits.train(name, tmp_path, STEPS, threads=1) for name in (TORCH, OURS)}
    near, *_ = train_digits.judge(curves | {OTHER: curves[TORCH]})
    assert near.holds, near.found
    assert curves[OURS].losses[-1] < 0.7 * curves[OURS].losses[0]


def test_a_curve_that_is_another_is_told():
    curve = Curve([1.0] * 300, 0.98)
    shifted = Curve([1.02] * 300, 0.9)
    near, mean, accuracy = train_digits.judge({TORCH: curve, OTHER: curve, OURS: shifted})
    assert not (near.holds or mean.holds or accuracy.holds)
    assert all(v.holds for v in train_digits.judge({TORCH: curve, OTHER: curve, OURS: curve}))


def test_resumed_it_is_the_same_curve(tmp_path, model, data):
    whole = trainer(model, data, tmp_path / "whole.pt")
    expected = whole.run()
    trainer(model, data, tmp_path / "parts.pt").run(until=7)
    parts = trainer(model, data, tmp_path / "parts.pt")
    assert len(parts.losses) == 7
    assert parts.run() == expected
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_killed_it_goes_on_to_the_same_curve(tmp_path):
    command = [sys.executable, "-m", "fastvit_benchmarks.train_digits"]
    command += ["--steps", "120", "--threads", "1"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    state = tmp_path / "killed" / "torch.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = torch.load(state, weights_only=True)["losses"]
    assert 0 < len(kept) < 120
    resumed = train_digits.train(TORCH, tmp_path / "killed", 120, threads=1)
    assert resumed.losses[: len(kept)] == kept
    whole = train_digits.train(TORCH, tmp_path / "whole", 120, threads=1)
    assert resumed.losses == whole.losses


def test_a_loss_that_is_not_finite_ends_it_with_the_last_state_whole(tmp_path, model, data):
    file = tmp_path / "run.pt"
    expected = trainer(model, data, file).run(until=5)
    broken = trainer(model, data, file)
    with torch.no_grad():
        broken.model.head.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"loss is nan at step 5: .* state of step 5 is whole, in "):
        broken.run()
    assert trainer(model, data, file).losses == expected


def test_before_there_is_a_state(tmp_path, model, data):
    broken = trainer(model, data, tmp_path / "run.pt", learning_rate=float("inf"))
    with pytest.raises(TrainingError, match="no state was kept yet"):
        broken.run()


@pytest.mark.parametrize(
    ("options", "other", "message"),
    [
        ({}, {"embed_dim": 32}, "its parameters is 43 of 152074 numbers"),
        ({"steps": 30}, {}, "its steps is 20, this one's 30"),
        ({"seed": 1}, {}, "its seed is 0, this one's 1"),
    ],
)
def test_a_state_of_another_run_is_refused(tmp_path, model, data, options, other, message):
    file = tmp_path / "run.pt"
    trainer(model, data, file).run(until=5)
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=message):
        trainer(digits.build(**other) if other else model, data, file, **options)
    assert file.read_bytes() == before


def test_a_damaged_state_is_refused(tmp_path, model, data):
    file = tmp_path / "run.pt"
    trainer(model, data, file).run(until=5)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"run\.pt holds no state of a training"):
        trainer(model, data, file)


# Files may not grow beyond a limit: to the writer it is what a full disk is.
def test_a_full_disk_leaves_the_last_state_whole(tmp_path, model, data):
    file = tmp_path / "run.pt"
    expected = list(trainer(model, data, file).run(until=5))
    again = trainer(model, data, file)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"run\.pt cannot be written: .* step 5 is whole"):
            again.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert trainer(model, data, file).losses == expected
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_the_picture(tmp_path):
    file = tmp_path / "pictures" / "curves.png"
    draw({"torch": [2.0, 1.0, 0.5], "fastvit": [2.0, 1.0001, 0.5]}, file, "Losses")
    assert file.read_bytes().startswith(b"\x89PNG")
