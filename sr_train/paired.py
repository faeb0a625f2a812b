"""Two models on the same images: differences by image, and what they are worth (pure mathematics)."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np

from sr_train.metrics import ImageScore, MetricError
from sr_train.validation import SetScore

Metric = Literal["psnr", "ssim"]
Interval = tuple[float, float]
Verdict = Literal["better", "worse", "no difference", "too few images", "no interval"]
"""What an interval shows; `interval_verdict` puts it in words."""
CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
MIN_IMAGES = 6
"""If both models were equally good, the differences of n images would all have one sign with probability 2^(1 - n),
which is below 5 % from 6 images on. Fewer can't show anything with 95 % confidence."""
MIN_IN_SET = 5
"""No resample's mean lies beyond the smallest and the largest value: of 2 to 4 values these are too near for 95 %
(docs/decisions/0011-promotion.md has how often such an interval errs)."""
_CHUNK = 500


def metric_named(name: str) -> Metric:
    """`name`, if it is a metric; MetricError lists them if it is not."""
    for metric in get_args(Metric):
        if metric == name:
            return metric  # type: ignore[no-any-return]
    raise MetricError(f"unknown metric {name!r}; there are: {'  '.join(get_args(Metric))} (--metric)")


def paired_differences(ours: SetScore, others: SetScore, metric: Metric = "psnr") -> dict[str, float]:
    """Ours minus theirs by image: PSNR in dB, or SSIM. 0 where both are identical to HR, infinite where one is.

    ValueError says how the scores can't be compared: another scale, another protocol, other images.
    """
    both = (ours, others)
    for what in ("scale", "protocol"):
        values = [getattr(score, what) for score in both]
        if values[0] != values[1]:
            raise ValueError(f"{ours.set}: the scores are of different {what}s, {values[0]} and {values[1]}")
    names, other_names = ({image.name for image in score.images} for score in both)
    if names != other_names or len(ours.images) != len(others.images):
        apart = ", ".join(sorted(names ^ other_names)[:5])
        raise ValueError(f"{ours.set}: the scores are of different images; only one has {apart}")
    theirs = {image.name: image for image in others.images}

    def difference(image: ImageScore, other: ImageScore) -> float:
        mine, its = (image.psnr_db, other.psnr_db) if metric == "psnr" else (image.ssim, other.ssim)
        return 0.0 if mine == its else mine - its  # infinite PSNRs are equal, but their difference is no number

    return {image.name: difference(image, theirs[image.name]) for image in ours.images}


def mean_interval(*sets: Sequence[float]) -> Interval | None:
    """95 % confidence interval of the mean over all values of all sets; None if one set has fewer than `MIN_IN_SET`
    values, or if a value is infinite.

    The percentile bootstrap, stratified: each resample draws as many values from each set as that has (Davison,
    Hinkley: "Bootstrap Methods and their Application", 1997, section 3.2), 10,000 times with a fixed seed. Its
    percentiles lie further out, which makes up for resamples of few values being too much alike (Hesterberg: "What
    Teachers Should Know About the Bootstrap", The American Statistician 69(4), 2015: the expanded percentile interval);
    for several sets Student's quantile has Satterthwaite's degrees of freedom. No distribution is assumed.
    """
    known = [np.asarray(values, dtype=np.float64) for values in sets]
    if not known or any(len(values) < MIN_IN_SET or not np.isfinite(values).all() for values in known):
        return None
    tail = _tail(known)
    rng = np.random.default_rng(0)
    num_values = sum(map(len, known))
    # In chunks: the resamples of a set of thousands would take hundreds of megabytes.
    means = [
        sum(values[rng.integers(len(values), size=(_CHUNK, len(values)))].sum(1) for values in known) / num_values
        for _ in range(NUM_RESAMPLES // _CHUNK)
    ]
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return float(low), float(high)


def verdict(interval: Interval | None, num_images: int) -> Verdict:
    """What the interval of a mean difference over so many images shows."""
    if interval is None:
        return "no interval"
    low, high = interval
    if not (low > 0.0 or high < 0.0):
        return "no difference"
    if num_images < MIN_IMAGES:
        return "too few images"
    return "better" if low > 0.0 else "worse"


def interval_verdict(interval: Interval | None, num_images: int) -> str:
    """`verdict` in words."""
    shown = verdict(interval, num_images)
    if shown == "no interval":
        few = "one image gives" if num_images == 1 else f"{num_images} images give"
        return f"{few if num_images < MIN_IN_SET else 'an image without any error leaves'} no confidence interval"
    if shown == "no difference":
        return "no difference that these images show"
    if shown == "too few images":
        return f"fewer than {MIN_IMAGES} images are too few to tell"
    return shown


def _tail(sets: Sequence[np.ndarray]) -> float:
    """The share of the resamples that lies below the interval."""
    nominal = NormalDist().inv_cdf((1.0 + CONFIDENCE) / 2)
    # Of the sum over all sets: what the bootstrap's resamples have, and without bias.
    unbiased = [len(values) * float(values.var(ddof=1)) for values in sets]
    resampled = math.fsum(len(values) * float(values.var()) for values in sets)
    if resampled == 0.0:
        return (1.0 - CONFIDENCE) / 2
    freedom = math.fsum(unbiased) ** 2 / math.fsum(v**2 / (len(x) - 1) for v, x in zip(unbiased, sets, strict=True))
    widening = math.sqrt(math.fsum(unbiased) / resampled)
    return NormalDist().cdf(-widening * _student(nominal, freedom))


def _student(z: float, freedom: float) -> float:
    """Student's quantile from the normal one: Abramowitz, Stegun, 26.7.5. Of 97.5 % it is 0.3 % off at four degrees of
    freedom, the fewest that sets of `MIN_IN_SET` have; a quarter at one.
    """
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
