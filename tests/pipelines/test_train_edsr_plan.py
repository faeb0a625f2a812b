"""train_edsr.py --plan: what it shows, what it leaves behind (nothing), and what stands against a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_models.architectures import config_to_dict as model_config_to_dict
from sr_models.edsr import EDSRConfig
from sr_models.weights import save_model
from sr_train import checkpoint as ckpt
from sr_train.cli import parse_train
from sr_train.config import TrainConfig, config_to_dict
from sr_train.loop import Position
from sr_train.placement import ClusterFacts
from sr_train.plan import make_plan
from sr_train.presets import EDSR_PRESETS
from sr_train.run_folder import CONFIG_KEY, DATASETS_KEY, checkpoint_store
from tests.support.s3 import S3Server

RunMain = Callable[..., tuple[int, str, str]]

SMALL = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
CHECKPOINT = ckpt.key_of_step(7)


def rows(outcome: tuple[int, str, str]) -> dict[str, list[str]]:
    """A plan that was accepted, as name → texts."""
    status, out, err = outcome
    assert (status, err) == (0, "")
    found: dict[str, list[str]] = {}
    for line in out.splitlines():
        name, text = line.split("  ", 1)
        found.setdefault(name, []).append(text.strip())
    return found


def is_refused(outcome: tuple[int, str, str], *parts: object) -> None:
    status, out, err = outcome
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ") and "Traceback" not in err
    assert [part for part in parts if str(part) not in err] == [], err


@pytest.fixture
def begun_run(tiny_photos: Path) -> Path:
    """A run named `begun` in runs/, as one leaves it that was ended after its checkpoint of step 7."""
    arguments = ["--run.name", "begun", "--data.uri", str(tiny_photos), "--data.patch-px-hr", "48"]
    arguments += ["--model.num-blocks", "1", "--model.num-channels", "4", "--optim.total-patches", "320"]
    arguments += ["--schedule.warmup-patches", "32", "--tracking.uri", "sqlite:///mlflow.db"]
    command = parse_train(
        arguments,
        config_type=TrainConfig[EDSRConfig],
        presets=EDSR_PRESETS,
        default_preset="edsr-small-x2",
        prog="test",
        description="",
    )
    begun = make_plan(command.config, ClusterFacts(cpus_per_node=(2,), gpus_per_node=(0,)), resume=False)
    store = open_store(begun.run_uri)
    store.write(CONFIG_KEY, json.dumps(config_to_dict(begun.config)).encode())
    fingerprints = {"train": begun.train.fingerprint, "validation": begun.validation.fingerprint}
    store.write(DATASETS_KEY, json.dumps(fingerprints).encode())
    meta = {"step": 7, "architecture": "edsr", "model_config": model_config_to_dict(SMALL)}
    checkpoint = ckpt.Checkpoint(tensors={"model": build_model(SMALL, seed=1).state_dict()}, meta=meta)
    ckpt.write_checkpoint(checkpoint_store(begun.run_uri), checkpoint)
    return Path(begun.run_uri)


@pytest.fixture
def saved_model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", SMALL, build_model(SMALL, seed=0).state_dict())
    return tmp_path / "model"


def test_the_default_run_shows_all_that_it_will_do_and_leaves_nothing(
    train: RunMain, small_cluster: None, tmp_path: Path
) -> None:
    shown = rows(train("--plan"))
    assert shown["model"] == ["edsr x2, 69,027 parameters"]
    assert shown["training set"][0].startswith("builtin://photos [train], folder layout: 4 images, 1.05 Mpx")
    assert shown["validation set"][0].startswith("builtin://photos [valid], folder layout: 1 image")
    assert shown["budget"] == ["9,600 patches = 600 steps of 16"]
    assert shown["workers"] == ["1 on cpu, each with 1 CPU and 2 threads"]
    assert shown["tracking"] == [f"sqlite:///{tmp_path}/mlflow.db, experiment 'super-resolution'"]
    assert shown["registers"] == ["edsr-x2@challenger"]
    assert "WARNING" not in shown
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == []
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".manifests"]


@pytest.mark.parametrize("preset", [name for name in EDSR_PRESETS if name != "edsr-small-x2"])
def test_every_preset_can_be_planned(plan: RunMain, preset: str) -> None:
    scale = int(preset[-1])
    shown = rows(plan("--preset", preset, "--data.patch-px-hr", 12 * scale))
    assert shown["budget"] == ["4,800,000 patches = 300,000 steps of 16"]


def test_on_s3(plan: RunMain, s3: S3Server, tiny_photos: Path) -> None:
    bucket = s3.new_bucket()
    photos = open_store(f"{bucket}/photos")
    for path in tiny_photos.iterdir():
        photos.write(path.name, path.read_bytes())
    shown = rows(plan("--data.uri", photos.uri, "--run.storage", f"{bucket}/runs", "--run.name", "mine"))
    assert shown["run"] == [f"mine in {bucket}/runs/mine"]
    assert {entry.key.split("/")[0] for entry in open_store(f"{bucket}/runs").list()} == {".manifests"}
    assert not Path("runs").exists()


# Resources


def test_more_workers_than_cpus_are_warned_of(plan: RunMain) -> None:
    shown = rows(plan("--run.num-workers", 4))
    assert shown["workers"] == ["4 on cpu, each with 0.37 CPUs and 1 thread"]
    [warning, _] = shown["WARNING"]
    assert warning.startswith("4 workers share 2 CPUs") and "--run.num-workers" in warning


def test_more_workers_than_the_cluster_holds(plan: RunMain) -> None:
    outcome = plan("--run.num-workers", 4, "--run.cpus-per-worker", 1)
    is_refused(outcome, "4 workers need more with 1 CPUs each", "--run.num-workers", "--run.cpus-per-worker")


def test_gpus_that_are_not_there(plan: RunMain) -> None:
    outcome = plan("--run.device", "cuda")
    is_refused(outcome, "1 worker needs a GPU each and the cluster has 0", "--run.device cpu", "--run.num-workers")


def test_a_rolling_window(plan: RunMain) -> None:
    shown = rows(plan("--data.window-images", 3, "--data.window-reuse-patches", 64))
    assert shown["feed"] == ["3 of 6 images at once, one replaced every 64 patches"]
    # 3 slots and 3 places for images to come, as large as the largest image; HR and a quarter of it for LR
    assert shown["memory"][0].startswith(f"{6 * 120 * 96 * 3 * 1.25 / 1024:.3g} KiB of training images")


def test_a_pool_that_holds_no_image(plan: RunMain) -> None:
    is_refused(plan("--data.pool-gib", 1e-6), "--data.pool-gib=1e-06", "GiB per worker", "--tile-px")


def test_the_price(plan: RunMain) -> None:
    assert rows(plan("--run.cost-per-hour", 36, "--optim.total-patches", 1_000_000))["cost"] == [
        "10.00 at 1,000 patches/s (0.28 h at 36)"
    ]


# Data


def test_validation_images_that_are_trained_on_are_warned_of(plan: RunMain, tiny_photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tiny_photos / "photo-0.png", other / "renamed.png")
    shown = rows(plan("--validation.uri", other))
    assert shown["WARNING"] == [
        "1 of 1 validation images are training images too: scores will flatter (--validation.uri, --validation.split)"
    ]


def test_only_so_many_validation_images(plan: RunMain) -> None:
    assert " 2 images" in rows(plan("--validation.num-images", 2))["validation set"][0]


# Names and resuming


def test_a_name_that_is_taken(plan: RunMain, begun_run: Path) -> None:
    is_refused(plan("--run.name", "begun"), "'begun' exists", str(begun_run), CHECKPOINT, "--resume", "--run.name")


def test_resuming_takes_the_config_the_run_was_begun_with(train: RunMain, small_cluster: None, begun_run: Path) -> None:
    """So a budget that is too short for the preset's warm-up, but not for the run's own, is fine."""
    before = sorted(begun_run.rglob("*"))
    shown = rows(train("--plan", "--resume", "--run.name", "begun", "--optim.total-patches", 640))
    assert shown["run"] == [f"begun in {begun_run}, goes on from {CHECKPOINT}"]
    assert shown["budget"] == ["640 patches = 40 steps of 16"]
    assert sorted(begun_run.rglob("*")) == before


def test_resuming_can_not_change_what_was_trained(train: RunMain, small_cluster: None, begun_run: Path) -> None:
    outcome = train("--plan", "--resume", "--run.name=begun", "--model.num-blocks", 3, "--optim.seed", 1)
    is_refused(outcome, "--model.num-blocks 3 (was 1)", "--optim.seed 1 (was 0)", "another --run.name")


def test_resuming_needs_a_name(train: RunMain) -> None:
    is_refused(train("--plan", "--resume"), "--resume needs --run.name", "--run.storage")


def test_resuming_what_is_not_there_begins_and_says_so(plan: RunMain, begun_run: Path) -> None:
    warnings = rows(plan("--resume", "--run.name", "bgeun"))["WARNING"]
    assert warnings[0] == f"there is no run 'bgeun' to resume in {begun_run.parent}: this one begins at step 0"


def test_resuming_on_other_images(
    train: RunMain, small_cluster: None, begun_run: Path, tiny_photos: Path, tmp_path: Path
) -> None:
    moved = tiny_photos.rename(tmp_path / "moved")
    shown = rows(train("--plan", "--resume", "--run.name", "begun", "--data.uri", moved))
    assert shown["run"][0].endswith(CHECKPOINT)
    (moved / "photo-5.png").unlink()
    outcome = train("--plan", "--resume", "--run.name", "begun", "--data.uri", moved)
    is_refused(outcome, "(--data.uri)", "other images", f"--checkpoint.init-from {begun_run}/checkpoints/{CHECKPOINT}")


def test_scores_of_two_validation_sets_or_protocols_are_not_compared(
    train: RunMain, small_cluster: None, begun_run: Path
) -> None:
    arguments = ("--plan", "--resume", "--run.name", "begun")
    is_refused(train(*arguments, "--validation.uri", "builtin://photos"), "(--validation.uri)", "other images")
    outcome = train(*arguments, "--validation.protocol", "psnr@rgb,crop=scale")
    is_refused(outcome, "--validation.protocol psnr@rgb,crop=scale (was psnr@y,crop=scale)")


def test_a_budget_that_was_passed_already_is_refused(train: RunMain, small_cluster: None, begun_run: Path) -> None:
    outcome = train("--plan", "--resume", "--run.name", "begun", "--optim.total-patches", "64")
    is_refused(outcome, "--optim.total-patches 64", "has seen")


def test_a_run_that_cannot_be_concluded_says_how_to_go_on_and_is_not_finished(
    train: RunMain, small_cluster: None, begun_run: Path
) -> None:
    """Its steps are done; its best checkpoint can't be read: here because there is none."""
    last = Position(step=20, best={"step": 10, "key": ckpt.key_of_step(10), "psnr_db": 31.0})
    ckpt.write_checkpoint(checkpoint_store(str(begun_run)), ckpt.Checkpoint(meta=last.to_meta(), tensors={}))
    status, _, err = train("--resume", "--run.name", "begun")
    message, hint = err.splitlines()[-2:]
    assert status == 2 and ckpt.key_of_step(10) in message
    assert hint == "When that is mended, go on with --resume --run.name begun"
    [run] = MlflowClient("sqlite:///mlflow.db").search_runs(["1"])
    assert run.info.status == "FAILED"


def test_another_number_of_workers_is_placed_anew(train: RunMain, small_cluster: None, begun_run: Path) -> None:
    """One worker had a CPU of two and two threads: two workers don't fit with that, and need not."""
    shown = rows(train("--plan", "--resume", "--run.name", "begun", "--run.num-workers", "2"))
    assert "0.75 CPUs and 1 thread" in shown["workers"][0]


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"scale": 2}, "optim": {"momentum": 1}}'])
def test_a_saved_config_that_can_not_be_read(train: RunMain, begun_run: Path, text: str) -> None:
    (begun_run / CONFIG_KEY).write_text(text)
    outcome = train("--plan", "--resume", "--run.name", "begun")
    is_refused(outcome, f"{begun_run}/{CONFIG_KEY}: --resume needs this run's config")


# Weights to start from


def test_starting_from_another_scale(plan: RunMain, begun_run: Path) -> None:
    source = begun_run / "checkpoints" / CHECKPOINT
    shown = rows(plan("--model.scale", 4, "--checkpoint.init-from", source))
    assert shown["run"][0].endswith(f"starts from {source}: 12 tensors taken over, 2 newly initialised")


def test_starting_from_another_size(plan: RunMain, saved_model: Path) -> None:
    outcome = plan("--model.num-channels", 8, "--checkpoint.init-from", saved_model)
    is_refused(outcome, "(--checkpoint.init-from)", "num_channels=4", "num_channels=8")


@pytest.mark.parametrize(
    ("origin", "part"),
    [
        ("nowhere.safetensors", "nowhere.safetensors: there is no such file"),
        ("no/folder", "no/folder: is no saved model"),
        ("damaged.safetensors", "damaged.safetensors: not a whole safetensors file"),
        ("models:/nobody@champion", "models:/nobody@champion: Registered Model with name=nobody not found"),
        ("models:/nobody", "neither models:/name@alias nor models:/name/version"),
    ],
)
def test_starting_from_what_is_not_there(plan: RunMain, tmp_path: Path, origin: str, part: str) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"not a header")
    is_refused(plan("--checkpoint.init-from", origin), "(--checkpoint.init-from)", part)


def test_a_resumed_run_does_not_need_what_it_started_from(train: RunMain, small_cluster: None, begun_run: Path) -> None:
    outcome = train("--plan", "--resume", "--run.name", "begun", "--checkpoint.init-from", "gone.safetensors")
    assert rows(outcome)["run"] == [f"begun in {begun_run}, goes on from {CHECKPOINT}"]
