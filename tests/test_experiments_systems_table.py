"""The table of systems: its runs, what is done again, and its text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.smoke_runs import script

FIGURES = {
    "class_accuracy": 0.9,
    "classifier_frechet_distance": 2.0,
    "reconstruction_frechet_distance": 0.5,
    "parameters": 1_000_000,
    "steps_per_image": 49,
    "frechet_floor": 0.25,
}


def flags(folder, *others):
    return [f"--workdir={folder}/runs", f"--out={folder}/t.json", "--mode=smoke", *others]


def test_a_system_has_only_the_figures_that_it_has(tmp_path):
    runs = {
        "llamagen: seed 0": FIGURES | {"nats_per_image": 200.0, "milliseconds_per_image": 12.0},
        "llamagen: seed 1": FIGURES | {"nats_per_image": 202.0, "class_accuracy": 0.8},
        "mar: seed 0": FIGURES | {"loss": 0.5},
    }
    with script("benchmarks/systems", *flags(tmp_path)) as module:
        text = module.markdown(runs)
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[0].startswith(
        "| llamagen | 2 | 1,000,000 ± 0 | 49 ± 0 | 12.0 | 201.0 ± 1.4 |  |  |"
    )
    assert "| 0.850 ± 0.071 |" in rows[0]
    assert rows[1].startswith("| mar | 1 | 1,000,000 | 49 |  |  |  | 0.500 | 0.900 |")
    assert "real test images: 0.250" in text


def test_runs_that_are_there_are_not_done_again(tmp_path, monkeypatch):
    done, timed = [], []
    arguments = flags(tmp_path, "--only=var|mar", "--seeds=1,2")
    with script("benchmarks/systems", *arguments) as module:

        def run_demo(system, seed):
            done.append((system, seed))
            folder = tmp_path / "runs" / f"{system}_seed_{seed}"
            folder.mkdir(parents=True)
            images = np.full((6, 4, 4, 1), 10 * seed, np.uint8)
            np.savez(folder / "samples.npz", arr_0=images, arr_1=np.array([0, 1] * 3))
            return folder

        def time_samplers(folders):
            timed.append(sorted(folders))
            return dict.fromkeys(folders, 5.0)

        monkeypatch.setattr(module, "run_demo", run_demo)
        monkeypatch.setattr(module, "figures", lambda folder: dict(FIGURES))
        monkeypatch.setattr(module, "time_samplers", time_samplers)
        kept = {"mode": "smoke", "runs": {"var: seed 2": FIGURES | {"class_accuracy": 0.1}}}
        (tmp_path / "t.json").write_text(json.dumps(kept))
        module.main([])
        module.main([])
    assert done == [("mar", 1), ("var", 1), ("mar", 2)]
    assert timed == [["mar: seed 1", "var: seed 1"]] * 2  # one seed is enough for the time
    runs = json.loads((tmp_path / "t.json").read_text())["runs"]
    assert runs["var: seed 2"]["class_accuracy"] == 0.1
    assert runs["mar: seed 1"]["milliseconds_per_image"] == 5.0
    assert "milliseconds_per_image" not in runs["mar: seed 2"]
    assert (tmp_path / "t.png").exists()
    assert "| var | 2 |" in (tmp_path / "t.md").read_text()


def test_a_run_that_fails_stops_the_table(tmp_path, monkeypatch):
    with script("benchmarks/systems", *flags(tmp_path, "--only=var")) as module:
        monkeypatch.setattr(module, "ROOT", tmp_path)  # where no demo.py is
        with pytest.raises(SystemExit, match="var did not end"):
            module.main([])
    assert not (tmp_path / "t.json").exists()


def test_an_unknown_system_is_refused(tmp_path):
    error = pytest.raises(Exception, match="--only=vqgan is none of arpg, .*var")
    with script("benchmarks/systems", *flags(tmp_path, "--only=vqgan")) as module, error:
        module.main([])


@pytest.mark.slow  # trains two generators in processes of their own, and times both
def test_two_systems_of_one_tokenizer(tmp_path):
    arguments = flags(tmp_path, "--only=llamagen|arpg", "--seeds=3", "--num_images=20")
    with script("benchmarks/systems", *arguments, "--batch=4", "--turns=1") as module:
        module.main([])
    assert [path.name for path in (tmp_path / "runs" / "tokenizers_seed_3").iterdir()] == [
        "tokenizer_vq"
    ]
    runs = json.loads((tmp_path / "t.json").read_text())["runs"]
    assert set(runs) == {"llamagen: seed 3", "arpg: seed 3"}
    for name, steps in (("llamagen: seed 3", 49), ("arpg: seed 3", 12)):
        assert runs[name]["steps_per_image"] == steps
        assert runs[name]["milliseconds_per_image"] > 0
        assert runs[name]["parameters"] > 1_000
