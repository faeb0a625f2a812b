"""Upscaling one image, or all images below a URI: what is checked before, who does it, what is said after."""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path, PurePosixPath

from sr_data.errors import StorageError
from sr_data.storage import FileEntry, Store, open_store, split_uri
from sr_models.errors import ModelError
from sr_models.image_file import target_name
from sr_models.inference import placed
from sr_models.network import SRNetwork
from sr_models.weights import weights_digest
from sr_serve.actor_pool import check_actor_device, size_pool
from sr_serve.upscale_options import UpscaleOptions
from sr_serve.upscale_plan import (
    FAILED_KEY,
    FORMAT_FLAGS,
    RECORD_KEY,
    Image,
    Plan,
    Recipe,
    UpscaleError,
    check_apart,
    make_plan,
    read_record,
    target_format,
)
from sr_serve.upscale_progress import UpscaleProgress, announcement, summary
from sr_serve.upscale_worker import OVERLAP, ImageMaker, Work
from sr_train.checkpoint import CheckpointError
from sr_train.options import ConfigError
from sr_train.tracking_server import TrackingError
from sr_train.upscaler import UpscalerError, device_named, open_network, pinned

USER_ERRORS = (UpscaleError, StorageError, ModelError, CheckpointError, ConfigError, UpscalerError, TrackingError)
"""What `upscale` raises, and the user can mend."""
FEW_IMAGES = 8
"""Made in this process where no cluster is named: starting Ray takes half a minute and more."""
_DELETING_THREADS = 16

Failures = dict[str, str]
"""Key of a bad image → what is wrong with it."""
OnResult = Callable[[str, str | None], None]
"""Is told of each image that is finished: its key, and what is wrong with it, if something is."""
MakeAll = Callable[[OnResult], None]


def upscale(model: str, source: str, target: str, options: UpscaleOptions) -> Failures:
    """Upscales SOURCE to TARGET with MODEL, shows how far it is, prints what was done.

    UpscaleError, StorageError, and what `open_network` and `sr_train.ray_cluster.connect` raise, say what the user can
    mend.
    """
    if (file := _as_file(source)) is not None:
        return _upscale_file(model, *file, target, options)
    return _upscale_folder(model, open_store(source), target, options)


def _upscale_file(model: str, store: Store, key: str, target: str, options: UpscaleOptions) -> Failures:
    """In this process, without Ray."""
    target_store, target_key, written_as = _file_target(target, key, options.format)
    target_uri = target_store.uri_of(target_key)
    if _real(target_uri) == _real(store.uri_of(key)):
        raise UpscaleError(f"{target_uri}: TARGET is SOURCE")
    if not options.overwrite and target_store.exists(target_key):
        raise UpscaleError(f"{target_uri}: is there already; choose another TARGET, or replace it with --overwrite")
    device = device_named(options.device)
    _check_writable(target_store)
    network = open_network(model, tracking_uri=options.tracking_uri)
    if options.dry_run:
        print(f"would upscale {store.uri_of(key)} x{network.config.scale} to {target_uri}")
        return {}
    work = _work(options, written_as, source_uri=store.uri, target_uri=target_store.uri)
    image = Image(key=key, target_key=target_key, num_bytes=_num_bytes(store, key))
    reason = ImageMaker(placed(network, device), work).make(image)
    if reason is not None:
        print(f"not upscaled: {reason}")
        return {key: reason}
    print(target_uri)
    return {}


def _upscale_folder(model: str, source: Store, target: str, options: UpscaleOptions) -> Failures:
    store = open_store(target)
    check_apart(_real(source.uri), _real(store.uri))
    if "://" not in store.uri and Path(store.uri).is_file():
        raise UpscaleError(f"{target}: is a file, and SOURCE is a folder (TARGET)")
    sources = source.list()
    if not sources:
        raise UpscaleError(f"{source.uri}: there is no such file, and no file below it (SOURCE)")
    fixed, _ = pinned(model, tracking_uri=options.tracking_uri)
    network = open_network(fixed, tracking_uri=options.tracking_uri)
    existing = store.list()
    plan = _plan(network, fixed, source, sources, store, existing, options)
    if plan.todo:
        if _is_made_here(plan, options):
            device_named(options.device)
        else:
            check_actor_device(options.device)
        _check_writable(store)
    print(announcement(plan, store, dry_run=options.dry_run, overwrite=options.overwrite), flush=True)
    if options.dry_run:
        return {}
    started_s = time.monotonic()
    failures: Failures = {}
    if plan.todo:
        work = _work(
            options,
            FORMAT_FLAGS[options.format],
            source_uri=source.uri,
            target_uri=store.uri,
            witnesses=plan.witnesses,
        )
        make_all = _maker(network, plan, work, options)
        _prepare(store, plan)
        failures = _with_progress(make_all, len(plan.todo))
    _write_failures(store, failures, {entry.key for entry in existing})
    print(summary(plan, store, failures, time.monotonic() - started_s))
    return failures


def _plan(
    network: SRNetwork,
    model: str,
    source: Store,
    sources: Sequence[FileEntry],
    target: Store,
    existing: Sequence[FileEntry],
    options: UpscaleOptions,
) -> Plan:
    recorded = None
    if any(entry.key == RECORD_KEY for entry in existing):
        try:
            recorded = read_record(target.read_text(RECORD_KEY), uri=target.uri_of(RECORD_KEY))
        except UpscaleError:
            if not options.overwrite:
                raise
    recipe = Recipe(
        model_sha256=weights_digest(network),
        scale=network.config.scale,
        self_ensemble=options.self_ensemble,
        precision=options.precision,
        format=options.format,
        source=_real(source.uri),
    )
    return make_plan(
        sources,
        existing,
        recipe=recipe,
        model=model,
        target_uri=target.uri,
        recorded=recorded,
        overwrite=options.overwrite,
    )


def _prepare(target: Store, plan: Plan) -> None:
    """In this order, so that a run that is killed here leaves nothing that counts as finished and is not."""
    with ThreadPoolExecutor(_DELETING_THREADS, "delete") as threads:
        list(threads.map(target.delete, plan.outdated))
    target.write(RECORD_KEY, plan.record.to_json().encode())


def _is_made_here(plan: Plan, options: UpscaleOptions) -> bool:
    """A few images are not worth a cluster, unless one was asked for. The last few of a folder that others were made of
    elsewhere are: this machine may lack the GPU, or the memory, that they need.
    """
    if options.num_actors is not None:
        return options.num_actors == 0
    return len(plan.todo) + plan.num_finished <= FEW_IMAGES and not os.environ.get("RAY_ADDRESS")


def _maker(network: SRNetwork, plan: Plan, work: Work, options: UpscaleOptions) -> MakeAll:
    """Who makes the images; what stands against it (device, cluster) is found here, before anything is written."""
    images = plan.todo
    if _is_made_here(plan, options):
        return partial(_make_here, ImageMaker(placed(network, device_named(options.device)), work), images)
    # Here: Ray takes 3 s to import, and a few images need none of it.
    from sr_serve.ray_upscale import make_on_cluster
    from sr_train.ray_cluster import cluster_facts, connect

    print("  on        a Ray cluster, which is joined or started …", flush=True)
    connect()
    pool = size_pool(
        cluster_facts(),
        len(images),
        device=options.device,
        num_actors=options.num_actors,
        gpus_per_actor=options.gpus_per_actor,
        cpus_per_actor=options.cpus_per_actor,
    )
    print(f"            {pool}", flush=True)
    return partial(make_on_cluster, network, images, work, pool)


def _with_progress(make_all: MakeAll, num_images: int) -> Failures:
    failures: Failures = {}
    progress = UpscaleProgress(num_images)

    def on_result(key: str, reason: str | None) -> None:
        if reason is not None:
            failures[key] = reason
        progress.one_more(is_bad=reason is not None)

    try:
        make_all(on_result)
    finally:
        progress.close()
    return failures


def _make_here(maker: ImageMaker, images: Sequence[Image], on_result: OnResult) -> None:
    """With a few threads, so that images are fetched and stored while others are computed."""
    with ThreadPoolExecutor(1 + OVERLAP, "upscale") as threads:
        under_way = {threads.submit(maker.make, image): image for image in images}
        try:
            for future in as_completed(under_way):
                on_result(under_way[future].key, future.result())
        except BaseException:  # also on Ctrl-C
            maker.stop()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _as_file(uri: str) -> tuple[Store, str] | None:
    """SOURCE as (store, key) if it is a file."""
    open_store(uri)  # says what is wrong with the URI
    if uri.endswith("/"):
        return None
    try:
        store, key = split_uri(uri)
    except StorageError:  # a whole bucket
        return None
    return (store, key) if store.exists(key) else None


def _file_target(target: str, source_key: str, format_flag: str) -> tuple[Store, str, str | None]:
    """Where one image goes: (store, key, format). A TARGET without a suffix, or that is a folder, is a folder."""
    store = open_store(target)
    is_folder = "://" not in store.uri and os.path.isdir(store.uri)
    if is_folder or target.endswith("/") or not PurePosixPath(store.uri).suffix:
        return store, target_name(source_key, FORMAT_FLAGS[format_flag]), FORMAT_FLAGS[format_flag]
    store, key = split_uri(target)
    return store, key, target_format(key, format_flag)


def _check_writable(target: Store) -> None:
    """StorageError if TARGET refuses. Leaves nothing behind, not even TARGET's folder."""
    if "://" not in target.uri:
        folder = target.uri
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        target = open_store(folder)
    target.check_writable()


def _num_bytes(store: Store, key: str) -> int | None:
    """Of a local file; a server may give an object and refuse to list it."""
    return Path(store.uri_of(key)).stat().st_size if "://" not in store.uri else None


def _real(uri: str) -> str:
    """A path without links; other URIs as they are."""
    return uri if "://" in uri else os.path.realpath(uri)


def _work(
    options: UpscaleOptions,
    written_as: str | None,
    *,
    source_uri: str,
    target_uri: str,
    witnesses: tuple[str, ...] = (),
) -> Work:
    return Work(
        source_uri=source_uri,
        target_uri=target_uri,
        format=written_as,
        max_mpx=options.max_mpx,
        tile_px_lr=options.tile_px_lr,
        self_ensemble=options.self_ensemble,
        precision=options.precision,
        witnesses=witnesses,
    )


def _write_failures(target: Store, failures: Failures, existing: set[str]) -> None:
    if failures:
        text = json.dumps(dict(sorted(failures.items())), indent=1, ensure_ascii=False)
        target.write(FAILED_KEY, f"{text}\n".encode())
    elif FAILED_KEY in existing:
        target.delete(FAILED_KEY)
