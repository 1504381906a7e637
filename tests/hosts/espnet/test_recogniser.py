"""A recogniser and an LM with other tokens at the same ids are not decoded with."""

from __future__ import annotations

import argparse
import copy

import pytest

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.hosts.espnet import recogniser, registry

TOKENS = ["<blank>", "<unk>", "a", "b", "<sos/eos>"]
OTHER = ["<blank>", "<unk>", "b", "a", "<sos/eos>"]


@pytest.fixture(autouse=True)
def _forget():
    recogniser.forget_recognisers()
    yield
    recogniser.forget_recognisers()


def lm(tokens, name="mpq_packed_rnn"):
    return argparse.Namespace(lm=name, token_list=tokens)


def test_lists_are_compared_with_every_one_that_is_known():
    check = recogniser.check_recogniser
    check(lm(OTHER), "lm.yaml")  # no recogniser: nothing to compare with
    model = argparse.Namespace(token_list=TOKENS, src_token_list=("x", "y"))
    recogniser.remember_recogniser(model, "asr.yaml")
    check(lm(TOKENS), "lm.yaml")
    check(lm(["x", "y"]), "lm.yaml")  # an LM of the source language
    with pytest.raises(MismatchError) as caught:
        check(lm(OTHER), "lm.yaml")
    assert str(caught.value) == (
        "the LM and the recogniser have different token lists: found 5 tokens in lm.yaml, token 2 "
        "is 'b'; expected 5 in asr.yaml, token 2 is 'a'; decode with an LM that was trained on the "
        "token list of the recogniser"
    )


def test_an_lm_of_the_host_with_as_many_tokens_is_a_warning(caplog):
    recogniser.remember_recogniser(argparse.Namespace(token_list=TOKENS), "asr.yaml")
    with caplog.at_level("WARNING", logger="espnet_mpq"):
        recogniser.check_recogniser(lm(OTHER, "transformer"), "lm.yaml")
    assert "different token lists" in caplog.text
    with pytest.raises(MismatchError, match="found 4 tokens in lm.yaml; expected 5 in asr.yaml"):
        recogniser.check_recogniser(lm(TOKENS[:4], "transformer"), "lm.yaml")


def test_decoding_with_a_foreign_lm_is_refused(host, asr_exp, packed_exp, fp_exp, monkeypatch):
    """As the launcher prepares it: both lists are known when the LM is loaded."""
    from espnet2.tasks.abs_task import AbsTask
    from espnet2.tasks.asr import ASRTask

    monkeypatch.setattr(AbsTask, "build_model_from_file", vars(AbsTask)["build_model_from_file"])
    registry.watch_recognisers()
    watched = AbsTask.build_model_from_file
    registry.watch_recognisers()
    assert AbsTask.build_model_from_file == watched
    load = host.LMTask.build_model_from_file
    ASRTask.build_model_from_file(str(asr_exp.config), str(asr_exp.checkpoint))
    load(str(packed_exp.config), str(packed_exp.checkpoint))
    load(str(fp_exp.config), str(fp_exp.checkpoint))
    # The recogniser of another project.
    recogniser.forget_recognisers()
    tokens = copy.copy(packed_exp.token_list)
    tokens[5], tokens[6] = tokens[6], tokens[5]
    recogniser.remember_recogniser(argparse.Namespace(token_list=tokens), "asr.yaml")
    with pytest.raises(MismatchError, match="different token lists.*token 5 is"):
        load(str(packed_exp.config), str(packed_exp.checkpoint))


def test_training_options_of_a_wrong_kind_are_one_clear_error(host):
    for conf, message in (
        ({"plan": None, "att_unit": 3}, "x.yaml: unknown key lm_conf.att_unit"),
        ({"nlayer": 3}, "did you mean 'nlayers'"),
    ):
        args = argparse.Namespace(lm="mpq_seq_rnn", lm_conf=conf, config="x.yaml")
        with pytest.raises(InputError, match=message):
            host.LMTask.main_worker(args)
    args = argparse.Namespace(lm="mpq_nas_seq_rnn", lm_conf={"unit": 4}, config="x.yaml")
    with pytest.raises(InputError, match="x.yaml: keys of lm_conf are missing: found no nas"):
        host.LMTask.main_worker(args)
