"""What train_edsr.py makes of input that is not as it should be: a message before training, or a counted decision."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.pipeline import run_script
from tests.support.s3 import S3Server

RunMain = Callable[..., tuple[int, str, str]]


def is_refused(outcome: tuple[int, str, str], *parts: object) -> None:
    """Ended by one message, which holds all the parts, before anything was planned or kept."""
    status, out, err = outcome
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ") and "Traceback" not in err
    assert [part for part in parts if str(part) not in err] == [], err
    assert not list(Path("runs").glob("[!.]*"))


def shows(outcome: tuple[int, str, str], row: str, *parts: object) -> None:
    """A plan whose row of that name holds all the parts."""
    status, out, err = outcome
    assert status == 0, err
    rows = "\n".join(line for line in out.splitlines() if line.startswith(row))
    assert [part for part in parts if str(part) not in rows] == [], out


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Storage


@pytest.mark.parametrize("flag", ["--data.uri", "--validation.uri", "--run.storage"])
def test_a_missing_bucket(plan: RunMain, s3: S3Server, flag: str) -> None:
    is_refused(plan(flag, "s3://not-there/x"), f"({flag})", "s3://not-there/x", "there is no bucket 'not-there'")


def test_a_missing_bucket_of_a_run_to_resume(plan: RunMain, s3: S3Server) -> None:
    outcome = plan("--resume", "--run.name", "mine", "--run.storage", "s3://not-there/x")
    is_refused(outcome, "(--run.storage)", "there is no bucket 'not-there'")


def test_wrong_credentials(plan: RunMain, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.new_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped")
    outcome = plan("--data.uri", f"{bucket}/photos", "--run.storage", f"{bucket}/runs")
    is_refused(outcome, "2 problems", "(--data.uri)", "(--run.storage)", "AWS_SECRET_ACCESS_KEY", "403")


def test_no_credentials(plan: RunMain, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.new_bucket()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    is_refused(plan("--data.uri", f"{bucket}/photos"), "(--data.uri)", "no complete credentials", "AWS_ACCESS_KEY_ID")


def test_a_mistyped_folder(plan: RunMain) -> None:
    is_refused(plan("--data.uri", "/no/such/folder"), "(--data.uri)", "/no/such/folder: holds no images")


@pytest.mark.parametrize("flag", ["--data.uri", "--validation.uri", "--run.storage"])
def test_a_kind_of_storage_that_is_not_supported(plan: RunMain, flag: str) -> None:
    is_refused(plan(flag, "gs://bucket/x"), f"({flag})", "gs://bucket/x: can't read gs://; use s3://")


def test_a_run_folder_that_can_not_be_written(plan: RunMain, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    is_refused(plan("--run.storage", tmp_path / "taken"), "(--run.storage)", f"{tmp_path}/taken: ", "is a file")


# Images


@pytest.fixture
def truncated(tiny_photos: Path) -> Path:
    path = tiny_photos / "photo-1.png"
    path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.fixture
def split_photos(tiny_photos: Path) -> Path:
    """The photos in train/, one of them in valid/."""
    for name in ("train", "valid"):
        (tiny_photos / name).mkdir()
    for path in tiny_photos.glob("*.png"):
        path.rename(tiny_photos / ("valid" if path.stem == "photo-0" else "train") / path.name)
    return tiny_photos


def test_a_truncated_png(plan: RunMain, truncated: Path) -> None:
    is_refused(plan(), "(--data.uri)", "photo-1.png: the image is truncated", "--data.on-bad-image skip")


def test_a_truncated_png_left_out(plan: RunMain, truncated: Path) -> None:
    outcome = plan("--data.on-bad-image", "skip")
    shows(outcome, "training set", "5 images", "unusable, left out: 1")
    shows(outcome, "left out", "photo-1.png: the image is truncated")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("shopping list", "begins with the text 'shopping list'"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
        ("", "the file is empty"),
    ],
)
def test_a_text_file_called_png(plan: RunMain, tiny_photos: Path, text: str, hint: str) -> None:
    (tiny_photos / "notes.png").write_text(text)
    is_refused(plan(), "(--data.uri)", "1 of 7 images can't be used", "notes.png: ", hint)


def test_a_truncated_png_in_the_validation_set(plan: RunMain, split_photos: Path) -> None:
    path = split_photos / "valid" / "photo-0.png"
    path.write_bytes(path.read_bytes()[:2000])
    is_refused(plan(), "validation set (--validation.uri)", "valid/photo-0.png: the image is truncated")


def save_grey_16(photo: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(path)


@pytest.mark.parametrize(
    ("save", "suffix", "decision"),
    [
        (lambda photo, path: photo.convert("L").save(path), "png", "grey to RGB: 1"),
        (lambda photo, path: photo.convert("RGBA").save(path), "png", "alpha dropped: 1"),
        (save_grey_16, "png", "16-bit to 8-bit: 1"),
        (lambda photo, path: photo.convert("P").save(path), "png", "palette to RGB: 1"),
        (lambda photo, path: photo.convert("CMYK").save(path), "jpg", "CMYK to RGB: 1"),
    ],
    ids=["grey", "RGBA", "16-bit", "palette", "CMYK"],
)
def test_images_of_other_modes_are_converted_and_counted(
    plan: RunMain, tiny_photos: Path, save: Callable[[Image.Image, Path], None], suffix: str, decision: str
) -> None:
    with Image.open(tiny_photos / "photo-0.png") as photo:
        save(photo, tiny_photos / f"other.{suffix}")
    shows(plan(), "training set", "7 images", decision)


def test_an_image_smaller_than_a_patch_is_left_out_and_named(plan: RunMain, tiny_photos: Path) -> None:
    Image.new("RGB", (40, 90)).save(tiny_photos / "small.png")
    outcome = plan()
    shows(outcome, "training set", "6 images", "smaller than a patch, left out: 1")
    shows(outcome, "left out", "small.png: 40 x 90 px, smaller than 48 px")


def test_no_image_as_large_as_a_patch(plan: RunMain) -> None:
    outcome = plan("--data.patch-px-hr", 256)
    is_refused(outcome, "no usable image left, of 6", "--data.patch-px-hr", "photo-0.png: 96 x 72 px")


@pytest.fixture
def pairs(tiny_photos: Path) -> Path:
    """The photos as HR, with an LR image each, x2."""
    hr, lr = tiny_photos / "HR", tiny_photos / "LR_bicubic" / "X2"
    hr.mkdir()
    lr.mkdir(parents=True)
    for path in tiny_photos.glob("*.png"):
        with Image.open(path) as photo:
            photo.resize((photo.width // 2, photo.height // 2)).save(lr / f"{path.stem}x2.png")
        path.rename(hr / path.name)
    return tiny_photos


def test_unpaired_lr(plan: RunMain, pairs: Path) -> None:
    shows(plan(), "training set", "6 images")
    (pairs / "LR_bicubic/X2/photo-2x2.png").rename(pairs / "LR_bicubic/X2/otherx2.png")
    missing, extra = "HR without LR: HR/photo-2.png", "LR without HR: LR_bicubic/X2/otherx2.png"
    is_refused(plan(), "(--data.uri)", missing, extra)


def test_lr_of_another_size(plan: RunMain, pairs: Path) -> None:
    Image.new("RGB", (30, 30)).save(pairs / "LR_bicubic/X2/photo-2x2.png")
    is_refused(plan(), "(--data.uri)", "LR_bicubic/X2/photo-2x2.png: is 30 x 30 px", "is 48 x 37")


# The validation set


def test_an_empty_validation_folder(plan: RunMain, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    is_refused(plan("--validation.uri", tmp_path / "empty"), "(--validation.uri)", f"{tmp_path}/empty: holds no images")


def test_no_validation_split(plan: RunMain, split_photos: Path) -> None:
    shutil.rmtree(split_photos / "valid")
    is_refused(plan(), "(--validation.uri)", "has no split 'valid'; it has train", "--validation.split")


def test_validation_images_too_small_to_be_scored(plan: RunMain, split_photos: Path) -> None:
    Image.new("RGB", (26, 90)).save(split_photos / "valid" / "sliver.png")
    shows(plan(), "validation set", "2 images")
    outcome = plan("--validation.protocol", "psnr@rgb,crop=scale+6")
    is_refused(outcome, "(--validation.uri)", "below 27 px", "(--validation.protocol)", "valid/sliver.png")


# Options


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.scale", 4, "--data.patch-px-hr", 50], ["50", "scale=4", "use 48 or 52", "--data.patch-px-hr"]),
        (["--model.scale", 4, "--data.patch-px-hr", 2], ["patch_px_hr=2", "use 4 (--data.patch-px-hr)"]),
        (["--run.num-workers", 3], ["16", "num_workers=3", "use 15 or 18", "--optim.global-batch-size"]),
        (["--optim.accumulation-steps", 32], ["16", "steps=32", "use 32 (--optim.global-batch-size)"]),
        (["--preset", "edsr-x5"], ["'edsr-x5'", "edsr-baseline-x4", "--preset"]),
        (["--data.uri", ""], ["edsr-small-x2", "--data.uri"]),
    ],
)
def test_options_that_do_not_fit(plan: RunMain, arguments: list[object], parts: list[str]) -> None:
    is_refused(plan(*arguments), *parts)


def test_options_that_do_not_fit_are_all_named(train: RunMain) -> None:
    """And before Ray is started, which takes seconds."""
    outcome = train("--data.patch-px-hr", 49, "--run.num-workers", 3, "--optim.total-patches", 9)
    is_refused(outcome, "(--data.patch-px-hr)", "(--optim.global-batch-size)", "--schedule.warmup-patches")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data.urii", "x"], ["--data.urii", "--data.uri STR"]),
        (["--model.scale", 5], ["--model.scale", "'2', '3'"]),
        (["--optim.seed", "abc"], ["--optim.seed", "'abc'"]),
        (["--run.name", "a/b"], ["--run.name='a/b'"]),
        (["--tracking.sample-images", -1], ["--tracking.sample-images=-1 must be 0 or more"]),
    ],
)
def test_mistyped_options(train: RunMain, arguments: list[object], parts: list[str]) -> None:
    status, out, err = train(*arguments)
    assert (status, out) == (2, "")
    assert [part for part in parts if part not in err] == [], err


# The tracking server


def test_an_unreachable_tracking_server(plan: RunMain, unused_port: int) -> None:
    uri = f"http://127.0.0.1:{unused_port}"
    outcome = plan("--tracking.uri", uri)
    is_refused(outcome, f"{uri}: can't be reached (Connection refused)", "--tracking.uri", "--tracking.allow-offline")


def test_an_unreachable_tracking_server_that_may_be_away(plan: RunMain, unused_port: int) -> None:
    outcome = plan("--tracking.uri", f"http://127.0.0.1:{unused_port}", "--tracking.allow-offline")
    shows(outcome, "tracking", "NOT REACHABLE")
    shows(outcome, "registers", "--resume when MLflow is reachable")


def test_a_server_that_is_no_tracking_server(plan: RunMain, s3: S3Server) -> None:
    uri = s3.env["AWS_ENDPOINT_URL"]
    is_refused(plan("--tracking.uri", uri), f"tracking server {uri}: ", "--tracking.uri")


def test_several_problems_are_all_listed(
    plan: RunMain, tiny_photos: Path, truncated: Path, unused_port: int, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    outcome = plan(
        *("--run.storage", tmp_path / "taken", "--run.device", "cuda", "--checkpoint.init-from", "no/model"),
        *("--tracking.uri", f"http://127.0.0.1:{unused_port}", "--validation.uri", "/no/such/folder"),
    )
    is_refused(outcome, "6 problems:")
    found = [line for line in outcome[2].splitlines() if line.startswith("- ")]
    flags = ["--run.storage", "--tracking.uri", "--run.device", "--data.uri", "--validation.uri"]
    assert len(found) == 6
    assert all(flag in line for flag, line in zip([*flags, "--checkpoint.init-from"], found, strict=True)), found


# As a process: no cluster is joined that a test started


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nonsense"])
def test_no_cluster_at_the_address(tmp_path: Path, unused_port: int, address: str) -> None:
    address = address.format(port=unused_port)
    done = run_script("train_edsr.py", "--plan", cwd=tmp_path, env={"RAY_ADDRESS": address})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: RAY_ADDRESS={address}") and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_script_ends_with_the_message_alone(tmp_path: Path) -> None:
    done = run_script("train_edsr.py", "--data.uri", "nowhere", cwd=tmp_path, env={})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: training set (--data.uri): {tmp_path}/nowhere: holds no images."), (
        done.stderr
    )
