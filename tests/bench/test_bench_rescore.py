"""The benchmark of rescoring runs: all systems, the table, a list of many hypotheses."""

from __future__ import annotations

import json

from bench import bench_rescore


def test_small_run(host, kernels, tmp_path, capsys):
    hyps = [{"text": text, "score": 0} for text in ("a b c", "a b", "", "a b d c")]
    path = tmp_path / "n.jsonl"
    path.write_text(json.dumps({"id": "u", "hyps": hyps}))
    bench_rescore.main([str(path), "--unit", "8", "--layers", "1", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "LSTM 1 x 8, 7 tokens; 4 hypotheses of 1 lists, 3.2 tokens and 1.5 steps each" in out
    assert "| ESPnet fp32, one by one | " in out and "| 2 bit, prefix tree | " in out
    bench_rescore.main(["--huge", "3000", "--unit", "8", "--layers", "1"])
    assert "3000 hypotheses in one list: " in capsys.readouterr().out
