"""Descriptions of objects and their meaning: the evaluator of every text about a scene."""

from __future__ import annotations

from dataclasses import dataclass

from petlbench.datasets.scenes.world import Obj, Scene

# name -> (axis, sign): an object stands in the relation if its centre lies further along the signed axis
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
MARGIN = 1 / 16  # of the canvas: smaller differences are too close to call and are never used


@dataclass(frozen=True)
class Phrase:
    """A description; a part that is None says nothing. `extreme` picks among the objects that the rest denotes."""

    size: str | None = None
    colour: str | None = None
    kind: str | None = None
    relation: str | None = None
    landmark: Phrase | None = None
    extreme: str | None = None

    def __str__(self) -> str:
        words = [self.extreme, self.size, self.colour, self.kind or "object"]
        text = " ".join(word for word in words if word)
        return f"{text} {self.relation} the {self.landmark}" if self.relation else text

    def fits(self, thing: Obj) -> bool:
        """Return whether an object has the attributes; relation and extreme do not count."""
        return (
            (self.kind is None or self.kind == thing.kind)
            and (self.colour is None or self.colour == thing.colour)
            and (self.size is None or self.size == thing.size)
        )


def denote(phrase: Phrase, scene: Scene, margin: float = 0) -> list[int]:
    """Return indices of the objects that a phrase means; none if its landmark is not unique.

    Directions need a distance of at least `margin` pixels between centres.
    """
    matches = [i for i, thing in enumerate(scene.objects) if phrase.fits(thing)]
    if phrase.relation and phrase.landmark:
        landmarks = denote(phrase.landmark, scene, margin)
        if len(landmarks) != 1:
            return []
        landmark = scene.objects[landmarks[0]]
        matches = [i for i in matches if holds(phrase.relation, scene.objects[i], landmark, margin)]
    if phrase.extreme:
        axis, sign = EXTREMES[phrase.extreme]
        along = {i: sign * scene.objects[i].centre[axis] for i in matches}
        matches = [i for i in matches if all(along[i] >= along[j] + margin for j in matches if j != i)]
    return matches


def holds(relation: str, thing: Obj, landmark: Obj, margin: float) -> bool:
    """Return whether `thing` stands in the relation to `landmark` by at least `margin` pixels between centres."""
    axis, sign = RELATIONS[relation]
    gap = sign * (thing.centre[axis] - landmark.centre[axis])
    return gap > 0 and gap >= margin


def means(phrase: Phrase, scene: Scene, target: int) -> bool:
    """Return whether a phrase denotes `target` and nothing else, with close calls counted and not counted."""
    return denote(phrase, scene) == [target] == denote(phrase, scene, close_call(scene))


def close_call(scene: Scene) -> float:
    """Return the distance along an axis, in pixels, below which a direction is too close to call."""
    return MARGIN * scene.image.shape[0]
