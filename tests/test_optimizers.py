"""What a recipe says of the optimizer is what steps are taken by."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import tiny_dense, tokens
from datasets import Dataset
from pydantic import ValidationError
from torch import Tensor

from mergekit_moe.data import collate
from mergekit_moe.recipe import Alignment, Training
from mergekit_moe.training import train

TRAINED = "model.layers.0.mlp.down_proj.weight"
STEPS = 4


def rows() -> Dataset:
    """As many as a batch holds, so that every step sees them all."""
    texts = tokens(4, 9).tolist()
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in texts])


def one_weight_trains() -> torch.nn.Module:
    """Return a float64 model of which one matrix trains."""
    model = tiny_dense().double().train()
    model.requires_grad_(False)
    model.get_parameter(TRAINED).requires_grad_(True)
    return model


def stepped_by_hand(settings: Training) -> Tensor:
    """SGD as its definition has it: v = momentum v + (g + decay w), w = w - rate v, g no longer than the limit."""
    model = one_weight_trains()
    weight = model.get_parameter(TRAINED)
    batch = collate(list(rows()))
    velocity = torch.zeros_like(weight)
    for _ in range(STEPS):
        (gradient,) = torch.autograd.grad(model(**batch).loss, weight)
        if settings.max_grad_norm:
            gradient = gradient * min(1.0, settings.max_grad_norm / float(gradient.norm()))
        velocity = settings.momentum * velocity + gradient + settings.weight_decay * weight.detach()
        weight.data = weight.data - settings.learning_rate * velocity
    return weight.data


@pytest.mark.parametrize(
    "changes",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "max_grad_norm": 0.05}],
    ids=str,
)
def test_sgd_takes_the_steps_of_its_definition(tmp_path: Path, changes: dict[str, float]) -> None:
    plain = {"optimizer": "sgd", "learning_rate": 0.3, "scheduler": "constant", "max_grad_norm": 0.0}
    settings = Training(**{**plain, "max_steps": STEPS, "batch_size": 4, **changes})
    model = one_weight_trains()
    before = copy.deepcopy(model.get_parameter(TRAINED).data)
    train(model, rows(), settings, seed=0, folder=tmp_path)
    expected = stepped_by_hand(settings)
    assert (expected - before).abs().max() > 1e-4
    torch.testing.assert_close(model.get_parameter(TRAINED).data, expected, atol=1e-7, rtol=0)


def test_momentum_without_sgd_is_refused() -> None:
    with pytest.raises(ValidationError, match="'momentum' is sgd's, and optimizer is adamw; drop it, or set optimizer"):
        Alignment(momentum=0.9)


def test_a_log_file_gets_a_line_about_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Training(max_steps=STEPS, batch_size=4)
    log = train(one_weight_trains(), rows(), settings, seed=0, folder=tmp_path)
    expected = [f"  step {n} of {STEPS}: loss {entry['loss']:.4f}" for n, entry in enumerate(log, start=1)]
    assert capsys.readouterr().out.splitlines() == expected
