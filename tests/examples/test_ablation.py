"""The ablation's script: its table is the mean of the reports, and on a few photos every variant is trained and measured."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.test_reproduce import FLICKR, few_photos, small_bert
from tests.places import ROOT
from tests.synthetic import environment

SCRIPTS = ROOT / "examples" / "flickr8k"


def script(name: str, *words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), *map(str, words)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


def report(folder: Path, name: str, first: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recall = {"r_at_1": first, "r_at_5": first + 0.1, "r_at_10": first + 0.2}
    (folder / f"{name}.json").write_text(json.dumps({"text_to_image": recall, "image_to_text": recall}))


def test_the_table_has_means_and_standard_errors_of_the_seeds_that_are_done(tmp_path: Path) -> None:
    of_seed = [0.10, 0.13, 0.19]
    for seed, first in enumerate(of_seed):
        report(tmp_path / f"seed-{seed}" / "itm", "pretrained", first)
    report(tmp_path / "seed-0" / "none", "tuned", 0.25)

    done = script("ablation.py", "table", tmp_path)
    assert done.returncode == 0, done.stderr
    error = statistics.stdev(of_seed) / 3**0.5
    assert f"| ITM | 3 | zero-shot | 0.140 ± {error:.3f} | 0.340 ± {error:.3f} | 0.140 ± {error:.3f} |" in done.stdout
    assert "| no pretraining | 1 | fine-tuned | 0.250 | 0.450 | 0.250 |" in done.stdout
    assert done.stdout.strip() == (tmp_path / "ablation.md").read_text().strip()
    assert json.loads((tmp_path / "ablation.json").read_text())["seeds"] == ["0", "1", "2"]


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    done = script("ablation.py", "table", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no variant that is done" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not FLICKR.is_dir(), reason=f"needs the photos in {FLICKR}")
def test_every_variant_is_trained_and_measured(tmp_path: Path) -> None:
    flickr, bert, work = few_photos(tmp_path / "flickr8k", 100), small_bert(tmp_path / "bert"), tmp_path / "work"
    few = ["--processes", 1, "--pretraining-steps", 1, "--finetuning-steps", 1, "--minilm", bert]
    made = script("reproduce.py", flickr, work, *few, timeout=900)
    assert made.returncode == 0, made.stderr[-3000:]

    words = ["ablation.py", "run", work, tmp_path / "ablation", "--seed", 3, "--minilm", bert, "--tuning", 2]
    done = script(*words, "--steps", 2, timeout=2000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    other = script(*words, "--steps", 3)
    assert other.returncode == 2
    assert "give another output" in other.stderr

    table = script("ablation.py", "table", tmp_path / "ablation")
    recalls = json.loads((tmp_path / "ablation" / "ablation.json").read_text())["recalls"]
    assert table.returncode == 0
    assert len(recalls) == 9
    assert all(set(by_seed["3"]) == {"zero-shot", "fine-tuned"} for by_seed in recalls.values())
