"""Each benchmark runs as one command at its tiniest size, prints its table and writes the record that it promises."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from sr_data.manifest import load_manifest
from sr_data.pairs import load_pair
from sr_data.storage import open_store
from tests.support.process import PATIENCE_S


def record_of(repo: Path, name: str, *options: str) -> tuple[dict[str, Any], str]:
    """What a benchmark wrote and printed."""
    command = [sys.executable, str(repo / "benchmarks" / f"{name}.py"), "--size", "tiny", "--device", "cpu", *options]
    path = Path("records") / f"{name}.json"
    done = subprocess.run(
        [*command, "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record: dict[str, Any] = json.loads(path.read_text())
    return record, done.stdout


def check_common_fields(record: dict[str, Any], name: str) -> None:
    assert (record["benchmark"], record["size"]) == (name, "tiny")
    assert record["hardware"]["device"] == "cpu" and record["hardware"]["CPU"] and record["hardware"]["CPUs"] >= 1
    assert {"python", "torch"} <= record["versions"].keys() and {"sha", "dirty"} == record["git"].keys()
    assert record["options"]["rounds"] >= 2


def check_shares(record: dict[str, Any]) -> None:
    """Achieved FLOP/s beside ceilings of the same run."""
    ceilings = {(row["operation"], row["precision"]): row["flops_per_s"] for row in record["ceilings"]}
    assert ("matmul", "float32") in ceilings and ("conv", "float32") in ceilings
    for row in record["rows"]:
        matmul = ceilings["matmul", row.get("precision", "float32")]
        assert row["gflops_per_s"] * 1e9 == pytest.approx(row["share_of_matmul"] * matmul)
        assert row["share_of_conv"] > 0


def test_patch_pool(repo: Path) -> None:
    record, printed = record_of(repo, "patch_pool")
    check_common_fields(record, "patch_pool")
    assert [(row["placement"], row["window"]) for row in record["rows"]] == [
        ("device", "whole"), ("host", "whole"), ("device", "moving"), ("host", "moving"),
    ]  # fmt: skip
    assert all(0 < row["slowest"] <= row["patches_per_s"] <= row["fastest"] for row in record["rows"])
    assert printed.startswith("patch_pool: tiny, on cpu")
    assert f"{record['rows'][0]['patches_per_s']:,.0f}" in printed


def test_training_step(repo: Path) -> None:
    record, _ = record_of(repo, "training_step")
    check_common_fields(record, "training_step")
    variants = {row["variant"]: row for row in record["rows"]}
    assert variants["auto"]["mode"] == "float32, channels_last, fused Adam"
    assert variants["reference"]["mode"] == "float32"
    assert all(row["patches_per_s"] == pytest.approx(16 * 1000 / row["step_ms"]) for row in record["rows"])
    check_shares(record)


def test_pipeline_overhead(repo: Path) -> None:
    record, _ = record_of(repo, "pipeline_overhead")
    check_common_fields(record, "pipeline_overhead")
    fixed, pool = record["rows"]
    assert (fixed["feed"], pool["feed"]) == ("one fixed batch", "patch pool")
    assert fixed["of_fixed_batch"] == 1
    assert pool["of_fixed_batch_min"] <= pool["of_fixed_batch"] <= pool["of_fixed_batch_max"]
    check_shares(record)


@pytest.mark.e2e  # starts Ray and an S3 server
def test_decoding(repo: Path) -> None:
    record, _ = record_of(repo, "decoding")
    check_common_fields(record, "decoding")
    assert [row["way"] for row in record["rows"]] == [
        "Pillow, from memory", "decode_image, from memory", "load_pair, LR read", "load_pair, LR made",
        "Ray Data, as in training", "staging, 6 images", "staging, LR x3 made",
    ]  # fmt: skip
    assert all(row["images_per_s"] > 0 and "images_per_core_s" in row and "of_pillow" in row for row in record["rows"])


@pytest.mark.e2e  # a whole run on a cluster of its own
def test_whole_pipeline(repo: Path) -> None:
    record, _ = record_of(repo, "whole_pipeline")
    check_common_fields(record, "whole_pipeline")
    [row] = record["rows"]
    assert row["data"] == "moving window"
    assert row["of_step_alone"] == pytest.approx(row["patches_per_s"] / row["step_alone_patches_per_s"])
    assert row["elapsed_s"] > row["seconds_to_first_step"] > 0 and 0 <= row["data_wait_share"] < 1


def test_inference(repo: Path) -> None:
    record, _ = record_of(repo, "inference")
    check_common_fields(record, "inference")
    assert [row["tile"] for row in record["rows"] if row["precision"] == "float32"] == ["8 px", "whole"]
    for row in record["rows"]:
        width, height = map(int, row["output"].split("×"))
        assert row["mpx_per_s"] == pytest.approx(width * height / 1e6 / row["seconds"])
    check_shares(record)


def test_basicsr_feed(repo: Path) -> None:
    record, _ = record_of(repo, "basicsr_feed", "--num-workers", "1")
    check_common_fields(record, "basicsr_feed")
    fixed, basicsr, pool = record["rows"]
    assert [row["feed"] for row in record["rows"]] == ["one fixed batch", "BasicSR, 1 workers", "patch pool"]
    assert fixed["alone_patches_per_s"] is None
    assert basicsr["alone_patches_per_s"] * basicsr["pool_is_times_alone"] == pytest.approx(pool["alone_patches_per_s"])
    assert pool["pool_is_times"] == pool["pool_is_times_alone"] == 1
    assert all(row["patches_per_s"] > 0 and 0 <= row["wait_share"] < 1 for row in record["rows"])


def test_basicsrs_feed_cuts_lr_and_hr_alike_anywhere_in_all_orientations(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baseline that fed something else, or something cheaper, would measure nothing."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    basicsr_feed = import_module("basicsr_feed")  # finds its modules beside it, as it does when it is run
    write_photos = import_module("synthetic_data").write_photos
    write_photos(tmp_path / "tiles", num_images=1, height=32, width=32, scales=(2,), compress_level=3)
    images = basicsr_feed.PairedImages(tmp_path / "tiles", scale=2, patch_px_hr=16)
    manifest = load_manifest(str(tmp_path / "tiles"), split="train", scale=2)
    pair = load_pair(open_store(manifest.uri), manifest.images[0], 2)

    where_hr, where_lr = where_patches_are(pair.hr_HWC, 16, step_px=2), where_patches_are(pair.lr_HWC, 8, step_px=1)
    drawn = set()
    for _ in range(200):
        patches = images[0]
        assert {name: (patch.dtype, *patch.shape) for name, patch in patches.items()} == {
            "lq": (torch.float32, 3, 8, 8), "gt": (torch.float32, 3, 16, 16),
        }  # fmt: skip
        hr_CHW, lr_CHW = ((patches[name] * 255).round().byte().numpy() for name in ("gt", "lq"))
        assert where_hr[hr_CHW.tobytes()] == where_lr[lr_CHW.tobytes()]
        drawn.add(where_lr[lr_CHW.tobytes()])
    assert len({orientation for orientation, *_ in drawn}) == 8
    assert {row for _, row, _ in drawn} == {column for *_, column in drawn} == set(range(9))


def where_patches_are(image_HWC: np.ndarray, side_px: int, *, step_px: int) -> dict[bytes, tuple[int, int, int]]:
    """Bytes of each patch, as CHW → (orientation, row, column), counted in steps."""
    windows = sliding_window_view(image_HWC, (side_px, side_px), axis=(0, 1))[::step_px, ::step_px]
    flipped = [windows[..., ::y, ::x] for y in (1, -1) for x in (1, -1)]
    views = [*flipped, *(view.swapaxes(-1, -2) for view in flipped)]
    return {
        np.ascontiguousarray(view[row, column]).tobytes(): (orientation, row, column)
        for orientation, view in enumerate(views)
        for row, column in np.ndindex(view.shape[:2])
    }
