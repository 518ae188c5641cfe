"""Retention, means and spreads, worked by hand."""

from pathlib import Path
from typing import Any

import pytest

from mergekit_moe.evaluation.comparison import GROUPS, ORACLE, assemble, comparison_rows, for_a_terminal, write_tables


def method(group: str, *losses: tuple[float, float], **more: Any) -> dict[str, Any]:
    seeds = {
        str(seed): {"domains": {"law": {"loss": law}, "art": {"loss": art}}, **more}
        for seed, (law, art) in enumerate(losses)
    }
    return {"label": group, "group": group, "private": False, "seeds": seeds}


def methods() -> dict[str, Any]:
    stranger = {"strangers": {"nobody": {"loss": 2.0}}, "tokens_per_second": 100.0}
    worse = {"strangers": {"nobody": {"loss": 2.2}}, "tokens_per_second": 90.0, "seconds": {"merge": 1, "router": 2}}
    return {
        "seed": method("reference", (4.0, 5.0), (4.0, 5.0), **stranger),
        "expert-law": method("reference", (2.0, 6.0), (3.0, 6.0)),
        "expert-art": method("reference", (4.5, 4.0), (4.5, 3.0)),
        ORACLE: method("reference"),
        "ours": method("ours", (2.2, 4.1), (3.0, 4.0), **worse),
    }


def test_retention_is_what_is_kept_of_the_own_experts_gain() -> None:
    found = assemble(methods(), ["law", "art"])
    assert found["seeds"] == [0, 1] and found["metric"] == "loss"
    first, second = (found["methods"]["ours"]["seeds"][seed]["retention"] for seed in "01")
    assert first["by_domain"] == {"law": pytest.approx(0.9), "art": pytest.approx(0.9)}
    assert second["by_domain"] == {"law": pytest.approx(1.0), "art": pytest.approx(0.5)}
    assert second["mean"] == pytest.approx(0.75)
    oracle = found["methods"][ORACLE]["seeds"]["1"]
    assert oracle["domains"] == {"law": {"loss": 3.0}, "art": {"loss": 3.0}}
    assert oracle["retention"]["mean"] == pytest.approx(1.0)
    assert found["methods"]["seed"]["seeds"]["0"]["retention"]["mean"] == 0.0


def test_of_an_expert_that_learnt_nothing_there_is_nothing_to_keep() -> None:
    given = methods()
    given["expert-law"] = method("reference", (4.2, 6.0), (3.0, 6.0))
    kept = assemble(given, ["law", "art"])["methods"]["ours"]["seeds"]["0"]["retention"]
    assert kept == {"by_domain": {"law": None, "art": pytest.approx(0.9)}, "mean": pytest.approx(0.9)}


def test_what_is_judged_by_other_rows_is_held_against_what_the_others_make_of_those() -> None:
    given = methods()
    own = {"seed": 8.0, "expert-law": 6.0, "expert-art": 7.0}
    result = given["ours"]["seeds"]["0"]
    result["references"] = {name: {d: {"loss": loss} for d in ("law", "art")} for name, loss in own.items()}
    result["domains"] = {"law": {"loss": 7.0}, "art": {"loss": 7.0}}
    kept = assemble(given, ["law", "art"])["methods"]["ours"]["seeds"]["0"]["retention"]["by_domain"]
    assert kept == {"law": 0.5, "art": 1.0}


def test_a_method_that_ran_alone_has_no_retention_and_still_a_row() -> None:
    given = {name: method("reference") for name in methods()} | {"ours": method("ours", (2.0, 3.0))}
    found = assemble(given, ["law", "art"])
    assert list(found["methods"]) == ["ours"]
    assert found["methods"]["ours"]["seeds"]["0"]["retention"]["mean"] is None
    (row,) = comparison_rows(found, ("ours",))[1]
    assert row[:5] == ["**ours**", "2.000", "3.000", "2.500", "-"]


def test_a_vote_that_writes_no_answers_has_a_row_without_accuracy() -> None:
    given = methods()
    for made in given.values():
        for result in made["seeds"].values():
            for scores in result["domains"].values():
                scores["accuracy"] = 1 / scores["loss"]
    given["btm"] = method("baseline", (2.5, 4.5))
    found = assemble(given, ["law", "art"])
    assert found["metric"] == "accuracy"
    (row,) = comparison_rows(found, ("baseline",))[1]
    assert row[:5] == ["baseline", "-", "-", "-", "-"]


def test_tables_hold_means_and_spreads(tmp_path: Path) -> None:
    found = assemble(methods(), ["law", "art"])
    header, rows = comparison_rows(found, GROUPS["Methods"])
    ours = dict(zip(header, rows[-1], strict=True))
    assert ours["law"] == "2.600 ± 0.566"
    assert ours["average"] == "3.325 ± 0.247"
    assert ours["retention"] == "0.825 ± 0.106"
    assert ours["nobody: loss over seed's"] == "+10.0%"
    assert (ours["speed"], ours["unify, s"], ours["runs"]) == ("0.90", "3 ± 0", "2")
    write_tables(found, tmp_path)
    assert "| **ours** | 2.600 ± 0.566 |" in (tmp_path / "comparison.md").read_text()


def test_a_terminal_is_shown_the_means_alone() -> None:
    header, rows = for_a_terminal(*comparison_rows(assemble(methods(), ["law", "art"]), GROUPS["Methods"]))
    assert header == ["nats a token", "average", "retention", "routing acc.", "runs"]
    assert rows[-1] == ["**ours**", "3.325 ± 0.247", "0.825 ± 0.106", "-", "2"]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    assert sum(width + 2 for width in widths) <= 80
