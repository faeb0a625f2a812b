"""Evaluating models on sets: the numbers, the files, the tables, the tags, mistakes."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines.evaluate_model import Options, main
from sr_data.resize import crop_to_multiple, downscale_bicubic
from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.inference import upscale_image
from sr_models.weights import save_model
from sr_serve import evaluation
from sr_serve.score_tags import read_score_tags
from sr_train.metrics import PAPERS_PROTOCOL, score_image
from sr_train.model_registry import register_model
from sr_train.tracking import start_run

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
KEYS = [
    *("model", "version", "self_ensemble", "fingerprint"),
    *("set", "scale", "protocol", "psnr_db", "ssim", "images"),
]


@pytest.fixture
def evaluate(run_main):
    """The script with these arguments."""
    return partial(run_main, main)


@pytest.fixture
def saved_model(tmp_path):
    return saved(tmp_path / "saved")


def saved(folder, scale=2, seed=0):
    config = EDSRConfig(scale=scale, num_blocks=1, num_channels=4)
    save_model(folder, config, build_model(config, seed=seed).state_dict())
    return folder


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
    status, out, err = evaluate(saved_model, "bicubic", *arguments, "--json", tmp_path / "out/scores.json")
    assert status == 0, err
    bicubic, first, _, again = json.loads((tmp_path / "out/scores.json").read_text())
    assert list(first) == KEYS
    assert (bicubic["model"], bicubic["self_ensemble"]) == ("bicubic", False)
    assert (first["model"], first["version"], first["self_ensemble"]) == (str(saved_model), None, ensemble)
    assert first["fingerprint"] == again["fingerprint"], "the same images"
    assert (first["set"], again["set"]) == ("tiny_photos", "again")
    assert first["images"] == again["images"]
    model = build_model(CONFIG, seed=0)
    for image in first["images"]:
        hr_HWC = crop_to_multiple(np.array(Image.open(tiny_photos / f"{image['name']}.png")), 2)
        sr_HWC = upscale_image(model, downscale_bicubic(hr_HWC, 2), self_ensemble=ensemble)
        expected = score_image(sr_HWC, hr_HWC, scale=2, protocol=protocol)
        assert (image["psnr_db"], image["ssim"]) == (expected.psnr_db, expected.ssim)
    assert first["psnr_db"] == pytest.approx(np.mean([image["psnr_db"] for image in first["images"]]))
    heading, columns, *rows = out.partition("\n\n")[0].splitlines()
    assert heading == f"tiny_photos  x2  {protocol} (SSIM of Y)  6 images"
    assert re.split("  +", columns.strip()) == ["model", "PSNR dB", "SSIM", "gain dB", "s/image"]
    gain = f"{first['psnr_db'] - bicubic['psnr_db']:+.3f}"
    label = f"{saved_model} self-ensemble" if ensemble else str(saved_model)
    (name, *of_bicubic), (model, *of_model) = (re.split("  +", row) for row in rows)
    assert [name, *of_bicubic[:3]] == ["bicubic", f"{bicubic['psnr_db']:.3f}", f"{bicubic['ssim']:.4f}", "+0.000"]
    assert [model, *of_model[:3]] == [label, f"{first['psnr_db']:.3f}", f"{first['ssim']:.4f}", gain]


def test_models_of_two_scales_are_scored_at_their_own(evaluate, tiny_photos, tmp_path):
    models = saved(tmp_path / "b", scale=2), saved(tmp_path / "a", scale=2, seed=1), saved(tmp_path / "c", scale=3)
    arguments = ("--sets", tiny_photos, "--json", "scores.json", "--csv", tmp_path / "out/scores.csv")
    status, out, err = evaluate(*models, "bicubic", *arguments)
    assert status == 0, err
    with open("scores.json") as file:
        scores = json.load(file)
    expected = [("bicubic", 2), (str(models[0]), 2), (str(models[1]), 2), ("bicubic", 3), (str(models[2]), 3)]
    assert [(it["model"], it["scale"]) for it in scores] == expected
    assert len({it["fingerprint"] for it in scores}) == 2, "a fingerprint is of a set at a scale"
    assert [table.split("  ")[1] for table in out.split("\n\n")] == ["x2", "x3"]
    with open(tmp_path / "out/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    listed = [(it["model"], it["scale"], image) for it in scores for image in it["images"]]
    assert len(rows) == len(listed) == 5 * 6
    bicubic_db = {(row["scale"], row["image"]): float(row["psnr_db"]) for row in rows if row["model"] == "bicubic"}
    for row, (model, scale, image) in zip(rows, listed, strict=True):
        assert (row["model"], int(row["scale"]), row["image"]) == (model, scale, image["name"])
        assert (float(row["psnr_db"]), float(row["ssim"])) == (image["psnr_db"], image["ssim"])
        assert float(row["gain_db"]) == float(row["psnr_db"]) - bicubic_db[row["scale"], row["image"]]


def test_bicubic_is_scored_at_every_scale_asked_for(evaluate, tiny_photos):
    assert evaluate("bicubic", "--sets", tiny_photos, "--scale", "3,2", "--json", "scores.json").status == 0
    with open("scores.json") as file:
        assert [it["scale"] for it in json.load(file)] == [2, 3]


@pytest.fixture
def registered(mlflow_server, saved_model, tmp_path, request):
    """A registered model with the alias champion at its only version, named like the test; its name."""
    name = f"evaluate-{request.node.name}"
    run = start_run(tracking_uri=mlflow_server.uri, experiment=name, run_name="run", params={}, tags={}, texts={})
    sample_HWC = np.zeros((9, 12, 3), np.uint8)
    register_model(run, saved_model, name=name, tags={}, sample_lr_HWC=sample_HWC, alias="champion")
    return name


def test_scores_become_tags_of_the_version_that_the_alias_meant(
    evaluate, registered, mlflow_server, tiny_photos, monkeypatch
):
    client = MlflowClient(mlflow_server.uri, mlflow_server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    model = f"models:/{registered}@champion"
    arguments = (model, "--sets", tiny_photos, "--json", "scores.json")
    before = dict(client.get_model_version(registered, "1").tags)
    assert evaluate(*arguments, "--no-tags").status == 0
    assert client.get_model_version(registered, "1").tags == before
    status, out, err = evaluate(*arguments)
    assert status == 0, err
    with open("scores.json") as file:
        [scores] = json.load(file)
    assert (scores["model"], scores["version"]) == (model, "1")
    assert f"{model} (version 1)" in out
    [tag] = read_score_tags(client.get_model_version(registered, "1").tags)
    assert tag.key == "score.tiny_photos.x2.psnr_y_crop_scale"
    for field in ("set", "scale", "protocol", "psnr_db", "ssim", "fingerprint"):
        assert getattr(tag, field) == scores[field]
    assert evaluate("bicubic", "--sets", tiny_photos, "--scale", 2, "--json", "bicubic.json").status == 0
    with open("bicubic.json") as file:
        [bicubic] = json.load(file)
    assert (tag.bicubic_psnr_db, tag.bicubic_ssim, tag.images) == (bicubic["psnr_db"], bicubic["ssim"], 6)
    assert evaluate(*arguments, "--self-ensemble").status == 0
    assert [tag.self_ensemble for tag in read_score_tags(client.get_model_version(registered, "1").tags)] == [
        False,
        True,
    ]


def test_what_was_scored_is_there_though_the_registry_refuses_the_tag(
    evaluate, registered, mlflow_server, tiny_photos, monkeypatch
):
    client = MlflowClient(mlflow_server.uri, mlflow_server.uri)
    original = evaluation.score_image

    def deleting(*arguments, **options):
        if client.search_model_versions(f"name = '{registered}'"):
            client.delete_model_version(registered, "1")
        return original(*arguments, **options)

    monkeypatch.setattr(evaluation, "score_image", deleting)
    arguments = ("--tracking-uri", mlflow_server.uri, "--sets", tiny_photos, "--json", "scores.json")
    status, out, err = evaluate(f"models:/{registered}/1", *arguments)
    assert status == 2
    assert mlflow_server.uri in err and "version=1" in err.replace(" ", "")
    assert "tiny_photos  x2" in out
    assert Path("scores.json").exists()


@pytest.fixture
def before_image(monkeypatch):
    """`before_image(number, act)`: calls `act` before the image of that number, counted over all sets, is read."""
    acts, count = {}, 0
    original = evaluation.load_pair

    def load_pair(*arguments):
        nonlocal count
        acts.get(count, lambda: None)()
        count += 1
        return original(*arguments)

    monkeypatch.setattr(evaluation, "load_pair", load_pair)
    return acts.__setitem__


@pytest.fixture
def two_sets(tiny_photos, tmp_path):
    shutil.copytree(tiny_photos, tmp_path / "second")
    return f"{tiny_photos},{tmp_path / 'second'}"


def test_finished_sets_keep_their_scores_when_a_later_one_fails(
    evaluate, registered, mlflow_server, two_sets, tmp_path, before_image
):
    before_image(6 + 3, (tmp_path / "second/photo-3.png").unlink)
    files = ("--json", "scores.json", "--csv", "scores.csv", "--html", "report")
    model = f"models:/{registered}/1"
    status, out, err = evaluate(model, "--tracking-uri", mlflow_server.uri, "--sets", two_sets, *files)
    assert status == 2
    assert re.findall("^error: .*", err, re.MULTILINE) and "second/photo-3.png" in err
    with open("scores.json") as file:
        assert [(it["set"], it["model"]) for it in json.load(file)] == [("tiny_photos", model)]
    with open("scores.csv", newline="") as file:
        assert [row["set"] for row in csv.DictReader(file)] == ["tiny_photos"] * 12
    assert re.findall(r"^(\w+)  x2", out, re.MULTILINE) == ["tiny_photos"]
    version = MlflowClient(mlflow_server.uri, mlflow_server.uri).get_model_version(registered, "1")
    assert [tag.set for tag in read_score_tags(version.tags)] == ["tiny_photos"]
    assert [path for path in Path("report").rglob("*") if path.is_file()] == []


def test_each_set_is_out_before_the_next_one_is_scored(evaluate, two_sets, before_image):
    seen = []
    before_image(6, lambda: seen.extend((Path("scores.json").read_text(), Path("scores.csv").read_text())))
    assert evaluate("bicubic", "--sets", two_sets, "--scale", 2, "--json", "scores.json", "--csv", "scores.csv")[0] == 0
    [first] = json.loads(seen[0])
    with open("scores.json") as file:
        both = json.load(file)
    assert (both[0], both[1]["set"]) == (first, "second")
    assert Path("scores.csv").read_text().startswith(seen[1]) and len(seen[1].splitlines()) == 1 + 6


def test_an_output_that_fails_stops_no_other(evaluate, two_sets, before_image):
    def in_the_way():
        Path("out/scores.json").mkdir()
        Path("report/images").write_text("mine")

    Path("out").mkdir()
    Path("report").mkdir()
    before_image(0, in_the_way)
    arguments = ("--sets", two_sets, "--scale", 2, "--json", "out/scores.json", "--csv", "out/scores.csv")
    status, out, err = evaluate("bicubic", *arguments, "--html", "report")
    assert status == 2
    first, second = re.findall("^error: .*", err, re.MULTILINE)
    assert "out/scores.json" in first + second and "report/images" in first + second
    assert re.findall(r"^(\w+)  x2", out, re.MULTILINE) == ["tiny_photos", "second"]
    assert len(Path("out/scores.csv").read_text().splitlines()) == 1 + 2 * 6
    assert [path.name for path in Path("report").iterdir()] == ["images"]


def test_a_file_that_can_be_written_again_is_whole(evaluate, two_sets, before_image):
    before_image(0, Path("scores.json").mkdir)
    before_image(6, Path("scores.json").rmdir)
    status, _, err = evaluate("bicubic", "--sets", two_sets, "--scale", 2, "--json", "scores.json")
    assert status == 0, err
    with open("scores.json") as file:
        assert [it["set"] for it in json.load(file)] == ["tiny_photos", "second"]


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
        (["bicubic", "--sets", "{photos}"], ["bicubic: has no scale of its own", "--scale"]),
        (["bicubic", "--sets", "{photos}", "--scale", "2,x"], ["scale='x'", "--scale"]),
        (["{model}", "--sets", "{photos}", "--scale", "2,3"], ["scale=3: none of the models", "--scale"]),
        (["{model}", "--sets", "{photos}", "--scale", "3,4"], ["{model}: is an x2 model, not x3 or x4", "--scale"]),
        (["{model}", "{model}", "--sets", "{photos}"], ["{model}: is given twice"]),
        (["{model}", "--sets", "{photos}", "--tile-px-lr", "0"], ["tile_px_lr=0", "--tile-px-lr"]),
        (["bicubic", "--sets", "{photos}", "--scale", "36"], ["photo-", "is too small for psnr@y,crop=scale at x36"]),
        (["{model}", "--sets", "{photos}", "--html", "r", "--html-images", "-1"], ["-1 images", "--html-images"]),
        (["--sets", "{photos}", "--scale", "2"], ["no model is given", "MODEL is bicubic"]),
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
    original = evaluation.score_image

    def score_image(*images, name, **protocol):
        names.append(name)
        return original(*images, name=name, **protocol)

    monkeypatch.setattr(evaluation, "score_image", score_image)
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


def with_a_tiny_image(folder):
    Image.new("RGB", (14, 90)).save(folder / "zzz.png")


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
        (with_a_tiny_image, ["zzz.png: 14x90 is too small for psnr@y,crop=scale at x2", "--protocol"]),
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


@pytest.mark.parametrize(
    ("flag", "target"),
    [
        *[(flag, target) for flag in ("--json", "--csv") for target in ("a-file/scores", "a-folder")],
        *[("--html", target) for target in ("a-file/report", "a-page")],
    ],
)
def test_scores_that_could_not_be_written_are_not_made(evaluate, scored, tiny_photos, tmp_path, flag, target):
    (tmp_path / "a-file").write_text("in the way")
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a-page").mkdir()
    (tmp_path / "a-page/index.html").write_text("someone's page")
    status, out, err = evaluate("bicubic", "--sets", tiny_photos, "--scale", "2", flag, tmp_path / target)
    assert (status, out) == (2, "")
    assert str(tmp_path / target.partition("/")[0]) in err
    assert flag in err
    assert scored == []


def test_the_script_runs_on_its_own_and_a_mistake_is_one_line(repo, tmp_path):
    command = [sys.executable, repo / "pipelines/evaluate_model.py", "bicubic", "--sets", ",", "--scale", "2"]
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: ',': names no set; give folders or URIs, separated by commas (--sets)\n"


@pytest.mark.parametrize(("argument", "expected_status"), [("--help", 0), ("--set", 2)])
def test_help_and_typos_do_not_wait_for_pytorch(repo, argument, expected_status):
    code = f"""import sys
from pipelines.evaluate_model import main
try:
    main([{argument!r}])
except SystemExit as exit_:
    print(exit_.code, *sorted(sys.modules))"""
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    status, *modules = done.stdout.splitlines()[-1].split()
    assert int(status) == expected_status
    assert "tyro" in modules and not {"torch", "mlflow", "numpy", "PIL", "jinja2"} & set(modules)


def test_the_default_protocol_is_the_papers():
    """Written out in the script, which would have to import PyTorch for it."""
    assert Options(models=(), sets="").protocol == PAPERS_PROTOCOL
