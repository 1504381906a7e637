"""Smoke run of the ADMM benchmark: the defaults beat post-training quantization."""

import runpy
from pathlib import Path


def test_default_options_end_clearly_better_than_post_training():
    main = runpy.run_path(str(Path(__file__).with_name("bench_admm.py")))["main"]
    results = main(["--smoke"])
    fp, post = results["fp"][0], results["post-training"][0]
    trained = results["+ finishing = default"]
    assert fp < post
    assert min(trained) < post - 0.5 * (post - fp)
