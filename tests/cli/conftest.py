"""A runner for the command, in this process."""

import pytest
from click.testing import CliRunner, Result

from moekit.cli.app import cli


@pytest.fixture
def moekit():
    """Run `moekit …` and return click's Result; an unexpected exception is raised, never swallowed."""

    def call(*arguments: str, **options) -> Result:
        result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False, **options)
        assert "Traceback" not in result.output
        return result

    return call
