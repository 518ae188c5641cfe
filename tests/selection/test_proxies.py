"""Relevance and proxies on made-up embeddings with known domains."""

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from mergekit_moe.errors import SelectionError
from mergekit_moe.recipe import Selection
from mergekit_moe.selection.proxies import SELECTORS, pick_by_relevance, select_proxies, tag_shares
from mergekit_moe.selection.quality import squared_mmd
from mergekit_moe.selection.relevance import RELEVANCE, centroid_relevance, classifier_relevance, prompts_relevance

SIZE = 24


def around(centre: int, n: int, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(n, SIZE)) * 0.25
    rows[:, centre] += 1.0
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


POOL = np.concatenate([around(0, 60, 1), around(1, 140, 2), around(2, 200, 3)])
PRIVATE = around(0, 50, 4)


def test_relevance_finds_the_clients_domain_in_the_pool() -> None:
    relevance = classifier_relevance(POOL, PRIVATE, seed=0)
    assert set(np.argsort(-relevance.scores)[:50]) <= set(range(60))
    assert np.all((relevance.scores > 0) & (relevance.scores <= 1))


def test_scores_are_out_of_fold() -> None:
    """Among rows of one distribution nobody stands out by having been a negative: AUC stays near a half."""
    noise = np.random.default_rng(0).normal(size=(600, 200)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    relevance = classifier_relevance(noise[:400], noise[400:], seed=0)
    assert abs(relevance.separation - 0.5) < 0.08


def test_more_rows_than_negatives_are_all_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_moe.selection.relevance._MAX_NEGATIVES", 100)
    scores = classifier_relevance(POOL, PRIVATE, seed=0).scores
    assert roc_auc_score(np.arange(400) < 60, scores) > 0.99
    assert scores.max() <= 1.0


@pytest.mark.parametrize("method", [*SELECTORS, "auto"])
def test_each_method_picks_the_budget_of_distinct_rows(method: str) -> None:
    chosen = select_proxies(POOL, PRIVATE, Selection(budget=40, method=method), name="a", seed=0)
    assert len(set(chosen.rows.tolist())) == 40


def test_published_candidate_cut_keeps_only_the_most_relevant() -> None:
    chosen = select_proxies(POOL, PRIVATE, Selection(budget=20, candidates=30), name="a", seed=0)
    assert set(chosen.rows) <= set(np.argsort(-chosen.relevance, kind="stable")[:30])


def test_copies_of_private_texts_are_dropped_where_asked() -> None:
    pool = np.concatenate([PRIVATE[:10], POOL])
    chosen = select_proxies(pool, PRIVATE, Selection(budget=60, duplicate_cosine=0.95), name="a", seed=0)
    assert chosen.rows.min() >= 10
    assert chosen.report["near_duplicates_dropped"] >= 10


def test_a_budget_above_the_pool_names_both_numbers() -> None:
    with pytest.raises(SelectionError, match=r"expert 'law': selection.budget is 401 .* only 400 rows"):
        select_proxies(POOL, PRIVATE, Selection(budget=401), name="law", seed=0)


def test_a_client_like_the_pool_is_warned() -> None:
    chosen = select_proxies(POOL, POOL[::4].copy(), Selection(budget=5), name="a", seed=0)
    assert any("hardly tell" in warning for warning in chosen.report["warnings"])


def test_too_few_private_texts_are_refused() -> None:
    with pytest.raises(SelectionError, match="got 9 private"):
        classifier_relevance(POOL, PRIVATE[:9], seed=0)


def test_tag_shares_compare_the_choice_with_top_k_and_random() -> None:
    settings = Selection(budget=40)
    chosen = select_proxies(POOL, PRIVATE, settings, name="a", seed=0)
    tags = ["own"] * 60 + ["other"] * 340
    shares = tag_shares(chosen.rows, tags, "own", chosen.relevance, POOL, settings, 0)
    assert shares["top-k"] > 0.9 > 0.4 > shares["random"]
    assert shares["selected"] == np.mean([tags[i] == "own" for i in chosen.rows])


def test_recipes_name_every_selector() -> None:
    assert set(get_args(Selection.model_fields["method"].annotation)) == {*SELECTORS, "auto"}
    assert set(get_args(Selection.model_fields["relevance"].annotation)) == set(RELEVANCE)


def test_alpha_auto_is_the_best_of_the_sweep_by_rows_that_it_never_saw() -> None:
    """Little on-topic supply asks for sharp relevance; the choice made is that of the alpha named."""
    private = around(0, 90, 4)
    chosen = select_proxies(POOL, private, Selection(budget=40, alpha="auto"), name="a", seed=0)
    sweep = {row["alpha"]: row for row in chosen.report["tried"]}
    assert set(sweep) == {0.5, 1.0, 2.0, 4.0, 8.0}
    alpha = chosen.report["alpha"]
    ranks = {
        a: sum(o["squared_mmd"] < r["squared_mmd"] for o in sweep.values())
        + sum(o["coverage"] > r["coverage"] for o in sweep.values())
        for a, r in sweep.items()
    }
    assert ranks[alpha] == min(ranks.values())
    again = select_proxies(POOL, private, Selection(budget=40, alpha=alpha), name="a", seed=0)
    assert chosen.rows.tolist() == again.rows.tolist()
    flat = select_proxies(POOL, private, Selection(budget=40, method="random"), name="a", seed=0)
    fresh = around(0, 60, 9)
    assert squared_mmd(POOL[chosen.rows], fresh) < squared_mmd(POOL[flat.rows], fresh)


def test_method_auto_tries_facility_location_too_and_says_what_it_kept() -> None:
    private = around(0, 90, 4)
    chosen = select_proxies(POOL, private, Selection(budget=40, method="auto"), name="a", seed=0)
    tried = [(row["method"], row["alpha"]) for row in chosen.report["tried"]]
    assert len(tried) == 6 and ("facility-location", 1.0) in tried
    kept = Selection(budget=40, method=chosen.report["method"], alpha=chosen.report["alpha"])
    assert chosen.rows.tolist() == select_proxies(POOL, private, kept, name="a", seed=0).rows.tolist()


@pytest.mark.parametrize("method", ["dpp", "top-k", "facility-location"])
def test_shortened_proxies_are_the_first_picks_and_no_more_than_the_domain_supplies(method: str) -> None:
    """60 of 400 rows are like the first client: of 200 picks most are not. The other has 200 for a budget of 90."""
    private = around(0, 150, 4)
    whole, short = (
        select_proxies(POOL, private, Selection(budget=200, method=method, shorten=on), name="a", seed=0)
        for on in (False, True)
    )
    assert short.rows.tolist() == whole.rows[: len(short.rows)].tolist()
    assert 20 <= len(short.rows) < 100 and short.report["shortened_to"] == len(short.rows)
    assert {row["proxies"] for row in short.report["lengths"]} == {200, 133, 88, 58, 38, 25}
    fresh = around(0, 100, 9)
    assert squared_mmd(POOL[short.rows], fresh) < squared_mmd(POOL[whole.rows], fresh)
    assert short.gains is None or len(short.gains) == len(short.rows)
    plenty = select_proxies(
        POOL, around(2, 150, 5), Selection(budget=90, method=method, shorten=True), name="a", seed=0
    )
    assert len(plenty.rows) > len(short.rows)


def test_alpha_auto_needs_texts_to_judge_by() -> None:
    for settings in (Selection(budget=40, alpha="auto"), Selection(budget=40, shorten=True)):
        with pytest.raises(SelectionError, match="at least 30 texts"):
            select_proxies(POOL, PRIVATE[:20], settings, name="a", seed=0)


def test_what_nobody_is_there_to_judge_is_not_shortened() -> None:
    relevance = classifier_relevance(POOL, PRIVATE, seed=0)
    nowhere = np.zeros(len(POOL), dtype=bool)
    with pytest.raises(SelectionError, match="selection 'shorten' judges by a client's texts, and there are none"):
        pick_by_relevance(POOL, relevance, Selection(shorten=True), name="a", seed=0, repeated_N=nowhere)


def test_few_private_texts_are_warned_about() -> None:
    chosen = select_proxies(POOL, PRIVATE, Selection(budget=5), name="a", seed=0)
    assert any("only 50 private texts" in warning for warning in chosen.report["warnings"])


def test_centroid_finds_the_domain_and_says_how_well() -> None:
    relevance = centroid_relevance(POOL, PRIVATE, seed=0)
    cosines = POOL @ PRIVATE.mean(0)
    assert (
        np.argsort(-relevance.scores, kind="stable")[:60].tolist() == np.argsort(-cosines, kind="stable")[:60].tolist()
    )
    assert relevance.scores.max() == 1.0
    assert relevance.separation > 0.8
    with pytest.raises(SelectionError, match="as close"):
        centroid_relevance(np.repeat(POOL[:1], 20, axis=0), PRIVATE, seed=0)


def test_repeated_texts_are_picked_once() -> None:
    pool, repeated = np.concatenate([POOL, POOL[:50]]), np.arange(450) >= 400
    chosen = select_proxies(pool, PRIVATE, Selection(budget=399), name="a", seed=0, repeated_N=repeated)
    assert chosen.rows.max() < 400
    assert chosen.report["repeated_texts_dropped"] == 50
    with pytest.raises(SelectionError, match=r"only 400 rows to pick from \(450 in all, 50 with the text of another"):
        select_proxies(pool, PRIVATE, Selection(budget=401), name="a", seed=0, repeated_N=repeated)


def test_prompts_find_the_domain_without_a_private_text() -> None:
    relevance = prompts_relevance(POOL, PRIVATE[:4], seed=0)
    assert roc_auc_score(np.arange(400) < 60, relevance.scores) > 0.95
    settings = Selection(budget=30, relevance="prompts")
    one, other = (
        select_proxies(POOL, private, settings, name="a", seed=0, prompts_PD=PRIVATE[:4]).rows
        for private in (PRIVATE, around(2, 50, 9))
    )
    assert np.array_equal(one, other)
    with pytest.raises(SelectionError, match="at least one sentence"):
        prompts_relevance(POOL, PRIVATE[:0], seed=0)


def test_a_pool_of_one_text_is_told_apart_from_nothing() -> None:
    constant = np.repeat(POOL[:1], 30, axis=0)
    chosen = select_proxies(constant, PRIVATE, Selection(budget=5), name="a", seed=0)
    assert len(set(chosen.rows.tolist())) == 5
    for kind in (centroid_relevance, prompts_relevance):
        with pytest.raises(SelectionError, match="all rows of the pool are as close"):
            kind(constant, PRIVATE, seed=0)


@pytest.mark.parametrize("texts", [50, 500])
def test_planted_copies_are_picked_as_often_as_texts_like_them(texts: int) -> None:
    """Membership attack: the pool holds copies of private texts, and texts of the same source that never were private.

    Picked less often would tell as much as more often: dropping the copies is no defence.
    """
    rng = np.random.default_rng(7)
    advantages = []
    for _ in range(12):
        rows = rng.normal(size=(2 * texts + 4000, 96)).astype(np.float32)
        rows[: 2 * texts + 800, :8] += 1.2
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        chosen = select_proxies(rows, rows[:texts], Selection(budget=300), name="a", seed=0)
        picked = np.isin(np.arange(2 * texts), chosen.rows)
        advantages.append(picked[:texts].mean() - picked[texts:].mean())
    assert abs(np.mean(advantages)) < 0.05
