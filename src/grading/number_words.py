"""Numbers in words, and the words beside a number that make it another one, or none.

"negative 42", "2 million" and "twelve" say one number. "twice 42", "at most 42", "42 squared" and "42 is false" say
something else than 42, and whoever says them has not answered 42.
"""

import re
from fractions import Fraction

SMALL = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
} | {
    word: 10 * tens
    for tens, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
PARTS = {"half": Fraction(1, 2), "quarter": Fraction(1, 4), "third": Fraction(1, 3)}
SCALE = "|".join(SCALES)
WORD = f"(?:{'|'.join(SMALL)}|{SCALE})"
PART = r"\s+and\s+(?:a|one)\s+(half|quarter|third)"
SPELLED = re.compile(
    rf"(?<![A-Za-z\\-])(?:(?P<half>half )?(?:an? )?(?=(?:{SCALE})\b))?(?P<words>{WORD}(?:[\s-]+(?:and\s+)?{WORD})*)"
    rf"(?:{PART})?(?![A-Za-z]|-[A-Za-z])",
    re.IGNORECASE,
)
SCALED = re.compile(
    rf"(?<![\w.,])(\d+(?:,\d{{3}})*(?:\.\d+)?)[\s~-]*({SCALE})(?:s? of)?(?![A-Za-z])", re.IGNORECASE
)
AND_A_PART = re.compile(rf"(?<![\w.,/])(\d{{1,9}}){PART}(?![A-Za-z])", re.IGNORECASE)
SHARES = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4} | {
    f"{word}th": value for value, word in enumerate("fif six seven eigh nin ten".split(), start=5)
}
SHARE = re.compile(  # two thirds, one half, a quarter
    rf"\s*(?:(an?|{'|'.join(SMALL)})[\s-])?({'|'.join(SHARES)})s?[\s.]*", re.IGNORECASE
)
IN_BOTH = re.compile(r"(?<![\w.,-])(-?\d+(?:/\d+)?) ?\(\1\)")  # 42 (forty-two)
NEGATIVE = re.compile(r"(?<![A-Za-z])(?:negative|minus)\s+(?=\\?\$?\s*[\d.])", re.IGNORECASE)
HINT = re.compile(
    rf"(?<![A-Za-z])(?:{WORD}|(?:half|halve|quarter|third|(?:four|fif|six|seven|eigh|nin|ten)th)s?|negative|minus)(?![A-Za-z])",
    re.IGNORECASE,
)

ANYWHERE = (  # words that leave no answer, wherever they stand
    "not never none nothing neither nor isn't aren't wasn't weren't doesn't don't didn't can't cannot won't "
    "couldn't instead rather unlike false wrong incorrect untrue mistaken invalid lie fake bogus maybe "
    "perhaps possibly probably guess unsure unknown uncertain might either or alternatively versus vs too "
    "twice thrice half halved double doubled triple tripled quadruple quadrupled squared cubed factorial "
    "negated negative minus plus multiplied divided dozens hundreds thousands millions billions trillions "
    "halves thirds fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths ish fold "
    "nearly almost nope modulo mod binary octal hex hexadecimal reversed backwards"
).split()
BEFORE = (  # in front of the number
    "than no without except excluding besides far but under over above below beyond up within past times close near "
    "less fewer exceeds exceeding between maximum minimum max"
).split()
AFTER = "maximum minimum max below above beyond if unless but except no".split()
CHANGED = re.compile(
    rf"(?<![A-Za-z'])(?:{'|'.join(ANYWHERE)}|at (?:the )?(?:most|least|best|worst))(?![A-Za-z'])",
    re.IGNORECASE,
)
CHANGED_BEFORE = re.compile(
    rf"(?<![A-Za-z'])(?:(?:{'|'.join([*BEFORE, *ANYWHERE])}|at (?:most|least))(?: (?:to|be|a|an|the|only|of|from))?|"
    r"(?:one|fraction|multiple|factor|part|percent|square|cube|root|power|logarithm|log|reciprocal|inverse|opposite|digits?|third|"
    r"quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth)s? of)\W{0,3}$",
    re.IGNORECASE,
)
CHANGED_AFTER = re.compile(
    rf"\W{{0,3}}(?:[a-z]+ )?(?:is |was )?(?:{'|'.join([*AFTER, *ANYWHERE])}|at (?:most|least))(?![A-Za-z'])",
    re.IGNORECASE,
)


def digits_for_words(text: str) -> str:
    """The text with its numbers in digits: "two hundred and five" as 205, "2 million" as 2000000, "minus 3" as -3."""
    if HINT.search(text) is None:
        return text
    if share := SHARE.fullmatch(text):
        over, under = share.groups(default="a")
        return str(Fraction(SMALL.get(over.lower(), 1), SHARES[under.lower()]))
    text = scaled(text)
    alone = not re.search(r"\d", text)
    return IN_BOTH.sub(r"\1", NEGATIVE.sub("-", SPELLED.sub(lambda match: spelled(match, alone), text)))


def scaled(text: str) -> str:
    """The text with the words beside digits taken in: "-3" for "minus 3", 2000000 for "2 million"."""
    if HINT.search(text) is None:
        return text
    text = SCALED.sub(lambda match: str(Fraction(match[1].replace(",", "")) * SCALES[match[2].lower()]), text)
    text = AND_A_PART.sub(lambda match: str(int(match[1]) + PARTS[match[2].lower()]), text)
    return NEGATIVE.sub("-", text)


def spelled(match: re.Match[str], alone: bool) -> str:
    """Digits for a number in words; as it is where it is none, or a "one" that may be a pronoun."""
    words = [word for word in re.findall(r"[a-z]+", match["words"].lower()) if word != "and"]
    if words == ["one"] and not alone:
        return match.group()
    value = value_of(words)
    if value is None:
        return match.group()
    if match["half"]:
        value /= 2
    return str(value + (PARTS[match[3].lower()] if match[3] else 0))


def value_of(words: list[str]) -> Fraction | None:
    """The number that the words say; None if they are no one number, as in "one two"."""
    total, group, last = 0, 0, 10**15
    for before, word in zip(["", *words], words, strict=False):
        if word in SMALL:
            tens = before in SMALL and SMALL[before] >= 20 and 0 < SMALL[word] < 10
            if before in SMALL and not tens:
                return None
            group += SMALL[word]
        elif SCALES[word] <= 100:
            group = (group or 1) * SCALES[word]
        elif SCALES[word] >= last:
            return None
        else:
            total, group, last = total + (group or 1) * SCALES[word], 0, SCALES[word]
    return Fraction(total + group)


def altered(before: str, after: str) -> bool:
    """Whether the words right beside a number make it another one, or none."""
    return bool(CHANGED_BEFORE.search(before[-40:]) or CHANGED_AFTER.match(after))


def changed(before: str, after: str) -> bool:
    """altered(), or a word further off that does so."""
    return bool(CHANGED.search(f"{before} {after}")) or altered(before, after)
