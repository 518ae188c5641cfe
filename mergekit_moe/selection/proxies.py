"""From a pool's embeddings and a client's texts to that client's proxies."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_moe.errors import SelectionError
from mergekit_moe.privacy.accounting import Mechanism
from mergekit_moe.privacy_recipe import Privacy
from mergekit_moe.recipe import Selection
from mergekit_moe.selection import strategies
from mergekit_moe.selection.dpp import Picks, certificate_size, greedy_map, select_dpp
from mergekit_moe.selection.processes import ALONE, Processes
from mergekit_moe.selection.quality import coverage, squared_mmd
from mergekit_moe.selection.relevance import RELEVANCE, Relevance, private_classifier_relevance

_MIN_SEPARATION = 0.6
_FEW_PRIVATE = 200
"""Private texts under which relevance may tell too much of a single one."""
_ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)
_MIN_JUDGES = 10
_FEWEST = 20
"""Picks that `shorten` keeps at least: fewer don't tell what a domain's statistics are."""
_BLOCK = 65_536


class ProxySelection(NamedTuple):
    """A client's proxies and what was seen while picking them. Only `rows` ever leave the client."""

    rows: NDArray[np.int64]
    """(K,) distinct pool rows, in picking order."""
    relevance: NDArray[np.float64]
    """(N,) scores of all pool rows."""
    report: dict[str, Any]
    """What the client should see: separation, near-duplicates dropped, warnings."""
    gains: NDArray[np.float64] | None = None
    """(K,) log gains of the picks, where the DPP made them."""
    spent: Mechanism | None = None
    """What the choice cost in differential privacy, where its relevance was noised."""


def _dpp(pool_ND: NDArray[Any], relevance_N: NDArray[Any], settings: Selection, seed: int) -> NDArray[np.int64]:
    assert settings.alpha != "auto"
    return select_dpp(pool_ND, relevance_N, settings.budget, alpha=settings.alpha, epsilon=settings.epsilon)


SELECTORS: dict[str, Callable[[NDArray[Any], NDArray[Any], Selection, int], NDArray[np.int64]]] = {
    "dpp": _dpp,
    "top-k": lambda pool, relevance, settings, seed: strategies.top_k(pool, relevance, settings.budget),
    "random": lambda pool, relevance, settings, seed: strategies.random(pool, relevance, settings.budget, seed=seed),
    "mmr": lambda pool, relevance, settings, seed: strategies.mmr(pool, relevance, settings.budget),
    "facility-location": lambda pool, relevance, settings, seed: strategies.facility_location(
        pool, relevance, settings.budget
    ),
    "k-means": lambda pool, relevance, settings, seed: strategies.k_means(pool, relevance, settings.budget, seed=seed),
}


def select_proxies(
    pool_ND: NDArray[np.floating],
    private_MD: NDArray[np.float32],
    settings: Selection,
    *,
    name: str,
    seed: int,
    prompts_PD: NDArray[np.float32] | None = None,
    copies_N: NDArray[np.bool_] | None = None,
    repeated_N: NDArray[np.bool_] | None = None,
    privacy: Privacy | None = None,
    processes: Processes = ALONE,
) -> ProxySelection:
    """Return the proxies of one client.

    Args:
        pool_ND: unit embeddings of the pool's N rows.
        private_MD: unit embeddings of M of the client's texts; nothing computed from them but the row
            numbers is meant to leave the client.
        name: the expert's name, for errors; it also sets this client's draws apart from the others'.
        prompts_PD: unit embeddings of the sentences that `relevance: prompts` goes by.
        copies_N: True for pool rows that are word for word a private text, sampled or not; dropped with the
            near-duplicates, where these are.
        repeated_N: True for pool rows whose text stands in an earlier row; never picked, for they would add nothing.
        privacy: with a `relevance`, the choice is differentially private in the client's texts, all of which
            `private_MD` must then hold.
        processes: they share the scoring and the DPP; all return the same.

    Raises:
        SelectionError: if fewer rows can be picked than the budget asks for.
        PrivacyError: if there are too few texts for the epsilon.
    """
    seed = int.from_bytes(hashlib.sha256(f"{name}-{seed}".encode()).digest()[:4])
    too_close_N = np.zeros(len(pool_ND), dtype=bool)
    if settings.duplicate_cosine is not None:
        too_close_N = _closest(pool_ND, private_MD) >= settings.duplicate_cosine
        if copies_N is not None:
            too_close_N |= copies_N
    if repeated_N is None:
        repeated_N = np.zeros(len(pool_ND), dtype=bool)
    allowed_N = ~(too_close_N | repeated_N)
    left = int(np.count_nonzero(allowed_N))
    if settings.budget > min(left, settings.candidates or left):
        raise SelectionError(
            f"expert '{name}': selection.budget is {settings.budget} but the pool has only "
            f"{min(left, settings.candidates or left)} rows to pick from ({len(pool_ND)} in all, "
            f"{np.count_nonzero(repeated_N)} with the text of another, "
            f"{np.count_nonzero(too_close_N)} too close to a private text); lower it"
        )

    def score(texts_MD: NDArray[np.float32]) -> Relevance:
        if privacy is not None and privacy.relevance is not None:
            return private_classifier_relevance(
                pool_ND,
                texts_MD,
                epsilon=privacy.relevance.epsilon,
                delta=privacy.delta,
                name=name,
                seed=seed,
                processes=processes,
            )
        given = prompts_PD if settings.relevance == "prompts" else texts_MD
        return RELEVANCE[settings.relevance](pool_ND, given, seed=seed, processes=processes)

    sweep: list[dict[str, Any]] = []
    lengths: list[dict[str, Any]] = []
    trials = _trials(settings)
    if len(trials) > 1 or settings.shorten:
        order = np.random.default_rng(seed).permutation(len(private_MD))
        judges, known = order[: len(order) // 3], order[len(order) // 3 :]
        if len(judges) < _MIN_JUDGES:
            raise SelectionError(
                f"expert '{name}': selection '{'shorten' if len(trials) == 1 else 'auto'}' judges by a third of the "
                f"private texts, and {len(judges)} are too few; give a method, an alpha and a budget alone, or at "
                f"least {3 * _MIN_JUDGES} texts"
            )
        scores_N = score(private_MD[known]).scores
        if len(trials) > 1:
            sweep = _judge(trials, pool_ND, scores_N, private_MD[judges], allowed_N, seed, processes)
            settings = settings.model_copy(update={key: sweep[0][key] for key in ("method", "alpha")})
        if settings.shorten:
            picked = _pick(pool_ND, scores_N, allowed_N, settings, seed, processes)[0]
            lengths = _judge_lengths(pool_ND[picked], private_MD[judges])
    relevance = score(private_MD)
    rows, candidates, gains = _pick(pool_ND, relevance.scores, allowed_N, settings, seed, processes)
    if lengths:
        kept = int(lengths[0]["proxies"])
        rows, gains = rows[:kept], None if gains is None else gains[:kept]
    report: dict[str, Any] = {
        "separation_auc": round(relevance.separation, 4),
        "repeated_texts_dropped": int(np.count_nonzero(repeated_N)),
        "near_duplicates_dropped": int(np.count_nonzero(too_close_N)),
        "candidates": candidates,
        "warnings": [],
    }
    if lengths:
        report |= {"shortened_to": len(rows), "lengths": lengths}
    if sweep:
        report |= {"method": settings.method, "alpha": settings.alpha, "tried": sweep}
    if settings.relevance != "prompts" and relevance.spent is None and len(private_MD) < _FEW_PRIVATE:
        report["warnings"].append(
            f"only {len(private_MD)} private texts were embedded: the choice of proxies may tell more of single ones "
            f"than it would with {_FEW_PRIVATE} or more"
        )
    if relevance.separation < _MIN_SEPARATION:
        report["warnings"].append(
            f"{settings.relevance} can hardly tell this client's texts from the pool (AUC {relevance.separation:.2f}); "
            "its proxies are little better than random ones"
        )
    if gains is not None:
        report["certificate"] = _certificate(relevance.scores, rows, gains, settings)
    return ProxySelection(rows, relevance.scores, report, gains, relevance.spent)


def pick_by_relevance(
    pool_ND: NDArray[np.floating],
    relevance: Relevance,
    settings: Selection,
    *,
    name: str,
    seed: int,
    repeated_N: NDArray[np.bool_],
    processes: Processes = ALONE,
) -> ProxySelection:
    """Return the proxies of an expert without a client here: there is nothing private to judge or to warn by.

    Raises:
        SelectionError: if there are too few rows, or `alpha` is auto, which goes by private texts.
    """
    if len(_trials(settings)) > 1 or settings.shorten:
        raise SelectionError(
            f"expert '{name}': selection '{'shorten' if settings.shorten else 'auto'}' judges by a client's texts, and "
            "there are none; give a method, an alpha and a budget alone"
        )
    left = int(np.count_nonzero(~repeated_N))
    if settings.budget > min(left, settings.candidates or left):
        raise SelectionError(
            f"expert '{name}': selection.budget is {settings.budget} but the pool has only "
            f"{min(left, settings.candidates or left)} rows to pick from; lower it"
        )
    rows, candidates, gains = _pick(pool_ND, relevance.scores, ~repeated_N, settings, seed, processes)
    report = {
        "read_better_than_by_the_base": round(relevance.separation, 4),
        "repeated_texts_dropped": int(np.count_nonzero(repeated_N)),
        "candidates": candidates,
    }
    return ProxySelection(rows, relevance.scores, report, gains)


def _pick(
    pool_ND: NDArray[np.floating],
    scores_N: NDArray[np.float64],
    allowed_N: NDArray[np.bool_],
    settings: Selection,
    seed: int,
    processes: Processes,
) -> tuple[NDArray[np.int64], int, NDArray[np.float64] | None]:
    """Return the (K,) picked rows, how many candidates there were, and the DPP's (K,) log gains."""
    if settings.candidates is not None:
        candidates = np.flatnonzero(allowed_N)
        order = np.argsort(-scores_N[candidates], kind="stable")[: settings.candidates]
        allowed_N = np.zeros(len(pool_ND), dtype=bool)
        allowed_N[candidates[order]] = True
    count = int(np.count_nonzero(allowed_N))
    if settings.method == "dpp":
        assert settings.alpha != "auto"
        share = processes.share(len(pool_ND))
        picks = greedy_map(
            pool_ND[share],
            scores_N[share],
            settings.budget,
            alpha=settings.alpha,
            epsilon=settings.epsilon,
            allowed=allowed_N[share],
            processes=processes,
        )
        return picks.rows, count, picks.gains
    candidates = np.flatnonzero(allowed_N)
    picked = None
    if processes.rank == 0:
        picked = candidates[SELECTORS[settings.method](pool_ND[candidates], scores_N[candidates], settings, seed)]
    return processes.from_first(picked), count, None


def _certificate(
    scores_N: NDArray[np.float64], rows: NDArray[np.int64], gains: NDArray[np.float64], settings: Selection
) -> int:
    assert settings.alpha != "auto"
    return certificate_size(scores_N, Picks(rows, gains), alpha=settings.alpha, epsilon=settings.epsilon)


def _trials(settings: Selection) -> list[Selection]:
    """Return what `auto` stands for in the settings; they alone where nothing is auto."""
    alphas = _ALPHAS if settings.alpha == "auto" else (settings.alpha,)
    if settings.method == "auto":
        alphas = _ALPHAS
    elif settings.method != "dpp":
        return [settings]
    trials = [settings.model_copy(update={"method": "dpp", "alpha": alpha}) for alpha in alphas]
    if settings.method == "auto":
        trials.append(settings.model_copy(update={"method": "facility-location", "alpha": 1.0}))
    return trials


def _judge(
    trials: list[Selection],
    pool_ND: NDArray[np.floating],
    scores_N: NDArray[np.float64],
    judges_JD: NDArray[np.float32],
    allowed_N: NDArray[np.bool_],
    seed: int,
    processes: Processes,
) -> list[dict[str, Any]]:
    """Return what each trial does to private texts that the relevance never saw, the best one first.

    Best is the least sum of ranks by discrepancy and by coverage, the smaller discrepancy where those are equal.
    """
    sweep = []
    for tried in trials:
        picked = pool_ND[_pick(pool_ND, scores_N, allowed_N, tried, seed, processes)[0]]
        mmd, covered = squared_mmd(picked, judges_JD), coverage(picked, judges_JD)
        judged = {"squared_mmd": round(mmd, 6), "coverage": round(covered, 4)}
        sweep.append({"method": tried.method, "alpha": tried.alpha, **judged})

    def rank(row: dict[str, Any]) -> tuple[int, float]:
        nearer = sum(other["squared_mmd"] < row["squared_mmd"] for other in sweep)
        wider = sum(other["coverage"] > row["coverage"] for other in sweep)
        return nearer + wider, row["squared_mmd"]

    return sorted(sweep, key=rank)


def _judge_lengths(picked_KD: NDArray[np.floating], judges_JD: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Return how far the first so many picks are from private texts that the relevance never saw, the nearest first.

    Half as many again, and again, from the budget downwards; the longer one where two are as near.
    """
    lengths = {len(picked_KD)}
    while (shorter := min(lengths) * 2 // 3) >= _FEWEST:
        lengths.add(shorter)
    judged = [
        {"proxies": length, "squared_mmd": round(squared_mmd(picked_KD[:length], judges_JD), 6)} for length in lengths
    ]
    return sorted(judged, key=lambda row: (row["squared_mmd"], -row["proxies"]))


def _closest(pool_ND: NDArray[np.floating], private_MD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (N,) each pool row's greatest cosine to a private text, a block of rows at a time."""
    blocks = [pool_ND[start : start + _BLOCK] for start in range(0, len(pool_ND), _BLOCK)]
    return np.concatenate([(np.asarray(rows, dtype=np.float32) @ private_MD.T).max(axis=1) for rows in blocks])


def tag_shares(
    chosen: NDArray[np.int64],
    tags: list[str],
    tag: str,
    relevance_N: NDArray[np.float64],
    pool_ND: NDArray[np.float32],
    settings: Selection,
    seed: int,
) -> dict[str, float]:
    """Return the share of picks that carry the client's true tag: as selected, by top-k and at random."""
    right = np.array([t == tag for t in tags])
    picked = {"selected": chosen}
    for other in ("top-k", "random"):
        picked[other] = SELECTORS[other](pool_ND, relevance_N, settings, seed)
    return {method: float(right[rows].mean()) for method, rows in picked.items()}
