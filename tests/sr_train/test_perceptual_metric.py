"""LPIPS against torchmetrics' own function, and what happens where its weights can't be had."""

import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
from torchvision.models import AlexNet_Weights, alexnet

from sr_train.metrics import MetricError
from sr_train.perceptual_metric import LpipsMetric, Unavailable, open_lpips
from sr_train.perceptual_weights import PerceptualWeights, load_alexnet_weights


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet with random convolutions, whole, as torchvision publishes it; its classifier takes no room."""
    torch.manual_seed(0)
    state = alexnet(weights=None).state_dict()
    state |= {key: torch.zeros(()).expand(tensor.shape) for key, tensor in state.items() if "classifier" in key}
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def weights(alexnet_file: Path) -> PerceptualWeights:
    return load_alexnet_weights(str(alexnet_file))


@pytest.fixture(scope="module")
def metric(weights: PerceptualWeights) -> LpipsMetric:
    return LpipsMetric(weights)


def images(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 images that differ by noise."""
    rng = np.random.default_rng(height * width)
    first_HWC = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    noisy_HWC = np.clip(first_HWC + rng.normal(0, 20, first_HWC.shape), 0, 255).astype(np.uint8)
    return first_HWC, noisy_HWC


@pytest.mark.parametrize(("height", "width"), [(64, 64), (67, 131)])
def test_the_score_is_torchmetrics_own(
    metric: LpipsMetric,
    alexnet_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    height: int,
    width: int,
) -> None:
    """Its function takes AlexNet from torch.hub's cache and nowhere else, so the file is laid there for it."""
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / Path(AlexNet_Weights.IMAGENET1K_V1.url).name).symlink_to(alexnet_file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def unit_NCHW(image_HWC: np.ndarray) -> Tensor:
        return torch.from_numpy(image_HWC).permute(2, 0, 1)[None].float() / 255

    sr_HWC, hr_HWC = images(height, width)
    theirs = learned_perceptual_image_patch_similarity(unit_NCHW(sr_HWC), unit_NCHW(hr_HWC), "alex", normalize=True)
    assert metric.score(sr_HWC, hr_HWC) == float(theirs) > 0


def test_identical_images_score_zero_and_more_noise_scores_more(metric: LpipsMetric) -> None:
    hr_HWC, noisy_HWC = images(80, 96)
    noisier_HWC = np.clip(hr_HWC + 3.0 * (noisy_HWC.astype(float) - hr_HWC), 0, 255).astype(np.uint8)
    assert metric.score(hr_HWC, hr_HWC) == 0
    assert 0 < metric.score(noisy_HWC, hr_HWC) < metric.score(noisier_HWC, hr_HWC)


def test_tensors_and_arrays_views_and_copies_score_the_same(metric: LpipsMetric) -> None:
    sr_HWC, hr_HWC = images(64, 70)
    score = metric.score(sr_HWC, hr_HWC)
    assert metric.score(torch.from_numpy(sr_HWC), torch.from_numpy(hr_HWC)) == score
    flipped_HWC = np.ascontiguousarray(sr_HWC[:, ::-1])[:, ::-1]
    assert metric.score(flipped_HWC, hr_HWC) == score
    assert metric.distance(sr_HWC, hr_HWC).shape == ()


def test_autocast_around_it_changes_nothing(metric: LpipsMetric) -> None:
    sr_HWC, hr_HWC = images(64, 64)
    score = metric.score(sr_HWC, hr_HWC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert metric.score(sr_HWC, hr_HWC) == score


def test_it_can_be_sent_to_a_worker(metric: LpipsMetric) -> None:
    sr_HWC, hr_HWC = images(64, 64)
    sent = pickle.loads(pickle.dumps(metric))
    assert sent.score(sr_HWC, hr_HWC) == metric.score(sr_HWC, hr_HWC)
    assert sent.protocol == metric.protocol


def test_making_it_leaves_the_global_generator_alone(weights: PerceptualWeights) -> None:
    before = torch.random.get_rng_state()
    LpipsMetric(weights)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_numbers_of_other_weights_have_another_protocol(metric: LpipsMetric, weights: PerceptualWeights) -> None:
    assert weights.sha256 is not None
    assert metric.protocol == f"lpips@alex,v0.1,weights={weights.sha256[:8]}"
    published = PerceptualWeights(
        state=weights.state, description="imagenet", sha256=weights.sha256, is_official=True
    )  # what a file with torchvision's hash gives
    assert LpipsMetric(published).protocol == "lpips@alex,v0.1"


@pytest.mark.parametrize(
    ("sr_HWC", "hr_HWC", "said"),
    [
        (np.zeros((64, 64, 3)), np.zeros((64, 64, 3), np.uint8), "SR image is float64"),
        (np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8), r"HR image is uint8 \(64, 64\)"),
        (np.zeros((64, 64, 3), np.uint8), np.zeros((64, 65, 3), np.uint8), "must be equal"),
        (np.zeros((30, 64, 3), np.uint8), np.zeros((30, 64, 3), np.uint8), "sides from 31 px"),
    ],
)
def test_images_that_can_not_be_compared_are_refused(
    metric: LpipsMetric, sr_HWC: np.ndarray, hr_HWC: np.ndarray, said: str
) -> None:
    with pytest.raises(MetricError, match=said):
        metric.score(sr_HWC, hr_HWC)


def test_31_px_are_enough(metric: LpipsMetric) -> None:
    assert metric.score(*images(31, 31)) > 0


def test_a_file_opens_it(alexnet_file: Path, metric: LpipsMetric) -> None:
    opened = open_lpips(str(alexnet_file))
    assert isinstance(opened, LpipsMetric)
    assert opened.score(*images(64, 64)) == metric.score(*images(64, 64))


def test_without_internet_there_is_a_reason_in_one_line_and_soon(offline: Path) -> None:
    started = time.monotonic()
    found = open_lpips()
    assert time.monotonic() - started < 20
    assert isinstance(found, Unavailable)
    assert "\n" not in found.reason
    assert AlexNet_Weights.IMAGENET1K_V1.url in found.reason
    assert "--perceptual.lpips-weights FILE" in found.reason


def test_a_missing_or_damaged_file_is_a_reason_too(tmp_path: Path) -> None:
    (tmp_path / "damaged.pth").write_bytes(b"nothing of use")
    for name, said in (("nowhere.pth", "no such file"), ("damaged.pth", "damaged")):
        found = open_lpips(str(tmp_path / name))
        assert isinstance(found, Unavailable)
        assert said in found.reason


def test_none_asks_for_none(offline: Path) -> None:
    assert open_lpips("none") == Unavailable(reason="not asked for (--perceptual.lpips-weights none)")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_it_is_the_same_score(weights: PerceptualWeights, metric: LpipsMetric) -> None:
    there = LpipsMetric(weights, device="cuda")
    distance = there.distance(*images(64, 96))
    assert distance.is_cuda
    assert float(distance) == pytest.approx(metric.score(*images(64, 96)), rel=1e-2)  # TF32 has 10 bits
