"""Whole images: tiles equal the whole, any size, self-ensemble."""

import numpy as np
import pytest
import torch

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.inference import upscale_image
from sr_models.network import SRNetwork


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def tiny_model(scale=2, num_blocks=2):
    return build_model(EDSRConfig(scale=scale, num_blocks=num_blocks, num_channels=8), seed=0)


class Recorder(SRNetwork):
    """Nearest neighbour x2 that notes the sizes and the mode it was run with."""

    def __init__(self):
        super().__init__()
        self.config = EDSRConfig(scale=2)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = []

    receptive_radius_px_lr = 3

    def forward(self, lr_NCHW):
        self.seen.append((tuple(lr_NCHW.shape[2:]), self.training, torch.is_inference_mode_enabled()))
        return lr_NCHW.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(33, 47), (16, 70), (1, 1), (7, 40)])
def test_tiles_equal_the_whole_image(scale, height, width):
    model, lr_HWC = tiny_model(scale), photo(height, width)
    whole = upscale_image(model, lr_HWC, tile_px_lr=1000)
    tiled = upscale_image(model, lr_HWC, tile_px_lr=16)
    assert whole.shape == (height * scale, width * scale, 3)
    assert whole.dtype == np.uint8
    difference = np.abs(whole.astype(int) - tiled)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3, "only values on the edge between two levels may round the other way"


def test_a_halo_below_the_receptive_radius_would_show():
    """The test above has teeth: with the border one network layer too narrow, tiles differ."""

    class ShortSighted(type(tiny_model())):
        receptive_radius_px_lr = 1

    model = tiny_model()
    short = ShortSighted(model.config)
    short.load_state_dict(model.state_dict())
    lr_HWC = photo(33, 47)
    whole, tiled = upscale_image(model, lr_HWC), upscale_image(short, lr_HWC, tile_px_lr=16)
    assert np.abs(whole.astype(int) - tiled).max() > 1


def test_memory_is_bounded_and_the_tiles_are_even():
    model = Recorder()
    lr_HWC = photo(50, 21)
    sr_HWC = upscale_image(model, lr_HWC, tile_px_lr=20)
    assert np.array_equal(sr_HWC, lr_HWC.repeat(2, axis=0).repeat(2, axis=1))
    assert len(model.seen) == 3 * 2
    assert max(max(size) for size, _, _ in model.seen) <= 20 + 2 * 3
    assert {size for size, _, _ in model.seen} == {(h, w) for h in (19, 23, 20) for w in (13, 14)}


def test_runs_without_gradients_in_evaluation_mode_and_leaves_the_mode_as_it_was():
    model = Recorder()
    model.train()
    upscale_image(model, photo(4, 4))
    assert model.seen == [((4, 4), False, True)]
    assert model.training
    model.eval()
    upscale_image(model, photo(4, 4))
    assert not model.training


def test_every_level_survives_the_way_through_the_network():
    levels_HWC = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(upscale_image(Recorder(), levels_HWC)[::2, ::2], levels_HWC)


def test_values_out_of_range_are_clamped_not_wrapped():
    class Contrast(Recorder):
        def forward(self, lr_NCHW):
            return (super().forward(lr_NCHW) - 0.5) * 10

    black_and_white = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    assert np.array_equal(upscale_image(Contrast(), black_and_white)[::2, ::2], black_and_white)


def test_self_ensemble_commutes_with_flips_and_turns_and_a_plain_network_does_not():
    model, lr_HWC = tiny_model(), photo(9, 12)
    for turn in (np.rot90, np.fliplr, np.flipud, lambda image: image.transpose(1, 0, 2)):
        then_turned = turn(upscale_image(model, lr_HWC, self_ensemble=True)).astype(int)
        turned_first = upscale_image(model, turn(lr_HWC), self_ensemble=True)
        assert np.abs(then_turned - turned_first).max() <= 1
        assert np.abs(turn(upscale_image(model, lr_HWC)).astype(int) - upscale_image(model, turn(lr_HWC))).max() > 1


def test_self_ensemble_is_the_mean_of_eight_runs():
    model = Recorder()
    lr_HWC = photo(4, 6)
    assert np.array_equal(upscale_image(model, lr_HWC, self_ensemble=True)[::2, ::2], lr_HWC)
    assert sorted(size for size, _, _ in model.seen) == [(4, 6)] * 4 + [(6, 4)] * 4


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), photo(0, 4)]
)
def test_other_images_are_refused(image):
    with pytest.raises(ModelError, match="must be uint8 of shape"):
        upscale_image(tiny_model(), image)


def test_wrong_tiles_and_wrapped_networks_are_refused():
    with pytest.raises(ModelError, match="tile_px_lr=0"):
        upscale_image(tiny_model(), photo(4, 4), tile_px_lr=0)
    with pytest.raises(ModelError, match="Sequential is not a network of sr_models"):
        upscale_image(torch.nn.Sequential(tiny_model()), photo(4, 4))
