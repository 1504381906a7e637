"""MAPSSWE and bootstrap: hand-computed answers, NIST's sc_stats and kaldialign on real lists."""

import gzip
import json
import math
import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nist import sclite_command, write_trn

from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.significance import (
    Mapsswe,
    bootstrap_difference,
    equivalence,
    mapsswe,
    mapsswe_of_alignments,
    segments,
)
from espnet_mpq.evaluate.wer import align_all, count


@pytest.mark.parametrize(
    "steps_a, steps_b, expected",
    [
        ("CCCC", "CCCC", []),
        ("SCCS", "CCCC", [(1, 0), (1, 0)]),  # two good words separate
        ("SCS", "CCC", [(2, 0)]),  # one good word does not
        ("SCCC", "CCSC", [(1, 1)]),  # both must be right in the same place
        ("SCCCCC", "CCCSCC", [(1, 0), (0, 1)]),
        ("SCICS", "CCCC", [(3, 0)]),  # an insertion breaks a good stretch
        ("CCDCC", "CCCCC", [(1, 0)]),
        ("CCI", "CC", [(1, 0)]),  # after the last word, either system
        ("CC", "CCI", [(0, 1)]),
        ("ICC", "CC", [(1, 0)]),
        ("SDI", "SC", [(3, 1)]),
        ("I", "II", [(1, 2)]),  # empty reference
        ("", "", []),
    ],
)
def test_known_segments(steps_a, steps_b, expected):
    assert segments(steps_a, steps_b) == expected


def test_good_stretch_of_three():
    assert segments("SCCSCCC", "CCCCCCC", min_good=3) == [(2, 0)]


def test_alignments_of_different_references_are_refused():
    with pytest.raises(InputError, match="different references"):
        segments("CC", "C")


@given(st.data())
def test_segments_keep_every_error(data):
    n_words = data.draw(st.integers(0, 12))
    slot = st.tuples(st.integers(0, 1), st.sampled_from("CCCSD"))

    def draw_steps():
        slots = data.draw(st.lists(slot, min_size=n_words, max_size=n_words))
        return "".join("I" * n + c for n, c in slots) + "I" * data.draw(st.integers(0, 1))

    a, b = draw_steps(), draw_steps()
    found = segments(a, b)
    assert sum(pair[0] for pair in found) == count([a]).n_errors
    assert sum(pair[1] for pair in found) == count([b]).n_errors
    assert (0, 0) not in found
    assert [(y, x) for x, y in found] == segments(b, a)


def test_hand_computed_statistics():
    # Differences +1, +1, +1, -1, +1, +1: mean 2/3, variance (6 - 6 * 4/9) / 5 = 2/3.
    a = ["SCC", "SCC", "SCC", "CCC", "SCC", "SCC"]
    b = ["CCC", "CCC", "CCC", "SCC", "CCC", "CCC"]
    test = mapsswe_of_alignments(a, b)
    assert test.n_segments == 6
    assert test.mean_difference == pytest.approx(2 / 3)
    assert test.std_dev == pytest.approx(math.sqrt(2 / 3))
    assert test.z == pytest.approx(2.0)  # (2/3) / (sqrt(2/3) / sqrt(6))
    assert test.p_value == pytest.approx(0.0455003, abs=1e-6)


def test_equivalence_by_hand():
    """100 segments, 3 more errors of B in sum, deviation 0.8: error of the sum 8 words."""
    test = Mapsswe(100, -0.03, 0.8, 0.0, 0.7)
    found = equivalence(test, 20000, 0.1)  # a margin of 20 words
    assert found.difference_percent == pytest.approx(0.015)
    # (20 - 3) / 8 = 2.125 and (20 + 3) / 8 = 2.875 standard deviations
    assert found.p_not_worse == pytest.approx(0.016793, abs=1e-6)
    assert found.p_not_better == pytest.approx(0.002020, abs=1e-6)
    assert found.p_value == found.p_not_worse
    assert equivalence(test, 20000, 0.01).p_value > 0.5
    worse = equivalence(Mapsswe(100, -0.3, 0.8, 0.0, 0.0), 20000, 0.1)  # 30 words are too many
    assert worse.p_not_worse > 0.85 and worse.p_not_better < 1e-6


def test_equivalence_without_deviation():
    assert equivalence(Mapsswe(0, 0.0, 0.0, 0.0, 1.0), 100, 0.1).p_value == 0.0
    assert equivalence(Mapsswe(1, 1.0, 0.0, 0.0, 1.0), 100, 0.1).p_value > 0.8
    all_worse = equivalence(Mapsswe(25, -1.0, 0.0, 0.0, 0.0), 10000, 0.5)  # 25 of 50, error 5
    assert all_worse.p_not_worse == pytest.approx(2.8665e-7, rel=1e-3)
    for n_ref, margin in ((0, 0.1), (10, 0.0), (10, float("nan"))):
        with pytest.raises(InputError, match="equivalence test"):
            equivalence(Mapsswe(1, 1.0, 0.0, 0.0, 1.0), n_ref, margin)


def test_equal_differences_have_no_z_but_a_probability():
    assert mapsswe_of_alignments(["CC"], ["CC"]).p_value == 1.0
    assert mapsswe_of_alignments(["SCC"] * 4, ["DCC"] * 4).p_value == 1.0
    assert mapsswe_of_alignments(["SCC"], ["CCC"]).p_value == 1.0
    assert mapsswe_of_alignments(["SCC"] * 6, ["CCC"] * 6).p_value == pytest.approx(2 / 64)


def test_bootstrap_known_answers():
    better = bootstrap_difference(["SC", "SC", "SC"], ["CC", "CC", "CC"], 200)
    assert better.low_percent == better.high_percent == better.difference_percent == -50.0
    assert better.probability_b_better == 1.0
    same = bootstrap_difference(["SC", "CC"], ["SC", "CC"], 200)
    assert (same.low_percent, same.high_percent) == (0.0, 0.0)
    assert same.probability_equal == 1.0
    assert same.probability_b_better == same.probability_b_worse == 0.0
    # Each of two draws takes the good or the bad utterance: better 1/4, equal 1/2, worse 1/4.
    even = bootstrap_difference(["SC", "CC"], ["CC", "SC"], 20000)
    assert even.probability_equal == pytest.approx(0.5, abs=0.02)
    assert even.probability_b_better == pytest.approx(0.25, abs=0.02)
    assert even.probability_b_worse == pytest.approx(0.25, abs=0.02)
    with pytest.raises(InputError, match="n_replications"):
        bootstrap_difference(["C"], ["C"], 0)
    with pytest.raises(InputError, match="seed -1"):
        bootstrap_difference(["C"], ["C"], seed=-1)


def test_bootstrap_is_paired_and_repeatable():
    # Utterances differ wildly, the systems hardly: a paired interval must be narrow.
    a = ["S" * 10, "C" * 10] * 20
    b = ["S" * 9 + "C", "C" * 10] * 20
    first, second = (bootstrap_difference(a, b, 2000, seed=3) for _ in range(2))
    assert first == second != bootstrap_difference(a, b, 2000, seed=4)
    # (share of odd utterances in 40 draws) * -10 %: -5 % with standard deviation 0.79 %.
    assert first.low_percent == pytest.approx(-5 - 1.96 * 0.79, abs=0.3)
    assert first.high_percent == pytest.approx(-5 + 1.96 * 0.79, abs=0.3)


@pytest.fixture(scope="module")
def librispeech(data_root):
    """utterances, references, first-best and second-best of test-clean (lower case)."""
    path = data_root / "nbest_librispeech_espnet" / "test_clean.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    utts = [row["id"] for row in rows]
    refs = [row["ref"].lower().split() for row in rows]
    hyps = [[row["hyps"][k]["text"].lower().split() for row in rows] for k in (0, 1)]
    return utts, refs, hyps[0], hyps[1]


def test_bootstrap_against_kaldialign(librispeech):
    kaldialign = pytest.importorskip("kaldialign", reason="kaldialign is not installed")
    _, refs, first, second = librispeech
    ours = bootstrap_difference(align_all(refs, first), align_all(refs, second), 4000)
    theirs = kaldialign.bootstrap_wer_ci(refs, first, second, replications=4000)
    assert ours.probability_b_better == theirs["p_s2_improv_over_s1"] == 0.0
    means = [100 * theirs[s]["wer"] for s in ("system1", "system2")]
    assert ours.difference_percent == pytest.approx(means[1] - means[0], abs=0.02)
    # The interval of one system: compare with a system that makes no error.
    alone = bootstrap_difference(["C" * len(r) for r in refs], align_all(refs, first), 4000)
    assert alone.low_percent == pytest.approx(100 * theirs["system1"]["ci95min"], abs=0.03)
    assert alone.high_percent == pytest.approx(100 * theirs["system1"]["ci95max"], abs=0.03)


def sc_stats(folder, utts, refs, hyps_a, hyps_b):
    """n_segments, mean, std dev and Z of NIST's tool, and its alignments as step strings."""
    sclite, sc_stats_command = sclite_command(), sclite_command("sc_stats")
    for name, lists in (("ref", refs), ("a", hyps_a), ("b", hyps_b)):
        write_trn(folder / name, utts, map(" ".join, lists))
    steps = []
    for name in "ab":
        options = ["-r", "ref", "trn", "-h", name, "trn", "-i", "spu_id", "-o", "sgml"]
        subprocess.run([*sclite, *options], cwd=folder, check=True, capture_output=True)
        by_utt = {}
        sgml = (folder / f"{name}.sgml").read_text()
        for path in re.finditer(r'<PATH id="\((\S+?)\)"[^>]*>\n(.*?)</PATH>', sgml, re.S):
            by_utt[path[1]] = "".join(re.findall(r"(?:^|:)([CSDI]),", path[2]))
        steps.append([by_utt[utt] for utt in utts])
    subprocess.run(
        [*sc_stats_command, "-p", "-t", "mapsswe", "-v", "-n", "out"],
        cwd=folder,
        check=True,
        capture_output=True,
        input=b"".join((folder / f"{name}.sgml").read_bytes() for name in "ab"),
    )
    # The tool leaves stray bytes of memory in its tables.
    report = (folder / "out.stats.mapsswe").read_text(encoding="latin-1")
    numbers = re.search(
        r"MTCH_PR_RESULTS.*# segs: (\d+).*mean: +(\S+)\) \(std dev: +(\S+)\) \(Z Stat: +(\S+)\)",
        report,
    )
    return int(numbers[1]), *(float(numbers[i]) for i in (2, 3, 4)), *steps


def check_equal(ours, nist):
    n_segments, mean, std_dev, z = nist[:4]
    assert ours.n_segments == n_segments
    assert ours.mean_difference == pytest.approx(mean, abs=6e-4)
    assert ours.std_dev == pytest.approx(std_dev, abs=6e-4)
    assert ours.z == pytest.approx(z, abs=6e-4)


def test_against_sc_stats_on_librispeech(librispeech, tmp_path):
    utts, refs, first, second = librispeech
    # One more right word a line: without it sc_stats overlooks insertions of the second
    # system after the last word.
    longer = [[[*words, "end"] for words in lists] for lists in (refs, first, second)]
    nist = sc_stats(tmp_path, utts, *longer)
    steps_a, steps_b = nist[4:]
    check_equal(mapsswe_of_alignments(steps_a, steps_b), nist)
    check_equal(mapsswe(*longer), nist)  # with our own alignments
    assert [align_all(longer[0], hyps) for hyps in longer[1:]] == [steps_a, steps_b]


def test_against_sc_stats_on_small_lists(librispeech, tmp_path):
    # A close race, as of two language models: B has A's errors but in every 13th line.
    utts, refs, first, second = (items[:260] for items in librispeech)
    close = [b if i % 13 == 0 else a for i, (a, b) in enumerate(zip(first, second))]
    longer = [[[*words, "end"] for words in lists] for lists in (refs, first, close)]
    nist = sc_stats(tmp_path, utts, *longer)
    check_equal(mapsswe_of_alignments(*nist[4:]), nist)
    ours = mapsswe(*longer)
    check_equal(ours, nist)
    assert 0.0 < ours.p_value < 1.0
    assert ours.p_value == pytest.approx(math.erfc(abs(nist[3]) / math.sqrt(2)), abs=2e-3)
