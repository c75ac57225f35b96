"""Runs that are killed, at any moment, and what a run's folder can look like: the same result, or a clear message."""

from __future__ import annotations

import csv
import dataclasses
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

from lirpa_ext.cli import main

pytest.importorskip("lightning", reason="training needs Lightning")
pytest.importorskip("jsonargparse", reason="training needs jsonargparse")

ROOT = Path(__file__).resolve().parents[2]

# Seven batches an epoch, two of which make a step: four steps, the last of one batch alone.
QUICK = [
    "--config", str(ROOT / "configs" / "digits_bcp.yaml"), "--data.limit", "161", "--data.validation", "20",
    "--data.batch_size", "20", "--data.test_limit", "20", "--trainer.max_epochs", "3", "--model.schedule.warmup", "0.5",
    "--model.schedule.ramp", "1", "--model.evaluation.attack_steps", "1", "--trainer.accumulate_grad_batches", "2",
    "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--progress", "false",
]  # fmt: skip
needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="kills a copy of this process, which a GPU forbids"
)


def fit(folder: Path, *arguments: str) -> int:
    return main(["fit", *QUICK, "--run", str(folder), *arguments])


@dataclasses.dataclass
class Calls:
    """Counts the calls of functions of the trainer; at number `at` of those that `chosen` takes, the process dies."""

    chosen: Callable[[str, FrameType], bool] = lambda name, frame: True
    at: int = -1
    count: int = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        file = frame.f_code.co_filename
        name = frame.f_code.co_name
        if ("lirpa_ext/training/" in file or file.endswith("lirpa_ext/reporting/files.py")) and self.chosen(
            name, frame
        ):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self) -> Calls:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def killed(folder: Path, calls: Calls, *arguments: str) -> bool:
    """Whether a copy of this process that trains in the folder died at its call."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        status = 3
        try:
            with calls:
                status = fit(folder, *arguments)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def same(a: object, b: object) -> bool:
    """Whether two checkpoints hold the same, but for seconds."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in ("seconds", "before"))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for name in ("last.ckpt", "best.ckpt", "model.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "lirpa_ext", "callbacks", "global_step"):
            assert same(a.get(part), b.get(part)), f"{name}: {part}"
    for name in ("model.onnx", "README.md"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert not list(one.glob(".*.part")) and not list(one.glob("*.lock"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, int]:
    """A run that nobody disturbed, and how many calls of the trainer it makes."""
    folder = tmp_path_factory.mktemp("whole")
    with Calls() as calls:
        assert fit(folder) == 0
    return folder, calls.count


def of(name: str, file: str) -> Callable[[str, FrameType], bool]:
    return lambda called, frame: called == name and frame.f_code.co_filename.endswith(file)


CHOSEN = {
    "the last batch of an epoch": (of("training_step", "module.py"), 14, "1"),
    "between the last batch and its validation": (of("on_validation_epoch_start", "module.py"), 2, "1"),
    "within the last validation": (of("validation_step", "module.py"), 3, "2"),
    "among added gradients": (of("training_step", "module.py"), 10, "1"),
    "as best.ckpt is written": (of("write_tensors", "files.py"), 5, "3"),
    "between model.pt and the ONNX file": (of("export_onnx", "run_folder.py"), 1, "0"),
}


@needs_fork
@pytest.mark.parametrize("moment", CHOSEN)
def test_a_killed_run_ends_as_an_unbroken_one(whole, tmp_path, moment):
    chosen, at, every = CHOSEN[moment]
    assert killed(tmp_path, Calls(chosen, at), "--checkpoint_every", every)
    assert fit(tmp_path, "--checkpoint_every", every) == 0
    assert_same_run(tmp_path, whole[0])


@needs_fork
@pytest.mark.parametrize("number", [*range(2), *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 20))])
def test_a_run_killed_at_any_call_ends_as_an_unbroken_one(whole, tmp_path, number):
    """Each is killed twice, at calls drawn at random."""
    draw = random.Random(number)
    arguments = ["--checkpoint_every", str(number % 4)]
    assert killed(tmp_path, Calls(at=draw.randrange(1, whole[1])), *arguments)
    killed(tmp_path, Calls(at=draw.randrange(1, whole[1])), *arguments)  # what was left may be shorter than that
    assert fit(tmp_path, *arguments) == 0
    assert_same_run(tmp_path, whole[0])


# --- steps that are no steps ---


def test_a_step_of_nan_ends_the_run_and_a_lower_rate_goes_on_from_the_last_good_state(tmp_path, capsys, monkeypatch):
    from lirpa_ext.training.module import CertifiedClassifier

    original = CertifiedClassifier.batch_loss
    at = [9]

    def broken(self, x, y, values):
        return original(self, x, y, values) * (float("nan") if self.global_step == at[0] else 1.0)

    monkeypatch.setattr(CertifiedClassifier, "batch_loss", broken)
    arguments = ["--checkpoint_every", "1"]
    assert fit(tmp_path, *arguments) == 2
    told = capsys.readouterr().err
    assert "the loss is nan at step 9, in epoch 2" in told
    assert "--resume_lr 0.0005" in told
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 9
    assert all(bool(torch.isfinite(value).all()) for value in kept["state_dict"].values())
    assert fit(tmp_path, *arguments) == 2  # the same again, the state as it was
    assert same(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], kept["state_dict"])
    at[0] = -1
    assert fit(tmp_path, *arguments, "--resume_lr", "0.0005") == 0
    assert [float(row["lr"]) for row in rows(tmp_path)] == [0.005, 0.005, 0.0005]
    assert '"learning_rates": [\n  [\n   9,\n   0.0005' in (tmp_path / "environment.json").read_text()
    assert "learning_rates" in (tmp_path / "README.md").read_text()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys, monkeypatch):
    """A loss that is finite, and a gradient that is not."""
    from lirpa_ext.training.module import CertifiedClassifier

    original = CertifiedClassifier.batch_loss

    def broken(self, x, y, values):
        loss = original(self, x, y, values)
        return loss + 0 * (self.model[0].weight * 0).abs().sqrt().sum() if self.global_step == 6 else loss

    monkeypatch.setattr(CertifiedClassifier, "batch_loss", broken)
    assert fit(tmp_path, "--checkpoint_every", "1") == 2
    assert "training ends here" in capsys.readouterr().err
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 6
    assert all(bool(torch.isfinite(value).all()) for value in kept["state_dict"].values())


def test_nothing_is_left_to_go_on_from_in_the_first_epoch(tmp_path, capsys):
    assert fit(tmp_path, "--resume_lr", "0.001") == 2
    assert "no last.ckpt to go on from" in capsys.readouterr().err


# --- folders that are not as a run leaves them ---


class Shell:
    def __reduce__(self):
        return os.system, ("touch /tmp/lirpa_ext_was_here",)


def damage(folder: Path, kind: str) -> str:
    """Damage a run's folder; the words of the message."""
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    if kind == "truncated":
        last.write_bytes(last.read_bytes()[:-500])
    elif kind == "empty":
        last.write_bytes(b"")
    elif kind == "text":
        last.write_text("epoch: 3\n")
    elif kind == "a tensor":
        torch.save(torch.zeros(3), last)
    elif kind == "of another program":
        torch.save({"state_dict": {}, "epoch": 1}, last)
    elif kind == "code":
        torch.save({"state_dict": {}, "lirpa_ext": Shell()}, last)
    elif kind == "best missing":
        best.unlink()
    elif kind == "best truncated":
        best.write_bytes(best.read_bytes()[:1000])
    elif kind == "best of an epoch before":
        content = torch.load(best, weights_only=True)
        content["callbacks"]["Best"]["epoch"] -= 1
        torch.save(content, best)
        return "is not the network that last.ckpt calls the best"
    elif kind == "no configuration":
        (folder / "config.yaml").write_text("- a list\n- of words\n")
        return "is no configuration of a run"
    return "missing, truncated or no checkpoint of this trainer"


@pytest.mark.parametrize(
    "kind",
    [
        "truncated", "empty", "text", "a tensor", "of another program", "code", "best missing", "best truncated",
        "best of an epoch before", "no configuration",
    ],
)  # fmt: skip
def test_a_damaged_folder_is_told(whole, tmp_path, capsys, kind):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    told = damage(folder, kind)
    assert fit(folder) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "--resume false" in error
    assert "Traceback" not in error
    assert not Path("/tmp/lirpa_ext_was_here").exists()


def test_fewer_epochs_than_are_done_are_refused(whole, capsys):
    before = (whole[0] / "config.yaml").read_bytes()
    assert fit(whole[0], "--trainer.max_epochs", "2") == 2
    assert "is in epoch 3, and trainer.max_epochs is 2" in capsys.readouterr().err
    assert (whole[0] / "config.yaml").read_bytes() == before


def test_more_epochs_train_on_and_leave_no_report_of_the_network_before(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    (folder / "test.json").write_text("{}")
    assert fit(folder, "--trainer.max_epochs", "4") == 0
    assert len(rows(folder)) == 4
    assert not (folder / "test.json").exists()


@needs_fork
def test_a_full_disk_is_told_and_the_state_before_it_stays(whole, tmp_path, capfd):
    """A limit of the size of files stands for the disk: the checkpoints are larger, the configuration is not."""
    import resource

    assert fit(tmp_path, "--trainer.max_epochs", "2", "--model.schedule.ramp", "0.5") == 0
    before = (tmp_path / "last.ckpt").read_bytes()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os._exit(fit(tmp_path, "--trainer.max_epochs", "3", "--model.schedule.ramp", "0.5"))
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 2
    error = capfd.readouterr().err
    assert "cannot be written: [Errno 27] File too large" in error
    assert "Traceback" not in error
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("place", ["/proc/lirpa_ext", "/dev/null/run"])
def test_a_place_that_cannot_be_written_to_is_told(capsys, place):
    assert fit(Path(place)) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys):
    from lirpa_ext.reporting.files import locked

    with locked(tmp_path / "run"):
        assert fit(tmp_path) == 2
    assert "is in use by another run" in capsys.readouterr().err


# --- trainers that are set otherwise ---


def test_double_precision_trains(tmp_path):
    assert fit(tmp_path, "--trainer.precision", "64", "--trainer.max_epochs", "2", "--model.schedule.ramp", "0.5") == 0
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in weights.values()} == {torch.float64}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--trainer.precision", "bf16-mixed"], "trainer.precision bf16-mixed rounds the bounds"),
        (["--trainer.precision", "16-true"], "trainer.precision 16-true rounds the bounds"),
        (["--trainer.precision", "bf16-true"], "trainer.precision bf16-true rounds the bounds"),
        (["--trainer.limit_train_batches", "0"], "not one step was trained"),
        (["--checkpoint_every", "-1"], "is a number of steps"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_told_before_the_first_step(tmp_path, capsys, monkeypatch, arguments, told):
    from lirpa_ext.training.module import CertifiedClassifier

    monkeypatch.setattr(CertifiedClassifier, "training_step", lambda *_: pytest.fail("a step was taken"))
    assert fit(tmp_path, *arguments) == 2
    assert told in capsys.readouterr().err


def test_a_run_that_a_callback_stopped_is_not_trained_again(tmp_path, monkeypatch):
    stop = (
        "[{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val_clean, mode: max, "
        "patience: 1, min_delta: 2}}]"
    )
    arguments = ["--trainer.max_epochs", "9", "--trainer.callbacks", stop, "--model.schedule.warmup", "0.1",
                 "--model.schedule.ramp", "0.2"]  # fmt: skip
    assert fit(tmp_path, *arguments) == 0
    done = len(rows(tmp_path))
    assert 2 <= done < 9
    from lirpa_ext.training.module import CertifiedClassifier

    monkeypatch.setattr(CertifiedClassifier, "training_step", lambda *_: pytest.fail("a step was taken"))
    assert fit(tmp_path, *arguments) == 0
    assert len(rows(tmp_path)) == done


def test_a_run_whose_time_is_out_goes_on_within_the_epoch(whole, tmp_path, monkeypatch):
    from lightning.pytorch.callbacks import Timer

    def out(self, stage="train"):
        return 1e9 if self.batches >= 10 else 0.0

    def count(self, trainer, *args):
        self.batches += 1
        original(self, trainer, *args)

    original = Timer.on_train_batch_end
    monkeypatch.setattr(Timer, "batches", 0, raising=False)
    monkeypatch.setattr(Timer, "time_elapsed", out)
    monkeypatch.setattr(Timer, "on_train_batch_end", count)
    assert fit(tmp_path, "--trainer.max_time", "00:00:10:00") == 0
    assert len(rows(tmp_path)) == 1  # the epoch that was cut short is not counted
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] >= 4
    monkeypatch.undo()
    assert fit(tmp_path) == 0
    a, b = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (tmp_path, whole[0]))
    assert same(a["state_dict"], b["state_dict"])
    assert rows(tmp_path) == rows(whole[0])


def test_an_epoch_without_a_validation_is_not_judged_by_that_of_another(tmp_path):
    arguments = ["--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "4"]
    assert fit(tmp_path, *arguments) == 0
    assert [bool(row["val_clean"]) for row in rows(tmp_path)] == [False, True, False, True]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] in (1, 3)


# --- data of the user's ---

MINE = '''
import random
import numpy
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, TensorDataset

class Noisy(Dataset):
    """Images with noise of three generators: what augmentation does."""
    def __init__(self, count):
        generator = torch.Generator().manual_seed(5)
        self.x, self.y = torch.rand(count, 1, 4, 4, generator=generator), torch.arange(count) % 3
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        noise = 0.01 * (torch.rand(()) + random.random() + numpy.random.rand()) / 3
        return (self.x[index] * 0.9 + noise).float(), self.y[index]

class Data(LightningDataModule):
    def __init__(self, count: int = 21, workers: int = 0, own: bool = False):
        super().__init__()
        self.data, self.workers = Noisy(count), workers
        self.generator = torch.Generator().manual_seed(1) if own else None
    def train_dataloader(self):
        return DataLoader(self.data, 4, shuffle=True, num_workers=self.workers, generator=self.generator)
    def val_dataloader(self):
        return DataLoader(TensorDataset(self.data.x, self.data.y), 10)
    test_dataloader = val_dataloader

class Parts:
    def __init__(self, data):
        self.data = data
    def __len__(self):
        return 4
    def __iter__(self):
        return iter([(self.data.x[:5], self.data.y[:5])] * 4)

class Stream(Data):
    def train_dataloader(self):
        return Parts(self.data)

class Several(Data):
    def train_dataloader(self):
        return [Parts(self.data), Parts(self.data)]

class Normed(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(16, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))

def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Arguments of a run on data and a network of the user's."""
    (tmp_path / "survivors.py").write_text(MINE)
    (tmp_path / "mine.yaml").write_text(
        "model: {network: {name: 'survivors:network', input_shape: [1, 4, 4], classes: 3}, loss: {name: bcp}, "
        "eps: 0.1}\ndata: {class_path: survivors.Data}\n"
        "trainer: {max_epochs: 3, logger: false, accelerator: cpu}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield ["--config", str(tmp_path / "mine.yaml"), "--progress", "false"]
    sys.modules.pop("survivors", None)


@needs_fork
@pytest.mark.parametrize("how", [[], ["--data.own", "true"], ["--data.workers", "1"]], ids=["plain", "own", "workers"])
def test_a_users_shuffled_loader_goes_on_where_it_was(mine, tmp_path, how):
    whole, part = tmp_path / "whole", tmp_path / "part"
    arguments = [*mine, *how, "--checkpoint_every", "1"]
    assert main(["fit", *arguments, "--run", str(whole)]) == 0
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        with Calls(of("training_step", "module.py"), 10):
            os._exit(main(["fit", *arguments, "--run", str(part)]))
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert torch.load(part / "last.ckpt", weights_only=True)["global_step"] == 9  # within the second epoch
    assert main(["fit", *arguments, "--run", str(part)]) == 0
    assert_same_run(part, whole)


def test_data_that_cannot_go_on_are_told(mine, tmp_path, caplog):
    arguments = [
        *mine,
        "--data.class_path",
        "survivors.Stream",
        "--checkpoint_every",
        "1",
        "--run",
        str(tmp_path / "r"),
    ]
    assert main(["fit", *arguments]) == 0
    assert "come from a Parts, which has no state_dict" in caplog.text


def test_batches_of_something_else_are_told(mine, tmp_path, capsys):
    assert main(["fit", *mine, "--data.class_path", "survivors.Several", "--run", str(tmp_path / "r")]) == 2
    assert "a batch is (images, labels), two tensors; the training data gave a list of" in capsys.readouterr().err


def test_a_last_batch_of_one_sample_is_told(mine, tmp_path, capsys):
    name = ["--model.network.name", "survivors:Normed", "--run", str(tmp_path / "r")]
    assert main(["fit", *mine, *name]) == 2
    assert "leave a last batch of one out, by drop_last=True" in capsys.readouterr().err
    assert main(["fit", *mine, *name, "--data.count", "20", "--trainer.sync_batchnorm", "true"]) == 2
    assert "sync_batchnorm takes statistics of all processes" in capsys.readouterr().err
    assert main(["fit", *mine, *name, "--data.count", "20"]) == 0
