"""The rule: what is promoted, what is not, and what can't be compared."""

import math
from dataclasses import replace

import numpy as np
import pytest

from sr_serve.promotion import PairedSet, PromotionError, check_no_image_twice, decide
from sr_train.metrics import ImageScore
from sr_train.validation import SetScore, mean_score

PROTOCOL = "psnr@y,crop=scale"


def scores(name: str, all_db: list[float], *, protocol: str = PROTOCOL, scale: int = 2, ssim: float = 0.9) -> SetScore:
    images = [ImageScore(name=f"{i:03d}", psnr_db=db, ssim=ssim) for i, db in enumerate(all_db)]
    return mean_score(name, scale, protocol, images)


def paired(name: str, differences_db: list[float], *, protocol: str = PROTOCOL, scale: int = 2) -> PairedSet:
    """A champion of 30 dB and more, and a challenger that differs by so much, image by image."""
    champion_db = [30.0 + i for i in range(len(differences_db))]
    challenger_db = [db + more_db for db, more_db in zip(champion_db, differences_db, strict=True)]
    return PairedSet(
        fingerprint=f"of {name}",
        challenger=scores(name, challenger_db, protocol=protocol, scale=scale),
        champion=scores(name, champion_db, protocol=protocol, scale=scale),
    )


def around(mean_db: float, num_images: int, *, spread_db: float = 0.05) -> list[float]:
    """Differences of exactly that mean."""
    return [mean_db + spread_db * side for side in np.linspace(-1, 1, num_images)]


@pytest.mark.parametrize(
    ("differences_db", "promote", "reason"),
    [
        (around(0.2, 10), True, "is better than version 3: +0.200 dB, 95 % confidence +0.17"),
        (around(-0.2, 10), False, "is worse than version 3: -0.200 dB"),
        (around(0.2, 10, spread_db=1.0), False, "is not shown to be better than version 3: +0.200 dB"),
        ([0.0] * 10, False, "is not shown to be better than version 3: +0.000 dB"),
        ([3.0] + [-0.1] * 9, False, "is not shown"),  # better on average, by a single image
    ],
)
def test_only_what_noise_cannot_explain_is_promoted(differences_db: list[float], promote: bool, reason: str) -> None:
    decision = decide([paired("Set", differences_db)], champion="version 3")
    assert decision.promote is promote
    assert decision.reason.startswith(reason)
    assert decision.pooled.gain == pytest.approx(np.mean(differences_db))


def test_equally_good_models_are_seldom_promoted() -> None:
    """2.5 % is what a 95 % interval promises; the test fails by chance for less than one seed in ten thousand."""
    rng = np.random.default_rng(0)
    promoted = [decide([paired("Set", list(rng.normal(0, 0.1, size=12)))]).promote for _ in range(300)]
    assert sum(promoted) <= 20


def test_all_images_count_alike_whatever_their_set() -> None:
    decision = decide([paired("large", around(0.3, 30)), paired("small", around(-0.02, 6))])
    assert decision.promote
    assert decision.pooled.gain == pytest.approx((30 * 0.3 - 6 * 0.02) / 36)
    assert (decision.pooled.num_images, decision.pooled.challenger) == (36, pytest.approx((30 * 44.8 + 6 * 32.48) / 36))
    assert [it.verdict for it in decision.sets] == ["better", "no difference"]
    assert "no difference that these images show" in decision.table(challenger="a", champion="b")


def test_a_set_that_is_worse_forbids_it() -> None:
    decision = decide([paired("photos", around(0.5, 30)), paired("text", around(-0.3, 8))])
    assert not decision.promote
    assert decision.pooled.interval is not None and decision.pooled.interval[0] > 0
    assert "better than the champion on the whole" in decision.reason and "worse on text (-0.300 dB" in decision.reason


def test_a_set_too_small_to_tell_counts_and_forbids_nothing() -> None:
    decision = decide([paired("large", around(0.5, 30)), paired("Set5", around(-0.3, 5))])
    assert decision.promote
    assert decision.sets[1].verdict == "too few images"
    assert "fewer than 6 images are too few to tell" in decision.table(challenger="a", champion="b")
    assert decision.pooled.gain == pytest.approx((30 * 0.5 - 5 * 0.3) / 35)


def test_the_whole_interval_must_lie_above_the_least_gain() -> None:
    sets = [paired("Set", around(0.2, 10))]
    assert decide(sets, min_gain=0.1).promote
    decision = decide(sets, min_gain=0.19)  # the mean is above, the interval's lower end is not
    assert not decision.promote
    assert "is better than the champion, but not surely by more than 0.19 dB" in decision.reason


def test_ssim_decides_where_it_is_asked_for() -> None:
    one = paired("Set", around(-0.2, 8))
    better = [replace(image, ssim=0.92 + 0.001 * i) for i, image in enumerate(one.challenger.images)]
    one = replace(one, challenger=mean_score("Set", 2, PROTOCOL, better))
    assert not decide([one]).promote
    decision = decide([one], metric="ssim")
    assert decision.promote
    assert decision.pooled.gain == pytest.approx(0.0235)
    assert "+0.0235 SSIM" in decision.reason and "dB" not in decision.reason


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([paired("Set5", around(0.5, 5))], "5 images in all can't tell a better model from noise; at least 6"),
        (
            [paired("Set14", around(0.5, 14)), paired("one", [0.5]), paired("four", around(0.5, 4))],
            "one holds 1 and four holds 4, but each set needs 5 images or more",
        ),
        ([paired("a", around(1, 6)), paired("b", around(1, 6), protocol="psnr@rgb,crop=scale")], "can't be mixed"),
        ([paired("a", around(1, 6)), paired("b", around(1, 6), scale=4)], "x2 .* and x4 .* can't be mixed"),
        ([paired("a", around(1, 6)), replace(paired("b", around(1, 6)), fingerprint="of a")], "hold the same images"),
        (
            [replace(paired("a", around(1, 7)), champion=scores("a", [30.0] * 6))],
            "of different images; only one has 006",
        ),
        ([replace(paired("a", around(1, 6)), champion=scores("a", [30.0] * 6, scale=4))], "different scales, 2 and 4"),
        (
            [replace(paired("a", around(1, 6)), champion=scores("a", [30.0] * 6, protocol="psnr@rgb,crop=scale"))],
            "different protocols",
        ),
        ([paired("a", [*around(1, 6), math.inf])], "restores 006 without any error: .* --metric ssim"),
    ],
)
def test_what_cannot_be_compared_is_refused(sets: list[PairedSet], message: str) -> None:
    with pytest.raises(PromotionError, match=message):
        decide(sets)


def test_sets_that_share_an_image_are_refused() -> None:
    check_no_image_twice({"a": ["1", "2"], "b": ["3"]})
    with pytest.raises(PromotionError, match="a and c share 1 image:"):
        check_no_image_twice({"a": ["1", "2"], "b": ["3"], "c": ["4", "2"]})


def test_the_table_shows_each_set_and_all() -> None:
    decision = decide([paired("photos", around(0.5, 30)), paired("text", around(-0.3, 8))])
    lines = decision.table(challenger="version 4", champion="bicubic").splitlines()
    assert lines[0].split("  ")[0] == "set" and "version 4" in lines[0] and "bicubic" in lines[0]
    assert [line.split()[:2] for line in lines[1:]] == [["photos", "30"], ["text", "8"], ["all", "38"]]
    assert [line.rpartition("  ")[2] for line in lines[1:]] == ["better", "worse", "better"]
    [_, single] = decide([paired("photos", around(0.5, 30))]).table(challenger="a", champion="b").splitlines()
    assert single.startswith("photos")
