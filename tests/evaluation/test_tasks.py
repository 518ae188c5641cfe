"""Tasks in a recipe: what is allowed, what rows become, and where the numbers go."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_adapter, write_jsonl
from pydantic import ValidationError
from task_models import sentences

from mergekit_moe.data import fingerprint, load_rows, tokenize
from mergekit_moe.errors import DataError
from mergekit_moe.evaluation.choices import judge_choices
from mergekit_moe.evaluation.generation import judge_generation
from mergekit_moe.job import Job
from mergekit_moe.models import load_expert, load_model, load_tokenizer
from mergekit_moe.recipe import ClientRows, Evaluation, Recipe
from mergekit_moe.workspace import Workspace

GIVEN = {"dataset": "d.jsonl", "prompt": "{q}", "completion": " {choice}"}
LISTED = {"choices": "options", "answer": "label"}


def held_out(**settings: Any) -> ClientRows:
    return ClientRows(**{**GIVEN, "task": LISTED, **settings})


def read(tmp_path: Path, row: dict[str, Any], **settings: Any) -> dict[str, Any]:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "why?", **row}])
    return load_rows([held_out(**settings)], tmp_path, "x")[0]


@pytest.mark.parametrize(
    ("answer", "right"), [("red", 0), ("blue", 2), ("green ", 1), (1, 1), ("2", 2), ("A", 0), ("C", 2)], ids=repr
)
def test_the_right_choice_is_told_by_text_number_or_letter(tmp_path: Path, answer: Any, right: int) -> None:
    row = read(tmp_path, {"options": ["red", "green", "blue"], "label": answer})
    assert row["completions"] == [" red", " green", " blue"]
    assert row["right"] == right
    assert row["completion"] == row["completions"][right], "the loss is of the right choice"


def test_texts_and_labels_in_one_column_need_no_rewriting(tmp_path: Path) -> None:
    """As CommonsenseQA and ARC have them on the Hub; ARC numbers some from 1."""
    options = {"label": ["1", "2", "3"], "text": ["red", "green", "blue"]}
    assert read(tmp_path, {"options": options, "label": "1"})["right"] == 0
    assert read(tmp_path, {"options": options, "label": 3})["right"] == 2


def test_choices_that_are_counted_from_one(tmp_path: Path) -> None:
    """SocialIQA's labels are "1", "2" and "3": counted from 0, the first two would be wrong and nobody would know."""
    task = {"choices": ["A", "B", "C"], "answer": "label", "first": 1}
    for label in ("1", "3\n", 2):
        read_row = read(tmp_path, {"label": label}, task=task)
        assert read_row["right"] == int(label) - 1
        assert read_row["completion"] == " " + "ABC"[int(label) - 1]
    with pytest.raises(DataError, match=r"holds '0', which is none of the 3 choices; give .* its number from 1"):
        read(tmp_path, {"label": "0"}, task=task)


def test_choices_may_be_templates(tmp_path: Path) -> None:
    row = {"first": "red", "second": "green", "label": True}
    read_row = read(
        tmp_path, row, completion=" is {choice}.", task={"choices": ["{first}", "{second}"], "answer": "label"}
    )
    assert read_row["completions"] == [" is red.", " is green."]
    assert read_row["right"] == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"options": ["red", "green"], "label": "D"}, "column 'label' holds 'D', which is none of the 2 choices"),
        ({"options": ["red", "green"], "label": 2}, "holds 2, which is none of the 2 choices"),
        ({"options": ["red"], "label": 0}, "column 'options' holds no list of at least two choices"),
        ({"options": "red", "label": 0}, "column 'options' holds no list"),
        ({"options": ["red", " "], "label": 0}, "one of its choices has no text"),
        ({"options": ["red", "green"]}, "has no column 'label'"),
    ],
)
def test_a_row_that_asks_nothing_sensible_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, row)


def test_an_answer_is_a_template_of_its_own(tmp_path: Path) -> None:
    task = {"answer": "#### {answer}", "extract": r"#### (\S+)"}
    row = read(tmp_path, {"answer": 42, "steps": "6 * 7"}, completion=" {steps} = {answer}", task=task)
    assert (row["completion"], row["answer"]) == (" 6 * 7 = 42", "#### 42")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text": "{q}", "prompt": None, "completion": None}, "'task' asks for an answer to a prompt; give 'prompt'"),
        ({"completion": " {label}"}, "'completion' has no place for a choice; write {choice}"),
        ({"task": {"choices": ["{a}"], "answer": "b"}}, "a list of at least two templates"),
        ({"task": {"choices": ["{a}", "{b!r}"], "answer": "b"}}, "a brace holds a column's name"),
        ({"task": {"choices": "options"}}, "answer"),
        ({"task": {"answer": "{a}", "extract": "("}}, "'extract' is no regular expression"),
        ({"task": {"answer": "{a}", "extract": "(a)(b)"}}, "'extract' has 2 groups; keep the one to compare"),
        ({"task": {"answer": "{a}", "exact": "a"}}, "unknown key 'exact'; did you mean 'extract'?"),
        ({"task": {"choices": "a", "answer": "b", "extract": "a"}}, "unknown key 'extract'"),
        ({"task": {"answer": "{a}", "max_new_tokens": 0}}, "greater than or equal to 1"),
        ({"task": "choices"}, "valid dictionary"),
        ({"task": 3}, "valid dictionary"),
    ],
    ids=str,
)
def test_a_task_that_can_t_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        held_out(**settings)


@pytest.mark.parametrize("apart", [True, False], ids=["own test rows", "a tenth held out"])
def test_a_client_learns_the_right_choice_and_is_asked_all(tmp_path: Path, apart: bool) -> None:
    """Its rows have the pool's columns, so that proxies can be learnt with them."""
    rows = [{"q": f"why {i}?", "options": ["red", "green"], "label": "AB"[i % 2]} for i in range(40)]
    write_jsonl(tmp_path / "d.jsonl", rows)
    asked = GIVEN | {"task": LISTED}
    client = {"private": asked} | ({"test": asked} if apart else {})
    recipe = Recipe(
        base_model="b", experts=[{"name": "law", "client": client}], public_pool=GIVEN | {"completion": "x"}
    )
    source = recipe.experts[0]
    job = Job(recipe.model_copy(update={"data_dir": str(tmp_path)}), "r", Workspace(tmp_path / "ws"))
    private, held_out = job.rows(source)
    assert private is not None and held_out is not None
    assert private.column_names == job.pool.column_names
    assert set(private["completion"]) == {" red", " green"}
    assert held_out["completions"][:] == [[" red", " green"]] * len(held_out)
    assert source.task == ClientRows(**asked).task


def test_a_task_leaves_no_trace_in_the_loss(tmp_path: Path) -> None:
    """Its columns go when rows become tokens; how answers are judged changes no fingerprint."""
    from task_models import TOKENIZER

    write_jsonl(tmp_path / "d.jsonl", [{"q": "why?", "a": "so"}])
    plain = held_out(completion=" {a}", task=None)
    asked = held_out(completion=" {a}", task={"answer": "{a}"})
    tokens = [tokenize(load_rows([source], tmp_path, "x"), TOKENIZER, 20) for source in (plain, asked)]
    assert tokens[0][:] == tokens[1][:]
    assert fingerprint([plain], tmp_path, "x") == fingerprint([asked], tmp_path, "x")


def test_evaluate_reports_accuracy_beside_the_loss(
    base_folder: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Choices for one expert, written answers for the other; each number is its own function's on the loaded model."""
    prompts = sentences(10, 5)
    rows = [{"q": p, "options": sentences(3, i, 3), "label": "ABC"[i % 3], "a": "6"} for i, p in enumerate(prompts)]
    write_jsonl(tmp_path / "d.jsonl", rows)
    tests = [
        GIVEN | {"task": LISTED},
        GIVEN | {"completion": " {a}", "task": {"answer": "{a}", "extract": "[0-9]", "max_new_tokens": 12}},
    ]
    experts = [
        {"name": name, "source": str(write_adapter(base_folder, tmp_path / name, seed)), "test": test}
        for seed, (name, test) in enumerate(zip(("law", "code"), tests, strict=True))
    ]
    recipe = {"base_model": str(base_folder), "experts": experts, "router": {"start": "arrow", "context": "prompt"}}
    recipe |= {"evaluation": {"max_rows": 9}, "card": {"license": "mit"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, printed, errors = command("run", tmp_path / "r.yaml", "--workspace", tmp_path / "ws")
    assert code == 0, errors
    assert "held-out accuracy" in printed
    results = json.loads((tmp_path / "ws/evaluation/results.json").read_text())
    tokenizer = load_tokenizer(base_folder)
    asked = [load_rows([ClientRows(**test)], tmp_path, "x").select(range(9)) for test in tests]
    models = {"seed": load_model(base_folder), "unified": load_model(tmp_path / "ws/merged")}
    models |= {name: load_expert(base_folder, tmp_path / name) for name in ("law", "code")}
    for name, model in models.items():
        found = results["methods"][name]
        chosen = judge_choices(model, tokenizer, asked[0], Evaluation())
        assert {key: found["law"][key] for key in chosen} == chosen
        task = ClientRows(**tests[1]).task
        written = judge_generation(model, tokenizer, asked[1], task, Evaluation())
        assert found["code"]["accuracy"] == written["accuracy"]
    assert 0 < results["methods"]["unified"]["law"]["accuracy"] < 1
    right = {name: {d: found[d]["accuracy"] for d in found} for name, found in results["methods"].items()}
    for name, kept in results["retention"]["unified"]["by_domain"].items():  # all have a task: it is what counts
        learnt = right[name][name] - right["seed"][name]
        share = (right["unified"][name] - right["seed"][name]) / learnt if learnt > 0 else None
        assert kept == (share if share is None else pytest.approx(share))
    card = (tmp_path / "ws/merged/README.md").read_text()
    share = results["methods"]["unified"]["law"]["accuracy"]
    assert "| method | law | law (by length) | code |" in card
    assert f"| **unified (ours)** | {share:.3f} |" in card
