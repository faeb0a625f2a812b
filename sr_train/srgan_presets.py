"""Named adversarial runs: SRGAN's numbers, ESRGAN's losses, a patch discriminator, and a small one for any machine."""

from sr_models.discriminators import DiscriminatorConfig
from sr_models.srresnet import SRResNetConfig
from sr_train.adversarial_config import AdversarialConfig, PretrainConfig
from sr_train.gan_options import GanConfig
from sr_train.options import CheckpointConfig, DataConfig, OptimConfig, ScheduleConfig, ValidationConfig
from sr_train.perceptual_weights import PerceptualConfig

_BATCH = 16


def _srgan() -> AdversarialConfig[SRResNetConfig]:
    """Ledig et al. 2017, section 3.2: 96² HR patches in batches of 16; SRResNet on the MSE, 10⁶ updates at 10⁻⁴; then
    10⁵ updates at 10⁻⁴ and 10⁵ at 10⁻⁵, VGG5,4 after its activation divided by 12.75, 10⁻³ of adversarial loss.

    The paper trained on 350,000 images of ImageNet; `data.uri` must be given.
    """
    return AdversarialConfig(
        model=SRResNetConfig(scale=4),
        data=DataConfig(uri="", patch_px_hr=96),
        validation=ValidationConfig(num_images=10, interval_patches=5_000 * _BATCH),
        optim=OptimConfig(total_patches=200_000 * _BATCH, global_batch_size=_BATCH, loss="mse"),
        schedule=ScheduleConfig(
            kind="step", learning_rate=1e-4, decay_every_patches=100_000 * _BATCH, decay_factor=0.1
        ),
        checkpoint=CheckpointConfig(interval_patches=5_000 * _BATCH),
        pretrain=PretrainConfig(
            optim=OptimConfig(total_patches=1_000_000 * _BATCH, global_batch_size=_BATCH, loss="mse"),
            schedule=ScheduleConfig(kind="constant", learning_rate=1e-4),
        ),
        gan=GanConfig(pixel_weight=0.0, perceptual_weight=1.0, adversarial_weight=1e-3),
        perceptual=PerceptualConfig(layer="conv5_4", after_relu=True, feature_scale=1 / 12.75),
    )


def _esrgan_losses() -> AdversarialConfig[SRResNetConfig]:
    """Wang et al. 2018, section 4.1, on SRGAN's networks: features before their activation and unscaled, L1 everywhere,
    relativistic, 10⁻² of pixel and 5·10⁻³ of adversarial loss, 128² HR patches; the learning rate is halved every
    100,000 updates (theirs at 50,000, 100,000, 200,000 and 300,000).
    """
    return AdversarialConfig(
        model=SRResNetConfig(scale=4),
        data=DataConfig(uri="", patch_px_hr=128),
        validation=ValidationConfig(num_images=10, interval_patches=5_000 * _BATCH),
        optim=OptimConfig(total_patches=400_000 * _BATCH, global_batch_size=_BATCH, loss="l1", ema_decay=0.999),
        schedule=ScheduleConfig(kind="step", learning_rate=1e-4, decay_every_patches=100_000 * _BATCH),
        checkpoint=CheckpointConfig(interval_patches=5_000 * _BATCH),
        pretrain=PretrainConfig(
            optim=OptimConfig(total_patches=1_000_000 * _BATCH, global_batch_size=_BATCH, loss="l1"),
            schedule=ScheduleConfig(kind="step", learning_rate=2e-4, decay_every_patches=200_000 * _BATCH),
        ),
        gan=GanConfig(pixel_weight=1e-2, perceptual_weight=1.0, adversarial_weight=5e-3, relativistic=True),
        perceptual=PerceptualConfig(layer="conv5_4", after_relu=False, feature_scale=1.0, loss="l1"),
    )


def _patch_discriminator() -> AdversarialConfig[SRResNetConfig]:
    """1 : 100 of adversarial loss to the features' MSE, Adam 2·10⁻⁴ with β₁ 0.5 (Radford et al. 2016), a verdict per
    16×16 px under spectral normalisation; first phase and length are SRGAN's.
    """
    paper = _srgan()
    adam = OptimConfig(total_patches=200_000 * _BATCH, global_batch_size=_BATCH, loss="mse", adam_beta1=0.5)
    return AdversarialConfig(
        model=paper.model,
        data=paper.data,
        validation=paper.validation,
        optim=adam,
        schedule=ScheduleConfig(
            kind="step", learning_rate=2e-4, decay_every_patches=100_000 * _BATCH, decay_factor=0.1
        ),
        checkpoint=paper.checkpoint,
        pretrain=paper.pretrain,
        gan=GanConfig(pixel_weight=0.0, perceptual_weight=100.0, adversarial_weight=1.0),
        discriminator=DiscriminatorConfig(kind="patch", spectral_norm=True),
        perceptual=PerceptualConfig(layer="conv5_4", after_relu=True, feature_scale=1.0),
    )


def _small() -> AdversarialConfig[SRResNetConfig]:
    """Some minutes on two CPU cores, after VGG19's download: a small generator and discriminator, and VGG2,2 (the
    paper's SRGAN-VGG22). x4, where a network without a skip from input to output comes near bicubic soonest.
    """
    first, second = 16 * 600, 16 * 200
    return AdversarialConfig(
        model=SRResNetConfig(scale=4, num_blocks=4, num_channels=24),
        data=DataConfig(patch_px_hr=96),
        validation=ValidationConfig(interval_patches=second // 2),
        optim=OptimConfig(total_patches=second, loss="l1", ema_decay=0.99),
        schedule=ScheduleConfig(kind="constant", learning_rate=1e-4),
        checkpoint=CheckpointConfig(interval_patches=second // 2),
        pretrain=PretrainConfig(
            optim=OptimConfig(total_patches=first, loss="l1", ema_decay=0.99),
            schedule=ScheduleConfig(kind="one-cycle", learning_rate=3e-3, warmup_patches=first // 10),
        ),
        gan=GanConfig(pixel_weight=1e-2, perceptual_weight=1.0, adversarial_weight=1e-3),
        discriminator=DiscriminatorConfig(kind="patch", num_channels=16, spectral_norm=True),
        perceptual=PerceptualConfig(layer="conv2_2"),
    )


SRGAN_PRESETS: dict[str, AdversarialConfig[SRResNetConfig]] = {
    "srgan-small-x4": _small(),
    "srgan-x4": _srgan(),
    "srgan-esrgan-losses-x4": _esrgan_losses(),
    "srgan-patch-x4": _patch_discriminator(),
}
