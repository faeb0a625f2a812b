"""The script as a person runs it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sr_data.decode import encode_png
from sr_data.manifest import STAGED_KEY, load_manifest
from sr_data.storage import Store, open_store
from tests.support.process import PATIENCE_S


def command(repo: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(repo / "pipelines/prepare_dataset.py"), *arguments]


def run(repo: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(repo, *arguments), cwd=repo, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def test_stages_to_s3_and_says_what_it_did(repo: Path, s3: Any, tiny_photos: Path) -> None:
    target = s3.new_bucket() + "/photos"
    result = run(repo, "--source", str(tiny_photos), "--target", target, "--make-lr", "2,3")
    assert result.returncode == 0, result.stderr
    assert f"{target}: complete" in result.stdout
    assert "HR images    6 all" in result.stdout
    assert "LR images made now: 12" in result.stdout
    assert "staged 6/6 images" in result.stdout
    assert len(load_manifest(target, split="train", scale=3).images) == 6
    again = run(repo, "--source", str(tiny_photos), "--target", target, "--make-lr", "2,3")
    assert "6 of them finished before" in again.stdout
    assert "0.0 MB sent" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--make-lr", "two"], "--make-lr 'two'"),
        (["--tile-step-px", "8"], "--tile-step-px needs --tile-px"),
        (["--tile-px", "47", "--make-lr", "2"], "--tile-px=47 is not a multiple of 2"),
        (["--split", "test"], "has no split 'test'; it has train, valid"),
        (["--layout", "div2k"], "not of layout div2k"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(repo: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    result = run(repo, "--source", "builtin://photos", "--target", str(tmp_path / "target"), *arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_credentials_end_it_at_once(
    repo: Path, s3: Any, tiny_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = s3.new_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    result = run(repo, "--source", str(tiny_photos), "--target", target)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {target}: the server refuses these credentials")
    assert "AWS_SECRET_ACCESS_KEY" in result.stderr


def test_killed_in_the_middle_and_run_again(repo: Path, tmp_path: Path) -> None:
    """SIGKILL can't be cleaned up after: nothing half-written counts, and nothing whole is written again."""
    source, target = open_store(str(tmp_path / "source")), open_store(str(tmp_path / "target"))
    rng = np.random.default_rng(0)
    for number in range(150):
        source.write(f"{number:03}.png", encode_png(rng.integers(0, 256, (120, 160, 3), np.uint8)))
    arguments = command(
        repo, "--source", source.uri, "--target", target.uri, "--make-lr", "2,3,4", "--num-workers", "2"
    )
    with subprocess.Popen(arguments, cwd=repo, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(staged_images(target)) < 40:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    before = staged_images(target)
    assert 40 <= len(before) < 600
    assert not target.exists(STAGED_KEY)

    assert run(repo, "--source", source.uri, "--target", target.uri, "--make-lr", "2,3,4").returncode == 0
    after = staged_images(target)
    assert len(after) == 600
    assert {key: after[key] for key in before} == before
    staged, read = (load_manifest(store.uri, split="train", scale=4) for store in (target, source))
    assert [image.hr_sha256 for image in staged.images] == [image.hr_sha256 for image in read.images]


def staged_images(target: Store) -> dict[str, str]:
    """Key → version, which holds the time of writing."""
    return {entry.key: entry.version for entry in target.list() if entry.key.endswith(".png")}
