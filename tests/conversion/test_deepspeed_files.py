"""DeepSpeed's own checkpoints of real two-process runs, at every stage, give the fp32 masters bit by bit, without DeepSpeed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megainter import InterBertForPreTraining
from megainter.conversion.architecture import official_settings
from megainter.conversion.deepspeed_files import find_deepspeed_folder, open_deepspeed
from megainter.conversion.hugging_face import convert_hugging_face
from megainter.conversion.official import convert_official
from megainter.conversion.official_names import official_name
from megainter.conversion.zero import convert
from megainter.errors import DamagedError, MegainterError, UsageError
from tests.conversion.test_hostile_files import reduce_pickle, zipped
from tests.model.tiny import tiny_config, tiny_model
from tests.synthetic import environment

FAST = [(1, "bf16", "ours"), (2, "bf16", "official"), (3, "bf16", "ours"), (3, "bf16", "official")]
SLOW = [(0, "fp32", "ours"), (0, "fp32", "official"), (1, "bf16-fp32", "ours"), (3, "fp32", "ours"), (3, "fp32", "official")]
RUNS = [*FAST, *(pytest.param(*run, marks=pytest.mark.slow) for run in SLOW)]


def deepspeed_run(folder: Path, stage: int, precision: str, names: str) -> Path:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module", "tests.conversion.deepspeed_worker"]
    command = [sys.executable, *launcher, str(stage), precision, str(folder), names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], Path]:
    """Folders of runs by stage, precision and names, made when first asked for."""

    class Made(dict[tuple[int, str, str], Path]):
        def __missing__(self, key: tuple[int, str, str]) -> Path:
            self[key] = deepspeed_run(tmp_path_factory.mktemp("run"), *key)
            return self[key]

    return Made()


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "c.json").write_text(json.dumps(official_settings(tiny_config())))
    return tmp_path / "c.json"


def assert_masters(run: Path, model: InterBertForPreTraining, names: str) -> None:
    masters = torch.load(run / "masters.pt", weights_only=True)
    assert len(masters) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        theirs = name if names == "ours" else official_name(name, model.config)
        assert torch.equal(parameter, masters[theirs]), name


@pytest.mark.parametrize(("stage", "precision", "names"), RUNS)
def test_fp32_masters_bit_by_bit(stage: int, precision: str, names: str, runs: dict, settings: Path, tmp_path: Path) -> None:
    run = runs[stage, precision, names]
    plan = convert(run, tmp_path / "hf", config_file=settings, verify=True)
    model = InterBertForPreTraining.from_pretrained(tmp_path / "hf")
    assert_masters(run, model, names)
    assert (plan.missing, plan.unknown, plan.fresh) == ((), (), ())
    rounded = all(torch.equal(parameter, parameter.bfloat16().float()) for parameter in model.parameters())
    assert not rounded, "these are not fp32 masters"


@pytest.mark.parametrize(
    ("stage", "precision", "names"),
    [*(pytest.param(*run, marks=pytest.mark.slow) for run in ((1, "bf16", "ours"), (3, "bf16", "official"))), (3, "bf16", "ours")],
)
def test_the_universal_format(stage: int, precision: str, names: str, runs: dict, settings: Path, tmp_path: Path) -> None:
    run = runs[stage, precision, names]
    source = run / (run / "latest").read_text().strip()
    tool = ["-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    command = [sys.executable, *tool, "--input_folder", str(source), "--output_folder", str(tmp_path / "universal")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    convert(tmp_path / "universal", tmp_path / "hf", config_file=settings)
    assert_masters(run, InterBertForPreTraining.from_pretrained(tmp_path / "hf"), names)


def merged(run: Path, target: Path, *options: str) -> Path:
    """What the script that DeepSpeed puts into a run makes of it."""
    command = [sys.executable, str(run / "zero_to_fp32.py"), str(run), str(target), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.mark.parametrize(("stage", "names"), [pytest.param(1, "ours", marks=pytest.mark.slow), (2, "official"), (3, "ours")])
def test_what_zero_to_fp32_writes_converts(stage: int, names: str, runs: dict, settings: Path, tmp_path: Path) -> None:
    """The tied decoder is in it once more; a folder of one file, the file itself, and shards."""
    run = runs[stage, "bf16", names]
    whole, parts = merged(run, tmp_path / "whole"), merged(run, tmp_path / "parts", "--max_shard_size", "20KB")
    assert len(list(parts.glob("*-of-*.bin"))) > 1
    for number, source in enumerate((whole, whole / "pytorch_model.bin", parts)):
        convert(source, tmp_path / f"zero{number}", config_file=settings, verify=True)
        convert_official(source, tmp_path / f"official{number}", config_file=settings, verify=True)
        for target in (f"zero{number}", f"official{number}"):
            assert_masters(run, InterBertForPreTraining.from_pretrained(tmp_path / target), names)
        if names == "ours":
            convert_hugging_face(source, tmp_path / f"hf{number}", config_file=settings, verify=True)
            assert_masters(run, InterBertForPreTraining.from_pretrained(tmp_path / f"hf{number}"), names)


def variant(kind: str, state: dict[str, torch.Tensor], folder: Path) -> Path:
    """Merged weights as other versions and trainers leave them."""
    folder.mkdir()
    bare = {name: tensor for name, tensor in state.items() if name != "msm_head.decoder.weight"}
    match kind:
        case "without the tied decoder":
            torch.save(bare, folder / "pytorch_model.bin")
        case "safetensors":
            save_file(bare, folder / "model.safetensors")
        case "a folder named as the file":
            (folder / "pytorch_model.bin").mkdir()
            torch.save(state, folder / "pytorch_model.bin" / "pytorch_model.bin")
        case "Lightning's prefix":
            torch.save(
                {"state_dict": {f"_forward_module.model.{name}": tensor for name, tensor in state.items()}}, folder / "pytorch_model.bin"
            )
        case "compiled":
            torch.save({f"module._orig_mod.{name}": tensor for name, tensor in bare.items()}, folder / "pytorch_model.bin")
    return folder


KINDS = ["without the tied decoder", "safetensors", "a folder named as the file", "Lightning's prefix", "compiled"]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_of_other_versions_and_trainers(kind: str, settings: Path, tmp_path: Path) -> None:
    model = tiny_model()
    source = variant(kind, model.state_dict(), tmp_path / "merged")
    convert(source, tmp_path / "zero", config_file=settings, verify=True)
    convert_official(source, tmp_path / "official", config_file=settings)
    convert_hugging_face(source, tmp_path / "hf", config_file=settings)
    tiny_config().save_pretrained(source)
    convert(source, tmp_path / "beside")
    convert_hugging_face(source, tmp_path / "hf beside")
    for target in ("zero", "official", "hf", "beside", "hf beside"):
        read = InterBertForPreTraining.from_pretrained(tmp_path / target)
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True)), target
        assert read.config.num_attention_heads == model.config.num_attention_heads


def test_a_merged_decoder_of_its_own_is_never_dropped_in_silence(settings: Path, tmp_path: Path) -> None:
    state = dict(tiny_model().state_dict())
    state["msm_head.decoder.weight"] = state["msm_head.decoder.weight"] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    for number, run in enumerate((convert, convert_official, convert_hugging_face)):
        with pytest.raises(DamagedError, match="differs from the word embeddings"):
            run(tmp_path / "pytorch_model.bin", tmp_path / f"no{number}", config_file=settings)
        plan = run(tmp_path / "pytorch_model.bin", tmp_path / f"yes{number}", config_file=settings, allow_partial=True)
        assert plan.left_over == ("msm_head.decoder.weight",)


def test_deepspeed_is_not_imported(runs: dict, settings: Path, tmp_path: Path) -> None:
    run = runs[1, "bf16", "ours"]
    code = (
        "import sys; from pathlib import Path; from megainter.conversion.zero import convert;"
        f"convert(Path({str(run)!r}), Path({str(tmp_path / 'hf')!r}), config_file=Path({str(settings)!r}));"
        "sys.exit('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr


def test_where_the_folder_is_found(runs: dict, tmp_path: Path) -> None:
    run = runs[1, "bf16", "ours"]
    tag = run / (run / "latest").read_text().strip()
    assert find_deepspeed_folder(run) == tag
    assert find_deepspeed_folder(tag) == tag
    assert find_deepspeed_folder(tmp_path) is None
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(UsageError, match="leaves its folder"):
        find_deepspeed_folder(tmp_path)


def broken(run: Path, folder: Path) -> Path:
    """A copy of a run's tag folder, to be damaged."""
    shutil.copytree(run / (run / "latest").read_text().strip(), folder / "tag")
    return folder / "tag"


@pytest.mark.parametrize("stage", [1, 3])
def test_a_missing_rank_is_named_and_nothing_written(stage: int, runs: dict, settings: Path, tmp_path: Path) -> None:
    tag = broken(runs[stage, "bf16", "ours"], tmp_path)
    next(tag.glob("*rank_1_*optim_states.pt")).unlink()
    with pytest.raises(DamagedError, match="1 of 2 ranks"):
        convert(tag, tmp_path / "hf", config_file=settings)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_flipped_bit_is_found(stage: int, runs: dict, settings: Path, tmp_path: Path) -> None:
    tag = broken(runs[stage, "bf16", "ours"], tmp_path)
    victim = next(tag.glob("*rank_1_*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DamagedError, match=r"CRC-32|truncated"):
        convert(tag, tmp_path / "hf", config_file=settings)


def test_shards_of_another_model_are_refused(runs: dict, settings: Path, tmp_path: Path) -> None:
    tag = broken(runs[3, "bf16", "ours"], tmp_path)
    for path in tag.glob("*model_states.pt"):
        state = torch.load(path, weights_only=True)
        group = next(shapes for shapes in state["param_shapes"] if "mrm_head.transform.weight" in shapes)
        group["mrm_head.transform.weight"] = torch.Size([20, 24])
        torch.save(state, path)
    with pytest.raises(DamagedError, match="mixed"):
        convert(tag, tmp_path / "hf", config_file=settings)


@pytest.mark.parametrize("which", ["optim", "model"])
def test_a_hostile_shard_runs_nothing(which: str, runs: dict, settings: Path, tmp_path: Path) -> None:
    tag = broken(runs[1, "bf16", "ours"], tmp_path)
    for path in tag.glob(f"*{which}_states.pt"):
        path.write_bytes(zipped(reduce_pickle(f"touch {tmp_path / 'ran'}")))
    with pytest.raises(DamagedError, match="asks to run"):
        convert(tag, tmp_path / "hf", config_file=settings)
    assert not (tmp_path / "ran").exists()


def test_model_parallel_checkpoints_are_refused(runs: dict, tmp_path: Path) -> None:
    tag = broken(runs[1, "bf16", "ours"], tmp_path)
    shutil.copy(tag / "mp_rank_00_model_states.pt", tag / "mp_rank_01_model_states.pt")
    with pytest.raises(UsageError, match="model parallelism"):
        open_deepspeed(tag)


def test_malformed_optimiser_states_end_in_one_line(runs: dict, tmp_path: Path) -> None:
    tag = broken(runs[1, "bf16", "ours"], tmp_path)
    path = next(tag.glob("*rank_0_*optim_states.pt"))
    for content in ({}, {"optimizer_state_dict": {}}, {"optimizer_state_dict": {"partition_count": 2, "param_slice_mappings": 3}}, [1]):
        torch.save(content, path)
        with pytest.raises(MegainterError) as raised:
            open_deepspeed(tag)
        assert "\n" not in str(raised.value)
