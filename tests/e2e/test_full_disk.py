"""The disk with the checkpoints is full, then has room: a run ends with a message, and goes on when asked to."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sr_data.storage import open_store
from sr_train import checkpoint as ckpt
from sr_train.run_folder import checkpoint_store
from tests.support.pipeline import run_script

pytestmark = pytest.mark.e2e


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"can't mount a small disk here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_at_the_second_checkpoint(small_disk: Path, tiny_photos: Path, tmp_path: Path) -> None:
    """A checkpoint takes 1.1 MB: weights, average and Adam's moments of 69,027 parameters."""
    arguments = [
        *("--data.uri", tiny_photos, "--validation.num-images", 2, "--validation.interval-patches", 48),
        *("--optim.global-batch-size", 4, "--optim.total-patches", 48, "--checkpoint.interval-patches", 16),
        *("--schedule.warmup-patches", 4, "--run.storage", small_disk, "--run.name", "full", "--run.device", "cpu"),
        *("--checkpoint.patience-s", 0),
    ]
    failed = run_script("train_edsr.py", *arguments, cwd=tmp_path, env={})
    assert failed.returncode == 2, failed.stderr
    message, advice = failed.stderr.splitlines()[-2:]
    assert f"{small_disk}/full/checkpoints/step-000000008.safetensors: the disk is full" in message
    assert f"--resume --run.name full --run.storage {small_disk}" in advice
    store = checkpoint_store(open_store(str(small_disk / "full")).uri)
    assert ckpt.list_keys(store) == [ckpt.key_of_step(4)]
    assert ckpt.read_checkpoint(store, ckpt.key_of_step(4)).step == 4
    assert list((small_disk / "full" / "checkpoints").iterdir()) == [Path(store.uri) / ckpt.key_of_step(4)]

    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    finished = run_script(
        *("train_edsr.py", "--resume", "--run.name", "full", "--run.storage", small_disk), cwd=tmp_path, env={}
    )
    assert finished.returncode == 0, finished.stderr
    assert "going on from step 4" in finished.stdout + finished.stderr
    assert ckpt.list_keys(store) == [ckpt.key_of_step(step) for step in (4, 8, 12)]
