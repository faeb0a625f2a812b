"""Batches come step by step, with the time that training waited for them."""

import threading

import torch

from sr_data.batch_feed import BatchFeed


class Numbered:
    """Batches that say what they are; the first waits for permission."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        self.open.wait(20)
        return torch.tensor([step, micro, num_micro]), torch.tensor([step])


def test_a_step_has_all_its_micro_batches_in_order() -> None:
    source = Numbered()
    source.open.set()
    feed = BatchFeed(source, num_micro=3, device=torch.device("cpu"), ahead=False)
    feed.prepare(5)  # nothing to prepare on a CPU
    assert [lr.tolist() for lr, _ in feed.take(4)] == [[4, 0, 3], [4, 1, 3], [4, 2, 3]]
    assert [hr.tolist() for _, hr in feed.take(5)] == [[5], [5], [5]]


def test_waiting_is_measured_once() -> None:
    source = Numbered()
    feed = BatchFeed(source, num_micro=1, device=torch.device("cpu"), ahead=False)
    opens = threading.Timer(0.2, source.open.set)
    opens.start()
    feed.take(0)
    assert feed.waited_s() >= 0.15
    assert feed.waited_s() == 0.0
    feed.take(1)
    assert feed.waited_s() < 0.1
