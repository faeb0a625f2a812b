"""Config → what would happen, and what stands against it: everything that can be known before a GPU is asked for."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from sr_data.errors import DataError, StorageError
from sr_data.manifest import Manifest, load_manifest
from sr_data.sampling import SamplePlan, slot_range, worker_samples
from sr_data.storage import Store, open_store
from sr_models.errors import ModelError
from sr_train import checkpoint as ckpt
from sr_train.config import TrainConfig
from sr_train.initial_weights import InitialWeights, load_initial_weights
from sr_train.method import Assets
from sr_train.methods import method_of
from sr_train.metrics import smallest_side_px
from sr_train.options import ConfigError
from sr_train.perceptual_metric import SMALLEST_SIDE_PX
from sr_train.perceptual_weights import PerceptualWeightsError
from sr_train.placement import ClusterFacts, place, placement_warnings
from sr_train.pool_size import choose_window
from sr_train.run_folder import CONFIG_KEY, DATASETS_KEY, checkpoint_store
from sr_train.step_mode import StepMode, step_mode
from sr_train.tracking_server import TrackingError, check_tracking, redact, resolve_tracking_uri
from sr_train.upscaler import UpscalerError

T = TypeVar("T")

_JOB_FOLDERS = "/runtime_resources/"
"""Part of the path where Ray unpacks what `ray job submit --working-dir` sent."""


class PlanError(ValueError):
    """What stands against the run: every problem found, each with its flag."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        listed = (f"- {problem.replace(chr(10), chr(10) + '  ')}" for problem in problems)
        super().__init__(problems[0] if len(problems) == 1 else "\n".join([f"{len(problems)} problems:", *listed]))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run with nothing left open."""

    config: TrainConfig[Any]
    """Resolved: name, storage, tracking, device, CPUs, threads and window are set."""
    train: Manifest
    validation: Manifest
    samples: SamplePlan
    tracking_uri: str
    """Where the run is tracked. It may hold a password, so the config, which is saved and shown, has it without."""
    tracking_reachable: bool
    goes_on_from: str | None
    """Newest checkpoint of the run, where it has one."""
    initial_weights: InitialWeights | None
    """Of another model, for a run that begins with them."""
    assets: Assets
    """What the method prepared for the workers."""
    warnings: tuple[str, ...]
    resume_name: str
    """The --run.name by which the user goes on with it."""
    parent_run_id: str | None = None
    """The MLflow run that this one belongs to, where there is one."""

    @property
    def run_uri(self) -> str:
        return _run_store(self.config).uri

    @property
    def step_mode(self) -> StepMode:
        """How steps are computed on the device that the plan chose."""
        run = self.config.run
        return step_mode(self.config.step, device_type=run.device, num_workers=run.num_workers)

    def shard_slots(self, rank: int) -> range:
        optim = self.config.optim
        part = worker_samples(
            optim.global_batch_size,
            rank=rank,
            num_workers=self.config.run.num_workers,
            unit=optim.accumulation_steps,
        )
        return slot_range(self.samples, part.start, len(part))


@dataclass(frozen=True, kw_only=True, slots=True)
class _RunState:
    """What there is of the run already."""

    exists: bool
    newest_checkpoint: str | None = None
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the datasets it was trained and validated on; empty if it did not get so far."""


class _Problems:
    """What was found to stand against the run, each thing once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._seen: set[str] = set()

    def attempt(self, about: str, check: Callable[[], T], *errors: type[Exception]) -> T | None:
        """What `check` returns; None if it raises one of `errors`, which is noted under the heading `about`."""
        try:
            return check()
        except errors as error:
            # Training and validation set are often one dataset, whose storage or images fail alike for both.
            if str(error) not in self._seen:
                self._seen.add(str(error))
                self.texts.append(f"{about}: {error}" if about else str(error))
            return None


def make_plan(
    config: TrainConfig[Any],
    cluster: ClusterFacts,
    *,
    resume: bool,
    resume_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    now: datetime | None = None,
) -> Plan:
    """Checks data, storage, tracking, starting weights and resources, and fills in what the config left open. Writes
    nothing but the manifests' cache, beside the runs. PlanError lists all problems.
    """
    problems = _Problems()
    tracking_uri = resolve_tracking_uri(config.tracking.uri)
    config = _named(config, redact(tracking_uri), now or datetime.now())
    found = problems.attempt("", lambda: _run_state(config, resume=resume), StorageError, ConfigError)
    reachable = problems.attempt("", lambda: _check_tracking(config, tracking_uri), TrackingError)
    run = problems.attempt("", lambda: place(config.run, cluster), ConfigError)
    cache = open_store(f"{config.run.storage}/.manifests") if found is not None else None
    train = problems.attempt(
        "training set (--data.uri)", lambda: _train_manifest(config, cache, progress), DataError, StorageError
    )
    validation = problems.attempt(
        "validation set (--validation.uri)", lambda: _validation_manifest(config, cache), DataError, StorageError
    )
    weights = None
    if found is None or found.newest_checkpoint is None:
        weights = problems.attempt(
            "weights to start from (--checkpoint.init-from)",
            lambda: load_initial_weights(config, tracking_uri=tracking_uri),
            *(UpscalerError, ModelError, ckpt.CheckpointError, StorageError, TrackingError),
        )
    assets = problems.attempt(
        "",
        lambda: method_of(config).prepare(config, tracking_uri),
        *(ConfigError, PerceptualWeightsError, UpscalerError, ModelError, ckpt.CheckpointError, StorageError),
        TrackingError,
    )
    if assets is not None and assets.lpips is not None and validation is not None:
        problems.attempt("", partial(_check_lpips_sides, validation), DataError)
    samples = None
    if run is not None:
        find_mode = partial(step_mode, config.step, device_type=run.device, num_workers=run.num_workers)
        problems.attempt("", find_mode, ConfigError)
    if run is not None and train is not None:
        config = dataclasses.replace(config, run=run)
        windowed = problems.attempt("", lambda: choose_window(config, train), ConfigError, DataError)
        config, samples = windowed or (config, None)
    if found is not None and train is not None and validation is not None:
        problems.attempt("", lambda: _check_same_run(config, found, train, validation), ConfigError)
    if problems.texts or found is None or train is None or validation is None or samples is None or assets is None:
        raise PlanError(problems.texts)
    warnings = [
        *_resume_warnings(config, found, resume=resume),
        *placement_warnings(config.run, cluster),
        *_data_warnings(config, cluster, train, validation),
    ]
    return Plan(
        config=config,
        train=train,
        validation=validation,
        samples=samples,
        tracking_uri=tracking_uri,
        tracking_reachable=bool(reachable),
        goes_on_from=found.newest_checkpoint,
        initial_weights=weights,
        assets=assets,
        resume_name=resume_name or config.run.name or "",
        warnings=tuple(warnings),
    )


def _resume_warnings(config: TrainConfig[Any], found: _RunState, *, resume: bool) -> Iterator[str]:
    if resume and not found.exists:
        yield f"there is no run {config.run.name!r} to resume in {config.run.storage}: this one begins at step 0"


def _data_warnings(
    config: TrainConfig[Any], cluster: ClusterFacts, train: Manifest, validation: Manifest
) -> Iterator[str]:
    shared = {record.hr_sha256 for record in train.images} & {record.hr_sha256 for record in validation.images}
    if shared:
        yield (
            f"{len(shared)} of {len(validation.images)} validation images are training images too: scores will flatter "
            f"(--validation.uri, --validation.split)"
        )
    local = [uri for uri in (config.run.storage, config.tracking.uri or "") if _JOB_FOLDERS in uri]
    if local:
        yield (
            f"{', '.join(local)}: lies in the job's working folder, which Ray deletes some time after the job "
            f"(--run.storage, --tracking.uri)"
        )
    if len(cluster.cpus_per_node) > 1:
        places = {"--run.storage": config.run.storage, "--data.uri": train.uri, "--validation.uri": validation.uri}
        for flag, uri in places.items():
            if "://" not in uri:
                yield f"{uri} must be the same folder on all {len(cluster.cpus_per_node)} nodes ({flag})"
        if (config.tracking.uri or "").startswith("sqlite:"):
            yield f"{config.tracking.uri} must be the same file on all nodes; use an MLflow server (--tracking.uri)"


def _named(config: TrainConfig[Any], tracking_uri: str, now: datetime) -> TrainConfig[Any]:
    kind = f"{method_of(config).model_name(config)}-x{config.model.scale}"
    try:
        storage = open_store(config.run.storage).uri
    except StorageError as error:
        raise PlanError([f"the run's folder (--run.storage): {error}"]) from error
    name = config.run.name or default_name(config, now)
    tracking = dataclasses.replace(
        config.tracking,
        uri=tracking_uri,
        register_as=config.tracking.register_as or kind,
    )
    run = dataclasses.replace(config.run, name=name, storage=storage)
    return dataclasses.replace(config, run=run, tracking=tracking)


def default_name(config: TrainConfig[Any], now: datetime) -> str:
    """What a run is called when its user does not say."""
    return f"{method_of(config).model_name(config)}-x{config.model.scale}-{now:%Y%m%d-%H%M%S}"


def _run_store(config: TrainConfig[Any]) -> Store:
    return open_store(f"{config.run.storage.rstrip('/')}/{config.run.name}")


def _run_state(config: TrainConfig[Any], *, resume: bool) -> _RunState:
    """Raises StorageError if nothing can be written there, ConfigError if the run is there and not to be resumed."""
    store = _run_store(config)
    try:
        exists = store.exists(CONFIG_KEY)
        # Not in a run's folder that there isn't yet: a plan leaves none behind.
        (store if exists else open_store(config.run.storage)).check_writable()
        newest = ckpt.latest_key(checkpoint_store(store.uri))
        fingerprints = json.loads(store.read_text(DATASETS_KEY)) if store.exists(DATASETS_KEY) else {}
    except StorageError as error:
        raise StorageError(f"the run's folder (--run.storage): {error}") from error
    if exists and not resume:
        state = f"its newest checkpoint is {newest}" if newest else "it has no checkpoint yet"
        raise ConfigError(
            f"run {config.run.name!r} exists at {store.uri} ({state}): "
            "go on with it by --resume, or choose another --run.name"
        )
    return _RunState(exists=exists, newest_checkpoint=newest, fingerprints=fingerprints)


def _check_same_run(config: TrainConfig[Any], found: _RunState, train: Manifest, validation: Manifest) -> None:
    """ConfigError if a run that has a checkpoint would go on with other images (other samples than an uninterrupted
    run's, scores that can't be compared), or with a budget that it has passed.
    """
    if found.newest_checkpoint is None:
        return
    checkpoint = checkpoint_store(_run_store(config).uri).uri_of(found.newest_checkpoint)
    for flag, manifest, before in (
        ("--data.uri", train, found.fingerprints.get("train", train.fingerprint)),
        ("--validation.uri", validation, found.fingerprints.get("validation", validation.fingerprint)),
    ):
        if before != manifest.fingerprint:
            raise ConfigError(
                f"{manifest.uri} ({flag}) holds other images (fingerprint {manifest.fingerprint}) than run "
                f"{config.run.name!r} began with ({before}). Give it those images, or start another run from its "
                f"weights: --run.name NEW --checkpoint.init-from {checkpoint}"
            )
    optim, trained_steps = config.optim, ckpt.step_of_key(found.newest_checkpoint) or 0
    if trained_steps > optim.total_steps:
        raise ConfigError(
            f"--optim.total-patches {optim.total_patches}: run {config.run.name!r} has seen "
            f"{trained_steps * optim.global_batch_size} already"
        )


def _check_lpips_sides(validation: Manifest) -> None:
    small = [record.hr_key for record in validation.images if min(record.width, record.height) < SMALLEST_SIDE_PX]
    if small:
        raise DataError(
            f"{validation.uri}: {len(small)} images with a side below {SMALLEST_SIDE_PX} px have no LPIPS, {small[0]} "
            f"for one: validate on others (--validation.uri), or without LPIPS (--perceptual.lpips-weights none)"
        )


def _check_tracking(config: TrainConfig[Any], tracking_uri: str) -> bool:
    try:
        check_tracking(tracking_uri)
    except TrackingError as error:
        if config.tracking.allow_offline:
            return False
        raise TrackingError(f"{error}; to train without it, --tracking.allow-offline") from error
    return True


def _train_manifest(
    config: TrainConfig[Any], cache: Store | None, progress: Callable[[int, int], None] | None
) -> Manifest:
    data = config.data
    return load_manifest(
        data.uri,
        split=data.split,
        scale=config.model.scale,
        layout=data.layout,
        min_side_px_hr=data.patch_px_hr,
        on_bad_image=data.on_bad_image,
        cache=cache,
        progress=progress,
    )


def _validation_manifest(config: TrainConfig[Any], cache: Store | None) -> Manifest:
    validation, scale = config.validation, config.model.scale
    manifest = load_manifest(
        validation.uri or config.data.uri,
        split=validation.split,
        scale=scale,
        layout=validation.layout,
        on_bad_image=config.data.on_bad_image,
        cache=cache,
    )
    if validation.num_images is not None:
        first = sorted(manifest.images, key=lambda record: record.name)[: validation.num_images]
        manifest = dataclasses.replace(manifest, images=tuple(first))
    side_px = smallest_side_px(validation.protocol, scale)
    small = [record.hr_key for record in manifest.images if min(record.width, record.height) < side_px]
    if small:
        names = ", ".join(small[:10]) + (f" and {len(small) - 10} more" if len(small) > 10 else "")
        raise DataError(
            f"{manifest.uri}: images with a side below {side_px} px can't be scored by {validation.protocol} at "
            f"x{scale} (--validation.protocol): {names}"
        )
    return manifest
