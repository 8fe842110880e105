r"""The exact value of an answer that is one number, and the units that it names.

Numbers are fractions, never floats. A text that is not plainly one number has no value here
(``3 to 4``, ``2x``, ``1,23``).
"""

import re
from fractions import Fraction

TYPOGRAPHY = str.maketrans({"−": "-", "–": "-", "－": "-", "\u00a0": " ", "\u202f": " "})
_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_TIMES = r"(?:\\times|\\cdot|[x×·*])"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[+-]?) \s* (?:\\?\$|€|£)? \s* (?P<inner_sign>[+-]?)
    (?:(?P<whole>\d+)\ +(?=\d+\s*/\s*\d))?          # the 1 of "1 1/2"
    (?P<top>{_DIGITS})
    (?:\s*/\s*(?P<bottom>{_DIGITS})
    |[eE](?P<power>[+-]?\d+)\b
    |\s*{_TIMES}\s*10\s*\^\s*(?:\{{\s*(?P<braced>[+-]?\d+)\s*\}}|(?P<raised>[+-]?\d+)))?
    (?P<rest>.*)
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
# Longer than any answer; Python refuses to read integers of some thousand digits.
_MOST_CHARACTERS = 1000
_MOST_POWER = 400
_TIMES_TEN = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# After the number: a size, a percent sign, a glued unit, words apart, an end of sentence.
_GLUED_UNITS = "km|cm|mm|kg|mg|ml|mL|lbs?|oz|ft|mph|kmh|hrs?|mins?|am|pm|AM|PM"
_WORD = r"(?:[^\W\d_]{2,}\.?|[gmshL]\b|a(?=\s+[^\W\d_]{2}))"
_REST = re.compile(
    rf"(?:\s+(?P<size>{'|'.join(_TIMES_TEN)})\b)?"
    rf"(?:\s*\\?%|\s*\$|(?:{_GLUED_UNITS})\b)?(?P<words>(?:(?:\s+|(?<=[^\W\d_])[/-]){_WORD})*)\s*[.,;]?"
)
_PARTS = r"dozens?|score|hal(?:f|ves)|thirds?|quarters?|fourths|fifths"
SIZES = re.compile(rf"\b(?:(?:{'|'.join(_TIMES_TEN)})s?|{_PARTS})\b", re.IGNORECASE)
"""Words that say how many times a number counts."""

# Words that change a number's value: reading past them would be a guess. (Two dozen may be 24 of
# something, or 2 where dozens were asked for.)
_NOT_UNITS = re.compile(
    rf"{SIZES.pattern}|\b(?:pi|sqrt|sin|cos|tan|log|ln|exp|or|and|to|plus|minus|times|over|by|mod"
    r"|squared|cubed)\b",
    re.IGNORECASE,
)

_UNITS = {
    spelling: unit
    for unit, spellings in {
        "%": "% percent percents percentage",
        "¢": "¢ cent cents",
        "$": "$ dollar dollars usd",
        "€": "€ euro euros",
        "£": "£",
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "inch": "inch inches",
        "foot": "ft foot feet",
        "yard": "yard yards yd yds",
        "mile": "mile miles",
        "mg": "mg milligram milligrams",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "ounce": "oz ounce ounces",
        "pound": "lb lbs pound pounds",
        "ml": "ml milliliter milliliters millilitre millilitres",
        "liter": "l liter liters litre litres",
        "gallon": "gallon gallons",
        "second": "s sec secs second seconds",
        "minute": "min mins minute minutes",
        "hour": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years",
        "degree": "° circ degree degrees",
        "radian": "rad radian radians",
        "am": "am a.m",
        "pm": "pm p.m",
    }.items()
    for spelling in spellings.split()
}
_UNIT_WORDS = re.compile(r"%|¢|€|£|°|(?<![^\W\d_\\])[^\W\d_]+(?:\.m\b)?")


def units_of(text: str) -> frozenset[str]:
    r"""The units of measure behind the last digit of an answer, and a currency in front of it.

    >>> sorted(units_of("60 mph")), sorted(units_of("$60")), sorted(units_of("72 apples"))
    (['hour', 'mile'], ['$'], [])
    >>> units_of(r"5\text{ cm}^2") == units_of("5 square centimeters")
    True
    """
    text = re.sub(r"\\circ|\\degree", "°", text.translate(TYPOGRAPHY))
    text = re.sub(r"mph\b", "mile hour", re.sub(r"kmh\b", "km hour", text))
    raised = re.sub(r"\^\s*\{?\s*[23]\s*\}?\s*\.?\s*\Z", "", text)
    behind = raised.lower()[max((m.end() for m in re.finditer(r"\d", raised)), default=0) :]
    found = {_UNITS[word] for word in _UNIT_WORDS.findall(behind) if word in _UNITS}
    front = re.match(r"\s*-?\s*\\?([$€£])\s*-?[\d.]", text)
    return frozenset(found | ({front[1]} if front else set()))


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number, else None.

    Understood: thousands separators in their places, decimals, ``3/4``, ``1 1/2``, ``1e3``,
    ``2 \times 10^3``, ``3 million``, signs (the Unicode minus too), currency signs, ``%`` (a
    unit: ``50%`` is 50), a full stop at the end, and units after the number. A word that changes
    the value (``dozen``, ``half``), a letter right behind the digits (``2x``) and a second number
    make it None.

    >>> parse_number("$1,234.50 per month."), parse_number("−3/4"), parse_number("1,23")
    (Fraction(2469, 2), Fraction(-3, 4), None)
    """
    text = text.translate(TYPOGRAPHY).strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    if len(text) > _MOST_CHARACTERS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    rest = _REST.fullmatch(match["rest"])
    if rest is None or _NOT_UNITS.search(rest["words"]):
        return None
    value = _magnitude(match)
    if value is not None and rest["size"]:
        value *= 10 ** _TIMES_TEN[rest["size"]]
    negative = "-" in (match["sign"], match["inner_sign"])
    return -value if value is not None and negative else value


def _magnitude(match: re.Match[str]) -> Fraction | None:
    value = _fraction(match["top"])
    if match["bottom"] is not None:
        bottom = _fraction(match["bottom"])
        if bottom == 0:
            return None
        value /= bottom
    power = match["power"] or match["braced"] or match["raised"]
    if power is not None:
        if len(power) > 4 or abs(int(power)) > _MOST_POWER:
            return None
        value *= Fraction(10) ** int(power)
    return value + int(match["whole"] or 0)


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").rstrip("."))
