"""Which images a worker must hold at step `s`.

The images' infinite stream is epoch after epoch of shuffled images. In generation `g` the window is `stream[g : g +
K]`, and position `m` of the stream lies in slot `m mod K`; moving on by one generation replaces the oldest image by
the next one of the stream. A window that holds the whole dataset never moves.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from sr_data.sampling import Int64Array, SamplePlan, draw_slots, shuffled, slot_range


def image_stream(plan: SamplePlan, start: int) -> Iterator[tuple[int, int]]:
    """`(position, image index into the manifest)` from position `start` on, endlessly: every epoch holds each image
    once.
    """
    first_epoch = start // plan.num_images
    for epoch in itertools.count(first_epoch):
        first_position = epoch * plan.num_images
        skipped = start - first_position if epoch == first_epoch else 0
        images = shuffled(plan.seed, epoch, plan.num_images)[skipped:].tolist()
        yield from enumerate(images, start=first_position + skipped)


def generation(plan: SamplePlan, step: int) -> int:
    """How many images the window has moved on by at `step`."""
    return step * plan.global_batch_size // plan.window_reuse_patches if plan.is_windowed else 0


def positions_in_slots(plan: SamplePlan, generation: int, slots: Int64Array) -> Int64Array:
    """The stream positions that `slots` hold in `generation`."""
    return generation + (slots - generation) % plan.window_images


def needs(plan: SamplePlan, *, first_sample: int, num_samples: int, start_step: int) -> Iterator[tuple[int, int]]:
    """`(position, image index)` of what a worker that owns these samples needs from `start_step` on, in the order it
    needs them.

    First the images that its slots hold at the start, those first that its first steps draw from, so that step
    `start_step` waits for no other image. Then, in a window that moves, the replacements in the order of the stream,
    endlessly.
    """
    slots = slot_range(plan, first_sample, num_samples)
    start = generation(plan, start_step)
    window = dict(itertools.islice(image_stream(plan, start), plan.window_images))
    order = _slots_by_first_use(plan, slots, first_sample=first_sample, num_samples=num_samples, start_step=start_step)
    for position in positions_in_slots(plan, start, order).tolist():
        yield position, window[position]
    if plan.is_windowed:
        for position, image in image_stream(plan, start + plan.window_images):
            if position % plan.window_images in slots:
                yield position, image


def _slots_by_first_use(
    plan: SamplePlan, slots: range, *, first_sample: int, num_samples: int, start_step: int
) -> Int64Array:
    """All `slots`, sorted by the first step that draws from them; those that the first few thousand steps leave out
    come last.
    """
    # Drawing from n slots until each was seen takes about n (ln n + 1) draws: 8 n leave out one slot in 3,000.
    num_steps = 8 * len(slots) // num_samples + 1
    drawn = draw_slots(plan, range(start_step, start_step + num_steps), first_sample, num_samples).ravel()
    seen, first_use = np.unique(drawn, return_index=True)
    unseen = np.setdiff1d(np.arange(slots.start, slots.stop), seen)
    return np.concatenate([seen[np.argsort(first_use)], unseen])
