"""VGG19 features and the perceptual loss: how far two images are apart in the eyes of a network trained to recognise
things.

Johnson, Alahi, Fei-Fei 2016 (https://arxiv.org/abs/1603.08155); SRGAN, Ledig et al. 2017, section 2.2.1
(https://arxiv.org/abs/1609.04802); ESRGAN, Wang et al. 2018, section 3.3 (https://arxiv.org/abs/1809.00219).
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sr_train.perceptual_weights import VGG19_LAYERS, PerceptualConfig

# What torchvision's networks were trained on: RGB in [0, 1], normalised by ImageNet's mean and standard deviation
# (torchvision.transforms._presets.ImageClassification).
IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)
IMAGENET_STD_RGB = (0.229, 0.224, 0.225)

_DISTANCES = {"mse": functional.mse_loss, "l1": functional.l1_loss}


class VGGFeatures(nn.Module):
    """The output of one layer of torchvision's VGG19, frozen and always in evaluation mode.

    Gradients flow to the images, never to the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, state: Mapping[str, Tensor], *, layer: str = "conv5_4", after_relu: bool = True):
        """`state` is that of `load_vgg19_weights`; its tensors are used, not copied, until the module moves.

        KeyError if it ends before the layer.
        """
        super().__init__()
        from torchvision.models import vgg19  # here: it takes seconds to import

        num_modules = VGG19_LAYERS[layer] + (2 if after_relu else 1)
        with torch.device("meta"):  # 144 million parameters, nearly all of them of the classifier, are not made
            features = vgg19(weights=None, init_weights=False).features[:num_modules]
        prefix = "features."
        features.load_state_dict({key: state[prefix + key] for key in features.state_dict()}, assign=True)
        self.features = features
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN_RGB).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD_RGB).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """RGB N×3×H×W in [0, 1], of any float type → features; H and W are halved, rounded down, at each pooling.

        Values outside [0, 1] are allowed: a network's output is not clamped before its loss. conv5_* comes after four
        poolings and needs sides from 16 px. The result has the type in which the convolutions are computed.
        """
        features: Tensor = self.features((images_NCHW.to(self.mean.dtype) - self.mean) / self.std)
        return features

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever the modules around it do."""
        del mode
        return super().train(False)


def perceptual_loss(features: VGGFeatures, sr_NCHW: Tensor, hr_NCHW: Tensor, config: PerceptualConfig) -> Tensor:
    """Mean squared (or absolute) difference of the features of two batches of RGB images in [0, 1]; a float32 scalar.

    SRGAN, equation 5, of features multiplied by `config.feature_scale` (section 3.2: 1/12.75, so that the loss is
    comparable to the MSE). Deviations: the mean is over channels too; and the weights are torchvision's own training,
    on normalised images, not Simonyan and Zisserman's, so the features may have another scale than the one that 1/12.75
    was chosen for. Gradients reach `sr_NCHW` only. Right under autocast: the difference is taken in float32.
    """
    with torch.no_grad():
        hr_features = features(hr_NCHW)
    sr_features = features(sr_NCHW)
    distance = _DISTANCES[config.loss]
    return distance(sr_features.float() * config.feature_scale, hr_features.float() * config.feature_scale)
