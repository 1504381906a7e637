"""mpq_packed_transformer in the host: same scores and hypotheses as the host's float LM."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from decoding_runs import (
    check_attention_and_ctc_search,
    check_changing_beam,
    hypotheses,
    same,
    speech2text,
    toy_transducer,
    transducer_hypotheses,
)

from espnet_mpq.errors import InputError, MismatchError, PlanError
from espnet_mpq.hosts.espnet.experiment.opened import load_lm
from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment
from espnet_mpq.hosts.espnet.families import architecture_of, conf_of
from espnet_mpq.hosts.espnet.lm import perplexity
from espnet_mpq.hosts.espnet.lm.tokenizer import tokenize
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.packed.format import load_packed
from espnet_mpq.plan import ClusterSpec, Plan
from espnet_mpq.text import read_text

from packed_models import mixed, packed_model  # isort: skip

CONF = dict(embed_unit=17, att_unit=21, head=3, unit=31, layer=2)
SPECS = [
    ClusterSpec(8, tying="cluster"),
    ClusterSpec(4, "paper"),
    ClusterSpec(16),
    ClusterSpec(4, tying="group", group_size=5),
    ClusterSpec(32),
    ClusterSpec(2),
]
V = 31


def experiment(folder, checkpoint):
    return SimpleNamespace(
        path=folder, config=folder / "config.yaml", checkpoint=folder / checkpoint
    )


@pytest.fixture(scope="module")
def fp_dir(train, tmp_path_factory):
    """A stock Transformer LM that the host's lm_train has trained."""
    folder = tmp_path_factory.mktemp("fp") / "lm"
    return train(folder, lm="transformer", model="lm", max_epoch=6, lm_conf=CONF)


@pytest.fixture(scope="module")
def packed_dir(fp_dir, tmp_path_factory):
    clusters = architecture_of("transformer", CONF, V).clusters()
    plan = Plan({c.name: spec for c, spec in zip(clusters, SPECS)})
    folder = tmp_path_factory.mktemp("packed") / "lm"
    pack_experiment(fp_dir, folder, plan=plan)
    return experiment(folder, "packed.safetensors")


@pytest.fixture(scope="module")
def float_dir(fp_dir, packed_dir, tmp_path_factory):
    """The host's own class with the float values that the packed LM stands for."""
    folder = tmp_path_factory.mktemp("float") / "lm"
    folder.mkdir()
    shutil.copy(fp_dir / "config.yaml", folder)
    values = float_state(load_packed(packed_dir.checkpoint))
    exp = experiment(folder, "valid.loss.best.pth")
    torch.save({f"lm.{name}": value for name, value in values.items()}, exp.checkpoint)
    return exp


@pytest.fixture
def lms(host, packed_dir, float_dir):
    """The packed LM and the host's."""
    found = []
    for exp in (packed_dir, float_dir):
        model, _ = host.LMTask.build_model_from_file(str(exp.config), str(exp.checkpoint))
        found.append(model.lm.eval())
    return found


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=0)


def test_is_the_hosts_class_without_its_layers(lms):
    from espnet2.lm.transformer_lm import TransformerLM

    ours, theirs = lms
    assert isinstance(ours, TransformerLM) and type(theirs) is TransformerLM
    assert list(ours.parameters()) == [] and not ours.train().training
    codes = [name for name, tensor in ours.named_buffers() if tensor.dtype == torch.uint8]
    assert len(codes) == 2 + 4 + 4 + 1  # embedding, two attentions, output
    for state in ({}, theirs.state_dict()):
        with pytest.raises(MismatchError, match="packed.safetensors"):
            ours.load_state_dict(state, strict=False)


@pytest.mark.parametrize("pos_enc", [None, "sinusoidal"])
def test_scores_are_the_hosts(float_activations, host, packed_dir, pos_enc):
    """forward, score and batch_score; token 0 anywhere, as padding and as a blank at the start."""
    from espnet2.lm.transformer_lm import TransformerLM

    conf = {**CONF, "pos_enc": pos_enc, "att_unit": 12}
    arch = architecture_of("transformer", conf, V)
    packed = packed_model(arch, mixed(arch, 3))
    ours = host.lm_choices.get_class("mpq_packed_transformer")(
        V, plan=packed.plan.to_dict(), **conf_of(arch)
    )
    ours.load(packed)
    theirs = TransformerLM(V, **conf).eval()
    theirs.load_state_dict(float_state(packed))
    ids = torch.randint(1, V, (4, 7), generator=torch.Generator().manual_seed(1))
    ids[0, 4:], ids[1, 0], ids[2, :3], ids[3, 2] = 0, 0, 0, 0
    with torch.no_grad():
        close(ours(ids, None)[0], theirs(ids, None)[0])
        assert ours(ids, None)[1] is None
        for row in ids:
            mine = other = None
            for t in range(1, 8):
                log_probs, mine = ours.score(row[:t], mine, None)
                want, other = theirs.score(row[:t], other, None)
                close(log_probs, want)
        mine, other = [None] * 4, [None] * 4
        for t in range(1, 8):
            log_probs, mine = ours.batch_score(ids[:, :t], mine, None)
            want, other = theirs.batch_score(ids[:, :t], other, None)
            close(log_probs, want)


def test_beam_search_with_changing_batch(float_activations, lms):
    check_changing_beam(*lms, V)


def test_states_that_are_behind_catch_up(float_activations, lms):
    """A search may start with several tokens, and states of any age may meet in a batch."""
    ours, theirs = lms
    ys = torch.tensor([[30, 4, 5, 6, 7]] * 4)
    with torch.no_grad():
        want = theirs(ys, None)[0][:, -1].log_softmax(-1)
    states = [None]
    for t in range(1, 5):
        states.append(ours.score(ys[0, :t], states[-1], None)[1])
    close(ours.batch_score(ys, [states[2], None, states[4], states[1]], None)[0], want)
    close(ours.score(ys[0], None, None)[0], want[0])
    with pytest.raises(InputError, match="states of .4. tokens; expected fewer than the 4"):
        ours.score(ys[0, :4], states[4], None)


@pytest.mark.parametrize("search", ["batch", "single"])
def test_attention_and_ctc_search(
    float_activations, asr_exp, packed_dir, float_dir, fp_dir, speech, search
):
    fp = experiment(fp_dir, "valid.loss.best.pth")
    check_attention_and_ctc_search(asr_exp, packed_dir, float_dir, fp, speech, search)


def test_time_synchronous_search(float_activations, asr_exp, packed_dir, float_dir):
    """The search itself: the host's Speech2Text asks it for an attribute that it has not got."""
    from espnet.nets.beam_search_timesync import BeamSearchTimeSync

    encoded = 3 * torch.randn(30, 16, generator=torch.Generator().manual_seed(2))
    found = []
    for lm_exp in (packed_dir, float_dir):
        searcher = speech2text(asr_exp, lm_exp, time_sync=True).beam_search
        assert isinstance(searcher, BeamSearchTimeSync)
        with torch.no_grad():
            found.append([([*map(int, h.yseq)], float(h.score)) for h in searcher(encoded)])
    same(*found)
    assert max(len(h[0]) for h in found[0]) > 4


def test_kernels_find_what_floats_find(kernels, asr_exp, packed_dir, float_dir, speech):
    """int8 activations move scores a little, and here no hypothesis."""
    ours, theirs = (
        hypotheses(speech2text(asr_exp, exp), speech) for exp in (packed_dir, float_dir)
    )
    assert [h[0] for h in ours] == [h[0] for h in theirs]
    for got, want in zip(ours, theirs):
        assert got[1:] == pytest.approx(want[1:], rel=5e-3) and got[2] != want[2]


def test_transducer_searches(float_activations, lms):
    """The default search decodes; the four others refuse every TransformerLM themselves."""
    from espnet2.asr.transducer.beam_search_transducer import BeamSearchTransducer

    torch.manual_seed(3)
    transducer = toy_transducer(V)
    same(*(transducer_hypotheses(transducer, lm, "default") for lm in lms))
    for lm in lms:
        for search in ("tsd", "alsd", "nsc", "maes"):
            with pytest.raises(NotImplementedError):
                BeamSearchTransducer(*transducer[:2], 4, lm=lm, search_type=search)


def test_perplexities_agree(float_activations, packed_dir, float_dir, text_file):
    exps = [load_lm(packed_dir.path), load_lm(float_dir.path)]
    text = tokenize(exps[0], read_text(str(text_file)))
    ours, theirs = (perplexity.measure(exp, text) for exp in exps)
    assert ours.ppl == pytest.approx(theirs.ppl, rel=1e-5)
    assert ours.ppl < 20  # it has learnt something: 31 tokens


def test_files_that_do_not_belong_together(host, packed_dir, packed_exp, fp_dir, tmp_path):
    build = host.LMTask.build_model_from_file
    folder = shutil.copytree(packed_dir.path, tmp_path / "lm")
    shutil.copy(packed_exp.checkpoint, folder)  # of a recurrent LM
    with pytest.raises(
        MismatchError, match="class: found 'transformer' in config.yaml; expected 'rnn'"
    ):
        build(None, folder / "packed.safetensors")
    with pytest.raises(MismatchError, match="mpq_packed_rnn or lm: mpq_packed_transformer"):
        build(fp_dir / "config.yaml", packed_dir.checkpoint)
    with pytest.raises(MismatchError, match="expected packed.safetensors"):
        build(packed_dir.config, fp_dir / "valid.loss.best.pth")
    settings = yaml.safe_load(packed_dir.config.read_text(encoding="utf-8"))
    settings["lm_conf"]["head"] = 7
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    shutil.copy(packed_dir.checkpoint, folder)
    with pytest.raises(MismatchError, match="head: found 7 in config.yaml; expected 3"):
        build(None, folder / "packed.safetensors")


def test_wrong_plans_and_sizes_are_refused_when_building(host, packed_dir):
    lm_class = host.lm_choices.get_class("mpq_packed_transformer")
    plan = load_packed(packed_dir.checkpoint).plan.to_dict()
    lm_class(V, plan=plan, **CONF)
    with pytest.raises(PlanError, match=r"blocks\.1"):
        lm_class(V, plan=plan, **{**CONF, "layer": 1})
    with pytest.raises(InputError, match="att_unit"):
        lm_class(V, plan=plan, **{**CONF, "head": 2})
    bad = copy.deepcopy(plan)
    bad["clusters"]["blocks.0.attention"]["bits"] = 5
    with pytest.raises(PlanError, match="bits"):
        lm_class(V, plan=bad, **CONF)
