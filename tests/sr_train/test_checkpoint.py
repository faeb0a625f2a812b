"""Checkpoints: whole or not at all, complete, readable without running code, and old ones go."""

from pathlib import Path

import pytest
import torch

from sr_data.errors import StorageError
from sr_data.storage import Store, open_store
from sr_models.architectures import build_model, config_to_dict
from sr_models.edsr import EDSRConfig
from sr_train.checkpoint import (
    Checkpoint,
    CheckpointError,
    inference_weights,
    keep,
    key_of_step,
    latest_key,
    list_keys,
    newest_whole,
    read_checkpoint,
    write_checkpoint,
)
from sr_train.run_folder import START_KEY, OwnedStore, TakenOverError, claim, claim_start

TINY = EDSRConfig(scale=3, num_blocks=1, num_channels=4, residual_scaling=0.1)


@pytest.fixture(params=["local", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    bucket: str = request.getfixturevalue("s3").new_bucket()
    return f"{bucket}/runs/checkpoints"


def checkpoint(step: int, *, ema: bool = True) -> Checkpoint:
    weights = build_model(TINY, seed=step).state_dict()
    groups = {"model": weights, "optimizer": {"head.weight/step": torch.tensor(float(step))}}
    if ema:
        groups["ema"] = {name: value + 1 for name, value in weights.items()}
    meta = {"step": step, "architecture": "edsr", "model_config": config_to_dict(TINY), "best": {"psnr_db": 31.5}}
    return Checkpoint(tensors=groups, meta=meta)


def test_what_is_read_is_what_was_written(any_store: str) -> None:
    store = open_store(any_store)
    written = checkpoint(7)
    key = write_checkpoint(store, written)
    read = read_checkpoint(store, key)
    assert read.meta == written.meta
    assert {group: set(values) for group, values in read.tensors.items()} == {
        group: set(values) for group, values in written.tensors.items()
    }
    for group, values in written.tensors.items():
        for name, value in values.items():
            assert torch.equal(value, read.tensors[group][name]), (group, name)


def test_inference_takes_the_moving_average_where_there_is_one() -> None:
    for ema in (True, False):
        saved = checkpoint(1, ema=ema)
        config, weights = inference_weights(saved)
        assert config == TINY
        expected = saved.tensors["ema" if ema else "model"]
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for step in (1, 2, 30, 400):
        write_checkpoint(store, checkpoint(step))
    store.write("config.json", b"{}")
    assert keep(store, last=2, spared=[key_of_step(1)]) == [key_of_step(2)]
    assert list_keys(store) == [key_of_step(1), key_of_step(30), key_of_step(400)]
    assert latest_key(store) == key_of_step(400)
    assert store.exists("config.json")


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path: Path) -> None:
    assert latest_key(open_store(str(tmp_path / "not there yet"))) is None


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    store = open_store(str(tmp_path))
    key = write_checkpoint(store, checkpoint(3))
    whole = store.read(key)
    from safetensors.torch import save

    content = {"cut": whole[: len(whole) // 2], "text": b"not a checkpoint", "other": save({"x": torch.zeros(1)})}
    store.write(key, content[damage])
    with pytest.raises(CheckpointError, match=key):
        read_checkpoint(store, key)


def test_a_damaged_newest_checkpoint_costs_steps_and_not_the_run(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert newest_whole(store) is None
    for step in (1, 2):
        write_checkpoint(store, checkpoint(step))
    store.write(key_of_step(3), b"cut off")
    assert newest_whole(store) == key_of_step(2)
    for step in (1, 2):
        store.write(key_of_step(step), b"cut off")
    with pytest.raises(CheckpointError, match=key_of_step(1)):
        newest_whole(store)


def test_a_driver_whose_run_was_taken_over_changes_nothing_in_it(any_store: str) -> None:
    run = open_store(any_store)
    first = owned(run, claim(run), 1)
    key = write_checkpoint(first, checkpoint(1))
    second = owned(run, claim(run), 1)
    for change in (lambda: write_checkpoint(first, checkpoint(2)), lambda: first.delete(key)):
        with pytest.raises(StorageError, match="another driver has taken this run over"):
            change()
    write_checkpoint(second, checkpoint(3))
    assert list_keys(second) == [key, key_of_step(3)]


def test_workers_that_others_have_replaced_change_nothing(any_store: str) -> None:
    """Those of a node that was cut off, and comes back."""
    run = open_store(any_store)
    owner = claim(run)
    before, after = owned(run, owner, 1), owned(run, owner, 2)
    key = write_checkpoint(after, checkpoint(2))
    for change in (lambda: write_checkpoint(before, checkpoint(1)), lambda: before.delete(key)):
        with pytest.raises(StorageError, match="workers that started later have taken this run over"):
            change()
    assert list_keys(after) == [key]


def test_workers_of_a_driver_that_lost_the_run_cannot_begin(any_store: str) -> None:
    run = open_store(any_store)
    first, second = claim(run), claim(run)
    theirs = owned(run, second, 1)
    with pytest.raises(TakenOverError, match="another driver has taken this run over"):
        claim_start(run, first, 2)
    write_checkpoint(theirs, checkpoint(1))  # and took nothing from those of the second


def test_workers_that_were_cut_off_as_they_began_take_nothing_from_those_in_their_place(any_store: str) -> None:
    run = open_store(any_store)
    owner = claim(run)
    in_their_place = owned(run, owner, 2)
    with pytest.raises(TakenOverError, match="workers that started later have taken this run over"):
        claim_start(run, owner, 1)  # it waited for storage meanwhile
    write_checkpoint(in_their_place, checkpoint(1))
    # Starts are counted by each driver anew.
    write_checkpoint(owned(run, claim(run), 1), checkpoint(2))


def test_what_an_earlier_drivers_workers_write_late_takes_nothing_from_the_run(any_store: str) -> None:
    """They had looked whose it is before the others came, and storage kept them waiting."""
    run = open_store(any_store)
    earlier, owner = claim(run), claim(run)
    ours = owned(run, owner, 1)
    run.write(START_KEY, f"{earlier} 3".encode())
    key = write_checkpoint(ours, checkpoint(1))
    assert list_keys(ours) == [key]


def owned(run: Store, owner: str, start: int) -> OwnedStore:
    """The run's checkpoints, for the workers of that start."""
    claim_start(run, owner, start)
    return OwnedStore(f"{run.uri}/checkpoints", run, owner, start)
