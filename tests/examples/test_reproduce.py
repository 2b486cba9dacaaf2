"""The script of the Flickr8k table on a few photos and a small BERT: killed on its way it goes on, and its figures are the reports'."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from tests.places import ROOT, SHARED
from tests.synthetic import environment
from tests.test_demo import wait_until

FLICKR, VOCABULARY = SHARED / "data" / "flickr8k", SHARED / "data" / "vocab" / "bert-base-uncased-vocab.txt"


def few_photos(folder: Path, count: int) -> Path:
    """A folder like Flickr8k's with so many photos of each split."""
    (folder / "images").mkdir(parents=True)
    for split in ("train", "val"):
        lines = (FLICKR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name in (json.loads(line)["image"] for line in lines):
            (folder / "images" / name).write_bytes((FLICKR / "images" / name).read_bytes())
    return folder


def small_bert(folder: Path) -> Path:
    """A BERT of four layers with bert-base-uncased's vocabulary."""
    sizes = {"vocab_size": 30522, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_bytes(VOCABULARY.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not FLICKR.is_dir(), reason=f"needs the photos in {FLICKR}")
def test_the_table_is_made_from_photos_and_captions_and_a_killed_start_goes_on(tmp_path: Path) -> None:
    flickr, bert, work = few_photos(tmp_path / "flickr8k", 40), small_bert(tmp_path / "bert"), tmp_path / "work"
    script = ROOT / "examples" / "flickr8k" / "reproduce.py"
    few = ["--processes", "1", "--pretraining-steps", "3", "--finetuning-steps", "2"]
    command = [sys.executable, str(script), str(flickr), str(work), "--minilm", str(bert), *few]

    first = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert wait_until(lambda: (work / "stages" / "boxes-grid.json").exists() or first.poll() is not None, 240)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "boxes of the photos" in done.stdout
    assert "done before" in done.stdout

    table = json.loads((work / "table.json").read_text())
    rows = {(row["model"], row["ranked_by"]): row for row in table["recalls"]}
    assert len(rows) == 6
    report = json.loads((work / "tuned-val.json").read_text())
    assert rows["fine-tuned", "both stages"]["text_to_image"][0] == report["both_stages"]["text_to_image"]["r_at_1"]
    assert rows["fine-tuned", "first stage"]["image_to_text"][2] == report["prefilter"]["image_to_text"]["r_at_10"]
    assert (report["images"], report["captions"]) == (40, 200)
    assert set(table["seconds"]) >= {"captions-train", "features-grid", "start", "pretrain", "export", "finetune", "evaluate-tuned-val"}
    assert (work / "tuned" / "model" / "model.safetensors").exists()
