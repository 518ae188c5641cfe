"""Public pools from the Hub: one commit for the whole process, its files compared with the Hub's digests."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from hub_tools import environment, hub_with_users, run_script, the_error
from loopback_hub import Fault, Hub, serve

_READ = """
import sys
from pathlib import Path
from mergekit_moe.data import fingerprint, load_rows
from mergekit_moe.errors import MetaMoeError
from mergekit_moe.recipe import DataSource
source = DataSource(dataset=sys.argv[1], text="{text}", split=sys.argv[2], revision=sys.argv[3] or None)
try:
    made_from = fingerprint([source], Path(), "public_pool", tell=print)
    public = "private" not in sys.argv[4:]
    print(*load_rows([source], Path(), "public_pool", public=public)["completion"], sep="\\n")
except MetaMoeError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""
_CONFIGS = """---
license: mit
configs:
- config_name: plain
  default: true
  data_files: [{split: train, path: plain/train.jsonl}, {split: test, path: plain/test.jsonl}]
- config_name: other
  data_files: other/*.jsonl
---
"""


def rows(name: str, count: int = 4) -> bytes:
    return "".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(count)).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = hub_with_users()
    files = {"plain/train.jsonl": rows("train"), "plain/test.jsonl": rows("test"), "other/a.jsonl": rows("other")}
    hub.add("org/mix", {**files, "README.md": _CONFIGS.encode()}, kind="dataset")
    with serve(hub):
        yield hub


def read(
    hub: Hub, home: Path, source: str = "org/mix", split: str = "train", revision: str = "", **others: str
) -> subprocess.CompletedProcess[str]:
    variables = environment(hub, home, None, HF_HUB_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", **others)
    return run_script(hub, _READ, variables, source, split, revision)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_the_default_configuration_is_read(hub: Hub, tmp_path: Path, split: str) -> None:
    done = read(hub, tmp_path, split=split)
    assert done.stdout.splitlines() == [f"{split} {number}" for number in range(4)], done.stderr
    assert not [path for path in hub.asked if path.endswith("other/a.jsonl") and "/resolve/" in path]


def test_of_private_rows_nothing_is_left_but_the_hub_s_own_files(hub: Hub, tmp_path: Path) -> None:
    variables = environment(hub, tmp_path, None, HF_HUB_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    done = run_script(hub, _READ, variables, "org/mix", "train", "", "private")
    assert done.stdout.splitlines() == [f"train {number}" for number in range(4)], done.stderr
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and b"train 2" in path.read_bytes()]
    assert holding and all("hub" in path.relative_to(tmp_path).parts for path in holding)


def test_a_flipped_bit_is_never_accepted(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault("GET .*/resolve/.*/train.jsonl", "flip", 1)]
    assert "public_pool: org/mix came with a damaged plain/train.jsonl" in the_error(read(hub, tmp_path))
    done = read(hub, tmp_path)
    assert done.stdout.splitlines() == [f"train {number}" for number in range(4)], done.stderr


@pytest.mark.parametrize("kind", ["status", "drop", "truncate"])
@pytest.mark.parametrize("place", ["GET /api/datasets/org/mix", "GET .*/resolve/.*/train.jsonl"])
def test_what_passes_is_waited_for(hub: Hub, tmp_path: Path, place: str, kind: str) -> None:
    hub.faults = [Fault(place, kind, 1)]
    done = read(hub, tmp_path)
    assert done.stdout.splitlines() == [f"train {number}" for number in range(4)], done.stderr


@pytest.mark.parametrize("place", ["GET /api/datasets/org/mix", "GET .*/resolve/.*/train.jsonl"])
def test_what_stays_is_one_sentence(hub: Hub, tmp_path: Path, place: str) -> None:
    hub.faults = [Fault(place, "status", status=503)]
    assert the_error(read(hub, tmp_path)).startswith("public_pool: org/mix")


@pytest.mark.parametrize("pinned", [False, True])
def test_offline_the_cached_commit_is_read_and_no_other(hub: Hub, tmp_path: Path, pinned: bool) -> None:
    """`datasets` itself would take the latest that it has prepared, whatever commit was asked for."""
    repository = hub.repositories["dataset", "org/mix"]
    first = repository.head
    revision = first.sha if pinned else ""
    assert read(hub, tmp_path, revision=revision).returncode == 0
    repository.commit({**first.files, "plain/train.jsonl": rows("later")}, "second")
    assert read(hub, tmp_path, revision=repository.head.sha).stdout.startswith("later")
    # Another template of the same rows, so that nothing but the Hub's files can be read.
    prepared = [path for path in (tmp_path / "datasets").rglob("*.arrow") if path.parent.name == "mergekit_moe"]
    for path in prepared:
        path.unlink()
    done = read(hub, tmp_path, revision=revision, HF_HUB_OFFLINE="1")
    note, *texts = done.stdout.splitlines()
    assert note.startswith(f"note: public_pool: org/mix is taken from the cache at {first.sha[:7]}, since HF_HUB_OFF")
    assert texts == [f"train {number}" for number in range(4)], done.stderr


def as_parquet(records: list[dict[str, object]]) -> bytes:
    return pd.DataFrame(records).to_parquet()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_only_a_loading_script_is_read_from_the_hubs_parquet_branch(
    hub: Hub, tmp_path: Path, split: str
) -> None:
    """As allenai/social_i_qa is. The branch has a folder a configuration, and in it a folder a split."""
    repository = hub.add("allenai/qa", {"qa.py": b"raise SystemExit('never run')\n", "README.md": b""}, kind="dataset")
    splits = {
        f"default/{name}/0000.parquet": as_parquet([{"text": f"{name} {i}"} for i in range(3)])
        for name in ("train", "validation")
    }
    made = repository.branch("refs/convert/parquet", {".gitattributes": b"", **splits})
    hub.large.update({hashlib.sha256(content).hexdigest(): content for content in splits.values()})
    done = read(hub, tmp_path, "allenai/qa", split, "refs/convert/parquet")
    assert done.stdout.splitlines() == [f"{split} {number}" for number in range(3)], done.stderr
    offline = read(hub, tmp_path, "allenai/qa", split, "refs/convert/parquet", HF_HUB_OFFLINE="1")
    assert offline.stdout.startswith(f"note: public_pool: allenai/qa is taken from the cache at {made.sha[:7]}")
    assert offline.stdout.splitlines()[1:] == done.stdout.splitlines()
    refused = the_error(read(hub, tmp_path, "allenai/qa", split))
    assert refused.startswith("public_pool: allenai/qa is a loading script, qa.py, which is never run")
    assert refused.endswith("give `revision: refs/convert/parquet`")


def test_a_missing_data_set_and_revision_are_told_apart(hub: Hub, tmp_path: Path) -> None:
    assert "org/none is no folder here, and is no repository on the Hub" in the_error(read(hub, tmp_path, "org/none"))
    assert "org/mix has no revision 'v9'" in the_error(read(hub, tmp_path, revision="v9"))
    assert "can't be read" in the_error(read(hub, tmp_path, split="validation"))
