"""Domains of options, and points drawn from a product of them: random search and the full grid.

A domain is a list of distinct choices or a closed range, and is written as it is read: `8,16,32`, `1..8`,
`3e-4..5e-3:log`, `8..32:8`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import ClassVar, Literal, Self

import numpy as np

from sr_train.options import ConfigError, require
from sr_train.trial_record import Sample, Value

MAX_CHOICES = 1000
"""Most choices that LOW..HIGH:STEP may stand for."""

# Random search ends, or goes over to listing what is left, after so many draws in a row that gave nothing new.
_MAX_MISSES = 1000

_NUMBER_FORMS = "A,B,C (choices), LOW..HIGH, LOW..HIGH:log or LOW..HIGH:STEP"


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """What one option may be; use `Ints`, `Floats` or `Names`. ConfigError if no text stands for these values."""

    forms: ClassVar[str]
    """The texts that `parse` takes, as error messages name them."""
    has_ranges: ClassVar[bool] = True

    values: tuple[Value, ...]
    """The choices, or a range's two ends."""
    spread: Literal["choices", "uniform", "log"] = "choices"
    """How values are drawn: one of the choices, or from the range, uniform or log-uniform."""
    text: str = field(default="", compare=False, repr=False)
    """How it is printed, where the values don't tell: a range in steps."""

    def __post_init__(self) -> None:
        if self.spread == "choices":
            require(bool(self.values), "no value given")
            twice = {value for value in self.values if self.values.count(value) > 1}
            require(not twice, f"{', '.join(map(str, sorted(twice, key=str)))} is given more than once")
            return
        low, high = _ends(self)
        require(low <= high, f"{self.values[0]} is greater than {self.values[1]}")
        require(self.spread != "log" or low > 0, f"a log range must begin above 0, not at {self.values[0]}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The domain that a text stands for. ConfigError says what was got and which forms are allowed; it does not
        know the flag.
        """
        try:
            return cls._parsed(text)
        except ConfigError as error:
            raise ConfigError(f"{text!r}: {error}; allowed: {cls.forms}") from None

    def __str__(self) -> str:
        """A text that parses to this domain."""
        if self.text:
            return self.text
        if self.spread == "choices":
            return ",".join(map(str, self.values))
        return f"{self.values[0]}..{self.values[1]}" + (":log" if self.spread == "log" else "")

    @classmethod
    def _parsed(cls, text: str) -> Self:
        ends, colon, rest = text.partition(":")
        low_text, dots, high_text = ends.partition("..")
        if "," in text or not dots or not cls.has_ranges:
            require(bool(text.strip()), "no value given")
            return cls(values=tuple(cls._value(part.strip()) for part in text.split(",")))
        low, high = cls._value(low_text.strip()), cls._value(high_text.strip())
        if not colon or rest.strip() == "log":
            domain = cls(values=(low, high), spread="log" if colon else "uniform")
            return cls(values=(low,)) if low == high else domain
        return cls._in_steps(low, high, cls._value(rest.strip()))

    @classmethod
    def _in_steps(cls, low: Value, high: Value, step: Value) -> Self:
        # In decimal, where 0.1 + 0.2 is 0.3.
        first, last, width = (Decimal(str(value)) for value in (low, high, step))
        require(width > 0, f"the step {step} must be greater than 0")
        require(first <= last, f"{low} is greater than {high}")
        require((last - first) / width < MAX_CHOICES, f"more than {MAX_CHOICES} steps")
        count = int((last - first) / width) + 1
        values = tuple(cls._value(str(first + index * width)) for index in range(count))
        return cls(values=values, text=f"{low}..{high}:{step}")

    @classmethod
    def _value(cls, text: str) -> Value:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Ints(Domain):
    """Whole numbers."""

    forms: ClassVar[str] = f"whole numbers as {_NUMBER_FORMS}"

    @classmethod
    def _value(cls, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ConfigError(f"{text!r} is not a whole number") from None
        require(abs(value) <= 2**53, f"{text} is too large")  # up to here, floats hold whole numbers exactly
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Floats(Domain):
    """Finite numbers."""

    forms: ClassVar[str] = f"numbers as {_NUMBER_FORMS}"

    @classmethod
    def _value(cls, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"{text!r} is not a number") from None
        require(math.isfinite(value), f"{text!r} is not finite")
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Names(Domain):
    """Words; a list of choices only."""

    forms: ClassVar[str] = "A,B,C (choices)"
    has_ranges: ClassVar[bool] = False

    @classmethod
    def _value(cls, text: str) -> str:
        require(bool(text), "a choice is empty")
        require(".." not in text, "only numbers have ranges")
        return text


def choices(domain: Domain) -> tuple[Value, ...] | None:
    """The values of a list of choices (also of a range in steps), in the order given; None for a range."""
    return domain.values if domain.spread == "choices" else None


def members(domain: Domain) -> Sequence[Value] | None:
    """All values that can be drawn: the choices, or a range's whole numbers (not held in memory); None for a range of
    Floats.
    """
    if domain.spread != "choices" and isinstance(domain, Ints):
        low, high = map(int, domain.values)
        return range(low, high + 1)
    return choices(domain)


def draw(domain: Domain, u: float) -> Value:
    """The value at u in [0, 1): equal shares of it for choices and for the whole numbers of a range.

    In a log range, value k of Ints has a share in proportion to log((k + 1) / k). Floats of a range are rounded to six
    significant digits.
    """
    if domain.spread == "choices":
        return domain.values[min(int(u * len(domain.values)), len(domain.values) - 1)]
    low, high = _ends(domain)
    if isinstance(domain, Ints):
        # Whole numbers are the intervals [k, k + 1).
        return min(max(math.floor(_between(low, high + 1, domain.spread, u)), int(low)), int(high))
    # Rounded, since the last digits of exp and log are not the same on every machine, and a trial's name depends on
    # all of them.
    return min(max(float(f"{_between(low, high, domain.spread, u):.6g}"), low), high)


def contains(domain: Domain, value: Value) -> bool:
    """Whether the domain can give this value. 8.0 is a whole number; a text is never a number."""
    if domain.spread == "choices":
        return value in domain.values
    if isinstance(value, str) or (isinstance(domain, Ints) and not float(value).is_integer()):
        return False
    low, high = _ends(domain)
    return low <= value <= high


def draw_samples(
    domains: Mapping[str, Domain], *, num_samples: int, seed: int, canonical: Callable[[Sample], Sample]
) -> list[Sample]:
    """Random search: distinct canonical samples, `num_samples` of them or all there are.

    They depend on the domains (in any order) and the seed (0 or more) only: more samples begin with the same ones.
    Where draws give nothing new for long, what is left of a finite space follows in the order of `grid`; a space with
    ranges of Floats ends there.
    """
    names = sorted(domains)
    generator = np.random.default_rng(np.random.SeedSequence(seed))
    found: dict[frozenset[tuple[str, Value]], Sample] = {}
    misses = 0
    while len(found) < num_samples and misses < _MAX_MISSES:
        place = generator.random(len(names))
        sample = canonical({name: draw(domains[name], float(u)) for name, u in zip(names, place, strict=True)})
        misses = misses + 1 if _key(sample) in found else 0
        found.setdefault(_key(sample), sample)
    finite = {name: values for name in names if (values := members(domains[name])) is not None}
    if len(found) < num_samples and len(finite) == len(names):
        for sample in map(canonical, _product(finite)):
            found.setdefault(_key(sample), sample)
            if len(found) == num_samples:
                break
    return list(found.values())


def grid(domains: Mapping[str, Domain], canonical: Callable[[Sample], Sample]) -> list[Sample]:
    """Every combination of the choices, canonical and distinct; the last option varies fastest. ConfigError names the
    options that are ranges.
    """
    listed = {name: values for name, domain in domains.items() if (values := choices(domain)) is not None}
    ranges = [f"{name}={domain}" for name, domain in domains.items() if name not in listed]
    require(
        not ranges,
        f"a grid needs choices, and these are ranges: {', '.join(ranges)}; give them as A,B,C or LOW..HIGH:STEP, or "
        f"search at random",
    )
    return list({_key(sample): sample for sample in map(canonical, _product(listed))}.values())


def _key(sample: Sample) -> frozenset[tuple[str, Value]]:
    return frozenset(sample.items())


def _product(values: Mapping[str, Sequence[Value]]) -> Iterator[Sample]:
    for point in itertools.product(*values.values()):
        yield dict(zip(values, point, strict=True))


def _ends(domain: Domain) -> tuple[float, float]:
    low, high = domain.values
    return float(low), float(high)


def _between(low: float, high: float, spread: str, u: float) -> float:
    if spread == "log":
        return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
    return low * (1 - u) + high * u
