"""Upscaling a file and folders: what lands in TARGET, what a second run does, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image as PILImage

from pipelines.upscale_images import main
from sr_data.errors import StorageError
from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.upscaling import upscale_file
from sr_models.weights import load_model, save_model
from sr_serve.upscale_plan import Image
from sr_serve.upscale_worker import ImageMaker, Work
from sr_train.model_registry import register_model
from sr_train.tracking import start_run
from tests.support.pipeline import command

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
HERE = ("--num-actors", 0)
"""Without Ray: what is shown does not depend on it."""


@pytest.fixture
def upscale(run_main):
    """The script with these arguments."""
    return partial(run_main, main)


def saved(folder, seed):
    save_model(folder, CONFIG, build_model(CONFIG, seed=seed).state_dict())
    return folder


@pytest.fixture
def model(tmp_path):
    return saved(tmp_path / "model", seed=0)


@pytest.fixture
def photos(tiny_photos):
    """Five photos in two folders, of three formats, a text file, and one that only looks like an image."""
    (tiny_photos / "sub/deep").mkdir(parents=True)
    (tiny_photos / "photo-1.png").rename(tiny_photos / "sub/photo-1.png")
    PILImage.open(tiny_photos / "photo-2.png").convert("L").save(tiny_photos / "sub/deep/grey.jpg")
    PILImage.open(tiny_photos / "photo-3.png").save(tiny_photos / "old.tif")
    for number in (2, 3, 5):
        (tiny_photos / f"photo-{number}.png").unlink()
    (tiny_photos / "notes.txt").write_text("no image")
    (tiny_photos / "bad.png").write_text("no image either")
    return tiny_photos


WANTED = {
    "photo-0.png": "photo-0.png",
    "photo-4.png": "photo-4.png",
    "sub/photo-1.png": "sub/photo-1.png",
    "sub/deep/grey.jpg": "sub/deep/grey.jpg",
    "old.tif": "old.png",
}


def expected(model, photos, key, **options):
    return upscale_file(load_model(model), (photos / key).read_bytes(), name=key, **options)


def work(source, target, **changes):
    values = {"format": None, "max_mpx": 1, "tile_px_lr": 192, "self_ensemble": False, "precision": "float32"}
    return Work(**{"source_uri": str(source), "target_uri": str(target), "witnesses": (), **values, **changes})


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def changed_at(folder):
    return {key: (folder / key).stat().st_mtime_ns for key in files(folder)}


def test_one_image_needs_neither_ray_nor_mlflow(repo, model, photos, tmp_path):
    """Both take longer to import than the image takes."""
    arguments = [str(argument) for argument in (model, photos / "photo-0.png", tmp_path / "out/larger.jpg")]
    code = f"import sys; from pipelines.upscale_images import main; main({arguments}); print(*sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    target, modules = done.stdout.splitlines()
    assert target == str(tmp_path / "out/larger.jpg")
    assert {"torch", "sr_serve.upscale_worker"} <= set(modules.split())
    assert not {"ray", "mlflow", "s3fs", "pandas", "matplotlib"} & set(modules.split())
    assert (tmp_path / "out/larger.jpg").read_bytes() == expected(model, photos, "photo-0.png", format="JPEG")


def test_one_image_into_a_folder_and_what_is_there_stays(upscale, model, photos, tmp_path):
    (tmp_path / "out").mkdir()
    status, out, err = upscale(model, photos / "old.tif", tmp_path / "out", "--self-ensemble", "--tile-px-lr", 50)
    assert (status, err) == (0, "")
    assert out == f"{tmp_path / 'out/old.png'}\n"
    assert files(tmp_path / "out") == {"old.png"}
    first = (tmp_path / "out/old.png").read_bytes()
    assert first == expected(model, photos, "old.tif", self_ensemble=True, tile_px_lr=50)
    status, _, err = upscale(model, photos / "old.tif", tmp_path / "out")
    assert status == 2 and "out/old.png: is there already" in err and "--overwrite" in err
    assert (tmp_path / "out/old.png").read_bytes() == first
    assert upscale(model, photos / "old.tif", tmp_path / "out", "--overwrite")[0] == 0
    assert (tmp_path / "out/old.png").read_bytes() == expected(model, photos, "old.tif")


def test_one_image_that_is_none(upscale, model, photos, tmp_path):
    status, out, _ = upscale(model, photos / "bad.png", tmp_path / "out.png")
    assert status == 1 and "bad.png: is not an image" in out
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("how", [HERE, ("--num-actors", 1, "--cpus-per-actor", 0.5)], ids=["here", "ray"])
def test_a_folder_then_what_was_bad(upscale, model, photos, tmp_path, how, request):
    if how != HERE:
        request.getfixturevalue("small_cluster")
    target = tmp_path / "out"
    status, out, err = upscale(model, photos, target, *how)
    assert status == 1, err
    assert files(target) == set(WANTED.values()) | {"upscale_images.json", "upscale_images_failed.json"}
    for key, made in WANTED.items():
        assert (target / made).read_bytes() == expected(model, photos, key), key
    assert "5 of 6 images" in out and "ignored   1 files" in out and "bad.png: is not an image" in out
    assert "6/6 images" in err and "1 bad" in err
    assert ("1 actor with 0.5 CPUs each" in out) == (how != HERE)
    failed = json.loads((target / "upscale_images_failed.json").read_text())
    assert list(failed) == ["bad.png"] and failed["bad.png"].startswith("bad.png: is not an image")

    before = changed_at(target)
    shutil.copy(photos / "photo-0.png", photos / "bad.png")
    shutil.copy(photos / "photo-4.png", photos / "sub/new.png")
    status, out, err = upscale(model, photos, target, *HERE)
    assert status == 0, err
    after = changed_at(target)
    assert after.keys() == set(WANTED.values()) | {"upscale_images.json", "bad.png", "sub/new.png"}
    assert all(after[key] == before[key] for key in WANTED.values())
    assert (target / "bad.png").read_bytes() == (target / "photo-0.png").read_bytes()
    assert "upscaling 2 images" in out and "finished  5 images" in out and "complete, 7 of 7 images" in out


WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from pipelines.upscale_images import main
import sr_serve.upscale_run

used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 2 * 10**9, resource.RLIM_INFINITY))
main(sys.argv[1:])
"""


def test_an_image_too_large_for_the_memory_is_one_bad_image(repo, photos, tmp_path):
    """PyTorch's CPU allocator raises a plain RuntimeError."""
    config = EDSRConfig(scale=2, num_blocks=1, num_channels=64)  # whose first layer takes 4 GB of the image below
    save_model(tmp_path / "wide", config, build_model(config, seed=0).state_dict())
    PILImage.new("RGB", (4000, 4000)).save(photos / "bad.png")
    arguments = [tmp_path / "wide", photos, tmp_path / "out", *HERE, "--tile-px-lr", 4000]
    done = subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "bad.png: too large for the memory, lower --tile-px-lr" in done.stdout
    assert "5 of 6 images" in done.stdout and "Traceback" not in done.stderr


def test_a_file_that_is_far_too_large_is_not_even_read(upscale, model, photos, tmp_path):
    with (photos / "bad.png").open("wb") as file:
        file.truncate(73_000_000)  # a hole: it takes no room
    status, out, _ = upscale(model, photos, tmp_path / "out", *HERE, "--max-mpx", 1)
    assert status == 1
    assert "bad.png: the file's 73 MB are more than 72 MB" in out and "5 of 6 images" in out
    status, out, _ = upscale(model, photos / "bad.png", tmp_path / "one.png", "--max-mpx", 1)
    assert status == 1 and "73 MB are more than 72 MB" in out


@pytest.mark.parametrize("why", ["resumed", "asked for", "on a cluster"])
def test_the_last_image_is_made_where_the_others_were(upscale, model, tiny_photos, tmp_path, monkeypatch, why, request):
    """An actor of that many CPUs fits nowhere: nothing is made, neither there nor here."""
    request.getfixturevalue("small_cluster")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("sr_serve.upscale_run.FEW_IMAGES", 1)
    target, flags = tmp_path / "out", ["--cpus-per-actor", 999]
    for number in range(2, 6):
        (tiny_photos / f"photo-{number}.png").unlink()
    if why == "resumed":
        assert upscale(model, tiny_photos, target, *HERE)[0] == 0
        (target / "photo-1.png").unlink()
    else:
        (tiny_photos / "photo-0.png").unlink()
    if why == "asked for":
        flags += ["--num-actors", 1]
    if why == "on a cluster":
        monkeypatch.setenv("RAY_ADDRESS", "the-one-that-runs")
    status, _, err = upscale(model, tiny_photos, target, *flags)
    assert status == 2 and "fits on none of the cluster's nodes" in err
    assert not (target / "photo-1.png").exists()
    if why == "asked for":  # by nobody: not worth a cluster
        assert upscale(model, tiny_photos, target, *flags[:2])[0] == 0
        assert (target / "photo-1.png").exists()


def test_a_third_run_has_nothing_to_do_and_does_nothing(upscale, model, photos, tmp_path):
    target = tmp_path / "out"
    (photos / "bad.png").unlink()
    assert upscale(model, photos, target, *HERE)[0] == 0
    before = changed_at(target)
    status, out, err = upscale(model, photos, target)  # no flag: not even Ray is started
    assert (status, err) == (0, "")
    assert "complete, 5 of 5 images" in out
    assert changed_at(target) == before


def test_models_are_not_mixed(upscale, model, photos, tmp_path):
    target, other = tmp_path / "out", saved(tmp_path / "other", seed=1)
    (photos / "bad.png").unlink()
    assert upscale(model, photos, target, *HERE)[0] == 0
    before = changed_at(target)
    for arguments in ([other], [model, "--precision", "bfloat16"]):
        status, _, err = upscale(arguments[0], photos, target, *HERE, *arguments[1:])
        assert status == 2 and "were made with" in err and "--overwrite" in err and "Traceback" not in err
    assert changed_at(target) == before
    # The same weights elsewhere are the same model.
    assert upscale(shutil.copytree(model, tmp_path / "moved"), photos, target, *HERE)[0] == 0
    assert changed_at(target) == before
    status, out, err = upscale(other, photos, target, *HERE, "--overwrite", "--format", "webp")
    assert status == 0, err
    assert "deleted   5 images" in out
    webp = {key: os.path.splitext(key)[0] + ".webp" for key in WANTED}
    assert files(target) == set(webp.values()) | {"upscale_images.json"}
    for key, made in webp.items():
        assert (target / made).read_bytes() == expected(other, photos, key, format="WEBP")


def test_an_image_whose_source_has_changed_is_made_anew(upscale, model, photos, tmp_path):
    target = tmp_path / "out"
    (photos / "bad.png").unlink()
    assert upscale(model, photos, target, *HERE)[0] == 0
    before = changed_at(target)
    shutil.copy(photos / "photo-4.png", photos / "photo-0.png")
    status, out, err = upscale(model, photos, target, *HERE)
    assert status == 0, err
    assert "deleted   1 images whose source has changed" in out
    assert (target / "photo-0.png").read_bytes() == expected(model, photos, "photo-4.png")
    after = changed_at(target)
    assert {key for key in WANTED.values() if after[key] != before[key]} == {"photo-0.png"}


def test_a_dry_run_says_all_and_writes_nothing(upscale, model, photos, tmp_path):
    status, out, _ = upscale(model, photos, tmp_path / "out", "--dry-run")
    assert status == 0
    assert f"would upscale 6 images x2: {photos} → {tmp_path / 'out'}" in out and "ignored   1 files" in out
    assert upscale(model, photos / "old.tif", tmp_path / "out/", "--dry-run")[0] == 0
    assert not (tmp_path / "out").exists()


def test_the_record_names_the_version_that_an_alias_stood_for(upscale, model, photos, tmp_path, mlflow_server):
    name = "upscale-images"
    run = start_run(tracking_uri=mlflow_server.uri, experiment=name, run_name="run", params={}, tags={}, texts={})
    sample = np.zeros((8, 8, 3), np.uint8)
    version = register_model(run, model, name=name, tags={}, sample_lr_HWC=sample, alias="champion")
    (photos / "bad.png").unlink()
    where = ("--tracking-uri", mlflow_server.uri)
    status, out, err = upscale(f"models:/{name}@champion", photos, tmp_path / "out", *HERE, *where)
    assert status == 0, err
    assert f"{version.uri} (" in out
    assert json.loads((tmp_path / "out/upscale_images.json").read_text())["model"] == version.uri
    assert (tmp_path / "out/photo-0.png").read_bytes() == expected(model, photos, "photo-0.png")


@pytest.mark.parametrize("how", [(), ("--num-actors", 2)], ids=["here", "ray"])
def test_a_target_that_refuses_ends_it(upscale, model, photos, tmp_path, how, request):
    """A folder that has to be made, and a file in its place."""
    if how:
        request.getfixturevalue("small_cluster")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").write_text("in the way")
    status, _, err = upscale(model, photos, tmp_path / "out", *how)
    assert status == 2
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'out/sub'}")
    assert "a part of this path is a file" in err and "Traceback" not in err
    assert not [key for key in files(tmp_path / "out") if "partial" in key]


def test_a_node_that_does_not_see_target_writes_nothing_there(small_cluster, model, photos, tmp_path):
    """Else each node would fill a folder of its own."""
    from sr_serve.actor_pool import ActorPool
    from sr_serve.ray_upscale import make_on_cluster

    target = tmp_path / "on-the-drivers-disk"
    image = Image(key="photo-0.png", target_key="photo-0.png", num_bytes=None)
    pool = ActorPool(num_actors=1, device="cpu", cpus=1, gpus=0)
    with pytest.raises(StorageError, match=rf"^{target}: node .* does not see what the driver has written"):
        make_on_cluster(
            load_model(model), [image], work(photos, target), pool, lambda *result: pytest.fail(f"{result}")
        )
    assert not target.exists()


def test_from_s3_to_s3_and_wrong_credentials(upscale, model, photos, s3, monkeypatch):
    bucket = s3.new_bucket()
    source, target = open_store(f"{bucket}/photos"), open_store(f"{bucket}/out")
    for key in WANTED:
        source.write(key, (photos / key).read_bytes())
    status, _, err = upscale(model, source.uri, target.uri, *HERE)
    assert status == 0, err
    assert {entry.key for entry in target.list()} == set(WANTED.values()) | {"upscale_images.json"}
    assert target.read("old.png") == expected(model, photos, "old.tif")
    status, _, err = upscale(model, f"{source.uri}/old.tif", f"{target.uri}/one/")
    assert status == 0, err
    assert target.read("one/old.png") == target.read("old.png")
    assert upscale(model, source.uri, bucket)[0] == 2  # around SOURCE
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    status, _, err = upscale(model, source.uri, f"{bucket}/again", *HERE)
    assert status == 2 and err.startswith("error: s3://") and "AWS_SECRET_ACCESS_KEY" in err


def test_an_object_that_the_server_refuses_is_one_bad_image(upscale, model, photos, s3):
    """In an archive, it is listed and answered with 403."""
    bucket = s3.new_bucket()
    source, target = open_store(f"{bucket}/photos"), open_store(f"{bucket}/out")
    for key in WANTED:
        source.write(key, (photos / key).read_bytes())
    in_archive = {"Bucket": bucket.removeprefix("s3://"), "Key": "photos/photo-4.png", "StorageClass": "GLACIER"}
    s3.client().put_object(**in_archive, Body=(photos / "photo-4.png").read_bytes())
    for finished in (0, 4):  # the second run has no other image to make
        status, out, err = upscale(model, source.uri, target.uri, *HERE)
        assert status == 1, err
        assert f"upscaling {5 - finished} images" in out and "4 of 5 images" in out
        failed = json.loads(target.read_text("upscale_images_failed.json"))
        assert list(failed) == ["photo-4.png"] and "InvalidObjectState" in failed["photo-4.png"]
    source.write("photo-4.png", (photos / "photo-4.png").read_bytes())
    status, _, err = upscale(model, source.uri, target.uri, *HERE)
    assert status == 0, err


def test_a_server_that_refuses_everything_is_no_bad_image(model, photos, s3, monkeypatch):
    """As when credentials end while images are made."""
    source = open_store(f"{s3.new_bucket()}/photos")
    for key in ("photo-0.png", "photo-4.png"):
        source.write(key, (photos / key).read_bytes())
    maker = ImageMaker(load_model(model), work(source.uri, f"{source.uri}-x2", witnesses=("photo-4.png",)))
    image = Image(key="photo-0.png", target_key="photo-0.png", num_bytes=None)
    assert maker.make(image) is None
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=f"^{source.uri}/photo-0.png: the server refuses"):
        maker.make(image)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["nope", "{photos}", "out"], ["nope: is no saved model"]),
        (["bicubic", "{photos}", "out"], ["'bicubic': is no network"]),
        (["models:/no-such-model/1", "{photos}", "out", "--tracking-uri", "sqlite:///x.db"], ["no-such-model"]),
        (["{model}", "nowhere", "out"], ["nowhere: there is no such file", "SOURCE"]),
        (["{model}", "{photos}", "{photos}/out"], ["TARGET must not be SOURCE"]),
        (["{model}", "{link}", "{photos}"], ["TARGET must not be SOURCE"]),
        (["{model}", "{photos}", "{file}"], ["a-file: is a file, and SOURCE is a folder (TARGET)"]),
        (["{model}", "{photos}", "builtin://photos"], ["builtin://photos", "never written to"]),
        (["{model}", "{photos}", "builtin://photos", "--dry-run"], ["builtin://photos", "never written to"]),
        (["{model}", "{photos}/bad.png", "{file}/x.png"], ["a-file: a part of this path is a file"]),
        (["{model}", "{photos}/old.tif", "{file}/x.png", "--dry-run"], ["a-file: a part of this path is a file"]),
        (["{model}", "{photos}", "out", "--dry-run", "--num-actors", "0", "--device", "cuda:99"], ["cuda:99"]),
        (
            ["{model}", "{photos}", "out", "--dry-run", "--num-actors", "1", "--device", "cuda:1"],
            ["--device cuda:1: Ray says"],
        ),
        (["{model}", "{photos}/old.tif", "out.tif"], ["out.tif: its suffix", "TARGET"]),
        (["{model}", "{photos}/photo-0.png", "{link}/photo-0.png"], ["TARGET is SOURCE"]),
        (["{model}", "{photos}", "out", "--num-actors", "0", "--device", "tpu"], ["tpu", "--device"]),
        (["{model}", "{photos}", "out", "--num-actors", "0", "--device", "cuda:99"], ["cuda:99", "--device"]),
        (["{model}", "{photos}", "out", "--tile-px-lr", "0"], ["--tile-px-lr 0", "at least 1"]),
        (["{model}", "{photos}", "out", "--gpus-per-actor", "1.5"], ["--gpus-per-actor 1.5"]),
        (["{model}", "{photos}", "out", "--format", "gif"], ["gif"]),
        (["{model}", "{photos}"], ["TARGET"]),
    ],
)
def test_mistakes_are_named_before_anything_is_written(upscale, model, photos, tmp_path, arguments, messages):
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "a-file").write_text("no folder")
    places = {"model": model, "photos": photos, "link": tmp_path / "link", "file": tmp_path / "a-file"}
    before = files(tmp_path)
    status, _, err = upscale(*(argument.format(**places) for argument in arguments))
    assert status == 2
    assert all(message in err for message in messages) and "Traceback" not in err, err
    assert files(tmp_path) - before <= {"x.db"}


def test_it_runs_on_its_own(photos, model, tmp_path):
    done = subprocess.run(
        command("upscale_images.py", model, photos, tmp_path / "out", *HERE), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "5 of 6 images" in done.stdout
