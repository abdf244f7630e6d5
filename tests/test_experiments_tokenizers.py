"""The table of quantisers: its runs, what is done again, and its text."""

from __future__ import annotations

import json

import pytest

from tests.smoke_runs import script


def run_figures(psnr, usage=(0.5, 1.0)):
    scales = [{"step": "1x1", "codes": 4, "usage": u, "perplexity": 10 * u} for u in usage]
    return {
        "bits": 392.0,
        "scales": scales,
        "steps": 4,
        "psnr": psnr,
        "ssim": 0.5,
        "reconstruction_frechet_distance": 1.0,
        "reconstruction_class_accuracy": 0.9,
        "frechet_floor": 0.25,
    }


def flags(folder, *others):
    return [f"--workdir={folder}/runs", f"--out={folder}/t.json", "--mode=smoke", *others]


def test_table_has_means_and_sample_deviations(tmp_path):
    with script("benchmarks/tokenizers", *flags(tmp_path)) as module:
        text = module.markdown(
            {"vq: seed 0": run_figures(20.0), "vq: seed 1": run_figures(22.0, (0.7, 1.0))}
            | {"kl: seed 0": run_figures(25.0) | {"bits": None, "scales": None}}
        )
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[0].startswith("| vq | 2 | 392 | 21.000 ± 1.414 | 0.500 ± 0.000 |")
    assert rows[0].endswith("| 0.60 ± 0.14, 1.00 ± 0.00 | 6 ± 1, 10 ± 0 |")
    assert rows[1].startswith("| kl | 1 |  | 25.000 |") and rows[1].endswith("|  |  |")
    assert "real test images: 0.250" in text


def test_runs_that_are_there_are_not_done_again(tmp_path, monkeypatch):
    done = []
    with script("benchmarks/tokenizers", *flags(tmp_path, "--only=^fsq|^lfq")) as module:

        def run(variant, seed, workdir, mode):
            done.append((variant.name, seed, workdir.name, mode))
            return run_figures(20.0 + seed)

        monkeypatch.setattr(module, "run", run)
        (tmp_path / "t.json").write_text(
            json.dumps({"mode": "smoke", "runs": {"fsq: seed 1": run_figures(30.0)}})
        )
        module.main([])
        first = list(done)
        module.main([])
    assert first == done  # nothing the second time
    assert first == [
        ("fsq", 0, "fsq_seed_0", "smoke"),
        ("lfq", 0, "lfq_seed_0", "smoke"),
        ("lfq", 1, "lfq_seed_1", "smoke"),
        ("fsq", 2, "fsq_seed_2", "smoke"),
        ("lfq", 2, "lfq_seed_2", "smoke"),
    ]
    kept = json.loads((tmp_path / "t.json").read_text())["runs"]
    assert kept["fsq: seed 1"]["psnr"] == 30.0
    assert "| fsq | 3 |" in (tmp_path / "t.md").read_text()


def test_runs_of_another_mode_are_not_mixed(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"mode": "demo", "runs": {}}))
    error = pytest.raises(Exception, match="has runs of --mode=demo; name another file")
    with script("benchmarks/tokenizers", *flags(tmp_path)) as module, error:
        module.main([])


@pytest.mark.slow  # trains and evaluates
def test_a_run_of_codes_of_bits(tmp_path):
    with script("benchmarks/tokenizers", *flags(tmp_path, "--only=bitwise", "--seeds=3")) as module:
        module.main([])
    (found,) = json.loads((tmp_path / "t.json").read_text())["runs"].values()
    assert found["bits"] == 70 * 5  # of the smoke configuration
    assert [scale["codes"] for scale in found["scales"]] == [4_000, 16_000, 64_000, 196_000]
    assert all(0 < scale["usage"] <= 1 <= scale["perplexity"] <= 32 for scale in found["scales"])
