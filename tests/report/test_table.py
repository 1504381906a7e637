"""Tables: values taken from the right files, layout, refusals."""

import json

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.report import table


@pytest.fixture
def files(tmp_path):
    (tmp_path / "fp.pth").write_bytes(b"x" * 2_500_000)
    (tmp_path / "best.pth").symlink_to("fp.pth")
    (tmp_path / "packed.safetensors").write_bytes(b"x" * 160_000)
    (tmp_path / "receipt.json").write_text(
        json.dumps({"totals": {"effective_bits": 2.0481, "n_bytes": 160_000}})
    )
    (tmp_path / "ppl").write_text("20.456\n")
    (tmp_path / "ppl.json").write_text('{"ppl": 20.5}')
    counts = dict(n_ref=100, n_del=2, n_ins=3)
    (tmp_path / "wer.json").write_text(
        json.dumps(
            {
                "systems": {
                    "fp": dict(counts, n_sub=7, wer_percent=12.0),
                    "mixed": dict(counts, n_sub=8, wer_percent=13.0),
                },
                "mapsswe": {"p_value": 0.3173},
            }
        )
    )
    return tmp_path


def two_systems(files):
    return [
        "--system", "name=fp", f"weights={files}/best.pth", "bits=32", f"ppl={files}/ppl",
        f"wer={files}/wer.json",
        "--system", "name=mixed 2 bit", f"receipt={files}/receipt.json", f"ppl={files}/ppl.json",
        f"wer={files}/wer.json", "wer_name=mixed",
    ]  # fmt: skip


def test_markdown(files, capsys):
    out = files / "RESULTS.md"
    table.main([*two_systems(files), "--markdown", "--title", "test", "--output", str(out)])
    expected = """## test

| system | effective bits | MB on disk | perplexity | WER % | sub/del/ins | p-value |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| fp | 32.00 | 2.50 | 20.46 | 12.00 | 7/2/3 | - |
| mixed 2 bit | 2.05 | 0.1600 | 20.50 | 13.00 | 8/2/3 | 0.317 |
"""
    assert out.read_text() == expected
    assert capsys.readouterr().out == expected
    table.main(["--system", "name=fp", "bits=32", "--output", str(out), "--append"])
    assert out.read_text() == expected + "system  effective bits\nfp               32.00\n"


def test_text_columns_align_and_empty_ones_vanish(files, capsys):
    table.main(["--system", "name=a", "bits=4", "--system", "name=longer", f"ppl={files}/ppl"])
    assert capsys.readouterr().out.splitlines() == [
        "system  effective bits  perplexity",
        "a                 4.00           -",
        "longer               -       20.46",
    ]


@pytest.mark.parametrize(
    "settings, message",
    [
        (["name=a", "weight=x"], "did you mean 'weights'"),
        (["bits=2"], "name="),
        (["name=a", "bits=two"], "a number"),
        (["name=a", "weights={}/none"], "none"),
        (["name=a", "ppl={}/none"], "none"),
        (["name=a", "wer={}/wer.json"], "no 'a'"),
        (["name=a", "receipt={}/wer.json"], "no 'totals'"),
    ],
)
def test_refusals(files, settings, message):
    with pytest.raises(InputError, match=message):
        table.main(["--system", *(s.format(files) for s in settings)])
