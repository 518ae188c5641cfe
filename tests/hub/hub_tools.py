"""The command line against a loopback Hub, in processes of their own: addresses are read on import."""

import os
import subprocess
import sys
from pathlib import Path

from loopback_hub import Hub
from loopback_hub.store import User

TOKEN = "hf_canaryTOKENcanaryTOKENcanary"
"""Of `alice`, who writes to `org`."""

# Pauses are part of what is tested nowhere but where the clock is read.
_HURRY = """
import os, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
from mergekit_moe.hub import asking
asking._SILENCE = float(os.environ.get("SILENCE", "60"))
"""
_METAMOE = """
from mergekit_moe import cli
cli.main()
"""
_FETCH = """
import sys
from pathlib import Path
from mergekit_moe.errors import MetaMoeError
from mergekit_moe.hub import resolve_model
try:
    resolved = resolve_model(sys.argv[1], sys.argv[2] or None, Path("/nowhere"), "expert 'law'", tell=print)
except MetaMoeError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
print(resolved.folder)
"""


def hub_with_users() -> Hub:
    """A Hub that knows a token that writes, one that only reads, and one of a stranger."""
    hub = Hub()
    hub.users = {
        TOKEN: User("alice", ("org",)),
        "hf_reader": User("bob", ("org",), may_write=False),
        "hf_stranger": User("eve"),
    }
    return hub


def environment(hub: Hub, home: Path, token: str | None = TOKEN, **others: str) -> dict[str, str]:
    """Return the variables of a process that talks to the Hub."""
    plain = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    plain |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **others}
    plain.pop("HF_TOKEN", None)
    return plain | ({"HF_TOKEN": token} if token else {})


def metamoe(
    hub: Hub, home: Path, *arguments: object, token: str | None = TOKEN, hurry: bool = True, **others: str
) -> subprocess.CompletedProcess[str]:
    """Run `metamoe`."""
    variables = environment(hub, home, token, **others)
    return run_script(hub, _METAMOE, variables, *arguments, hurry=hurry)


def fetch(
    hub: Hub, home: Path, source: str = "firm/law", revision: str = "", token: str | None = None, **others: str
) -> subprocess.CompletedProcess[str]:
    """Resolve a model; the last line that is printed is its folder."""
    variables = environment(hub, home, token, HF_HUB_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", **others)
    return run_script(hub, _FETCH, variables, source, revision)


def run_script(
    hub: Hub, script: str, variables: dict[str, str], *arguments: object, hurry: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own; no token may be seen in what it prints, and it never asks."""
    done = subprocess.run(
        [sys.executable, "-c", (_HURRY if hurry else "") + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=variables,
        timeout=timeout,
    )
    for secret in hub.users:
        assert secret not in done.stdout + done.stderr
    return done


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one sentence of a command that failed as it should."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")
