"""Whole images: tiles equal the whole, any size, self-ensemble."""

import itertools

import numpy as np
import pytest
import torch

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.inference import as_tensor, placed, upscale_batch, upscale_image, upscale_tensor, windows
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


@pytest.mark.parametrize(("height", "width"), [(50, 21), (26, 27), (61, 300), (1, 26)])
def test_memory_is_bounded_and_all_tiles_of_an_image_have_one_shape(height, width):
    model = Recorder()
    lr_HWC = photo(height, width)
    sr_HWC = upscale_image(model, lr_HWC, tile_px_lr=20)
    assert np.array_equal(sr_HWC, lr_HWC.repeat(2, axis=0).repeat(2, axis=1))
    (shape,) = {size for size, _, _ in model.seen}
    assert max(shape) <= 20 + 2 * 3
    whole = height * width
    borders = len(model.seen) * (shape[0] * shape[1]) / whole
    assert len(model.seen) == max(1, -(-(height - 6) // 20)) * max(1, -(-(width - 6) // 20)), "no more than needed"
    assert borders < (1 + 2 * 3 / 20) ** 2 * 1.1, "the halo, and hardly more, is computed twice"


def test_tiles_are_of_one_length_and_what_is_kept_of_them_covers_the_image_outside_the_halo():
    for size, limit, halo in itertools.product(range(1, 70), (1, 2, 7, 16), (0, 1, 5)):
        parts = list(windows(size, limit, halo))
        assert len({window.stop - window.start for window, _, _ in parts}) == 1
        assert [first for _, first, _ in parts] == [0, *(last for _, _, last in parts[:-1])]
        assert parts[-1][2] == size
        for window, first, last in parts:
            assert 0 <= window.start < window.stop <= size
            assert window.stop - window.start <= limit + 2 * halo
            assert first < last
            assert first == 0 or first - window.start >= halo
            assert last == size or window.stop - last >= halo


def test_runs_without_gradients_in_evaluation_mode_and_leaves_the_mode_as_it_was():
    model = Recorder()
    model.train()
    upscale_image(model, photo(4, 4))
    assert model.seen == [((4, 4), False, True)]
    assert model.training
    model.eval()
    upscale_image(model, photo(4, 4))
    assert not model.training


def test_a_tensor_gives_what_an_array_gives():
    model, lr_HWC = tiny_model(), photo(13, 17)
    for options in ({}, {"tile_px_lr": 5}, {"self_ensemble": True}, {"autocast": torch.bfloat16}):
        sr_HWC = upscale_tensor(model, torch.from_numpy(lr_HWC), **options)
        assert (sr_HWC.dtype, sr_HWC.shape) == (torch.uint8, (26, 34, 3))
        assert np.array_equal(sr_HWC.numpy(), upscale_image(model, lr_HWC, **options))
        sr_HWC.add_(1)  # a tensor like any other, though it was made in inference mode


def test_arrays_are_taken_without_a_copy_where_that_can_be():
    lr_HWC = photo(5, 6)
    assert as_tensor(lr_HWC).data_ptr() == lr_HWC.ctypes.data
    read_only, turned = lr_HWC.copy(), np.rot90(lr_HWC)
    read_only.flags.writeable = False
    for image in (read_only, turned):
        assert np.array_equal(as_tensor(image).numpy(), image)


def test_autocast_lets_convolutions_round_and_is_off_unless_asked_for():
    class Watching(Recorder):
        def forward(self, lr_NCHW):
            self.autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            return super().forward(lr_NCHW)

    watching = Watching()
    upscale_image(watching, photo(4, 4))
    assert watching.autocast is None
    upscale_image(watching, photo(4, 4), autocast=torch.bfloat16)
    assert watching.autocast == torch.bfloat16
    model, lr_HWC = tiny_model(), photo(20, 20)
    difference = np.abs(
        upscale_image(model, lr_HWC).astype(int) - upscale_image(model, lr_HWC, autocast=torch.bfloat16)
    )
    assert 0 < difference.max() <= 4


def test_cudnn_does_not_search_while_tiles_run_and_does_again_afterwards(monkeypatch):
    class Watching(Recorder):
        def forward(self, lr_NCHW):
            self.searched = torch.backends.cudnn.benchmark
            return super().forward(lr_NCHW)

    for setting in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", setting)
        model = Watching()
        upscale_image(model, photo(4, 4))
        assert model.searched is False
        assert torch.backends.cudnn.benchmark is setting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("self_ensemble", [False, True])
def test_a_gpu_gives_the_cpus_image_and_nothing_waits_for_it(self_ensemble):
    lr_HWC = photo(70, 90)
    options = {"tile_px_lr": 32, "self_ensemble": self_ensemble}
    on_cpu = upscale_image(tiny_model(), lr_HWC, **options)
    model = placed(tiny_model(), torch.device("cuda"))
    assert next(model.parameters()).is_contiguous(memory_format=torch.channels_last)
    pinned_HWC = torch.from_numpy(lr_HWC).pin_memory()
    upscale_tensor(model, pinned_HWC, **options)  # the first use loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = upscale_tensor(model, pinned_HWC, **options)
        upscale_tensor(model, pinned_HWC, autocast=torch.bfloat16, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert on_gpu.is_cuda
    assert np.abs(on_cpu.astype(int) - on_gpu.cpu().numpy()).max() <= 1
    assert np.array_equal(upscale_image(model, lr_HWC, **options), on_gpu.cpu().numpy())


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
    with pytest.raises(ModelError, match="must be uint8 or uint16 of shape"):
        upscale_image(tiny_model(), image)


def test_wrong_tiles_and_wrapped_networks_are_refused():
    with pytest.raises(ModelError, match="tile_px_lr=0"):
        upscale_image(tiny_model(), photo(4, 4), tile_px_lr=0)
    with pytest.raises(ModelError, match="Sequential is not a network of sr_models"):
        upscale_image(torch.nn.Sequential(tiny_model()), photo(4, 4))


@pytest.mark.parametrize("options", [{}, {"tile_px_lr": 5}, {"self_ensemble": True}])
def test_a_batch_gives_what_its_images_give(options):
    model, images_NHWC = tiny_model(), np.stack([photo(11, 9), photo(11, 9)[::-1]])
    together = upscale_batch(model, images_NHWC, **options).numpy().astype(int)
    for one, image_HWC in zip(together, images_NHWC, strict=True):
        assert np.abs(one - upscale_image(model, image_HWC, **options)).max() <= 1, "rounding apart"


def test_16_bits_keep_what_8_would_round_away():
    model = Recorder()  # repeats pixels
    lr_HWC = np.arange(4 * 5 * 3, dtype=np.uint16).reshape(4, 5, 3) + 40_000
    sr_HWC = upscale_image(model, lr_HWC)
    assert sr_HWC.dtype == np.uint16
    assert np.array_equal(sr_HWC, lr_HWC.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("options", [{"tile_px_lr": 4}, {"self_ensemble": True}])
def test_the_work_can_be_ended_between_passes(options):
    model, left = Recorder(), iter(range(3))
    with pytest.raises(StopIteration):
        upscale_batch(model, photo(60, 4)[None], **options, before_pass=lambda: next(left))
    assert len(model.seen) == 3
