"""The README's first command, less the installation: a stranger's first run, from nothing to a registered model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.pipeline import without_controller
from tests.support.process import PATIENCE_S

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def first_run(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder it ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("stranger")
    command = [sys.executable, str(repo / "pipelines" / "train_edsr.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


def result_of(folder: Path) -> dict[str, object]:
    (path,) = folder.glob("runs/*/result.json")
    values: dict[str, object] = json.loads(path.read_text())
    return values


def test_it_beats_bicubic_on_a_photo_that_it_did_not_train_on(first_run: tuple[Path, str]) -> None:
    result = result_of(first_run[0])
    assert isinstance(result["psnr_db"], float) and isinstance(result["bicubic_psnr_db"], float)
    assert result["psnr_db"] > result["bicubic_psnr_db"] + 0.5


def test_it_says_where_everything_is_and_everything_is_there(first_run: tuple[Path, str]) -> None:
    folder, said = first_run
    places = dict(re.findall(r"^(checkpoint|picture|MLflow run|registered) +(\S+)", said, flags=re.MULTILINE))
    assert Path(places["checkpoint"]).is_file()
    with Image.open(places["picture"]) as picture:
        assert picture.width > 4 * 300
    assert places["MLflow run"] in {path.name for path in (folder / "runs").iterdir()}
    assert places["registered"] == "models:/edsr-x2/1"
    said = without_controller(said)
    assert "Traceback" not in said and "WARNING" not in said


def test_progress_is_a_line_every_few_seconds_where_there_is_no_terminal(first_run: tuple[Path, str]) -> None:
    lines = [line for line in first_run[1].splitlines() if line.startswith("step ") and "patches/s" in line]
    assert 2 <= len(lines) <= 60
    pattern = r"step +\d+/600 .*patches/s \| data wait +\d+ % \| loss [\d.]+ \| PSNR .* \| learning rate .* left"
    assert all(re.match(pattern, line) for line in lines), lines


def test_the_registered_model_upscales_an_image(first_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = first_run
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    import mlflow

    model = mlflow.pyfunc.load_model("models:/edsr-x2@challenger")
    image_NHWC = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), dtype=np.uint8)
    upscaled = model.predict(image_NHWC)
    assert upscaled.shape == (1, 40, 60, 3) and upscaled.dtype == np.uint8


def test_the_registered_model_says_what_it_is(first_run: tuple[Path, str]) -> None:
    folder, _ = first_run
    from mlflow import MlflowClient

    version = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_model_version("edsr-x2", "1")
    assert "builtin://photos [train]" in version.description and "CC BY 2.0" in version.description
    assert f"| this model | {result_of(folder)['psnr_db']:.3f} |" in version.description
    (card,) = folder.glob("mlartifacts/**/MODEL_CARD.md")
    assert {path.stem for path in (card.parent / "samples").iterdir()} == {"lr", "bicubic", "sr", "hr"}
    assert (card.parent / "onnx" / "model.onnx").is_file()
