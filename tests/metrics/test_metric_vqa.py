"""VQA soft accuracy on cases that can be worked out by hand."""

from __future__ import annotations

import pytest

from petlbench.metrics.vqa import CONTRACTIONS, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("", ""),
        ("The", ""),
        ("?!", ""),
        ("An Apple.", "apple"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("10:30", "10:30"),
        ("left-handed", "left handed"),
        ("left- handed", "left handed"),
        ("red/white", "red white"),
        ("5,6 red/white", "56 redwhite"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("a\nb\tthe c", "b c"),
        ("Café", "café"),
        ("ÉCOLE, à côté", "école à côté"),
        ("日本、 東京", "日本、 東京"),
        ("the  A an THE", ""),
        ("a.b", "ab"),
        ("the. dog", "dog"),
        ("None", "0"),
        ("none of them", "0 of them"),
        ("nothing", "nothing"),
        ("Ten o'clock", "10 o'clock"),
        ("eleven", "eleven"),
        ("10.", "10"),
        ("$1,000.50", "$1000.50"),
        (".5", ".5"),
        ("3. 5", "3 5"),
        ("1,2,3", "123"),
        ("٣,٤", "٣٤"),
        ("1, 2", "1 2"),
        ("yes,no", "yes no"),
        ("yes , no", "yes no"),
        ("yes,no maybe , so", "yesno maybe so"),
        ("a-b -c", "ab c"),
        ("x-y\t-z", "xy z"),
        ("x-y\n-z", "xy z"),
        ("-5", "5"),
        ("Don't", "don't"),
        ("DONT", "don't"),
        ("dont.", "don't"),
        ("dont!", "don't"),
        ("Im", "im"),
        ("Id've", "id've"),
        ("lets", "lets"),
        ("don`t", "don t"),
        ("don’t", "don’t"),
        ("\tred\n", "red"),
        ("red\rblue\x0cgreen\u00a0grey", "red blue green grey"),
        ("." * 40, "." * 8),
    ],
)
def test_answers_are_normalised_as_officially(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_contractions_have_every_official_kind() -> None:
    examples = {
        "yall": "y'all",
        "y'allll": "y'all'll",
        "it'dve": "it'd've",
        "twas": "'twas",
        "oclock": "o'clock",
        "itd've": "it'd've",
    }
    assert {word: CONTRACTIONS[word] for word in examples} == examples


# The official table, entry by entry, but for those whose key has a capital, which no word in lower case equals.
TABLE = """
    aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've
    didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't
    havent haven't hed he'd hed've he'd've he'dve he'd've hes he's howd how'd howll how'll hows how's isnt isn't
    itd it'd itd've it'd've it'dve it'd've itll it'll let's let's maam ma'am mightnt mightn't mightnt've mightn't've
    mightn'tve mightn't've mightve might've mustnt mustn't mustve must've neednt needn't notve not've oclock o'clock
    oughtnt oughtn't ow's'at 'ow's'at 'ows'at 'ow's'at 'ow'sat 'ow's'at shant shan't shed've she'd've
    she'dve she'd've she's she's shouldve should've shouldnt shouldn't shouldnt've shouldn't've
    shouldn'tve shouldn't've somebody'd somebodyd somebodyd've somebody'd've somebody'dve somebody'd've
    somebodyll somebody'll somebodys somebody's someoned someone'd someoned've someone'd've someone'dve someone'd've
    someonell someone'll someones someone's somethingd something'd somethingd've something'd've
    something'dve something'd've somethingll something'll thats that's thered there'd thered've there'd've
    there'dve there'd've therere there're theres there's theyd they'd theyd've they'd've they'dve they'd've
    theyll they'll theyre they're theyve they've twas 'twas wasnt wasn't wed've we'd've we'dve we'd've weve we've
    werent weren't whatll what'll whatre what're whats what's whatve what've whens when's whered where'd
    wheres where's whereve where've whod who'd whod've who'd've who'dve who'd've wholl who'll whos who's whove who've
    whyll why'll whyre why're whys why's wont won't wouldve would've wouldnt wouldn't wouldnt've wouldn't've
    wouldn'tve wouldn't've yall y'all yall'll y'all'll y'allll y'all'll yall'd've y'all'd've y'alld've y'all'd've
    y'all'dve y'all'd've youd you'd youd've you'd've you'dve you'd've youll you'll youre you're youve you've
"""


def test_the_table_of_contractions_is_the_official_one() -> None:
    words = TABLE.split()
    official = dict(zip(words[::2], words[1::2], strict=True))
    assert {word: CONTRACTIONS.get(word, word) for word in official} == official
    assert set(CONTRACTIONS) <= set(official)


def test_normalising_needs_people_who_disagree() -> None:
    """Six say 2, four two: `Two.` is 2 to all. Where all ten say two, only `two` is right."""
    assert vqa_accuracy("Two.", ["2"] * 6 + ["two"] * 4) == 1
    assert vqa_accuracy("Two.", ["two"] * 10) == vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("tennis\tracket", ["tennis\nracket"] * 10) == 1
    assert vqa_accuracy("\ttwo\n", ["two"] * 9 + [" two"]) == 1
    assert vqa_accuracy("The", ["a"] * 5 + [""] * 5) == 1


@pytest.mark.parametrize("prediction", ["don't know", "dont know", "Dont Know!", "don't\tknow"])
def test_apostrophes_that_are_left_out_count_as_if_they_stood_there(prediction: str) -> None:
    assert vqa_accuracy(prediction, ["dont know"] * 2 + ["don't know"] + ["no"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize("prediction", ["1,000", "1000", "1000."])
def test_commas_in_numbers_do_not_count(prediction: str) -> None:
    assert vqa_accuracy(prediction, ["1,000"] * 3 + ["1000"] + ["many"] * 6) == 1
    assert vqa_accuracy("1 000", ["1,000"] * 3 + ["1000"] + ["many"] * 6) == 0


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_ten_answers_leave_one_out(matches: int, accuracy: float) -> None:
    answers = ["yes"] * matches + [f"other {n}" for n in range(10 - matches)]
    assert vqa_accuracy("Yes.", answers) == pytest.approx(accuracy)


def test_unanimous_answers_are_compared_as_written() -> None:
    assert vqa_accuracy("dog", ["dog"] * 10) == 1
    assert vqa_accuracy("Dog", ["dog"] * 10) == 0
    assert vqa_accuracy(" dog\n", ["dog"] * 10) == 1


def test_empty_prediction_matches_only_empty_answers() -> None:
    assert vqa_accuracy("", ["yes"] * 5 + ["no"] * 5) == 0
    assert vqa_accuracy("", [""] * 5 + ["no"] * 5) == 1


def test_one_answer_is_an_exact_match_after_normalisation() -> None:
    assert vqa_accuracy("The Dog.", ["dog"]) == 1
    assert vqa_accuracy("dogs", ["dog"]) == 0
    assert vqa_accuracy("", [""]) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_agreeing_with_everybody_is_full_accuracy_however_few_they_are(count: int) -> None:
    assert vqa_accuracy("dog", ["dog"] * count) == 1
    assert vqa_accuracy("cat", ["dog"] * count) == 0


def test_half_of_two_answers_is_half_an_accuracy() -> None:
    assert vqa_accuracy("dog", ["dog", "cat"]) == pytest.approx(0.5)


def test_question_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one answer"):
        vqa_accuracy("dog", [])
