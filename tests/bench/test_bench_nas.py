"""Smoke run of the search benchmark: on real text the plan fits and is near that of the KL."""

import runpy
from pathlib import Path


def test_the_searched_plan_fits_by_itself(host, data_root, tmp_path):
    main = runpy.run_path(str(Path(__file__).with_name("bench_nas.py")))["main"]
    options = "--unit 24 --vocabulary 300 --train_words 6000 --test_words 1500 --max_epoch 2"
    options += " --budgets 6 --max_tokens 600"
    options += " --nas --weights_epochs 1 --nas_epochs 5 --nas_updates 10 --lr 0.2"
    words = ["--data", str(data_root), "--folder", str(tmp_path), *options.split()]
    result = main(words)
    kl, nas = result["plans"]
    assert nas["fits_by_itself"] and nas["effective_bits"] <= 6
    assert nas["ppl"] < 1.1 * max(kl["ppl"], result["fp"])
