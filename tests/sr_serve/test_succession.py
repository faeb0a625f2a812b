"""The line of champions, as versions come and go."""

import pytest

from sr_serve.promotion import PromotionError
from sr_serve.succession import ModelState, Version, check_not_trained_on, doubts


class Registry:
    """Versions 1 to 5 and the tags that promotions leave."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, str]] = {str(number): {} for number in range(1, 6)}
        self.champion: str | None = None

    @property
    def state(self) -> ModelState:
        aliases = {} if self.champion is None else {"champion": self.champion}
        versions = {number: Version(name="m", version=number, tags=dict(tags)) for number, tags in self.tags.items()}
        return ModelState(name="m", aliases=aliases, versions=versions)

    def promote(self, *numbers: str) -> "Registry":
        for number in numbers:
            self._set_before(number, self.state.before_tag(self.state.versions[number]))
            self.tags[number]["promoted_at"] = "today"
            self.champion = number
        return self

    def back(self) -> str:
        way = self.state.way_back()
        for version, before in way.tags_left():
            self._set_before(version.version, before)
        self.champion = way.to.version
        return self.champion

    def _set_before(self, number: str, before: str | None) -> None:
        self.tags[number].pop("champion_before", None)
        if before is not None:
            self.tags[number]["champion_before"] = before


def test_the_way_back_ends_at_the_first_champion() -> None:
    registry = Registry().promote("1", "2", "3")
    assert [registry.back(), registry.back()] == ["2", "1"]
    with pytest.raises(PromotionError, match=r"models:/m/1 is the first champion"):
        registry.back()
    assert registry.champion == "1"


def test_after_a_rollback_a_newer_version_follows_as_usual() -> None:
    registry = Registry().promote("1", "2", "3")
    registry.back()
    registry.promote("4")
    assert [registry.back(), registry.back()] == ["2", "1"]


def test_a_version_that_comes_again_does_not_lead_round_in_a_circle() -> None:
    registry = Registry().promote("1", "2", "3", "1", "4", "2")
    assert [registry.back() for _ in range(5)] == ["4", "1", "3", "2", "1"]
    with pytest.raises(PromotionError, match="first champion"):
        registry.back()


def test_what_an_unfinished_promotion_left_behind_is_forgotten() -> None:
    registry = Registry().promote("1", "2")
    registry.tags["3"]["champion_before"] = "1"  # killed before the alias was moved
    registry.promote("3")
    assert [registry.back(), registry.back()] == ["2", "1"]
    with pytest.raises(PromotionError, match="first champion"):
        registry.back()


def test_a_version_that_must_not_be_champion_is_passed_over() -> None:
    registry = Registry().promote("1", "2", "3")
    registry.tags["2"]["not_promotable"] = "trained on the benchmark"
    assert [version.version for version in registry.state.way_back().left] == ["3", "2"]
    assert registry.back() == "1"
    registry.promote("4")
    registry.tags["1"]["not_promotable"] = "so was this"
    with pytest.raises(PromotionError, match=r"models:/m/1 must not become champion: so was this"):
        registry.back()


def test_without_history_there_is_no_way_back() -> None:
    registry = Registry()
    with pytest.raises(PromotionError, match="m has no champion"):
        registry.back()
    registry.champion = "3"  # by hand
    with pytest.raises(PromotionError, match=r"models:/m/3 did not become champion by promote_model\.py"):
        registry.back()
    registry.promote("4")
    assert registry.back() == "3"
    registry.promote("5")
    del registry.tags["3"]
    with pytest.raises(PromotionError, match=r"version 3, which was champion before models:/m/5, is deleted"):
        registry.back()


def test_who_may_challenge() -> None:
    registry = Registry().promote("1")
    registry.tags["2"]["not_promotable"] = "its weights are not ours"
    registry.tags["3"]["rolled_back_at"] = "2026-11-21T10:00:00+00:00"
    state = registry.state
    aliases = {"challenger": "3", "bad": "2", "new": "4"}
    state = ModelState(name="m", aliases={**state.aliases, **aliases}, versions=state.versions)
    assert (state.challenger("new").version, state.challenger("5").version) == ("4", "5")
    assert state.challenger("3").version == "3"
    for asked, message in [
        ("challenger", r"was rolled back at 2026-11-21T10:00:00\+00:00.* --challenger 3"),
        ("bad", "must never become champion: its weights are not ours"),
        ("2", "must never become champion"),
        ("7", r"no version 7 \(--challenger\); it has 1, 2, 3, 4, 5"),
        ("nobody", r"alias 'nobody'; it has bad \(version 2\), challenger \(version 3\)"),
    ]:
        with pytest.raises(PromotionError, match=message):
            state.challenger(asked)


def test_what_a_version_has_seen_of_the_sets() -> None:
    sets = {"Set5": "f5", "own": "f0"}
    ours = Version(name="m", version="2", tags={"dataset_fingerprint": "f9", "validation_fingerprint": "f0"})
    theirs = Version(name="m", version="1", tags={"dataset_fingerprint": "f0", "validation_fingerprint": "f9"})
    check_not_trained_on(ours, sets)
    with pytest.raises(PromotionError, match=r"own \(fingerprint f0\) is what models:/m/1 was trained on"):
        check_not_trained_on(theirs, sets)
    selected, trained = doubts(ours, theirs, sets)
    assert "own is the set by which its best checkpoint was chosen (models:/m/2)" in selected
    assert "own is what the champion models:/m/1 was trained on" in trained
    assert doubts(ours, None, {"Set5": "f5"}) == []
