"""The family of architectures: names, sizes, shapes, and what is refused."""

from __future__ import annotations

from math import prod

import pytest

from espnet_mpq.architecture.families import from_dict
from espnet_mpq.architecture.rnn_lm import RnnArchitecture
from espnet_mpq.architecture.transformer_lm import TransformerArchitecture
from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet.families import FAMILIES, architecture_of, conf_of

SMALL = dict(embed_unit=5, att_unit=6, head=3, unit=7, layer=2)


def test_the_host_s_names_choose_the_family():
    for lm in ("seq_rnn", "mpq_seq_rnn", "MPQ_packed_rnn"):
        assert type(architecture_of(lm, {}, 9)) is RnnArchitecture
    for lm in ("transformer", "mpq_nas_transformer", "mpq_packed_transformer"):
        assert type(architecture_of(lm, {}, 9)) is TransformerArchitecture
    for lm in ("transformer_opt", "", None):
        with pytest.raises(InputError, match=f"found lm: {lm}; expected one of seq_rnn"):
            architecture_of(lm, {}, 9)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.fp)
def test_json_and_lm_conf_come_back(family):
    arch = architecture_of(family.trained, {}, 9)
    assert from_dict(arch.to_dict()) == arch
    assert architecture_of(family.packed, conf_of(arch), 9) == arch
    assert "vocab_size" not in conf_of(arch)
    assert arch.to_dict()["class"] == family.architecture.FAMILY
    for change in ({"unit": 0}, {"unit": True}, {"unit": "8"}, {"class": "cnn"}, {"depth": 3}):
        with pytest.raises(InputError, match="architecture"):
            from_dict({**arch.to_dict(), **change})
    with pytest.raises(InputError, match="missing keys: found no unit"):
        from_dict({k: v for k, v in arch.to_dict().items() if k != "unit"})


def test_transformer_sizes_that_cannot_be():
    for change in (
        {"head": 4},  # 6 is no multiple of 4
        {"pos_enc": "learned"},
        {"pos_enc": ["sinusoidal"]},
        {"pos_enc": "sinusoidal", "att_unit": 9},  # sines and cosines come in pairs
        {"layer": 1001},
        {"layer": 1.0},
    ):
        with pytest.raises(InputError, match="architecture: (bad|unknown)"):
            architecture_of("transformer", {**SMALL, **change}, 9)
    architecture_of("transformer", {**SMALL, "att_unit": 9}, 9)


def test_transformer_clusters_and_rest():
    arch = architecture_of("transformer", {**SMALL, "layer": 12}, 11)
    names = ["embedding"]
    for block in range(12):
        names += [f"blocks.{block}.attention", f"blocks.{block}.feed_forward"]
    assert [cluster.name for cluster in arch.clusters()] == [*names, "output"]
    sizes = {cluster.name: cluster.n_weights for cluster in arch.clusters()}
    assert sizes["embedding"] == 11 * 5 + 5 * 6 and sizes["output"] == 11 * 6
    assert sizes["blocks.11.attention"] == 4 * 6 * 6
    assert sizes["blocks.9.feed_forward"] == 2 * 6 * 7
    rest = sum(prod(shape) for _, shape in arch.rest())
    in_blocks = 12 * (4 * 6 + 7 + 6 + 4 * 6)
    assert rest == 6 + 2 * 6 + in_blocks + 2 * 6 + 11


def test_the_deepest_transformer_is_planned_in_no_time():
    arch = architecture_of("transformer", {**SMALL, "layer": 1000}, 11)
    assert len(arch.clusters()) == 2002  # seconds when every block searches all names
