"""A card says what is known of a model, and says so where nothing is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sr_data.manifest import load_manifest
from sr_models.architectures import build_model
from sr_models.discriminators import DiscriminatorConfig
from sr_models.edsr import EDSRConfig
from sr_models.srresnet import SRResNetConfig
from sr_models.weights import save_model
from sr_train.adversarial_config import AdversarialConfig
from sr_train.card_facts import card_facts, dataset_licence
from sr_train.checkpoint import Checkpoint
from sr_train.config import TrainConfig
from sr_train.gan_options import GanConfig
from sr_train.model_card import MAX_DESCRIPTION_LENGTH, CardFacts, description_of, model_card
from sr_train.options import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    ValidationConfig,
)
from sr_train.perceptual_weights import PerceptualConfig
from sr_train.placement import ClusterFacts
from sr_train.plan import Plan, make_plan

EDSR = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
CHECKPOINT = Checkpoint(tensors={}, meta={"step": 50, "git_sha": "0123abcd"})
BEST = {"step": 50, "key": "step-000000050.safetensors", "psnr_db": 30.1234, "ssim": 0.91234,
        "bicubic_psnr_db": 28.5, "bicubic_ssim": 0.87}  # fmt: skip


def sections(card: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", card, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def planned(config_type: type[TrainConfig[Any]] = TrainConfig, **changes: Any) -> Plan:
    options: dict[str, Any] = {
        "model": EDSR,
        "data": DataConfig(patch_px_hr=32),
        "optim": OptimConfig(total_patches=1600),
        "run": RunConfig(name="mine"),
    }
    cluster = ClusterFacts(cpus_per_node=(4.0,), gpus_per_node=(0.0,))
    return make_plan(config_type(**(options | changes)), cluster, resume=False)


def card_of(plan: Plan, measures: dict[str, float] | None = None, **best: float) -> dict[str, str]:
    facts = card_facts(plan, CHECKPOINT, BEST | best, measures or {}, samples=("lr", "bicubic", "sr", "hr"))
    return sections(model_card(facts))


def test_a_run_says_what_it_was_trained_on_and_how() -> None:
    plan = planned()
    card = card_of(plan, {"patches_per_s": 80.0})
    assert card[""].startswith("# edsr-x2\n") and "×2" in card[""]
    trained_on = card["What it was trained on"]
    assert (
        "builtin://photos [train]" in trained_on and plan.train.fingerprint in trained_on and "4 images" in trained_on
    )
    assert "| patches seen | 800 of 32² HR px, in 50 steps |" in trained_on
    assert "0123abcd" in trained_on and "10 s of steps at 80 patches/s" in trained_on
    method = card["How it was trained"]
    assert "| loss | L1 on RGB |" in method and "16 patches of 16² LR px" in method
    assert "cosine, learning rate 0.0001" in method
    assert card["Samples"].count("![") == 4


def test_scores_have_their_protocol_and_bicubic_beside_them() -> None:
    plan = planned()
    scores = card_of(plan)["Scores"]
    assert "`psnr@y,crop=scale`" in scores and plan.validation.fingerprint in scores and "1 image," in scores
    assert "| this model | 30.123 | 0.9123 | – |" in scores
    assert "| bicubic | 28.500 | 0.8700 | – |" in scores
    assert "tags" in scores
    with_lpips = replace(plan, assets=replace(plan.assets, tags={"lpips_protocol": "lpips@alex,v0.1"}))
    scores = card_of(with_lpips, lpips=0.25)["Scores"]
    assert "0.2500" in scores and "`lpips@alex,v0.1`" in scores


def test_limits_are_named(tiny_photos: Path) -> None:
    limits = card_of(planned())["Limits"]
    assert "few images (4)" in limits and "few images (1)" in limits
    assert "training images" not in limits and "No better" not in limits
    same = planned(
        data=DataConfig(uri=str(tiny_photos), patch_px_hr=32), validation=ValidationConfig(uri=str(tiny_photos))
    )
    limits = card_of(same, psnr_db=20.0)["Limits"]
    assert "6 of the images that it was scored on are training images" in limits and "No better than bicubic" in limits


def test_a_gan_says_that_it_invents_and_why_it_must_not_be_promoted() -> None:
    plan = planned(
        AdversarialConfig,
        model=SRResNetConfig(scale=2, num_blocks=1, num_channels=4),
        phase="gan",
        gan=GanConfig(perceptual_weight=0.0, pixel_weight=0.01),
        perceptual=PerceptualConfig(lpips_weights="none"),
        discriminator=DiscriminatorConfig(num_channels=4),
    )
    card = card_of(plan)
    assert "likely" in card["What it is for"] and "likely" not in card_of(planned())["What it is for"]
    assert "0.01 · L1 + 0.001 · adversarial" in card["How it was trained"]
    reason = "trained on random perceptual features"
    forbidden = card_of(replace(plan, assets=replace(plan.assets, not_promotable=reason)))
    assert reason in forbidden[""] and reason in forbidden["Limits"]
    assert "promoted" not in card[""]


def dataset_in(folder: Path, *keys: str) -> Path:
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (len(key), 99, 9)).save(folder / key)
    return folder


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("DIV2K_train_HR/0001.png", "DIV2K_train_HR/0002_s001.png"), "academic research"),
        (("images/train/100075.jpg", "images/val/2092.jpg"), "non-commercial"),
        (("DIV2K_train_HR/holiday.png",), None),
        (("train/0001.png",), None),
    ],
)
def test_a_datasets_licence_is_told_where_the_dataset_is_recognised(
    tmp_path: Path, keys: tuple[str, ...], said: str | None
) -> None:
    manifest = load_manifest(str(dataset_in(tmp_path / "data", *keys)), split="train", scale=2)
    licence = dataset_licence(manifest)
    assert licence is None if said is None else licence is not None and said in licence


def test_licences_are_what_is_known_and_what_the_user_says(tiny_photos: Path) -> None:
    assert "CC BY 2.0" in card_of(planned())["Licence"]
    own = {
        "data": DataConfig(uri=str(tiny_photos), patch_px_hr=32),
        "validation": ValidationConfig(uri=str(tiny_photos)),
    }
    assert card_of(planned(**own))["Licence"].startswith("Not known")
    said = card_of(planned(**own, tracking=TrackingConfig(licence_note="my own holidays, CC0")))["Licence"]
    assert "my own holidays, CC0" in said and "Not known" not in said
    with pytest.raises(ConfigError, match="--tracking.licence-note"):
        TrackingConfig(licence_note=" ")


def test_borrowed_weights_are_told_whatever_is_known_of_the_images(tiny_photos: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", EDSR, build_model(EDSR, seed=0).state_dict())
    begun = {"checkpoint": CheckpointConfig(init_from=str(tmp_path / "other"))}
    own = {
        "data": DataConfig(uri=str(tiny_photos), patch_px_hr=32),
        "validation": ValidationConfig(uri=str(tiny_photos)),
    }
    borrowed = "It began with another model's weights"
    known, unknown = card_of(planned(**begun))["Licence"], card_of(planned(**begun, **own))["Licence"]
    assert "CC BY 2.0" in known and borrowed in known and "Not known" not in known
    assert unknown.startswith("Not known") and borrowed in unknown


def test_no_secret_is_told() -> None:
    plan = planned()
    secret = "s3://key:hidden@bucket/photos"
    plan = replace(plan, train=replace(plan.train, uri=secret), validation=replace(plan.validation, uri=secret))
    text = "".join(card_of(plan).values())
    assert "bucket/photos" in text and "hidden" not in text


def test_what_is_not_known_is_said_to_be_not_known() -> None:
    card = sections(model_card(CardFacts(name="found-x2", config=EDSR, recorded=(("origin", "a | file\nof theirs"),))))
    for title in ("What it was trained on", "How it was trained", "Licence"):
        assert card[title].startswith("Not known"), title
    assert card["Scores"].startswith("None")
    assert "| origin | a \\| file of theirs |" in card["Also recorded"]


@pytest.mark.parametrize(("length", "left_out"), [(0, []), (2000, ["How it was trained"]), (9000, ["most"])])
def test_a_description_fits_into_mlflows_database(length: int, left_out: list[str]) -> None:
    """What one must know of a model stays longest."""
    card = model_card(CardFacts(name="edsr-x2", config=EDSR, method=(("loss", "L1 " * 200),), limits=("x" * length,)))
    text = description_of(card, name="edsr-x2", version="7")
    assert len(text) <= MAX_DESCRIPTION_LENGTH
    assert "![" not in text and "## What it is for" in text and "VERSION" not in text
    assert ("The rest is in" in text) == bool(left_out)
    if length < 9000:
        assert sections(card).keys() - sections(text).keys() == set(left_out)
        assert "models:/edsr-x2/7" in text
