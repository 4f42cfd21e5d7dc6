r"""Exact equality of sums of terms such as 3x^{2}y, \frac{5\sqrt{3}}{3}, 2\pi r, 4-7i, without a symbolic library.

A term is a rational number times the square root of a squarefree integer times integer powers of letters, \pi and i.
Such terms are linearly independent over the rationals, so two sums are equal exactly if they have the same terms.
Text that is anything else, or that mathematicians read in two ways (1/2x), is left undecided.
"""

import math
import re
from fractions import Fraction
from typing import NamedTuple

from src.grading.normalize import MAX_DIGITS

MAX_POWER = 20
MAX_TERMS = 50
MAX_DEPTH = 30  # of brackets
MAX_BITS = 10_000  # of a coefficient
MAX_RADICAND = 10**6  # its square factors are found by trial

TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|(\\[a-z]+)|([A-Za-z]+)|([-+/^{}()]))")
FUNCTIONS = ("f", "g", "h")  # f(x+1) is no product
CONSTANTS = ("E", "I")  # in some spellings e and i, in others letters like any
IMAGINARY = "i"


class Term(NamedTuple):
    """What a coefficient stands before."""

    radicand: int  # squarefree
    powers: tuple[tuple[str, int], ...]  # (symbol, exponent other than 0), sorted; i at most once


Sum = dict[Term, Fraction]  # coefficients, none 0

ONE = Term(1, ())


class Unreadable(Exception):
    """Text that is no sum of such terms, or too large a one."""


def same_polynomial(first: str, second: str) -> bool | None:
    """Whether two normalised texts are equal sums of terms; None if one of them is not read as such a sum."""
    try:
        return read(first) == read(second)
    except Unreadable:
        return None


def constant_value(text: str) -> float | None:
    r"""The value of a text that is a number or arithmetic with numbers, roots and \pi; None for anything else."""
    try:
        terms = read(text)
    except (Unreadable, OverflowError):
        return None
    total = 0.0
    for term, coefficient in terms.items():
        if (
            any(symbol != "\\pi" for symbol, _ in term.powers)
            or max(coefficient.numerator, coefficient.denominator) > 10**300
        ):
            return None
        total += float(coefficient) * math.sqrt(term.radicand) * math.pi ** dict(term.powers).get("\\pi", 0)
    return total


def read(text: str) -> Sum:
    """The sum of terms that a normalised text says. Raises Unreadable."""
    reader = _Reader(tokens_of(text))
    value = reader.sum()
    if reader.next:
        raise Unreadable
    return value


def tokens_of(text: str) -> list[str]:
    """Numbers, macros, single letters and signs. Raises Unreadable for anything else, words included."""
    tokens: list[str] = []
    text, end = text.rstrip(), 0
    while end < len(text):
        match = TOKEN.match(text, end)
        if match is None:
            raise Unreadable
        end = match.end()
        number, macro, letters, sign = match.groups()
        if letters and (
            len(letters) > 2 or letters == "ln" or any(letter in CONSTANTS for letter in letters)
        ):
            raise Unreadable
        tokens += letters or [number or macro or sign]
    return tokens


class _Reader:
    """Recursive descent over the tokens; each method reads one part and leaves the position behind it."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.position, self.depth = tokens, 0, 0

    @property
    def next(self) -> str:
        """The token to read, "" at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """Read one token, one of those wanted if any are named."""
        token = self.next
        if not token or wanted and token not in wanted:
            raise Unreadable
        self.position += 1
        return token

    def sum(self) -> Sum:
        """Products with signs between them, and perhaps in front."""
        total: Sum = {}
        sign = self.take() if self.next in ("+", "-") else "+"
        while True:
            total = add(total, self.product(), -1 if sign == "-" else 1)
            if self.next not in ("+", "-"):
                return total
            sign = self.take()

    def product(self) -> Sum:
        r"""Factors side by side or with \cdot between them; a slash may stand before the last one."""
        value = self.power()
        while self.next not in ("", "+", "-", ")", "}"):
            before = self.tokens[self.position - 1]
            if self.next == "/":
                self.take()
                value = multiply(value, reciprocal(self.power()))
                if self.next not in ("", "+", "-", ")", "}"):
                    raise Unreadable
                return value
            if self.next == "\\cdot":
                self.take()
            elif (
                self.next[0].isdigit() or self.next[0] == "." or before[0].isdigit() and self.next == "\\frac"
            ):
                raise Unreadable  # 2x3 and mixed numbers
            elif before in FUNCTIONS and self.next == "(":
                raise Unreadable
            value = multiply(value, self.power())
        return value

    def power(self) -> Sum:
        """A factor, perhaps to an integer power."""
        value = self.factor()
        if self.next != "^":
            return value
        self.take()
        self.take("{")
        sign = self.take() if self.next == "-" else ""
        exponent = self.take()
        self.take("}")
        if not exponent.isdecimal() or len(exponent) > 2 or int(exponent) > MAX_POWER or self.next == "^":
            raise Unreadable
        return raised(reciprocal(value) if sign else value, int(exponent))

    def factor(self) -> Sum:
        """A number, a letter, a fraction, a root, or a sum in brackets."""
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            if len(token) > MAX_DIGITS:
                raise Unreadable
            return constant(Fraction(token))
        if token.isalpha() or token == "\\pi":
            return {Term(1, ((token, 1),)): Fraction(1)}
        if token == "\\frac":
            return multiply(self.group("{", "}"), reciprocal(self.group("{", "}")))
        if token == "\\sqrt":
            return root(self.group("{", "}"))
        if token in ("(", "{"):
            self.position -= 1
            return self.group(token, ")" if token == "(" else "}")
        raise Unreadable

    def group(self, opening: str, closing: str) -> Sum:
        """A sum in brackets."""
        self.take(opening)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        value = self.sum()
        self.depth -= 1
        self.take(closing)
        return value


def constant(value: Fraction) -> Sum:
    """A rational number as a sum."""
    return {ONE: value} if value else {}


def add(total: Sum, other: Sum, sign: int) -> Sum:
    """total + sign * other."""
    result = dict(total)
    for term, coefficient in other.items():
        result[term] = result.get(term, Fraction(0)) + sign * coefficient
    return checked(result)


def multiply(first: Sum, second: Sum) -> Sum:
    """The product of two sums."""
    result: Sum = {}
    for left, one in first.items():
        for right, other in second.items():
            term, factor = times(left, right)
            result[term] = result.get(term, Fraction(0)) + one * other * factor
    return checked(result)


def times(left: Term, right: Term) -> tuple[Term, int]:
    """The product of two terms, and the integer that comes out of its root and of i^2 = -1."""
    common = math.gcd(left.radicand, right.radicand)
    powers = dict(left.powers)
    for symbol, exponent in right.powers:
        powers[symbol] = powers.get(symbol, 0) + exponent
    sign = 1
    if powers.get(IMAGINARY) == 2:
        powers[IMAGINARY], sign = 0, -1
    kept = tuple(sorted((symbol, exponent) for symbol, exponent in powers.items() if exponent))
    return Term(left.radicand * right.radicand // common**2, kept), common * sign


def checked(value: Sum) -> Sum:
    """The sum without terms that vanished. Raises Unreadable if it has grown too large."""
    value = {term: coefficient for term, coefficient in value.items() if coefficient}
    parts = (part for fraction in value.values() for part in (fraction.numerator, fraction.denominator))
    if len(value) > MAX_TERMS or any(part.bit_length() > MAX_BITS for part in parts):
        raise Unreadable
    return value


def raised(value: Sum, exponent: int) -> Sum:
    """A sum to a power of 0 or more. Raises Unreadable for 0 to the 0."""
    if not value and not exponent:
        raise Unreadable
    result = constant(Fraction(1))
    for _ in range(exponent):
        result = multiply(result, value)
    return result


def reciprocal(value: Sum) -> Sum:
    """1 / value for a single term. Raises Unreadable for zero and for several terms."""
    if len(value) != 1:
        raise Unreadable
    [(term, coefficient)] = value.items()
    sign = -1 if (IMAGINARY, 1) in term.powers else 1  # 1 / i = -i
    powers = tuple((symbol, 1 if symbol == IMAGINARY else -exponent) for symbol, exponent in term.powers)
    return {Term(term.radicand, powers): sign / (coefficient * term.radicand)}


def root(value: Sum) -> Sum:
    """The square root of a rational number of 0 or more. Raises Unreadable for anything else."""
    square = value.get(ONE, Fraction(0))
    if value.keys() - {ONE} or square < 0 or square.numerator * square.denominator > MAX_RADICAND:
        raise Unreadable
    if not square:
        return {}
    outside, inside = 1, square.numerator * square.denominator
    for prime in range(2, math.isqrt(inside) + 1):
        while inside % prime**2 == 0:
            outside, inside = outside * prime, inside // prime**2
    return {Term(inside, ()): Fraction(outside, square.denominator)}
