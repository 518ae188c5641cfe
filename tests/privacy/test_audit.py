"""Audits: what the attacks find, what noise does to them, and what the command says."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from privacy_data import SHARE, made_up, routing_accuracy, statistic, traced
from test_pipeline import sentences, tiny_recipe

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def aucs() -> dict[float | None, float]:
    """Tracing at N = 100, by epsilon (None: no noise), mean over draws."""
    return {e: float(np.mean([traced(100, e, seed) for seed in range(12)])) for e in (None, 2.0)}


def test_noise_at_epsilon_2_hides_who_is_in_a_mean_of_100_texts(aucs: dict[float | None, float]) -> None:
    assert aucs[None] > 0.8
    assert aucs[2.0] < 0.6


def test_and_costs_about_a_twentieth_of_the_tokens_their_expert() -> None:
    plain, noised = (np.mean([routing_accuracy(100, e, seed) for seed in range(6)]) for e in (None, 2.0))
    assert 0.85 < plain < 0.99
    assert 0.02 < plain - noised < 0.08


def test_the_made_up_texts_are_what_they_are_said_to_be() -> None:
    texts = made_up(4000, 0, seed=1).flatten(1)
    shift = texts.mean(0).square().sum()
    assert float(shift / texts.square().sum(1).mean()) == pytest.approx(SHARE, abs=0.03)
    assert (
        statistic(texts[:50].reshape(50, *made_up(1, 0, seed=1).shape[1:]), None, 0).shape == made_up(1, 0, 1).shape[1:]
    )


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """One client that learns its rows by heart, published and audited: recipe, workspace, what was printed."""
    from test_pipeline import metamoe

    folder = tmp_path_factory.mktemp("audit")
    recipe = tiny_recipe(folder)
    values = yaml.safe_load(recipe.read_text())
    values["experts"] = values["experts"][:1]
    values["alignment"] |= {"max_steps": 500, "rank": 32, "alpha": 64, "learning_rate": 5e-3, "proxies": False}
    values["selection"]["budget"] = 10
    recipe.write_text(yaml.safe_dump(values))
    for verb in ("select", "seed", "align", "publish"):
        metamoe(verb, recipe, "--workspace", folder / "ws")
    return recipe, folder / "ws", metamoe("audit", recipe, "--workspace", folder / "ws").stdout


def test_an_expert_that_learnt_canaries_by_heart_is_found_out(audited: tuple[Path, Path, str]) -> None:
    report = json.loads((audited[1] / "audit" / "audit.json").read_text())["cooking"]
    found = {(test["texts"], test["test"].split()[0]): test for test in report["tests"]}
    assert set(found) == {(texts, test) for texts in ("rows", "canaries") for test in ("loss", "tracing")}
    assert found["canaries", "loss"]["auc"] > 0.95
    assert found["canaries", "loss"]["tpr_at_1pct_fpr"] > 0.5
    assert found["canaries", "loss"]["members"] == found["canaries", "loss"]["others"] >= 10
    assert report["tpr_that_the_total_allows"] is None, "residency allows anything"


def test_the_audit_prints_tests_beside_the_ledger(audited: tuple[Path, Path, str]) -> None:
    for expected in ("TPR at 1% FPR", "adapter_model.safetensors", "residency", "canaries", "tracing on the routing"):
        assert expected in audited[2]


def test_an_audit_leaves_no_text_and_touches_no_published_file(audited: tuple[Path, Path, str]) -> None:
    _, workspace, printed = audited
    written = printed + "".join(path.read_text() for path in (workspace / "audit").iterdir())
    assert not [row["text"] for row in sentences("cooking", 60, 1) if row["text"] in written]
    assert {path.name for path in (workspace / "audit").iterdir()} == {"audit.json", "manifest.json"}
    manifest = json.loads((workspace / "experts" / "cooking" / "manifest.json").read_text())
    assert "canary" not in json.dumps(manifest)


def test_an_audit_needs_a_published_client(tmp_path: Path, command: Command) -> None:
    recipe = tiny_recipe(tmp_path)
    code, _, error = command("audit", recipe, "--workspace", tmp_path / "ws")
    assert code == 2
    assert "run `metamoe select` on this recipe first" in error
    assert len(error.splitlines()) == 1


def test_a_recipe_without_clients_has_nothing_to_audit(tmp_path: Path, command: Command) -> None:
    recipe = tiny_recipe(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    values["experts"] = [{"name": "law", "source": "org/law"}, {"name": "code", "source": "org/code"}]
    recipe.write_text(yaml.safe_dump(values))
    code, _, error = command("audit", recipe, "--workspace", tmp_path / "ws")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "this recipe has no client" in error


def test_no_noise_is_the_same_mean() -> None:
    texts = made_up(30, 1, seed=2)
    torch.testing.assert_close(statistic(texts, None, 0), texts.mean(0))
