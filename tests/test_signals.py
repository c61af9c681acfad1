"""Runs that are killed, stopped and interrupted: what they leave, and that they go on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from framework.__main__ import main
from framework.checkpoints import AtomicCheckpointIO
from framework.datamodules.workers import leave_stopping_to_the_run

STEPS, EPOCHS = 12, 3
COMMAND = (
    "--model DANN --model.backbone resnet8 --model.bottleneck_features 8 --model.discriminator_features 8 "
    "--model.discriminator_normalization dropout --model.schedule cosine --data DomainPairDataModule "
    "--data.source {d}/source --data.target {d}/target --data.image_size 16 --data.crop pad --data.batch_size 4 "
    f"--data.steps_per_epoch {STEPS} --trainer.max_epochs {EPOCHS} --trainer.accelerator cpu "
    "--trainer.enable_progress_bar false --data.num_workers "
)
RUN = Path("lightning_logs/default/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"

BEACON = """
import os, signal, time
from pathlib import Path
import lightning.pytorch as L

class Beacon(L.Callback):
    '''Says how far the run is, and gives the test the time to look.'''
    def on_train_batch_end(self, trainer, *args):
        Path("beacon.new").write_text(str(trainer.fit_loop.epoch_loop.batch_progress.total.ready))
        os.replace("beacon.new", "beacon")
        time.sleep(0.03)

class Stop(L.Callback):
    '''Sends this process a signal, or two, at a hook.'''
    def __init__(self, hook: str, number: int, epoch: int = 1, times: int = 1) -> None:
        self.number, self.epoch, self.times = number, epoch, times
        setattr(self, hook, self.stop)
    def stop(self, trainer, *args, **kwargs):
        if trainer.current_epoch == self.epoch:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
"""


@pytest.fixture(scope="module")
def uninterrupted(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of the run that nobody stopped."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("uninterrupted"))
    try:
        assert main(["fit", *COMMAND.format(d=domains).split(), "0"]) == 0
        return load(LAST)
    finally:
        os.chdir(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with the callbacks of this file."""
    (tmp_path / "beacon.py").write_text(BEACON)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def batches(path: Path) -> int:
    """Batches that a checkpoint has behind it."""
    return int(load(path)["DomainPairDataModule"]["batches"])


def assert_equal(left: Any, right: Any, at: str = "") -> None:
    """Bit for bit."""
    assert type(left) is type(right), at
    if isinstance(left, dict):
        assert list(left) == list(right), at
        for key in left:
            assert_equal(left[key], right[key], f"{at}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), at
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{at}[{i}]")
    else:
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, at


def assert_same_training(path: Path, other: dict[str, Any]) -> None:
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "DomainPairDataModule"):
        assert_equal(load(path)[key], other[key], key)


def start(domains: Path, workers: int) -> subprocess.Popen[str]:
    """A real run in a process group of its own, as a terminal or a scheduler would start it."""
    line = [sys.executable, "-m", "framework", "fit", *COMMAND.format(d=domains).split(), str(workers)]
    return subprocess.Popen(
        [*line, "--trainer.callbacks+=beacon.Beacon"],
        env=os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_batch(process: subprocess.Popen[str], number: int) -> None:
    deadline = time.monotonic() + 120
    while not Path("beacon").exists() or int(Path("beacon").read_text()) < number:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def partial_files() -> list[Path]:
    return [path for path in Path().rglob("*") if "partial" in path.name]


def resume(*flags: str) -> None:
    (Path() / "beacon").unlink(missing_ok=True)
    assert main(["fit", "--run", str(RUN), *flags]) == 0


@pytest.mark.slow
def test_killed_in_mid_epoch(domains: Path, folder: Path, uninterrupted: dict[str, Any]) -> None:
    process = start(domains, workers=0)
    wait_for_batch(process, STEPS + 4)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert batches(LAST) == STEPS  # the end of the first epoch
    assert partial_files() == []
    # in a new run ...
    assert main(["fit", *COMMAND.format(d=domains).split(), "0", "--ckpt_path", str(LAST)]) == 0
    assert_same_training(RUN.with_name("version_1") / "checkpoints" / "last.ckpt", uninterrupted)
    # ... and in its own folder
    resume()
    assert_same_training(LAST, uninterrupted)
    assert not RUN.with_name("version_2").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_in_mid_epoch(
    number: signal.Signals, code: int, domains: Path, folder: Path, uninterrupted: dict[str, Any]
) -> None:
    process = start(domains, workers=2)
    wait_for_batch(process, STEPS + 4)
    os.killpg(process.pid, number)  # the loaders' workers get it too
    _, error = process.communicate(timeout=300)
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert ("saving last.ckpt" in error) == (number is signal.SIGINT)
    stopped = batches(LAST)
    assert STEPS + 4 <= stopped < 2 * STEPS
    assert partial_files() == []
    resume("--data.num_workers", "2" if number is signal.SIGTERM else "0")
    assert_same_training(LAST, uninterrupted)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_start", "on_train_epoch_end"])
def test_stopped_at_a_hook(hook: str, domains: Path, folder: Path, uninterrupted: dict[str, Any]) -> None:
    stop = f"--trainer.callbacks+=beacon.Stop --trainer.callbacks.hook {hook} --trainer.callbacks.number 15"
    assert main(["fit", *COMMAND.format(d=domains).split(), "0", *stop.split()]) == 143
    assert STEPS < batches(LAST) <= 2 * STEPS
    assert batches(LAST) == {"on_train_batch_end": STEPS + 1}.get(hook, 2 * STEPS)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resume("--trainer.callbacks", "null")
    assert_same_training(LAST, uninterrupted)


def test_second_interrupt_stops_at_once(domains: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = "--trainer.callbacks+=beacon.Stop --trainer.callbacks.hook on_train_batch_start --trainer.callbacks.number 2"
    line = ["fit", *COMMAND.format(d=domains).split(), "0", *stop.split(), "--trainer.callbacks.times", "2"]
    earlier = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    assert main(line) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert batches(LAST) == STEPS  # nothing is saved in the middle of a step
    assert signal.getsignal(signal.SIGINT) == earlier


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_stopped_before_the_first_batch(
    number: int, code: int, domains: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = f"--trainer.callbacks+=beacon.Stop --trainer.callbacks.hook setup --trainer.callbacks.number {number}"
    line = ["fit", *COMMAND.format(d=domains).split(), "0", *stop.split(), "--trainer.callbacks.epoch", "0"]
    assert main(line) == code
    assert "Traceback" not in capsys.readouterr().err
    assert not RUN.exists()


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
@pytest.mark.parametrize("command", ["validate", "predict"])
def test_evaluation_stops_at_once(
    command: str, number: int, code: int, domains: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    assert main(["fit", *COMMAND.format(d=domains).split(), "0", *flags]) == 0
    name = {"validate": "validation", "predict": "predict"}[command]
    stop = (
        f"--trainer.callbacks+=beacon.Stop --trainer.callbacks.hook on_{name}_batch_start "
        f"--trainer.callbacks.number {number} --trainer.callbacks.epoch 0"
    )
    assert main([command, "--run", str(RUN), *stop.split()]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert not (RUN / "predictions.csv").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_stopping_to_the_run(number: signal.Signals) -> None:
    loader = DataLoader(range(200), num_workers=1, worker_init_fn=leave_stopping_to_the_run)  # type: ignore[arg-type]
    batches = iter(loader)
    served = [next(batches)]
    os.kill(batches._workers[0].pid, number)  # type: ignore[attr-defined]
    assert len([*served, *batches]) == 200


# ---------------------------------------------------------------------- atomic writes
KILLED_WRITER = """
import os, signal, sys
import torch
from framework.checkpoints import AtomicCheckpointIO
real = torch.save
def half(content, file):
    real(content, file)
    file.flush()
    os.truncate(file.fileno(), file.tell() // 2)
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1 << 20)}, sys.argv[1])
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(3)}, path)
    whole = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path)], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2  # the half that was written is beside it ...
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)
    assert torch.equal(load(path)["weights"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]  # ... until the next write


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(3)}, path)
    whole = path.read_bytes()

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
