r"""Exact equality of sums of terms such as 3x^{2}y, \frac{5\sqrt{3}}{3}, 2\pi r, 4-7i, without a symbolic library.

A term is a rational number times integer powers of letters and \pi, times square roots of different primes and of -1,
which is i. Such terms are linearly independent over the rationals, so two sums are equal exactly if they have the same
terms. Text that is anything else, or that mathematicians read in two ways (1/2x), is left undecided.
"""

import math
import re
from fractions import Fraction

from src.grading.normalize import MAX_DIGITS

MAX_POWER = 20
MAX_TERMS = 50
MAX_DEPTH = 30  # of brackets
MAX_BITS = 10_000  # of a coefficient
MAX_RADICAND = 10**6  # its factors are found by trial

TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|(\\[a-z]+)|([A-Za-z]+)|([-+/^{}()]))")
FUNCTIONS = ("f", "g", "h")  # f(x+1) is no product
CONSTANTS = ("E", "I")  # in some spellings e and i, in others letters like any
ENDS = ("", "+", "-", ")", "}")  # of a product
CLOSING = {"(": ")", "{": "}"}

Symbol = str | int  # a letter, or a number whose square root is meant: a prime, or -1 for i
Term = frozenset[tuple[Symbol, int]]  # symbols with their powers other than 0; a root's power is 1
Sum = dict[Term, Fraction]  # coefficients, none 0

ONE: Term = frozenset()


class Unreadable(Exception):
    """Text that is no sum of such terms, or too large a one."""


def same_polynomial(first: str, second: str) -> bool | None:
    """Whether two normalised texts are equal sums of terms; None if one of them is not read as such a sum."""
    try:
        return read(first) == read(second)
    except Unreadable:
        return None


def multiple_of(first: str, second: str) -> Fraction | None:
    """The number by which the first of two sums of terms is the second, 0 if there is none; None as above."""
    try:
        ours, theirs = read(first), read(second)
    except Unreadable:
        return None
    factors = {ours[term] / theirs[term] if term in ours else Fraction(0) for term in theirs}
    return factors.pop() if len(factors) == 1 and ours.keys() == theirs.keys() else Fraction(0)


def constant_value(text: str) -> float | None:
    r"""The value of a text that is a number or arithmetic with numbers, roots and \pi; None for anything else."""
    try:
        terms = read(text)
        total = 0.0
        for term, coefficient in terms.items():
            if any(symbol == -1 or isinstance(symbol, str) and symbol != "\\pi" for symbol, _ in term):
                return None
            value = float(coefficient)
            for symbol, power in term:
                value *= math.pi**power if symbol == "\\pi" else math.sqrt(symbol)
            total += value
        return total
    except (Unreadable, OverflowError):
        return None


def read(text: str) -> Sum:
    """The sum of terms that a normalised text says. Raises Unreadable."""
    reader = _Reader(text)
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
        if letters and (len(letters) > 2 or letters == "ln" or not set(letters).isdisjoint(CONSTANTS)):
            raise Unreadable
        tokens += letters or [number or macro or sign]
    return tokens


class _Reader:
    """Recursive descent over the tokens; each method reads one part and leaves the position at what follows."""

    def __init__(self, text: str) -> None:
        self.tokens, self.position, self.depth = [*tokens_of(text), ""], 0, 0

    @property
    def next(self) -> str:
        """The token to read, "" at the end."""
        return self.tokens[self.position]

    def take(self, wanted: str = "") -> str:
        """Read one token, the wanted one if it is named."""
        token = self.next
        if not token or wanted and token != wanted:
            raise Unreadable
        self.position += 1
        return token

    def sum(self) -> Sum:
        """Products with signs between them, and perhaps in front."""
        total: Sum = {}
        sign = self.take() if self.next in ("+", "-") else "+"
        while True:
            product = self.product()
            total = collected([*total.items(), *((term, -c if sign == "-" else c) for term, c in product.items())])
            if self.next not in ("+", "-"):
                return total
            sign = self.take()

    def product(self) -> Sum:
        r"""Factors side by side or with \cdot between them; a slash may stand before the last one."""
        value = self.power()
        while self.next not in ENDS:
            before, following = self.tokens[self.position - 1], self.next
            if following in ("/", "\\cdot"):
                self.take()
            elif following[0] in ".0123456789" or before[0].isdigit() and following == "\\frac":
                raise Unreadable  # 2x3 and mixed numbers
            elif before in FUNCTIONS and following == "(":
                raise Unreadable
            factor = self.power()
            value = multiply(value, reciprocal(factor) if following == "/" else factor)
            if following == "/" and self.next not in ENDS:
                raise Unreadable  # 1/2x
        return value

    def power(self) -> Sum:
        """A factor, perhaps to an integer power."""
        value = self.factor()
        if self.next != "^":
            return value
        self.take()
        self.take("{")
        if self.next == "-":
            self.take()
            value = reciprocal(value)
        exponent = self.take()
        self.take("}")
        if not exponent.isdecimal() or len(exponent) > 2 or int(exponent) > MAX_POWER or self.next == "^":
            raise Unreadable
        if not value and not int(exponent):
            raise Unreadable
        result: Sum = {ONE: Fraction(1)}
        for _ in range(int(exponent)):
            result = multiply(result, value)
        return result

    def factor(self) -> Sum:
        """A number, a letter, a fraction, a binomial coefficient, a root, or a sum in brackets."""
        token = self.take()
        if token in CLOSING:
            self.position -= 1
            return self.group()
        if token[0] in ".0123456789" and len(token) <= MAX_DIGITS:
            number = Fraction(token)
            return {ONE: number} if number else {}
        if token.isalpha() or token == "\\pi":
            return {frozenset([(-1 if token == "i" else token, 1)]): Fraction(1)}
        if token == "\\frac" and self.next == "{":
            over = self.group()
            if self.next == "{":
                return multiply(over, reciprocal(self.group()))
        if token == "\\binom" and self.next == "{":
            over = self.group()
            if self.next == "{":
                return binomial(over, self.group())
        if token == "\\sqrt" and self.next == "{":
            return root(self.group())
        raise Unreadable

    def group(self) -> Sum:
        """A sum in brackets."""
        opening = self.take()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        value = self.sum()
        self.depth -= 1
        self.take(CLOSING[opening])
        return value


def collected(terms: list[tuple[Term, Fraction]]) -> Sum:
    """Terms as a sum, without those that vanish. Raises Unreadable if it has grown too large."""
    total: Sum = {}
    for term, coefficient in terms:
        total[term] = total[term] + coefficient if term in total else coefficient
    total = {term: coefficient for term, coefficient in total.items() if coefficient}
    if len(total) > MAX_TERMS:
        raise Unreadable
    for coefficient in total.values():
        if max(coefficient.numerator.bit_length(), coefficient.denominator.bit_length()) > MAX_BITS:
            raise Unreadable
    return total


def multiply(first: Sum, second: Sum) -> Sum:
    """The product of two sums."""
    terms = []
    for left, one in first.items():
        for right, other in second.items():
            powers, coefficient = dict(left), one * other
            for symbol, power in right:
                powers[symbol] = powers.get(symbol, 0) + power
                if isinstance(symbol, int) and powers[symbol] == 2:  # a root times itself
                    powers[symbol], coefficient = 0, coefficient * symbol
            terms.append((frozenset(item for item in powers.items() if item[1]), coefficient))
    return collected(terms)


def reciprocal(value: Sum) -> Sum:
    """1 / value for a single term. Raises Unreadable for zero and for several terms."""
    if len(value) != 1:
        raise Unreadable
    [(term, coefficient)] = value.items()
    for symbol, _ in term:
        if isinstance(symbol, int):
            coefficient *= symbol  # 1 / root = root / number
    return {frozenset((symbol, 1 if isinstance(symbol, int) else -power) for symbol, power in term): 1 / coefficient}


def binomial(over: Sum, under: Sum) -> Sum:
    """over (over - 1) ... / under! for a whole number under. Raises Unreadable for anything else."""
    chosen = under.get(ONE, Fraction(0))
    if under.keys() - {ONE} or chosen.denominator != 1 or not 0 <= chosen <= MAX_POWER:
        raise Unreadable
    value: Sum = {ONE: Fraction(1)}
    for place in range(int(chosen)):
        factor = collected([*over.items(), (ONE, Fraction(-place))])
        value = multiply(value, {term: c / (place + 1) for term, c in factor.items()})
    return value


def root(value: Sum) -> Sum:
    """The square root of a rational number of 0 or more. Raises Unreadable for anything else."""
    square = value.get(ONE, Fraction(0))
    rest = square.numerator * square.denominator  # the root of a/b is that of ab, over b
    if value.keys() - {ONE} or not 0 <= rest <= MAX_RADICAND:
        raise Unreadable
    if not rest:
        return {}
    outside, primes, prime = 1, set(), 2
    while rest > 1:
        if prime * prime > rest:
            prime = rest
        while rest % prime == 0:
            rest //= prime
            outside *= prime if prime in primes else 1
            primes ^= {prime}
        prime += 1
    return {frozenset((prime, 1) for prime in primes): Fraction(outside, square.denominator)}
