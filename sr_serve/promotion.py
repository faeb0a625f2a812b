"""Whether a challenger may take the champion's place: the rule, from both models' scores by image (pure mathematics).

The rule and its reasons: docs/decisions/0011-promotion.md.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sr_train.metrics import ImageScore
from sr_train.paired import (
    CONFIDENCE,
    MIN_IMAGES,
    MIN_IN_SET,
    Interval,
    Metric,
    Verdict,
    interval_verdict,
    mean_interval,
    paired_differences,
    verdict,
)
from sr_train.validation import SetScore


class PromotionError(ValueError):
    """A promotion or rollback that can't be decided or carried out as asked; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedSet:
    """Both models' scores on one set."""

    fingerprint: str
    """Of the set at this scale, as in `sr_data.manifest`."""
    challenger: SetScore
    champion: SetScore
    """Bicubic's where there is no champion yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one set, or all together, show."""

    set: str
    """Name of the set."""
    fingerprint: str | None
    """None of all sets together."""
    num_images: int
    challenger: float
    """Mean over the images of PSNR in dB, or of SSIM."""
    champion: float
    gain: float
    """Mean of the differences: above 0 if the challenger is better."""
    interval: Interval | None
    """95 % confidence interval of `gain`; None if it can't be had."""

    @property
    def verdict(self) -> Verdict:
        """What the interval shows."""
        return verdict(self.interval, self.num_images)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The outcome of a comparison."""

    promote: bool
    reason: str
    """A clause that goes on after the challenger's name: "is better than version 3: …"."""
    metric: Metric
    protocol: str
    """A name in `sr_train.metrics.PROTOCOLS`."""
    scale: int
    min_gain: float
    """What the interval had to lie above; dB, or SSIM."""
    sets: tuple[Result, ...]
    pooled: Result
    """All images together."""

    def table(self, *, challenger: str, champion: str) -> str:
        """A line for each set and one for all, under the models' names."""
        digits = _digits(self.metric)
        rows = [
            (
                result.set,
                str(result.num_images),
                f"{result.challenger:.{digits}f}",
                f"{result.champion:.{digits}f}",
                f"{result.gain:+.{digits}f}",
                _range(result.interval, digits),
                interval_verdict(result.interval, result.num_images),
            )
            for result in (*self.sets, *([self.pooled] if len(self.sets) > 1 else []))
        ]
        header = ("set", "images", challenger, champion, "difference", f"{100 * CONFIDENCE:.0f} % interval", "verdict")
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        ends = (0, len(header) - 1)  # words, which begin at the left
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in ends else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (header, *rows)
        )

    def to_json_dict(self, *, against: str) -> dict[str, Any]:
        """Plain values, for the promoted version's tag; `against` is the champion's version, or "bicubic"."""

        def plain(result: Result) -> dict[str, Any]:
            return {
                "images": result.num_images,
                "challenger": result.challenger,
                "champion": result.champion,
                "gain": result.gain,
                "interval": None if result.interval is None else list(result.interval),
            }

        return {
            "against": against,
            "metric": self.metric,
            "protocol": self.protocol,
            "scale": self.scale,
            "min_gain": self.min_gain,
            "confidence": CONFIDENCE,
            **plain(self.pooled),
            "sets": [{"set": it.set, "fingerprint": it.fingerprint, **plain(it)} for it in self.sets],
        }


def decide(
    tested: Sequence[PairedSet], *, metric: Metric = "psnr", min_gain: float = 0.0, champion: str = "the champion"
) -> Decision:
    """Promote if the interval of the mean difference over all images lies above `min_gain`, and no set's below 0.

    `min_gain` is in dB, or of SSIM; `champion` is what the reason calls the other. PromotionError if the scores are not
    of the same images, scale and protocol, if a set is there twice, and if the images are too few or their differences
    have no mean.
    """
    _check_comparable(tested)
    check_enough([(it.challenger.set, len(it.challenger.images)) for it in tested])
    differences = [list(_differences(it, metric).values()) for it in tested]
    sets = tuple(
        _result(it.challenger.set, it.fingerprint, it.challenger.images, it.champion.images, metric, [of_set])
        for it, of_set in zip(tested, differences, strict=True)
    )
    pooled = _result(
        "all",
        None,
        [image for it in tested for image in it.challenger.images],
        [image for it in tested for image in it.champion.images],
        metric,
        differences,
    )
    promote, reason = _verdict(pooled, sets, metric, min_gain, champion)
    first = tested[0].challenger
    return Decision(
        promote=promote,
        reason=reason,
        metric=metric,
        protocol=first.protocol,
        scale=first.scale,
        min_gain=min_gain,
        sets=sets,
        pooled=pooled,
    )


def check_enough(sets: Sequence[tuple[str, int]]) -> None:
    """PromotionError if sets of these names and numbers of images can't show anything: known before they are scored."""
    num_images = sum(number for _, number in sets)
    if num_images < MIN_IMAGES:
        raise PromotionError(
            f"{num_images} image{'s' if num_images != 1 else ''} in all can't tell a better model from noise; at least "
            f"{MIN_IMAGES} are needed (--sets)"
        )
    small = [f"{name} holds {number}" for name, number in sets if number < MIN_IN_SET]
    if small:
        raise PromotionError(
            f"{' and '.join(small)}, but each set needs {MIN_IN_SET} images or more: fewer don't show how much its "
            f"images differ. Leave it out or put its images into another set (--sets)"
        )


def check_no_image_twice(sets: Mapping[str, Collection[str]]) -> None:
    """PromotionError if two of the sets (name → hashes of its HR files) share an image."""
    for (name, hashes), (other, others) in itertools.combinations(sets.items(), 2):
        shared = len(set(hashes) & set(others))
        if shared:
            raise PromotionError(
                f"{name} and {other} share {shared} image{'s' if shared > 1 else ''}: counted twice they would make "
                f"noise look certain (--sets)"
            )


def _check_comparable(tested: Sequence[PairedSet]) -> None:
    kinds = sorted({(it.challenger.scale, it.challenger.protocol) for it in tested})
    if len(kinds) > 1:
        raise PromotionError(f"scores of {' and '.join(f'x{scale} {name}' for scale, name in kinds)} can't be mixed")
    for one, other in itertools.combinations(tested, 2):
        if one.fingerprint == other.fingerprint:
            raise PromotionError(
                f"{one.challenger.set} and {other.challenger.set} hold the same images (fingerprint "
                f"{one.fingerprint}): counted twice they would make noise look certain (--sets)"
            )


def _differences(it: PairedSet, metric: Metric) -> dict[str, float]:
    try:
        differences = paired_differences(it.challenger, it.champion, metric)
    except ValueError as error:
        raise PromotionError(str(error)) from error
    exact = [name for name, value in differences.items() if not math.isfinite(value)]
    if exact:
        raise PromotionError(
            f"{it.challenger.set}: one of the models restores {exact[0]} without any error: its PSNR is infinite, and "
            f"so is the mean; compare with --metric ssim, or leave that image out"
        )
    return differences


def _result(
    name: str,
    fingerprint: str | None,
    ours: Sequence[ImageScore],
    others: Sequence[ImageScore],
    metric: Metric,
    differences: Sequence[Sequence[float]],
) -> Result:
    def mean(images: Sequence[ImageScore]) -> float:
        return math.fsum(it.psnr_db if metric == "psnr" else it.ssim for it in images) / len(images)

    return Result(
        set=name,
        fingerprint=fingerprint,
        num_images=len(ours),
        challenger=mean(ours),
        champion=mean(others),
        gain=math.fsum(value for of_set in differences for value in of_set) / len(ours),
        interval=mean_interval(*differences),
    )


def _verdict(
    pooled: Result, sets: Sequence[Result], metric: Metric, min_gain: float, champion: str
) -> tuple[bool, str]:
    assert pooled.interval is not None, "check_enough and _differences have seen to that"
    low, high = pooled.interval
    shown = _shown(pooled, metric)
    if high < 0.0:
        return False, f"is worse than {champion}: {shown}"
    if not low > 0.0:
        return False, f"is not shown to be better than {champion}: {shown}"
    if not low > min_gain:
        return False, f"is better than {champion}, but not surely by more than {min_gain:g}{_unit(metric)}: {shown}"
    worse = [result for result in sets if result.verdict == "worse"]
    if worse:
        return False, f"is better than {champion} on the whole ({shown}), but worse on " + "; ".join(
            f"{result.set} ({_shown(result, metric)})" for result in worse
        )
    return True, f"is better than {champion}: {shown}"


def _shown(result: Result, metric: Metric) -> str:
    digits = _digits(metric)
    interval = f"{100 * CONFIDENCE:.0f} % confidence {_range(result.interval, digits)}{_unit(metric)}"
    return f"{result.gain:+.{digits}f}{_unit(metric) or ' SSIM'}, {interval}, {result.num_images} images"


def _range(interval: Interval | None, digits: int) -> str:
    return "–" if interval is None else f"{interval[0]:+.{digits}f} … {interval[1]:+.{digits}f}"


def _digits(metric: Metric) -> int:
    return 3 if metric == "psnr" else 4


def _unit(metric: Metric) -> str:
    return " dB" if metric == "psnr" else ""
