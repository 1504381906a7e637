"""Recognisers and speech that the tests of this folder share."""

from __future__ import annotations

import pytest
from recognisers import ENCODERS, make_recogniser, make_speech


@pytest.fixture(scope="session")
def asr_task(host):
    """The host's ASRTask, with the plugin registered."""
    from espnet2.tasks.asr import ASRTask

    return ASRTask


@pytest.fixture(scope="session")
def make_asr_exp(host):
    """recognisers.make_recogniser, once the host is there."""
    return make_recogniser


@pytest.fixture(scope="session", params=sorted(ENCODERS))
def asr_exp(request, make_asr_exp, tmp_path_factory):
    """One hybrid recogniser of every encoder (read only)."""
    return make_asr_exp(tmp_path_factory.mktemp("asr") / request.param, request.param)


@pytest.fixture(scope="session")
def conformer_exp(make_asr_exp, tmp_path_factory):
    """A hybrid Conformer (read only)."""
    return make_asr_exp(tmp_path_factory.mktemp("asr") / "conformer")


@pytest.fixture(scope="session")
def speech_dir(tmp_path_factory):
    """A folder of speech (read only)."""
    return make_speech(tmp_path_factory.mktemp("speech"))
