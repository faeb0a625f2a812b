"""Models of one colour, whose PSNR numpy knows, against a champion in a real registry."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sr_data.manifest import Manifest, load_manifest
from sr_models.architectures import build_model
from sr_models.edsr import DIV2K_MEAN_RGB, EDSRConfig
from sr_models.weights import save_model
from sr_train.champion import Comparison, compare_scores, compare_with_champion
from sr_train.metrics import ImageScore
from sr_train.model_registry import register_model, version_at
from sr_train.tracking import start_run
from sr_train.tracking_server import TrackingError
from sr_train.upscaler import UpscalerError
from sr_train.validation import mean_score
from tests.support.mlflow_server import MlflowServer

CHAMPIONS_LEVEL, BETTER_LEVEL = 255, 128
"""Of grey images; that of the photos is about 128."""
PROTOCOL = "psnr@rgb,crop=scale"
LR_HWC = np.zeros((8, 8, 3), np.uint8)


def save_grey(folder: Path, level: int) -> str:
    """A network that paints every pixel with one grey level."""
    config = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
    network = build_model(config, seed=0)
    state = network.state_dict()
    state["tail.weight"].zero_()
    state["tail.bias"].copy_(level - 255.0 * torch.tensor(DIV2K_MEAN_RGB))
    save_model(folder, config, state)
    return str(folder)


def grey_psnr_db(path: Path, level: int) -> float:
    """Of an image of one grey level against the file's, without a border of 2 px."""
    hr_HWC = np.asarray(Image.open(path), dtype=np.float64)
    height, width = (side - side % 2 for side in hr_HWC.shape[:2])
    return 10 * math.log10(255**2 / np.mean((hr_HWC[2 : height - 2, 2 : width - 2] - level) ** 2))


@pytest.fixture(scope="module")
def champion(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registered model, whose version 1 is white and the champion; its name."""
    folder = tmp_path_factory.mktemp("champion")
    run = start_run(tracking_uri=mlflow_server.uri, experiment="champ", run_name="r", params={}, tags={}, texts={})
    model = Path(save_grey(folder / "white", CHAMPIONS_LEVEL))
    register_model(run, model, name="grey-x2", tags={}, sample_lr_HWC=LR_HWC, alias="champion")
    return "grey-x2"


@pytest.fixture
def photos(tiny_photos: Path) -> Manifest:
    return load_manifest(str(tiny_photos), split="valid", scale=2)


def compared(model: str, name: str, validation: Manifest, server: MlflowServer) -> Comparison | None:
    return compare_with_champion(
        model, name=name, validation=validation, protocol=PROTOCOL, tracking_uri=server.uri, device="cpu"
    )


def test_a_better_model_is_better_by_the_mean_of_its_images(
    champion: str, photos: Manifest, tiny_photos: Path, tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    result = compared(save_grey(tmp_path / "grey", BETTER_LEVEL), champion, photos, mlflow_server)
    assert result is not None
    files = {path.name: path for path in tiny_photos.iterdir()}
    ours = {name: grey_psnr_db(path, BETTER_LEVEL) for name, path in files.items()}
    white = {name: grey_psnr_db(path, CHAMPIONS_LEVEL) for name, path in files.items()}
    expected = {Path(name).stem: ours[name] - white[name] for name in files}
    assert {Path(name).stem: db for name, db in result.differences_db.items()} == pytest.approx(expected)
    assert result.psnr_db == pytest.approx(np.mean(list(ours.values())))
    assert result.champion_psnr_db == pytest.approx(np.mean(list(white.values())))
    assert result.gain_db == pytest.approx(np.mean(list(expected.values())))
    assert result.ssim != result.champion_ssim
    assert result.interval_db is not None
    low_db, high_db = result.interval_db
    assert min(expected.values()) <= low_db < result.gain_db < high_db <= max(expected.values())
    assert result.sentence() == (
        f"+{result.gain_db:.2f} dB to grey-x2@champion (version 1), 95 % confidence +{low_db:.2f} … +{high_db:.2f} dB "
        f"over 6 images (psnr@rgb,crop=scale): better"
    )


def test_the_same_weights_differ_by_exactly_nothing(
    champion: str, photos: Manifest, tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    result = compared(save_grey(tmp_path / "white", CHAMPIONS_LEVEL), champion, photos, mlflow_server)
    assert result is not None
    assert set(result.differences_db.values()) == {0.0}
    assert (result.gain_db, result.interval_db, result.ssim) == (0.0, (0.0, 0.0), result.champion_ssim)
    assert result.sentence().endswith("6 images (psnr@rgb,crop=scale): no difference that these images show")


def test_no_champion_is_no_error_and_all_else_is(
    champion: str, photos: Manifest, tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    uri = mlflow_server.uri
    assert version_at(uri, champion, "champion") == "1"
    assert version_at(uri, champion, "challenger") is None
    assert version_at(uri, "no-such-model", "champion") is None
    assert compared(str(tmp_path / "never read"), "no-such-model", photos, mlflow_server) is None
    with pytest.raises(UpscalerError, match="is no saved model"):
        compared(str(tmp_path / "none"), champion, photos, mlflow_server)
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9"):
        version_at("http://127.0.0.1:9", champion, "champion")
    with pytest.raises(TrackingError, match="name"):
        version_at(uri, "a/b", "champion")


def of_scores(ours_db: list[float], champions_db: list[float]) -> Comparison:
    ours, champions = (
        mean_score(
            "set", 2, PROTOCOL, [ImageScore(name=f"{i:03d}", psnr_db=db, ssim=0.9) for i, db in enumerate(all_db)]
        )
        for all_db in (ours_db, champions_db)
    )
    return compare_scores(ours, champions, name="edsr-x2", champion_version="3")


@pytest.mark.parametrize(
    ("ours_db", "verdict"),
    [
        ([30.1], "one image gives no confidence interval"),
        ([30.1] * 5, "fewer than 6 images are too few to tell"),
        ([30.1] * 6, "better"),
        ([29.9] * 6, "worse"),
        ([30.1, 29.9] * 3, "no difference that these images show"),
        ([30.1] * 4, "4 images give no confidence interval"),
        ([30.1] * 4 + [math.inf], "an image without any error leaves no confidence interval"),
    ],
)
def test_the_verdict_is_what_the_images_can_show(ours_db: list[float], verdict: str) -> None:
    assert of_scores(ours_db, [30.0] * len(ours_db)).verdict() == verdict


def test_a_single_image_has_its_difference_only() -> None:
    assert of_scores([30.21], [30.0]).sentence() == (
        "+0.21 dB to edsr-x2@champion (version 3) over 1 image (psnr@rgb,crop=scale): "
        "one image gives no confidence interval"
    )


def test_images_that_both_restore_exactly_do_not_differ() -> None:
    assert of_scores([math.inf, 31.0], [math.inf, 30.0]).gain_db == 0.5


def test_scores_of_different_images_are_not_compared() -> None:
    ours = mean_score("set", 2, PROTOCOL, [ImageScore(name="a", psnr_db=30.0, ssim=0.9)])
    others = mean_score("set", 2, PROTOCOL, [ImageScore(name="b", psnr_db=30.0, ssim=0.9)])
    with pytest.raises(ValueError, match="different images; only one has a, b"):
        compare_scores(ours, others, name="edsr-x2", champion_version="3")
    with pytest.raises(ValueError, match="different scales, 2 and 4"):
        compare_scores(ours, mean_score("set", 4, PROTOCOL, ours.images), name="edsr-x2", champion_version="3")
    of_y = mean_score("set", 2, "psnr@y,crop=scale", ours.images)
    with pytest.raises(ValueError, match="different protocols"):
        compare_scores(ours, of_y, name="edsr-x2", champion_version="3")
