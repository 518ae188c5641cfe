"""How the loopback Hub fails, on demand."""

import re
from dataclasses import dataclass, field

KINDS = ("status", "drop", "truncate", "flip", "slow", "lose", "garble")


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path fit."""

    pattern: str
    """Searched in `METHOD /path`, such as "POST .*/commit/"."""
    kind: str
    """`status`: answered with `status` and `headers`. `drop`: the connection is closed without an answer. `truncate`:
    half of the body comes. `flip`: a bit of the body is another one. `slow`: the answer comes after `seconds`.
    `lose`: the work is done and the connection closed, so that nobody hears of it. `garble`: a bit of what was sent
    to the Hub is another one when it arrives."""
    times: int = 1_000_000
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    seen: int = 0
    """How often it happened."""

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def strikes(self, method: str, path: str) -> bool:
        """Count and return True if this request is to fail."""
        if self.seen >= self.times or not re.search(self.pattern, f"{method} {path}"):
            return False
        self.seen += 1
        return True


def flipped(content: bytes) -> bytes:
    """Return the content with one bit changed, in its middle."""
    if not content:
        return content
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
