"""Numbers and names -> words of the report.

In: shares, counts, decimals, names from the data. Out: strings, with no-break spaces between numbers and units.
"""

NB_SPACE = "\N{NO-BREAK SPACE}"

SHOWN_NAME_CHARACTERS = 40


def percent(share: float | None) -> str:
    """A share as people say it: whole percents, with one decimal below ten.

    Examples:
        >>> percent(0.294).replace(NB_SPACE, " "), percent(0.032).replace(NB_SPACE, " "), percent(None)
        ('29 %', '3.2 %', '–')
    """
    return "–" if share is None else f"{_percent_number(share)}{NB_SPACE}%"


def percent_range(low: float | None, high: float | None) -> str:
    """An interval of shares.

    Examples:
        >>> percent_range(0.257, 0.318).replace(NB_SPACE, " ")
        '26–32 %'
    """
    if low is None or high is None:
        return "–"
    return f"{_percent_number(low)}–{_percent_number(high)}{NB_SPACE}%"


def _percent_number(share: float) -> str:
    if 0.0995 <= share <= 0.9005 or share in (0, 1):
        return f"{100 * share:.0f}"
    return f"{100 * share:.1f}".removesuffix(".0")


def count(value: float | None) -> str:
    """A number of things, rounded, thousands set apart.

    Examples:
        >>> count(100000)
        '100,000'
    """
    return "–" if value is None else f"{value:,.0f}"


def counted(value: float, noun: str) -> str:
    """A number with its noun, which takes an s unless there is one.

    Examples:
        >>> [counted(number, "pair").replace(NB_SPACE, " ") for number in (1, 1200)]
        ['1 pair', '1,200 pairs']
    """
    return f"{count(value)}{NB_SPACE}{noun}" + ("" if round(value) == 1 else "s")


def decimal(value: float | None, places: int = 2) -> str:
    """A number with a fixed number of decimals and a true minus sign.

    Examples:
        >>> decimal(-1.5)
        '−1.50'
    """
    # z writes what rounds to −0.00 as 0.00
    return "–" if value is None else f"{value:z.{places}f}".replace("-", "−")


def probability(value: float | None) -> str:
    """A probability with two decimals that never reads as certainty.

    Examples:
        >>> probability(0.999), probability(0.25)
        ('>0.99', '0.25')
    """
    if value is None:
        return "–"
    return "<0.01" if value < 0.005 else ">0.99" if value > 0.995 else f"{value:.2f}"


def shown_name(name: str) -> str:
    """A name from the data, fit for a sentence: in quotes, on one line, never set as a command.

    Examples:
        >>> shown_name("Ada `Lovelace`")
        "“Ada 'Lovelace'”"
    """
    line = " ".join(name.split()).replace("`", "'")
    return f"“{line if len(line) <= SHOWN_NAME_CHARACTERS else line[:SHOWN_NAME_CHARACTERS] + '…'}”"


def listed(pieces: list[str]) -> str:
    """Pieces as one writes them in a row.

    Examples:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return pieces[0] if len(pieces) == 1 else f"{', '.join(pieces[:-1])} and {pieces[-1]}"
