"""Which precision "auto" stands for: by the flags of real processors, by brute force, over ranks and over a resumed run."""

import dataclasses
import itertools
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megainter.data.feature_store.record import StoreSchema
from megainter.data.feature_store.writer import create_store
from megainter.devices import units_of
from megainter.errors import UsageError
from megainter.precision import Precision, Units, automatic, automatic_in_training, cpu_units, cuda_units
from tests.synthetic import environment, settings, write_data

SKYLAKE = "flags\t\t: fpu sse2 avx2 fma avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni"
ZEN_4 = f"{SKYLAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN_4} amx_bf16 avx512_fp16 amx_tile amx_int8"
GRAVITON_2 = "Features\t: fp asimd evtstrm aes fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
GRAVITON_3 = f"{GRAVITON_2} sve svei8mm svebf16 i8mm bf16"


def cpuinfo(*cores: str, model: str = "a CPU with avx512_bf16 in its name") -> str:
    """The text of /proc/cpuinfo with one paragraph for each core."""
    paragraphs = [f"processor\t: {n}\nmodel name\t: {model}\n{core}\nbugs\t\t: amx_bf16\n" for n, core in enumerate(cores)]
    return "\n".join(paragraphs)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        ([SKYLAKE], "fp32"),
        ([ZEN_4, ZEN_4], "bf16"),
        ([SAPPHIRE_RAPIDS], "bf16"),
        ([SKYLAKE + " amx_bf16"], "bf16"),
        ([GRAVITON_2], "fp32"),
        ([GRAVITON_3, GRAVITON_3], "bf16"),
        ([GRAVITON_3, GRAVITON_2], "fp32"),  # big cores and little ones
        ([], "fp32"),
    ],
)
def test_a_cpu_takes_bf16_where_every_core_has_units_for_it(cores: list[str], expected: str) -> None:
    precision, why = automatic([cpu_units(cpuinfo(*cores))])
    assert precision == expected
    assert f"precision {expected} (auto), on a CPU with" in why
    assert ("without bf16 units" in why) == (expected == "fp32")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "fp16"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 6), "bf16"), ((9, 0), "bf16"), ((10, 0), "bf16")],
)
def test_a_gpu_takes_bf16_from_capability_8(capability: tuple[int, int], expected: str) -> None:
    precision, why = automatic([cuda_units("Some GPU", capability)])
    assert precision == expected
    assert f"Some GPU (compute capability {capability[0]}.{capability[1]})" in why


DEVICES = {
    "new GPU": (cuda_units("H100", (9, 0)), {"bf16", "fp16", "fp32"}),
    "old GPU": (cuda_units("V100", (7, 0)), {"fp16", "fp32"}),
    "new CPU": (cpu_units(SAPPHIRE_RAPIDS), {"bf16", "fp32"}),
    "old CPU": (cpu_units(SKYLAKE), {"fp32"}),
}


def test_several_devices_take_the_best_that_all_compute() -> None:
    """Every set of devices, every ZeRO stage and every earlier precision, against the rule as the issue words it."""
    for count in (1, 2, 3):
        for names in itertools.combinations_with_replacement(DEVICES, count):
            for stage in (0, 1):
                check_rule([DEVICES[name][0] for name in names], [DEVICES[name][1] for name in names], stage)


def check_rule(units: list[Units], computed: list[set[str]], stage: int) -> None:
    """One set of devices, begun in anything."""
    able = {name for name in ("bf16", "fp16", "fp32") if all(name in each for each in computed)} - ({"fp16"} if stage == 0 else set())
    best = "bf16" if "bf16" in able else "fp16" if "fp16" in able else "fp32"
    for begun in (None, "bf16", "fp16", "fp32"):
        found, why = automatic_in_training(units, stage, begun=begun)  # type: ignore[arg-type]
        assert found == (begun if begun in able else best)
        assert f"precision {found} (auto)" in why
        assert (begun in (None, best)) or "begun in" in why
        assert all(each.name in why for each in units)


def test_stage_0_on_an_older_gpu_is_told() -> None:
    units = [DEVICES["old GPU"][0]]
    assert automatic_in_training(units, 1)[0] == "fp16"
    precision, why = automatic_in_training(units, 0)
    assert precision == "fp32"
    assert why.endswith("; fp16 needs engine.zero_stage 1, 2 or 3")


def test_a_deepspeed_json_that_states_a_precision_is_heard(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"

    def taken(content: dict[str, Any], device: str, stage: int = 2) -> Precision:
        file.write_text(json.dumps(content))
        return automatic_in_training([DEVICES[device][0]], stage, file)[0]

    assert taken({"bf16": {"enabled": True}}, "old CPU") == "bf16"
    assert taken({"fp16": {"enabled": True}}, "new GPU") == "fp16"
    assert taken({"bf16": {"enabled": False}}, "new GPU") == "fp16"
    assert taken({"bf16": {"enabled": False}}, "new CPU") == "fp32"
    assert taken({"steps_per_print": 1}, "new CPU") == "bf16"
    with pytest.raises(UsageError, match=r"enables fp16, which needs engine\.zero_stage 1, 2 or 3"):
        taken({"fp16": {"enabled": True}}, "new GPU", stage=0)


def test_this_machine_is_read() -> None:
    """PyTorch's own look at the processor says the same as the kernel's words."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if "avx512_bf16" not in flags:
        pytest.skip("this PyTorch does not tell what this processor has")
    assert ("bf16" in units_of(torch.device("cpu")).computes) == (flags["avx512_bf16"] or flags["amx_bf16"])
    assert units_of(torch.device("meta")).computes == {"fp32"}


def test_an_extraction_goes_on_in_what_its_store_was_begun_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where that is slow, as the records of a store are alike; a new store takes what ranks elsewhere compute as well."""
    from preprocessing.extraction.extract import _automatic

    old, new = DEVICES["old CPU"][0], DEVICES["new CPU"][0]
    plain, half = (StoreSchema(8, 2, ("__background__", "a"), "x", settings=given) for given in ({}, {"precision": "bf16"}))
    for store, schema in (("plain", plain), ("half", half)):
        create_store(tmp_path / store, schema)

    def taken(here: Units, store: str, *elsewhere: Units) -> tuple[str, str]:
        monkeypatch.setattr("preprocessing.extraction.extract.units_of", lambda device: here)
        return _automatic(tmp_path / store, "cpu", elsewhere), capsys.readouterr().out

    assert [taken(old, "new")[0], taken(new, "new")[0], taken(new, "new", new)[0], taken(new, "new", old)[0]] == [
        "fp32", "bf16", "bf16", "fp32",
    ]  # fmt: skip
    assert taken(new, "half")[0] == taken(old, "half")[0] == "bf16"
    assert taken(new, "plain")[0] == taken(old, "plain")[0] == "fp32"
    assert "half was begun in; fp32 would be faster here" in taken(old, "half")[1]
    assert "precision fp32 (auto), as this was begun in; bf16 would be taken" in taken(new, "plain")[1]


def told_by_rank(rank: int, names: list[str], folder: str, answers: Any) -> None:
    """One rank of a group whose devices differ: what it takes for "auto"."""
    import megainter.training.precision as module
    from megainter.config.reading import load_config

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(names))
    module.units_of = lambda device: DEVICES[names[rank]][0]  # type: ignore[assignment]
    config = load_config(Path("base"), settings(Path("p"), Path("s"), Path(folder) / "run", engine__precision="auto"))
    taken = module.with_precision(config, torch.device("cpu"))
    answers.put((rank, taken.engine.precision, taken == dataclasses.replace(config, engine=taken.engine)))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_on_unlike_machines_agree(tmp_path: Path) -> None:
    """Rank 0 has bf16, rank 1 has not: none takes it, and nothing else of the settings changes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megainter.training.precision"])  # read once for both
    answers = context.Queue()
    names = ["new CPU", "old CPU"]
    processes = [context.Process(target=told_by_rank, args=(rank, names, str(tmp_path), answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert found == [(0, "fp32", True), (1, "fp32", True)]


PRETRAIN = """
import json, sys
import megainter.training.precision as precision
from megainter.config.reading import load_config
from megainter.precision import cpu_units
from megainter.training import engine
from megainter.tasks.pretraining.training import pretrain
with engine.distributed():
    for output, steps, flags in json.loads(sys.argv[1]):
        precision.units_of = lambda device: cpu_units(flags)
        pretrain(load_config(None, [*sys.argv[2:], "--output", output, "--training.steps", str(steps)]))
        print("== next start ==", flush=True)
"""


def test_a_run_goes_on_in_the_precision_it_was_begun_in(tmp_path: Path) -> None:
    """One begun without bf16 units and taken up again with them, one the other way round: nothing takes bf16 where the CPU lacks it."""
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    starts = [(old, 1, SKYLAKE), (old, 2, ZEN_4), (new, 1, ZEN_4), (new, 2, ZEN_4), (new, 3, SKYLAKE)]
    words = settings(*write_data(tmp_path, images=12), tmp_path / "run", engine__precision="auto")
    command = [sys.executable, "-c", PRETRAIN, json.dumps(starts), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.split("== next start ==")[: len(starts)]
    for text, precision in zip(said, ["fp32", "fp32", "bf16", "bf16", "fp32"], strict=True):
        assert text.count(f" precision {precision} (auto), ") == 1
        assert f"1 process(es) on cpu, {precision}, ZeRO stage 1" in text
    assert "as this was begun in; bf16 would be taken on a CPU with AVX512-BF16" in said[1]
    assert "; this was begun in bf16, which is not computed here" in said[4]
    for folder in (old, new):
        recorded = json.loads((Path(folder) / "config.json").read_text())
        assert (recorded["engine"]["precision"], recorded["asked"]) == ("fp32", {"engine.precision": "auto"})
