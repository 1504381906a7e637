"""mpq plan on a real-text LM of four clusters against all 256 plans by true joint perplexity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from real_lms import RECURRENT, read_sentences, train_host_lm, word_list

from espnet_mpq.bin.mpq import main
from espnet_mpq.packed.size import packed_size

BITS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def planner(host, data_root, tmp_path_factory):
    """(experiment, Planner) of a plain 2 x 48 RNN LM, trained by the host on 30,000 PTB words."""
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.planning.planner import Planner
    from espnet_mpq.planning.storage import Storage
    from espnet_mpq.sensitivity.table import SensitivityTable

    torch.set_num_threads(1)  # a forked child must not meet the parent's thread pool
    folder = tmp_path_factory.mktemp("ptb")
    train = read_sentences(data_root / "ptb" / "ptb.train.txt.gz", 30000)
    valid = read_sentences(data_root / "ptb" / "ptb.valid.txt.gz", 3000)
    conf = dict(unit=48, nlayers=2, rnn_type="rnn_tanh", dropout_rate=0.1)
    tokens = word_list(train, 600)
    exp = train_host_lm(folder, train, valid, tokens, conf, max_epoch=3, **RECURRENT)
    (folder / "train.txt").write_text("\n".join(train))
    words = ["sensitivity", "--lm_exp", exp, "--text", folder / "train.txt", "--text_format"]
    words += ["plain", "--max_tokens", 2500, "--output", folder / "s.json"]
    assert main([str(w) for w in words]) == 0
    exp = load_fp_lm(exp)
    table = SensitivityTable.read(folder / "s.json")
    return exp, Planner(exp.architecture, Storage(), table)


@pytest.fixture(scope="module")
def plans(planner, data_root):
    """Bits of every plan -> (bytes of its file, nll of 2,500 unseen words in nats/token)."""
    from found import get_mats, set_mats

    from espnet_mpq.hosts.espnet.lm.perplexity import measure
    from espnet_mpq.hosts.espnet.lm.tokenizer import tokenize
    from espnet_mpq.plan import ClusterSpec
    from espnet_mpq.quant.fake_quant import project_cluster

    exp, planner = planner
    sentences = read_sentences(data_root / "ptb" / "ptb.test.txt.gz", 2500)
    text = tokenize(exp, [(str(i), s) for i, s in enumerate(sentences)])
    lm, clusters = exp.module, list(planner.clusters.values())
    mats = {c.name: [m.clone() for m in get_mats(lm, c)] for c in clusters}
    values = {
        (name, b): project_cluster(m, ClusterSpec(b)).values
        for name, m in mats.items()
        for b in BITS
    }
    found = {}
    for bits in itertools.product(BITS, repeat=len(clusters)):
        for cluster, b in zip(clusters, bits):
            set_mats(lm, cluster, values[cluster.name, b])
        plan = planner.plan({c.name: b for c, b in zip(clusters, bits)})
        n_bytes = packed_size(exp.architecture, plan).n_bytes
        found[bits] = (n_bytes, math.log(measure(exp, text, batch_size=128).ppl))
    for cluster in clusters:
        set_mats(lm, cluster, mats[cluster.name])
    return found


def planned(planner, harm, budget):
    """Bits that the planner gives for a table of harms."""
    from espnet_mpq.planning.planner import Planner
    from espnet_mpq.sensitivity.table import Entry, SensitivityTable

    table = SensitivityTable({"bits": list(BITS)}, "kl")
    for name, row in harm.items():
        for bits, value in row.items():
            table.add(name, bits, Entry(value, 0.0, 0.0))
    plan = Planner(planner.architecture, planner.storage, table).allocate(budget)
    return tuple(plan.clusters[name].bits for name in planner.clusters)


def test_kl_plans_are_nearly_the_best_of_all(planner, plans):
    assert len(plans) == 256
    _, planner = planner
    harm = planner.table.harm()
    names = list(harm)
    swapped = {name: harm[other] for name, other in zip(names, reversed(names))}
    sizes = sorted(size for size, _ in plans.values())
    excess = {"kl": [], "swapped": [], "any": []}  # nats/token over the best plan that fits
    for budget in sizes[12:204:24]:
        fitting = [bits for bits, (size, _) in plans.items() if size <= budget]
        best = min(plans[bits][1] for bits in fitting)
        for key, table in (("kl", harm), ("swapped", swapped)):
            excess[key].append(plans[planned(planner, table, budget)][1] - best)
        # The mean of the plans that leave no room for more bits anywhere.
        full = [
            bits
            for bits in fitting
            if not any(o != bits and all(x >= y for x, y in zip(o, bits)) for o in fitting)
        ]
        excess["any"].append(sum(plans[bits][1] for bits in full) / len(full) - best)
    mean = {key: sum(values) / len(values) for key, values in excess.items()}
    # Perplexity within 0.3 % of the best plan's on average, 1 % at worst.
    assert mean["kl"] < 0.003 and max(excess["kl"]) < 0.01, excess
    # Plans that know less miss that by far.
    assert mean["swapped"] > 0.03 and mean["any"] > 0.03, mean
