"""Hostile hostfiles, recipe names, settings and environment values: each is refused in one line, and no program is started."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import megainter.training.engine  # noqa: F401 - DeepSpeed starts programs of its own when it is imported
from launcher.command import check_environment, inherited_environment
from megainter.errors import UsageError
from megainter.verbs.launch import launch
from tests.launcher.jobs import asked

CANARY = "canary"
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "pty.spawn")
started: list[str] = []
watching = False


def _watch(event: str, arguments: Any) -> None:
    if watching and event in STARTS:
        started.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_watch)  # Python's own report of every process it starts


@pytest.fixture
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a process was started or a file named "canary" appeared."""
    global watching
    monkeypatch.chdir(tmp_path)
    started.clear()
    watching = True
    yield
    watching = False
    assert not started
    assert not list(tmp_path.rglob(CANARY))


GOOD = ("pretrain", "--config", "base", "--output", "run")
HOSTFILES = [
    b"-oProxyCommand=touch${IFS}canary slots=1\n",
    b"--help slots=1\n",
    b"$(touch canary) slots=1\n",
    b"`touch canary` slots=1\n",
    b"a;touch canary slots=1\n",
    b"a|touch slots=1\n",
    b"a&touch slots=1\n",
    b"a>canary slots=1\n",
    b"'a' slots=1\n",
    b'"a" slots=1\n',
    b"a\\ slots=1\n",
    b"user@a slots=1\n",
    b"a/../b slots=1\n",
    b"a%h slots=1\n",
    b"a,b slots=1\n",
    b"[a-z] slots=1\n",
    b"a:22 slots=1\n",
    b"a slots=0\n",
    b"a slots=-1\n",
    b"a slots=1e9\n",
    b"a slots=99999\n",
    b"a slots=0x10\n",
    b"a slots=1 extra\n",
    b"a slots=$(touch${IFS}canary)\n",
    b"a\n",
    b"slots=4\n",
    b"a slots=1\r\n",
    b"a slots=1\na slots=2\n",
    b"a\x00b slots=1\n",
    b"a\x1b[31m slots=1\n",
    "ho\u202est slots=1\n".encode(),
    "h\u00f6st slots=1\n".encode(),
    b"\xff\xfe slots=1\n",
    b"a" * 300 + b" slots=1\n",
    b".a slots=1\n",
    b"a- slots=1\n",
    b"",
    b"# nothing\n",
]


@pytest.mark.parametrize("content", HOSTFILES)
@pytest.mark.usefixtures("nothing_starts")
def test_hostfiles(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(content)
    path.chmod(0o600)
    assert_refused(GOOD, hostfile=path)


COMMANDS = [
    ("extract", "--images", "x"),
    ("--config", "base"),
    ("pretrain", "--config", "base; touch canary"),
    ("pretrain", "--config", "$(touch canary)"),
    ("pretrain", "--config", "../../etc/passwd"),
    ("pretrain", "--config", "/dev/null\x00.toml"),
    ("pretrain", "--config", "base\x1b]0;x\x07"),
    ("pretrain", "--config", "\u202egnp.toml"),
    ("pretrain", "--config"),
    (*GOOD, "--engine.deepspeed"),
    (*GOOD, "-oProxyCommand=touch canary"),
    (*GOOD, "--training.seed", "$(touch canary)"),
    (*GOOD, "--training.seed", "1\n--training.steps=1"),
    (*GOOD, "--output", "run\ud800"),
    ("finetune",),
    ("finetune", "$(touch canary)"),
    ("finetune", "--config", "retrieval"),
    ("finetune", "retrieval", "--config", "retrieval; touch canary"),
    ("finetune", "vcr", "--config"),
    ("finetune", "classification", "--output", "run\x1b[0m"),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("nothing_starts")
def test_recipes_and_settings(command: tuple[str, ...]) -> None:
    assert_refused(command)


REMOTE = [
    (*GOOD, "--output", "run; touch canary"),
    (*GOOD, "--output", "$(touch canary)"),
    (*GOOD, "--output", "run %h"),
    (*GOOD, "--data.split", "`touch canary`"),
    (*GOOD, "--data.split", 'a"b'),
    (*GOOD, "--data.split", "a b"),
]


@pytest.mark.parametrize("command", REMOTE)
@pytest.mark.usefixtures("nothing_starts")
def test_settings_that_other_hosts_shells_would_read(command: tuple[str, ...], tmp_path: Path) -> None:
    assert_refused(command, hostfile=good_hosts(tmp_path))


ENVIRONMENT = [
    "LD_PRELOAD=/x.so", "BASH_ENV=/x", "BASH_FUNC_ls%%=() { touch canary; }", "PYTHONSTARTUP=/x", "IFS=x", "PROMPT_COMMAND=touch canary",
    "PDSH_RCMD_TYPE=exec", "DS_ENV_FILE=/x", "RANK=0", "MASTER_ADDR=a", "SLURM_JOB_ID=1", "OMPI_MCA_plm_rsh_agent=/x", "GIT_SSH=/x",
    "MEGAINTER_STOP_FILE=/x", "1A=2", "A", "=x", "A B=1", "A;touch canary=1", "-x=1", "A=\x00", "A=b\nC=d", "A=\x1b[0m",
]  # fmt: skip
REMOTE_ENVIRONMENT = [
    "A=$(touch canary)",
    "A=`touch canary`",
    "A=x; touch canary",
    'A="',
    "A='",
    "A=a b",
    "A=${IFS}",
    "A=%h",
    "A=b&c",
    "A=\u00e9",
]


@pytest.mark.parametrize("word", ENVIRONMENT)
@pytest.mark.usefixtures("nothing_starts")
def test_environment(word: str) -> None:
    assert_refused(GOOD, env=[word], processes=8)


@pytest.mark.parametrize("word", REMOTE_ENVIRONMENT)
@pytest.mark.usefixtures("nothing_starts")
def test_environment_that_other_hosts_shells_would_read(word: str, tmp_path: Path) -> None:
    assert_refused(GOOD, env=[word], hostfile=good_hosts(tmp_path))


@pytest.mark.parametrize("value", ["$(touch canary)", "x; touch canary", 'x"y', "a b"])
@pytest.mark.usefixtures("nothing_starts")
def test_inherited_environment(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    assert_refused(GOOD, hostfile=good_hosts(tmp_path))


@pytest.mark.parametrize(
    "word", ["NCCL_SOCKET_IFNAME=^docker0,lo", "NCCL_IB_HCA=^=mlx5_3:1", "UCX_TLS=^tcp", "GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=^"]
)
def test_interfaces_may_be_left_out_by_a_caret(word: str) -> None:
    name, _, value = word.partition("=")
    assert check_environment([word], remote=True) == {name: value}
    assert inherited_environment({name: value}) == {name: value}


@pytest.mark.parametrize(
    "word", ["NCCL_SOCKET_IFNAME=^a^b", "NCCL_SOCKET_IFNAME=^^a", "MY_NAME=^a", "NCCL_SOCKET_IFNAME=^a;b", "NCCL_X=^$(x)"]
)
def test_a_caret_elsewhere_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="for other hosts use"):
        check_environment([word], remote=True)


@pytest.mark.parametrize(
    "options",
    [
        {"master_addr": "-oProxyCommand=x"}, {"port": 80}, {"port": 70000}, {"restarts": -1}, {"grace": 0}, {"grace": float("nan")},
        {"processes": 0}, {"processes": 10**9}, {"include": "a;b"}, {"slurm": True, "time": "1:00; touch canary", "processes": 1},
        {"slurm": True, "partition": "x\n#SBATCH --wrap=touch", "processes": 1}, {"slurm": True, "account": "-x", "processes": 1},
        {"slurm": True, "nodes": 0, "processes": 1}, {"slurm": True, "nodes": 2}, {"nodes": 2}, {"time": "1:00:00"}, {"gpus": False},
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_starts")
def test_options(options: dict[str, Any]) -> None:
    assert_refused(GOOD, **options)


def good_hosts(folder: Path) -> Path:
    """A hostfile with nothing wrong."""
    path = folder / "hosts"
    path.write_text("a slots=4\nb slots=4\n")
    path.chmod(0o600)
    return path


def assert_refused(command: tuple[str, ...], **options: Any) -> None:
    """A usage error of one printable line."""
    with pytest.raises(UsageError) as caught:
        launch(*command, **asked(**options))
    assert str(caught.value).isprintable(), repr(str(caught.value))
