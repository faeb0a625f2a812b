"""The window over the stream of images, as pure functions."""

import itertools
from typing import Any

import pytest

from sr_data.sampling import SamplePlan, draw_slots, slot_range
from sr_data.window import generation, image_stream, needs


def plan(**changes: Any) -> SamplePlan:
    defaults = {
        "seed": 3, "global_batch_size": 4, "scale": 2, "patch_px_lr": 4, "augment": True,
        "num_images": 11, "window_images": 5, "window_reuse_patches": 6,
    }  # fmt: skip
    return SamplePlan(**(defaults | changes))


def test_every_epoch_of_the_stream_holds_every_image_once() -> None:
    stream = list(itertools.islice(image_stream(plan(), 0), 44))
    assert [position for position, _ in stream] == list(range(44))
    epochs = [[image for _, image in stream[start : start + 11]] for start in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("start", [1, 10, 11, 30])
def test_stream_from_anywhere_is_the_same_stream(start: int) -> None:
    whole = list(itertools.islice(image_stream(plan(), 0), 50))
    assert list(itertools.islice(image_stream(plan(), start), 50 - start)) == whole[start:]


def test_generation_moves_on_by_patches_and_stands_still_with_the_whole_dataset() -> None:
    assert [generation(plan(), step) for step in range(7)] == [0, 0, 1, 2, 2, 3, 4]
    assert generation(plan(window_images=11), 10**9) == 0


@pytest.mark.parametrize("start_step", [0, 7, 1000])
@pytest.mark.parametrize("first_sample", [0, 2])
def test_needs_are_the_window_then_its_replacements(start_step: int, first_sample: int) -> None:
    slots = slot_range(plan(), first_sample, 2)
    start = generation(plan(), start_step)
    stream = [entry for entry in itertools.islice(image_stream(plan(), start), 100) if entry[0] % 5 in slots]
    got = list(
        itertools.islice(needs(plan(), first_sample=first_sample, num_samples=2, start_step=start_step), len(stream))
    )
    assert sorted(got[: len(slots)]) == stream[: len(slots)]
    assert got[len(slots) :] == stream[len(slots) :]


def test_whole_dataset_is_needed_once_and_first_what_the_first_steps_draw_from() -> None:
    whole = plan(num_images=200, window_images=200, global_batch_size=8)
    got = list(needs(whole, first_sample=0, num_samples=8, start_step=40))
    assert sorted(image for _, image in got) == list(range(200))
    first_use: list[int] = []
    for slot in draw_slots(whole, range(40, 2000), 0, 8).ravel().tolist():
        if slot not in first_use:
            first_use.append(slot)
    drawn_soon = 8 * 4  # the first steps; the last few of 200 images may come in any order
    assert [position for position, _ in got[:drawn_soon]] == first_use[:drawn_soon]
