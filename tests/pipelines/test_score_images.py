"""Scoring images that someone else made: pairing, the JSON file, mistakes."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image

from pipelines.score_images import main
from sr_data.resize import crop_to_multiple, downscale_bicubic, upscale_bicubic
from sr_train.metrics import score_image

SCALE = 4


@pytest.fixture
def score(run_main):
    """The script with these arguments."""
    return partial(run_main, main)


@pytest.fixture
def folders(tiny_photos, tmp_path):
    """HR photos and their bicubic SR images; the first of these has no suffix, the others have x4 or _x4."""
    sr_folder = tmp_path / "sr"
    sr_folder.mkdir()
    for path, suffix in zip(sorted(tiny_photos.glob("*.png")), ["", "x4", "_x4", "x4", "x4", "x4"], strict=True):
        hr_HWC = crop_to_multiple(np.array(Image.open(path)), SCALE)
        sr_HWC = upscale_bicubic(downscale_bicubic(hr_HWC, SCALE), SCALE)
        Image.fromarray(sr_HWC).save(sr_folder / f"{path.stem}{suffix}.png")
    return sr_folder, tiny_photos


def test_pairs_are_scored_and_written_as_promised(score, folders, tmp_path):
    sr_folder, hr_folder = folders
    status, out, err = score("--sr", sr_folder, "--hr", hr_folder, "--scale", SCALE, "--json", tmp_path / "scores.json")
    assert status == 0, err
    [scores] = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == ["set", "scale", "protocol", "psnr_db", "ssim", "images"]
    assert (scores["set"], scores["scale"], scores["protocol"]) == ("sr", SCALE, "psnr@y,crop=scale")
    names = sorted(path.stem for path in hr_folder.glob("*.png"))
    assert [image["name"] for image in scores["images"]] == names
    first = score_image(
        np.array(Image.open(sr_folder / f"{names[0]}.png")),
        crop_to_multiple(np.array(Image.open(hr_folder / f"{names[0]}.png")), SCALE),
        scale=SCALE,
        protocol="psnr@y,crop=scale",
        name=names[0],
    )
    assert scores["images"][0] == {"name": names[0], "psnr_db": first.psnr_db, "ssim": first.ssim}
    assert scores["psnr_db"] == pytest.approx(np.mean([image["psnr_db"] for image in scores["images"]]))
    assert f"{scores['psnr_db']:.3f}" in out
    assert "+0.000" in out, "these images are bicubic's own"


def test_identical_images_are_null(score, tiny_photos, tmp_path):
    status, _, err = score("--sr", tiny_photos, "--hr", tiny_photos, "--scale", 1, "--json", tmp_path / "scores.json")
    assert status == 0, err
    [scores] = json.loads((tmp_path / "scores.json").read_text())
    assert scores["psnr_db"] is None
    assert scores["ssim"] == pytest.approx(1.0)


def test_what_has_no_partner_is_listed(score, folders):
    sr_folder, hr_folder = folders
    (sr_folder / "photo-1x4.png").rename(sr_folder / "other.png")
    status, _, err = score("--sr", sr_folder, "--hr", hr_folder, "--scale", SCALE)
    assert status == 2
    assert f"no SR image in {sr_folder} for photo-1.png" in err
    assert f"no HR image in {hr_folder} for other.png" in err


def test_two_partners_are_refused(score, folders):
    sr_folder, hr_folder = folders
    (sr_folder / "photo-1.png").write_bytes((sr_folder / "photo-1x4.png").read_bytes())
    status, _, err = score("--sr", sr_folder, "--hr", hr_folder, "--scale", SCALE)
    assert status == 2
    assert "photo-1.png and photo-1x4.png are both the SR image of photo-1.png" in err


def test_a_wrong_size_names_file_sizes_and_flag(score, folders):
    sr_folder, hr_folder = folders
    Image.new("RGB", (60, 60)).save(sr_folder / "photo-2_x4.png")
    status, _, err = score("--sr", sr_folder, "--hr", hr_folder, "--scale", SCALE)
    assert status == 2
    assert "photo-2_x4.png: is 60x60; photo-2.png cropped to a multiple of 4 is 96x72 (--scale" in err


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--sr", "nowhere", "--hr", "nowhere", "--scale", 4], ["nowhere: there are no images", "--hr"]),
        (["--sr", "a", "--hr", "b", "--scale", 4, "--protocol", "psnr"], ["unknown protocol", "--protocol"]),
        (["--sr", "a", "--hr", "b", "--scale", 0], ["--scale"]),
        (["--sr", "a", "--hr", "b", "--scale", 4, "--crop", 4], ["--crop"]),
        (["--sr", "a", "--hr", "b"], ["--scale"]),
    ],
)
def test_mistakes_are_named(score, arguments, messages):
    status, _, err = score(*arguments)
    assert status == 2
    assert all(message in err for message in messages), err


@pytest.mark.parametrize("target", ["a-file/scores.json", "a-folder"])
def test_scores_that_could_not_be_written_are_not_made(score, folders, tmp_path, target):
    sr_folder, hr_folder = folders
    (tmp_path / "a-file").write_text("in the way")
    (tmp_path / "a-folder").mkdir()
    flags = ("--sr", sr_folder, "--hr", hr_folder, "--scale", SCALE)
    status, out, err = score(*flags, "--json", tmp_path / target)
    assert (status, out) == (2, ""), "no table, so nothing was scored"
    assert str(tmp_path / target.partition("/")[0]) in err
    assert "--json" in err


def test_the_script_runs_on_its_own_and_a_mistake_is_one_line(repo, tmp_path):
    command = [sys.executable, repo / "pipelines/score_images.py", "--sr", "a", "--hr", "b", "--scale", "4"]
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/b: there are no images, or no such folder (--hr)\n"
