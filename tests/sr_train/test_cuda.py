"""What only a GPU can show: the fast step equals the reference, nothing in it waits, and the feed runs beside it."""

import math
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from sr_data.batch_feed import BatchFeed
from sr_data.pairs import DecodedPair
from sr_data.patch_pool import PatchPool, Placement
from sr_data.sampling import SamplePlan
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_train.collective import Collective
from sr_train.learner import PixelLearner
from sr_train.optimizer import FiniteGuard
from sr_train.options import OptimConfig, StepConfig
from sr_train.step_mode import REFERENCE, StepMode, step_mode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIG = EDSRConfig(scale=2, num_blocks=4, num_channels=32)
OPTIM = OptimConfig(ema_decay=0.9, clip_grad_norm=1.0)
BATCH, NUM_IMAGES = 8, 12


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any call that makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def pool(placement: Placement, *, windowed: bool = False) -> PatchPool:
    plan = SamplePlan(
        seed=0,
        global_batch_size=BATCH,
        scale=2,
        patch_px_lr=24,
        augment=True,
        num_images=NUM_IMAGES,
        window_images=NUM_IMAGES // 2 if windowed else NUM_IMAGES,
        window_reuse_patches=4 * BATCH,
    )
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (10, 12, 3), np.uint8) for _ in range(NUM_IMAGES)]
    lr = [image.repeat(8, 0).repeat(8, 1) for image in coarse]
    pairs = [DecodedPair(str(i), np.ascontiguousarray(a.repeat(2, 0).repeat(2, 1)), a) for i, a in enumerate(lr)]
    made = PatchPool(
        plan,
        [pair.hr_HWC.shape[:2] for pair in pairs],
        first_sample=0,
        num_samples=BATCH,
        start_step=0,
        device=torch.device("cuda"),
        placement=placement,
    )
    made.feed(pairs[image] for _, image in made.needs)
    return made


def learner(mode: StepMode) -> PixelLearner:
    return PixelLearner(
        build_model(CONFIG, seed=0), OPTIM, device=torch.device("cuda"), mode=mode, collective=Collective()
    )


def trained(mode: StepMode, num_steps: int, *, placement: Placement = "device") -> tuple[PixelLearner, list[float]]:
    ours, source = learner(mode), pool(placement)
    feed = BatchFeed(source, num_micro=1, device=torch.device("cuda"), ahead=mode.batch_ahead)
    losses = []
    for step in range(num_steps):
        ours.step(feed.take(step), learning_rate=1e-3)
        feed.prepare(step + 1)
        losses.append(ours.report()["loss"])
    source.close()
    return ours, losses


FAST = step_mode(StepConfig(), device_type="cuda", num_workers=1)


@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [
        (StepMode(channels_last=True, fused_optimizer=True), 1e-3),
        (StepMode(channels_last=True, fused_optimizer=True, cuda_graph="must"), 1e-3),
        (StepMode(channels_last=True, fused_optimizer=True, cuda_graph="must", compile="must", batch_ahead=True), 1e-3),
        (FAST, 2e-2),
    ],
    ids=str,
)
def test_every_fast_path_follows_the_reference(mode: StepMode, tolerance: float) -> None:
    _, expected = trained(REFERENCE, 12)
    _, losses = trained(mode, 12)
    assert losses == pytest.approx(expected, rel=tolerance)


def test_a_short_training_reaches_the_reference_s_psnr() -> None:
    (reference, _), (fast, _) = trained(REFERENCE, 300), trained(FAST, 300)
    source = pool("device")
    lr_NCHW, hr_NCHW = source.batch(5_000)
    source.close()
    scores = []
    with torch.no_grad():
        for ours in (reference, fast):
            mse = nn.functional.mse_loss(ours.inference_network()(lr_NCHW).clamp(0, 1), hr_NCHW)
            scores.append(-10 * math.log10(float(mse)))
    assert scores[1] == pytest.approx(scores[0], abs=0.3)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_steps_and_feed_never_wait_for_the_gpu(placement: Placement, request: pytest.FixtureRequest) -> None:
    ours, source = learner(FAST), pool(placement)
    feed = BatchFeed(source, num_micro=1, device=torch.device("cuda"), ahead=True)
    for step in range(6):  # compiled, captured
        ours.step(feed.take(step), learning_rate=1e-3)
        feed.prepare(step + 1)
    request.getfixturevalue("no_waiting")
    for step in range(6, 30):
        ours.step(feed.take(step), learning_rate=1e-3)
        feed.prepare(step + 1)
    torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(ours.report()["loss"])
    assert feed.waited_s() >= 0
    source.close()


@pytest.mark.parametrize("windowed", [False, True])
def test_placement_and_cutting_ahead_change_no_bit(windowed: bool) -> None:
    sources = [pool("device", windowed=windowed), pool("host", windowed=windowed), pool("device", windowed=windowed)]
    feeds = [
        BatchFeed(source, num_micro=2, device=torch.device("cuda"), ahead=index == 2)
        for index, source in enumerate(sources)
    ]
    for step in range(40):
        taken = [feed.take(step) for feed in feeds]
        for feed in feeds:
            feed.prepare(step + 1)
        for other in taken[1:]:
            for batch, other_batch in zip(taken[0], other, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(batch, other_batch, strict=True)), step
    for source in sources:
        source.close()


def test_a_replayed_step_stops_at_a_bad_gradient_too() -> None:
    ours, source = learner(FAST), pool("device")
    for step in range(6):
        ours.step([source.batch(step)], learning_rate=1e-3)
    ours.report()
    before = {name: value.clone() for name, value in ours.network.state_dict().items()}
    lr_NCHW, hr_NCHW = source.batch(6)
    ours.step([(lr_NCHW, hr_NCHW * torch.inf)], learning_rate=1e-3)
    ours.step([(lr_NCHW, hr_NCHW)], learning_rate=1e-3)
    with pytest.raises(ArithmeticError, match="after 0 good steps"):
        ours.report()
    assert all(torch.equal(value, ours.network.state_dict()[name]) for name, value in before.items())
    source.close()


def test_the_learning_rate_reaches_a_captured_step() -> None:
    ours, source = learner(FAST), pool("device")
    for step in range(6):
        ours.step([source.batch(step)], learning_rate=1e-3)
    before = ours.network.head.weight.detach().clone()  # type: ignore[union-attr]
    ours.step([source.batch(6)], learning_rate=0.0)
    assert torch.equal(before, ours.network.head.weight)  # type: ignore[union-attr]
    source.close()


def test_the_guard_needs_no_host() -> None:
    guard = FiniteGuard(torch.device("cuda"))
    guard.check(torch.tensor(float("nan"), device="cuda"))
    guard.end_step()
    assert guard.read() == 0


def test_a_batch_stays_as_it_is_until_its_step_has_read_it() -> None:
    """Nobody but the feed holds it, the GPU is far behind the host, and the side stream has the next one to write."""
    sources = [pool("device"), pool("device")]
    expected_feed, feed = (
        BatchFeed(source, num_micro=1, device=torch.device("cuda"), ahead=ahead)
        for source, ahead in zip(sources, (False, True), strict=True)
    )
    expected = torch.stack([expected_feed.take(step)[0][1].double().sum() for step in range(40)])
    sums = []
    for step in range(40):
        ((_, hr_NCHW),) = feed.take(step)
        torch.cuda._sleep(5_000_000)
        sums.append(hr_NCHW.double().sum())
        del hr_NCHW
        feed.prepare(step + 1)
    assert torch.equal(torch.stack(sums), expected)
    for source in sources:
        source.close()


def test_waiting_for_a_slow_source_is_seen() -> None:
    class Slow:
        def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
            time.sleep(0.2)
            return torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")

    feed = BatchFeed(Slow(), num_micro=1, device=torch.device("cuda"), ahead=True)
    for step in range(3):
        feed.take(step)
        feed.prepare(step + 1)
    assert feed.waited_s() > 0.5
