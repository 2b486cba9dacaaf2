"""VQA's answers in the form in which they are compared: without articles and stray punctuation, numbers as digits.

After the rules that the VQA evaluation describes (visualqa.org/evaluation); the list of contractions is shorter here.
"""

import re

NUMBERS = {
    name: str(value)
    for value, name in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}  # fmt: skip
ARTICLES = frozenset(("a", "an", "the"))
_APOSTROPHES = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm i've isn't it'd "
    "it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody's "
    "someone's something's that'd that's there'd there're there's they'd they'll they're they've wasn't we've weren't what'll what're "
    "what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
)
CONTRACTIONS = {word.replace("'", ""): word for word in _APOSTROPHES.split()}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def normalise_answer(answer: str) -> str:
    """The form in which two answers are the same answer.

    >>> normalise_answer("The two dogs!"), normalise_answer("dont know"), normalise_answer("1,000"), normalise_answer("black/white")
    ('2 dogs', "don't know", '1000', 'black white')
    """
    text = " ".join(answer.split())
    spaced, grouped = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            loose = f"{mark} " in text or f" {mark}" in text or grouped
            spaced = spaced.replace(mark, "" if loose else " ")
    words = (NUMBERS.get(word, word) for word in _FULL_STOP.sub("", spaced).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
