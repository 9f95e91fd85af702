"""g(ν) = 0: the root of a falling function by Newton's method in ln ν, kept within a shrinking bracket."""

import math
from collections.abc import Callable

#: Evaluations after which a search gives its best bracket; Newton's method needs 3 to 8.
MOST_EVALUATIONS = 80


def falling_root(
    evaluate: Callable[[float], tuple[float, float]],
    start: float,
    bounds: tuple[float, float],
    tolerance: float,
) -> float:
    """ν with g(ν) = 0, g falling; the bound on the root's side where there is no root between them.

    Args:
        evaluate: ν -> (g, dg/d ln ν); a slope that is not negative sends the search to a bound, or else bisects.
        start: ν > 0, between the bounds.
        bounds: the smallest and the largest ν.
        tolerance: the relative step in ν below which the search ends (its error is then of the order of its square).
    """
    low, high = bounds
    seen_low = seen_high = False
    at = min(max(start, low), high)
    for _ in range(MOST_EVALUATIONS):
        value, slope = evaluate(at)
        if value >= 0:
            if at == bounds[1]:
                return at
            low, seen_low = at, True
        else:
            if at == bounds[0]:
                return at
            high, seen_high = at, True
        aim = at * math.exp(min(max(-value / slope, -50.0), 50.0)) if slope < 0 else math.nan
        if abs(aim / at - 1) < tolerance:
            return min(max(aim, bounds[0]), bounds[1])
        lost = math.isnan(aim)
        if not seen_high and (aim >= high or (lost and value >= 0)):
            aim = high
        elif not seen_low and (aim <= low or (lost and value < 0)):
            aim = low
        elif not low < aim < high:
            aim = math.sqrt(low * high)
        if high <= low * (1 + 1e-14):
            return at
        at = aim
    return at
