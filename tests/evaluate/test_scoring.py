"""Tokens that are scored: case, symbols, characters, and what sclite makes of odd words."""

import pytest
from nist import run_sclite, scores, write_trn

from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.scoring import Scoring, read_symbols
from espnet_mpq.evaluate.wer import align


@pytest.mark.parametrize(
    "line, word, sensitive",
    [
        ("Hello WORLD", "hello world", "Hello WORLD"),
        ("\u00c4 \u0416 \u0130 \u017f \u212a", "\u00c4 \u0416 \u0130 \u017f \u212a", None),
        ("A\u0301", "a\u0301", "A\u0301"),
        ("a @ b@c @", "a b@c", "a b@c"),
        ("a;0.7 b; ; ;c d\\;e", "a b ; ; d\\;e", None),
        ("", "", ""),
    ],
)
def test_words_as_sclite_reads_them(line, word, sensitive):
    assert " ".join(Scoring().tokens(line.split())) == word
    found = Scoring(case_sensitive=True).tokens(line.split())
    assert " ".join(found) == (word if sensitive is None else sensitive)


def test_characters_and_symbols():
    assert Scoring("char").tokens(["Ab", "c"]) == ["a", "b", "<space>", "c"]
    assert Scoring("char").tokens([]) == []
    noise = frozenset(["<noise>", "<n", "[x]"])
    words = "<noise> Ab<noise>c [x]".split()
    assert Scoring(symbols=noise).tokens(words) == ["ab<noise>c"]
    # The host takes them out of the line and leaves the blanks.
    expected = ["<space>", "a", "b", "c", "<space>"]
    assert Scoring("char", symbols=noise).tokens(words) == expected
    clean = Scoring(cleaner=lambda line: line.replace("-", " "))
    assert clean.tokens(["a-b", "c"]) == ["a", "b", "c"]
    with pytest.raises(InputError, match="unknown unit 'wrd'.*did you mean 'word'"):
        Scoring("wrd")


def test_symbols_of_a_file(tmp_path):
    (tmp_path / "nlsyms").write_bytes("\ufeff<noise>\r\n\r\n[laughter] \r\n".encode("utf-8"))
    assert read_symbols(tmp_path / "nlsyms") == {"<noise>", "[laughter]"}


# Pairs whose scores by sclite 2.10, called without options, are in the third place.
PAIRS = [
    ("Hello World", "hello world", (2, 0, 0, 0)),
    ("\u00c4", "\u00e4", (0, 1, 0, 0)),
    ("\u041f\u0440\u0438\u0432\u0435\u0442", "\u043f\u0440\u0438\u0432\u0435\u0442", (0, 1, 0, 0)),
    ("\uff21", "\uff41", (0, 1, 0, 0)),
    ("A\u0301", "a\u0301", (1, 0, 0, 0)),
    ("a b", "a @ b", (2, 0, 0, 0)),
    ("a", "@", (0, 0, 1, 0)),
    ("a;b", "A;c", (1, 0, 0, 0)),
    ("a ;c b", "a ;d b", (3, 0, 0, 0)),
    ("a; b", "a b", (2, 0, 0, 0)),
    ("a\\;b", "a", (0, 1, 0, 0)),
    ("(uh) a", "uh a", (1, 1, 0, 0)),
    ("a (b)", "a", (1, 0, 1, 0)),
    ("<unk> a", "<UNK> a", (2, 0, 0, 0)),
    ("a / b }", "a b", (2, 0, 2, 0)),
    ("%hes a- *b", "a b", (0, 2, 1, 0)),
    ("a b", "", (0, 0, 2, 0)),
]


def test_known_scores():
    for ref, hyp, expected in PAIRS:
        steps = align(*(Scoring().tokens(line.split()) for line in (ref, hyp)))
        assert tuple(map(steps.count, "CSDI")) == expected, (ref, hyp)


@pytest.mark.parametrize("options", [(), ("-s",), ("-e", "utf-8")])
def test_same_scores_as_sclite(tmp_path, options):
    utts = [f"s-{number}" for number in range(len(PAIRS))]
    write_trn(tmp_path / "ref.trn", utts, [ref for ref, _, _ in PAIRS])
    write_trn(tmp_path / "hyp.trn", utts, [hyp for _, hyp, _ in PAIRS])
    theirs = scores(run_sclite(tmp_path, *options))
    scoring = Scoring(case_sensitive="-s" in options)
    for utt, (ref, hyp, expected) in zip(utts, PAIRS):
        steps = align(*(scoring.tokens(line.split()) for line in (ref, hyp)))
        assert theirs[utt] == tuple(map(steps.count, "CSDI")), (ref, hyp)
        assert options == ("-s",) or theirs[utt] == expected


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize("cleaner", [None, "tacotron"])
def test_same_tokens_as_the_hosts_scoring_stage(host, tmp_path, unit, cleaner):
    """espnet2.bin.tokenize_text, called as by stage 13 of its asr.sh."""
    from espnet2.bin import tokenize_text

    from espnet_mpq.hosts.espnet.lm.cleaner import make_cleaner

    symbols = tmp_path / "nlsyms"
    symbols.write_text("<noise>\n[laughter]\n", encoding="utf-8")
    lines = [
        "u1 Hello  world",
        "u2",
        "u3 <noise> hm<noise>m\tyes [laughter]",
        "u4 a\u00a0b\u2028c\u3000d\u200be",
        "u5 it's 5 o'clock &co.",
    ]
    (tmp_path / "text").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    words = ["-f", "2-", "--input", str(tmp_path / "text"), "--output", str(tmp_path / "tokens")]
    words += ["--token_type", unit, "--cleaner", cleaner or "none"]
    words += ["--non_linguistic_symbols", str(symbols), "--remove_non_linguistic_symbols", "true"]
    tokenize_text.main(words)
    theirs = (tmp_path / "tokens").read_text(encoding="utf-8").split("\n")[:-1]
    clean = make_cleaner(cleaner) if cleaner else None
    scoring = Scoring(unit, True, read_symbols(symbols), clean)
    assert [scoring.tokens(line.split()[1:]) for line in lines] == [x.split() for x in theirs]


def test_unknown_cleaner(host):
    from espnet_mpq.hosts.espnet.lm.cleaner import make_cleaner

    with pytest.raises(InputError, match="no text cleaner 'tacotrn'.*Not supported.*tacotron"):
        make_cleaner("tacotrn")
