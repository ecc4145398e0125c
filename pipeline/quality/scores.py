"""Numbers and checks of one response. Pure.

Enters: token ids, texts. Leaves: numbers. Costs: a pass over the tokens.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Literal

from stillroom.storage.records import Int32

#: A number as people write it: 1,234.5 or -3 or 2e-3; thousands separators are dropped.
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")


def repetition(ids: Int32, n: int) -> float:
    """Share of the n-grams of a response that occurred in it before: 0 for none or fewer than n tokens, near 1 for a
    loop (rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", within one response)."""
    tokens = ids.tolist()
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def agrees(response: str, reference: str, how: Literal["exact", "numeric"]) -> bool:
    """exact: equal but for blanks at the ends. numeric: the last number of each is the same number, such as 1,000 and
    1000.0; a reference without a number agrees with nothing."""
    if how == "exact":
        return response.strip() == reference.strip()
    wanted, found = last_number(reference), last_number(response)
    return wanted is not None and found == wanted


def last_number(text: str) -> Decimal | None:
    """The last number in a text, as GSM8K's answers are read; a full stop after it is no part of it."""
    found = [match for match in _NUMBER.findall(text) if any(c.isdigit() for c in match)]
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:  # an exponent that no number has
        return None
