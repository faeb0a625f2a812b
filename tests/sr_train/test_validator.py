"""Validation inside a run: scores as of the images one by one; what needs no network keeps no one waiting."""

import threading
from functools import partial

import numpy as np
import pytest
import torch

from sr_data.manifest import load_manifest
from sr_data.pairs import DecodedPair, load_pair
from sr_data.resize import upscale_bicubic
from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.inference import placed, upscale_image
from sr_train.collective import Collective
from sr_train.metrics import score_image
from sr_train.options import ValidationConfig
from sr_train.perceptual_metric import LpipsMetric
from sr_train.perceptual_weights import load_alexnet_weights
from sr_train.validation import mean_score
from sr_train.validator import Validator, side_by_side

SCALE = 2
CONFIG = ValidationConfig(protocol="psnr@rgb,crop=scale", tile_px_lr=16)
PATIENCE_S = 60.0
"""How long a test waits for another thread before it fails."""


@pytest.fixture
def manifest(tiny_photos):
    return load_manifest(str(tiny_photos), split="valid", scale=SCALE)


def load(manifest):
    store = open_store(manifest.uri)
    return (load_pair(store, record, manifest.scale) for record in manifest.images)


def network(seed=0):
    return build_model(EDSRConfig(scale=SCALE, num_blocks=1, num_channels=4), seed=seed)


class Gallery:
    """Keeps what it is given."""

    def __init__(self):
        self.pictures = {}

    def __call__(self, name, image_HWC, *, step):
        self.pictures[step, name] = image_HWC


@pytest.fixture
def make(manifest):
    """Makes validators of the tiny photos, and closes them in the end."""
    made = []

    def make(*, load=load, rank=0, num_pictures=2, on_picture=None, **more):
        arguments = {"load": load, "collective": Collective(rank=rank), "num_pictures": num_pictures, **more}
        made.append(Validator(manifest, CONFIG, on_picture=on_picture or Gallery(), **arguments))
        return made[-1]

    yield make
    for validator in made:
        validator.close()


@pytest.fixture
def alexnet_weights(alexnet_file):
    return load_alexnet_weights(str(alexnet_file))


def mean_of(manifest, upscale):
    """The score of the set, image by image."""
    arguments = {"scale": SCALE, "protocol": CONFIG.protocol}
    scores = [score_image(upscale(pair.lr_HWC), pair.hr_HWC, name=pair.name, **arguments) for pair in load(manifest)]
    return mean_score("valid", SCALE, CONFIG.protocol, scores)


def test_the_scores_are_those_of_the_images_one_by_one_with_bicubics_beside_them(manifest, make):
    validator = make()
    bicubic = mean_of(manifest, partial(upscale_bicubic, scale=SCALE))
    for step, seed in ((10, 0), (20, 1)):
        model = network(seed)
        expected = mean_of(manifest, partial(upscale_image, model, tile_px_lr=CONFIG.tile_px_lr))
        assert validator(model, step) == {
            "psnr_db": expected.psnr_db,
            "ssim": expected.ssim,
            "bicubic_psnr_db": bicubic.psnr_db,
            "bicubic_ssim": bicubic.ssim,
        }


def test_the_first_images_are_drawn_with_their_own_scores(manifest, make):
    gallery = Gallery()
    validator = make(on_picture=gallery, num_pictures=2)
    values = {step: validator(network(step), step) for step in (10, 20)}
    validator.close()
    first, second, *_ = load(manifest)
    assert list(gallery.pictures) == [(step, pair.name) for step in (10, 20) for pair in (first, second)]
    assert values[10]["psnr_db"] != values[20]["psnr_db"]
    for (step, name), picture in gallery.pictures.items():
        pair = first if name == first.name else second
        sr_HWC = upscale_image(network(step), pair.lr_HWC, tile_px_lr=CONFIG.tile_px_lr)
        upscaled = {"bicubic": upscale_bicubic(pair.lr_HWC, SCALE), "SR": sr_HWC}
        assert np.array_equal(picture, side_by_side(pair, upscaled, scale=SCALE, protocol=CONFIG.protocol))


def test_a_reference_network_is_drawn_between_bicubic_and_the_one_in_training(manifest, make):
    gallery = Gallery()
    validator = make(on_picture=gallery, num_pictures=1, reference=("before", network(7)))
    for step in (10, 20):
        validator(network(step), step)
    validator.close()
    pair = next(load(manifest))
    for (step, _), picture in gallery.pictures.items():
        upscaled = {
            "bicubic": upscale_bicubic(pair.lr_HWC, SCALE),
            "before": upscale_image(network(7), pair.lr_HWC, tile_px_lr=CONFIG.tile_px_lr),
            "SR": upscale_image(network(step), pair.lr_HWC, tile_px_lr=CONFIG.tile_px_lr),
        }
        assert np.array_equal(picture, side_by_side(pair, upscaled, scale=SCALE, protocol=CONFIG.protocol))


def test_lpips_is_the_mean_of_the_images(manifest, make, alexnet_weights):
    lpips = LpipsMetric(alexnet_weights)
    values = make(lpips=lpips)(network(), 1)
    upscale = partial(upscale_image, network(), tile_px_lr=CONFIG.tile_px_lr)
    expected = [lpips.score(upscale(pair.lr_HWC), pair.hr_HWC) for pair in load(manifest)]
    assert values["lpips"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)


@pytest.mark.parametrize(("rank", "num_pictures"), [(1, 2), (0, 0)])
def test_pictures_are_drawn_by_rank_0_and_only_if_wanted(make, rank, num_pictures):
    gallery = Gallery()
    validator = make(rank=rank, num_pictures=num_pictures, on_picture=gallery)
    validator(network(), 1)
    validator.close()
    assert not gallery.pictures


def test_training_goes_on_while_pictures_are_drawn_and_close_waits_for_them(make):
    may_draw, drawn = threading.Event(), Gallery()

    def on_picture(name, image_HWC, *, step):
        assert may_draw.wait(PATIENCE_S)
        drawn(name, image_HWC, step=step)

    validator = make(on_picture=on_picture)
    validator(network(), 1)
    assert not drawn.pictures, "the validation is over, the pictures are not"
    may_draw.set()
    validator.close()
    assert len(drawn.pictures) == 2


def test_a_picture_that_cannot_be_drawn_is_an_error_of_the_next_validation_or_a_warning(make, caplog):
    def on_picture(name, image_HWC, *, step):
        raise RuntimeError(f"no ink for {name}")

    validator = make(on_picture=on_picture)
    validator(network(), 1)
    with pytest.raises(RuntimeError, match="no ink for"):
        validator(network(), 2)
    validator.close()
    assert "no ink for" in caplog.text


def test_images_are_decoded_and_bicubic_is_scored_before_anyone_asks_and_once(manifest, make):
    num_loads, all_loaded = 0, threading.Event()

    def counted(manifest):
        nonlocal num_loads
        num_loads += 1
        yield from load(manifest)
        all_loaded.set()

    validator = make(load=counted)
    assert all_loaded.wait(PATIENCE_S)
    first = validator(network(), 1)
    assert validator(network(), 2) == first
    assert num_loads == 1


def test_images_are_copied(manifest, make):
    """Ray Data's are views of memory that it wants back; here it is used for something else at once."""

    def reused(manifest):
        for pair in load(manifest):
            hr_HWC, lr_HWC = pair.hr_HWC.copy(), pair.lr_HWC.copy()
            yield DecodedPair(pair.name, hr_HWC, lr_HWC)
            hr_HWC[:], lr_HWC[:] = 0, 0

    assert make(load=reused)(network(), 1) == make()(network(), 1)


def test_read_only_images_are_taken(manifest, make, recwarn):
    def frozen(manifest):
        for pair in load(manifest):
            pair.hr_HWC.flags.writeable = pair.lr_HWC.flags.writeable = False
            yield pair

    assert make(load=frozen)(network(), 1) == make()(network(), 1)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_what_stops_the_decoding_is_raised_by_the_validation(make):
    def broken(manifest):
        yield next(load(manifest))
        raise OSError("the bucket is gone")

    with pytest.raises(OSError, match="the bucket is gone"):
        make(load=broken)(network(), 1)


def test_closing_does_not_wait_for_images_and_ends_their_decoding(manifest, make):
    started, closed, ended = threading.Event(), threading.Event(), threading.Event()
    num_decoded = 0

    def slow(manifest):
        nonlocal num_decoded
        started.set()
        try:
            for pair in load(manifest):
                assert closed.wait(PATIENCE_S)
                num_decoded += 1
                yield pair
        finally:
            ended.set()

    validator = make(load=slow)
    assert started.wait(PATIENCE_S)
    validator.close()
    closed.set()  # not before: had close() waited for the images, they had not come
    assert ended.wait(PATIENCE_S)
    assert num_decoded <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_scores_are_the_cpus(make):
    on_cpu = make()(network(), 1)
    torch.cuda.init()
    validator = make()
    on_gpu = validator(placed(network(), torch.device("cuda")), 1)
    assert all(pair.hr_HWC.is_pinned() for pair in validator._pairs.result())
    assert on_gpu["bicubic_psnr_db"] == on_cpu["bicubic_psnr_db"]
    assert on_gpu["psnr_db"] == pytest.approx(on_cpu["psnr_db"], abs=0.01)
    assert on_gpu["ssim"] == pytest.approx(on_cpu["ssim"], abs=1e-3)
