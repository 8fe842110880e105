"""The run that the trials disturb, prepared once."""

import pytest

from tests.trials import subject


@pytest.fixture(scope="package")
def undisturbed(tmp_path_factory):
    return subject.prepare(tmp_path_factory.mktemp("subject"))
