"""The process that compares two expressions with math-verify; started by grader.py, never imported.

A request {"answer", "label", "seconds"} has the reply {"outcome"}: right, wrong, timeout or error; to {"extraction",
"response", "seconds"}, for the answer of a long response, the outcome is the Extraction. Expressions that need too long
are stopped by an alarm, of processor time or of the clock; where that cannot reach (one huge integer power is a single
C call), a signal of the kernel or the parent ends the process.
"""

import logging
import resource
import signal
from functools import lru_cache
from types import FrameType

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from src.grading.extract import extract
from src.processes.worker import Answer, Reply, serve

# processor time an answer may take, as a share of its wall-clock limit: an answer that is merely slow gets its verdict
# on a busy machine too, and which answers time out hardly depends on the load
CPU_SHARE = 0.5
POINT = [(7, 3), (-5, 2), (1, 5), (13, 4), (-3, 7), (17, 2), (2, 9)]  # numerators and denominators of test values
PRECISION = sympy.Float("1e-20")  # of values with 30 digits
MEMORY_LIMIT = 2 * 1024**3  # bytes of address space
# units stay: ours are gone already, and the library takes the variable of 6+9c for one
NORMALIZATION = NormalizationConfig(malformed_operators=True, boxed="none")
LATEX = [LatexExtractionConfig(normalization_config=NORMALIZATION)]


class OutOfTime(BaseException):
    """Raised by the alarm; not an Exception, because math-verify swallows those."""


def on_alarm(signum: int, frame: FrameType | None) -> None:
    """Leave the comparison."""
    raise OutOfTime


@lru_cache(maxsize=1024)  # samples of one problem share its label; the grammar is most of the time
def parse_one(text: str) -> sympy.Basic | sympy.MatrixBase | None:
    """One LaTeX expression, None if it does not parse. The LaTeX grammar builds trees; nothing is evaluated as code."""
    found = parse(f"${text}$", LATEX, fallback_mode="no_fallback", parsing_timeout=None)
    if not found or not isinstance(found[0], sympy.Basic | sympy.MatrixBase):
        return None
    tree = found[0]
    # math-verify reads i as a real variable in 5i and as the imaginary unit in 5 \\cdot i, and it rounds decimals
    units = {symbol: sympy.I for symbol in tree.free_symbols if symbol.name == "i"}
    return tree.subs(units | {decimal: sympy.Rational(str(decimal)) for decimal in tree.atoms(sympy.Float)})


def differ_numerically(first: sympy.Basic, second: sympy.Basic) -> bool:
    """True for two constants that differ in the first twenty digits, where math-verify only compares the difference
    with zero: 1/2004! and 1/2006! are both next to it."""
    if not all(isinstance(side, sympy.Expr) and side.is_number for side in (first, second)):
        return False
    return differ(sympy.N(first, 30), sympy.N(second, 30))


def differ(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether two values are not the same but for rounding."""
    return bool(abs(left - right) > PRECISION * max(abs(left), abs(right)))


def equal_where_real(first: sympy.Basic, second: sympy.Basic) -> bool:
    r"""True for two expressions with roots that agree at all of a few points where both are real: \sqrt{1/n} is
    1/\sqrt{n} there, but not for the negative numbers that the library thinks of, and \sqrt{x^2} is not x."""
    sides, names = (first, second), sorted(first.free_symbols, key=str)
    if not names or first.free_symbols != second.free_symbols:
        return False
    if not all(isinstance(side, sympy.Expr) and side.atoms(sympy.Pow) for side in sides):
        return False
    if all(power.exp.is_integer is not False for side in sides for power in side.atoms(sympy.Pow)):
        return False
    seen = 0
    for turn in range(len(POINT)):
        values = [sympy.Rational(*POINT[(turn + place) % len(POINT)]) for place in range(len(names))]
        left, right = (sympy.N(side.subs(dict(zip(names, values, strict=True))), 30) for side in sides)
        if left.is_real and right.is_real:
            seen += 1
            if differ(left, right):
                return False
    return seen >= 3


def compare(answer: str, label: str) -> str:
    """ "right" if both parse and are equal, else "wrong"."""
    first, second = parse_one(answer), parse_one(label)
    if first is None or second is None or differ_numerically(first, second):
        return "wrong"
    same = verify(second, first, timeout_seconds=None) or equal_where_real(first, second)
    return "right" if same else "wrong"


def answer(request: dict[str, object]) -> Reply:
    """Compare under the alarm; any failure of the library is an "error", not a verdict."""
    cpu = CPU_SHARE * request["seconds"]
    # SIGPROF has its default action: it ends the process even inside a C call, so no orphan computes for hours
    signal.setitimer(signal.ITIMER_PROF, 1.1 * cpu)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu)
    signal.setitimer(signal.ITIMER_REAL, 0.8 * request["seconds"])
    try:
        if "response" in request:
            outcome = extract(request["extraction"], request["response"])
        else:
            outcome = compare(request["answer"], request["label"])
    except OutOfTime:
        outcome = "timeout"
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        outcome = "error"
    finally:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
    return {"outcome": outcome}


def start() -> Answer:
    """Limit what the process can do, and load the grammar's tables, which happens on first use."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no answer can write a file
    signal.signal(signal.SIGALRM, on_alarm)
    signal.signal(signal.SIGVTALRM, on_alarm)
    compare("x+1", "1+x")
    return answer


if __name__ == "__main__":
    serve(start)
