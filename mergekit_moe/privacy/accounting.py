"""How much noise a guarantee takes, and what several mechanisms on the same rows add up to.

Neighbours are data sets of which one lacks one row of the other, while all else stays in its place and the number of
rows counts as known ("replace special" in dp-accounting: the row becomes one that adds nothing).
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_moe.errors import PrivacyError

if TYPE_CHECKING:
    from dp_accounting import DpEvent

MECHANISM = "mechanism.json"
"""In a stage's folder, which stays with the client: what the stage spent."""
_MOST_NOISE = 1.0
"""Noise over signal above which what is published says more about the noise than about the client."""
_TOLERANCE = 1e-3
"""Of noise multipliers found by search."""


class Mechanism(NamedTuple):
    """A (sampled) Gaussian mechanism on a client's private rows, as it was really applied."""

    name: str
    """Key of the recipe's `privacy` that asked for it."""
    mechanism: str
    """In words, with its source."""
    epsilon: float
    """By the accountant, at `delta`, of this mechanism alone."""
    delta: float
    noise_multiplier: float
    """Standard deviation of the noise over the L2 sensitivity, each step."""
    sampling_probability: float
    """With which a row takes part in a step: 1 where there is no sampling."""
    steps: int
    noise_to_signal: float
    """Expected norm of all noise over the greatest norm that the signal can have."""
    parameters: dict[str, Any]
    """What else a reader needs to check it: clip, regularisation, number of rows."""


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Return the least delta of the Gaussian mechanism of sensitivity 1.

    Source: Balle and Wang 2018, Theorem 8.
    """
    from scipy.special import log_ndtr

    above = log_ndtr(0.5 / sigma - epsilon * sigma)
    below = epsilon + log_ndtr(-0.5 / sigma - epsilon * sigma)
    return float(math.exp(above) * -math.expm1(below - above))


def gaussian_sigma(epsilon: float, delta: float) -> float:
    """Return the least noise, as a multiple of the L2 sensitivity, that is (epsilon, delta)-DP.

    Source: Balle and Wang 2018, Algorithm 1; here by bisection, which ends on the safe side.

    Raises:
        PrivacyError: if epsilon isn't above 0, or delta not between 0 and 1.
    """
    _require_guarantee(epsilon, delta)
    low = high = 1.0
    while gaussian_delta(epsilon, high) > delta:
        high *= 2.0
    while gaussian_delta(epsilon, low) <= delta:
        low /= 2.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2.0
        low, high = (low, middle) if gaussian_delta(epsilon, middle) <= delta else (middle, high)
    return high


def sampled_gaussian_sigma(epsilon: float, delta: float, *, sampling_probability: float, steps: int) -> float:
    """Return a noise multiplier for DP-SGD: `steps` Gaussian mechanisms, each on a Poisson sample of the rows.

    It is at most one in a thousand above the least one that the accountant allows.
    """
    _require_guarantee(epsilon, delta)

    def enough(sigma: float) -> bool:
        accountant = _accountant()
        accountant.compose(_event(sigma, sampling_probability, steps))
        return bool(accountant.get_epsilon(delta) <= epsilon)

    # From 1 on, up or down by halves: a loss distribution at very little noise takes minutes.
    low = high = 1.0
    while not enough(high):
        low, high = high, high * 2.0
    while low == high or enough(low):
        low, high = low / 2.0, low
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2.0
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def composed_epsilon(mechanisms: list[Mechanism], delta: float) -> float:
    """Return the epsilon of all mechanisms together on the same rows, each of which may have seen those before it.

    Accounting is dp-accounting's, by privacy loss distributions; it never rounds down.
    """
    if not mechanisms:
        return 0.0
    accountant = _accountant()
    for mechanism in mechanisms:
        accountant.compose(_event(mechanism.noise_multiplier, mechanism.sampling_probability, mechanism.steps))
    return float(accountant.get_epsilon(delta))


def account(mechanism: Mechanism) -> Mechanism:
    """Return the mechanism with the epsilon that the accountant finds for it."""
    return mechanism._replace(epsilon=composed_epsilon([mechanism], mechanism.delta))


def require_few_enough(delta: float, rows: int, *, who: str) -> None:
    """Raise PrivacyError unless delta is below 1 / rows: a mechanism may publish one whole row with probability delta.

    Args:
        rows: the number of private rows.
        who: whose they are, for the sentence.
    """
    if rows < 1 or delta >= 1.0 / rows:
        raise PrivacyError(
            f"{who}: privacy.delta is {delta:g} and there are {rows:,} private rows; at 1 / rows, which is "
            f"{1 / max(rows, 1):.2g}, publishing a row at random would pass as private: lower it"
        )


def require_signal(noise_to_signal: float, epsilon: float, rows: int, *, what: str, kind: str = "private rows") -> None:
    """Raise PrivacyError where so few rows at so small an epsilon leave mostly noise. It looks at no row.

    Args:
        noise_to_signal: norm of the noise over the greatest norm that the signal can have.
        what: whose mechanism, for the sentence.
        kind: what the rows are, for the sentence.
    """
    if noise_to_signal > _MOST_NOISE:
        raise PrivacyError(
            f"{what}: {rows:,} {kind} at epsilon {epsilon:g} give {noise_to_signal:.2f} times as much noise as "
            f"there can be signal, and at most {_MOST_NOISE:g} is of use; raise epsilon, or give about "
            f"{math.ceil(rows * noise_to_signal / _MOST_NOISE):,} rows"
        )


def _require_guarantee(epsilon: float, delta: float) -> None:
    if not (0.0 < epsilon < math.inf and 0.0 < delta < 1.0):
        raise PrivacyError(
            f"epsilon is {epsilon:g} and delta {delta:g}; give an epsilon above 0 and a delta between 0 and 1"
        )


def _event(sigma: float, sampling_probability: float, steps: int) -> "DpEvent":
    dp = _accounting()
    event = dp.GaussianDpEvent(sigma)
    if sampling_probability < 1.0:
        event = dp.PoissonSampledDpEvent(sampling_probability, event)
    return dp.SelfComposedDpEvent(event, steps)


def _accountant() -> Any:
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(_accounting().NeighboringRelation.REPLACE_SPECIAL)


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise PrivacyError(
            "privacy: dp-accounting is not installed, and nothing is published without an account of it; "
            "`pip install 'mergekit_moe[privacy]'`"
        ) from None
    return dp_accounting
