"""Whole images in one flat buffer, cut into batches of patches on the training device.

A batch costs one vectorised draw on the host (`sr_data.sampling`), one copy of a few numbers per patch to the device
and one gather there (`sr_data.cutting`). A thread puts images in as they come, and in a moving window over those that
are no longer drawn from.
"""

import heapq
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sr_data import window
from sr_data.cutting import cut, pack_rows, patch_geometry, to_device
from sr_data.errors import DataError
from sr_data.pairs import DecodedPair
from sr_data.sampling import Int64Array, SamplePlan, draw_samples, slot_range

Placement = Literal["auto", "device", "host"]

MAX_DEVICE_SHARE = 0.4
"""Share of the free device memory that images may take under `placement="auto"`; training needs the rest."""
_MIN_IMAGES_AHEAD = 4


class FeedError(RuntimeError):
    """The stream of images broke off; the cause is the error that ended it."""


class PatchPool:
    """Holds the images that samples `[first_sample, first_sample + num_samples)` of every step can draw from.

    `batch` is called by one thread, with steps that never decrease. `feed`'s thread writes an image only where no
    sample of the current or a later step can draw from the image that it replaces, and a batch waits only for the
    images that it draws from: the first step starts as soon as its own images are in.

    `placement`: "device" keeps the images on `device`; "host" keeps them in (pageable) host memory, where rows of
    patches are gathered into pinned memory and sent to `device` without blocking; "auto" takes the device if they
    need less than `MAX_DEVICE_SHARE` of what is free there. Where images are has no influence on a batch's bits.
    """

    def __init__(
        self,
        plan: SamplePlan,
        sizes_px_hr: Sequence[tuple[int, int]],
        *,
        first_sample: int,
        num_samples: int,
        start_step: int,
        device: torch.device,
        placement: Placement = "auto",
    ) -> None:
        """`sizes_px_hr`: (height, width) of every image of the manifest, in its order, multiples of the scale.

        Raises DataError if a size doesn't fit the plan.
        """
        sizes = _checked_sizes(plan, sizes_px_hr)
        self._plan = plan
        self._device = device
        self._first_sample, self._num_samples = first_sample, num_samples
        self._sizes_px_lr = sizes // plan.scale
        self.needs: Iterator[tuple[int, int]] = self._new_needs(start_step)
        """(stream position, image index) of the images to feed, in order; endless if the window moves."""
        self._feed_order = self._new_needs(start_step)
        self._slots = slot_range(plan, first_sample, num_samples)
        self._generation = window.generation(plan, start_step)

        # Where images lie: one place per slot, and in a moving window some more, for images that are in before their
        # generation comes.
        areas_px_lr = self._sizes_px_lr.prod(axis=1)
        if plan.is_windowed:
            place_areas = np.full(len(self._slots) + images_ahead(plan, len(self._slots)), areas_px_lr.max())
        else:
            place_areas = areas_px_lr[[image for _, image in self._new_needs(start_step)]]
        self._num_images_to_feed = None if plan.is_windowed else len(self._slots)
        ends = np.cumsum(place_areas)
        self._free_places = deque((ends - place_areas).tolist())
        self._held: list[tuple[int, int]] = []  # (stream position, place), a heap: the first to leave is on top

        # What the slots hold. Positions m and m + K of the stream share a slot and can both be in: two rows, by (m //
        # K) mod 2.
        shape = (2, len(self._slots))
        self._position = np.full(shape, -1, np.int64)
        self._place = np.zeros(shape, np.int64)
        self._height = np.zeros(shape, np.int64)
        self._width = np.zeros(shape, np.int64)

        num_px_lr = int(ends[-1])
        self.num_bytes = 3 * num_px_lr * (1 + plan.scale**2)
        """Bytes of the images' buffers, wherever they are."""
        self.placement = placement if placement != "auto" else _best_placement(device, self.num_bytes)
        buffer_device = device if self.placement == "device" else torch.device("cpu")
        self._lr_pixels = torch.empty((num_px_lr, 3), dtype=torch.uint8, device=buffer_device)
        self._hr_pixels = torch.empty((num_px_lr * plan.scale**2, 3), dtype=torch.uint8, device=buffer_device)
        self._copy_stream = _new_stream(device) if buffer_device.type == "cuda" else None
        self._last_batch_event: torch.cuda.Event | None = None

        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._num_fed = 0
        self._wait_s = 0.0
        self._closed = False

    # The training thread

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The worker's patches of `step`, or the `micro`-th of `num_micro` equal parts of them.

        Returns `(lr_NCHW, hr_NCHW)`: float32 RGB in [0, 1] on the training device, in channels_last memory format, of
        shapes (n, 3, patch_px_lr, patch_px_lr) and (n, 3, patch_px_hr, patch_px_hr), where patch i of one covers the
        same part as patch i of the other. Waits until the images that it draws from are in. Doesn't synchronise with
        a GPU.

        Raises FeedError if the feed broke off, ValueError for a step before the last one's generation or a count that
        doesn't divide.
        """
        if self._num_samples % num_micro or not 0 <= micro < num_micro:
            raise ValueError(
                f"micro={micro} of num_micro={num_micro}: must divide the worker's {self._num_samples} samples"
            )
        num_samples = self._num_samples // num_micro
        draws = draw_samples(self._plan, step, self._first_sample + micro * num_samples, num_samples)
        places_px_lr, heights_px_lr, widths_px_lr = self._wait_for(step, draws.slots)
        geometry = patch_geometry(self._plan, draws, places_px_lr, heights_px_lr, widths_px_lr)
        patches = self._cut_on_device if self.placement == "device" else self._cut_on_host
        return patches(self._lr_pixels, geometry[0], self._plan.patch_px_lr), patches(
            self._hr_pixels, geometry[1], self._plan.patch_px_hr
        )

    def wait_s(self) -> float:
        """Seconds that `batch` has spent waiting for images so far."""
        return self._wait_s

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends the feeder's thread; one that is blocked inside its source ends (as a daemon) with the source's next
        item.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _wait_for(self, step: int, slots: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(place, height, width) in LR pixels of the images that lie in `slots` at `step`, as soon as all of them are
        in.
        """
        generation = window.generation(self._plan, step)
        positions = window.positions_in_slots(self._plan, generation, slots)
        key = (positions // self._plan.window_images % 2, slots - self._slots.start)
        with self._changed:
            if generation < self._generation:
                raise ValueError(
                    f"step={step} is of generation {generation}, but generation {self._generation} has begun"
                )
            if generation > self._generation:
                self._generation = generation
                if self._copy_stream is not None:  # batches of the old generation may still be queued on the GPU
                    self._last_batch_event = torch.cuda.current_stream(self._device).record_event()
                self._changed.notify_all()
            if self._is_missing(key, positions):
                started_s = time.perf_counter()
                self._changed.wait_for(lambda: not self._is_missing(key, positions))
                self._wait_s += time.perf_counter() - started_s
            return self._place[key], self._height[key], self._width[key]

    def _is_missing(self, key: tuple[Int64Array, Int64Array], positions: Int64Array) -> bool:
        if self._error is not None:
            raise FeedError(f"the image feed broke off: {self._error}") from self._error
        if self._closed or self._thread is None:
            raise RuntimeError("the patch pool is closed" if self._closed else "feed() must be called before batch()")
        return self._num_fed != self._num_images_to_feed and bool((self._position[key] != positions).any())

    def _cut_on_device(self, pixels: torch.Tensor, geometry: Int64Array, patch_px: int) -> torch.Tensor:
        return cut(pixels, to_device(torch.from_numpy(geometry), self._device), patch_px)

    def _cut_on_host(self, pixels: torch.Tensor, geometry: Int64Array, patch_px: int) -> torch.Tensor:
        """Gathers the patches' rows as they lie (a memcpy each), sends them to the device and turns them there."""
        num_patches = geometry.shape[1]
        packed, first_px, row_px = pack_rows(geometry, patch_px)
        rows = torch.empty(
            (num_patches * patch_px, 3 * patch_px), dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )
        overlapping = pixels.as_strided((len(pixels) - patch_px + 1, 3 * patch_px), (3, 1))
        starts = first_px[:, None] + np.arange(patch_px) * row_px[:, None]
        torch.index_select(overlapping, 0, torch.from_numpy(starts.reshape(-1)), out=rows)
        return self._cut_on_device(rows.to(self._device, non_blocking=True).view(-1, 3), packed, patch_px)

    # The feeder's thread

    def feed(self, pairs: Iterable[DecodedPair]) -> None:
        """Starts a thread that takes `pairs`, which come in the order of `needs`, and puts them in as places become
        free.

        An error of `pairs`, a pair of another size than the manifest says, or an early end is raised by the next
        `batch`.
        """
        if self._thread is not None:
            raise RuntimeError("feed() must be called once")
        self._thread = threading.Thread(target=self._run_feed, args=(pairs,), name="patch-pool-feed", daemon=True)
        self._thread.start()

    def _run_feed(self, pairs: Iterable[DecodedPair]) -> None:
        try:
            self._put_all(pairs)
        except BaseException as error:  # noqa: BLE001 — nothing may be lost on the way to the training thread
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _put_all(self, pairs: Iterable[DecodedPair]) -> None:
        source = iter(pairs)
        try:
            for position, image in self._feed_order:
                place = self._wait_for_place()
                if place is None:
                    return
                pair = next(source, None)
                if pair is None:
                    raise DataError(f"the images ended after {self._num_fed}, more are needed")
                if self._closed:
                    return
                self._put(position, image, place, pair)
        finally:
            close = getattr(source, "close", None)  # generators and Ray Data's streams stop their work
            if close is not None:
                close()

    def _wait_for_place(self) -> int | None:
        """A free place (its first LR pixel), waiting until the generation has moved on past the oldest image; None
        when closed.
        """
        with self._changed:
            if self._free_places:
                return None if self._closed else self._free_places.popleft()
            self._changed.wait_for(lambda: self._closed or self._held[0][0] < self._generation)
            return None if self._closed else heapq.heappop(self._held)[1]

    def _put(self, position: int, image: int, place: int, pair: DecodedPair) -> None:
        height, width = self._sizes_px_lr[image].tolist()
        expected = (height * self._plan.scale, width * self._plan.scale, 3)
        if pair.hr_HWC.shape != expected or pair.lr_HWC.shape != (height, width, 3):
            raise DataError(
                f"{pair.name}: HR {pair.hr_HWC.shape} and LR {pair.lr_HWC.shape}, "
                f"but image {image} of the manifest is HR {expected}, LR {(height, width, 3)}"
            )
        if self._copy_stream is not None and self._last_batch_event is not None:
            self._copy_stream.wait_event(self._last_batch_event)
        self._write(self._lr_pixels, place, pair.lr_HWC)
        self._write(self._hr_pixels, place * self._plan.scale**2, pair.hr_HWC)
        if self._copy_stream is not None:
            self._copy_stream.synchronize()
        key = (position // self._plan.window_images % 2, position % self._plan.window_images - self._slots.start)
        with self._changed:
            self._position[key], self._place[key] = position, place
            self._height[key], self._width[key] = height, width
            heapq.heappush(self._held, (position, place))
            self._num_fed += 1
            self._changed.notify_all()

    def _write(self, pixels: torch.Tensor, first_px: int, image_HWC: NDArray[np.uint8]) -> None:
        target = pixels[first_px : first_px + image_HWC.shape[0] * image_HWC.shape[1]]
        if self._copy_stream is None:
            target.numpy()[:] = image_HWC.reshape(-1, 3)
            return
        staged = torch.empty(target.shape, dtype=torch.uint8, pin_memory=True)
        staged.numpy()[:] = image_HWC.reshape(-1, 3)
        with torch.cuda.stream(self._copy_stream):
            target.copy_(staged, non_blocking=True)

    def _new_needs(self, start_step: int) -> Iterator[tuple[int, int]]:
        return window.needs(
            self._plan, first_sample=self._first_sample, num_samples=self._num_samples, start_step=start_step
        )


def images_ahead(plan: SamplePlan, num_slots: int) -> int:
    """Places that a worker has beyond its `num_slots` of a moving window: at least what four steps replace. At most
    one per slot, see the two rows in `PatchPool.__init__`.
    """
    images_per_step = plan.global_batch_size * num_slots / (plan.window_reuse_patches * plan.window_images)
    return min(num_slots, max(_MIN_IMAGES_AHEAD, round(4 * images_per_step)))


def _checked_sizes(plan: SamplePlan, sizes_px_hr: Sequence[tuple[int, int]]) -> Int64Array:
    sizes = np.array(sizes_px_hr, np.int64).reshape(-1, 2)
    if len(sizes) != plan.num_images:
        raise DataError(f"{len(sizes)} image sizes for num_images={plan.num_images}")
    wrong = np.flatnonzero((sizes % plan.scale != 0).any(axis=1) | (sizes < plan.patch_px_hr).any(axis=1))
    if len(wrong):
        height, width = sizes[wrong[0]].tolist()
        raise DataError(
            f"image {wrong[0]} of the manifest is {width}x{height} px: must be multiples of scale={plan.scale} "
            f"and at least the {plan.patch_px_hr} px of an HR patch (--data.patch-px-hr)"
        )
    return sizes


def _best_placement(device: torch.device, num_bytes: int) -> Literal["device", "host"]:
    if device.type != "cuda":
        return "device"
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return "device" if num_bytes < MAX_DEVICE_SHARE * free_bytes else "host"


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's stub
