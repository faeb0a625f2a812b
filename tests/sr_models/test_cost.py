"""What networks cost: against published numbers and arithmetic by hand; a latency that is a round's own time."""

import statistics
import time

import pytest
import torch
from torch import nn

from sr_models.architectures import build_model
from sr_models.cost import input_px_lr, latency_s, model_cost
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.srresnet import SRResNetConfig

SMALL = EDSRConfig(scale=4, num_blocks=1, num_channels=2)


@pytest.mark.parametrize(("scale", "size"), [(2, (360, 640)), (3, (240, 427)), (4, (180, 320))])
def test_the_input_is_the_smallest_that_gives_1280x720(scale, size):
    height, width = input_px_lr(scale)
    assert (height, width) == size
    assert height * scale >= 720 > (height - 1) * scale
    assert width * scale >= 1280 > (width - 1) * scale


@pytest.mark.parametrize(("scale", "published_multi_adds"), [(2, 316.3e9), (4, 114.2e9)])
def test_edsr_baseline_costs_what_is_published(scale, published_multi_adds):
    """Multi-Adds of EDSR-baseline at 1280×720, as comparisons since CARN list them."""
    assert model_cost(EDSRConfig(scale=scale)).flops / 2 == pytest.approx(published_multi_adds, rel=0.01)


def test_edsr_baseline_x2_by_its_layers():
    """Each 3×3 convolution from i to o channels has 9·i·o weights and o biases, and 9·i·o multiply-adds per pixel."""
    lr_px, sr_px = 360 * 640, 720 * 1280
    square = 9 * 64 * 64
    multi_adds = lr_px * (9 * 3 * 64 + 33 * square + 4 * square) + sr_px * 9 * 64 * 3
    parameters = (9 * 3 * 64 + 64) + 33 * (square + 64) + (4 * square + 256) + (9 * 64 * 3 + 3)
    cost = model_cost(EDSRConfig(scale=2))
    assert cost.parameters == parameters == 1_369_859
    assert cost.flops == 2 * multi_adds
    assert cost.latency_s is None


def test_edsr_of_43_million_parameters_takes_next_to_no_time():
    """Its forward pass at this size is 5.8·10¹² operations: minutes on a CPU, were it computed."""
    start_s = time.perf_counter()
    cost = model_cost(EDSRConfig(scale=4, num_blocks=32, num_channels=256, residual_scaling=0.1))
    assert time.perf_counter() - start_s < 5
    assert cost.parameters == 43_089_923
    square = 9 * 256 * 256
    multi_adds = 180 * 320 * ((9 * 3 * 256 + 65 * square + 4 * square) + 4 * 4 * square + 16 * 9 * 256 * 3)
    assert cost.flops == 2 * multi_adds


def test_srresnet_counts_its_convolutions_only():
    """x3, so 427×240 pixels: 9×9 from 3 to 4 channels, five 3×3, one to 9 times the channels, and 9×9 on SR pixels."""
    lr_px, square = 427 * 240, 9 * 4 * 4
    multi_adds = lr_px * (81 * 3 * 4 + 5 * square + 9 * square + 9 * 81 * 4 * 3)
    assert model_cost(SRResNetConfig(scale=3, num_blocks=2, num_channels=4)).flops == 2 * multi_adds


def timed(network: nn.Module) -> list[tuple[float, tuple[int, ...]]]:
    """Seconds and input shape of each forward pass from now on."""
    passes: list[tuple[float, tuple[int, ...]]] = []
    start_s = [0.0]
    network.register_forward_pre_hook(lambda *_: start_s.__setitem__(0, time.perf_counter()))
    network.register_forward_hook(
        lambda _, inputs, __: passes.append((time.perf_counter() - start_s[0], tuple(inputs[0].shape)))
    )
    return passes


def test_latency_is_the_median_of_whole_images_without_the_warm_up():
    network = build_model(SMALL, seed=0)
    passes = timed(network)
    start_s = time.perf_counter()
    median_s = latency_s(network, torch.device("cpu"), rounds=3)
    total_s = time.perf_counter() - start_s
    warm_up_s, *rounds_s = [seconds for seconds, _ in passes]
    assert len(rounds_s) == 3
    assert {shape for _, shape in passes} == {(1, 3, 180, 320)}, "one tile, the whole image"
    assert median_s >= statistics.median(rounds_s), "a round is its forward pass and more"
    assert warm_up_s + 2 * median_s + min(rounds_s) <= total_s, "two of three rounds took the median or longer"


def test_a_slow_first_image_does_not_count():
    network = build_model(SMALL, seed=0)
    passes = timed(network)
    start_s = time.perf_counter()
    only_s = latency_s(network, torch.device("cpu"), rounds=1)
    assert passes[0][0] + only_s <= time.perf_counter() - start_s


def test_no_rounds_is_an_error():
    with pytest.raises(ModelError, match="rounds=0"):
        latency_s(build_model(SMALL), torch.device("cpu"), rounds=0)
