"""Driver and workers around one mailbox: orders, messages, questions, and errors that would come back."""

from sr_train.mailbox import Mailbox, Order


def test_workers_that_have_done_nothing_yet_find_the_order_that_is_not_finished() -> None:
    """Those that replace lost workers begin with number 0, whichever order they come to."""
    mailbox = Mailbox()
    assert mailbox.order_after(0) == (None, True)
    for order in (Order(1, "first"), Order(2, "second")):
        mailbox.place(order)
        assert mailbox.order_after(0) == mailbox.order_after(order.number - 1) == (order, True)
        assert mailbox.order_after(order.number) == (None, True)


def test_after_its_end_there_is_no_further_order_but_the_one_that_is_not_finished() -> None:
    mailbox, order = Mailbox(), Order(1, "first")
    mailbox.place(order)
    mailbox.close()
    assert mailbox.order_after(0) == (order, False)
    assert mailbox.order_after(1) == (None, False)


def test_messages_are_taken_once_in_the_order_in_which_they_were_sent() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, "job"))
    mailbox.begin(1, "workers")
    sent = [("start", {"step": 0}), ("progress", {"step": 1}), ("end", {})]
    for message in sent:
        mailbox.put(1, "workers", message)
    assert (mailbox.take(), mailbox.take()) == (sent, [])


def test_workers_that_others_have_replaced_are_not_heard_any_more() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, "job"))
    mailbox.begin(1, "cut off")
    mailbox.begin(1, "in their place")
    mailbox.put(1, "cut off", ("end", {"error": "another driver has taken this run over"}))
    mailbox.put(1, "in their place", ("start", {"step": 0}))
    assert mailbox.take() == [("start", {"step": 0})]


def test_a_question_has_no_answer_until_there_is_one() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, "job"))
    mailbox.answer(10, goes_on=True)
    mailbox.answer(20, goes_on=False)
    assert [mailbox.answer_to(step) for step in (10, 20, 30)] == [True, False, None]


def test_the_first_error_that_would_come_back_is_kept() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, "job"))
    assert mailbox.fatal() is None
    mailbox.set_fatal(1, "the loss is nan")
    mailbox.set_fatal(1, "a peer is gone")
    assert mailbox.fatal() == "the loss is nan"


def test_an_order_begins_with_nothing_of_the_one_before() -> None:
    mailbox = Mailbox()
    mailbox.place(Order(1, "first"))
    mailbox.answer(10, goes_on=False)
    mailbox.set_fatal(1, "the loss is nan")
    mailbox.begin(1, "workers")
    mailbox.put(1, "workers", ("progress", {"step": 11}))  # sent before the worker knew
    mailbox.place(Order(2, "second"))
    mailbox.set_fatal(1, "a peer is gone")  # late
    mailbox.put(1, "workers", ("end", {}))
    assert (mailbox.answer_to(10), mailbox.fatal(), mailbox.take()) == (None, None, [])
