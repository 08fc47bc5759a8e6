"""Commands as a person types them, run in this process."""

from click.testing import CliRunner, Result

from flora.cli import main


def flora(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, *named: str) -> None:
    """One line that names the mistake, and exit code 2."""
    assert result.exit_code == 2, result.output
    assert not result.stdout
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    for text in named:
        assert text in result.stderr
