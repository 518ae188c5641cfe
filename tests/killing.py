"""A training that is killed, as far as the files that it leaves go."""

from typing import Any

import pytest

from mergekit_moe.training import PartTrainer


class Killed(BaseException):
    """As a kill is: nothing in the package catches it."""


def kill_at(checkpoint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Trainer die right after it has written so many checkpoints."""
    save, saved = PartTrainer._save_checkpoint, []

    def dying(self: PartTrainer, *args: Any) -> None:
        save(self, *args)
        saved.append(1)
        if len(saved) == checkpoint:
            raise Killed

    monkeypatch.setattr(PartTrainer, "_save_checkpoint", dying)
