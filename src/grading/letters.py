"""The letters of a multiple choice that a statement says: its choice, and others that it leaves open."""

import re

LETTERS = "ABCDEFGHIJ"  # of choices, in order
CHOSEN = re.compile(  # one letter, perhaps after "Option"; small ones only where they can be no word
    r"[\s$*\\_\"'`“‘<\[{]*(?:(?:text|mathrm|textbf|mathbf|bf)\s*\{\s*)?"
    r"(?:(?i:the |correct |option|choice|letter|answer|is|clearly|therefore|thus|hence|then|indeed|obviously|:)\s*)*"
    r"[\"'`“‘<\[{]?(?:\(([A-Za-z])\)|([A-Z])\)?(?![A-Za-z'+\d^])|([a-z])(?=\)|[.:](?:\s|$)|[\s}$*.]*$))"
)
NEXT_CHOICE = re.compile(  # what stands between two letters that are both chosen: a list, or a second thought
    r"(?:[\s}{$*)(,;/&|.?!\\-]|text\b|\b(?:and|or|maybe|perhaps|possibly|no|wait|actually|also|rather|else|either)\b)*",
    re.IGNORECASE,
)
LISTED = re.compile(r"[,;/&|]|[a-z]")
ANOTHER = re.compile(r"\(?[A-J]\)?(?![A-Za-z'])")
REMARK = re.compile(r"\s+(?:is|are|was)\b(?!\s+(?:also|too(?!\s+[a-z])|possible|as well)\b)")
ON_ITS_OWN = re.compile(r"[\s)}\]*$.]*(?:$|[,;|(\[/?!]|[A-J](?![A-Za-z])|because\b|since\b|as\b)")
ALSO_POSSIBLE = re.compile(
    r"(?<![A-Za-z])([A-J])\)?\s+(?:(?:is |are )?also\b|(?:is|are|could|can|may|might)\b\s*"
    r"(?:(?:be|work|fit|true|right|correct|possible|too|also|as well)\b\s*)*(?:[).,;!]|$))"
)
QUOTED = re.compile("['‘]([A-Z])['’]")
DENIED = re.compile(
    r"[\s}$*)]*(?:(?:is|are|was|would be|can|could|does|do)\s*)?"
    r"(?:not\b|n['’]t\b|cannot\b|false\b|wrong\b|incorrect\b)",
    re.IGNORECASE,
)


def leading_letters(text: str) -> str:
    """The letters of choices that a statement begins with, and those it leaves open: "A, C" of "A or C because ..."."""
    found, text = [], QUOTED.sub(r"\1", text)
    while match := CHOSEN.match(text):
        found.append((match.group(1) or match.group(2) or match.group(3)).upper())
        text = text[match.end() :]
        if DENIED.match(text) or text.startswith("?"):
            return ""
        separator = NEXT_CHOICE.match(text).group()
        rest = text[len(separator) :]
        another = ANOTHER.match(rest)
        follows = rest[another.end() :] if another else ""
        listed = LISTED.search(separator) is not None
        if not (listed or another) or REMARK.match(follows) or not listed and not ON_ITS_OWN.match(follows):
            break
        text = rest
    return ", ".join([*found, *ALSO_POSSIBLE.findall(text)] if found else [])
