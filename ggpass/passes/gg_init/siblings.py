"""kept_i = σ_i / σ_base: the ratio by which a model's own initializer made a weight smaller than its siblings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: "Distinctly smaller": below this, after the sampling error of a measured σ. 1/√2 (GPT-2 of one layer) is;
#: torch's default beside Xavier's in one attention block (0.816) is not.
DISTINCT = 0.8

#: A value that this share of the siblings has is the base of the others.
SHARE = 1 / 3


@dataclass(frozen=True)
class Sibling:
    """One weight among those of its kind of operator.

    Attributes:
        name: of the weight.
        std: σ as measured, √(mean of squares), positive.
        count: elements that it was measured on.
        fan_in, fan_out: as `torch.nn.init` counts them, and thus the model's own initializer.
        target: √(ξ/n), what it would be drawn with.
    """

    name: str
    std: float
    count: int
    fan_in: float
    fan_out: float
    target: float


#: The laws that initializers follow: what σ is proportional to.
LAWS: tuple[Callable[[Sibling], float], ...] = (
    lambda w: 1.0,
    lambda w: w.fan_in**-0.5,
    lambda w: (w.fan_in + w.fan_out) ** -0.5,
    lambda w: w.fan_out**-0.5,
)


def kept_ratios(siblings: Sequence[Sibling]) -> dict[str, float]:
    """{name: σ/σ_base} of the weights that were made distinctly smaller than their siblings; the others are missing.

    GPT-2 draws the last linear of each residual branch with 0.02/√(2L), T5 its queries with (d·d_kv)^−½ where all
    others have d^−½; a rule of fans alone would lose that.

    1. The base is the largest value that a third of the siblings or more have, under the law that they follow: this
       module's own rule √(ξ/n) where a third or more are at it and none above (so that a second call changes
       nothing), else the one that needs the fewest different values of: one σ for all (BERT, GPT, Llama), σ·√fan_in,
       σ·√(fan_in + fan_out), σ·√fan_out.
    2. A weight below DISTINCT × base, whatever the sampling errors, was made smaller, unless a base weight and one of
       the laws predict its σ (torch's default gives four times the fan half the σ, with no intention behind it).
    3. Such a predicted weight counts all the same where others that no law explains have the same ratio: in GPT-2 of
       two layers 1/√(2L) and √(1/4) for the fourfold fan are one number.

    Args:
        siblings: the weights of one kind of operator.
    """
    found = _base(siblings)
    if found is None:
        return {}
    values, cluster = found
    level, error = _pooled(siblings, values, cluster)
    smaller: dict[str, float] = {}
    for w, value in zip(siblings, values):
        ratio, off = value / level, math.hypot(error_of_std(w.count), error)
        if ratio * (1 + 4 * off) < DISTINCT:
            smaller[w.name] = shortest(ratio, off)
    by_name = {w.name: w for w in siblings}
    members = [siblings[i] for i in cluster]
    plain = {name: ratio for name, ratio in smaller.items() if not _explained(by_name[name], members)}
    return {
        name: ratio
        for name, ratio in smaller.items()
        if name in plain or any(_same(ratio, other, by_name[name], by_name[o]) for o, other in plain.items())
    }


def _base(siblings: Sequence[Sibling]) -> tuple[list[float], list[int]] | None:
    """What each weight has under the law that the siblings follow, and which of them are the base."""
    own = [w.std / w.target for w in siblings]
    at_rule = [i for i, w in enumerate(siblings) if _same(own[i], 1.0, w, w)]
    above = any(own[i] > 1 and i not in at_rule for i in range(len(own)))
    if len(at_rule) >= _least(siblings) and not above:
        return own, at_rule
    by_law = [[w.std / law(w) for w in siblings] for law in LAWS]
    bases = [(values, _largest_shared(siblings, values)) for values in by_law]
    # The law that needs the fewest different values to tell all of them; min takes the first of equals.
    return min((b for b in bases if b[1]), key=lambda b: _different(siblings, b[0]), default=None)


def _different(siblings: Sequence[Sibling], values: Sequence[float]) -> int:
    """Return how many different values there are, those counted as one that are the same but for sampling."""
    left = list(range(len(values)))
    count = 0
    while left:
        near = _cluster(siblings, values, left[0])
        left = [i for i in left if i not in near]
        count += 1
    return count


def error_of_std(count: int) -> float:
    """1/√(2N): the relative deviation of a σ that was measured on N Gaussian values."""
    return (2 * count) ** -0.5


def shortest(value: float, error: float) -> float:
    """Return the decimal of fewest digits within two deviations of a positive number, and never further off than 5 %.

    A measured σ is known no better; what the initializer was written with (0.02, 1) is mostly found again, so that
    the result hangs neither on the random numbers that it drew nor on how often `init_` is called.

    Args:
        error: the relative deviation of `value`.
    """
    rounded = (float(f"{value:.{digits}e}") for digits in range(17))
    return next((r for r in rounded if abs(r / value - 1) <= min(2 * error, 0.05)), value)


def _pooled(siblings: Sequence[Sibling], values: Sequence[float], cluster: Sequence[int]) -> tuple[float, float]:
    """Return the value that a cluster has in common, and its relative deviation."""
    count = sum(siblings[i].count for i in cluster)
    power = sum(siblings[i].count * values[i] ** 2 for i in cluster) / count
    return math.sqrt(power), error_of_std(count)


def _same(a: float, b: float, first: Sibling, second: Sibling) -> bool:
    """Whether two values, measured on two weights, differ by no more than 4 deviations (and a truncated tail)."""
    return abs(math.log(a / b)) <= 4 * math.hypot(error_of_std(first.count), error_of_std(second.count)) + 0.02


def _cluster(siblings: Sequence[Sibling], values: Sequence[float], center: int) -> list[int]:
    return [i for i, v in enumerate(values) if _same(v, values[center], siblings[i], siblings[center])]


def _least(siblings: Sequence[Sibling]) -> int:
    """Return how many weights must share a value for it to be a base: SHARE of them, and at least two."""
    return max(2, math.ceil(SHARE * len(siblings)))


def _largest_shared(siblings: Sequence[Sibling], values: Sequence[float]) -> list[int]:
    """The weights that have the largest value that enough of the siblings share; none without any."""
    clusters = (_cluster(siblings, values, i) for i in sorted(range(len(values)), key=lambda i: -values[i]))
    return next((cluster for cluster in clusters if len(cluster) >= _least(siblings)), [])


def _explained(w: Sibling, members: Sequence[Sibling]) -> bool:
    """Return True if one of the laws leads from a base weight's σ to this one's."""
    return any(_same(w.std, m.std * law(w) / law(m), w, m) for m in members for law in LAWS)
