"""Ask the Hub, patiently and within bounds; where it doesn't do what was asked, say why in one sentence.

huggingface_hub tries again by itself in some calls and not in others, and waits for as long as it is told to.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from json import JSONDecodeError
from typing import Any, TypeVar

Answer = TypeVar("Answer")

_TRIES = 4
_PATIENCE = 120.0
"""Seconds to wait at most, in all the pauses of one request together, when the Hub says how long."""
_SILENCE = 60.0
"""Seconds without a byte after which the Hub is too slow."""
_BUSY = (408, 429, 500, 502, 503, 504)
_HUB_SAYS = ("Invalid metadata in README.md", "LFS batch API returned errors", "Malformed response")
"""How huggingface_hub begins what the Hub says of a card or an upload."""

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class RefusalError(Exception):
    """Why the Hub didn't do what was asked. Its text ends a sentence that begins with the repository's name.

    It doesn't quote what a server or a library said, which may hold anything, a token included; where it has to, the
    token is left out.
    """

    def __init__(self, reason: str, *, down: bool = False, absent: bool = False, status: int | None = None) -> None:
        super().__init__(reason)
        self.absent = absent
        """There is no such repository for us."""
        self.down = down
        """Nobody answered, or only to say that they can't now: not a word about the repository."""
        self.status = status
        """Of HTTP, where there was an answer."""


def ask(call: Callable[[], Answer], *, revision: str | None = None) -> Answer:
    """Return what `call` does, tried again while the Hub is busy or the connection breaks.

    Args:
        call: asks the Hub by huggingface_hub; doing it twice must do no harm.
        revision: what an error calls the revision that was asked for.

    Raises:
        RefusalError: if it isn't to be had.
    """
    from huggingface_hub.errors import HTTPError  # the client library's own, whichever that is

    purse = _Purse()
    for left in reversed(range(_TRIES)):
        try:
            with _watched(purse):
                return call()
        except RefusalError:
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as failure:
            cause = _cause(failure)
            if isinstance(cause, JSONDecodeError):
                # Where huggingface_hub reads the body before the status: an error's is often no JSON.
                cause.response = purse.failed  # type: ignore[attr-defined]
            passing = _is_passing(cause)
            if isinstance(cause, RefusalError):
                raise cause from None
            # Silence has cost a minute each time already; huggingface_hub itself may have tried five times.
            if not passing or left == 0 or ("Timeout" in type(cause).__name__ and left < _TRIES - 1):
                raise _refusal(cause, revision) from None
            wait = _asked_wait(getattr(cause, "response", None))
            if wait is not None:
                purse.spend(wait)
            time.sleep(wait if wait is not None else 2.0 ** (_TRIES - 1 - left))
    raise AssertionError("unreachable")


class _Purse:
    """The seconds that one request may spend on pauses that the Hub asks for."""

    def __init__(self) -> None:
        self._left = _PATIENCE
        self.failed: Any = None
        """The last response, if it was an error."""

    def spend(self, seconds: float) -> None:
        """Raise RefusalError if that is more than is left."""
        if seconds > self._left:
            raise RefusalError(
                f"can't be had now: the Hub is busy and asks to wait {seconds:.0f} seconds; try again later", down=True
            )
        self._left -= seconds


@contextlib.contextmanager
def _watched(purse: _Purse) -> Iterator[None]:
    """Inside the block, huggingface_hub waits neither without end for an answer nor longer than the purse allows."""
    from huggingface_hub.utils import get_session

    def before(request: Any) -> None:
        # Some calls name None themselves, which a client's default doesn't change.
        given = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {part: seconds or _SILENCE for part, seconds in given.items()}

    def after(response: Any) -> None:
        purse.failed = response if response.status_code >= 400 else None
        if response.status_code in _BUSY:
            purse.spend(_asked_wait(response) or 0.0)

    client: Any = get_session()
    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], before], "response": [*hooks["response"], after]}
    try:
        yield
    finally:
        client.event_hooks = hooks


def _asked_wait(response: Any) -> float | None:
    """Return for how many seconds a busy Hub asks to be left alone; None if it doesn't say."""
    if response is None:
        return None
    reset = re.search(r"\br=0\s*;\s*t=(\d+)", response.headers.get("ratelimit", ""))
    value = reset[1] if reset else response.headers.get("retry-after", "")
    if value.strip().isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo else None


def _cause(failure: BaseException) -> BaseException:
    """Return what lies behind an error that only says where it happened."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while failure.__cause__ is not None and isinstance(failure, RuntimeError | LocalEntryNotFoundError):
        failure = failure.__cause__
    return failure


def _is_passing(cause: BaseException) -> bool:
    """True for what may well be over in a moment."""
    from huggingface_hub.errors import HTTPError

    if status := _status(cause):
        return status in _BUSY
    # A body that ended too early: of an answer in JSON, or of a file, which huggingface_hub finds by its size.
    return isinstance(cause, HTTPError | JSONDecodeError) or "Consistency check failed" in str(cause)


def _status(cause: BaseException) -> int | None:
    response = getattr(cause, "response", None)
    return None if response is None else int(response.status_code)


def _refusal(cause: BaseException, revision: str | None) -> RefusalError:
    """Return a failure of huggingface_hub in our words; raise it again if it is none of the Hub's."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = _status(cause)
    if isinstance(cause, HFValidationError):
        return RefusalError("is no valid Hub id; give an id such as org/name", absent=True)
    if isinstance(cause, OfflineModeIsEnabled):
        reason = "can't be looked up on the Hub in offline mode, and the cache lacks it; unset HF_HUB_OFFLINE"
        return RefusalError(reason, down=True)
    if isinstance(cause, GatedRepoError):
        return RefusalError(f"is gated; ask for access on its page and {LOG_IN}", status=status)
    if isinstance(cause, RevisionNotFoundError):
        return RefusalError(f"has no revision '{revision}'; give a branch, tag or commit of it", status=status)
    if isinstance(cause, LocalEntryNotFoundError):
        return RefusalError("isn't whole in the cache, and the Hub can't be asked for the rest; go online", down=True)
    if isinstance(cause, EntryNotFoundError):
        return RefusalError("has no such file", status=status)
    if isinstance(cause, RepositoryNotFoundError) or status in (401, 403, 404):
        return RefusalError(_no_access(cause), absent=_is_absent(cause), status=status)
    if _is_passing(cause) or isinstance(cause, HTTPError):
        return _unanswered(cause, status)
    if isinstance(cause, OSError) and cause.errno is not None:
        return RefusalError(f"can't be kept in the cache: {cause.strerror}; make room, or set HF_HOME to another place")
    if isinstance(cause, ValueError) and str(cause).startswith(_HUB_SAYS):
        return RefusalError(f"isn't taken by the Hub: {_without_token(' '.join(str(cause).split()))}")
    raise cause


def _without_token(text: str) -> str:
    from huggingface_hub.utils import get_token

    token = get_token()
    return text.replace(token, "[token]") if token else text


def _is_absent(cause: BaseException) -> bool:
    return _status(cause) != 403 and not _is_bad_token(cause)


def _is_bad_token(cause: BaseException) -> bool:
    message = cause.response.headers.get("x-error-message", "")  # type: ignore[attr-defined]
    return _status(cause) == 401 and ("Invalid credentials" in message or "expired" in message)


def _no_access(cause: BaseException) -> str:
    """Return why one isn't let in; to strangers the Hub doesn't tell private repositories from missing ones."""
    from huggingface_hub.utils import get_token

    if _is_bad_token(cause):
        return f"can't be asked for: the Hub doesn't know your token; {LOG_IN} anew"
    if _status(cause) == 403:
        return "is closed to your token (403); give the token that right in its settings on the Hub, or use another"
    absent = "is no repository on the Hub that"
    if get_token() is None:
        return f"{absent} anybody may see; check the name, or, if it is private, {LOG_IN}"
    return f"{absent} your account may see; check the name, or ask its owner for access"


def _unanswered(cause: BaseException, status: int | None) -> RefusalError:
    if status == 429:
        reason = "can't be had now: the Hub says that it is asked too often (429); try again in a few minutes"
    elif status is not None and status not in _BUSY:
        reason = f"doesn't take what was sent ({status}); it may have been damaged on the way: try again"
        return RefusalError(reason, status=status)
    elif status is not None:
        reason = f"can't be had: the Hub did not answer ({status}); try again later"
    elif "Timeout" in type(cause).__name__:
        reason = "can't be had: the Hub did not answer in time; check the network, or try again later"
    else:
        reason = f"can't be had: the Hub did not answer ({type(cause).__name__}); check the network, or try again later"
    return RefusalError(reason, down=True, status=status)
