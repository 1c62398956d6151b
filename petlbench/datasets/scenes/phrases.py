"""Descriptions of objects, and what they mean: the evaluator behind everything that is said about a scene."""

from __future__ import annotations

from dataclasses import dataclass

from petlbench.datasets.scenes.world import Obj, Scene

# name -> (axis, sign): an object stands in the relation when its centre lies further along the signed axis
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
MARGIN = 1 / 16  # of the canvas: directions that differ by less are too close to call, and are never used


@dataclass(frozen=True)
class Phrase:
    """A description; parts left None say nothing. `extreme` picks among what the rest denotes."""

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
        """Whether an object has the attributes; relation and extreme aside."""
        return (
            (self.kind is None or self.kind == thing.kind)
            and (self.colour is None or self.colour == thing.colour)
            and (self.size is None or self.size == thing.size)
        )


def denote(phrase: Phrase, scene: Scene, margin: float = 0) -> list[int]:
    """Indices of the objects a phrase means; none when its landmark is not unique. Directions count from `margin`
    pixels between centres on."""
    found = [i for i, thing in enumerate(scene.objects) if phrase.fits(thing)]
    if phrase.relation and phrase.landmark:
        landmarks = denote(phrase.landmark, scene, margin)
        if len(landmarks) != 1:
            return []
        landmark = scene.objects[landmarks[0]]
        found = [i for i in found if holds(phrase.relation, scene.objects[i], landmark, margin)]
    if phrase.extreme:
        axis, sign = EXTREMES[phrase.extreme]
        along = {i: sign * scene.objects[i].centre[axis] for i in found}
        found = [i for i in found if all(along[i] >= along[j] + margin for j in found if j != i)]
    return found


def holds(relation: str, thing: Obj, landmark: Obj, margin: float) -> bool:
    """Whether `thing` stands in the relation to `landmark`, by at least `margin` pixels between centres."""
    axis, sign = RELATIONS[relation]
    gap = sign * (thing.centre[axis] - landmark.centre[axis])
    return gap > 0 and gap >= margin


def means(phrase: Phrase, scene: Scene, target: int) -> bool:
    """Whether a phrase denotes `target` and nothing else, with close calls read either way."""
    return denote(phrase, scene) == [target] == denote(phrase, scene, close_call(scene))


def close_call(scene: Scene) -> float:
    """The distance along an axis, in pixels, below which it is too close to call."""
    return MARGIN * scene.image.shape[0]
