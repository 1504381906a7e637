"""Times read from logs, token lists: what the reports and token lists of recipes are made of."""

from __future__ import annotations

import pytest

from espnet_mpq.recipe import report, token_list

LINE = (
    "[vm] 2026-11-21 12:06:47 (trainer:394) INFO: {epoch}epoch results: [train] iter_time=0.037, "
    "optim0_lr0=0.002, train_time=0.483, time={train}, total_count=848, gpu_max=0.000, "
    "[valid] loss=4.1, time={valid}, total_count=103\n"
)


def test_training_time_is_that_of_all_epochs(tmp_path):
    log = tmp_path / "train.log"
    log.write_text(
        LINE.format(epoch=1, train="6 minutes and 49.14 seconds", valid="8.5 seconds")
        + LINE.format(epoch=2, train="1 hour and 1 second", valid="1 minute and 2 seconds")
        + "[vm] (trainer:288) INFO: 2/4epoch started. Estimated time to finish: 16 minutes\n"
        # a run that was resumed does epoch 2 again: the earlier one is lost, and not counted
        + LINE.format(epoch=2, train="59.5 seconds", valid="0.5 seconds")
    )
    assert report.training_seconds(log) == pytest.approx(6 * 60 + 49.14 + 8.5 + 60)
    log.write_text("nothing yet\n")
    assert report.training_seconds(log) is None


def test_stage_seconds_of_several_folders(tmp_path):
    for folder, name, seconds in (("a", "data", 2), ("b", "admm", 30)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.seconds").write_text(f"{seconds}\n")
    marks = [tmp_path / "a", tmp_path / "b"]
    found = report.stage_seconds(marks, ["data", "fp_lm", "admm"])
    assert found == {1: 2, 3: 30}
    assert report.stage_times(found).endswith("1: 2, 3: 30; together 32.")


def test_job_seconds_are_those_of_all_its_parts(tmp_path):
    log = tmp_path / "log"
    log.write_text("# done in 3.5 s\nagain: # done in 7.0 s\n# done in 12.0 s\n")
    assert report.job_seconds(log) == 15.5
    log.write_text("killed\n")
    assert report.job_seconds(log) is None


def test_words_and_characters_by_frequency():
    sentences = ["b a b", "c a b", "c"]
    assert token_list.words(sentences, 2) == ["b", "a"]  # a and c are equally frequent
    assert token_list.words(sentences, 9) == ["b", "a", "c"]
    assert token_list.characters(["ab b", "b"]) == ["b", "a", "<space>"]


def test_token_list_in_the_order_of_the_host(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text"
    text.write_text("u1 one two two\nu2\nu3 two three\n")
    words = ["token_list", "--text", str(text), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*words, "--token_type", "word", "--n_units", "2"])
    token_list.main()
    tokens = (tmp_path / "out" / "tokens.txt").read_text().split()
    assert tokens == ["<blank>", "<unk>", "two", "one", "<sos/eos>"]
    assert "5 tokens" in capsys.readouterr().out
    text.write_text("u1\n")
    with pytest.raises(SystemExit, match="no line of the form"):
        token_list.main()


def test_token_list_of_any_white_space(tmp_path, monkeypatch):
    """Lines and names as the host reads them; what it then gives its tokenizer has a token."""
    text = tmp_path / "text"
    text.write_bytes("\ufeffu1\tb\u2028b \r\nu2 \r\nu3 b\x85\n".encode("utf-8"))
    words = ["token_list", "--text", str(text), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    token_list.main()
    with open(tmp_path / "out" / "tokens.txt", encoding="utf-8") as file:
        tokens = [line[0] + line[1:].rstrip() for line in file]
    assert tokens == ["<blank>", "<unk>", "b", "\u2028", "<sos/eos>"]
    text.write_bytes(b"u1 a\nu2 b\rc\n")
    with pytest.raises(SystemExit, match="line 2: found a carriage return"):
        token_list.main()
