"""The groups of options that runs have: typed, frozen, and refused early with the flag's name when they can't be.

Lengths are counted in patches seen, not in steps: two workers with twice the global batch take half the steps and see
the same training.
"""

import re
from dataclasses import dataclass
from typing import Literal


class ConfigError(ValueError):
    """An option, or a combination of options, that can't be run; the message names the flags."""


def require(condition: bool, message: str) -> None:
    """ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(**flags: float) -> None:
    """ConfigError that names the flag (`optim__total_patches` is --optim.total-patches) for any value that is not above
    0.
    """
    for flag, value in flags.items():
        name = flag.replace("__", ".").replace("_", "-")
        require(value > 0, f"--{name}={value} must be greater than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images, and how patches are cut from them."""

    uri: str = "builtin://photos"
    """Dataset: s3://bucket/prefix, a local folder, or builtin://photos."""
    split: str = "train"
    """Which part of the dataset to train on."""
    layout: Literal["auto", "div2k", "bsd500", "benchmark", "folder"] = "auto"
    """How the dataset's files are arranged; auto recognises the official layouts."""
    patch_px_hr: int = 192
    """Side of a training patch, in HR pixels; a multiple of the scale."""
    augment: bool = True
    """Random flips and quarter turns, the same for LR and HR."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable file means: stop before training, or leave it out, counted and named."""
    pool_gib: float = 8.0
    """Memory in GiB that one worker may fill with decoded images; a larger shard streams through a rolling window."""
    window_images: int | None = None
    """Images held at once by all workers together; set by the plan from pool_gib when not given."""
    window_reuse_patches: int = 1024
    """Patches seen (by all workers) between two replacements of an image in the rolling window."""
    placement: Literal["auto", "device", "host"] = "auto"
    """Where the patch pool lies: on the training device, in host memory, or on the device if there is room."""
    decode_threads: int = 4
    """Threads that fetch and decode inside one Ray Data task."""

    def __post_init__(self) -> None:
        require_positive(
            data__patch_px_hr=self.patch_px_hr,
            data__pool_gib=self.pool_gib,
            data__window_reuse_patches=self.window_reuse_patches,
            data__decode_threads=self.decode_threads,
        )
        if self.window_images is not None:
            require_positive(data__window_images=self.window_images)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """What the run is judged by, and when."""

    uri: str | None = None
    """Dataset to validate on; the training dataset's URI when not given."""
    split: str = "valid"
    """Which part of it."""
    layout: Literal["auto", "div2k", "bsd500", "benchmark", "folder"] = "auto"
    """How its files are arranged."""
    num_images: int | None = None
    """Only the first so many images, by name (EDSR's authors watch 0801-0810); all when not given."""
    protocol: Literal["psnr@y,crop=scale", "psnr@rgb,crop=scale", "psnr@rgb,crop=scale+6"] = "psnr@y,crop=scale"
    """How PSNR is measured."""
    best_by: Literal["auto", "psnr", "lpips", "newest"] = "auto"
    """What the best checkpoint is chosen by; auto is psnr, but for an adversarial run lpips where it can be had, else
    newest: a GAN's PSNR is best before it starts."""
    interval_patches: int = 16_000
    """Patches between validations; there is always one at the end."""
    tile_px_lr: int = 192
    """Side of the tiles a large image is upscaled in, LR pixels."""
    early_stop_after: int | None = None
    """Stop after so many validations in a row without a gain; never when not given."""
    early_stop_min_gain_db: float = 0.01
    """What counts as a gain: dB, or LPIPS where the best is chosen by it."""

    def __post_init__(self) -> None:
        require_positive(validation__interval_patches=self.interval_patches, validation__tile_px_lr=self.tile_px_lr)
        if self.num_images is not None:
            require_positive(validation__num_images=self.num_images)
        if self.early_stop_after is not None:
            require_positive(validation__early_stop_after=self.early_stop_after)
        require(
            self.early_stop_min_gain_db >= 0,
            f"--validation.early-stop-min-gain-db={self.early_stop_min_gain_db} must be 0 or more",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over the budget."""

    kind: Literal["constant", "step", "cosine", "one-cycle"] = "cosine"
    """Shape of the learning rate over the budget, after the warm-up."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_patches: int = 0
    """Linear rise from 0 to the peak (for one-cycle: the rising part, cosine-shaped)."""
    decay_every_patches: int = 3_200_000
    """step: patches between decays (EDSR: 200,000 updates of 16 patches)."""
    decay_factor: float = 0.5
    """step: what each decay multiplies the learning rate by."""
    final_fraction: float = 0.0
    """cosine, one-cycle: learning rate at the end of the budget, as a fraction of the peak."""

    def __post_init__(self) -> None:
        require_positive(
            schedule__learning_rate=self.learning_rate,
            schedule__decay_every_patches=self.decay_every_patches,
            schedule__decay_factor=self.decay_factor,
        )
        require(self.warmup_patches >= 0, f"--schedule.warmup-patches={self.warmup_patches} must be 0 or more")
        require(
            0 <= self.final_fraction <= 1, f"--schedule.final-fraction={self.final_fraction} must lie between 0 and 1"
        )
        require(
            self.kind != "one-cycle" or self.warmup_patches > 0,
            "--schedule.kind one-cycle needs --schedule.warmup-patches greater than 0: its rising part",
        )
        require(
            self.final_fraction == 0 or self.kind in ("cosine", "one-cycle"),
            f"--schedule.final-fraction={self.final_fraction} has no meaning for --schedule.kind {self.kind}; "
            "it ends cosine and one-cycle",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Budget, batch and optimiser."""

    total_patches: int = 4_800_000
    """Budget of the run, in patches seen (EDSR: 300,000 updates of 16)."""
    global_batch_size: int = 16
    """Patches per optimiser step, over all workers and accumulation steps."""
    accumulation_steps: int = 1
    """Micro-batches per optimiser step on each worker."""
    loss: Literal["l1", "mse"] = "l1"
    """Pixel loss, on RGB in [0, 1]."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Adam's denominator term."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW) when greater than 0."""
    clip_grad_norm: float | None = None
    """Scale gradients down to this total L2 norm; never when not given."""
    ema_decay: float | None = None
    """Per-step decay of an exponential moving average of the weights, which is then what is validated and
    registered."""
    seed: int = 0
    """Decides initial weights, samples and augmentation."""

    def __post_init__(self) -> None:
        require_positive(
            optim__total_patches=self.total_patches,
            optim__global_batch_size=self.global_batch_size,
            optim__accumulation_steps=self.accumulation_steps,
            optim__adam_epsilon=self.adam_epsilon,
        )
        for name, beta in (("beta1", self.adam_beta1), ("beta2", self.adam_beta2)):
            require(0 <= beta < 1, f"--optim.adam-{name}={beta} must lie in [0, 1)")
        require(self.weight_decay >= 0, f"--optim.weight-decay={self.weight_decay} must be 0 or more")
        require(self.seed >= 0, f"--optim.seed={self.seed} must be 0 or more")
        if self.clip_grad_norm is not None:
            require_positive(optim__clip_grad_norm=self.clip_grad_norm)
        if self.ema_decay is not None:
            require(0 < self.ema_decay < 1, f"--optim.ema-decay={self.ema_decay} must lie between 0 and 1")

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the budget, rounded up to whole steps."""
        return -(-self.total_patches // self.global_batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConfig:
    """How a step is computed, never what: the reference is float32 with everything else off."""

    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Arithmetic of forward and backward: bf16 autocast or float32; auto is bf16 on CUDA and float32 on CPU."""
    channels_last: bool = True
    """Weights and activations with channels innermost, as tensor cores and oneDNN want them."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on on CUDA, and goes on without it, with a warning, where it fails."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the whole step as one CUDA graph; auto is on for a single worker on CUDA."""
    fused_optimizer: bool = True
    """One kernel for Adam, with clipping and the guard against non-finite gradients inside; off waits for the device at
    every step."""
    batch_ahead: bool = True
    """On CUDA, cut the next batch on a side stream while the current one is trained on."""


MAX_PATIENCE_S = 1500
"""Below the 1800 s after which Ray Train's process groups give up a worker that the others wait for, less what the last
attempt takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """What is saved, and what training starts from."""

    interval_patches: int = 16_000
    """Patches between checkpoints; each validation and the end write one too."""
    keep_last: int = 3
    """Newest checkpoints kept, besides the best one and that of the last validation."""
    patience_s: float = 600.0
    """How long storage may refuse a checkpoint, be away or be full before the run ends, in seconds, at most 1500;
    training goes on meanwhile until the next checkpoint is due."""
    init_from: str | None = None
    """Weights to start from: a checkpoint, a folder or models:/NAME; x3/x4 may start from x2 (all but the
    upsampler)."""

    def __post_init__(self) -> None:
        require_positive(checkpoint__interval_patches=self.interval_patches, checkpoint__keep_last=self.keep_last)
        require(
            0 <= self.patience_s <= MAX_PATIENCE_S,
            f"--checkpoint.patience-s={self.patience_s:g} must lie between 0 and {MAX_PATIENCE_S}: the other workers "
            "wait meanwhile, which PyTorch ends after 1800 s",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where the run is recorded and registered."""

    uri: str | None = None
    """MLflow tracking URI; MLFLOW_TRACKING_URI, then sqlite:///mlflow.db in the current folder, when not given."""
    experiment: str = "super-resolution"
    """MLflow experiment."""
    register_as: str | None = None
    """Name of the registered model; ARCHITECTURE-xSCALE when not given."""
    allow_offline: bool = False
    """Train even if the tracking server can't be reached at the start; what it missed is kept and reported."""
    sample_images: int = 2
    """Validation images shown as LR / bicubic / SR / HR at each validation."""
    licence_note: str | None = None
    """What the model's card says of licences, besides what is known of its dataset: whoever registers answers for
    it."""

    def __post_init__(self) -> None:
        require(self.sample_images >= 0, f"--tracking.sample-images={self.sample_images} must be 0 or more")
        # What MLflow would refuse only after training, and '@', with which models:/NAME@alias could not be read.
        require(
            self.register_as is None or re.fullmatch(r"\w([\w -]*[\w-])?", self.register_as) is not None,
            f"--tracking.register-as={self.register_as!r} may hold letters, digits, '-', '_' and inner spaces "
            "only (MLflow refuses '/', ':', '.', '%' and quotes)",
        )
        require(
            self.experiment.strip() != "" and len(self.experiment) <= 500,
            f"--tracking.experiment={self.experiment!r} must have 1 to 500 characters (MLflow)",
        )
        note = self.licence_note
        require(
            note is None or (note.strip() != "" and len(note) <= 2000),
            f"--tracking.licence-note must have 1 to 2000 characters; this has {len(note or '')}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Name, place and workers."""

    name: str | None = None
    """Name of the run; ARCHITECTURE-xSCALE-DATE-TIME when not given."""
    storage: str = "runs"
    """URI below which the run keeps its checkpoints and results."""
    num_workers: int = 1
    """Training workers."""
    min_workers: int | None = None
    """Elastic: train with as many workers as the cluster has room for, between these and num_workers; shrink when a
    node goes and grow when one comes. Always num_workers when not given."""
    resize_interval_s: float = 60.0
    """Elastic: seconds between two looks for room for more workers."""
    wait_for_nodes: bool = False
    """Start although the cluster has no room for the workers now: its autoscaler, or you, will add nodes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What the workers train on; auto is cuda when the cluster has a GPU for each worker."""
    cpus_per_worker: float | None = None
    """CPUs that Ray reserves for a worker; set by the plan when not given."""
    gpus_per_worker: float = 1.0
    """GPU that Ray reserves for a worker: a part of one lets several runs, or trials of a sweep, share it."""
    threads_per_worker: int | None = None
    """PyTorch threads of a worker; set by the plan when not given. Resuming bit for bit needs the same number."""
    max_failures: int = 3
    """How often lost workers are replaced before the run gives up."""
    cost_per_hour: float | None = None
    """Price of the machines per hour, for the plan's estimate."""

    def __post_init__(self) -> None:
        require_positive(run__num_workers=self.num_workers, run__resize_interval_s=self.resize_interval_s)
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.num_workers,
            f"--run.min-workers={self.min_workers} must lie between 1 and --run.num-workers={self.num_workers}",
        )
        require_positive(run__gpus_per_worker=self.gpus_per_worker)
        require(
            self.gpus_per_worker == 1 or (self.gpus_per_worker < 1 and self.num_workers == 1),
            f"--run.gpus-per-worker={self.gpus_per_worker} must be 1, or less for a single worker: NCCL wants a GPU "
            "for each worker of a run, and a worker uses one",
        )
        require(self.max_failures >= 0, f"--run.max-failures={self.max_failures} must be 0 or more")
        if self.name is not None:
            allowed = self.name and all(char.isalnum() or char in "-_." for char in self.name) and self.name[0] != "."
            require(bool(allowed), f"--run.name={self.name!r} may hold letters, digits, '-', '_' and '.' only")
        if self.threads_per_worker is not None:
            require_positive(run__threads_per_worker=self.threads_per_worker)
        if self.cpus_per_worker is not None:
            require_positive(run__cpus_per_worker=self.cpus_per_worker)
        if self.cost_per_hour is not None:
            require(self.cost_per_hour >= 0, f"--run.cost-per-hour={self.cost_per_hour} must be 0 or more")

    @property
    def fewest_workers(self) -> int:
        """Workers that the run can't do without."""
        return self.num_workers if self.min_workers is None else self.min_workers
