"""train_srgan.py before anything is trained: its presets, what its plan shows, what stands against it, and --resume."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import train_srgan
from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_models.architectures import config_to_dict as model_config_to_dict
from sr_models.discriminators import MIN_PATCH_PX_HR
from sr_models.edsr import EDSRConfig
from sr_models.network import ModelConfig
from sr_models.srresnet import SRResNetConfig
from sr_models.weights import save_model
from sr_train import checkpoint as ckpt
from sr_train.adversarial import ADVERSARIAL
from sr_train.adversarial_config import AdversarialConfig, pretraining
from sr_train.adversarial_learner import AdversarialLearner
from sr_train.cli import TrainCommand, parse_train
from sr_train.collective import Collective
from sr_train.config import TrainConfig, config_to_dict
from sr_train.method import PIXEL
from sr_train.options import ConfigError
from sr_train.placement import ClusterFacts
from sr_train.plan import Plan, PlanError, make_plan
from sr_train.plan_report import describe
from sr_train.run_folder import CONFIG_KEY, RESULT_KEY, checkpoint_store
from sr_train.schedule import learning_rate_at
from sr_train.srgan_presets import SRGAN_PRESETS
from sr_train.step_mode import REFERENCE
from tests.support.s3 import S3Server

RunMain = Callable[..., tuple[int, str, str]]
Config = AdversarialConfig[SRResNetConfig]

SMALL = SRResNetConfig(scale=2, num_blocks=1, num_channels=4)
PAPER_PRESETS = [name for name in SRGAN_PRESETS if name != "srgan-small-x4"]
UPDATE = 16
"""Patches of an update: the papers' batch."""


@pytest.fixture
def arguments(tiny_photos: Path) -> Callable[..., list[str]]:
    """A tiny run on six small photos; a flag given replaces the one here. Random features are loaded in no time."""

    def complete(*given: object) -> list[str]:
        defaults = {
            "--data.uri": tiny_photos,
            "--data.patch-px-hr": 32,
            "--model.scale": 2,
            "--model.num-blocks": 1,
            "--model.num-channels": 4,
            "--discriminator.num-channels": 4,
            "--perceptual.layer": "conv1_2",
            "--perceptual.weights": "random",
            "--perceptual.lpips-weights": "none",
            "--tracking.uri": "sqlite:///mlflow.db",
        }
        kept = [part for flag, value in defaults.items() if flag not in given for part in (flag, value)]
        return [str(part) for part in (*kept, *given)]

    return complete


def parsed(arguments: list[str]) -> TrainCommand[Config]:
    return parse_train(
        arguments,
        config_type=AdversarialConfig[SRResNetConfig],
        presets=SRGAN_PRESETS,
        default_preset="srgan-small-x4",
        prog="test",
        description="",
        aliases={"--init": "--checkpoint.init-from"},
    )


def planned(command: TrainCommand[Config]) -> Plan:
    """The plan of its GAN, on two CPU cores."""
    cluster = ClusterFacts(cpus_per_node=(2,), gpus_per_node=(0,))
    return make_plan(command.config, cluster, resume=command.resume, resume_name=command.resume_name)


@pytest.fixture
def plan(arguments: Callable[..., list[str]]) -> Callable[..., Plan]:
    return lambda *given: planned(parsed(arguments(*given)))


@pytest.fixture
def srgan(run_main: RunMain, arguments: Callable[..., list[str]]) -> RunMain:
    """train_srgan.py as a tiny run."""
    return lambda *given: run_main(train_srgan.main, *arguments(*given))


def is_refused(outcome: tuple[int, str, str], *parts: object) -> None:
    """Ended by one message, which holds all the parts, before anything was planned or kept."""
    status, out, err = outcome
    assert (status, out) == (2, ""), err
    assert "Traceback" not in err
    assert [part for part in parts if str(part) not in err] == [], err
    assert not list(Path("runs").glob("[!.]*"))


def rows(plan: Plan) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in describe(plan).splitlines():
        name, text = line.split("  ", 1)
        found.setdefault(name, []).append(text.strip())
    return found


# Presets


def rates(config: TrainConfig[Any], *updates: int) -> list[float]:
    """Learning rates of the updates with these numbers, counted from 0."""
    total = config.optim.total_patches
    return [learning_rate_at(config.schedule, patches_seen=update * UPDATE, total_patches=total) for update in updates]


def test_srgan_x4_is_the_papers() -> None:
    """Ledig et al. 2017, sections 2.2.1 and 3.2."""
    config = SRGAN_PRESETS["srgan-x4"]
    first = pretraining(config, "x")
    assert config.model == first.model == SRResNetConfig(scale=4, num_blocks=16, num_channels=64)
    assert (config.data.patch_px_hr, config.optim.global_batch_size, first.optim.global_batch_size) == (96, 16, 16)
    # "SRResNet networks were trained with a learning rate of 10^-4 and 10^6 update iterations"
    assert (first.optim.loss, first.optim.total_steps) == ("mse", 10**6)
    assert rates(first, 0, 10**6 - 1) == [1e-4, 1e-4]
    # "All SRGAN variants were trained with 10^5 update iterations at a learning rate of 10^-4 and another 10^5
    # iterations at a lower rate of 10^-5."
    assert config.optim.total_steps == 2 * 10**5
    assert rates(config, 0, 10**5 - 1, 10**5, 2 * 10**5 - 1) == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])
    assert (config.optim.adam_beta1, first.optim.adam_beta1) == (0.9, 0.9)
    assert (config.gan.pixel_weight, config.gan.perceptual_weight, config.gan.adversarial_weight) == (0, 1, 1e-3)
    assert not config.gan.relativistic
    assert (config.perceptual.layer, config.perceptual.after_relu, config.perceptual.loss) == ("conv5_4", True, "mse")
    assert config.perceptual.feature_scale == 1 / 12.75
    discriminator = config.discriminator
    assert (discriminator.kind, discriminator.num_channels, discriminator.spectral_norm) == ("vgg", 64, False)


def test_the_esrgan_losses_are_the_papers() -> None:
    """Wang et al. 2018, sections 3.2, 3.3 and 4.1."""
    config = SRGAN_PRESETS["srgan-esrgan-losses-x4"]
    first = pretraining(config, "x")
    assert (config.data.patch_px_hr, config.optim.global_batch_size, first.optim.global_batch_size) == (128, 16, 16)
    # "initialized as 2 × 10^-4 and decayed by a factor of 2 every 2 × 10^5 of mini-batch updates", on L1
    assert first.optim.loss == "l1"
    assert rates(first, 0, 199_999, 200_000, 400_000) == pytest.approx([2e-4, 2e-4, 1e-4, 5e-5])
    # "The learning rate is set to 1 × 10^-4 and halved at [50k, 100k, 200k, 300k] iterations"; here not at 50k.
    assert rates(config, 0, 99_999, 100_000, 200_000, 300_000) == pytest.approx([1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5])
    # "λ = 5 × 10^-3 and η = 1 × 10^-2"
    assert config.optim.loss == "l1"
    assert (config.gan.pixel_weight, config.gan.perceptual_weight, config.gan.adversarial_weight) == (1e-2, 1, 5e-3)
    assert config.gan.relativistic
    # "features before the activation layers"
    assert (config.perceptual.layer, config.perceptual.after_relu, config.perceptual.loss) == ("conv5_4", False, "l1")
    assert config.perceptual.feature_scale == 1


def test_the_patch_discriminators_preset() -> None:
    """1 : 100 of adversarial to perceptual loss; Adam as in Radford et al. 2016, section 4; else SRGAN's."""
    config, srgan = SRGAN_PRESETS["srgan-patch-x4"], SRGAN_PRESETS["srgan-x4"]
    assert config.gan.perceptual_weight / config.gan.adversarial_weight == 100
    assert (config.optim.adam_beta1, config.optim.adam_beta2) == (0.5, 0.999)
    assert rates(config, 0, 10**5 - 1, 10**5) == pytest.approx([2e-4, 2e-4, 2e-5])
    assert (config.discriminator.kind, config.discriminator.spectral_norm) == ("patch", True)
    assert (config.perceptual.layer, config.perceptual.feature_scale) == ("conv5_4", 1)
    assert (config.pretrain, config.data, config.model) == (srgan.pretrain, srgan.data, srgan.model)


@pytest.mark.parametrize("preset", SRGAN_PRESETS)
def test_every_preset_takes_a_step(preset: str) -> None:
    """Its losses, features, kinds of networks and patches; the networks narrower, the batch smaller, VGG19 random."""
    config = SRGAN_PRESETS[preset]
    config = replace(
        config,
        model=replace(config.model, num_blocks=1, num_channels=4),
        discriminator=replace(config.discriminator, num_channels=2),
        perceptual=replace(config.perceptual, weights="random", lpips_weights="none"),
        optim=replace(config.optim, global_batch_size=2),
    )
    network = build_model(config.model, seed=0)
    parts = ADVERSARIAL.build(
        config, network, ADVERSARIAL.prepare(config, ""), torch.device("cpu"), REFERENCE, Collective()
    )
    learner = parts.learner
    assert isinstance(learner, AdversarialLearner) and parts.watchdog is not None
    watched = {"generator": learner.network, "discriminator": learner.discriminator}
    before = {name: torch.cat([it.detach().flatten() for it in net.parameters()]) for name, net in watched.items()}
    side_px = config.data.patch_px_hr
    hr_NCHW = torch.rand(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    lr_NCHW = torch.nn.functional.avg_pool2d(hr_NCHW, config.model.scale)
    learner.step([(lr_NCHW, hr_NCHW)], learning_rate=config.schedule.learning_rate)
    report = learner.report()  # raises if anything is not finite
    terms = {"pixel": config.gan.pixel_weight, "perceptual": 1.0, "adversarial": 1.0}
    assert all(report[f"{term}_gradient_norm"] > 0 for term, weight in terms.items() if weight > 0), report
    for name, net in watched.items():
        after = torch.cat([it.detach().flatten() for it in net.parameters()])
        assert not torch.equal(before[name], after), name

    first = pretraining(config, "first")
    pixel = PIXEL.build(
        first, build_model(first.model, seed=0), PIXEL.prepare(first, ""), torch.device("cpu"), REFERENCE, Collective()
    ).learner
    pixel.step([(lr_NCHW, hr_NCHW)], learning_rate=first.schedule.learning_rate)
    assert pixel.report()["loss"] > 0


@pytest.mark.parametrize("preset", PAPER_PRESETS)
def test_a_papers_preset_asks_for_a_dataset(run_main: RunMain, preset: str) -> None:
    is_refused(run_main(train_srgan.main, "--preset", preset), preset, "--data.uri")


# What the plan shows


def test_the_plan_of_a_gan(plan: Callable[..., Plan]) -> None:
    shown = rows(
        plan("--gan.pixel-weight", 0.5, "--gan.adversarial-weight", 0.25, "--discriminator.kind", "vgg",
             "--discriminator.no-spectral-norm", "--perceptual.no-after-relu")
    )  # fmt: skip
    assert shown["registers"] == ["srgan-x2"]
    # Figure 4 at 4 channels: eight convolutions, seven BatchNorms, then 64 · 32 · (32 / 16)² and 64 weights.
    convolutions = 9 * (3 * 4 + 4 * 4 + 4 * 8 + 8 * 8 + 8 * 16 + 16 * 16 + 16 * 32 + 32 * 32) + 4
    norms, dense = 2 * (4 + 8 + 8 + 16 + 16 + 32 + 32), 64 * 32 * 4 + 64 + 64 + 1
    assert shown["discriminator"][0].startswith(f"vgg with BatchNorm, {convolutions + norms + dense:,} parameters")
    assert shown["loss"] == ["0.5 · L1 + 1 · MSE of features × 0.0784 + 0.25 · adversarial"]
    assert shown["features"] == ["VGG19 conv1_2 before ReLU, random (seed 0)"]


def test_random_features_are_in_the_tags_and_the_model_is_not_promotable(plan: Callable[..., Plan]) -> None:
    random = plan()
    assert random.assets.not_promotable is not None and "--perceptual.weights random" in random.assets.not_promotable
    assert random.assets.tags["perceptual_features"] == "VGG19 conv1_2, random (seed 0)"
    assert "gets no alias" in rows(random)["WARNING"][0]
    assert rows(random)["registers"] == ["srgan-x2"]


def test_features_from_a_file_are_promotable(plan: Callable[..., Plan], vgg19_file: Path) -> None:
    real = plan("--perceptual.weights", vgg19_file)
    assert real.assets.not_promotable is None
    assert not any("perceptual" in warning for warning in rows(real).get("WARNING", []))
    assert real.assets.tags["perceptual_features"].startswith("VGG19 conv1_2, file vgg19.safetensors (sha256 ")
    assert rows(real)["registers"] == ["srgan-x2@challenger"]


def test_features_from_object_storage(plan: Callable[..., Plan], s3: S3Server, vgg19_file: Path) -> None:
    store = open_store(s3.new_bucket())
    store.write("vgg19.safetensors", vgg19_file.read_bytes())
    assert plan("--perceptual.weights", store.uri_of("vgg19.safetensors")).assets.not_promotable is None


def test_with_lpips_it_decides_which_checkpoint_is_best(plan: Callable[..., Plan], alexnet_file: Path) -> None:
    with_lpips = plan("--perceptual.lpips-weights", alexnet_file)
    assert with_lpips.assets.best_by == "lpips"
    assert rows(with_lpips)["best"] == ["the checkpoint of lowest LPIPS"]
    [protocol] = rows(with_lpips)["LPIPS"]
    assert protocol.startswith("lpips@alex,v0.1,weights=") and with_lpips.assets.tags["lpips_protocol"] == protocol


def test_without_lpips_the_plan_says_why_and_the_newest_checkpoint_is_best(plan: Callable[..., Plan]) -> None:
    without = plan("--perceptual.lpips-weights", "gone.pth")
    assert (without.assets.best_by, without.assets.lpips) == ("newest", None)
    [reason] = rows(without)["LPIPS"]
    assert "gone.pth: there is no such file" in reason and "alexnet-owt-7be5be79.pth" in reason
    assert rows(without)["best"] == ["the newest checkpoint, for want of LPIPS"]
    assert "lpips_protocol" not in without.assets.tags


def test_an_early_stop_needs_a_score(plan: Callable[..., Plan]) -> None:
    assert "--validation.early-stop-after" in refusal(plan, "--validation.early-stop-after", 3)
    plan("--validation.early-stop-after", 3, "--validation.best-by", "psnr")


def test_best_by_psnr_if_asked(plan: Callable[..., Plan]) -> None:
    by_psnr = plan("--validation.best-by", "psnr")
    assert by_psnr.assets.best_by == "psnr" and rows(by_psnr)["best"] == [
        "the checkpoint of highest PSNR (psnr@y,crop=scale)"
    ]


# Weights that can't be had


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No internet, on any machine, and an empty torch.hub cache."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    urllib.request.install_opener(None)  # urlopen keeps the proxies it saw first
    yield
    urllib.request.install_opener(None)


def refusal(plan: Callable[..., Plan], *given: object) -> str:
    """The one thing that stands against this run."""
    with pytest.raises(PlanError) as caught:
        plan(*given)
    assert len(caught.value.problems) == 1, caught.value.problems
    assert not list(Path("runs").glob("[!.]*"))
    return caught.value.problems[0]


def test_offline_the_error_says_what_is_missing_and_how_to_get_it(plan: Callable[..., Plan], offline: None) -> None:
    """And nothing is said of LPIPS, without which it would train."""
    said = refusal(plan, "--perceptual.weights", "imagenet", "--perceptual.lpips-weights", "imagenet")
    wanted = ["https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "--perceptual.weights FILE", "perceptual.md"]
    assert [part for part in wanted if part not in said] == []
    assert "alexnet" not in said


def test_offline_lpips_alone_is_no_obstacle(plan: Callable[..., Plan], offline: None) -> None:
    without = plan("--perceptual.lpips-weights", "imagenet")
    assert without.assets.best_by == "newest" and "alexnet-owt-7be5be79.pth" in rows(without)["LPIPS"][0]


def test_best_by_lpips_needs_lpips(plan: Callable[..., Plan]) -> None:
    said = refusal(plan, "--validation.best-by", "lpips")
    assert said.startswith("--validation.best-by lpips: there is no LPIPS: ") and "--perceptual.lpips-weights" in said


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"not weights at all", "damaged, or not a file of weights"),
        (None, "there is no such file"),
    ],
)
def test_a_bad_file_of_weights(plan: Callable[..., Plan], tmp_path: Path, content: bytes | None, part: str) -> None:
    path = tmp_path / "vgg19.safetensors"
    if content is not None:
        path.write_bytes(content)
    said = refusal(plan, "--perceptual.weights", path)
    assert f"--perceptual.weights {path}" in said and part in said and "vgg19-dcbb9e9d.pth" in said


def test_weights_of_another_network(plan: Callable[..., Plan], alexnet_file: Path) -> None:
    assert "these are not VGG19's weights" in refusal(plan, "--perceptual.weights", alexnet_file)


# Options, before Ray is started


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--perceptual.layer", "conv6_1"], ["--perceptual.layer='conv6_1'", "conv1_1", "conv5_4"]),
        (["--data.patch-px-hr", MIN_PATCH_PX_HR - 2], ["patch_px_hr=14 is too small", "--data.patch-px-hr"]),
        (["--phase", "gan"], ["--phase gan", "--init", "--phase both", "--run.name"]),
        (["--phase", "gan", "--run.name", "n"], ["--init", "runs/n-pretrain holds no finished first phase"]),
        (["--phase", "pretrain", "--init", "some/model"], ["--phase pretrain", "--init"]),
        (["--perceptual.lpips-weights", "random"], ["--perceptual.lpips-weights=random"]),
        (["--pretrain.optim.total-patches", 16], ["--pretrain.schedule.warmup-patches"]),
        (
            ["--pretrain.optim.global-batch-size", 15, "--run.num-workers", 2],
            ["pretrain.optim.global_batch_size=15", "use 14 or 16", "--pretrain.optim.global-batch-size"],
        ),
    ],
)
def test_options_that_can_not_be_run(srgan: RunMain, given: list[object], parts: list[str]) -> None:
    status, out, err = srgan(*given)
    said = " ".join(err.replace("│", " ").split())  # of tyro's box
    is_refused((status, out, said), *parts)


def test_the_first_phases_options_do_not_matter_to_a_gan_alone(
    arguments: Callable[..., list[str]], saved: Callable[[ModelConfig], Path]
) -> None:
    given = ["--pretrain.optim.total-patches", 16, "--init", saved(SMALL)]
    assert planned(parsed(arguments(*given))).initial_weights is not None


# --init


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[ModelConfig], Path]:
    """A saved model of this config."""

    def save(config: ModelConfig) -> Path:
        save_model(tmp_path / "model", config, build_model(config, seed=3).state_dict())
        return tmp_path / "model"

    return save


def test_a_gan_from_a_saved_generator(plan: Callable[..., Plan], saved: Callable[[ModelConfig], Path]) -> None:
    from_saved = plan("--init", saved(SMALL))
    weights, reference = from_saved.initial_weights, from_saved.assets.reference
    assert weights is not None and weights.num_fresh == 0
    assert reference is not None and reference.title == "SRResNet"
    expected = build_model(SMALL, seed=3).state_dict()
    assert all(torch.equal(weights.state[key], it) and torch.equal(reference.state[key], it) for key, it in
               expected.items())  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (EDSRConfig(scale=2, num_blocks=1, num_channels=4), ["'srresnet'", "'edsr'"]),
        (EDSRConfig(scale=4, num_blocks=1, num_channels=4), ["'srresnet'", "'edsr'"]),
        (replace(SMALL, scale=4), ["is an x4 model", "give one for x2", "--model.scale 4"]),
        (replace(SMALL, num_channels=8), ["num_channels=8", "num_channels=4"]),
        (replace(SMALL, num_blocks=3), ["num_blocks=3", "num_blocks=1"]),
    ],
    ids=["EDSR", "EDSR of another scale", "another scale", "wider", "deeper"],
)
def test_init_of_another_network(
    plan: Callable[..., Plan], saved: Callable[[ModelConfig], Path], config: ModelConfig, parts: list[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        plan("--init", saved(config))
    said = str(caught.value)
    assert [part for part in ["init", *parts] if part not in said] == [], said


def test_init_that_is_not_there(plan: Callable[..., Plan]) -> None:
    assert "no/model: is no saved model" in refusal(plan, "--init", "no/model")


# Both phases, and going on


@pytest.mark.usefixtures("small_cluster")
def test_the_plan_of_both_phases(srgan: RunMain, tmp_path: Path) -> None:
    status, out, err = srgan("--plan", "--run.name", "n", "--pretrain.optim.loss", "mse")
    assert (status, err) == (0, "")
    first, second = out.split("phase 2 of 2")
    assert "phase 1 of 2: the generator alone, on MSE" in first and "n-pretrain in" in first
    assert "srresnet-x2@challenger" in first
    assert "discriminator" not in first and "features" not in first
    assert "srgan-x2" in second and "discriminator" in second and "features" in second
    assert out.count("nothing was trained") == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".manifests"]


@pytest.mark.usefixtures("small_cluster")
def test_what_stands_against_either_phase_leaves_nothing_behind(srgan: RunMain) -> None:
    """The first phase alone would not need the weights: they are missed before it begins."""
    outcome = srgan("--run.name", "n", "--perceptual.weights", "gone.pth")
    is_refused(outcome, "--perceptual.weights gone.pth", "there is no such file")
    (Path("runs") / "n-pretrain").mkdir(parents=True)
    (Path("runs") / "n-pretrain" / CONFIG_KEY).write_text("{}")
    status, out, err = srgan("--run.name", "n")
    assert (status, out) == (2, "") and "run 'n-pretrain' exists" in err
    assert not (Path("runs") / "n").exists()


@pytest.fixture
def finished_first_phase(arguments: Callable[..., list[str]], tiny_photos: Path) -> Path:
    """What `--run.name begun` leaves when its first phase has ended and its GAN has not begun; the best checkpoint."""
    command = parsed(arguments("--run.name", "begun", "--optim.total-patches", 64, "--optim.seed", 5,
                               "--gan.adversarial-weight", 0.25))  # fmt: skip
    store = open_store("runs/begun")
    store.write(CONFIG_KEY, json.dumps(config_to_dict(command.config)).encode())
    first = open_store("runs/begun-pretrain")
    first.write(CONFIG_KEY, json.dumps(config_to_dict(pretraining(command.config, "begun"))).encode())
    best = write_checkpoint("runs/begun-pretrain", SMALL, step=3)
    first.write(RESULT_KEY, json.dumps({"best_checkpoint": str(best)}).encode())
    return best


def write_checkpoint(run_uri: str, config: SRResNetConfig, *, step: int) -> Path:
    meta = {"step": step, "architecture": "srresnet", "model_config": model_config_to_dict(config)}
    checkpoint = ckpt.Checkpoint(tensors={"model": build_model(config, seed=1).state_dict()}, meta=meta)
    store = checkpoint_store(run_uri)
    return Path(store.uri_of(ckpt.write_checkpoint(store, checkpoint)))


def test_resume_keeps_what_was_asked_for(finished_first_phase: Path) -> None:
    config = parsed(["--resume", "--run.name", "begun"]).config
    assert (config.optim.total_patches, config.optim.seed, config.gan.adversarial_weight) == (64, 5, 0.25)
    assert (config.model, config.discriminator.num_channels, config.perceptual.weights) == (SMALL, 4, "random")
    assert (config.phase, config.checkpoint.init_from) == ("both", None)


@pytest.mark.parametrize(
    ("flag", "value", "was"),
    [
        ("--gan.adversarial-weight", "0.5", "0.25"),
        ("--perceptual.weights", "imagenet", "random"),
        ("--perceptual.layer", "conv5_4", "conv1_2"),
        ("--discriminator.num-channels", "8", "4"),
        ("--pretrain.optim.seed", "1", "0"),
    ],
)
def test_resume_changes_nothing_that_training_depends_on(
    finished_first_phase: Path, flag: str, value: str, was: str
) -> None:
    with pytest.raises(ConfigError, match=f"{flag} {value} \\(was {was}\\)"):
        parsed(["--resume", "--run.name", "begun", flag, value])


def test_resume_may_change_what_watches_and_measures(finished_first_phase: Path) -> None:
    given = ["--phase", "pretrain", "--watchdog.max-recoveries", "9", "--perceptual.lpips-weights", "other.pth"]
    config = parsed(["--resume", "--run.name", "begun", *given]).config
    changed = (config.phase, config.watchdog.max_recoveries, config.perceptual.lpips_weights)
    assert changed == ("pretrain", 9, "other.pth")


@pytest.mark.usefixtures("small_cluster")
def test_the_gan_of_a_name_goes_on_from_its_first_phase(run_main: RunMain, finished_first_phase: Path) -> None:
    status, out, err = run_main(train_srgan.main, "--resume", "--run.name", "begun", "--phase", "gan", "--plan")
    assert status == 0, err
    [run] = [line for line in out.splitlines() if line.startswith("run ")]
    assert f"starts from {finished_first_phase}" in run


def test_a_first_phases_own_name_is_not_resumed(run_main: RunMain, finished_first_phase: Path) -> None:
    """It would begin another first phase, of NAME-pretrain, over it."""
    before = (Path("runs") / "begun-pretrain" / CONFIG_KEY).read_bytes()
    status, out, err = run_main(train_srgan.main, "--resume", "--run.name", "begun-pretrain")
    assert (status, out) == (2, "") and "go on with --resume --run.name begun" in err
    assert (Path("runs") / "begun-pretrain" / CONFIG_KEY).read_bytes() == before


@pytest.mark.usefixtures("small_cluster")
def test_a_resumed_first_phase_holds_as_many_images_as_before(run_main: RunMain, finished_first_phase: Path) -> None:
    """Its samples depend on that; the GAN, with another batch, may hold another number."""
    store = open_store("runs/begun-pretrain")
    config = json.loads(store.read_text(CONFIG_KEY))
    config["data"]["window_images"] = 3
    store.write(CONFIG_KEY, json.dumps(config).encode())
    status, out, err = run_main(train_srgan.main, "--resume", "--run.name", "begun", "--plan")
    assert status == 0, err
    feeds = [line.split("  ")[-1] for line in out.splitlines() if line.startswith("feed ")]
    assert feeds == ["3 of 6 images at once, one replaced every 1024 patches", "all 6 images at once"]


@pytest.fixture
def begun_gan(finished_first_phase: Path) -> Callable[[], Plan]:
    """The same with a GAN that has a checkpoint; its plan when it is resumed."""
    store = open_store("runs/begun")
    config = json.loads(store.read_text(CONFIG_KEY))
    config["checkpoint"]["init_from"] = str(finished_first_phase)
    store.write(CONFIG_KEY, json.dumps(config).encode())
    write_checkpoint("runs/begun", SMALL, step=1)
    return lambda: planned(parsed(["--resume", "--run.name", "begun"]))


def test_a_resumed_gan_shows_the_generator_that_it_began_with(begun_gan: Callable[[], Plan]) -> None:
    resumed = begun_gan()
    assert resumed.goes_on_from == ckpt.key_of_step(1)
    assert resumed.assets.reference is not None and resumed.initial_weights is None


@pytest.mark.parametrize("change", ["gone", "replaced"])
def test_a_resumed_gan_does_not_need_what_it_began_with(
    begun_gan: Callable[[], Plan], finished_first_phase: Path, change: str
) -> None:
    finished_first_phase.unlink()
    if change == "replaced":
        write_checkpoint("runs/begun-pretrain", replace(SMALL, num_channels=8), step=3)
    resumed = begun_gan()
    assert resumed.assets.reference is None
    assert any("pictures without the generator" in text for text in rows(resumed)["WARNING"])
