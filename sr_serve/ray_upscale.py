"""Ray Data: a list of images → actors that hold the network and make them; only names and results travel.

The network goes to the object store once, as its config and a safetensors file in memory, so every actor has the very
network that the driver opened and checked: an alias that moves meanwhile changes nothing, and actors need neither a way
to the registry nor MLflow, whose import takes seconds. Actors of a node share one copy until each has built its own.
"""

import json
import logging
import socket
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
import ray.data
import safetensors.torch
import torch
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from sr_data.errors import StorageError
from sr_data.storage import open_store
from sr_models.architectures import architecture_name, build_model, config_from_dict, config_to_dict
from sr_models.inference import placed
from sr_models.network import SRNetwork
from sr_serve.actor_pool import ActorPool
from sr_serve.upscale_plan import RECORD_KEY, Image, UpscaleError
from sr_serve.upscale_worker import OVERLAP, ImageMaker, Work

MAX_TASKS = 4000
"""A task is one image, which keeps the progress honest; of more images than this, as many as it takes. Ray Data's
driver keeps something of each task, and lists them all when it starts."""
NUM_RETRIES = 2
"""Of a task whose actor dies: the system took its memory away, or its node went."""
_MAX_LOST_TASKS = 16
"""An image that kills its actor each time is a bad image; so many are something else, and end the run."""
_GIVEN_UP = "Ray gave it up: its actor died each time, of memory perhaps, or failed, which Ray's messages then say"
_SCHEMA = pa.schema({"key": pa.string(), "reason": pa.string(), "is_fatal": pa.bool_()})


def make_on_cluster(
    network: SRNetwork,
    images: Sequence[Image],
    work: Work,
    pool: ActorPool,
    on_result: Callable[[str, str | None], None],
) -> None:
    """Makes all images, with the cluster that this process has joined.

    `on_result` hears of each image as it is finished, in no order: its key, and what is wrong with it, if something is.
    StorageError if TARGET can't be written, SOURCE is away, or a node doesn't see them; UpscaleError if actors keep
    dying.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it reports every execution
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # and that it shows no bars
    packed = ray.put(_pack(network))
    missing = {image.key for image in images}
    dataset = _mapped(_dataset(images), {"packed": [packed], "work": work, "pool": pool}, pool)
    dataset.context.enable_progress_bars = False
    dataset.context.max_errored_blocks = _MAX_LOST_TASKS
    try:
        tables: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for table in tables:
            for row in table.to_pylist():
                if row["is_fatal"]:
                    raise StorageError(row["reason"])
                missing.discard(row["key"])
                on_result(row["key"], row["reason"])
    except RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UpscaleError(
            f"Ray lost actors again and again, of memory perhaps: lower --tile-px-lr or --max-mpx, or raise "
            f"--cpus-per-actor for fewer actors on a node. What is finished stays ({lines[-1] if lines else error})"
        ) from error
    target = open_store(work.target_uri)
    for image in images:
        if image.key in missing:  # with a task that was given up
            found = target.exists(image.target_key)
            on_result(image.key, None if found else f"{image.key}: {_GIVEN_UP}")


def _dataset(images: Sequence[Image]) -> ray.data.Dataset:
    """A row per image, a block per task."""
    num_per_task = -(-len(images) // MAX_TASKS)
    rows = [asdict(image) for image in images]
    dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // num_per_task))
    return dataset


def _mapped(dataset: ray.data.Dataset, constructor: Mapping[str, Any], pool: ActorPool) -> ray.data.Dataset:
    with warnings.catch_warnings():
        # Ray Data would try a task for ever, also one whose image takes more memory than there is. The argument that
        # limits it is about to go and has no successor yet, as of the pinned version.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        mapped: ray.data.Dataset = dataset.map_batches(
            _Actor,
            fn_constructor_kwargs=dict(constructor),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(
                size=pool.num_actors,
                max_concurrent_calls_per_actor=_num_computed(pool) + OVERLAP,
                enable_true_multi_threading=True,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            max_task_retries=NUM_RETRIES,
        )
    return mapped


def _num_computed(pool: ActorPool) -> int:
    """Images an actor decodes, upscales and encodes at once: PyTorch takes all CPUs for one, a GPU leaves them free."""
    return pool.num_threads if pool.gpus else 1


def _pack(network: SRNetwork) -> Mapping[str, Any]:
    config = network.config
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return {
        "architecture": architecture_name(config),
        "config": json.dumps(config_to_dict(config)),
        "weights": safetensors.torch.save(tensors),
    }


def _unpack(packed: Mapping[str, Any]) -> SRNetwork:
    network = build_model(config_from_dict(packed["architecture"], json.loads(packed["config"])), seed=0)
    network.load_state_dict(safetensors.torch.load(packed["weights"]))
    return network.eval()


class _Actor:
    """Holds the network, and makes the images that it is given. Called from several threads."""

    def __init__(self, packed: Sequence[ray.ObjectRef[Mapping[str, Any]]], work: Work, pool: ActorPool) -> None:
        """`packed` is in a list, since Ray would fetch a reference that is an argument itself."""
        torch.set_num_threads(pool.num_threads)
        network = placed(_unpack(ray.get(packed[0])), torch.device(pool.device))
        self._maker = ImageMaker(network, work, num_computed=_num_computed(pool))
        self._refused = _why_not_here(work)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A row for each image. What concerns all of them is a row, too: raised, Ray would try again and wrap it."""
        rows: list[dict[str, object]] = []
        for row in batch.to_pylist():
            if self._refused is None:
                try:
                    reason = self._maker.make(Image(**row))
                    rows.append({"key": row["key"], "reason": reason, "is_fatal": False})
                except StorageError as error:
                    self._refused = str(error)
            if self._refused is not None:
                rows.append({"key": row["key"], "reason": self._refused, "is_fatal": True})
        return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _why_not_here(work: Work) -> str | None:
    """The driver has written TARGET's record: a node that does not see it would write to a disk of its own."""
    try:
        if open_store(work.target_uri).exists(RECORD_KEY):
            return None
    except StorageError as error:
        return str(error)
    return (
        f"{work.target_uri}: node {socket.gethostname()} does not see what the driver has written there (TARGET); all "
        f"nodes need the same object storage, or a folder that they share"
    )
