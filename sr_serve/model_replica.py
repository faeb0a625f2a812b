"""A replica of the model: uploads in, image files out; small ones go through the network together."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from ray import serve

from sr_models.errors import ImageFileError, ModelError
from sr_models.image_file import Picture, check_writable, read_picture, write_picture
from sr_models.inference import upscale_batch
from sr_models.upscaling import network_input, precision, with_upscaled
from sr_serve.live_model import LiveModel, Loaded
from sr_serve.messages import ModelFacts, Order, Refusal, Upscaled, not_ready

BATCH_WAIT_S = 0.02
_NUM_CODEC_THREADS = 2
_NUM_LARGE = 2
_MAX_MPX = float("inf")  # the header was checked where the upload came in
_NETWORK_ERRORS = (ModelError, RuntimeError, MemoryError)
"""RuntimeError is PyTorch's, for example where a tile has no room on the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """What a replica needs to know."""

    model: str
    """MODEL, such that it means the same on every node."""
    tracking_uri: str | None
    """Where registered models are."""
    on_gpu: bool
    """Whether a GPU was asked for."""
    precision: str
    """A name in `sr_models.upscaling.PRECISIONS`."""
    poll_s: float
    """How often the alias is looked at, in seconds."""
    max_batch: int
    """Most images that go through the network at once."""


class GivenUpError(Exception):
    """Nobody waits for the result any more."""


class Claim:
    """Whether somebody still waits for a result; asked and withdrawn by any thread."""

    def __init__(self, timeout_s: float) -> None:
        """It lapses `timeout_s` seconds from now, if it is not withdrawn before."""
        self._end_s = time.monotonic() + timeout_s
        self._is_withdrawn = False

    def withdraw(self) -> None:
        """Who waited has left."""
        self._is_withdrawn = True

    @property
    def stands(self) -> bool:
        """Whether the result is still worth its work."""
        return not self._is_withdrawn and time.monotonic() < self._end_s


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """A decoded upload."""

    picture: Picture
    order: Order
    claim: Claim

    @property
    def num_px(self) -> int:
        """Of the LR image."""
        height, width, _ = self.picture.colour_HWC.shape
        return int(height * width)

    @property
    def is_small(self) -> bool:
        """Whether two of its kind fit into one tile: only then do they go through the network together."""
        return 2 * self.num_px <= self.order.tile_px_lr**2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Done:
    """A job's result."""

    picture: Picture
    facts: ModelFacts
    num_together: int


Outcome = Done | Refusal


class ModelReplica:
    """Decodes, upscales and encodes in threads, so that its event loop always answers."""

    def __init__(self, options: ReplicaOptions) -> None:
        """Loads the model; raises what that raises, and RuntimeError if a GPU was asked for and none is here."""
        if options.on_gpu and not torch.cuda.is_available():
            raise RuntimeError("a GPU was asked for, and PyTorch sees none here (--gpus-per-replica)")
        device = torch.device("cuda" if options.on_gpu else "cpu")
        self._live = LiveModel(options.model, tracking_uri=options.tracking_uri, device=device, say=_say)
        self._live.watch(options.poll_s)
        self._autocast = precision(options.precision)
        # The network one at a time: two at once on the same cores or one GPU are no faster and take twice the room.
        self._network_thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._codec_threads = ThreadPoolExecutor(_NUM_CODEC_THREADS, thread_name_prefix="codec")
        self._large = asyncio.Semaphore(_NUM_LARGE)
        self._upscale_small.set_max_batch_size(options.max_batch)  # type: ignore[attr-defined]

    async def facts(self) -> ModelFacts:
        """Which model answers."""
        return self._live.current.facts

    async def upscale(self, data: bytes, order: Order) -> Upscaled | Refusal:
        """An image file → the upscaled one, or why not. Its header has been checked."""
        start_s = time.perf_counter()
        loop = asyncio.get_running_loop()
        claim = Claim(order.timeout_s)
        try:
            read = partial(read_picture, data, name="the upload", max_mpx=_MAX_MPX)
            job = Job(picture=await loop.run_in_executor(self._codec_threads, read), order=order, claim=claim)
            check_writable(job.picture, format=order.format, name="the upload", scale=self._live.current.facts.scale)
            if job.is_small:
                return await self._finished(job, await self._upscale_small(job), start_s)
            async with self._large:  # until they are written: results of many megapixels don't pile up
                [outcome] = await loop.run_in_executor(self._network_thread, self._upscale, [job])
                return await self._finished(job, outcome, start_s)
        except ImageFileError as error:
            return Refusal(status=422, code="unusable_image", message=str(error))
        except asyncio.CancelledError:
            claim.withdraw()  # else the network's thread would go on to the image's end
            raise

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _upscale_small(self, jobs: list[Job]) -> list[Outcome]:
        return await asyncio.get_running_loop().run_in_executor(self._network_thread, self._upscale, jobs)

    def _upscale(self, jobs: Sequence[Job]) -> list[Outcome]:
        """All of them by one version of the model, in the order of `jobs`."""
        loaded = self._live.current
        outcomes: dict[int, Outcome] = {}
        for numbers in alike(jobs):
            group = [jobs[number] for number in numbers]
            outcomes |= zip(numbers, upscale_alike(loaded, group, autocast=self._autocast), strict=True)
        return [outcomes[number] for number in range(len(jobs))]

    async def _finished(self, job: Job, outcome: Outcome, start_s: float) -> Upscaled | Refusal:
        if isinstance(outcome, Refusal):
            return outcome
        write = partial(write_picture, outcome.picture, format=job.order.format, name="the result")
        data = await asyncio.get_running_loop().run_in_executor(self._codec_threads, write)
        return Upscaled(
            data=data,
            format=job.order.format,
            lr_size_px=_size_px(job.picture),
            sr_size_px=_size_px(outcome.picture),
            facts=outcome.facts,
            num_together=outcome.num_together,
            elapsed_s=time.perf_counter() - start_s,
        )


def alike(jobs: Sequence[Job]) -> list[list[int]]:
    """Which jobs can go through the network together: equal size, depth and options, no more pixels than one tile."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        colour_HWC = job.picture.colour_HWC
        groups[colour_HWC.shape[:2], colour_HWC.dtype.str, job.order.tile_px_lr, job.order.self_ensemble].append(number)
    cut = []
    for numbers in groups.values():
        first = jobs[numbers[0]]
        most = max(1, first.order.tile_px_lr**2 // first.num_px)
        cut += [numbers[start : start + most] for start in range(0, len(numbers), most)]
    return cut


def upscale_alike(loaded: Loaded, jobs: Sequence[Job], *, autocast: torch.dtype | None) -> list[Outcome]:
    """Jobs that are `alike`, in one go; where that fails one by one, so that none suffers for another.

    It ends, within a tile, when nobody waits for any of them.
    """
    order, scale = jobs[0].order, loaded.facts.scale

    def check() -> None:
        if not any(job.claim.stands for job in jobs):
            raise GivenUpError

    try:
        check()
        lr_NHWC = np.stack([network_input(job.picture) for job in jobs])
        sr_NHWC = upscale_batch(
            loaded.network,
            lr_NHWC,
            tile_px_lr=order.tile_px_lr,
            self_ensemble=order.self_ensemble,
            autocast=autocast,
            before_pass=check,
        )
        return [
            Done(picture=with_upscaled(job.picture, sr_HWC, scale=scale), facts=loaded.facts, num_together=len(jobs))
            for job, sr_HWC in zip(jobs, sr_NHWC.cpu().numpy(), strict=True)
        ]
    except GivenUpError:
        return [not_ready(job.order.timeout_s) for job in jobs]
    except _NETWORK_ERRORS as error:
        if len(jobs) > 1:
            return [outcome for job in jobs for outcome in upscale_alike(loaded, [job], autocast=autocast)]
        _say(f"an image could not be upscaled: {error}")
        reason = str(error).partition("\n")[0]
        return [Refusal(status=500, code="failed", message=f"the network failed on this image ({reason})")]


def _size_px(picture: Picture) -> tuple[int, int]:
    height_px, width_px, _ = picture.colour_HWC.shape
    return width_px, height_px


def _say(message: str) -> None:
    """To the standard output, which Ray carries to the one who started it."""
    print(message, flush=True)
