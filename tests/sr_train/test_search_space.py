"""Domains as texts, values at a place of a domain, random search and the grid."""

import math
from collections import Counter
from collections.abc import Mapping

import pytest

from sr_train.options import ConfigError
from sr_train.search_space import (
    MAX_CHOICES,
    Domain,
    Floats,
    Ints,
    Names,
    choices,
    contains,
    draw,
    draw_samples,
    grid,
    members,
)
from sr_train.trial_record import Sample, Value

# Evenly spaced places in [0, 1): what falls where shows the distribution exactly.
PLACES = [(index + 0.5) / 1000 for index in range(1000)]


def without_b_unless_a_is_1(sample: Sample) -> Sample:
    return {name: value for name, value in sample.items() if name == "a" or sample["a"] == 1}


def random_search(domains: Mapping[str, Domain], num_samples: int, seed: int = 0) -> list[Sample]:
    return draw_samples(domains, num_samples=num_samples, seed=seed, canonical=dict)


@pytest.mark.parametrize(
    ("kind", "text", "values"),
    [
        (Ints, "8,16,32", (8, 16, 32)),
        (Ints, " 8 , 4 ", (8, 4)),
        (Ints, "8", (8,)),
        (Ints, "8..8", (8,)),
        (Ints, "8..8:log", (8,)),
        (Ints, "8..33:8", (8, 16, 24, 32)),
        (Ints, "-2..0:1", (-2, -1, 0)),
        (Floats, "1e-4,.5", (0.0001, 0.5)),
        # Where a sum of floats gives 0.30000000000000004, and misses the end.
        (Floats, "0.1..0.5:0.1", (0.1, 0.2, 0.3, 0.4, 0.5)),
        (Names, "step, one-cycle", ("step", "one-cycle")),
    ],
)
def test_lists_and_ranges_in_steps_are_choices(kind: type[Domain], text: str, values: tuple[Value, ...]) -> None:
    domain = kind.parse(text)
    assert choices(domain) == members(domain) == values
    assert kind.parse(str(domain)) == domain


@pytest.mark.parametrize("text", ["1..8", "1..8:log", "-3..3"])
def test_ranges_of_whole_numbers_list_their_members(text: str) -> None:
    domain = Ints.parse(text)
    low, high = map(int, text.removesuffix(":log").split(".."))
    assert choices(domain) is None
    assert list(members(domain) or ()) == list(range(low, high + 1))
    assert Ints.parse(str(domain)) == domain


def test_ranges_of_floats_have_no_members() -> None:
    domain = Floats.parse("3e-4..5e-3:log")
    assert choices(domain) is None and members(domain) is None
    assert Floats.parse(str(domain)) == domain != Floats.parse("3e-4..5e-3")


def test_a_range_in_steps_is_printed_as_given_and_is_the_list_it_stands_for() -> None:
    assert str(Ints.parse(" 8 .. 33 : 8")) == "8..33:8"
    assert Ints.parse("8..33:8") == Ints.parse("8,16,24,32")


@pytest.mark.parametrize(
    ("kind", "text", "messages"),
    [
        (Ints, "", ["''", "no value", "A,B,C", "LOW..HIGH:log", "LOW..HIGH:STEP"]),
        (Names, " ", ["no value", "A,B,C"]),
        (Ints, "8,16,8", ["'8,16,8'", "8 is given more than once"]),
        (Floats, "0.5,.5", ["0.5 is given more than once"]),
        (Ints, "9..8", ["9 is greater than 8"]),
        (Ints, "9..8:2", ["9 is greater than 8"]),
        (Floats, "0..1:log", ["above 0", "0.0"]),
        (Ints, "0..0:log", ["above 0"]),
        (Ints, "many", ["'many' is not a whole number"]),
        (Ints, "8,1.5", ["'1.5' is not a whole number"]),
        (Ints, "1..", ["'' is not a whole number"]),
        (Ints, "1..8,9", ["'1..8' is not a whole number"]),
        (Ints, "1..8:lin", ["'lin' is not a whole number"]),
        (Ints, "9" * 400, ["too large"]),
        (Floats, "high", ["'high' is not a number"]),
        (Floats, "1..inf", ["'inf' is not finite"]),
        (Floats, "nan", ["'nan' is not finite"]),
        (Floats, "0..1:0", ["step 0.0 must be greater than 0"]),
        (Floats, "0..1:1e-40", [f"more than {MAX_CHOICES} steps"]),
        (Ints, "1..1001:1", [f"more than {MAX_CHOICES} steps"]),
        (Names, "a..b", ["only numbers have ranges"]),
        (Names, "a,,b", ["a choice is empty"]),
    ],
)
def test_bad_texts_are_refused_with_what_was_got_and_what_is_allowed(
    kind: type[Domain], text: str, messages: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        kind.parse(text)
    assert all(message in str(refused.value) for message in [*messages, kind.forms]), refused.value


@pytest.mark.parametrize("text", ["3,1,2,7", "1..4"])
def test_choices_and_whole_numbers_have_equal_shares(text: str) -> None:
    domain = Ints.parse(text)
    assert Counter(draw(domain, u) for u in PLACES) == dict.fromkeys(members(domain) or (), 250)


def test_a_log_range_has_equal_shares_for_equal_factors() -> None:
    domain = Floats.parse("1e-4..1e-1:log")
    drawn = [float(draw(domain, u)) for u in PLACES]
    assert drawn == pytest.approx([10 ** (-4 + 3 * u) for u in PLACES], rel=1e-5)
    assert [sum(low <= value < 10 * low for value in drawn) for low in (1e-4, 1e-3)] == pytest.approx([333, 333], abs=1)


def test_a_log_range_of_whole_numbers_gives_each_its_interval() -> None:
    shares = Counter(draw(Ints.parse("1..3:log"), u) for u in PLACES)
    expected = {k: 1000 * math.log((k + 1) / k) / math.log(4) for k in (1, 2, 3)}
    assert shares == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("text", ["1..3", "1..3:log", "7..9000000000:log", "2,3", "-5..-4"])
@pytest.mark.parametrize("kind", [Ints, Floats])
def test_what_is_drawn_is_contained(kind: type[Domain], text: str) -> None:
    domain = kind.parse(text)
    last = math.nextafter(1.0, 0.0)
    drawn = [draw(domain, u) for u in (0.0, *PLACES, last)]
    assert all(contains(domain, value) for value in drawn)
    assert drawn[0] == domain.values[0] and drawn[-1] == pytest.approx(domain.values[-1])


@pytest.mark.parametrize("text", ["0.1234567..0.1234568", "0.1234567..0.1234568:log"])
def test_rounding_does_not_leave_the_range(text: str) -> None:
    domain = Floats.parse(text)
    assert all(contains(domain, draw(domain, u)) for u in PLACES)


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (Ints.parse("8,16"), [8, 16.0], [12, "8"]),
        (Ints.parse("8..16"), [8, 12.0, 16], [7, 17, 12.5, math.nan, math.inf, "12"]),
        (Floats.parse("1..2:log"), [1, 1.5, 2.0], [0.999, 2.001, math.nan, "1"]),
        (Names.parse("step,cosine"), ["step"], ["stepcosine", "", 1]),
    ],
)
def test_contains(domain: Domain, inside: list[Value], outside: list[Value]) -> None:
    assert all(contains(domain, value) for value in inside)
    assert not any(contains(domain, value) for value in outside)


def test_a_longer_search_begins_with_the_same_samples() -> None:
    domains = {"a": Ints.parse("1,2,3"), "b": Floats.parse("0..1"), "c": Ints.parse("1..9:log")}
    long = random_search(domains, 50)
    assert random_search(domains, 7) == long[:7]
    assert random_search(domains, 50, seed=1) != long


def test_the_order_of_the_options_does_not_matter() -> None:
    domains = {"a": Ints.parse("1..100"), "b": Floats.parse("0..1")}
    assert random_search(dict(reversed(domains.items())), 9) == random_search(domains, 9)


def test_each_option_is_drawn_for_itself() -> None:
    samples = random_search({"a": Floats.parse("0..1"), "b": Floats.parse("0..1")}, 400)
    quarters = Counter((float(sample["a"]) < 0.5, float(sample["b"]) < 0.5) for sample in samples)
    # 100 in each, with a standard deviation of sqrt(400 · 1/4 · 3/4) ≈ 8.7.
    assert len(quarters) == 4 and all(abs(count - 100) < 40 for count in quarters.values())


def test_samples_are_canonical_and_distinct_and_all_there_are() -> None:
    domains = {"a": Ints.parse("1,2"), "b": Names.parse("x,y")}
    samples = draw_samples(domains, num_samples=10, seed=0, canonical=without_b_unless_a_is_1)
    expected = [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2}]
    assert len(samples) == 3 and all(sample in samples for sample in expected)


def test_values_that_are_hardly_ever_drawn_are_found_too() -> None:
    """The last number's share is 1 / 4,100: draws alone would take long."""
    domains = {"a": Ints.parse("1..600:log")}
    samples = random_search(domains, 700)
    assert sorted(int(sample["a"]) for sample in samples) == list(range(1, 601))
    assert random_search(domains, 599) == samples[:599]


def test_a_space_that_can_not_be_listed_ends_when_nothing_new_comes() -> None:
    """b is a range, but never part of a canonical sample."""
    domains = {"a": Ints.parse("2,3"), "b": Floats.parse("0..1")}
    samples = draw_samples(domains, num_samples=10, seed=0, canonical=without_b_unless_a_is_1)
    assert sorted(int(sample["a"]) for sample in samples) == [2, 3]


def test_the_grid_is_every_combination_once_in_order() -> None:
    domains = {"b": Names.parse("y,x"), "a": Ints.parse("1..2:1")}
    assert grid(domains, dict) == [
        {"b": "y", "a": 1},
        {"b": "y", "a": 2},
        {"b": "x", "a": 1},
        {"b": "x", "a": 2},
    ]
    assert grid(domains, without_b_unless_a_is_1) == [{"b": "y", "a": 1}, {"a": 2}, {"b": "x", "a": 1}]


def test_a_grid_refuses_ranges_by_name() -> None:
    domains = {"a": Ints.parse("1..8"), "b": Ints.parse("1,2"), "c": Floats.parse("1..2:log")}
    with pytest.raises(ConfigError, match=r"a=1\.\.8, c=1\.0\.\.2\.0:log;.*LOW\.\.HIGH:STEP"):
        grid(domains, dict)
