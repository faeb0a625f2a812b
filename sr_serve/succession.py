"""Which version may become champion, and who was champion before whom: read from the versions' tags.

A version's tag `champion_before` holds the versions whose place it took, the last one last: several, if it became
champion several times. Promoting a version adds the champion before it, rolling it back takes that off again; so the
tags of the champion and of those before it are the history, however often a version comes and goes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sr_serve.promotion import PromotionError
from sr_train.champion import CHAMPION
from sr_train.model_registry import NOT_PROMOTABLE_TAG
from sr_train.upscaler import REGISTRY_PREFIX

BEFORE_TAG = "champion_before"
PROMOTED_AT_TAG = "promoted_at"
"""When a version last became champion: UTC, ISO 8601."""
ROLLED_BACK_AT_TAG = "rolled_back_at"
"""When a version last lost the champion's place by --rollback: UTC, ISO 8601."""
PROMOTION_TAG = "promotion"
"""The comparison that made a version champion, as JSON (`Decision.to_json_dict`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version of a registered model."""

    name: str
    """Of the registered model."""
    version: str
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """MODEL, by number: an alias may move."""
        return f"{REGISTRY_PREFIX}{self.name}/{self.version}"

    @property
    def champions_before(self) -> list[str]:
        """The versions whose place it took, the last one last."""
        return [part for part in self.tags.get(BEFORE_TAG, "").split(",") if part]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """A registered model as it was at one moment."""

    name: str
    aliases: Mapping[str, str]
    """Alias → version."""
    versions: Mapping[str, Version]

    @property
    def champion(self) -> Version | None:
        """None if there never was one, or its alias was taken away."""
        version = self.aliases.get(CHAMPION)
        return None if version is None else self._version(version, f"which is its {CHAMPION}")

    def challenger(self, asked: str) -> Version:
        """The version of that number or with that alias. PromotionError if there is none, or it may not be promoted."""
        by_number = asked.isdecimal()
        number = asked if by_number else self.aliases.get(asked)
        if number is None:
            known = ", ".join(f"{alias} (version {version})" for alias, version in sorted(self.aliases.items()))
            raise PromotionError(
                f"{self.name} has no version with the alias {asked!r}; it has {known or 'no alias'} and the versions "
                f"{self._numbers()} (--challenger)"
            )
        return self.promotable(number, by_number=by_number)

    def promotable(self, number: str, *, by_number: bool) -> Version:
        """The version, if it may be promoted; `by_number`: asked for so, which a rollback does not forbid."""
        found = self._version(number, "(--challenger)")
        if NOT_PROMOTABLE_TAG in found.tags:
            raise PromotionError(
                f"{found.uri} must never become {CHAMPION}: {found.tags[NOT_PROMOTABLE_TAG]} (tag {NOT_PROMOTABLE_TAG})"
            )
        if ROLLED_BACK_AT_TAG in found.tags and not by_number:
            raise PromotionError(
                f"{found.uri} was {CHAMPION} and was rolled back at {found.tags[ROLLED_BACK_AT_TAG]}; what spoke "
                f"against it then is not in its scores. To promote it nevertheless: --challenger {found.version}"
            )
        return found

    def line(self) -> list[Version]:
        """The champion, the one before it, and so on. Ends where a version's tags name none, or one that is deleted."""
        champion = self.champion
        line = [] if champion is None else [champion]
        before = {number: version.champions_before for number, version in self.versions.items()}
        while line and before[line[-1].version]:
            number = before[line[-1].version].pop()
            if number not in self.versions:
                break
            line.append(self.versions[number])
        return line

    def before_tag(self, promoted: Version) -> str | None:
        """What the tag `BEFORE_TAG` of a version must be once it has taken the champion's place; None for no tag."""
        if self.champion is None:
            return None
        # What stands on a version outside the line was left there by a promotion that did not come to its end.
        held = promoted.champions_before if promoted in self.line() else []
        return ",".join([*held, self.champion.version])

    def way_back(self) -> "WayBack":
        """What --rollback does. PromotionError if there is no champion, or none is known from before it."""
        line = self.line()
        if not line:
            raise PromotionError(f"{self.name} has no {CHAMPION}, so there is nothing to go back from (--rollback)")
        for index, version in enumerate(line[1:], start=1):
            if NOT_PROMOTABLE_TAG not in version.tags:
                return WayBack(left=tuple(line[:index]), to=version)
        last = line[-1]
        reasons = [f"{it.uri} must not become {CHAMPION}: {it.tags[NOT_PROMOTABLE_TAG]}" for it in line[1:]]
        if last.champions_before and last.champions_before[-1] not in self.versions:
            reasons.append(f"version {last.champions_before[-1]}, which was {CHAMPION} before {last.uri}, is deleted")
        elif ROLLED_BACK_AT_TAG not in last.tags and PROMOTED_AT_TAG not in last.tags:
            reasons.append(f"{last.uri} did not become {CHAMPION} by promote_model.py, so nothing is known from before")
        else:
            reasons.append(f"{last.uri} is the first {CHAMPION}")
        raise PromotionError(
            f"{line[0].uri} is {CHAMPION} and there is none to go back to: {'; '.join(reasons)} (--rollback)"
        )

    def _version(self, number: str, what: str) -> Version:
        if number not in self.versions:
            raise PromotionError(f"{self.name} has no version {number} {what}; it has {self._numbers()}")
        return self.versions[number]

    def _numbers(self) -> str:
        return ", ".join(sorted(self.versions, key=int))


@dataclass(frozen=True, kw_only=True, slots=True)
class WayBack:
    """A rollback, not yet made."""

    left: tuple[Version, ...]
    """The champion, and then those before it that must not become champion again."""
    to: Version
    """The champion that will be."""

    def tags_left(self) -> list[tuple[Version, str | None]]:
        """Each version of `left` with its new `BEFORE_TAG`; None for no tag."""
        return [(version, ",".join(version.champions_before[:-1]) or None) for version in self.left]


def check_not_trained_on(challenger: Version, sets: Mapping[str, str]) -> None:
    """PromotionError if one of the sets (name → fingerprint) is what the challenger was trained on."""
    for name, fingerprint in sets.items():
        if challenger.tags.get("dataset_fingerprint") == fingerprint:
            raise PromotionError(
                f"{name} (fingerprint {fingerprint}) is what {challenger.uri} was trained on: scores on it say nothing "
                f"of other images (--sets)"
            )


def doubts(challenger: Version, champion: Version | None, sets: Mapping[str, str]) -> Sequence[str]:
    """What favours one of the two on sets (name → fingerprint) that are allowed all the same, a line each."""
    lines = []
    for name, fingerprint in sets.items():
        selected = [
            version.uri
            for version in (challenger, champion)
            if version is not None and version.tags.get("validation_fingerprint") == fingerprint
        ]
        if selected:
            of_each = "each one's" if len(selected) > 1 else "its"
            lines.append(
                f"{name} is the set by which {of_each} best checkpoint was chosen ({' and '.join(selected)}): "
                f"scores on it are a little too good"
            )
        if champion is not None and champion.tags.get("dataset_fingerprint") == fingerprint:
            lines.append(f"{name} is what the champion {champion.uri} was trained on: that favours the champion")
    return lines
