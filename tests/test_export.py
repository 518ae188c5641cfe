"""Native exports: stock classes, the same logits where the router is plain, measured loss where it isn't."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dense, tiny_moe, tokens
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mergekit_moe import cli
from mergekit_moe.checkpoint import shards_of
from mergekit_moe.errors import DataError, ExportError, MetaMoeError, WorkspaceError
from mergekit_moe.export import fold, read_source, trained_gates, write_export
from mergekit_moe.exporting import export_model
from mergekit_moe.models import routers_of
from mergekit_moe.routing.refit import fold_bias
from mergekit_moe.routing.training import hold_out
from mergekit_moe.seed import train_tokenizer

PAIRS = [
    ("Llama", "mixtral"),
    ("Mistral", "mixtral"),
    ("Qwen3", "qwen3_moe"),
    ("Qwen2", "qwen2_moe"),
    ("Olmo2", "flex_olmo"),
]
PLAIN: dict[str, Any] = {"router_context": "none", "router_excluded_token_ids": []}


def saved(folder: Path, family: str, *, bias: bool = False, **settings: Any) -> Any:
    model = tiny_moe(family, **{**PLAIN, **settings})
    if not bias:
        for router in routers_of(model):
            torch.nn.init.zeros_(router.bias)
    model.save_pretrained(folder)
    return model


def stock(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def proxy_rows(n: int = 30) -> Dataset:
    """Rows of three experts, each from its own third of the vocabulary."""
    rows = []
    for i in range(n):
        ids = torch.randint(0, 31, (12,), generator=torch.Generator().manual_seed(i)) + 2 + 31 * (i % 3)
        ids = [1, *ids.tolist()]
        rows.append({"input_ids": ids, "labels": ids, "expert": i % 3})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("family", "target"), PAIRS)
def test_a_plain_router_is_exported_exactly(tmp_path: Path, family: str, target: str, top_k: int) -> None:
    # At top-1 even a normalised router input is exact: a token's length changes no choice.
    norm = {} if top_k == 1 else {"router_input_norm": False}
    ours = saved(tmp_path / "moe", family, num_experts_per_tok=top_k, **norm)
    report = export_model(tmp_path / "moe", target, tmp_path / "out")
    assert report["loss"] is None
    theirs = stock(tmp_path / "out")
    assert theirs.config.model_type == target
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()).logits, atol=1e-5, rtol=0)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(tokens(), **settings), ours.generate(tokens(), **settings))
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(("family", "target"), [pair for pair in PAIRS if pair[1] != "mixtral"])
def test_weights_without_renormalisation_survive_where_the_format_has_them(
    tmp_path: Path, family: str, target: str
) -> None:
    ours = saved(tmp_path / "moe", family, num_experts_per_tok=2, norm_topk_prob=False, router_input_norm=False)
    export_model(tmp_path / "moe", target, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(stock(tmp_path / "out")(tokens()).logits, ours(tokens()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ranks", [(2, 0, None), (None, None, None)], ids=str)
def test_anchors_and_dense_experts_are_exported_too(tmp_path: Path, ranks: tuple[int | None, ...]) -> None:
    ours = saved(tmp_path / "moe", "Llama", ranks=ranks)
    export_model(tmp_path / "moe", "mixtral", tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(stock(tmp_path / "out")(tokens()).logits, ours(tokens()).logits, atol=1e-5, rtol=0)


DETAILS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied embeddings": ("Llama", "mixtral", {"tie_word_embeddings": True}),
    "Llama 3 rope": (
        "Llama",
        "mixtral",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "head size": ("Llama", "mixtral", {"head_dim": 16}),
    "activation and norm": ("Llama", "mixtral", {"hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    "window": ("Mistral", "mixtral", {"sliding_window": 4}),
    "windows in some layers": (
        "Qwen2",
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "attention bias": ("Qwen3", "qwen3_moe", {"attention_bias": True}),
    "rope base": ("Olmo2", "flex_olmo", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
}


@pytest.mark.parametrize("case", DETAILS)
def test_details_of_the_configuration_arrive(tmp_path: Path, case: str) -> None:
    family, target, settings = DETAILS[case]
    ours = saved(tmp_path / "moe", family, **settings)
    export_model(tmp_path / "moe", target, tmp_path / "out")
    with torch.no_grad():
        expected = ours(tokens(length=20)).logits
        torch.testing.assert_close(stock(tmp_path / "out")(tokens(length=20)).logits, expected, atol=1e-5, rtol=0)


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    model = tiny_moe("Llama", **PLAIN).bfloat16()
    for router in routers_of(model):
        torch.nn.init.zeros_(router.bias)
    model.save_pretrained(tmp_path / "moe")
    export_model(tmp_path / "moe", "mixtral", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_small_buffer_writes_many_shards_of_the_same_model(tmp_path: Path) -> None:
    ours = saved(tmp_path / "moe", "Llama")
    source = read_source(tmp_path / "moe", "mixtral")
    (tmp_path / "out").mkdir()
    write_export(source, trained_gates(source), tmp_path / "out", shard_bytes=20_000)
    assert len(shards_of(tmp_path / "out", "out")) > 5
    with torch.no_grad():
        torch.testing.assert_close(stock(tmp_path / "out")(tokens()).logits, ours(tokens()).logits, atol=1e-5, rtol=0)


def test_folding_is_done_in_float64_and_stored_in_the_models_dtype(tmp_path: Path) -> None:
    saved(tmp_path / "moe", "Llama")
    export_model(tmp_path / "moe", "mixtral", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "out"))
    block = "model.layers.1.mlp"
    for projection, name in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        a, b = (before[f"{block}.experts.2.{projection}.lora_{f}.weight"].double().numpy() for f in "AB")
        expected = before[f"{block}.{projection}.weight"].double().numpy() + 1.5 * b @ a
        given = after[f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"]
        np.testing.assert_array_equal(given.numpy(), expected.astype(np.float32))
    half = fold(torch.ones(2, 3).bfloat16(), torch.ones(1, 3), torch.ones(2, 1), 0.5)
    assert half.dtype == torch.bfloat16


def test_bias_folding_equals_least_squares() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 7)) + 0.7
    weight, bias = rng.normal(size=(3, 7)), rng.normal(size=3)
    expected = np.linalg.lstsq(features, features @ weight.T + bias, rcond=None)[0].T
    mean, second = features.mean(0), features.T @ features / len(features)
    given = fold_bias(*(torch.from_numpy(x) for x in (weight, bias, mean, second)))
    np.testing.assert_allclose(given.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "target", "top_k"), [("Llama", "mixtral", 1), ("Qwen3", "qwen3_moe", 2), ("Olmo2", "flex_olmo", 2)]
)
def test_what_a_refit_from_context_costs_is_measured(tmp_path: Path, family: str, target: str, top_k: int) -> None:
    context = {"router_context": "prefix", "router_excluded_token_ids": [1], "num_experts_per_tok": top_k}
    context["router_adds_layers"] = True
    ours = saved(tmp_path / "moe", family, bias=True, **context)
    report = export_model(tmp_path / "moe", target, tmp_path / "out", proxy_rows())
    assert report == json.loads((tmp_path / "out" / "export_report.json").read_text())
    theirs = stock(tmp_path / "out")
    held_out = hold_out(proxy_rows())[1]
    ids = torch.tensor(held_out["input_ids"][:])
    with torch.no_grad():
        mine = ours(ids, labels=ids, output_router_logits=True)
        other = theirs(ids, labels=ids, output_router_logits=True)
    shares = []
    for a, b in zip(mine.router_logits, other.router_logits, strict=True):
        a, b = a[:, 1:].reshape(-1, 3), b.reshape(*ids.shape, 3)[:, 1:].reshape(-1, 3)
        sets = zip(a.topk(top_k).indices.tolist(), b.topk(top_k).indices.tolist(), strict=True)
        shares.append(np.mean([set(x) == set(y) for x, y in sets]))
    np.testing.assert_allclose(report["routing_agreement"]["per_layer"], shares, atol=1e-9)
    assert report["routing_agreement"]["tokens"] == len(a)
    with torch.no_grad():
        losses = [float(model(ids, labels=ids, use_cache=False).loss) for model in (ours, theirs)]
    np.testing.assert_allclose([report["loss"]["unified"], report["loss"]["export"]], losses, atol=1e-5)
    assert "[1] go to the seed's FFN" in " ".join(report["notes"])
    assert f"{report['loss']['export']:.4f}" in (tmp_path / "out" / "README.md").read_text()


def test_a_trained_bias_without_context_is_folded_not_refitted(tmp_path: Path) -> None:
    saved(tmp_path / "moe", "Llama", bias=True)
    report = export_model(tmp_path / "moe", "mixtral", tmp_path / "out", proxy_rows())
    assert report["gates"] == "as trained, bias folded in"
    assert 0.0 < report["routing_agreement"]["mean"] <= 1.0


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_normalised_input_is_kept_where_it_changes_a_choice_alone(tmp_path: Path, renormalise: bool) -> None:
    """By Eq. 6 an expert's weight is a probability, which a gate without that normalisation has to learn anew."""
    saved(tmp_path / "moe", "Olmo2", bias=True, norm_topk_prob=renormalise)
    report = export_model(tmp_path / "moe", "flex_olmo", tmp_path / "out", proxy_rows())
    assert report["gates"].startswith("as trained" if renormalise else "fitted again")


REFUSED = {
    "family": ("Gemma", "mixtral", {}, "gemma model can't be exported as mixtral; no native format fits"),
    "other": ("Qwen3", "mixtral", {}, "qwen3 model can't be exported as mixtral; it can become qwen3_moe"),
    "format": ("Llama", "gguf", {}, "no export format is called 'gguf'; allowed are mixtral, "),
    "layers": (
        "Llama",
        "mixtral",
        {"router_adds_layers": True},
        "its routers add up what earlier layers said, and mixtral gates are plain",
    ),
    "mlp bias": ("Llama", "mixtral", {"mlp_bias": True}, "no place for the bias model.layers.0.mlp"),
    "attention bias": ("Llama", "mixtral", {"attention_bias": True}, "no place for the bias model.layers.0.self_attn"),
    "Eq. 6": ("Llama", "mixtral", {"norm_topk_prob": False}, "always renormalises"),
    "context": ("Llama", "mixtral", {"router_context": "prefix"}, "routers use context, .* give the proxies"),
    "bias": ("Llama", "mixtral", {"bias": True}, "routers have biases, .* give the proxies"),
    "norm": ("Olmo2", "flex_olmo", {"num_experts_per_tok": 2}, "normalise their input, .* give the proxies"),
    "norm, Eq. 6": ("Olmo2", "flex_olmo", {"norm_topk_prob": False}, "normalise their input, .* give the proxies"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_cannot_say_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    family, target, settings, message = REFUSED[case]
    saved(tmp_path / "moe", family, **settings)
    with pytest.raises(ExportError, match=message):
        export_model(tmp_path / "moe", target, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_damage_found_while_writing_leaves_nothing(tmp_path: Path) -> None:
    model = saved(tmp_path / "moe", "Llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "moe")
    with pytest.raises(MetaMoeError, match=r"model\.norm\.weight holds NaN"):
        export_model(tmp_path / "moe", "mixtral", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_a_dense_model_a_taken_folder_and_missing_proxies_are_refused(tmp_path: Path) -> None:
    tiny_dense().save_pretrained(tmp_path / "dense")
    with pytest.raises(ExportError, match="type 'llama', not one that"):
        export_model(tmp_path / "dense", "mixtral", tmp_path / "out")
    with pytest.raises(MetaMoeError, match=r"has no config\.json"):
        export_model(tmp_path / "nowhere", "mixtral", tmp_path / "out")
    saved(tmp_path / "moe", "Llama")
    with pytest.raises(WorkspaceError, match="is there already"):
        export_model(tmp_path / "moe", "mixtral", tmp_path / "dense")
    with pytest.raises(DataError, match="no row of the expert 'e2'"):
        export_model(tmp_path / "moe", "mixtral", tmp_path / "out", proxy_rows().filter(lambda row: row["expert"] < 2))


def test_the_command_exports_with_proxies_and_ends_in_code_2_on_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def metamoe(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["metamoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        return int(leaving.value.code or 0)

    saved(tmp_path / "moe", "Llama", bias=True, router_context="prefix", vocab_size=300)
    train_tokenizer(["the quick brown fox jumps over the lazy dog 0123456789"] * 3, 300).save_pretrained(
        tmp_path / "moe"
    )
    given = ["export", tmp_path / "moe", "--out", tmp_path / "out", "--format"]
    assert metamoe(*given, "mixtral") == 2
    assert "give the proxies" in capsys.readouterr().err
    rows = [
        {"text": f"the {word} fox {i}", "expert": f"e{e}"}
        for e, word in enumerate(("lazy", "quick", "brown"))
        for i in range(10)
    ]
    proxies = tmp_path / "proxies.jsonl"
    proxies.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert metamoe(*given, "mixtral", "--proxies", tmp_path / "none.jsonl") == 2
    assert metamoe(*given, "mixtral", "--proxies", proxies) == 0
    assert "routing agreement" in capsys.readouterr().out
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "moe" / file).read_bytes()
    stock(tmp_path / "out")


def test_a_recipe_whose_base_cannot_become_the_format_is_stopped_by_check(tmp_path: Path) -> None:
    from test_pipeline import metamoe, tiny_recipe

    recipe = tiny_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + "\nexport: [qwen3_moe]\n")
    done = metamoe("check", recipe, check=False)
    assert done.returncode == 2
    assert "a llama model can't be exported as qwen3_moe; it can become mixtral" in done.stderr


def test_a_recipe_that_asks_for_exports_gets_them_last(tmp_path: Path) -> None:
    from test_pipeline import metamoe, tiny_recipe

    recipe = tiny_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + "\nexport: [mixtral]\n")
    metamoe("run", recipe, "--workspace", tmp_path / "out")
    folder = tmp_path / "out" / "export" / "mixtral"
    report = json.loads((folder / "export_report.json").read_text())
    assert 0.0 < report["routing_agreement"]["mean"] <= 1.0
    assert str(tmp_path) not in (folder / "README.md").read_text() + (folder / "config.json").read_text()
    stock(folder)
    assert "export/mixtral: up to date" in metamoe("run", recipe, "--workspace", tmp_path / "out").stdout
