"""Patience in numbers: how long is waited, for what, and what is never waited for."""

import importlib
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hub_tools import TOKEN
from huggingface_hub.errors import HfHubHTTPError, Response

from mergekit_moe.hub.asking import RefusalError, ask

http = importlib.import_module(Response.__module__.split(".")[0])
"""The HTTP library that this huggingface_hub stands on."""


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Filled with the pauses that are made, none of which takes time."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


def failing(times: int, failure: Callable[[], Exception]) -> Callable[[], str]:
    """Return a call that fails so many times, and then succeeds."""
    left = [times]

    def call() -> str:
        if left[0]:
            left[0] -= 1
            raise failure()
        return "answer"

    return call


def http_error(status: int, **headers: str) -> Exception:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = http.Request("GET", "http://127.0.0.1/secret?token=" + TOKEN)
    return HfHubHTTPError(TOKEN, response=Response(status, headers=named, request=request))


def test_without_advice_pauses_double_and_end(pauses: list[float]) -> None:
    assert ask(failing(3, lambda: http_error(503))) == "answer"
    assert pauses == [1, 2, 4]
    with pytest.raises(RefusalError, match=r"the Hub did not answer \(503\)"):
        ask(failing(4, lambda: http_error(503)))
    assert pauses == [1, 2, 4] * 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "7"}, 7),
        ({"RateLimit": '"api";r=0;t=9', "Retry_After": "1"}, 9),
        ({"RateLimit": '"api";r=12;t=9'}, 1),
        ({"Retry_After": "soon"}, 1),
    ],
)
def test_what_the_hub_asks_for_is_waited(pauses: list[float], headers: dict[str, str], seconds: float) -> None:
    assert ask(failing(1, lambda: http_error(429, **headers))) == "answer"
    assert pauses == [seconds]


def test_a_date_is_waited_for(pauses: list[float]) -> None:
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert ask(failing(1, lambda: http_error(429, Retry_After=until))) == "answer"
    assert 40 < pauses[0] <= 60


@pytest.mark.parametrize(("seconds", "made"), [("121", []), ("60", [60, 60])])
def test_all_pauses_together_are_bounded(pauses: list[float], seconds: str, made: list[float]) -> None:
    with pytest.raises(RefusalError, match=f"asks to wait {seconds} seconds; try again later"):
        ask(failing(9, lambda: http_error(429, Retry_After=seconds)))
    assert pauses == made


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412])
def test_a_refusal_is_taken_at_once(pauses: list[float], status: int) -> None:
    with pytest.raises(RefusalError) as refusal:
        ask(failing(1, lambda: http_error(status)))
    assert refusal.value.status == status
    assert pauses == []


def test_our_own_mistakes_are_no_refusals(pauses: list[float]) -> None:
    with pytest.raises(ValueError, match="mistake"):
        ask(failing(1, lambda: ValueError("a mistake")))
    assert pauses == []


def test_a_full_disk_is_told(pauses: list[float]) -> None:
    with pytest.raises(RefusalError, match="can't be kept in the cache: No space left"):
        ask(failing(1, lambda: OSError(28, "No space left on device")))


@pytest.mark.parametrize(
    "failure",
    [
        lambda: http_error(403, X_Error_Message=f"token {TOKEN}"),
        lambda: http_error(418, X_Error_Message=f"token {TOKEN}"),
        lambda: http.ConnectError(f"https://user:{TOKEN}@proxy"),
        lambda: ValueError(f"Invalid metadata in README.md.\n- you sent {TOKEN}"),
    ],
)
def test_no_refusal_quotes_a_token(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch, failure: Callable[[], Any]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(RefusalError) as refusal:
        ask(failing(9, failure))
    assert TOKEN not in str(refusal.value)
    assert refusal.value.__cause__ is None
