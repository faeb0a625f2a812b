"""Evaluating a model on sets: the numbers, the JSON file, the table, mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image

from pipelines import evaluate_model
from pipelines.evaluate_model import main
from sr_data.resize import crop_to_multiple, downscale_bicubic
from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.inference import upscale_image
from sr_models.weights import save_model
from sr_train.metrics import score_image

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)


@pytest.fixture
def evaluate(run_main):
    """The script with these arguments."""
    return partial(run_main, main)


@pytest.fixture
def saved_model(tmp_path):
    save_model(tmp_path / "saved", CONFIG, build_model(CONFIG, seed=0).state_dict())
    return tmp_path / "saved"


@pytest.mark.parametrize(("scale", "published_db"), [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_bicubic_on_set5_reads_as_published(evaluate, shared_data, tmp_path, scale, published_db):
    arguments = ("--sets", shared_data / "Set5", "--scale", scale, "--json", tmp_path / "scores.json")
    status, out, err = evaluate("bicubic", *arguments)
    assert status == 0, err
    [scores] = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["set"], scores["scale"], scores["protocol"]) == ("Set5", scale, "psnr@y,crop=scale")
    assert scores["psnr_db"] == pytest.approx(published_db, abs=0.02)
    assert [image["name"] for image in scores["images"]] == ["baby", "bird", "butterfly", "head", "woman"]
    assert f"{scores['psnr_db']:.3f}" in out
    assert "psnr@y,crop=scale" in out


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_model_is_scored_on_each_set_with_bicubic_beside_it(evaluate, saved_model, tiny_photos, tmp_path, ensemble):
    shutil.copytree(tiny_photos, tmp_path / "again")
    sets = f"{tiny_photos},{tmp_path / 'again'}"
    flags = ["--self-ensemble"] if ensemble else []
    protocol = "psnr@rgb,crop=scale"
    arguments = ("--sets", sets, "--scale", 2, "--protocol", protocol, "--device", "cpu", *flags)
    status, out, err = evaluate(saved_model, *arguments, "--json", tmp_path / "out/scores.json")
    assert status == 0, err
    first, again = json.loads((tmp_path / "out/scores.json").read_text())
    assert (first["set"], again["set"]) == ("tiny_photos", "again")
    assert first["images"] == again["images"]
    model = build_model(CONFIG, seed=0)
    for image in first["images"]:
        hr_HWC = crop_to_multiple(np.array(Image.open(tiny_photos / f"{image['name']}.png")), 2)
        sr_HWC = upscale_image(model, downscale_bicubic(hr_HWC, 2), self_ensemble=ensemble)
        expected = score_image(sr_HWC, hr_HWC, scale=2, protocol=protocol)
        assert (image["psnr_db"], image["ssim"]) == (expected.psnr_db, expected.ssim)
    assert first["psnr_db"] == pytest.approx(np.mean([image["psnr_db"] for image in first["images"]]))
    heading, columns, *rows = out.splitlines()
    assert heading == f"{saved_model}  x2  {protocol} (SSIM of Y)"
    assert columns.split("  ")[0].strip() == "set"
    assert [row.split()[:3] for row in rows] == [[s["set"], "6", f"{s['psnr_db']:.3f}"] for s in (first, again)]
    _, _, psnr_db, _, bicubic_db, _, gain_db = rows[0].split()
    assert float(gain_db) == pytest.approx(float(psnr_db) - float(bicubic_db), abs=0.0011)


def test_sets_and_scores_on_s3(evaluate, s3, tiny_photos):
    bucket = s3.new_bucket()
    photos = open_store(f"{bucket}/photos")
    for path in tiny_photos.iterdir():
        photos.write(path.name, path.read_bytes())
    status, _, err = evaluate("bicubic", "--sets", photos.uri, "--scale", 3, "--json", f"{bucket}/out/scores.json")
    assert status == 0, err
    [scores] = json.loads(open_store(bucket).read_text("out/scores.json"))
    assert (scores["set"], len(scores["images"])) == ("photos", 6)


def test_shipped_lr_images_are_used(evaluate, tiny_photos, tmp_path):
    """A set whose LR images are black scores far below one whose LR images are made here."""
    for folder in ("set/HR", "set/LR_bicubic/X2"):
        (tmp_path / folder).mkdir(parents=True)
    for path in tiny_photos.iterdir():
        with Image.open(path) as image:
            width, height = (side // 2 for side in image.size)
        shutil.copy(path, tmp_path / "set/HR")
        Image.new("RGB", (width, height)).save(tmp_path / f"set/LR_bicubic/X2/{path.stem}x2.png")
    assert evaluate("bicubic", "--sets", tmp_path / "set", "--scale", 2, "--json", "scores.json")[0] == 0
    with open("scores.json") as file:
        assert json.load(file)[0]["psnr_db"] < 10


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["{model}", "--sets", "{photos}", "--scale", "4"], ["{model}: is an x2 model, not x4", "--scale"]),
        (["no/model", "--sets", "{photos}", "--scale", "2"], ["no/model: is no saved model", "MODEL is bicubic"]),
        (["bicubic", "--sets", "{photos},{photos}/", "--scale", "2"], ["'tiny_photos' is given twice", "--sets"]),
        (["bicubic", "--sets", ",", "--scale", "2"], ["names no set", "--sets"]),
        (["bicubic", "--sets", "nowhere", "--scale", "2"], ["nowhere"]),
        (["bicubic", "--sets", "{photos}", "--scale", "0"], ["scale=0", "--scale"]),
        (["bicubic", "--sets", "{photos}", "--scale", "2", "--protocol", "ssim"], ["'ssim'", "--protocol"]),
        (["bicubic", "--sets", "{photos}", "--scale", "2", "--tile", "9"], ["--tile"]),
        (["bicubic", "--sets", "{photos}"], ["--scale"]),
    ],
)
def test_mistakes_are_named(evaluate, saved_model, tiny_photos, arguments, messages):
    places = {"model": saved_model, "photos": tiny_photos}
    status, _, err = evaluate(*(argument.format(**places) for argument in arguments))
    assert status == 2
    assert all(message.format(**places) in err for message in messages), err


@pytest.fixture
def scored(monkeypatch):
    """The images that were scored."""
    names = []
    original = evaluate_model.score_pairs

    def score_pairs(upscale, pairs, **protocol):
        scores = original(upscale, pairs, **protocol)
        names.extend(score.name for score in scores)
        return scores

    monkeypatch.setattr(evaluate_model, "score_pairs", score_pairs)
    return names


def damaged(folder):
    (folder / "notes.png").write_text("not an image")


def all_damaged(folder):
    for path in folder.iterdir():
        path.write_text("not an image")


def without_the_split(folder):
    for split in ("train", "valid"):
        (folder / split).mkdir()
    for number, path in enumerate(folder.glob("*.png")):
        path.rename(folder / ("train", "valid")[number % 2] / path.name)


def unpaired(folder):
    (folder / "LR_bicubic/X2").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "LR_bicubic/X2/nobodyx2.png")


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (damaged, ["1 images can't be used", "notes.png"]),
        (all_damaged, ["no usable image", "photo-1.png"]),
        (without_the_split, ["has no split 'test'; it has train, valid (--sets, --split)"]),
        (unpaired, ["nobodyx2.png"]),
        (shutil.rmtree, ["holds no images"]),
    ],
)
def test_a_bad_set_is_found_before_the_first_score_and_advises_own_flags(
    evaluate, scored, tiny_photos, tmp_path, spoil, messages
):
    shutil.copytree(tiny_photos, tmp_path / "second")
    spoil(tmp_path / "second")
    status, _, err = evaluate("bicubic", "--sets", f"{tiny_photos},{tmp_path / 'second'}", "--scale", "2")
    assert status == 2
    assert all(message in err for message in [*messages, str(tmp_path / "second"), "--sets"]), err
    assert not re.search(r"--(data|validation|source)", err), err
    assert scored == []


@pytest.mark.parametrize("target", ["a-file/scores.json", "a-folder"])
def test_scores_that_could_not_be_written_are_not_made(evaluate, scored, tiny_photos, tmp_path, target):
    (tmp_path / "a-file").write_text("in the way")
    (tmp_path / "a-folder").mkdir()
    status, out, err = evaluate("bicubic", "--sets", tiny_photos, "--scale", "2", "--json", tmp_path / target)
    assert (status, out) == (2, "")
    assert str(tmp_path / target.partition("/")[0]) in err
    assert "--json" in err
    assert scored == []


def test_the_script_runs_on_its_own_and_a_mistake_is_one_line(repo, tmp_path):
    command = [sys.executable, repo / "pipelines/evaluate_model.py", "bicubic", "--sets", ",", "--scale", "2"]
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: ',': names no set; give folders or URIs, separated by commas (--sets)\n"
