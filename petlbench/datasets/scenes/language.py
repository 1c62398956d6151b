"""Expressions, questions and captions about a scene, from a small grammar with meanings.

Every phrase has a denotation (`denote`), and the evaluator confirms every text: an expression denotes exactly one
object, and a question has exactly one answer. An object of unspecified kind is called "object", never "one", which is
a digit here; counts are numerals ("3"), kinds are words ("three").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from petlbench.datasets.scenes.phrases import EXTREMES, RELATIONS, Phrase, close_call, denote, holds, means
from petlbench.datasets.scenes.world import COLOURS, COUNTS, DIGITS, KINDS, SHAPES, SIZES, Obj, Scene, pick

FORMS = {"attributes": 0.5, "relation": 0.88, "extreme": 1.0}  # cumulative shares of the forms of an expression
KIND_FREE_SHARE = 0.1  # the share kept of candidate phrases that work without seeing kinds

GRAMMAR_WORDS = """
    the a an is are there what many how object objects as same colour size larger smaller than more and
    from to left right top bottom of above below yes no
"""
# Words of real scenes of blocks and boxes (NLVR), so that a tokenizer trained on this vocabulary knows them.
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
    """Return whether the phrase no longer denotes the target alone if kinds are ignored."""
    landmark = replace(phrase.landmark, kind=None) if phrase.landmark else None
    return denote(replace(phrase, kind=None, landmark=landmark), scene) != [target]


def _attributes(thing: Obj, rng: np.random.Generator, size: float, colour: float, kind: float) -> Phrase:
    """Return a phrase with each attribute of an object, each with its given probability."""
    u, v, w = rng.random(3).tolist()
    return Phrase(
        thing.size if u < size else None, thing.colour if v < colour else None, thing.kind if w < kind else None
    )


def _draft(form: str, scene: Scene, target: int, rng: np.random.Generator) -> Phrase:
    """Return a phrase in one of the three FORMS that is true of `target`, but perhaps not of it alone."""
    thing = scene.objects[target]
    if form == "attributes":
        return _attributes(thing, rng, 0.3, 0.5, 1)
    if form == "extreme":
        return replace(_attributes(thing, rng, 0.2, 0.3, 0.9), extreme=pick(rng, list(EXTREMES)))
    other = pick(rng, [i for i in range(len(scene.objects)) if i != target])
    landmark = _attributes(scene.objects[other], rng, 0.15, 0.4, 1)
    return replace(_attributes(thing, rng, 0.1, 0.3, 0.35), relation=pick(rng, list(RELATIONS)), landmark=landmark)


def refer(scene: Scene, targets: list[int], rng: np.random.Generator, silent: str = "") -> tuple[Phrase, int] | None:
    """Return a phrase that means exactly one of `targets`, and that target, or None if a few draws find none.

    Most phrases need the target's kind or a landmark's. The target's description omits the attribute `silent`.
    """
    u = rng.random()
    form = next((name for name, edge in FORMS.items() if u < edge), "extreme")
    for _ in range(16 if targets else 0):  # keep the drawn form, so that difficult forms do not become rare
        target = pick(rng, targets)
        phrase = _draft(form, scene, target, rng)
        phrase = replace(phrase, **{silent: None}) if silent else phrase
        bare = replace(phrase, relation=None, landmark=None, extreme=None)
        if bare != phrase and len(denote(bare, scene)) == 1:
            continue  # the relation would add nothing
        if means(phrase, scene, target) and (_needs_kind(phrase, scene, target) or rng.random() < KIND_FREE_SHARE):
            return phrase, target
    return None


def expressions(scene: Scene, rng: np.random.Generator, n: int) -> list[tuple[str, int]]:
    """Return `n` different pairs (expression, index of the one object that it means)."""
    found: dict[str, int] = {}
    everything = list(range(len(scene.objects)))
    for _ in range(10 * n):
        if len(found) >= n:
            break
        referred = refer(scene, everything, rng)
        if referred:
            found[f"the {referred[0]}"] = referred[1]
    for i, thing in enumerate(scene.objects):  # three attributes always suffice: no two objects look alike
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
    """Ask for the kind, so the target's description does not name it."""
    target = int(rng.integers(len(scene.objects)))
    phrase = _attributes(scene.objects[target], rng, 0.5, 0.6, 0)
    if rng.random() < 0.4:
        landmark = _attributes(pick(rng, scene.objects), rng, 0.2, 0.4, 0.9)
        phrase = replace(phrase, size=None, relation=pick(rng, list(RELATIONS)), landmark=landmark)
    if not means(phrase, scene, target):
        return None
    return f"what is the {phrase}", scene.objects[target].kind


def _ask_count(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    """Draw the answer first, among the answers for which the scene has a question."""
    by_answer: dict[int, list[str]] = {}
    for size in (None, *SIZES):
        for colour in (None, *COLOURS):
            count = sum(Phrase(size, colour).fits(thing) for thing in scene.objects)
            by_answer.setdefault(count, []).append(" ".join(word for word in (size, colour, "objects") if word))
    answer = pick(rng, sorted(by_answer))
    return f"how many {pick(rng, by_answer[answer])} are there", str(answer)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' and not words.startswith('one') else 'a'} {words}"


def _ask_exist(scene: Scene, rng: np.random.Generator, yes: bool) -> QA | None:
    """Ask whether an object exists, in the same forms for yes and no.

    A no recombines attributes of the scene, or takes attributes that the scene lacks.
    """
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
    """Return two objects and, for each, attributes that mean it alone, without `silent`; None if they do not."""
    indices = rng.permutation(len(scene.objects))[:2].tolist()
    first, second = (scene.objects[i] for i in indices)
    first_words, second_words = (
        _attributes(thing, rng, 0 if silent == "size" else 0.2, 0 if silent == "colour" else 0.4, 1)
        for thing in (first, second)
    )
    alone = means(first_words, scene, indices[0]) and means(second_words, scene, indices[1])
    return (first, second, str(first_words), str(second_words)) if alone else None


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
    first, second = pair[:2] if yes else pair[1::-1]
    if not holds(relation, first, second, close_call(scene)):
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
# Each form says which of size, colour and kind the question names.
EXIST_FORMS = ((0, 0, 1), (0, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (1, 1, 0))


@dataclass(frozen=True)
class Ask:
    """One form of question: its answer type, its share of all questions, and the function that asks it.

    The last argument of `ask`, a fair coin, chooses the answer if there are two; `ask` returns None if its draw fails.
    """

    answer_type: str
    share: float
    ask: Callable[[Scene, np.random.Generator, bool], QA | None]


# The shares make yes and no equally frequent, each under a fifth of the answers.
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
    """Return `n` different triples (question, answer, answer type); random draws balance the answers over scenes.

    `n` must be small, because a scene of two objects has only a few dozen questions.
    """
    found: dict[str, tuple[str, str, str]] = {}
    while len(found) < n:
        form = ASKS[min(int(np.searchsorted(EDGES, rng.random(), side="right")), len(ASKS) - 1)]
        yes = rng.random() < 0.5
        for _ in range(30):  # keep the drawn form and answer, so that difficult ones do not become rare
            question = form.ask(scene, rng, yes)
            if question and question[0] not in found:
                found[question[0]] = (*question, form.answer_type)
                break
    return list(found.values())


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return five captions in random order, of at most 24 words, each with every object's colour and kind.

    Four go from left to right, one of them with sizes, and one goes from top to bottom.
    """
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
