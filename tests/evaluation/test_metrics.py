"""Metrics by hand-worked numbers, and losses against the model's own."""

import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_dense, tiny_moe, tokens, write_adapter
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mergekit_moe.data import IGNORED
from mergekit_moe.evaluation.compare import Domain, _expert_losses, routing_accuracy
from mergekit_moe.evaluation.losses import row_losses
from mergekit_moe.evaluation.metrics import Retention, RoutingAccuracy, TokenLoss
from mergekit_moe.models import recorded_routers
from mergekit_moe.recipe import Evaluation


def test_token_loss_weighs_rows_by_their_tokens() -> None:
    result = TokenLoss().compute(predictions=[2.0, 30.0], references=[1, 9])
    assert result == {"loss": pytest.approx(3.2), "perplexity": pytest.approx(math.exp(3.2))}


def test_retention_is_the_share_of_the_gain_that_is_kept() -> None:
    result = Retention().compute(predictions=[3.0, 2.5, 1.0], references=[[4.0, 2.0], [3.0, 2.0], [1.0, 1.0]])
    assert result["retention"] == [0.5, 0.5, None]
    assert result["mean_retention"] == 0.5


def test_routing_accuracy_adds_batches_up_layer_by_layer() -> None:
    result = RoutingAccuracy().compute(predictions=[[0, 3], [1, 4], [0, 1], [1, 0]], references=[4, 4, 6, 6])
    assert result == {"routing_accuracy_by_layer": [0.4, 0.4], "routing_accuracy": 0.4}


def rows() -> Dataset:
    made = []
    for i in range(5):
        ids = tokens(1, 4 + i, seed=i)[0].tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]})
    return Dataset.from_list(made)


def test_row_losses_are_the_models_own_however_they_are_batched() -> None:
    model = tiny_moe("Llama")
    sums, counts = row_losses(model, rows(), batch_size=3)
    for row, total, count in zip(rows(), sums, counts, strict=True):
        with torch.no_grad():
            own = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert count == len(row["input_ids"]) - 2
        assert total / count == pytest.approx(float(own), abs=1e-5)


def test_routing_accuracy_counts_what_the_routers_said() -> None:
    model, settings = tiny_moe("Llama"), Evaluation(batch_size=2)
    found = routing_accuracy(model, Domain(1, "law", rows()), settings)
    right, count = [0, 0, 0], 0
    with recorded_routers(model) as calls, torch.no_grad():
        for row in rows():
            model(torch.tensor([row["input_ids"]]))
            count += len(row["input_ids"]) - 1
            for layer, call in enumerate(calls):
                right[layer] += int((call.logits[0, 1:].argmax(-1) == 1).sum())
    assert found["routing_accuracy_by_layer"] == [hits / count for hits in right]


def test_the_soup_is_the_plain_average_of_all_weights(base_folder: Path, tmp_path: Path) -> None:
    """Adapters of several scales, by the formula in float64, and a whole model that changed every weight."""
    settings = {"train": {"use_rslora": True, "lora_alpha": 8}, "keys": {"r": 2, "lora_alpha": 3}, "law": {}}
    experts = {
        name: write_adapter(base_folder, tmp_path / name, i, **s) for i, (name, s) in enumerate(settings.items())
    }
    scales = {"train": 8 / 4**0.5, "keys": 3 / 2, "law": 6 / 4}
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    average = {name: 3 * tensor.double() for name, tensor in base.state_dict().items()}
    for name, folder in experts.items():
        tensors = load_file(folder / "adapter_model.safetensors")
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            lora_A, lora_B = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            weight = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            average[weight] += scales[name] * lora_B @ lora_A
    tuned = tiny_dense(vocab_size=base.config.vocab_size, eos_token_id=2, seed=7)
    tuned.save_pretrained(tmp_path / "tuned")
    experts["tuned"] = tmp_path / "tuned"
    average = {name: (tensor + tuned.state_dict()[name].double()) / 4 for name, tensor in average.items()}
    domain = Domain(0, "train", rows())
    losses = _expert_losses(base_folder, experts, [domain], Evaluation())
    base.double().load_state_dict(average)
    sums, counts = row_losses(base, domain.rows, 4)
    assert losses["soup"]["train"]["loss"] == pytest.approx(sum(sums) / sum(counts), abs=1e-5)
    sums, counts = row_losses(tuned, domain.rows, 4)
    assert losses["tuned"]["train"]["loss"] == pytest.approx(sum(sums) / sum(counts), abs=1e-5)
