"""SRResNet: size as published, what it computes, what each LR pixel can reach, its buffers on the way through files."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sr_models.architectures import build_model, config_from_dict, config_to_dict, macs_per_lr_pixel, num_parameters
from sr_models.errors import ModelError
from sr_models.inference import upscale_image
from sr_models.srresnet import ResidualBlock, SRResNetConfig
from sr_models.weights import load_matching, load_model, save_model

SCALES = (2, 3, 4)


def tiny(scale=2, **changes):
    return SRResNetConfig(**{"scale": scale, "num_blocks": 2, "num_channels": 4, **changes})


def trained(config, *, seed=0):
    """A network whose BatchNorm statistics have seen batches, with scales and shifts that are not the identity."""
    model = build_model(config, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5, generator=draw)
                layer.bias.uniform_(-0.5, 0.5, generator=draw)
        for _ in range(3):
            model(torch.rand(4, 3, 9, 8, generator=draw))
    return model


@pytest.mark.parametrize(("scale", "stages"), [(2, [2]), (3, [3]), (4, [2, 2])])
def test_layers_are_those_of_figure_4(scale, stages):
    """Counted by the figure: k9n64 PReLU, 16 × (k3n64 BN PReLU k3n64 BN), k3n64 BN, stages of k3n64·f² PReLU, k9n3."""
    channels, prelu, norm = 64, 1, 2 * 64
    head = 9 * 9 * 3 * channels + channels + prelu
    body = 16 * (2 * (9 * channels**2 + norm) + prelu) + 9 * channels**2 + norm
    upsampler = sum((9 * channels + 1) * channels * factor**2 + prelu for factor in stages)
    tail = 9 * 9 * channels * 3 + 3
    counted = num_parameters(SRResNetConfig(scale=scale))
    assert counted == head + body + upsampler + tail
    if scale == 4:
        assert counted == pytest.approx(1.55e6, rel=5e-3)  # what reimplementations report, with 2,112 idle biases more


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("training", [True, False])
def test_output_is_scale_times_the_input_and_every_weight_gets_a_gradient(scale, training):
    model = trained(tiny(scale)).train(training)
    output_NCHW = model(torch.rand(2, 3, 5, 7))
    assert output_NCHW.shape == (2, 3, 5 * scale, 7 * scale)
    output_NCHW.square().mean().backward()
    largest = {
        name: 0.0 if weight.grad is None else weight.grad.abs().max() for name, weight in model.named_parameters()
    }
    # Above rounding noise: a bias before BatchNorm has a gradient too, of 1e-9.
    assert not [name for name, gradient in largest.items() if gradient < 1e-6], "no gradient"


def test_a_block_adds_what_its_layers_compute():
    block = ResidualBlock(4)
    with torch.no_grad():
        block.activation.weight.fill_(0.3)
    x_NCHW = torch.randn(3, 4, 6, 5)
    inner_NCHW = nn.functional.conv2d(x_NCHW, block.conv1.weight, padding=1)
    inner_NCHW = nn.functional.batch_norm(inner_NCHW, None, None, training=True)
    inner_NCHW = torch.where(inner_NCHW > 0, inner_NCHW, 0.3 * inner_NCHW)
    residual_NCHW = nn.functional.conv2d(inner_NCHW, block.conv2.weight, padding=1)
    residual_NCHW = nn.functional.batch_norm(residual_NCHW, None, None, training=True)
    torch.testing.assert_close(block(x_NCHW), x_NCHW + residual_NCHW)


def test_minus_one_and_one_of_the_last_layer_are_black_and_white():
    model = build_model(tiny(), seed=0)
    with torch.no_grad():
        model.tail.weight.zero_()
        model.tail.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        output_NCHW = model(torch.rand(1, 3, 4, 4))
    assert torch.equal(output_NCHW, torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand_as(output_NCHW))


def test_output_keeps_full_precision_under_autocast():
    model = build_model(tiny(), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.rand(1, 3, 4, 4)).dtype == torch.float32
    assert model.double()(torch.rand(1, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("scale", SCALES)
def test_receptive_radius_bounds_what_a_pixel_reaches_and_is_reached(scale):
    model = trained(tiny(scale)).double().eval()
    radius = model.receptive_radius_px_lr
    size = 2 * radius + 7
    centre = size // 2
    lr_NCHW = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    cell = slice(centre * scale, (centre + 1) * scale)
    model(lr_NCHW)[..., cell, cell].sum().backward()
    reach = [int(i) for i in lr_NCHW.grad[0].abs().sum(dim=(0, 1)).nonzero()]
    assert reach[0] == centre - radius
    assert reach[-1] == centre + radius

    def cell_after_changing(column):
        changed_NCHW = lr_NCHW.detach().clone()
        changed_NCHW[..., centre, column] += 0.5
        return model(changed_NCHW)[..., cell, cell]

    with torch.no_grad():
        before_NCHW = model(lr_NCHW)[..., cell, cell]
        assert torch.equal(cell_after_changing(centre + radius + 1), before_NCHW)
        assert not torch.equal(cell_after_changing(centre + radius), before_NCHW)


@pytest.mark.parametrize("scale", SCALES)
def test_in_tiles_is_as_whole_and_leaves_the_statistics_alone(scale):
    model = trained(tiny(scale))
    with torch.no_grad():
        model.tail.weight.mul_(10.0)  # else the image is nearly of one colour, the same however it is cut
    before = copy.deepcopy(model.state_dict())
    lr_HWC = np.random.default_rng(0).integers(0, 256, (43, 61, 3), np.uint8)
    whole_HWC, tiled_HWC = (upscale_image(model, lr_HWC, tile_px_lr=px).astype(int) for px in (99, 17))
    assert whole_HWC.std() > 20
    assert abs(whole_HWC - tiled_HWC).max() <= 1, "one level where float rounding meets rounding to levels"
    assert (whole_HWC == tiled_HWC).mean() > 0.999
    assert model.training, "the mode is left as it was"
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("scale", SCALES)
def test_analytic_cost_is_what_pytorch_counts(scale):
    config = tiny(scale, num_blocks=3, num_channels=8)
    with torch.device("meta"):
        model, lr_NCHW = build_model(config), torch.empty(1, 3, 6, 5)
    counter = FlopCounterMode(display=False)
    with counter:
        model(lr_NCHW)
    assert macs_per_lr_pixel(config) * 6 * 5 * 2 == counter.get_total_flops()


def test_a_config_survives_plain_values():
    config = tiny(3)
    assert config_from_dict("srresnet", config_to_dict(config)) == config


@pytest.mark.parametrize(("field", "value"), [("scale", 5), ("num_blocks", 0), ("num_channels", -1)])
def test_a_config_out_of_range_names_the_flag(field, value):
    with pytest.raises(ModelError, match=f"--model.{field.replace('_', '-')}"):
        SRResNetConfig(**{field: value})


def test_statistics_are_saved_and_loaded_bit_for_bit(tmp_path):
    model = trained(tiny(4))
    save_model(tmp_path / "folder", model.config, model.state_dict())
    loaded = load_model(tmp_path / "folder")
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor) and loaded.state_dict()[key].dtype == tensor.dtype, key
    assert loaded.state_dict()["body_end.1.num_batches_tracked"] == 3
    lr_NCHW = torch.rand(1, 3, 5, 6)
    assert torch.equal(loaded(lr_NCHW), model.eval()(lr_NCHW))


@pytest.mark.parametrize(
    ("scale", "fresh", "unused"),
    [
        (3, {"upsampler.0.weight", "upsampler.0.bias"}, {"upsampler.0.weight", "upsampler.0.bias"}),
        (4, {"upsampler.3.weight", "upsampler.3.bias", "upsampler.5.weight"}, set()),
    ],
)
def test_x3_and_x4_start_from_x2_with_its_statistics(scale, fresh, unused):
    source, model = trained(tiny(2), seed=1), build_model(tiny(scale), seed=2)
    report = load_matching(model, source.state_dict(), config=source.config)
    assert set(report.fresh) == fresh
    assert set(report.unused) == unused
    assert "body_end.1.running_var" in report.loaded
    for key in report.loaded:
        assert torch.equal(model.state_dict()[key], source.state_dict()[key]), key


def test_without_its_statistics_a_network_can_not_be_started_from():
    model = build_model(tiny(4), seed=0)
    state = {key: tensor for key, tensor in build_model(tiny(2)).state_dict().items() if "running" not in key}
    with pytest.raises(ModelError, match=r"besides the upsampler, blocks\.0\.norm1\.running_mean.* differ"):
        load_matching(model, state)
