"""What a user is told in place of a traceback."""

from collections.abc import Mapping


class ConfigError(ValueError):
    """A user's mistake, in one line that says what to change."""


class TrialsFailed(RuntimeError):
    """Some trials failed; the message says which, and why. All others have their rows."""

    def __init__(self, reasons: Mapping[str, str]):
        trials = "1 trial" if len(reasons) == 1 else f"{len(reasons)} trials"
        lines = [f"  {trial}: {reason}" for trial, reason in reasons.items()]
        super().__init__("\n".join([f"{trials} failed; start again to retry:", *lines]))
