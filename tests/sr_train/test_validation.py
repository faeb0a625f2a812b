"""Scores of a set: exact, in any order, over any number of workers."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch

from sr_data.pairs import DecodedPair
from sr_data.resize import downscale_bicubic, upscale_bicubic
from sr_models.inference import as_tensor
from sr_train.metrics import PAPERS_PROTOCOL, ImageScore, MetricError, score_image
from sr_train.validation import SetScore, gather_score, mean_score, score_pairs
from tests.support.process import PATIENCE_S

SCALE = 2


def make_pairs(number):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (24 + 2 * i, 30, 3), np.uint8) for i in range(number)]
    return [
        DecodedPair(name=f"image-{i}", hr_HWC=hr_HWC, lr_HWC=downscale_bicubic(hr_HWC, SCALE))
        for i, hr_HWC in enumerate(images)
    ]


def bicubic(lr_HWC):
    return upscale_bicubic(lr_HWC, SCALE)


def validate(pairs, gather):
    scores = score_pairs(bicubic, pairs, scale=SCALE, protocol=PAPERS_PROTOCOL)
    return gather_score(scores, set_name="noise", scale=SCALE, protocol=PAPERS_PROTOCOL, gather=gather)


def test_each_image_is_upscaled_and_compared_with_its_own_hr():
    pairs = make_pairs(3)
    expected = [
        score_image(bicubic(pair.lr_HWC), pair.hr_HWC, scale=SCALE, protocol=PAPERS_PROTOCOL, name=pair.name)
        for pair in pairs
    ]
    assert score_pairs(bicubic, pairs, scale=SCALE, protocol=PAPERS_PROTOCOL) == expected


@dataclass
class TensorPair:
    name: str
    hr_HWC: torch.Tensor
    lr_HWC: torch.Tensor


def test_tensors_score_as_arrays_do_and_nothing_is_read_before_all_are_measured(monkeypatch):
    """On a GPU reading is waiting."""
    pairs = make_pairs(3)
    tensors = [TensorPair(pair.name, as_tensor(pair.hr_HWC), as_tensor(pair.lr_HWC)) for pair in pairs]
    reads = []
    for reading in ("tolist", "item", "__float__", "cpu", "numpy", "__bool__"):
        original = getattr(torch.Tensor, reading)
        monkeypatch.setattr(
            torch.Tensor, reading, lambda self, *a, name=reading, to=original, **k: (reads.append(name), to(self))[1]
        )
    nearest = score_pairs(
        lambda lr: lr.repeat_interleave(2, 0).repeat_interleave(2, 1), tensors, scale=SCALE, protocol=PAPERS_PROTOCOL
    )
    assert reads == ["tolist"]
    expected = score_pairs(
        lambda lr: lr.repeat(2, axis=0).repeat(2, axis=1), pairs, scale=SCALE, protocol=PAPERS_PROTOCOL
    )
    assert nearest == expected


def test_the_mean_does_not_depend_on_the_order():
    # Values whose plain sum does depend on it.
    rng = random.Random(0)
    scores = [ImageScore(name=f"{i:03}", psnr_db=10 ** rng.uniform(-8, 8), ssim=rng.random()) for i in range(100)]
    means = set()
    for _ in range(5):
        rng.shuffle(scores)
        means.add(mean_score("set", SCALE, PAPERS_PROTOCOL, scores))
    assert len(means) == 1
    assert [image.name for image in means.pop().images] == [f"{i:03}" for i in range(100)]


def test_a_set_without_images_and_an_image_twice_are_errors():
    with pytest.raises(MetricError, match="'val' has no images"):
        mean_score("val", SCALE, PAPERS_PROTOCOL, [])
    with pytest.raises(MetricError, match="'val' has more than one score for a"):
        mean_score("val", SCALE, PAPERS_PROTOCOL, [ImageScore(name="a", psnr_db=1.0, ssim=1.0)] * 2)


def test_an_infinite_psnr_is_null_in_json():
    images = [ImageScore(name="same", psnr_db=math.inf, ssim=1.0), ImageScore(name="other", psnr_db=30.0, ssim=0.5)]
    score = mean_score("set", SCALE, PAPERS_PROTOCOL, images)
    assert json.loads(json.dumps(score.to_json_dict(), allow_nan=False)) == {
        "set": "set",
        "scale": 2,
        "protocol": PAPERS_PROTOCOL,
        "psnr_db": None,
        "ssim": 0.75,
        "images": [
            {"name": "other", "psnr_db": 30.0, "ssim": 0.5},
            {"name": "same", "psnr_db": None, "ssim": 1.0},
        ],
    }


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_the_score_is_that_of_one_worker_however_the_images_are_shared(num_workers):
    """With 7 workers for 5 images, two have none."""
    pairs = make_pairs(5)
    alone = validate(pairs, lambda scores: [scores])
    shares = [pairs[rank::num_workers] for rank in range(num_workers)]
    everyones = [score_pairs(bicubic, share, scale=SCALE, protocol=PAPERS_PROTOCOL) for share in shares]
    for share in shares:
        assert validate(share, lambda _: everyones) == alone


WORKER = """
import dataclasses, json, pickle, sys
import torch.distributed as dist
from sr_data.resize import upscale_bicubic
from sr_train.validation import gather_score, score_pairs
rank, rendezvous, pairs_file, scale, protocol = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2)
pairs = pickle.load(open(pairs_file, "rb"))
def gather(scores):
    everyones = [None, None]
    dist.all_gather_object(everyones, scores)
    return everyones
scale = int(scale)
scores = score_pairs(lambda lr: upscale_bicubic(lr, scale), pairs[int(rank)::2], scale=scale, protocol=protocol)
score = gather_score(scores, set_name="noise", scale=scale, protocol=protocol, gather=gather)
print(json.dumps(dataclasses.asdict(score)))
dist.destroy_process_group()
"""


def test_two_real_workers_agree_with_one_to_the_last_bit(tmp_path, repo):
    import pickle

    pairs = make_pairs(5)
    (tmp_path / "pairs").write_bytes(pickle.dumps(pairs))
    environment = {**os.environ, "PYTHONPATH": str(repo), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    arguments = [tmp_path / "rendezvous", tmp_path / "pairs", str(SCALE), PAPERS_PROTOCOL]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *arguments], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=PATIENCE_S)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    alone = json.loads(json.dumps(asdict(validate(pairs, lambda scores: [scores]))))
    assert [json.loads(output) for output in outputs] == [alone, alone]
    assert isinstance(alone["psnr_db"], float)
    assert set(alone) == set(SetScore.__dataclass_fields__)
