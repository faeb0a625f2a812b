"""EDSR: sizes as published, what it computes, what each LR pixel can reach."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sr_models.architectures import build_model, macs_per_lr_pixel, num_parameters
from sr_models.edsr import DIV2K_MEAN_RGB, EDSRConfig
from sr_models.errors import ModelError

SCALES = (2, 3, 4)
PAPER_SIZE = {"num_blocks": 32, "num_channels": 256, "residual_scaling": 0.1}


@pytest.mark.parametrize(
    ("scale", "size", "published"),
    [
        # Learnable parameters of EDSR-PyTorch's models: the paper's table 1 rounds them to 1.5M and 43M.
        (2, {}, 1_369_859),
        (3, {}, 1_554_499),
        (4, {}, 1_517_571),
        (2, PAPER_SIZE, 40_729_603),
        (3, PAPER_SIZE, 43_680_003),
        (4, PAPER_SIZE, 43_089_923),
    ],
)
def test_number_of_parameters_is_the_published_one(scale, size, published):
    assert num_parameters(EDSRConfig(scale=scale, **size)) == published


@pytest.mark.parametrize("scale", SCALES)
def test_output_is_scale_times_the_input_and_every_weight_gets_a_gradient(scale):
    model = build_model(EDSRConfig(scale=scale, num_blocks=2, num_channels=8), seed=0)
    output_NCHW = model(torch.rand(2, 3, 5, 7))
    assert output_NCHW.shape == (2, 3, 5 * scale, 7 * scale)
    output_NCHW.abs().mean().backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not without, f"no gradient for {without}"


def test_a_network_of_zero_weights_answers_with_the_mean():
    model = build_model(EDSRConfig(num_blocks=1, num_channels=4))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        output_NCHW = model(torch.rand(1, 3, 4, 4))
    assert torch.equal(output_NCHW, torch.tensor(DIV2K_MEAN_RGB).view(1, 3, 1, 1).expand_as(output_NCHW))


def test_the_mean_is_neither_trained_nor_part_of_the_weights():
    model = build_model(EDSRConfig(num_blocks=1, num_channels=4))
    assert "mean_1C11" not in model.state_dict()
    assert "mean_1C11" not in dict(model.named_parameters())
    assert model.double().mean_1C11.dtype == torch.float64, "it moves with the network"


def test_layers_see_the_pixel_range():
    """The head's input for one pixel is (pixel - mean) x rgb_range: what published weights for 0 to 255 expect."""
    model = build_model(EDSRConfig(num_blocks=1, num_channels=4, rgb_range=255.0), seed=0)
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.ones(1, 3, 2, 2))
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx([(1 - mean) * 255 for mean in DIV2K_MEAN_RGB])


def test_residual_scaling_scales_each_residual():
    x_NCHW = torch.rand(1, 4, 6, 6)
    block = build_model(EDSRConfig(num_blocks=1, num_channels=4, residual_scaling=0.25), seed=0).blocks[0]
    residual_NCHW = block.conv2(torch.relu(block.conv1(x_NCHW)))
    torch.testing.assert_close(block(x_NCHW), x_NCHW + 0.25 * residual_NCHW)


def test_output_keeps_full_precision_under_autocast():
    model = build_model(EDSRConfig(num_blocks=1, num_channels=8), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.rand(1, 3, 4, 4)).dtype == torch.float32


@pytest.mark.parametrize("scale", SCALES)
def test_receptive_radius_bounds_what_a_pixel_reaches_and_is_reached(scale):
    model = build_model(EDSRConfig(scale=scale, num_blocks=2, num_channels=4), seed=0).double()
    radius = model.receptive_radius_px_lr
    size = 2 * radius + 7
    centre = size // 2
    lr_NCHW = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    cell = slice(centre * scale, (centre + 1) * scale)
    model(lr_NCHW)[..., cell, cell].sum().backward()
    reach = [int(i) for i in lr_NCHW.grad[0].abs().sum(dim=(0, 1)).nonzero()]
    assert reach[0] == centre - radius
    assert reach[-1] == centre + radius


@pytest.mark.parametrize("scale", SCALES)
def test_analytic_cost_is_what_pytorch_counts(scale):
    config = EDSRConfig(scale=scale, num_blocks=3, num_channels=8)
    with torch.device("meta"):
        model, lr_NCHW = build_model(config), torch.empty(1, 3, 6, 5)
    counter = FlopCounterMode(display=False)
    with counter:
        model(lr_NCHW)
    assert macs_per_lr_pixel(config) * 6 * 5 * 2 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", 5), ("num_blocks", 0), ("num_channels", -1), ("residual_scaling", 0.0), ("rgb_range", float("inf"))],
)
def test_a_config_out_of_range_names_the_flag(field, value):
    with pytest.raises(ModelError, match=f"--model.{field.replace('_', '-')}"):
        EDSRConfig(**{field: value})
