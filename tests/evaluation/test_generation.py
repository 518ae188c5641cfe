"""Written answers against brute force: one row at a time, a whole forward pass for every token."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from task_models import MODELS, TOKENIZER, sentences, tiny
from transformers import GenerationConfig

from mergekit_moe.errors import DataError
from mergekit_moe.evaluation.generation import judge_generation, write_answers
from mergekit_moe.recipe import Evaluation
from mergekit_moe.task_recipe import Generation


@torch.no_grad()
def brute_force(model: Any, prompt: str, steps: int, stops: set[int]) -> list[int]:
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        inputs = {}
        if getattr(model.config, "router_context", None) == "prompt":
            inputs["prompt_mask"] = (torch.arange(len(ids)) < start).long()[None]
        ids.append(int(model(torch.tensor([ids]), use_cache=False, **inputs).logits[0, -1].argmax()))
        if ids[-1] in stops:
            return ids[start:-1]
    return ids[start:]


@pytest.mark.parametrize("kind", MODELS)
def test_answers_are_written_greedily_row_by_row_as_in_a_batch(kind: str) -> None:
    model, prompts = tiny(kind), sentences(7, 1)
    model.generation_config = GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=1.5, eos_token_id=2)
    expected = [TOKENIZER.decode(brute_force(model, prompt, 8, {2})) for prompt in prompts]
    assert write_answers(model, TOKENIZER, prompts, 8, Evaluation(batch_size=1)) == expected
    assert write_answers(model, TOKENIZER, prompts, 8, Evaluation(batch_size=4)) == expected
    assert model.generation_config.temperature == 2.0


def test_writing_ends_at_any_of_the_models_own_ends() -> None:
    model, prompts = tiny("prefix"), sentences(5, 2)
    whole = [brute_force(model, prompt, 8, set()) for prompt in prompts]
    ends = {whole[0][3], whole[1][5]}
    model.generation_config.eos_token_id = sorted(ends)
    expected = [TOKENIZER.decode(brute_force(model, prompt, 8, {2, *ends})) for prompt in prompts]
    assert write_answers(model, TOKENIZER, prompts, 8, Evaluation(batch_size=5)) == expected
    assert len(set(map(len, expected))) > 1


def test_a_long_prompt_loses_its_beginning() -> None:
    model = tiny("dense")
    last = TOKENIZER("fox " * 60, add_special_tokens=False)["input_ids"][-15:]
    written = write_answers(model, TOKENIZER, ["fox " * 60], 4, Evaluation(max_length=16))
    assert written == write_answers(model, TOKENIZER, [TOKENIZER.decode(last)], 4, Evaluation())


def judged(monkeypatch: pytest.MonkeyPatch, written: list[str], answers: list[str], **task: Any) -> float:
    monkeypatch.setattr("mergekit_moe.evaluation.generation.write_answers", lambda *_: written)
    rows = Dataset.from_list([{"prompt": "a", "answer": answer} for answer in answers])
    return judge_generation(None, None, rows, Generation(answer="{a}", **task), Evaluation())["accuracy"]


def test_what_is_extracted_is_compared_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ["6 * 7 = 42\n#### 42", "#### 1", "#### 1", "#### 1"]
    written = ["so, 40 and 2\n#### 42\n#### 7", "1", "#### 10", " #### 1 "]
    assert judged(monkeypatch, written, right, extract=r"#### (\S+)") == 0.5
    assert judged(monkeypatch, [" yes\n", "Yes"], ["yes", "yes"]) == 0.5
    assert judged(monkeypatch, ["a 12 b"], ["12"], extract=r"\d+") == 1.0


def test_a_right_answer_without_what_is_extracted_is_a_mistake_in_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"right answer '42' holds nothing"):
        judged(monkeypatch, ["#### 42"], ["42"], extract=r"#### (\S+)")


def test_accuracy_is_the_share_of_rows_that_the_model_gets_right() -> None:
    model, prompts = tiny("prompt"), sentences(4, 3)
    answers = write_answers(model, TOKENIZER, prompts, 5, Evaluation())
    answers[2] = "another"
    rows = Dataset.from_list([{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)])
    task = Generation(answer="{a}", max_new_tokens=5)
    assert judge_generation(model, TOKENIZER, rows, task, Evaluation()) == {"accuracy": 0.75}
