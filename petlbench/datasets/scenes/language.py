"""What can be said about a scene: expressions, questions and captions from a small grammar, with their meaning.

Every phrase has a denotation (`denote`), and nothing is said that the evaluator does not confirm: an expression denotes
exactly one object, a question has exactly one answer. Objects of unspecified kind are called "object", never "one",
which is a digit here; counts are numerals ("3"), kinds are words ("three").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from petlbench.datasets.scenes.phrases import EXTREMES, RELATIONS, Phrase, close_call, denote, holds, means
from petlbench.datasets.scenes.world import COLOURS, COUNTS, DIGITS, KINDS, SHAPES, SIZES, Obj, Scene, pick

FORMS = {"attributes": 0.5, "relation": 0.88, "extreme": 1.0}  # cumulative shares of the forms of an expression
KIND_FREE_SHARE = 0.1  # of candidate phrases that can be resolved without seeing kinds, this share is kept

GRAMMAR_WORDS = """
    the a an is are there what many how object objects as same colour size larger smaller than more and
    from to left right top bottom of above below yes no
"""
# Words of real scenes of blocks and boxes (NLVR), so that a tokenizer trained on this vocabulary has them.
REAL_WORDS = """
    box boxes tower towers block blocks item items touching edge wall corner base exactly at least only each with
    in on it one two three four five six seven all both not different black white circles squares triangles color
    true false
"""
NUMERALS = [str(i) for i in range(max(COUNTS) + 1)]
VOCABULARY = tuple(
    sorted(
        {*GRAMMAR_WORDS.split(), *REAL_WORDS.split(), *NUMERALS, *COLOURS, *SIZES, *SHAPES, *DIGITS, *EXTREMES},
    )
)


def _needs_kind(phrase: Phrase, scene: Scene, target: int) -> bool:
    """Whether the phrase stops working for somebody who cannot tell kinds apart."""
    landmark = replace(phrase.landmark, kind=None) if phrase.landmark else None
    return denote(replace(phrase, kind=None, landmark=landmark), scene) != [target]


def _attributes(thing: Obj, rng: np.random.Generator, size: float, colour: float, kind: float) -> Phrase:
    """Each attribute of an object with the given probability."""
    u, v, w = rng.random(3).tolist()
    return Phrase(
        thing.size if u < size else None, thing.colour if v < colour else None, thing.kind if w < kind else None
    )


def _draft(form: str, scene: Scene, target: int, rng: np.random.Generator) -> Phrase:
    """A phrase true of `target` in one of the three FORMS, not necessarily of it alone."""
    thing = scene.objects[target]
    if form == "attributes":
        return _attributes(thing, rng, 0.3, 0.5, 1)
    if form == "extreme":
        return replace(_attributes(thing, rng, 0.2, 0.3, 0.9), extreme=pick(rng, list(EXTREMES)))
    other = pick(rng, [i for i in range(len(scene.objects)) if i != target])
    landmark = _attributes(scene.objects[other], rng, 0.15, 0.4, 1)
    return replace(_attributes(thing, rng, 0.1, 0.3, 0.35), relation=pick(rng, list(RELATIONS)), landmark=landmark)


def refer(scene: Scene, targets: list[int], rng: np.random.Generator, silent: str = "") -> tuple[Phrase, int] | None:
    """A phrase that means exactly one of `targets`, and which; mostly one that needs its kind or a landmark's. The
    attribute `silent` is left out of the target's description. None when a few draws find none."""
    u = rng.random()
    form = next((name for name, edge in FORMS.items() if u < edge), "extreme")
    for _ in range(16 if targets else 0):  # stay with the form drawn, lest the demanding ones grow rare
        target = pick(rng, targets)
        phrase = _draft(form, scene, target, rng)
        phrase = replace(phrase, **{silent: None}) if silent else phrase
        bare = replace(phrase, relation=None, landmark=None, extreme=None)
        if bare != phrase and len(denote(bare, scene)) == 1:
            continue  # the relation would say nothing
        if means(phrase, scene, target) and (_needs_kind(phrase, scene, target) or rng.random() < KIND_FREE_SHARE):
            return phrase, target
    return None


def expressions(scene: Scene, rng: np.random.Generator, n: int) -> list[tuple[str, int]]:
    """`n` different (expression, index of the one object it means)."""
    found: dict[str, int] = {}
    everything = list(range(len(scene.objects)))
    for _ in range(10 * n):
        if len(found) >= n:
            break
        referred = refer(scene, everything, rng)
        if referred:
            found[f"the {referred[0]}"] = referred[1]
    for i, thing in enumerate(scene.objects):  # all three attributes are always enough: no two objects look alike
        if len(found) < n:
            found[f"the {thing.size} {thing.colour} {thing.kind}"] = i
    return list(found.items())


QA = tuple[str, str]


def _ask_colour(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    referred = refer(scene, list(range(len(scene.objects))), rng, "colour")
    return referred and (f"what colour is the {referred[0]}", scene.objects[referred[1]].colour)


def _ask_size(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    answer = "large" if yes else "small"
    referred = refer(scene, [i for i, thing in enumerate(scene.objects) if thing.size == answer], rng, "size")
    return referred and (f"what size is the {referred[0]}", answer)


def _ask_kind(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    """The answer is a kind, so the description may do without."""
    target = int(rng.integers(len(scene.objects)))
    phrase = _attributes(scene.objects[target], rng, 0.5, 0.6, 0)
    if rng.random() < 0.4:
        landmark = _attributes(pick(rng, scene.objects), rng, 0.2, 0.4, 0.9)
        phrase = replace(phrase, size=None, relation=pick(rng, list(RELATIONS)), landmark=landmark)
    if not means(phrase, scene, target):
        return None
    return f"what is the {phrase}", scene.objects[target].kind


def _ask_count(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    """Draws the answer first, among those the scene has a question for."""
    by_answer: dict[int, list[str]] = {}
    for size in (None, *SIZES):
        for colour in (None, *COLOURS):
            fitting = sum(Phrase(size, colour).fits(thing) for thing in scene.objects)
            by_answer.setdefault(fitting, []).append(" ".join(word for word in (size, colour, "objects") if word))
    answer = pick(rng, sorted(by_answer))
    return f"how many {pick(rng, by_answer[answer])} are there", str(answer)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' and not words.startswith('one') else 'a'} {words}"


def _ask_exist(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    """Yes and no use the same forms; a no recombines what the scene has, or takes what it lacks."""
    size, colour, kind = pick(rng, EXIST_FORMS)
    for _ in range(20):
        thing = pick(rng, scene.objects)
        if not yes:
            kinds = [o.kind for o in scene.objects] if rng.random() < 0.5 else KINDS[scene.domain]
            colours = [o.colour for o in scene.objects] if rng.random() < 0.7 else list(COLOURS)
            thing = Obj(pick(rng, kinds), pick(rng, colours), pick(rng, list(SIZES)), thing.box)
        phrase = Phrase(thing.size if size else None, thing.colour if colour else None, thing.kind if kind else None)
        if yes or not denote(phrase, scene):
            return f"is there {_article(str(phrase))}", YES_NO[yes]
    return None


def _pair(scene: Scene, rng: np.random.Generator, silent: str) -> tuple[Obj, Obj, str, str] | None:
    """Two objects and how to call them by attributes that mean each alone; `silent` is not among them."""
    indices = rng.permutation(len(scene.objects))[:2].tolist()
    first, second = (scene.objects[i] for i in indices)
    one, other = (
        _attributes(thing, rng, 0 if silent == "size" else 0.2, 0 if silent == "colour" else 0.4, 1)
        for thing in (first, second)
    )
    alone = means(one, scene, indices[0]) and means(other, scene, indices[1])
    return (first, second, str(one), str(other)) if alone else None


def _ask_larger(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    pair = _pair(scene, rng, "size")
    if not pair or pair[0].size == pair[1].size:
        return None
    comparative = "larger" if (pair[0].size == "large") == yes else "smaller"
    return f"is the {pair[2]} {comparative} than the {pair[3]}", YES_NO[yes]


def _ask_same_colour(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    pair = _pair(scene, rng, "colour")
    if not pair or (pair[0].colour == pair[1].colour) != yes:
        return None
    return f"is the {pair[2]} the same colour as the {pair[3]}", YES_NO[yes]


def _ask_position(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    pair, relation = _pair(scene, rng, ""), pick(rng, list(RELATIONS))
    if not pair:
        return None
    ahead, behind = pair[:2] if yes else pair[1::-1]
    if not holds(relation, ahead, behind, close_call(scene)):
        return None
    return f"is the {pair[2]} {relation} the {pair[3]}", YES_NO[yes]


def _ask_more(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    present = sorted({thing.colour for thing in scene.objects})
    pair = (pick(rng, present), pick(rng, present if len(present) > 1 else list(COLOURS)))
    more, fewer = (sum(thing.colour == colour for thing in scene.objects) for colour in pair)
    if more <= fewer:
        return None
    first, second = pair if yes else pair[::-1]
    return f"are there more {first} objects than {second} objects", YES_NO[yes]


YES_NO = {True: "yes", False: "no"}
# which of size, colour and kind are named
EXIST_FORMS = ((0, 0, 1), (0, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (1, 1, 0))


@dataclass(frozen=True)
class Ask:
    """One form of question: its answer type, its share of all questions, and how to ask it. `ask` is told by a fair
    coin which of two answers to aim for, where there are two; it returns None when its draw leads nowhere."""

    answer_type: str
    share: float
    ask: Callable[[Scene, np.random.Generator, bool], QA | None]


# Shares are chosen so that yes and no, equally often, stay under a fifth of the answers each.
ASKS = (
    Ask("colour", 0.19, _ask_colour),
    Ask("kind", 0.23, _ask_kind),
    Ask("size", 0.07, _ask_size),
    Ask("count", 0.14, _ask_count),
    Ask("exist", 0.20, _ask_exist),
    Ask("compare", 0.05, _ask_larger),
    Ask("compare", 0.05, _ask_same_colour),
    Ask("compare", 0.04, _ask_position),
    Ask("compare", 0.03, _ask_more),
)
EDGES = np.cumsum([ask.share for ask in ASKS])


def questions(scene: Scene, rng: np.random.Generator, n: int) -> list[tuple[str, str, str]]:
    """`n` different (question, answer, answer type); the answers are balanced over scenes, by draw. `n` is meant to be
    small: a scene of two objects has a few dozen questions."""
    found: dict[str, tuple[str, str, str]] = {}
    while len(found) < n:
        form = ASKS[min(int(np.searchsorted(EDGES, rng.random(), side="right")), len(ASKS) - 1)]
        yes = rng.random() < 0.5
        for _ in range(30):  # stay with the form and the answer drawn, lest the demanding ones grow rare
            asked = form.ask(scene, rng, yes)
            if asked and asked[0] not in found:
                found[asked[0]] = (*asked, form.answer_type)
                break
    return list(found.values())


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five captions in random order, each naming every object's colour and kind: four from left to right, one of them
    with sizes, and one from top to bottom. At most 24 words."""
    across = sorted(scene.objects, key=lambda thing: thing.centre)
    down = sorted(scene.objects, key=lambda thing: thing.centre[::-1])
    plain = " and ".join(_article(f"{thing.colour} {thing.kind}") for thing in across)
    sized = " and ".join(f"a {thing.size} {thing.colour} {thing.kind}" for thing in across)
    stacked = " and ".join(_article(f"{thing.colour} {thing.kind}") for thing in down)
    lines = [
        plain,
        f"there is {plain}",
        f"from left to right {plain}",
        sized,
        f"from top to bottom {stacked}",
    ]
    return [lines[i] for i in rng.permutation(len(lines)).tolist()]
