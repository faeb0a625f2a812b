"""The pool against its definition: patches cut by plain NumPy slicing from the images that the pure functions name."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sr_data.errors import DataError, ImageError
from sr_data.pairs import DecodedPair
from sr_data.patch_pool import FeedError, PatchPool
from sr_data.sampling import SamplePlan, draw_samples, patch_origins
from sr_data.window import generation, image_stream

SCALE = 3
SIZES_PX_LR = [(9, 14), (12, 8), (8, 8), (10, 10), (17, 8), (8, 21), (11, 13)]
SIZES_PX_HR = [(height * SCALE, width * SCALE) for height, width in SIZES_PX_LR]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def plan(**changes: Any) -> SamplePlan:
    defaults = {
        "seed": 5, "global_batch_size": 8, "scale": SCALE, "patch_px_lr": 6, "augment": True,
        "num_images": 7, "window_images": 7, "window_reuse_patches": 20,
    }  # fmt: skip
    return SamplePlan(**(defaults | changes))


def windowed(**changes: Any) -> SamplePlan:
    return plan(window_images=4, **changes)


def pair(image: int) -> DecodedPair:
    """Every LR pixel has a colour of its own, and its HR pixels vary around it."""
    rng = np.random.default_rng(image)
    height, width = SIZES_PX_LR[image]
    lr_HWC = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    hr_HWC = lr_HWC.repeat(SCALE, 0).repeat(SCALE, 1)
    hr_HWC ^= rng.integers(0, 4, hr_HWC.shape, dtype=np.uint8)
    return DecodedPair(name=f"image-{image}", hr_HWC=hr_HWC, lr_HWC=lr_HWC)


def open_pool(of: SamplePlan, *, start_step: int = 0, feed: bool = True, **changes: Any) -> PatchPool:
    arguments: dict[str, Any] = {"first_sample": 0, "num_samples": 8, "device": torch.device("cpu")}
    pool = PatchPool(of, SIZES_PX_HR, start_step=start_step, **(arguments | changes))
    if feed:
        pool.feed(pair(image) for _, image in pool.needs)
    return pool


def expected_batch(of: SamplePlan, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    window = dict(itertools.islice(image_stream(of, generation(of, step)), of.window_images))
    image_in_slot = {position % of.window_images: image for position, image in window.items()}
    draws = draw_samples(of, step, 0, of.global_batch_size)
    images = [image_in_slot[slot] for slot in draws.slots.tolist()]
    sizes = np.array([SIZES_PX_LR[image] for image in images])
    y, x = patch_origins(draws, heights_px_lr=sizes[:, 0], widths_px_lr=sizes[:, 1], patch_px_lr=of.patch_px_lr)
    lr, hr = [], []
    for i, image in enumerate(images):
        both = pair(image)
        for patches, image_HWC, scale in ((lr, both.lr_HWC, 1), (hr, both.hr_HWC, SCALE)):
            side = of.patch_px_lr * scale
            patch = image_HWC[y[i] * scale :, x[i] * scale :][:side, :side]
            transform = int(draws.transforms[i])
            patch = patch[::-1] if transform & 2 else patch
            patch = patch[:, ::-1] if transform & 4 else patch
            patch = patch.transpose(1, 0, 2) if transform & 1 else patch
            patches.append(torch.from_numpy(patch.astype(np.float32) / np.float32(255)).permute(2, 0, 1))
    return torch.stack(lr), torch.stack(hr)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("of", [plan(), plan(augment=False), windowed(), windowed(window_reuse_patches=3)], ids=str)
def test_batches_are_what_the_definition_says(of: SamplePlan, placement: str, device: str) -> None:
    pool = open_pool(of, placement=placement, device=torch.device(device))
    transforms = set()
    for step in range(40):
        lr_NCHW, hr_NCHW = pool.batch(step)
        expected_lr_NCHW, expected_hr_NCHW = expected_batch(of, step)
        assert torch.equal(lr_NCHW.cpu(), expected_lr_NCHW)
        assert torch.equal(hr_NCHW.cpu(), expected_hr_NCHW)
        transforms |= set(draw_samples(of, step, 0, 8).transforms.tolist())
    assert transforms == (set(range(8)) if of.augment else {0})
    pool.close()


def test_hr_covers_what_lr_shows() -> None:
    """Without NumPy's transforms: LR repeated is HR but for the low bits that `pair` varies."""
    pool = open_pool(plan())
    for step in range(20):
        lr_NCHW, hr_NCHW = pool.batch(step)
        repeated = lr_NCHW.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
        assert (hr_NCHW - repeated).abs().max() <= 3.001 / 255
    pool.close()


@pytest.mark.parametrize("of", [plan(), windowed()], ids=["whole", "window"])
def test_workers_and_micro_batches_together_see_the_one_workers_batch(of: SamplePlan) -> None:
    workers = [open_pool(of, first_sample=first, num_samples=4) for first in (0, 4)]
    for step in range(12):
        parts = [pool.batch(step, micro, 2) for pool in workers for micro in range(2)]
        expected_lr_NCHW, expected_hr_NCHW = expected_batch(of, step)
        assert torch.equal(torch.cat([lr for lr, _ in parts]), expected_lr_NCHW)
        assert torch.equal(torch.cat([hr for _, hr in parts]), expected_hr_NCHW)
    assert all(pool.num_bytes < open_pool(of, feed=False).num_bytes for pool in workers)
    for pool in workers:
        pool.close()


@pytest.mark.parametrize("of", [plan(), windowed()], ids=["whole", "window"])
def test_pool_started_late_continues_bit_for_bit(of: SamplePlan) -> None:
    from_start, late = open_pool(of), open_pool(of, start_step=17)
    for step in range(30):
        lr_NCHW, hr_NCHW = from_start.batch(step)
        if step >= 17:
            late_lr_NCHW, late_hr_NCHW = late.batch(step)
            assert torch.equal(lr_NCHW, late_lr_NCHW)
            assert torch.equal(hr_NCHW, late_hr_NCHW)
    from_start.close()
    late.close()


def test_first_step_needs_only_its_own_images() -> None:
    """The rest of the dataset is held back until the batch is there."""
    release = threading.Event()
    of = plan(global_batch_size=2)

    def source(needs: Iterator[tuple[int, int]]) -> Iterator[DecodedPair]:
        for number, (_, image) in enumerate(needs):
            if number == 2:
                release.wait()
            yield pair(image)

    pool = open_pool(of, feed=False, num_samples=2)
    pool.feed(source(pool.needs))
    assert torch.equal(pool.batch(0)[0], expected_batch(of, 0)[0])
    release.set()
    pool.close()


def test_feeder_runs_ahead_but_never_into_images_still_drawn_from() -> None:
    """It takes what the window and the places ahead hold, then waits for the generation to move on."""
    taken = 0
    waiting = threading.Event()

    def source(needs: Iterator[tuple[int, int]]) -> Iterator[DecodedPair]:
        nonlocal taken
        for _, image in needs:
            taken += 1
            if taken == 8:
                waiting.set()
            yield pair(image)

    of = windowed(window_reuse_patches=20)
    pool = open_pool(of, feed=False)
    pool.feed(source(pool.needs))
    assert waiting.wait(30)
    for step in range(100):
        lr_NCHW, _ = pool.batch(step)
        assert torch.equal(lr_NCHW, expected_batch(of, step)[0])
        assert taken <= generation(of, step) + 8
    pool.close()


def test_waiting_for_images_is_counted() -> None:
    release = threading.Event()

    def source(needs: Iterator[tuple[int, int]]) -> Iterator[DecodedPair]:
        release.wait()
        for _, image in needs:
            yield pair(image)

    pool = open_pool(plan(), feed=False)
    pool.feed(source(pool.needs))
    timer = threading.Timer(0.2, release.set)
    timer.start()
    pool.batch(0)
    waited_s = pool.wait_s()
    assert 0.1 < waited_s < 30
    for step in range(1, 40):
        pool.batch(step)
    waited_s = pool.wait_s()
    pool.batch(41)
    assert pool.wait_s() == waited_s
    pool.close()


def test_error_of_the_source_reaches_the_training_thread() -> None:
    def source() -> Iterator[DecodedPair]:
        raise ImageError("0001.png: truncated")
        yield pair(0)

    pool = open_pool(plan(), feed=False)
    pool.feed(source())
    with pytest.raises(FeedError, match=r"0001.png: truncated") as raised:
        pool.batch(0)
    assert isinstance(raised.value.__cause__, ImageError)
    pool.close()


@pytest.mark.parametrize(
    ("pairs", "message"), [([], "ended after 0"), ([pair(image) for image in (0, 1, 0, 1, 0, 1, 0)], "image-[01]: HR")]
)
def test_wrong_stream_of_images_is_an_error(pairs: list[DecodedPair], message: str) -> None:
    pool = open_pool(plan(), feed=False)
    pool.feed(pairs)
    with pytest.raises(FeedError, match=message):  # noqa: PT012 — which batch meets it depends on the feeder's pace
        for step in range(100):
            pool.batch(step)
    pool.close()


def test_close_ends_a_feeder_that_waits_for_a_place_and_closes_its_source() -> None:
    closed = threading.Event()

    def source(needs: Iterator[tuple[int, int]]) -> Iterator[DecodedPair]:
        try:
            for _, image in needs:
                yield pair(image)
        finally:
            closed.set()

    pool = open_pool(windowed(), feed=False)
    pool.feed(source(pool.needs))
    pool.batch(0)
    pool.close()
    assert closed.wait(30)
    with pytest.raises(RuntimeError, match="closed"):
        pool.batch(1)


def test_close_returns_while_the_source_blocks() -> None:
    release = threading.Event()

    def source() -> Iterator[DecodedPair]:
        release.wait()
        yield pair(0)

    pool = open_pool(plan(), feed=False)
    pool.feed(source())
    pool.close(timeout_s=0.05)
    release.set()


def test_misuse_is_refused() -> None:
    pool = open_pool(windowed(), feed=False)
    with pytest.raises(RuntimeError, match="feed"):
        pool.batch(0)
    pool.feed(pair(image) for _, image in pool.needs)
    pool.batch(30)
    with pytest.raises(ValueError, match="step=0"):
        pool.batch(0)
    with pytest.raises(ValueError, match="num_micro=3"):
        pool.batch(30, 0, 3)
    pool.close()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(18, 18)] * 6, "6 image sizes for num_images=7"),
        ([(18, 18)] * 6 + [(18, 20)], "image 6 of the manifest is 20x18"),
        ([(15, 18)] + [(18, 18)] * 6, r"at least the 18 px.*--data\.patch-px-hr"),
    ],
)
def test_sizes_that_do_not_fit_the_plan_are_refused(sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        PatchPool(plan(), sizes, first_sample=0, num_samples=8, start_step=0, device=torch.device("cpu"))
