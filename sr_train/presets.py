"""Named runs: the papers' numbers, and a small one that trains anywhere in a minute."""

from sr_models.edsr import EDSRConfig
from sr_train.config import TrainConfig
from sr_train.options import CheckpointConfig, DataConfig, OptimConfig, RunConfig, ScheduleConfig, ValidationConfig
from sr_train.search_space import Ints
from sr_train.training_space import EDSRSpace, TrainingSpace, space_around

_PAPER_BATCH = 16
_PAPER_LR_PATCH_PX = 48


def _edsr_small() -> TrainConfig[EDSRConfig]:
    """A minute on two CPU cores: x2, because there even a small network beats bicubic clearly on four training
    photos.
    """
    total = 16 * 600
    return TrainConfig(
        model=EDSRConfig(scale=2, num_blocks=4, num_channels=24),
        data=DataConfig(patch_px_hr=48),
        validation=ValidationConfig(interval_patches=total // 3),
        optim=OptimConfig(total_patches=total, ema_decay=0.99),
        schedule=ScheduleConfig(kind="one-cycle", learning_rate=3e-3, warmup_patches=total // 10),
        checkpoint=CheckpointConfig(interval_patches=total // 3),
        run=RunConfig(),
    )


def _edsr_paper(model: EDSRConfig) -> TrainConfig[EDSRConfig]:
    """Lim et al. 2017, section 4.2: 48² LR patches in batches of 16, L1, Adam (0.9, 0.999, 1e-8), 1e-4 halved every
    200,000 updates.

    300,000 updates, as in the authors' code; validated on 0801-0810, RGB, cropped by scale + 6, as there. `data.uri`
    must be given.
    """
    return TrainConfig(
        model=model,
        data=DataConfig(uri="", patch_px_hr=_PAPER_LR_PATCH_PX * model.scale),
        validation=ValidationConfig(
            num_images=10, protocol="psnr@rgb,crop=scale+6", interval_patches=1_000 * _PAPER_BATCH, tile_px_lr=512
        ),
        optim=OptimConfig(total_patches=300_000 * _PAPER_BATCH, global_batch_size=_PAPER_BATCH),
        schedule=ScheduleConfig(kind="step", learning_rate=1e-4, decay_every_patches=200_000 * _PAPER_BATCH),
        checkpoint=CheckpointConfig(interval_patches=1_000 * _PAPER_BATCH),
    )


EDSR_PRESETS: dict[str, TrainConfig[EDSRConfig]] = {
    "edsr-small-x2": _edsr_small(),
    "edsr-baseline-x2": _edsr_paper(EDSRConfig(scale=2)),
    "edsr-baseline-x3": _edsr_paper(EDSRConfig(scale=3)),
    "edsr-baseline-x4": _edsr_paper(EDSRConfig(scale=4)),
    "edsr-x2": _edsr_paper(EDSRConfig(scale=2, num_blocks=32, num_channels=256, residual_scaling=0.1)),
    "edsr-x3": _edsr_paper(EDSRConfig(scale=3, num_blocks=32, num_channels=256, residual_scaling=0.1)),
    "edsr-x4": _edsr_paper(EDSRConfig(scale=4, num_blocks=32, num_channels=256, residual_scaling=0.1)),
}


def edsr_space(base: TrainConfig[EDSRConfig]) -> TrainingSpace[EDSRSpace]:
    """What a sweep varies where nobody says: half, all and twice the base's blocks, half and all of its channels."""
    blocks, channels = base.model.num_blocks, base.model.num_channels
    model = EDSRSpace(
        num_blocks=Ints(values=tuple(dict.fromkeys((max(1, blocks // 2), blocks, 2 * blocks)))),
        num_channels=Ints(values=tuple(dict.fromkeys((max(1, channels // 2), channels)))),
    )
    return space_around(base, model)
