"""Downloads through every fault: the right files, or one right sentence; a flipped bit is never accepted."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_adapter
from hub_tools import TOKEN, fetch, hub_with_users, metamoe, the_error
from loopback_hub import Fault, Hub, serve

FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
PLACES = [
    "GET /api/models/firm/law$",
    "GET /api/models/firm/law/tree/",
    "HEAD /firm/law/resolve/",
    "GET /firm/law/resolve/",
    "GET /cdn/",
]


@pytest.fixture
def hub(base_folder: Path, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that serves one adapter, in private to those of `org`, in public, and behind a gate."""
    folder = write_adapter(base_folder, tmp_path / "law", 1)
    hub = hub_with_users()
    hub.add_folder("firm/law", folder)
    hub.add_folder("org/secret", folder, private=True)
    hub.add_folder("firm/gated", folder, gated=True)
    with serve(hub):
        yield hub


def assert_whole(hub: Hub, folder: Path) -> None:
    for file in FILES:
        assert (folder / file).read_bytes() == hub.model("firm/law").head.files[file]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("kind", "times", "headers"),
    [
        ("status", 2, {}),
        ("status", 1, {"Retry-After": "1"}),
        ("drop", 1, {}),
        ("truncate", 1, {}),
    ],
)
def test_what_passes_is_waited_for(
    hub: Hub, tmp_path: Path, place: str, kind: str, times: int, headers: dict[str, str]
) -> None:
    hub.faults = [Fault(place, kind, times, status=429 if headers else 503, headers=headers)]
    done = fetch(hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert hub.faults[0].seen == times
    assert_whole(hub, Path(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"kind": "status", "status": 503}, "the Hub did not answer (503)"),
        ({"kind": "status", "status": 429}, "it is asked too often (429)"),
        ({"kind": "status", "status": 429, "headers": {"Retry-After": "3600"}}, "asks to wait 3600 seconds"),
        ({"kind": "drop"}, "the Hub did not answer (RemoteProtocolError)"),
    ],
)
def test_what_stays_is_one_sentence(
    hub: Hub, tmp_path: Path, place: str, fault: dict[str, object], message: str
) -> None:
    hub.faults = [Fault(place, **fault)]  # type: ignore[arg-type]
    error = the_error(fetch(hub, tmp_path / "cache"))
    assert error.startswith("expert 'law': firm/law ")
    assert message in error


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_never_accepted(hub: Hub, tmp_path: Path, place: str) -> None:
    hub.faults = [Fault(place, "flip", 1)]
    done = fetch(hub, tmp_path / "cache")
    if done.returncode == 0:
        assert_whole(hub, Path(done.stdout.splitlines()[-1]))
    else:
        assert the_error(done).startswith("expert 'law': firm/law ")
    again = fetch(hub, tmp_path / "cache")
    assert again.returncode == 0, again.stderr
    assert_whole(hub, Path(again.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("place", "file"), [(PLACES[4], FILES[1]), ("GET .*/adapter_config.json", FILES[0])])
def test_a_damaged_file_is_named_and_deleted(hub: Hub, tmp_path: Path, place: str, file: str) -> None:
    hub.faults = [Fault(place, "flip", 1)]
    error = the_error(fetch(hub, tmp_path / "cache"))
    assert f"firm/law came with a damaged {file}: its digest is" in error
    assert "it is deleted from the cache, fetch it again" in error
    assert not list((tmp_path / "cache").rglob(f"snapshots/*/{file}"))
    again = fetch(hub, tmp_path / "cache")
    assert again.returncode == 0, again.stderr
    assert_whole(hub, Path(again.stdout.splitlines()[-1]))


def test_what_was_damaged_in_the_cache_is_noticed_too(hub: Hub, tmp_path: Path) -> None:
    folder = Path(fetch(hub, tmp_path / "cache").stdout.splitlines()[-1])
    blob = (folder / FILES[1]).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    error = the_error(fetch(hub, tmp_path / "cache", HF_HUB_OFFLINE="1"))
    assert f"came with a damaged {FILES[1]}" in error


@pytest.mark.parametrize(
    ("source", "revision", "token", "message"),
    [
        ("firm/none", "", None, "is no folder here, and is no repository on the Hub that anybody may see; check the"),
        ("firm/none", "", TOKEN, "is no repository on the Hub that your account may see; check the name, or ask its"),
        ("org/secret", "", None, "if it is private, log in with `hf auth login`, or set HF_TOKEN"),
        ("org/secret", "", "hf_stranger", "is no repository on the Hub that your account may see"),
        ("firm/law", "", "hf_unknown", "the Hub doesn't know your token; log in with `hf auth login`, or set HF_TOKEN"),
        ("firm/gated", "", None, "firm/gated is gated; ask for access on its page and log in"),
        ("firm/gated", "", "hf_stranger", "firm/gated is gated; ask for access on its page and log in"),
        ("firm/law", "v9", None, "firm/law has no revision 'v9'; give a branch, tag or commit of it"),
        ("firm/law", "7" * 40, None, f"firm/law has no revision '{'7' * 40}'"),
        ("no repository", "", None, "is no valid Hub id; give an id such as org/name"),
    ],
)
def test_each_refusal_has_its_own_sentence(
    hub: Hub, tmp_path: Path, source: str, revision: str, token: str | None, message: str
) -> None:
    assert message in the_error(fetch(hub, tmp_path / "cache", source, revision, token))


def test_a_forbidden_repository_has_its_own_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault("GET /api/models/firm/law$", "status", status=403)]
    assert "firm/law is closed to your token (403)" in the_error(fetch(hub, tmp_path / "cache", token=TOKEN))


def test_a_slow_hub_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault("GET /api/models/firm/law$", "slow", seconds=1.5)]
    error = the_error(fetch(hub, tmp_path / "cache", SILENCE="0.3"))
    assert "the Hub did not answer in time" in error
    assert hub.faults[0].seen == 2


def test_a_private_repository_comes_with_a_token_that_the_storage_never_sees(hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path / "cache", "org/secret", token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and TOKEN in path.read_text("latin")]


def test_retry_after_is_heeded(hub: Hub, tmp_path: Path) -> None:
    """By the clock: this one doesn't hurry."""
    hub.faults = [Fault("GET /api/models/firm/law", "status", 1, status=429, headers={"Retry-After": "2"})]
    start = time.monotonic()
    done = metamoe(hub, tmp_path / "cache", "find", "firm/law", token=None, hurry=False)
    assert time.monotonic() - start > 2
    assert done.returncode == 2, "an adapter is no base model"
    assert hub.faults[0].seen == 1


@pytest.mark.parametrize("pinned", [False, True])
def test_offline_the_cache_does_and_it_is_said(hub: Hub, tmp_path: Path, pinned: bool) -> None:
    sha = hub.model("firm/law").head.sha
    revision = sha if pinned else ""
    missing = the_error(fetch(hub, tmp_path / "cache", revision=revision, HF_HUB_OFFLINE="1"))
    assert "can't be looked up on the Hub in offline mode, and the cache lacks it; unset HF_HUB_OFFLINE" in missing
    fetch(hub, tmp_path / "cache", revision=revision)
    done = fetch(hub, tmp_path / "cache", revision=revision, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    note, folder = done.stdout.splitlines()
    assert note == f"note: expert 'law': firm/law is taken from the cache at {sha[:7]}, since HF_HUB_OFFLINE is set"
    assert_whole(hub, Path(folder))


def test_with_the_hub_down_only_a_commit_may_come_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    sha = hub.model("firm/law").head.sha
    fetch(hub, tmp_path / "cache")
    hub.faults = [Fault(".", "status", status=503)]
    assert "the Hub did not answer (503)" in the_error(fetch(hub, tmp_path / "cache"))
    done = fetch(hub, tmp_path / "cache", revision=sha)
    assert done.returncode == 0, done.stderr
    note, folder = done.stdout.splitlines()
    assert note == f"note: expert 'law': firm/law is taken from the cache at {sha[:7]}, since the Hub did not answer"
    assert_whole(hub, Path(folder))


def test_a_branch_that_moves_while_files_come_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    """Its new commit is there before the first file is asked for."""
    first = hub.model("firm/law").head
    folder = Path(fetch(hub, tmp_path / "cache").stdout.splitlines()[-1])
    hub.model("firm/law").commit({**first.files, "README.md": b"moved"}, "second")
    moved = Path(fetch(hub, tmp_path / "cache").stdout.splitlines()[-1])
    pinned = Path(fetch(hub, tmp_path / "cache", revision=first.sha).stdout.splitlines()[-1])
    assert (folder.name, moved.name) == (first.sha, hub.model("firm/law").head.sha)
    assert pinned == folder
    assert (moved / "README.md").read_bytes() == b"moved"
    assert (pinned / "README.md").read_bytes() == first.files["README.md"]
