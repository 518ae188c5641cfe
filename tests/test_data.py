"""Rows from every kind of source, and the masks on their tokens."""

import copy
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from mergekit_moe import data
from mergekit_moe.data import (
    IGNORED,
    Texts,
    collate,
    fingerprint,
    leading_tokens,
    load_rows,
    split_held_out,
    texts_of,
    tokenize,
)
from mergekit_moe.errors import DataError
from mergekit_moe.installed_text import CORPORA
from mergekit_moe.recipe import DataSource
from mergekit_moe.seed import train_tokenizer
from mergekit_moe.workspace import digest

ROWS = [
    {"id": "a", "q": "two and two?", "a": "four", "kind": "maths", "turns": [["USER", "hi"], ["BOT", "hello"]]},
    {"id": "b", "q": "capital?", "a": "Paris", "kind": "other", "turns": [["USER", "bye"]]},
]


def source(**settings: Any) -> DataSource:
    return DataSource(**{"dataset": "d.jsonl", **settings})


def test_templates_filters_and_tags(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    wanted = source(prompt="Q: {q}\n", completion="{a}", where={"kind": ["maths"]}, tag="kind")
    rows = load_rows([wanted], tmp_path, "pool")
    assert rows[:] == {
        "id": ["a"],
        "prompt": ["Q: two and two?\n"],
        "completion": ["four"],
        "tag": ["maths"],
        "label": [""],
    }
    assert texts_of(rows) == ["Q: two and two?\nfour"]


def test_a_columns_name_may_hold_what_a_format_string_may_not(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"a.b": "dot", "0": "digit", "c d": "space"}])
    rows = load_rows([source(text="{{{a.b}}} {0} {c d}")], tmp_path, "x")
    assert rows["completion"][:] == ["{dot} digit space"]


def test_dialogues_become_one_line_a_turn(tmp_path: Path) -> None:
    chats = [{"turns": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    write_jsonl(tmp_path / "chat.jsonl", chats)
    assert load_rows([source(text="{turns}")], tmp_path, "x")["completion"][0] == "USER: hi\nBOT: hello"
    rows = load_rows([source(dataset="chat.jsonl", text="{turns}")], tmp_path, "x")
    assert rows["completion"][0] == "user: hi\nassistant: hello"


def test_labelled_choices_become_one_line_a_choice(tmp_path: Path) -> None:
    choices = {"label": ["A", "B"], "text": ["ignore", "enforce"]}
    write_jsonl(tmp_path / "d.jsonl", [{"question": "what?", "choices": choices}])
    rows = load_rows([source(text="{question}\n{choices}\nAnswer:")], tmp_path, "x")
    assert rows["completion"][0] == "what?\nA. ignore\nB. enforce\nAnswer:"


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.csv", "d.parquet", "d.txt"])
def test_every_kind_of_file_is_read(tmp_path: Path, name: str) -> None:
    import pandas as pd

    table = pd.DataFrame({"text": ["one", "two"]})
    writers = {
        "d.jsonl": lambda p: table.to_json(p, orient="records", lines=True),
        "d.jsonl.gz": lambda p: p.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')),
        "d.json": lambda p: p.write_text(json.dumps(table.to_dict("records"))),
        "d.csv": lambda p: table.to_csv(p, index=False),
        "d.parquet": lambda p: table.to_parquet(p),
        "d.txt": lambda p: p.write_text("one\ntwo\n"),
    }
    writers[name](tmp_path / name)
    rows = load_rows([source(dataset=name, text="{text}")], tmp_path, "x")
    assert rows["completion"][:] == ["one", "two"]
    assert rows["id"][:] == ["0", "1"]


def test_chunks_end_at_lines_lose_nothing_and_fit() -> None:
    text = "\n".join(f"line {i} " + "x" * (i % 70) for i in range(60)) + "\n" + "y" * 400
    from mergekit_moe.templates import chunks

    pieces = chunks(text, 100)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    assert all(piece.endswith("\n") for piece in pieces[:30])


def test_held_out_rows_are_stable_and_keep_chunks_together(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"id": f"t{i}", "text": "some line\n" * 20} for i in range(60)])
    learnt, held_out = split_held_out(load_rows([source(text="{text}", chunk=50)], tmp_path, "x"))
    names = [{row.split(" [piece] ")[0] for row in part["id"]} for part in (learnt, held_out)]
    assert names[0].isdisjoint(names[1])
    assert 0 < len(names[1]) < 20


def test_prompt_is_masked_and_eos_is_learnt(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    tokenizer = train_tokenizer(["two and two? four capital? Paris"], 300)
    rows = load_rows([source(prompt="{q}", completion="{a}")], tmp_path, "x")
    row = tokenize(rows, tokenizer, 100)[0]
    prompt = len(tokenizer("two and two?", add_special_tokens=False)["input_ids"]) + 1
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert row["labels"][:prompt] == [IGNORED] * prompt
    assert row["labels"][prompt:] == row["input_ids"][prompt:]
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_rows_with_nothing_left_to_learn_are_dropped(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "word " * 50, "a": "x"}, {"q": "y", "a": "z"}])
    rows = load_rows([source(prompt="{q}", completion="{a}")], tmp_path, "x")
    assert len(tokenize(rows, train_tokenizer(["word"], 300), 16)) == 1


def test_padding_is_masked_everywhere() -> None:
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "expert": 1}, {"input_ids": [5], "labels": [5], "expert": 0}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [5, IGNORED, IGNORED]]
    assert batch["expert"].tolist() == [1, 0]


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        write_jsonl(tmp_path / place / "d.jsonl", ROWS)
    wanted = [source(text="{q}")]
    assert fingerprint(wanted, tmp_path / "one", "x") == fingerprint(wanted, tmp_path / "two", "x")
    assert fingerprint(wanted, tmp_path / "one", "x") != fingerprint([source(text="{a}")], tmp_path / "one", "x")
    write_jsonl(tmp_path / "two" / "d.jsonl", ROWS[:1])
    assert fingerprint(wanted, tmp_path / "one", "x") != fingerprint(wanted, tmp_path / "two", "x")


@pytest.mark.parametrize("corpus", CORPORA)
def test_installed_text_is_there_and_the_same_twice(corpus: str) -> None:
    rows = list(CORPORA[corpus]())
    assert len(rows) > 20
    assert rows == list(CORPORA[corpus]())
    assert {row["bucket"] for row in rows} <= set(range(10))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "none.jsonl", "text": "{q}"}, "no such file or folder: none.jsonl"),
        ({"dataset": "sub/dir/none", "text": "{q}"}, "no such file or folder: sub/dir/none"),
        ({"text": "{qq}"}, "d.jsonl has no column 'qq'; its columns are id, q, a, kind, turns"),
        ({"text": "{q}", "where": {"king": 1}}, "has no column 'king'"),
        ({"text": "{q}", "tag": "tog"}, "has no column 'tog'"),
        ({"text": "{q}", "where": {"kind": "law"}}, "has no row with text in it"),
        ({"dataset": "broken.jsonl", "text": "{q}"}, "broken.jsonl can't be read"),
        ({"dataset": "cut.jsonl.gz", "text": "{q}"}, "cut.jsonl.gz can't be read"),
        ({"dataset": "d.docx", "text": "{q}"}, "d.docx is of no known kind; allowed are .jsonl"),
        ({"dataset": "org/name", "text": "{q}"}, "can't be looked up on the Hub in offline mode"),
        ({"dataset": "empty.jsonl", "text": "{q}"}, "empty.jsonl"),
        ({"dataset": "blank.jsonl", "text": "{q}"}, "has no row with text in it"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    write_jsonl(tmp_path / "blank.jsonl", [{"q": "  "}, {"q": ""}])
    (tmp_path / "broken.jsonl").write_text('{"q": 1}\nnot json\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "d.docx").write_text("")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress((tmp_path / "d.jsonl").read_bytes())[:-12])
    with pytest.raises(DataError) as error:
        load_rows([source(**settings)], tmp_path, "expert 'law', private")
    assert str(error.value).startswith("expert 'law', private: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_public_pool_lies_in_the_cache_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    wanted = source(text="{q} {a}")
    rows = load_rows([wanted], tmp_path, "pool", public=True)
    assert rows[:] == load_rows([wanted], tmp_path, "pool")[:]
    assert rows.cache_files
    monkeypatch.setattr("mergekit_moe.data._load", None)
    assert load_rows([wanted], tmp_path, "pool", public=True)[:] == rows[:]
    monkeypatch.undo()
    assert load_rows([source(text="{a}")], tmp_path, "pool", public=True)["completion"][:] == ["four", "Paris"]


def test_a_pool_that_changed_within_its_old_time_is_read_anew(tmp_path: Path) -> None:
    """As `cp -p` and `rsync -a` leave it; `datasets` alone goes by a file's path and time."""
    file = tmp_path / "d.jsonl"
    for text in ("before", "behind"):
        write_jsonl(file, [{"text": text}])
        os.utime(file, (1e9, 1e9))
        assert load_rows([source(text="{text}")], tmp_path, "pool", public=True)["completion"][:] == [text]


def test_a_decoder_may_name_cls_and_sep(tmp_path: Path) -> None:
    """It frames a text by neither: its BOS is found, its prompt masked, its EOS learnt."""
    plain = train_tokenizer([row["q"] + row["a"] for row in ROWS] * 3, 300)
    named = copy.deepcopy(plain)
    named.add_special_tokens({"cls_token": "<CLS>", "sep_token": "<SEP>"})
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    rows = load_rows([source(prompt="{q} ", completion="{a}")], tmp_path, "pool")
    assert leading_tokens(named) == leading_tokens(plain)
    assert tokenize(rows, named, 40)[:] == tokenize(rows, plain, 40)[:]


def test_texts_are_read_when_asked_for(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    rows = load_rows([source(prompt="{q} ", completion="{a}")], tmp_path, "pool")
    texts = Texts(rows)
    assert (len(texts), texts[1], texts[0:2]) == (2, "capital? Paris", texts_of(rows))


@pytest.mark.parametrize("public", [True, False])
def test_rows_without_text_are_left_out_and_told(tmp_path: Path, public: bool) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"text": "one"}, {"text": ""}, {"text": None}, {"text": " \n"}])
    told: list[str] = []
    rows = load_rows([source(text="{text}")], tmp_path, "public_pool", public=public, tell=told.append)
    assert rows["completion"][:] == ["one"]
    assert told == ["note: public_pool: 3 rows of d.jsonl have no text and are left out"]


@pytest.mark.parametrize("public", [True, False])
def test_columns_of_mixed_types_are_one_sentence(tmp_path: Path, public: bool) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"text": "one"}, {"text": {"a": 1}}])
    with pytest.raises(DataError, match=r"pool: d.jsonl, row 1: a template takes text, .* holds dict"):
        load_rows([source(text="{text}")], tmp_path, "pool", public=public)
    assert not list(tmp_path.rglob("*.partial"))


def test_shared_chats_of_either_spelling(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "d.jsonl", [{"turns": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]
    )
    assert load_rows([source(text="{turns}")], tmp_path, "x")["completion"][0] == "human: hi\ngpt: hello"


@pytest.mark.parametrize("kind", ["", "_", None])
def test_a_row_without_its_label_is_named(kind: str | None, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "two and two?", "kind": "maths"}, {"q": "what is this?", "kind": kind}])
    with pytest.raises(DataError, match=r"expert 'law', test: d.jsonl, row 1: the label {kind} is empty; fill it in"):
        load_rows([source(text="{q}", label="{kind}")], tmp_path, "expert 'law', test")


def test_a_corpus_may_hold_an_empty_text(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": "full", "text": "some"}, {"id": "empty", "text": ""}]
    monkeypatch.setitem(data._CORPORA, "licences", lambda: iter(rows))
    data._installed_content.cache_clear()
    [found] = fingerprint([source(dataset=None, installed="licences", text="{text}")], Path(), "pool")
    data._installed_content.cache_clear()
    assert found["content"] == digest([("full", "some"), ("empty", "")])
