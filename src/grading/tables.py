"""What the grader knows by heart: signs of Unicode, macros of LaTeX, numbers in words, hedges, units and money."""

from fractions import Fraction


def spread(groups: dict[str, str]) -> dict[str, str]:
    """One entry for each word of the keys, or for each character of a key without spaces between signs."""
    return {name: new for names, new in groups.items() for name in names.split()}


# Unicode -> ASCII and LaTeX. What a character is made of (a superscript two, a wide digit) is known to unicodedata.
SIGNS = spread({
    "×": "\\times ", "· ⋅ ∙ •": "\\cdot ", "÷ ∕ ⁄": "/", "∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "−": "-",
    "∖": "\\setminus ", "° º": "^{\\circ}", "℃": "^{\\circ}C", "℉": "^{\\circ}F", "≤ ≦ ⩽": "\\le ", "≥ ≧ ⩾": "\\ge ",
    "≠": "\\ne ", "≈ ≅ ≃": "\\approx ", "±": "\\pm ", "∓": "\\mp ", "∈": "\\in ", "∣": "|", "∅": "\\emptyset ",
    "∠": "\\angle ", "ℝ": "\\mathbb{R}", "√": "\\sqrt ", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]", "′ ’ ‘": "'", "″ “ ”": "",
    "…": "...", "¢": " cents", "ϕ": "\\phi ",
})
WIDTHLESS = "\u00ad\u200b\u200c\u200d\u2060\ufeff\ufe0e\ufe0f"
CHEERS = "✅✔✓☑🎉🎊✨⭐🏆💯👍🙂😀😃😄😊"  # signs next to an answer that say nothing of it
DASHES = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # not the long ones, which part clauses
SPACES = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
GREEK = dict(zip("αβγδεζηθικλμνξοπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega").split(), strict=True))

MACROS = spread({  # of LaTeX -> one of those that mean the same
    "left right big Big bigl Bigl bigr Bigr bigg Bigg bf it rm sf tt": "", "checkmark blacksquare square Box qed": "",
    "displaystyle textstyle limits mathstrut quad qquad": " ",
    "dfrac tfrac cfrac": "\\frac", "dbinom tbinom": "\\binom", "bigcup": "\\cup ", "colon": ":",
    "leq leqslant le": "\\le ", "geq geqslant ge": "\\ge ", "lt": "<", "gt": ">",
    "neq ne": "\\ne ", "approxeq approx simeq cong": "\\approx ", "setminus backslash": "\\setminus ",
    "vert lvert rvert mid": "|", "langle": "(", "rangle": ")", "lbrace": "\\{", "rbrace": "\\}",
    "varnothing": "\\emptyset ", "times cdot ast": "\\cdot ", "div": "/", "infinity": "\\infty ", "degree": "^{\\circ}",
    "measuredangle": "\\angle ",
})
TEXT_MACROS = (
    "text mbox mathrm textbf mathbf textit mathit textrm textsf textnormal mathsf boldsymbol bm emph operatorname\\*? "
    "rm bf underline")
FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln log exp"
BARE_NAMES = "pi theta alpha beta gamma lambda phi omega sqrt"  # macros also without their backslash

# Numbers in words.
SMALL = dict(zip((
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety").split(),
    [*range(20), *range(20, 100, 10)], strict=True))
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PARTS = {"half": Fraction(1, 2), "quarter": Fraction(1, 4), "third": Fraction(1, 3)}
SHARES = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}

# Words that leave no answer: wherever they stand, in front of the number, in front of it with "of", after it.
CHANGES = (
    "not never none nothing neither nor isn't aren't wasn't weren't doesn't don't didn't can't cannot won't couldn't "
    "instead rather unlike false wrong incorrect untrue mistaken invalid lie fake bogus maybe perhaps possibly "
    "probably guess unsure unknown uncertain might either or alternatively versus vs too twice thrice half halved "
    "double doubled triple tripled quadruple quadrupled squared cubed factorial negated negative minus plus "
    "multiplied divided dozens hundreds thousands millions billions trillions halves thirds fourths fifths sixths "
    "sevenths eighths ninths tenths hundredths thousandths ish fold nearly almost nope modulo mod binary octal hex "
    "hexadecimal reversed backwards divisible"
)
CHANGES_BEFORE = (
    "than no without except excluding besides far but under over above below beyond up within past times close near "
    "less fewer exceeds exceeding between maximum minimum max"
)
CHANGES_WITH_OF = (
    "one fraction multiple factor part percent square cube root power logarithm log reciprocal inverse opposite digit "
    "digits third quarter fourth fifth sixth seventh eighth ninth tenth hundredth"
)
CHANGES_AFTER = "maximum minimum max below above beyond if unless but except no"

# Units by their first name, and money by its sign and its words.
UNITS = {
    name: names.split()[0]
    for names in ("meter m meters metre metres; centimeter cm centimeters centimetre centimetres; millimeter mm "
                  "millimeters; kilometer km kilometers kilometre kilometres; inch in inches; foot ft feet; yard yd "
                  "yards; mile mi miles; dollar dollars usd; cent cents; euro euros eur; second s sec seconds; minute "
                  "min minutes mins; hour h hr hrs hours; day days; week weeks; month months; year years; gram g gm "
                  "grams; kilogram kg kilograms; milligram mg; pound lb lbs pounds; ounce oz ounces; liter l liters "
                  "litre litres; milliliter ml milliliters; newton n; joule j joules; watt w watts; volt v volts; am; "
                  "pm; unit units; celsius; fahrenheit").split(";")
    for name in names.split()
}
SPEEDS = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour", "fps": "foot/second"}
UNIT_LETTERS = "mgshLlNJWV"  # units of one letter, which need a space in front: 5m is a product
PARTS_OF_UNITS = {  # how many of the smaller unit are one of the larger
    ("dollar", "cent"): 100, ("hour", "minute"): 60, ("minute", "second"): 60, ("day", "hour"): 24, ("week", "day"): 7,
    ("year", "month"): 12, ("foot", "inch"): 12, ("yard", "foot"): 3, ("pound", "ounce"): 16,
    ("meter", "centimeter"): 100, ("kilometer", "meter"): 1000, ("kilogram", "gram"): 1000,
}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
NO_UNITS = "and or not sin cos tan cot sec csc log ln mod pi".split()
MONEY = {
    "dollar": ("$", "dollars?|USD"), "cent": ("¢", "cents?"), "euro": ("€", "euros?|EUR"), "pound": ("£", "GBP"),
    "yen": ("¥", "yen|yuan|JPY|CNY"), "rupee": ("₹", "rupees?|INR"),
}

TRUTH = (dict.fromkeys("true t yes y correct right valid".split(), True)
         | dict.fromkeys("false f no n incorrect wrong invalid".split(), False))
