"""SRGAN as a user trains it: both phases on BSDS500 from S3, the driver killed in the GAN and the run resumed, both
models registered, the second one pulled from MLflow to upscale Set5.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from PIL import Image

from sr_data.resize import upscale_bicubic
from sr_data.storage import Store, open_store
from sr_models.srresnet import SRResNetConfig
from sr_train.adversarial_config import AdversarialConfig
from sr_train.checkpoint import key_of_step, latest_key, read_checkpoint, step_of_key
from sr_train.cli import parse_train
from sr_train.pictures import FONT_PX, GAP_PX, MARGIN_PX, most_detailed
from sr_train.srgan_presets import SRGAN_PRESETS
from tests.support.mlflow_server import MlflowServer
from tests.support.pipeline import REPO, without_controller
from tests.support.ray_head import Job, JobOutcome, RayHead
from tests.support.s3 import S3Server, missing_ceph_programs

pytestmark = pytest.mark.e2e

EXPERIMENT = "srgan"
BATCH, STEPS, INTERVAL_STEPS, KILL_AT_STEP = 16, 60, 6, 18
# Twice the batch: it validates every third step and after its last, the 17th, so at KILL_AT_STEP only the GAN does.
FIRST_BATCH, FIRST_STEPS = 32, 17
WHAT = [
    *("--model.scale", 2, "--model.num-blocks", 2, "--model.num-channels", 8, "--data.patch-px-hr", 32),
    *("--pretrain.optim.global-batch-size", FIRST_BATCH, "--pretrain.optim.total-patches", FIRST_BATCH * FIRST_STEPS),
    *("--pretrain.schedule.warmup-patches", FIRST_BATCH, "--pretrain.optim.ema-decay", "None"),
    *("--optim.global-batch-size", BATCH, "--optim.total-patches", BATCH * STEPS),
    *("--validation.interval-patches", BATCH * INTERVAL_STEPS, "--checkpoint.interval-patches", BATCH * INTERVAL_STEPS),
    *("--discriminator.num-channels", 4, "--perceptual.layer", "conv1_2"),
    *("--validation.best-by", "newest", "--run.threads-per-worker", 1, "--run.num-workers", 1),
]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the runs of this module read, write, train and are recorded."""

    s3: S3Server
    bucket: str
    ray: RayHead
    mlflow: MlflowServer

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.mlflow.uri, self.mlflow.uri)

    def start(self, name: str, *flags: object) -> Job:
        """Submits a run of this name."""
        where = ["--data.uri", f"{self.bucket}/bsds500", "--validation.uri", f"{self.bucket}/set5"]
        where += ["--perceptual.weights", f"{self.bucket}/weights/vgg19.safetensors"]
        where += ["--perceptual.lpips-weights", f"{self.bucket}/weights/alexnet.safetensors"]
        where += ["--tracking.uri", self.mlflow.uri, "--tracking.experiment", EXPERIMENT]
        given = [*WHAT, *where]
        for flag in flags:
            if flag in given:  # the one given last is meant, but tyro takes a flag once
                del given[given.index(flag) : given.index(flag) + 2]
        return self._submit(*given, "--run.name", name, *flags)

    def resume(self, name: str) -> Job:
        """As the hint says: by its name, and where it is."""
        return self._submit("--resume", "--run.name", name)

    def _submit(self, *flags: object) -> Job:
        storage = ["--run.storage", f"{self.bucket}/runs"]
        entrypoint = " ".join([sys.executable, "pipelines/train_srgan.py", *map(str, [*flags, *storage])])
        return self.ray.start_job(entrypoint, working_dir=REPO, env=self.s3.env)

    def checkpoints(self, name: str) -> Store:
        return open_store(f"{self.bucket}/runs/{name}/checkpoints")

    def final_tensors(self, name: str) -> Mapping[str, torch.Tensor]:
        """Everything of the checkpoint after the last step, as GROUP/NAME."""
        saved = read_checkpoint(self.checkpoints(name), key_of_step(STEPS))
        return {f"{group}/{key}": value for group, tensors in saved.tensors.items() for key, value in tensors.items()}

    def run_named(self, name: str) -> Run:
        """The MLflow run of this name; there is one, however often it was started."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        [run] = self.client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        return run


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Both phases, finished although the driver was killed."""

    place: Place
    killed: JobOutcome
    left_by_the_killed: str | None
    """The newest checkpoint of the GAN then."""
    resumed: JobOutcome
    srresnet: ModelVersion
    srgan: ModelVersion


@pytest.fixture(scope="module")
def place(
    request: pytest.FixtureRequest,
    ray_head: RayHead,
    mlflow_server: MlflowServer,
    shared_data: Path,
    vgg19_file: Path,
    alexnet_file: Path,
) -> Place:
    """BSDS500's training photos, Set5 and perceptual weights in a bucket; on Ceph RGW where it can be had."""
    ceph = not missing_ceph_programs() or os.environ.get("SR_EXPECT_RGW") == "1"
    server: S3Server = request.getfixturevalue("rgw_server" if ceph else "moto_server")
    bucket, client = server.new_bucket(), server.client()
    files = {f"bsds500/images/train/{path.name}": path for path in (shared_data / "BSDS500" / "train").glob("*.jpg")}
    assert len(files) == 200
    set5 = shared_data / "Set5"
    files |= {f"set5/{path.relative_to(set5)}": path for path in set5.rglob("*.png")}
    files |= {f"weights/{path.name}": path for path in (vgg19_file, alexnet_file)}
    for key, path in files.items():
        client.upload_file(str(path), bucket.removeprefix("s3://"), key)
    return Place(s3=server, bucket=bucket, ray=ray_head, mlflow=mlflow_server)


@pytest.fixture(autouse=True)
def credentials(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """For this process too."""
    for name, value in place.s3.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def trained(place: Place) -> Trained:
    job = place.start("mine")
    job.wait_until_said(f"step {KILL_AT_STEP}: PSNR")
    os.kill(job.driver_pid(), signal.SIGKILL)
    killed = job.wait()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.s3.env.items():
            patch.setenv(name, value)
        left = latest_key(place.checkpoints("mine"))
    resumed = place.resume("mine").wait()
    assert resumed.exit_code == 0, resumed.logs
    return Trained(
        place=place,
        killed=killed,
        left_by_the_killed=left,
        resumed=resumed,
        srresnet=place.client.get_model_version_by_alias("srresnet-x2", "challenger"),
        srgan=place.client.get_model_version_by_alias("srgan-x2", "challenger"),
    )


def test_it_was_killed_in_the_gan_and_went_on_from_its_checkpoint(trained: Trained) -> None:
    killed, resumed = trained.killed, trained.resumed
    assert killed.exit_code == 128 + signal.SIGKILL
    assert "phase 1 of 2" in killed.logs and "phase 2 of 2" in killed.logs
    assert trained.left_by_the_killed is not None
    assert KILL_AT_STEP - INTERVAL_STEPS <= (step_of_key(trained.left_by_the_killed) or 0) < STEPS
    going_on = re.search(r"going on from step (\d+)", resumed.logs)
    assert going_on and int(going_on[1]) == step_of_key(trained.left_by_the_killed), resumed.logs
    assert "phase 1 of 2" not in resumed.logs and "Traceback" not in without_controller(resumed.logs)


def test_both_models_are_registered_with_their_facts(trained: Trained) -> None:
    first, second = trained.srresnet.tags, trained.srgan.tags
    assert first["checkpoint"].startswith(f"{trained.place.bucket}/runs/mine-pretrain/checkpoints/")
    assert second["checkpoint"] == f"{trained.place.bucket}/runs/mine/checkpoints/{key_of_step(STEPS)}"
    assert first["dataset_fingerprint"] == second["dataset_fingerprint"]
    assert (second["scale"], second["step"], second["protocol"]) == ("2", str(STEPS), "psnr@y,crop=scale")
    # As published for Set5, x2 (33.66 dB).
    assert float(second["bicubic_psnr_db"]) == pytest.approx(33.66, abs=0.02)
    assert first["weights_sha256"] != second["weights_sha256"]
    assert float(second["lpips"]) > 0 and second["lpips_protocol"].startswith("lpips@alex,v0.1,weights=")


def test_tags_of_run_and_version_name_the_features(trained: Trained, vgg19_file: Path) -> None:
    digest = hashlib.sha256(vgg19_file.read_bytes()).hexdigest()[:8]
    expected = f"VGG19 conv1_2, file vgg19.safetensors (sha256 {digest}…, compared with nothing)"
    assert trained.place.run_named("mine").data.tags["perceptual_features"] == expected
    assert trained.srgan.tags["perceptual_features"] == expected
    assert "not_promotable" not in trained.srgan.tags


def test_curves_tell_of_quality_and_of_how_the_networks_stand_to_each_other(trained: Trained) -> None:
    client, run = trained.place.client, trained.place.run_named("mine")
    assert run.info.status == "FINISHED"
    curves = {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    assert all(np.isfinite(value) for points in curves.values() for value in points.values())
    for name in ("psnr_db", "ssim", "lpips"):
        assert sorted(curves[f"validation/{name}"]) == list(range(0, STEPS + 1, INTERVAL_STEPS)), name
    of_terms = [
        f"{term}_{value}" for term in ("pixel", "perceptual", "adversarial") for value in ("loss", "gradient_norm")
    ]
    watched = ["discriminator_accuracy_real", "discriminator_accuracy_fake", "colour_shift"]
    watched += ["learning_rate_factor", "discriminator_paused", "discriminator_loss", "discriminator_grad_norm"]
    for name in (*of_terms, *watched):
        assert max(curves[name]) == STEPS and len(curves[name]) > INTERVAL_STEPS, name
    assert set(curves["learning_rate_factor"].values()) == {1.0} and "recoveries" not in curves


def test_the_registered_model_upscales_set5(
    trained: Trained, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscaled = upscale_set5(trained, "srgan-x2", shared_data, monkeypatch)
    assert sorted(upscaled) == ["baby", "bird", "butterfly", "head", "woman"]
    for name, sr_HWC in upscaled.items():
        hr_HWC = np.asarray(Image.open(shared_data / "Set5" / "HR" / f"{name}.png").convert("RGB"))
        assert sr_HWC.shape == hr_HWC.shape and sr_HWC.dtype == np.uint8
        correlation = np.corrcoef(sr_HWC.ravel(), hr_HWC.ravel())[0, 1]
        assert correlation > 0.8, name  # it is that picture, if not yet a good one


def test_pictures_show_lr_bicubic_srresnet_srgan_and_hr_with_a_detail(
    trained: Trained, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, run_id = trained.place, trained.srgan.run_id
    # A picture that was being drawn when its process was killed is lost; the checkpoint beside it is not.
    lost = step_of_key(trained.left_by_the_killed or "")
    steps = [step for step in range(0, STEPS + 1, INTERVAL_STEPS) if step != lost]
    folders = [f"samples/step-{step:09d}" for step in steps]
    shown = {item.path for item in place.client.list_artifacts(run_id, "samples") if item.is_dir}
    assert set(folders) <= shown
    srgan = upscale_set5(trained, "srgan-x2", shared_data, monkeypatch)
    srresnet = upscale_set5(trained, "srresnet-x2", shared_data, monkeypatch)
    for name in ("baby", "bird"):
        assert all(f"{folder}/{name}.png" in {item.path for item in place.client.list_artifacts(run_id, folder)}
                   for folder in folders)  # fmt: skip
        path = place.client.download_artifacts(run_id, f"{folders[-1]}/{name}.png", str(tmp_path))
        picture_HWC = np.asarray(Image.open(path)).astype(int)
        hr_HWC = np.asarray(Image.open(shared_data / "Set5" / "HR" / f"{name}.png").convert("RGB"))
        lr_HWC = set5_lr(shared_data, name)
        enlarged_HWC = lr_HWC.repeat(2, axis=0).repeat(2, axis=1)
        expected = [enlarged_HWC, upscale_bicubic(lr_HWC, 2), srresnet[name], srgan[name], hr_HWC]
        height, width = hr_HWC.shape[:2]
        top, lefts = MARGIN_PX + FONT_PX + 4, [MARGIN_PX + column * (width + GAP_PX) for column in range(5)]
        assert picture_HWC.shape[1] == lefts[-1] + width + MARGIN_PX
        side = min(height, width) // 4
        detail_top, detail_left = most_detailed(hr_HWC, side, stride_px=2)
        for left, image_HWC in zip(lefts, expected, strict=True):
            panel_HWC = picture_HWC[top : top + height, left : left + width]
            # The detail is framed in HR. A thread more or less rounds some pixels otherwise.
            differs = np.abs(panel_HWC - image_HWC).max(axis=2) > 1
            differs[detail_top : detail_top + side, detail_left : detail_left + side] = False
            assert not differs.any()
            zoom = width // side
            below_HWC = picture_HWC[top + height + GAP_PX :, left:][: side * zoom : zoom, : side * zoom : zoom]
            detail_HWC = image_HWC[detail_top : detail_top + side, detail_left : detail_left + side]
            assert np.abs(below_HWC - detail_HWC).max() <= 1


def test_killed_and_resumed_it_is_bit_for_bit_a_run_that_was_never_stopped(trained: Trained) -> None:
    """The same GAN, in one go and by --init from the first phase's best checkpoint."""
    place = trained.place
    straight = place.start("straight", "--init", trained.srresnet.tags["checkpoint"],
                           "--tracking.register-as", "srgan-x2-straight").wait()  # fmt: skip
    assert straight.exit_code == 0, straight.logs
    assert "going on from" not in straight.logs
    expected, got = place.final_tensors("straight"), place.final_tensors("mine")
    groups = {name.partition("/")[0] for name in expected}
    assert groups == {"model", "ema", "optimizer", "discriminator", "discriminator_optimizer", "control"}
    assert expected.keys() == got.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, got[name])] == []
    # And it moved: the generator and the averages of both optimisers.
    began = read_checkpoint(open_store(trained.srresnet.tags["checkpoint"].rpartition("/")[0]),
                            trained.srresnet.tags["checkpoint"].rpartition("/")[2])  # fmt: skip
    weights = [name for name in began.tensors["model"] if name.endswith("weight")]
    assert all(not torch.equal(began.tensors["model"][name], got[f"model/{name}"]) for name in weights)


def test_random_features_give_a_model_that_is_tagged_and_has_no_alias(trained: Trained) -> None:
    place, name = trained.place, "srgan-x2-random"
    done = place.start("random", "--init", "models:/srresnet-x2@challenger", "--perceptual.weights", "random",
                       "--optim.total-patches", 2 * BATCH, "--tracking.register-as", name).wait()  # fmt: skip
    assert done.exit_code == 0, done.logs
    assert place.run_named("random").data.tags["perceptual_features"] == "VGG19 conv1_2, random (seed 0)"
    [version] = place.client.search_model_versions(f"name = '{name}'")
    assert "--perceptual.weights random" in version.tags["not_promotable"]
    assert dict(place.client.get_registered_model(name).aliases) == {}
    assert f"models:/{name}/1, without an alias: trained on random perceptual features" in done.logs


def test_a_first_phase_that_fails_says_how_to_go_on_with_the_whole(place: Place) -> None:
    """A learning rate that no float survives."""
    failed = place.start("hopeless", "--phase", "pretrain", "--pretrain.schedule.learning-rate", 1e30).wait()
    assert failed.exit_code == 2 and "Traceback" not in without_controller(failed.logs), failed.logs
    hint = f"--resume --run.name hopeless --run.storage {place.bucket}/runs"
    assert hint in failed.logs
    again = parse_train(
        hint.split(),
        config_type=AdversarialConfig[SRResNetConfig],
        presets=SRGAN_PRESETS,
        default_preset="srgan-small-x4",
        prog="test",
        description="",
    )
    # What was asked for, not a preset's.
    assert (again.config.phase, again.config.pretrain.schedule.learning_rate) == ("pretrain", 1e30)
    assert again.config.pretrain.optim.total_steps == FIRST_STEPS
    assert (again.config.model.num_blocks, again.config.discriminator.num_channels) == (2, 4)


def upscale_set5(
    trained: Trained, name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, np.ndarray]:
    """Set5's LR images by the model as anyone gets it from the registry."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", trained.place.mlflow.uri)
    model = mlflow.pyfunc.load_model(f"models:/{name}@challenger")
    names = [path.stem for path in (shared_data / "Set5" / "HR").glob("*.png")]
    return {name: np.asarray(model.predict(set5_lr(shared_data, name)[None]))[0] for name in names}


def set5_lr(shared_data: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(shared_data / "Set5" / "LR_bicubic" / "X2" / f"{name}x2.png").convert("RGB"))
