"""Config → what would happen, and what stands against it: everything that can be known before a GPU is asked for."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sr_data.errors import DataError, StorageError
from sr_data.manifest import ImageRecord, Manifest, load_manifest
from sr_data.sampling import SamplePlan, slot_range
from sr_data.storage import open_store
from sr_models.architectures import architecture_name
from sr_train import checkpoint as ckpt
from sr_train.config import ConfigError, TrainConfig
from sr_train.run_folder import CONFIG_KEY, checkpoint_store
from sr_train.tracking_server import TrackingError, check_tracking, redact, resolve_tracking_uri

T = TypeVar("T")

GIB = 1024**3
_MIN_CPUS_FOR_DECODING = 0.5


@dataclass(frozen=True, kw_only=True)
class ClusterFacts:
    """What the cluster offers now."""

    cpus_per_node: tuple[float, ...]
    gpus_per_node: tuple[float, ...]

    @property
    def num_cpus(self) -> float:
        return sum(self.cpus_per_node)

    @property
    def num_gpus(self) -> float:
        return sum(self.gpus_per_node)


class PlanError(ValueError):
    """What stands against the run: every problem found, each with its flag."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems) if len(problems) == 1 else "\n".join(["", *(f"- {p}" for p in problems)]))


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
    warnings: tuple[str, ...]

    @property
    def run_uri(self) -> str:
        return open_store(f"{self.config.run.storage.rstrip('/')}/{self.config.run.name}").uri

    def shard_slots(self, rank: int) -> range:
        batch = self.config.optim.global_batch_size // self.config.run.num_workers
        return slot_range(self.samples, rank * batch, batch)


def make_plan(
    config: TrainConfig[Any],
    cluster: ClusterFacts,
    *,
    resume: bool,
    progress: Callable[[int, int], None] | None = None,
    now: datetime | None = None,
) -> Plan:
    """Checks data, storage, tracking and resources, and fills in what the config left open. PlanError lists all
    problems.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], T], *errors: type[Exception]) -> T | None:
        try:
            return check()
        except errors as error:
            problems.append(str(error))
            return None

    tracking_uri = resolve_tracking_uri(config.tracking.uri)
    config = _named(config, redact(tracking_uri), now or datetime.now())
    storage_ok = attempt(lambda: _check_storage(config, resume=resume), StorageError, ConfigError)
    reachable = attempt(lambda: _check_tracking(config, tracking_uri), TrackingError)
    placed = attempt(lambda: _placed(config, cluster), ConfigError)
    train = attempt(lambda: _train_manifest(config, cache=bool(storage_ok), progress=progress), DataError, StorageError)
    validation = attempt(lambda: _validation_manifest(config, cache=bool(storage_ok)), DataError, StorageError)
    if problems or placed is None or train is None or validation is None:
        raise PlanError(problems)
    try:
        config, samples = _windowed(placed, train)
    except ConfigError as error:
        raise PlanError([str(error)]) from error
    return Plan(
        config=config,
        train=train,
        validation=validation,
        samples=samples,
        tracking_uri=tracking_uri,
        tracking_reachable=bool(reachable),
        warnings=tuple(_warnings(config, cluster, train, validation)),
    )


def _warnings(config: TrainConfig[Any], cluster: ClusterFacts, train: Manifest, validation: Manifest) -> Iterator[str]:
    shared = {record.hr_sha256 for record in train.images} & {record.hr_sha256 for record in validation.images}
    if shared:
        yield f"{len(shared)} validation images are training images too: scores will flatter"
    if len(cluster.cpus_per_node) > 1:
        places = {"--run.storage": config.run.storage, "--data.uri": train.uri, "--validation.uri": validation.uri}
        for flag, uri in places.items():
            if "://" not in uri:
                yield f"{uri} must be the same folder on all {len(cluster.cpus_per_node)} nodes ({flag})"
        if (config.tracking.uri or "").startswith("sqlite:"):
            yield f"{config.tracking.uri} must be the same file on all nodes; use an MLflow server (--tracking.uri)"


def _named(config: TrainConfig[Any], tracking_uri: str, now: datetime) -> TrainConfig[Any]:
    kind = f"{architecture_name(config.model)}-x{config.model.scale}"
    storage = open_store(config.run.storage).uri
    name = config.run.name or f"{kind}-{now:%Y%m%d-%H%M%S}"
    tracking = dataclasses.replace(
        config.tracking,
        uri=tracking_uri,
        register_as=config.tracking.register_as or kind,
    )
    run = dataclasses.replace(config.run, name=name, storage=storage)
    return dataclasses.replace(config, run=run, tracking=tracking)


def _check_storage(config: TrainConfig[Any], *, resume: bool) -> bool:
    store = open_store(f"{config.run.storage}/{config.run.name}")
    try:
        taken = store.exists(CONFIG_KEY)
        store.check_writable()
    except StorageError as error:
        raise StorageError(f"{error} (--run.storage)") from error
    if taken and not resume:
        latest = ckpt.latest_key(checkpoint_store(store.uri))
        state = f"its newest checkpoint is {latest}" if latest else "it has no checkpoint yet"
        raise ConfigError(
            f"run {config.run.name!r} exists at {store.uri} ({state}): "
            "go on with it by --resume, or choose another --run.name"
        )
    return True


def _check_tracking(config: TrainConfig[Any], tracking_uri: str) -> bool:
    try:
        check_tracking(tracking_uri)
    except TrackingError:
        if config.tracking.allow_offline:
            return False
        raise
    return True


def _placed(config: TrainConfig[Any], cluster: ClusterFacts) -> TrainConfig[Any]:
    """Device, CPUs and threads of a worker, from what the cluster has."""
    run = config.run
    workers = run.num_workers
    device = run.device
    if device == "auto":
        device = "cuda" if cluster.num_gpus >= workers else "cpu"
    if device == "cuda" and cluster.num_gpus < workers:
        raise ConfigError(
            f"{workers} workers need a GPU each and the cluster has {cluster.num_gpus:g}: lower --run.num-workers, or "
            f"train on CPUs with --run.device cpu"
        )
    cpus = run.cpus_per_worker
    if cpus is None:
        # One CPU each if that leaves some for decoding, else an even share of what is left. Ray's CPUs are a
        # reservation, not a limit.
        spare = cluster.num_cpus - _MIN_CPUS_FOR_DECODING
        cpus = 1.0 if spare >= workers else max(0.0, int(spare / workers * 100) / 100)
    if cpus <= 0 or cpus * workers + _MIN_CPUS_FOR_DECODING > cluster.num_cpus:
        raise ConfigError(
            f"{workers} workers with {cpus:g} CPUs each, and {_MIN_CPUS_FOR_DECODING} for decoding, need more than the "
            f"cluster's {cluster.num_cpus:g} CPUs: lower --run.num-workers or --run.cpus-per-worker"
        )
    threads = run.threads_per_worker
    if threads is None:
        workers_on_a_node = -(-workers // max(1, len(cluster.cpus_per_node)))
        threads = max(1, int(min(cluster.cpus_per_node)) // workers_on_a_node)
    return dataclasses.replace(
        config, run=dataclasses.replace(run, device=device, cpus_per_worker=cpus, threads_per_worker=threads)
    )


def _train_manifest(config: TrainConfig[Any], *, cache: bool, progress: Callable[[int, int], None] | None) -> Manifest:
    data = config.data
    return load_manifest(
        data.uri,
        split=data.split,
        scale=config.model.scale,
        layout=data.layout,
        min_side_px_hr=data.patch_px_hr,
        on_bad_image=data.on_bad_image,
        cache=_manifest_cache(config) if cache else None,
        progress=progress,
    )


def _validation_manifest(config: TrainConfig[Any], *, cache: bool) -> Manifest:
    validation = config.validation
    uri = validation.uri or config.data.uri
    try:
        manifest = load_manifest(
            uri,
            split=validation.split,
            scale=config.model.scale,
            layout=validation.layout,
            on_bad_image=config.data.on_bad_image,
            cache=_manifest_cache(config) if cache else None,
        )
    except DataError as error:
        raise DataError(f"validation set: {error} (--validation.uri, --validation.split)") from error
    if validation.num_images is not None:
        first = sorted(manifest.images, key=lambda record: record.name)[: validation.num_images]
        manifest = dataclasses.replace(manifest, images=tuple(first))
    return manifest


def _manifest_cache(config: TrainConfig[Any]) -> Any:
    return open_store(f"{config.run.storage}/.manifests")


def _windowed(config: TrainConfig[Any], train: Manifest) -> tuple[TrainConfig[Any], SamplePlan]:
    """The rolling window: as many images as the workers may hold, or the whole dataset."""
    num_images = len(train.images)
    window = config.data.window_images
    if window is None:
        budget = config.data.pool_gib * GIB
        whole = _samples(config, num_images, num_images)
        if largest_shard_bytes(config, whole, train) <= budget:
            window = num_images
        else:
            slot = max(_pair_bytes(record, config.model.scale) for record in train.images)
            # A worker's slots overlap its neighbours' by one on each side; four places are for images to come.
            window = (int(budget // slot) - 2 - 4) * config.run.num_workers
    window = min(window, num_images)
    if window < config.run.num_workers:
        raise ConfigError(
            f"--data.pool-gib={config.data.pool_gib} holds fewer images of {train.uri} than there are workers: raise it"
        )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, window_images=window))
    return config, _samples(config, num_images, window)


def _samples(config: TrainConfig[Any], num_images: int, window_images: int) -> SamplePlan:
    return SamplePlan(
        seed=config.optim.seed,
        global_batch_size=config.optim.global_batch_size,
        scale=config.model.scale,
        patch_px_lr=config.data.patch_px_hr // config.model.scale,
        augment=config.data.augment,
        num_images=num_images,
        window_images=window_images,
        window_reuse_patches=config.data.window_reuse_patches,
    )


def _pair_bytes(record: ImageRecord, scale: int) -> int:
    hr = record.width * record.height * 3
    return hr + hr // (scale * scale)


def largest_shard_bytes(config: TrainConfig[Any], samples: SamplePlan, train: Manifest) -> int:
    """Decoded bytes that one worker holds at most."""
    batch = samples.global_batch_size // config.run.num_workers
    longest = max(len(slot_range(samples, rank * batch, batch)) for rank in range(config.run.num_workers))
    sizes = sorted((_pair_bytes(record, samples.scale) for record in train.images), reverse=True)
    return sum(sizes[:longest])
