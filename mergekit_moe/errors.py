"""What a user can get wrong. The command line prints these as one sentence and exits with code 2."""


class MetaMoeError(ValueError):
    """Base of every error that a user can cause; its text says what was given, what is allowed, what to do."""


class RecipeError(MetaMoeError):
    """The recipe can't be read, or says something that isn't allowed."""


class DataError(MetaMoeError):
    """A data source is missing, empty, or lacks a column that a template names."""


class SelectionError(MetaMoeError):
    """Proxies can't be selected as asked."""


class ExpertError(MetaMoeError):
    """An expert can't be read, or doesn't fit the base model."""


class WorkspaceError(MetaMoeError):
    """A stage's folder is in the way, or one that it needs is missing."""


class ExportError(MetaMoeError):
    """A unified model can't be written in the format that was asked for."""


class HubError(MetaMoeError):
    """The Hub doesn't take or find what it was asked to, or a folder is none that may be pushed there."""


class HarnessError(MetaMoeError):
    """lm-evaluation-harness isn't there, or can't do what it was asked to."""


class PrivacyError(MetaMoeError):
    """A guarantee can't be given as asked."""
