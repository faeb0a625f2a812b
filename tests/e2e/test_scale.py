"""One worker and two, with one global batch: the same samples, the same losses, the same weights, to rounding."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from sr_train.mailbox import Message
from sr_train.ray_cluster import connect
from tests.support.runs import final_tensors, planned, run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    connect()
    yield
    ray.shutdown()


def validations(messages: list[Message]) -> dict[int, float]:
    return {values["step"]: values["psnr_db"] for kind, values in messages if kind == "validation"}


def test_two_workers_train_as_one(tiny_photos: Path, tmp_path: Path) -> None:
    heard: dict[int, list[Message]] = {1: [], 2: []}
    plans = {}
    for num_workers, messages in heard.items():
        plans[num_workers] = planned(tiny_photos, tmp_path, f"workers-{num_workers}", num_workers=num_workers)
        assert run(plans[num_workers], messages).num_restarts == 0

    alone, shared = validations(heard[1]), validations(heard[2])
    assert alone.keys() == shared.keys() and len(alone) >= 3
    assert list(shared.values()) == pytest.approx(list(alone.values()), abs=1e-3)
    first = {
        number: next(values for kind, values in messages if kind == "progress") for number, messages in heard.items()
    }
    assert first[1]["step"] == first[2]["step"] == 1
    assert first[2]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    expected, got = final_tensors(plans[1]), final_tensors(plans[2])
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-3, atol=1e-5), name
