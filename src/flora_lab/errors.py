"""What a user is told in place of a traceback."""

from collections.abc import Mapping


class ConfigError(ValueError):
    """A user's mistake, in one line that says what to change."""


class SectionError(ValueError):
    """A mistake in a section of the keys, such as a model. Only `settings.with_key` knows where the section stands.

    Args:
        section: the dataclass.
        key: the key below it, with its value ("name=a/b"); "" for the section itself.
    """

    def __init__(self, section: object, key: str, text: str):
        super().__init__(section, key, text)
        self.section, self.key, self.text = section, key, text

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


class TrialsFailed(RuntimeError):
    """Some trials failed; the message says which, and why. All others have their rows."""

    def __init__(self, reasons: Mapping[str, str]):
        trials = "1 trial" if len(reasons) == 1 else f"{len(reasons)} trials"
        lines = [f"  {trial}: {reason}" for trial, reason in reasons.items()]
        super().__init__("\n".join([f"{trials} failed; start again to retry:", *lines]))
