"""lm-evaluation-harness on tiny models, offline: its accuracies are our own, though it takes other ways to them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_dense, tiny_moe, write_jsonl
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mergekit_moe.data import load_rows
from mergekit_moe.evaluation.choices import choice_likelihoods, judge_choices
from mergekit_moe.evaluation.generation import judge_generation, write_answers
from mergekit_moe.harness import _language_model
from mergekit_moe.models import load_model
from mergekit_moe.recipe import ClientRows, Evaluation
from mergekit_moe.seed import train_tokenizer

Command = Callable[..., tuple[int, str, str]]
ROWS = 24
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", *"0123456789"]
TOKENIZER = train_tokenizer([" ".join(WORDS)] * 3, 300)
CHOICES = {"choices": "options", "answer": "label"}
WRITTEN = {"answer": "{answer}", "extract": "[0-9]", "max_new_tokens": 12}


def model_folder(tmp_path: Path, kind: str) -> Path:
    """A plain model, or an MoE with a router of this context."""
    settings: dict[str, Any] = {"vocab_size": len(TOKENIZER), "eos_token_id": 2}
    model = tiny_dense(**settings) if kind == "dense" else tiny_moe("Llama", router_context=kind, **settings)
    model.save_pretrained(tmp_path / kind)
    TOKENIZER.save_pretrained(tmp_path / kind)
    return tmp_path / kind


def text(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i + i * seed) % len(WORDS)] for i in range(words))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks over one local file: choices of various lengths, and a number to be written."""
    rows = [
        {
            "q": text(i, 2 + i % 7),
            "options": [text(i + 50 * k, 1 + (i + k) % 4) for k in range(1, 4)],
            "label": i % 3,
            "answer": str(i % 2),
        }
        for i in range(ROWS)
    ]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    common |= {"doc_to_text": "{{q}}", "num_fewshot": 0}
    chosen = {"output_type": "multiple_choice", "doc_to_choice": "options", "doc_to_target": "label"}
    chosen["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    written = {"output_type": "generate_until", "doc_to_target": "answer"}
    written["generation_kwargs"] = {"until": ["</s>"], "max_gen_toks": 12, "do_sample": False}
    written["metric_list"] = [{"metric": "exact_match"}]
    find = [{"function": "regex", "regex_pattern": "([0-9])"}, {"function": "take_first"}]
    written["filter_list"] = [{"name": "number", "filter": find}]
    for name, task in (("tiny_choices", chosen), ("tiny_numbers", written)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return folder


@pytest.mark.parametrize("kind", ["dense", "prefix", "prompt"])
def test_its_accuracies_are_ours(kind: str, tasks: Path, tmp_path: Path, command: Command) -> None:
    folder = model_folder(tmp_path, kind)
    both = ["--tasks", "tiny_choices, tiny_numbers", "--include-path", tasks]
    code, printed, errors = command("harness", folder, *both, "--out", tmp_path / "found.json", "--batch-size", 5)
    assert code == 0, errors
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    model, sources = load_model(folder), {"dataset": "d.jsonl", "prompt": "{q}"}
    asked = load_rows([ClientRows(**sources, completion=" {choice}", task=CHOICES)], tmp_path, "x")
    ours = judge_choices(model, TOKENIZER, asked, Evaluation())
    assert found["tiny_choices"]["acc,none"] == pytest.approx(ours["accuracy"])
    assert found["tiny_choices"]["acc_norm,none"] == pytest.approx(ours["accuracy_normalised"])
    numbers = ClientRows(**sources, completion=" {answer}", task=WRITTEN)
    asked = load_rows([numbers], tmp_path, "x")
    wrote = judge_generation(model, TOKENIZER, asked, numbers.task, Evaluation())
    assert found["tiny_numbers"]["exact_match,number"] == pytest.approx(wrote["accuracy"])
    assert 0 < ours["accuracy"] < 1
    assert 0 < wrote["accuracy"] < 1, write_answers(model, TOKENIZER, list(asked["prompt"]), 12, Evaluation())
    assert f"{ours['accuracy']:.4f}" in printed


@pytest.mark.parametrize("kind", ["dense", "prefix", "prompt"])
def test_its_likelihoods_are_ours_and_a_prompt_s_context_needs_ours(kind: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, kind)
    asked = [(text(i, 2 + i % 7), " " + text(90 + i, 1 + i % 4)) for i in range(12)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    lm = _language_model(folder, 5)
    found = [likelihood for likelihood, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    rows = Dataset.from_list([{"prompt": prompt, "completions": [completion]} for prompt, completion in asked])
    ours = [row[0] for row in choice_likelihoods(lm.model, TOKENIZER, rows, Evaluation())]
    assert found == pytest.approx(ours, abs=1e-4)
    plain = HFLM(pretrained=lm.model, tokenizer=TOKENIZER, batch_size=5)
    untold = [likelihood for likelihood, _ in plain.loglikelihood(requests, disable_tqdm=True)]
    assert (max(abs(a - b) for a, b in zip(untold, ours, strict=True)) > 1e-2) == (kind == "prompt")


def test_what_greedy_generation_would_write_is_known_as_such(tmp_path: Path) -> None:
    lm = _language_model(model_folder(tmp_path, "prompt"), 5)
    prompts = [TOKENIZER(text(i, 3 + i))["input_ids"] for i in range(4)]
    written = [lm.model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0].tolist() for ids in prompts]
    asked = [(None, ids, whole[len(ids) :]) for ids, whole in zip(prompts, written, strict=True)]
    asked += [(None, ids, [whole[len(ids)], 7]) for ids, whole in zip(prompts, written, strict=True)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(asked)] == [True] * 4 + [False] * 4


def test_a_limit_takes_the_first_rows(tasks: Path, tmp_path: Path, command: Command) -> None:
    options = ["--tasks", "tiny_choices", "--include-path", tasks, "--limit", 5, "--out", tmp_path / "found.json"]
    code, _, errors = command("harness", model_folder(tmp_path, "dense"), *options)
    assert code == 0, errors
    assert json.loads((tmp_path / "found.json").read_text())["n-samples"]["tiny_choices"]["effective"] == 5


def test_what_can_t_be_done_is_one_sentence(tasks: Path, tmp_path: Path, command: Command) -> None:
    folder = model_folder(tmp_path, "dense")
    code, _, errors = command("harness", tmp_path, "--tasks", "tiny_choices", "--include-path", tasks)
    assert (code, errors.count("error:")) == (2, 1)
    assert "has no config.json; give the folder of a causal language model" in errors
    code, _, errors = command("harness", folder, "--tasks", "tiny_choice", "--include-path", tasks)
    assert code == 2
    assert "has a task 'tiny_choice'" in errors
    code, _, errors = command("harness", folder, "--tasks", "tiny_choices", "--include-path", tmp_path / "nowhere")
    assert code == 2
    assert "is no folder" in errors
    code, _, errors = command("harness", folder, "--tasks", ",")
    assert code == 2
    assert "--tasks names none" in errors
    encoder = tmp_path / "encoder"
    tiny_moe("CLIP").save_pretrained(encoder)
    (encoder / "tokenizer_config.json").write_text("{}")
    code, _, errors = command("harness", encoder, "--tasks", "tiny_choices", "--include-path", tasks)
    assert code == 2
    assert "is an encoder, and the harness judges models that write" in errors
    (tmp_path / "d.jsonl").unlink()
    code, _, errors = command("harness", folder, "--tasks", "tiny_choices", "--include-path", tasks)
    assert (code, errors.count("error:")) == (2, 1)
    assert "rows of a task can't be had" in errors


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mergekit_moe.harness", raising=False)
    code, _, errors = command("harness", tmp_path, "--tasks", "arc_easy")
    assert (code, errors.count("error:")) == (2, 1)
    assert "pip install 'mergekit_moe[harness]'" in errors
