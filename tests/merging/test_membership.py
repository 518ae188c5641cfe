"""Experts added and dropped: the same bytes as a merge of the new set, and what is inside a model."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tokens, write_adapter, write_jsonl
from merging_tools import merge, read
from safetensors.torch import load_file
from test_fine_tunes import fine_tune, load, pinned

from mergekit_moe.checkpoint import weights_fingerprint
from mergekit_moe.errors import ExpertError, WorkspaceError
from mergekit_moe.experts import Expert
from mergekit_moe.exporting import proxies_from_file
from mergekit_moe.members import add_expert, drop_expert, inspect_model
from mergekit_moe.models import load_model, routers_of
from mergekit_moe.recipe import Router
from mergekit_moe.routing.training import fit_routers

DATA_FREE = [Router(start="random"), Router(start="arrow", context="none"), Router(start="random", context="prompt")]


@pytest.fixture
def sources(base_folder: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "plain": write_adapter(base_folder, tmp_path / "plain", 1),
        "tuned": fine_tune(base_folder, tmp_path / "tuned", 2),
        "pattern": write_adapter(base_folder, tmp_path / "pattern", 3, rank_pattern={"layers.1.mlp.up_proj": 2}),
        "dora": write_adapter(base_folder, tmp_path / "dora", 4, use_dora=True),
    }


def experts(base: Path, sources: dict[str, Path], *names: str) -> list[Expert]:
    return [read(base, sources[name], name) for name in names]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("router", DATA_FREE, ids=str)
@pytest.mark.parametrize("name", ["plain", "tuned", "pattern", "dora"])
def test_dropping_equals_never_having_merged_it(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path], name: str, router: Router
) -> None:
    whole = merge(base_folder, experts(base_folder, sources, *sources), tmp_path / "whole", router, anchor=True)
    others = [other for other in sources if other != name]
    expected = merge(base_folder, experts(base_folder, sources, *others), tmp_path / "without", router, anchor=True)
    drop_expert(whole, name, tmp_path / "dropped")
    assert contents(tmp_path / "dropped") == contents(expected)


@pytest.mark.parametrize("router", DATA_FREE, ids=str)
@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("first", ["plain", "tuned"])
@pytest.mark.parametrize("name", ["tuned", "pattern", "dora"])
def test_adding_equals_having_merged_it(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path], name: str, first: str, anchor: bool, router: Router
) -> None:
    """Whole FFNs first or factored ones: what is added is added to the base's own."""
    more = (
        {**sources, "tuned": fine_tune(base_folder, tmp_path / "again" / "tuned", 7)}
        if first == name == "tuned"
        else sources
    )
    order = [*sorted((other for other in sources if other != name), key=lambda other: other != first), name]
    sources = more
    expected = merge(base_folder, experts(base_folder, sources, *order), tmp_path / "whole", router, anchor=anchor)
    fewer = merge(base_folder, experts(base_folder, sources, *order[:-1]), tmp_path / "fewer", router, anchor=anchor)
    add_expert(fewer, str(sources[name]), tmp_path / "added", name=name)
    assert contents(tmp_path / "added") == contents(expected)


def test_whole_experts_come_and_go_where_no_seed_ffn_is_left(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path]
) -> None:
    more = {**sources, "other": fine_tune(base_folder, tmp_path / "other", 5)}
    two = merge(base_folder, experts(base_folder, more, "tuned", "other"), tmp_path / "two", DATA_FREE[0])
    add_expert(two, str(fine_tune(base_folder, tmp_path / "third", 6)), tmp_path / "three", name="third")
    drop_expert(tmp_path / "three", "third", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(two)
    with torch.no_grad():
        own = load(tmp_path / "third")(tokens()).logits
    torch.testing.assert_close(pinned(load(tmp_path / "three"), 2), own, atol=1e-6, rtol=0)
    with pytest.raises(ExpertError, match=r"expert 'plain' is an adapter, and .* holds no FFN of the base"):
        add_expert(two, str(sources["plain"]), tmp_path / "none", name="plain")
    mixed = merge(base_folder, experts(base_folder, more, "tuned", "other", "plain"), tmp_path / "mixed", DATA_FREE[0])
    drop_expert(mixed, "plain", tmp_path / "pure")
    assert contents(tmp_path / "pure") == contents(two)


@pytest.mark.parametrize("router", [DATA_FREE[0], DATA_FREE[1]], ids=str)
def test_what_needs_the_seed_s_ffn_is_refused_where_none_is_left(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path], router: Router
) -> None:
    """Tokens of no domain take it, and a row by what an expert changed is made of it."""
    more = {**sources, "other": fine_tune(base_folder, tmp_path / "other", 5)}
    two = merge(base_folder, experts(base_folder, more, "tuned", "other"), tmp_path / "two", router)
    third = fine_tune(base_folder, tmp_path / "third", 6)
    if router.start == "random":
        about = {"name": "third", "domain_free_token_ids": [5, 6]}
        (third / "expert.json").write_text(json.dumps(about))
    with pytest.raises(ExpertError, match=r"expert 'third' needs the base's FFN, which .* doesn't hold; merge again"):
        add_expert(two, str(third), tmp_path / "three", name="third")
    assert not (tmp_path / "three").exists()


def test_fitted_routers_are_fitted_again_without_touching_an_expert(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path]
) -> None:
    """A closed form over the proxies of all: adding or dropping equals the fit of the whole set, in any order."""
    words = {"plain": "quick brown fox", "tuned": "over the lazy dog", "pattern": "0123 456 789"}
    rows = [{"text": f"{text} {i}", "expert": name} for name, text in words.items() for i in range(12)]
    proxies = write_jsonl(tmp_path / "proxies.jsonl", rows)
    router = Router(start="lda", context_weight=0.8, add_layers=True)
    two = merge(base_folder, experts(base_folder, sources, "plain", "tuned"), tmp_path / "two", router)
    with pytest.raises(ExpertError, match="were fitted on proxies, and the new expert's rows need its own"):
        add_expert(two, str(sources["pattern"]), tmp_path / "none", name="pattern")
    add_expert(two, str(sources["pattern"]), tmp_path / "three", name="pattern", proxies=proxies)
    drop_expert(tmp_path / "three", "pattern", tmp_path / "dropped", proxies=proxies)
    drop_expert(tmp_path / "three", "tuned", tmp_path / "one-less", proxies=proxies)
    add_expert(tmp_path / "one-less", str(sources["tuned"]), tmp_path / "again", name="tuned", proxies=proxies)
    three, again = load_model(tmp_path / "three"), load_model(tmp_path / "again")
    assert three.config.router_adds_layers
    assert again.config.router_adds_layers
    for one, other in zip(routers_of(three), routers_of(again), strict=True):
        assert one.weight.abs().max() > 0
        torch.testing.assert_close(one.weight[[0, 2, 1]], other.weight, atol=1e-6, rtol=1e-4)
        assert float(torch.sigmoid(one.context_logit)) == pytest.approx(0.8, abs=1e-6)
    drop_expert(tmp_path / "again", "pattern", tmp_path / "other-way", proxies=proxies)
    dropped, other_way = load_model(tmp_path / "dropped"), load_model(tmp_path / "other-way")
    for one, other in zip(routers_of(dropped), routers_of(other_way), strict=True):
        assert one.weight.shape[0] == 2
        torch.testing.assert_close(one.weight, other.weight, atol=1e-6, rtol=1e-4)
    before, after = load_file(two / "model-00002-of-00003.safetensors"), three.state_dict()
    single = load_model(two).state_dict()
    assert before
    assert all(torch.equal(tensor, single[name]) for name, tensor in after.items() if name.startswith("model.embed"))
    for number in (0, 1):
        torch.testing.assert_close(pinned(load(two), number), pinned(load(tmp_path / "three"), number), atol=0, rtol=0)


@pytest.mark.parametrize("start", ["lda", "ridge"])
@pytest.mark.parametrize("names", [("plain", "dora", "pattern"), ("plain", "tuned", "pattern")])
def test_an_added_expert_s_routers_are_those_of_the_recipe_for_all(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path], start: str, names: tuple[str, ...]
) -> None:
    """By the same closed form, as shrunk, of the same paths: that of the seed lies in the model still."""
    words = dict(zip(names, ("quick brown fox", "over the lazy dog", "0123 456 789"), strict=True))
    rows = [{"text": f"{i} {text} " * 4, "expert": name} for name, text in words.items() for i in range(12)]
    proxies = write_jsonl(tmp_path / "proxies.jsonl", rows)
    router = Router(start=start, context_weight=0.8, shrinkage=0.3, training=None, max_length=16)
    whole = merge(base_folder, experts(base_folder, sources, *names), tmp_path / "whole", router, top_k=2)
    (tmp_path / "expected").mkdir()
    tokenised = proxies_from_file(proxies, whole, router.max_length)
    fit_routers(whole, tokenised, router, published={}, seed=0, out=tmp_path / "expected", base=base_folder)
    two = merge(base_folder, experts(base_folder, sources, *names[:2]), tmp_path / "two", router, top_k=2)
    add_expert(two, str(sources[names[2]]), tmp_path / "added", name=names[2], proxies=proxies)
    expected, added = contents(tmp_path / "expected"), contents(tmp_path / "added")
    assert expected.keys() == added.keys()
    assert {name for name in expected if expected[name] != added[name]} <= {"merge.json", "router_training.json"}
    before = load_model(whole)
    assert not any(
        torch.equal(router.weight, blank.weight)
        for router, blank in zip(routers_of(load_model(tmp_path / "added")), routers_of(before), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "has no expert 'nobody'; it has plain, tuned, pattern"),
        ("average", "expert 'plain' can't be dropped: outside the FFNs, .* holds the mean over its experts"),
        ("last", "expert 'plain' can't be dropped: 1 would be left"),
    ],
)
def test_what_cannot_be_dropped_is_one_sentence(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path], name: str, message: str
) -> None:
    members = ["plain", "tuned"] if name == "last" else ["plain", "tuned", "pattern"]
    policy = {"other_weights": "average"} if name == "average" else {}
    model = merge(base_folder, experts(base_folder, sources, *members), tmp_path / "moe", DATA_FREE[0], **policy)
    with pytest.raises(ExpertError, match=message):
        drop_expert(model, "nobody" if name == "nobody" else "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_cannot_be_added_is_one_sentence(base_folder: Path, tmp_path: Path, sources: dict[str, Path]) -> None:
    model = merge(base_folder, experts(base_folder, sources, "plain", "tuned"), tmp_path / "moe", DATA_FREE[0])
    with pytest.raises(ExpertError, match="already has an expert 'plain'"):
        add_expert(model, str(sources["pattern"]), tmp_path / "out", name="plain")
    with pytest.raises(WorkspaceError, match="is there already"):
        add_expert(model, str(sources["pattern"]), model, name="pattern")
    with pytest.raises(ExpertError, match="holds a model of type 'llama', not one that `metamoe merge` made"):
        add_expert(base_folder, str(sources["pattern"]), tmp_path / "out", name="pattern")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("router", {"start": "magic"}, r"merge\.json: router: start: input should be 'uniform', .* got 'magic'"),
        ("router", {"rooter": 1}, r"merge\.json: router: unknown key 'rooter'; did you mean 'router'\?|allowed are"),
        ("merge", {"top_k": 0}, r"merge\.json: merge: top_k: input should be greater than or equal to 1, got 0"),
        ("merge", 3, r"merge\.json: merge: input should be a valid dictionary"),
    ],
)
def test_a_report_changed_by_hand_is_one_sentence(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path], part: str, value: object, sentence: str
) -> None:
    model = merge(base_folder, experts(base_folder, sources, "plain", "tuned"), tmp_path / "moe", DATA_FREE[0])
    report = json.loads((model / "merge.json").read_text())
    (model / "merge.json").write_text(json.dumps(report | {part: value}))
    for ask in (lambda: inspect_model(model), lambda: drop_expert(model, "plain", tmp_path / "out")):
        with pytest.raises(ExpertError, match=sentence) as raised:
            ask()
        assert "\n" not in str(raised.value) and "pydantic" not in str(raised.value)


def test_inspect_tells_what_was_merged(base_folder: Path, tmp_path: Path, sources: dict[str, Path]) -> None:
    (sources["plain"] / "README.md").write_text("---\nlicense: mit\n---\n")
    members = experts(base_folder, sources, "plain", "tuned", "pattern")
    out = merge(base_folder, members, tmp_path / "moe", Router(start="random", add_layers=True), anchor=True)
    found = inspect_model(out)
    assert found["router"] == {"start": "random", "context": "prefix", "adds_layers": True}
    assert [expert["name"] for expert in found["experts"]] == ["plain", "tuned", "pattern", "anchor"]
    assert found["base_model"] == {"source": "base", "revision": None}
    plain, tuned, pattern, anchor = found["experts"]
    assert (plain["license"], plain["kept"]) == ("mit", "factored, exact")
    assert plain["ranks"] == dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4)
    assert pattern["ranks"]["up_proj"] == [4, 2, 4]
    assert (tuned["kept"], tuned["ranks"]) == ("whole FFNs", None)
    assert plain["bytes"] == 3 * 4 * 3 * 4 * (32 + 48)
    assert tuned["bytes"] == 3 * 4 * 3 * 32 * 48
    assert anchor["bytes"] == 0
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0 < size - found["bytes"] < 0.05 * size
    rows = torch.stack([router.weight.detach().norm(dim=1) for router in routers_of(load_model(out))]).mean(0)
    assert [expert["router_norm"] for expert in found["experts"]] == pytest.approx(rows.tolist())
    assert json.dumps(found)


def test_uniform_routers_stay_uniform_as_experts_come_and_go(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path]
) -> None:
    router = Router(start="uniform")
    two = merge(base_folder, experts(base_folder, sources, "plain", "dora"), tmp_path / "two", router, top_k=2)
    three = merge(
        base_folder, experts(base_folder, sources, "plain", "dora", "tuned"), tmp_path / "three", router, top_k=3
    )
    add_expert(two, str(sources["tuned"]), tmp_path / "added", name="tuned")
    drop_expert(three, "tuned", tmp_path / "dropped")
    assert contents(tmp_path / "added") == contents(three)
    assert contents(tmp_path / "dropped") == contents(two)


def test_a_model_without_its_anchor_is_one_that_never_had_it(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path]
) -> None:
    order = ("plain", "dora", "pattern")
    two = merge(
        base_folder, experts(base_folder, sources, *order[:2]), tmp_path / "two", Router(start="random"), anchor=True
    )
    drop_expert(two, "anchor", tmp_path / "dropped")
    add_expert(tmp_path / "dropped", str(sources["pattern"]), tmp_path / "added", name="pattern")
    expected = merge(base_folder, experts(base_folder, sources, *order), tmp_path / "three", Router(start="random"))
    assert contents(tmp_path / "added") == contents(expected)


def test_routers_made_from_weights_can_be_fitted_later_and_are_then_fitted_ones(
    base_folder: Path, tmp_path: Path, sources: dict[str, Path]
) -> None:
    words = {"plain": "quick brown fox", "dora": "over the lazy dog", "pattern": "0123 456 789"}
    rows = [{"text": f"{text} {i}", "expert": name} for name, text in words.items() for i in range(12)]
    proxies = write_jsonl(tmp_path / "proxies.jsonl", rows)
    members = experts(base_folder, sources, "plain", "dora")
    outcomes = []
    for start in ("arrow", "lda"):
        two = merge(base_folder, members, tmp_path / f"two-{start}", Router(start=start, context="none"))
        add_expert(two, str(sources["pattern"]), tmp_path / f"three-{start}", name="pattern", proxies=proxies)
        outcomes.append(contents(tmp_path / f"three-{start}"))
    assert outcomes[0] == outcomes[1]
    with pytest.raises(ExpertError, match="were fitted on proxies"):
        add_expert(tmp_path / "three-arrow", str(sources["tuned"]), tmp_path / "four", name="tuned")


def test_an_expert_of_another_base_is_not_added(base_folder: Path, tmp_path: Path, sources: dict[str, Path]) -> None:
    """Its own word about its base counts where the merge knew the base's fingerprint, and vouches for nothing else."""
    fingerprint = weights_fingerprint(base_folder, "base")
    (sources["plain"] / "expert.json").write_text(json.dumps({"base_weights": fingerprint}))
    (sources["pattern"] / "expert.json").write_text(json.dumps({"base_weights": "f" * 64}))
    two = merge(base_folder, experts(base_folder, sources, "plain", "tuned"), tmp_path / "two", DATA_FREE[0])
    with pytest.raises(ExpertError, match="expert 'pattern': it was trained on another base model"):
        add_expert(two, str(sources["pattern"]), tmp_path / "three", name="pattern")
    for name in ("anchor", "soup", "../up", "Law"):
        with pytest.raises(ExpertError, match="an expert's name is of small letters"):
            add_expert(two, str(sources["dora"]), tmp_path / "three", name=name)
