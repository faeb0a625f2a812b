"""VGG19 features against torchvision's own network, and what a perceptual loss does with gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VGG19_Weights, vgg19

from sr_train.perceptual_weights import PerceptualConfig, PerceptualWeights, load_vgg19_weights
from sr_train.vgg_features import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB, VGGFeatures, perceptual_loss


@pytest.fixture(scope="module")
def weights() -> PerceptualWeights:
    return load_vgg19_weights(PerceptualConfig(weights="random"))


@pytest.fixture(scope="module")
def reference(weights: PerceptualWeights) -> nn.Sequential:
    """torchvision's features, with the same weights and ReLUs that destroy nothing."""
    with torch.device("meta"):
        features = vgg19(weights=None).features
    features.load_state_dict(
        {key.removeprefix("features."): value for key, value in weights.state.items()}, assign=True
    )
    for module in features:
        if isinstance(module, nn.ReLU):
            module.inplace = False
    assert isinstance(features, nn.Sequential)
    return features.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normalised(images_NCHW: Tensor) -> Tensor:
    """As torchvision's own preprocessing of these weights does it, without its resize."""
    transforms = VGG19_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (transforms.mean, transforms.std))
    return (images_NCHW - mean) / std


def test_the_normalisation_is_that_of_torchvisions_weights() -> None:
    transforms = VGG19_Weights.IMAGENET1K_V1.transforms()
    assert (tuple(transforms.mean), tuple(transforms.std)) == (IMAGENET_MEAN_RGB, IMAGENET_STD_RGB)


@pytest.mark.parametrize(
    ("layer", "after_relu", "num_modules"),
    [("conv1_1", False, 1), ("conv1_1", True, 2), ("conv2_2", False, 8), ("conv5_4", False, 35), ("conv5_4", True, 36)],
)
def test_features_are_those_of_torchvisions_network(
    weights: PerceptualWeights, reference: nn.Sequential, layer: str, after_relu: bool, num_modules: int
) -> None:
    images_NCHW = images(2, 3, 40, 52)
    ours = VGGFeatures(weights.state, layer=layer, after_relu=after_relu)(images_NCHW)
    with torch.no_grad():
        theirs = reference[:num_modules](normalised(images_NCHW))
    assert torch.equal(ours, theirs)
    assert (ours.min() < 0) == (not after_relu)


def test_the_smallest_image_is_16_px(weights: PerceptualWeights) -> None:
    features = VGGFeatures(weights.state)
    assert features(images(1, 3, 16, 16)).shape == (1, 512, 1, 1)
    with pytest.raises(RuntimeError):
        features(images(1, 3, 15, 16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_type_comes_in(weights: PerceptualWeights, dtype: torch.dtype) -> None:
    features = VGGFeatures(weights.state, layer="conv1_2")
    images_NCHW = images(1, 3, 16, 16).to(dtype)
    assert torch.equal(features(images_NCHW), features(images_NCHW.float()))


def test_gradients_reach_the_images_and_never_the_weights(weights: PerceptualWeights) -> None:
    features = VGGFeatures(weights.state)
    sr_NCHW, hr_NCHW = images(1, 3, 32, 32).requires_grad_(), images(1, 3, 32, 32, seed=1).requires_grad_()
    perceptual_loss(features, sr_NCHW, hr_NCHW, PerceptualConfig()).backward()
    assert sr_NCHW.grad is not None
    assert torch.count_nonzero(sr_NCHW.grad) > 0.9 * sr_NCHW.numel()
    assert hr_NCHW.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in features.parameters())


def test_a_step_on_the_loss_lowers_it(weights: PerceptualWeights) -> None:
    """The gradient is that of the loss, through 16 convolutions: following it makes the images more alike."""
    features, config = VGGFeatures(weights.state), PerceptualConfig(feature_scale=1.0)
    hr_NCHW, sr_NCHW = images(1, 3, 32, 32), images(1, 3, 32, 32, seed=1).requires_grad_()
    before = perceptual_loss(features, sr_NCHW, hr_NCHW, config)
    (gradient,) = torch.autograd.grad(before, sr_NCHW)
    moved_NCHW = (sr_NCHW - 0.01 * before * gradient / gradient.square().sum()).detach()
    after = perceptual_loss(features, moved_NCHW, hr_NCHW, config)
    assert float(after.detach() / before.detach()) == pytest.approx(0.99, abs=0.002)


def test_training_the_network_around_it_leaves_it_frozen(weights: PerceptualWeights) -> None:
    around = nn.ModuleDict({"features": VGGFeatures(weights.state, layer="conv1_1"), "own": nn.Linear(1, 1)})
    around.train()
    assert around["own"].training
    assert not any(module.training for module in around["features"].modules())
    assert {name for name, parameter in around.named_parameters() if parameter.requires_grad} == {
        "own.weight",
        "own.bias",
    }


def test_only_its_convolutions_are_in_its_state(weights: PerceptualWeights) -> None:
    features = VGGFeatures(weights.state, layer="conv2_1")
    assert list(features.state_dict()) == [f"features.{i}.{kind}" for i in (0, 2, 5) for kind in ("weight", "bias")]
    with pytest.raises(KeyError):
        VGGFeatures(features.state_dict(), layer="conv2_2")


@pytest.mark.parametrize(("loss", "distance"), [("mse", functional.mse_loss), ("l1", functional.l1_loss)])
def test_the_loss_is_the_distance_of_scaled_features(weights: PerceptualWeights, loss: str, distance: object) -> None:
    features = VGGFeatures(weights.state, layer="conv2_2", after_relu=False)
    sr_NCHW, hr_NCHW = images(2, 3, 24, 24), images(2, 3, 24, 24, seed=1)
    config = PerceptualConfig(loss=loss, layer="conv2_2", after_relu=False)
    expected = distance(features(sr_NCHW), features(hr_NCHW)) / (12.75**2 if loss == "mse" else 12.75)
    torch.testing.assert_close(perceptual_loss(features, sr_NCHW, hr_NCHW, config), expected)
    assert perceptual_loss(features, hr_NCHW, hr_NCHW, config) == 0


def test_under_bf16_autocast_the_loss_is_float32_and_close(weights: PerceptualWeights) -> None:
    features, config = VGGFeatures(weights.state), PerceptualConfig()
    sr_NCHW, hr_NCHW = images(1, 3, 48, 48).requires_grad_(), images(1, 3, 48, 48, seed=1)
    exact = perceptual_loss(features, sr_NCHW, hr_NCHW, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sr_features, hr_features = features(sr_NCHW), features(hr_NCHW)
        rounded = perceptual_loss(features, sr_NCHW, hr_NCHW, config)
    assert sr_features.dtype == torch.bfloat16  # else this shows nothing
    # Only the features are rounded, not their difference.
    scale = config.feature_scale
    assert rounded == functional.mse_loss(sr_features.float() * scale, hr_features.float() * scale)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert float(rounded.detach()) == pytest.approx(float(exact.detach()), rel=0.05)
    assert sr_NCHW.grad is not None
    assert sr_NCHW.grad.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_it_is_the_same_loss(weights: PerceptualWeights) -> None:
    config, sr_NCHW, hr_NCHW = PerceptualConfig(), images(1, 3, 48, 48), images(1, 3, 48, 48, seed=1)
    here = perceptual_loss(VGGFeatures(weights.state), sr_NCHW, hr_NCHW, config)
    on_gpu = VGGFeatures(weights.state).to("cuda", memory_format=torch.channels_last)
    there = perceptual_loss(on_gpu, sr_NCHW.cuda(), hr_NCHW.cuda(), config)
    assert float(there) == pytest.approx(float(here), rel=1e-2)  # TF32 has 10 bits
