"""Networks in others' layouts, imported: ours gives what theirs gives. What does not fit is refused by name."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from sr_models.architectures import build_model, config_to_dict
from sr_models.errors import ModelError
from sr_models.foreign_layout import ForeignWeightsError, Given, Imported
from sr_models.foreign_weights import convert, unwrap
from tests.support.foreign import BasicSrEdsr, EdsrPyTorch, SrganPyTorch, TanhGenerator

EDSR = {"architecture_name": "edsr", "scale": 2}
SRRESNET = {"architecture_name": "srresnet", "scale": 2}


def edsr_pytorch(**changes: object) -> EdsrPyTorch:
    torch.manual_seed(0)
    return EdsrPyTorch(**{"scale": 2, **changes})


def basicsr(**changes: object) -> BasicSrEdsr:
    torch.manual_seed(0)
    return BasicSrEdsr(**{"scale": 2, **changes})


def srgan(**changes: object) -> SrganPyTorch:
    torch.manual_seed(0)
    return SrganPyTorch(**{"scale": 2, **changes})


def tanh(**changes: object) -> TanhGenerator:
    torch.manual_seed(0)
    return TanhGenerator(**{"scale": 2, **changes})


def ours(imported: Imported) -> nn.Module:
    network = build_model(imported.config, seed=1)
    network.load_state_dict(imported.state)
    return network.eval()


@torch.no_grad()
def assert_same_images(theirs: nn.Module, imported: Imported) -> None:
    """On noise as well: every pixel, borders too, in [0, 1] to float rounding. And the blocks have their say."""
    lr_NCHW = torch.rand(2, 3, 11, 14, generator=torch.Generator().manual_seed(2))
    expected = theirs.upscale(lr_NCHW)
    torch.testing.assert_close(ours(imported)(lr_NCHW).clamp(0, 1), expected.clamp(0, 1), rtol=0, atol=3e-6)
    enlarged = nn.functional.interpolate(lr_NCHW, scale_factor=imported.config.scale)
    assert (expected - enlarged).abs().mean() > 0.002


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("network", [edsr_pytorch, basicsr])
def test_an_edsr_gives_the_same_images(network, scale):
    theirs = network(scale=scale, num_blocks=3, res_scale=0.5)
    given = Given(residual_scaling=0.5)
    imported = convert(theirs.state_dict(), architecture_name="edsr", scale=scale, given=given)
    assert_same_images(theirs, imported)
    assert config_to_dict(imported.config) == {
        "scale": scale,
        "num_blocks": 3,
        "num_channels": 6,
        "residual_scaling": 0.5,
        "rgb_range": 255.0,
    }


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("names", ["conv", "conv_block", "flat"])
def test_an_srresnet_gives_the_same_images(names, scale):
    theirs = srgan(names=names, scale=scale, num_blocks=3)
    imported = convert(theirs.state_dict(), architecture_name="srresnet", scale=scale)
    assert_same_images(theirs, imported)
    assert config_to_dict(imported.config) == {
        "scale": scale,
        "num_blocks": 3,
        "num_channels": 6,
        "output": "linear",
    }


@pytest.mark.parametrize("scale", [2, 4])
def test_a_generator_that_ends_in_tanh_and_has_biases_before_batch_norm_gives_the_same_images(scale):
    theirs = tanh(scale=scale)
    imported = convert(theirs.state_dict(), architecture_name="srresnet", scale=scale)
    assert_same_images(theirs, imported)
    assert config_to_dict(imported.config) == {"scale": scale, "num_blocks": 5, "num_channels": 6, "output": "tanh"}


def test_the_pixel_range_is_read_from_the_mean_shift():
    theirs = edsr_pytorch(rgb_range=1.0)
    imported = convert(theirs.state_dict(), **EDSR)
    assert imported.config.rgb_range == 1.0
    assert_same_images(theirs, imported)
    with pytest.raises(ForeignWeightsError, match=r"0…1, not 0…255 \(--rgb-range\)"):
        convert(theirs.state_dict(), **EDSR, given=Given(rgb_range=255.0))


def test_a_pixel_range_that_the_file_does_not_hold_is_a_flag():
    theirs = basicsr(img_range=1.0)
    assert_same_images(theirs, convert(theirs.state_dict(), **EDSR, given=Given(rgb_range=1.0)))
    assumed = convert(theirs.state_dict(), **EDSR)
    assert assumed.config.rgb_range == 255.0
    assert any("rgb_range 255" in note and "--rgb-range" in note for note in assumed.notes)


def test_without_a_mean_shift_div2ks_is_assumed_and_said():
    theirs = edsr_pytorch()
    state = {key: tensor for key, tensor in theirs.state_dict().items() if "mean" not in key}
    imported = convert(state, **EDSR)
    assert_same_images(theirs, imported)
    assert any("no mean shift in the file" in note for note in imported.notes)


@pytest.mark.parametrize(("channels", "factor"), [(256, 0.1), (64, 1.0), (6, 1.0)])
@pytest.mark.parametrize("network", [edsr_pytorch, basicsr])
def test_residual_scaling_is_the_authors_unless_given(network, channels, factor):
    imported = convert(network(channels=channels, num_blocks=1).state_dict(), **EDSR)
    assert imported.config.residual_scaling == factor
    assert any(f"residual_scaling {factor:g}" in note and "--residual-scaling" in note for note in imported.notes)


def test_another_mean_is_refused():
    with pytest.raises(ForeignWeightsError, match=r"another mean than DIV2K's.*sub_mean\.bias \(-114\.75"):
        convert(edsr_pytorch(mean=(0.45, 0.4371, 0.4040)).state_dict(), **EDSR)


def test_a_mean_shift_that_also_scales_is_refused():
    theirs = edsr_pytorch()
    theirs.sub_mean.weight.data *= 0.5
    with pytest.raises(ForeignWeightsError, match="sub_mean does more than shift"):
        convert(theirs.state_dict(), **EDSR)


def test_files_of_old_pytorch_have_no_counters_of_batches():
    theirs = srgan()
    state = {key: tensor for key, tensor in theirs.state_dict().items() if "num_batches" not in key}
    imported = convert(state, **SRRESNET)
    assert_same_images(theirs, imported)
    assert any("num_batches_tracked of 5 BatchNorms" in note for note in imported.notes)


def test_half_precision_is_widened_before_anything_is_computed():
    theirs = srgan().half().float()
    state = {key: it.half() if it.is_floating_point() else it for key, it in theirs.state_dict().items()}
    imported = convert(state, **SRRESNET)
    assert {tensor.dtype for tensor in imported.state.values()} == {torch.float32, torch.int64}
    assert_same_images(theirs, imported)
    assert "float16 converted to float32" in imported.notes


def test_imported_tensors_are_copies_without_gradients():
    theirs = edsr_pytorch()
    imported = convert(dict(theirs.named_parameters()), **EDSR)
    theirs.tail[1].weight.data.zero_()
    assert imported.state["tail.weight"].abs().sum() > 0
    assert not any(tensor.requires_grad for tensor in imported.state.values())


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: state, None),
        (lambda state: OrderedDict((f"module.{key}", it) for key, it in state.items()), "'module.' taken off"),
        (lambda state: {f"module.model.{key}": it for key, it in state.items()}, "'model.' taken off"),
        (lambda state: {"params": state}, "taken: 'params'"),
        (lambda state: {"params": {"wrong": torch.ones(1)}, "params_ema": state}, "left: params"),
        (lambda state: {"epoch": 3, "state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}}, "left: epoch"),
        (lambda state: {"model": state, "optimizer": {"lr": 1.0}}, "left: optimizer"),
    ],
)
def test_wrappers_are_taken_off_and_said(wrap, note):
    state = basicsr().state_dict()
    tensors, notes = unwrap(wrap(state))
    assert list(tensors) == list(state)
    assert all(tensors[key] is state[key] for key in state)
    assert note is None if not notes else any(note in line for line in notes)


def test_an_entry_can_be_chosen():
    plain, averaged = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    both = {"params": plain, "params_ema": averaged}
    assert unwrap(both)[0]["a"] == 1
    assert unwrap(both, entry="params")[0]["a"] == 0
    with pytest.raises(ForeignWeightsError, match=r"under 'generator'; there are: params, params_ema \(--entry\)"):
        unwrap(both, entry="generator")


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (torch.zeros(3), "holds one Tensor"),
        ({}, "it is empty"),
        ({"epoch": 3, "w": torch.zeros(1)}, "not only tensors by name: epoch"),
        ({"generator": {"w": torch.zeros(1)}}, "not only tensors by name: generator"),
    ],
)
def test_what_holds_no_network_is_refused(loaded, message):
    with pytest.raises(ForeignWeightsError, match=message):
        unwrap(loaded)


def without(state, *keys):
    return {key: tensor for key, tensor in state.items() if key not in keys}


def with_more(state, **more):
    return {**state, **{key.replace("__", "."): tensor for key, tensor in more.items()}}


NAN = torch.tensor([float("nan"), 0.0, 0.0])


@pytest.mark.parametrize(
    ("state", "options", "messages"),
    [
        (lambda: without(edsr_pytorch().state_dict(), "body.1.body.2.bias"), EDSR, ["missing: body.1.body.2.bias"]),
        (lambda: without(edsr_pytorch().state_dict(), "add_mean.bias"), EDSR, ["missing: add_mean.bias"]),
        (
            lambda: {key: it for key, it in edsr_pytorch(num_blocks=4).state_dict().items() if "body.1." not in key},
            EDSR,
            ["missing: body.1.body.0.weight, body.1.body.0.bias"],
        ),
        (lambda: with_more(basicsr().state_dict(), extra__weight=torch.zeros(1)), EDSR, ["no place for: extra.weight"]),
        (lambda: srgan(bias=True, num_blocks=9).state_dict(), SRRESNET, ["for: conv2.0.bias, trunk", "(19 in all)"]),
        (lambda: edsr_pytorch(scale=4).state_dict(), EDSR, ["an x4 network, not x2 (--scale)"]),
        (lambda: srgan(scale=8).state_dict(), {**SRRESNET, "scale": 8}, ["x8 network; this project's are x2, x3, x4"]),
        (lambda: edsr_pytorch().state_dict(), SRRESNET, ["EDSR-PyTorch's EDSR", "--architecture edsr"]),
        (lambda: srgan().state_dict(), EDSR, ["SRGAN-PyTorch's SRResNet", "--architecture srresnet"]),
        (lambda: without(tanh().state_dict(), "block6.bn2.bias"), SRRESNET, ["leftthomas", "missing: block6.bn2.bias"]),
        (lambda: tanh(old=True).state_dict(), SRRESNET, ["before May 2019", "can't be imported", "a PReLU, where"]),
        (lambda: nn.Linear(2, 2).state_dict(), EDSR, ["no known layout of 'edsr': weight, bias", "BasicSR's EDSR"]),
        (lambda: ours(convert(srgan().state_dict(), **SRRESNET)).state_dict(), SRRESNET, ["this project's own"]),
        (
            lambda: with_more(basicsr().state_dict(), conv_first__weight=torch.zeros(6, 1, 3, 3)),
            EDSR,
            ["head.weight is (6, 1, 3, 3) instead of (6, 3, 3, 3)"],
        ),
        (
            lambda: with_more(srgan().state_dict(), trunk__0__rcb__2__weight=torch.zeros(6)),
            SRRESNET,
            ["blocks.0.activation.weight is (6,) instead of (1,)"],
        ),
        (lambda: with_more(basicsr().state_dict(), conv_last__bias=NAN), EDSR, ["infinite values: conv_last.bias"]),
        (
            lambda: with_more(basicsr().state_dict(), conv_last__bias=torch.zeros(3, dtype=torch.complex64)),
            EDSR,
            ["not plain real numbers: conv_last.bias (complex64, strided)"],
        ),
        (
            lambda: with_more(basicsr().state_dict(), conv_last__weight=torch.zeros(1).expand(3, 10**12, 3, 3)),
            EDSR,
            ["more elements than numbers", "conv_last.weight (3, 1000000000000, 3, 3)"],
        ),
        (
            lambda: with_more(tanh().state_dict(), block2__conv1__bias=torch.zeros(6, 1)),
            SRRESNET,
            ["blocks.0.conv1.bias is (6, 1) instead of (6,)"],
        ),
        (lambda: srgan().state_dict(), {**SRRESNET, "given": Given(rgb_range=255.0)}, ["--rgb-range 255: is of EDSR"]),
        (lambda: basicsr().state_dict(), {**EDSR, "given": Given(residual_scaling=0.0)}, ["residual_scaling=0"]),
        (lambda: basicsr().state_dict(), {**EDSR, "architecture_name": "vdsr"}, ["unknown architecture 'vdsr'"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(state, options, messages):
    with pytest.raises(ModelError) as error:
        convert(state(), **options)
    assert all(message in str(error.value) for message in messages), str(error.value)
