"""Score files that can be compared, and the many that can't."""

import json
from pathlib import Path
from typing import Any

import pytest

from sr_data.errors import StorageError
from sr_serve.promotion import PromotionError
from sr_serve.score_files import paired_sets
from sr_serve.succession import Version

OURS, THEIRS = (Version(name="m", version=number, tags={}) for number in ("2", "1"))


def entry(model: str, psnr_db: float | None, /, **changes: Any) -> dict[str, Any]:
    """As evaluate_model.py writes it."""
    names = ("a", "b", "c", "d", "e", "f")
    return {
        "model": model,
        "version": model.rpartition("/")[2] if model.startswith("models:/") else None,
        "self_ensemble": False,
        "fingerprint": "f5",
        "set": "Set6",
        "scale": 2,
        "protocol": "psnr@y,crop=scale",
        "psnr_db": psnr_db,
        "ssim": 0.9,
        "images": [{"name": name, "psnr_db": psnr_db, "ssim": 0.9} for name in names],
        **changes,
    }


@pytest.fixture
def written(tmp_path: Path):
    def write(name: str, entries: Any) -> str:
        (tmp_path / name).write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return str(tmp_path / name)

    return write


def test_each_model_is_found_among_others_of_its_file(written) -> None:
    more = {"set": "Set7", "fingerprint": "f7"}
    all_in_one = [
        entry("bicubic", 28.0),
        entry("models:/m@challenger", 30.5, version="2"),
        entry("models:/m/1", 30.0),
        entry("bicubic", 28.0, **more),
        entry("models:/m/1", 31.0, **more),
        entry("models:/m@challenger", None, version="2", **more),
    ]
    path = written("all.json", all_in_one)
    six, seven = paired_sets((path, path), OURS, THEIRS)
    assert (six.challenger.set, six.challenger.psnr_db, six.champion.psnr_db, six.fingerprint) == (
        "Set6", 30.5, 30.0, "f5",
    )  # fmt: skip
    assert (seven.challenger.set, seven.challenger.psnr_db, seven.champion.psnr_db) == ("Set7", float("inf"), 31.0)
    assert [it.champion.psnr_db for it in paired_sets((path, path), OURS, None)] == [28.0, 28.0]  # no champion: bicubic


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "psnr@rgb,crop=scale"}, r"protocol differ between .*psnr@y,crop=scale, psnr@rgb,crop=scale"),
        ({"fingerprint": "f6"}, "fingerprint differ between .*: f5, f6"),
        ({"scale": 4}, "scale differ between .*: 2, 4"),
        ({"set": "Set8"}, "not of the same sets: only one has Set6, Set8"),
        ({"self_ensemble": True}, "self_ensemble differ"),
        ({"images": entry("", 30.0)["images"][:-1]}, r"images differ between .*\['f'\]"),
        ({"images": [*entry("", 30.0)["images"], {"name": "a", "psnr_db": 1, "ssim": 1}]}, "more than one score for a"),
        ({"images": [{"name": "a", "psnr_db": float("nan"), "ssim": 1}]}, "entry 1: holds a score that is no number"),
        ({"images": []}, "entry 1: the set 'Set6' has no images"),
        ({"images": [{"name": "a"}]}, "entry 1: has no 'psnr_db'"),
        ({"images": None}, "entry 1: is not as evaluate_model.py --json writes it"),
        ({"version": "3", "model": "models:/m@champion"}, r"no scores of models:/m/1, but of models:/m@champion \(ver"),
        ({"version": None, "model": "models:/m@champion"}, "no scores of models:/m/1"),  # it may have been another one
        ({"model": "models:/other/1"}, "no scores of models:/m/1, but of models:/other/1"),
        ({"model": "runs/step-000000100.safetensors", "version": None}, "no scores of models:/m/1"),
    ],
)
def test_scores_that_differ_in_more_than_the_model_are_refused(written, changes, message) -> None:
    ours = written("ours.json", [entry("models:/m/2", 30.5)])
    theirs = written("theirs.json", [entry("models:/m/1", 30.0, **changes)])
    with pytest.raises(PromotionError, match=message) as refused:
        paired_sets((ours, theirs), OURS, THEIRS)
    assert "theirs.json" in str(refused.value) and "--scores" in str(refused.value)


def test_other_files_are_refused(written, tmp_path: Path) -> None:
    theirs = written("theirs.json", [entry("models:/m/1", 30.0)])
    without = {key: value for key, value in entry("models:/m/2", 30.0).items() if key != "fingerprint"}
    for content, message in [
        ("not JSON", "ours.json: is no JSON file"),
        ({"psnr_db": 30}, "ours.json: holds no list of scores"),
        ([without], "ours.json: entry 1: has no 'fingerprint'"),
        ([entry("models:/m/2", 30.5)] * 2, "ours.json: holds scores of models:/m/2 on Set6 twice"),
    ]:
        with pytest.raises(PromotionError, match=message):
            paired_sets((written("ours.json", content), theirs), OURS, THEIRS)
    with pytest.raises(StorageError, match="nowhere"):
        paired_sets((str(tmp_path / "nowhere.json"), theirs), OURS, THEIRS)
