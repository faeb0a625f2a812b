"""A replica's work: it ends when nobody waits for it, and not before."""

import asyncio
import io
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.image_file import read_picture
from sr_models.network import SRNetwork
from sr_models.weights import save_model
from sr_serve.live_model import LiveModel
from sr_serve.messages import Order, Refusal, Upscaled
from sr_serve.model_replica import Claim, Job, ModelReplica, ReplicaOptions, upscale_alike

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
NUM_TILES = 25  # of what `LARGE` becomes at 16 px a tile, at least


def png(side_px):
    target = io.BytesIO()
    Image.fromarray(np.zeros((side_px, side_px, 3), np.uint8)).save(target, "PNG")
    return target.getvalue()


LARGE = png(120)


def order(timeout_s=600.0):
    return Order(format="PNG", tile_px_lr=16, self_ensemble=False, timeout_s=timeout_s)


def job(timeout_s=600.0):
    return Job(picture=read_picture(LARGE, name="it"), order=order(timeout_s), claim=Claim(timeout_s))


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "saved", CONFIG, build_model(CONFIG, seed=0).state_dict())
    return str(tmp_path / "saved")


@pytest.fixture
def loaded(saved):
    return LiveModel(saved, tracking_uri=None, device=torch.device("cpu"), say=pytest.fail).current


@contextmanager
def each_tile(call):
    """`call(number)` in the network's thread before each tile, counted from 1; the list grows as they come."""
    numbers = []

    def note(module, _):
        if isinstance(module, SRNetwork):
            numbers.append(len(numbers) + 1)
            call(numbers[-1])

    handle = register_module_forward_pre_hook(note)
    yield numbers
    handle.remove()


def test_nothing_is_computed_for_an_image_whose_time_is_over(loaded):
    with each_tile(lambda _: None) as tiles:
        [outcome] = upscale_alike(loaded, [job(timeout_s=0.0)], autocast=None)
    assert tiles == []
    assert isinstance(outcome, Refusal) and (outcome.status, outcome.code) == (504, "timeout")


def test_work_ends_within_a_tile_when_the_last_who_waited_has_left(loaded):
    jobs = [job(), job()]
    leaving = {2: jobs[0], 4: jobs[1]}
    with each_tile(lambda number: number in leaving and leaving[number].claim.withdraw()) as tiles:
        outcomes = upscale_alike(loaded, jobs, autocast=None)
    assert len(tiles) == 4
    assert [outcome.code for outcome in outcomes] == ["timeout"] * 2
    with each_tile(lambda number: number == 2 and jobs[0].claim.withdraw()) as tiles:
        jobs = [job(), job()]
        outcomes = upscale_alike(loaded, jobs, autocast=None)
    assert len(tiles) > NUM_TILES and outcomes[1].picture.colour_HWC.shape == (240, 240, 3)


def test_the_next_image_does_not_wait_for_one_whose_client_has_left(saved):
    options = ReplicaOptions(model=saved, tracking_uri=None, on_gpu=False, precision="float32", poll_s=9, max_batch=8)

    async def use():
        replica = ModelReplica(options)
        begun, goes_on, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

        def hold(number):
            if number == 3:
                loop.call_soon_threadsafe(begun.set)
                goes_on.wait(60)

        with each_tile(hold) as tiles:
            large = asyncio.create_task(replica.upscale(LARGE, order()))
            await asyncio.wait_for(begun.wait(), 60)
            large.cancel()
            [outcome] = await asyncio.gather(large, return_exceptions=True)
            goes_on.set()
            # No smaller: those that fit into a tile together need Ray Serve.
            answer = await asyncio.wait_for(replica.upscale(png(13), order()), 60)
        return tiles, outcome, answer

    tiles, outcome, answer = asyncio.run(use())
    assert isinstance(outcome, asyncio.CancelledError)
    assert isinstance(answer, Upscaled) and answer.sr_size_px == (26, 26)
    assert len(tiles) == 4  # three of the large one, one of the small one
