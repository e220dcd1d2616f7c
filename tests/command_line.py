"""The console script `hf-pcdvq`, run in this process as a user would type it."""

from click.testing import CliRunner, Result

from hf_pcdvq_cli import main


def run(*arguments) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fail(code, message, *arguments) -> Result:
    """Check that a command exits with this code and a single message containing this text, without a traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert result.stderr.count("Error: ") == 1
    assert "Traceback" not in result.stderr
    return result


def contents(folder) -> dict:
    """The contents of every file in a folder, by relative path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
