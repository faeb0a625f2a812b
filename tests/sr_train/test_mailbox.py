"""Driver and workers around one mailbox: orders, messages, questions, and errors that would come back."""

from sr_train.mailbox import STOPPED, Mailbox, Order


def test_workers_that_have_done_nothing_yet_find_the_order_that_is_not_finished() -> None:
    """Those that replace lost workers begin with number 0, whichever order they come to."""
    mailbox = Mailbox()
    assert mailbox.order_after(0) == (None, True)
    for order in (Order(1, b"first"), Order(2, b"second")):
        mailbox.place(order)
        assert mailbox.order_after(0) == mailbox.order_after(order.number - 1) == (order, True)
        assert mailbox.order_after(order.number) == (None, True)


def test_after_its_end_there_is_no_further_order_but_the_one_that_is_not_finished() -> None:
    mailbox, order = Mailbox(), Order(1, b"first")
    mailbox.place(order)
    mailbox.close()
    assert mailbox.order_after(0) == (order, False)
    assert mailbox.order_after(1) == (None, False)


def test_messages_are_taken_once_in_the_order_in_which_they_were_sent() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, b"job"))
    start = mailbox.begin()
    sent = [("start", {"step": 0}), ("progress", {"step": 1}), ("end", {})]
    for message in sent:
        mailbox.put(1, start, message)
    assert (mailbox.take(), mailbox.take()) == (sent, [])


def test_workers_that_others_have_replaced_are_not_heard_any_more() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, b"job"))
    cut_off, in_their_place = mailbox.begin(), mailbox.begin()
    error = "workers that started later have taken this run over"
    mailbox.put(1, cut_off, ("end", {"error": error}))
    mailbox.set_fatal(1, cut_off, error)
    mailbox.leave(cut_off, "a worker's process was told to end")
    mailbox.put(1, in_their_place, ("start", {"step": 0}))
    assert mailbox.take() == [("start", {"step": 0})]
    assert mailbox.fatal() is None and mailbox.why_leave(in_their_place) is None
    assert mailbox.order_after(0) == (Order(1, b"job"), True)


def test_an_order_that_has_ended_is_not_done_again() -> None:
    """A node may be lost between two trials of a sweep, or as a run ends."""
    mailbox = Mailbox()
    mailbox.place(Order(1, b"first"))
    mailbox.put(1, mailbox.begin(), ("end", {}))
    assert mailbox.order_after(0) == (None, True)
    mailbox.place(Order(2, b"second"))
    assert mailbox.order_after(0) == (Order(2, b"second"), True)


def test_what_one_worker_is_told_all_workers_of_its_start_hear() -> None:
    mailbox = Mailbox()
    start = mailbox.begin()
    assert mailbox.why_leave(start) is None
    mailbox.leave(start, "a worker's process was told to end")
    assert mailbox.why_leave(start) == "a worker's process was told to end"
    assert mailbox.why_leave(mailbox.begin()) is None  # those that go on elsewhere
    mailbox.stop()
    assert mailbox.why_leave(start + 1) == STOPPED


def test_a_question_has_no_answer_until_there_is_one() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, b"job"))
    mailbox.answer(10, goes_on=True)
    mailbox.answer(20, goes_on=False)
    assert [mailbox.answer_to(step) for step in (10, 20, 30)] == [True, False, None]


def test_the_first_error_that_would_come_back_is_kept() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, b"job"))
    assert mailbox.fatal() is None
    start = mailbox.begin()
    mailbox.set_fatal(1, start, "the loss is nan")
    mailbox.set_fatal(1, start, "a peer is gone")
    assert mailbox.fatal() == "the loss is nan"


def test_an_order_begins_with_nothing_of_the_one_before() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, b"first"))
    mailbox.answer(10, goes_on=False)
    start = mailbox.begin()
    mailbox.set_fatal(1, start, "the loss is nan")
    mailbox.put(1, start, ("progress", {"step": 11}))  # sent before the worker knew
    mailbox.place(Order(2, b"second"))
    mailbox.set_fatal(1, start, "a peer is gone")  # late
    mailbox.put(1, start, ("end", {}))
    assert (mailbox.answer_to(10), mailbox.fatal(), mailbox.take()) == (None, None, [])


def test_a_question_is_not_answered_by_what_was_answered_before() -> None:
    """Workers that replace those that asked may ask at the same step: about another validation, or a latency."""
    mailbox = Mailbox()
    mailbox.place(Order(1, b"job"))
    for goes_on in (True, False):
        mailbox.put(1, mailbox.begin(), ("ask", {"step": 40}))
        assert mailbox.answer_to(40) is None
        mailbox.answer(40, goes_on)
        assert mailbox.answer_to(40) is goes_on
