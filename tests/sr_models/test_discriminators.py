"""Discriminators: shapes, what a logit sees, spectral normalisation, weights by seed and through files."""

import copy
import itertools

import pytest
import safetensors.torch
import torch
from torch import nn

from sr_models.discriminators import DiscriminatorConfig, build_discriminator
from sr_models.errors import ModelError

KINDS = ("vgg", "patch")
VARIANTS = list(itertools.product(KINDS, (False, True)))


def tiny(kind="vgg", *, spectral_norm=False, patch_px_hr=32, seed=0):
    config = DiscriminatorConfig(kind=kind, num_channels=4, spectral_norm=spectral_norm)
    return build_discriminator(config, patch_px_hr=patch_px_hr, seed=seed)


def layers_with_weights(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def images(num, px, *, seed=0):
    return torch.rand(num, 3, px, px, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize(("patch_px_hr", "positions"), [(16, 1), (32, 2), (96, 6), (100, 7), (128, 8), (192, 12)])
def test_one_logit_per_patch_or_per_16_px(patch_px_hr, positions, spectral_norm):
    patches_NCHW = images(2, patch_px_hr)
    for kind, shape in (("vgg", (2, 1)), ("patch", (2, 1, positions, positions))):
        model = tiny(kind, spectral_norm=spectral_norm, patch_px_hr=patch_px_hr)
        assert model(patches_NCHW).shape == shape
        assert model.eval()(patches_NCHW).shape == shape


def test_the_default_at_96_px_is_srgans():
    """Counted by figure 4: eight k3 convolutions, BatchNorm after all but the first, dense 1024, dense 1."""
    with torch.device("meta"):
        model = build_discriminator(DiscriminatorConfig(), patch_px_hr=96, seed=0)
    channels = (3, 64, 64, 128, 128, 256, 256, 512, 512)
    convolutions = sum(9 * inner * outer + 2 * outer for inner, outer in itertools.pairwise(channels)) - 64
    dense = (6 * 6 * 512 + 1) * 1024 + 1024 + 1
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + dense
    strides = [layer.stride[0] for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert strides == [1, 2] * 4


@pytest.mark.parametrize(("kind", "spectral_norm"), VARIANTS)
def test_every_parameter_and_the_images_get_a_gradient(kind, spectral_norm):
    model = tiny(kind, spectral_norm=spectral_norm)
    patches_NCHW = images(4, 32).requires_grad_()
    nn.functional.softplus(model(patches_NCHW)).mean().backward()
    largest = {
        name: 0.0 if weight.grad is None else weight.grad.abs().max() for name, weight in model.named_parameters()
    }
    # Above rounding noise: a bias before BatchNorm has a gradient too, of 1e-9.
    assert not [name for name, gradient in largest.items() if gradient < 1e-6], "no gradient"
    assert patches_NCHW.grad is not None and (patches_NCHW.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_see_minus_one_to_one(kind):
    model, seen = tiny(kind), []
    model.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 0.5), torch.ones(3, 32, 32)]))
    assert seen[0][:, 0, 0, 0].tolist() == [-1.0, 0.0, 1.0]


def test_a_logit_of_patch_sees_61_px_around_its_pixel():
    model = tiny("patch").double().eval()
    patches_NCHW = torch.rand(1, 3, 112, 128, dtype=torch.float64, requires_grad=True)
    logits_N1HW = model(patches_NCHW)
    assert logits_N1HW.shape == (1, 1, 7, 8)
    logits_N1HW[0, 0, 3, 4].backward()
    seen_HW = patches_NCHW.grad[0].abs().sum(dim=0)
    for dim, centre in ((1, 3 * 16), (0, 4 * 16)):
        reach = [int(i) for i in seen_HW.sum(dim=dim).nonzero()]
        assert (reach[0], reach[-1]) == (centre - 30, centre + 30)


@pytest.mark.parametrize("kind", KINDS)
def test_spectral_norm_stays_at_one_while_the_weights_are_trained(kind):
    model = tiny(kind, spectral_norm=True)
    assert not [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for step in range(60):
        real, fake = images(4, 32, seed=step), images(4, 32, seed=step).round()
        (nn.functional.softplus(model(fake)).mean() + nn.functional.softplus(-model(real)).mean()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad.sign()  # as far as Adam goes
                parameter.grad = None
    layers = layers_with_weights(model.eval())
    assert len(layers) == (10 if kind == "vgg" else 9)
    used, trained = (
        [float(torch.linalg.matrix_norm(weight.detach().flatten(1), ord=2)) for weight in weights]
        for weights in (
            [layer.weight for layer in layers],
            [layer.parametrizations.weight.original for layer in layers],
        )
    )
    assert all(1.0 - 1e-5 < norm < 1.1 for norm in used), "the estimate comes from below"
    assert sum(0.9 < norm < 1.1 for norm in trained) <= 1, "weights that have this norm anyway show nothing"


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_forward_pass_is_one_step_of_power_iteration_in_float32(device):
    model = tiny("patch", spectral_norm=True).to(device)
    layer = model.features[2]
    weight = layer.parametrizations.weight.original.detach().flatten(1)
    normalise = nn.functional.normalize
    for autocast in (False, True):
        before = copy.deepcopy(layer.parametrizations.weight[0]._v)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(images(2, 32).to(device))
        assert logits.dtype == torch.float32
        u = normalise(weight @ before, dim=0)
        torch.testing.assert_close(layer.parametrizations.weight[0]._u, u)
        torch.testing.assert_close(layer.parametrizations.weight[0]._v, normalise(weight.T @ u, dim=0))
    state = copy.deepcopy(model.state_dict())
    model.eval()(images(2, 32).to(device))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), "only in training"


@pytest.mark.parametrize(("kind", "spectral_norm"), VARIANTS)
def test_a_restored_discriminator_goes_on_with_the_same_bits(kind, spectral_norm):
    model, other = (tiny(kind, spectral_norm=spectral_norm, seed=seed) for seed in (1, 2))
    for step in range(3):
        model(images(2, 32, seed=step))
    stored = safetensors.torch.save(dict(model.state_dict()))  # refuses tensors that share memory or have gaps
    other.load_state_dict(safetensors.torch.load(stored))
    for step in (3, 4):
        ours, theirs = (network(images(2, 32, seed=step)) for network in (model, other))
        assert torch.equal(ours, theirs)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(("kind", "spectral_norm"), VARIANTS)
def test_a_seed_alone_decides_the_weights_and_leaves_the_global_generator_alone(kind, spectral_norm):
    before = torch.random.get_rng_state()
    first, again, other = (tiny(kind, spectral_norm=spectral_norm, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items() if name.endswith("original"))
    assert not torch.equal(first["features.0.bias"], other["features.0.bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_patches_that_are_too_small_name_the_flag(kind):
    with pytest.raises(ModelError, match=r"data\.patch_px_hr=15 .* at least 16 \(--data\.patch-px-hr\)"):
        tiny(kind, patch_px_hr=15)


def test_vgg_says_which_size_it_was_built_for():
    with pytest.raises(ModelError, match="built for 32×32 px, the images are 48×33"):
        tiny("vgg", patch_px_hr=32)(torch.rand(2, 3, 33, 48))


@pytest.mark.parametrize(("field", "value"), [("kind", "unet"), ("num_channels", 0)])
def test_a_config_out_of_range_names_the_flag(field, value):
    with pytest.raises(ModelError, match=f"--discriminator.{field.replace('_', '-')}"):
        DiscriminatorConfig(**{field: value})
