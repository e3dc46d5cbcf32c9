"""The command line: words to a verb and its config, errors to an exit code; and the doors in tools/."""

import dataclasses
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rpo_megatron import __version__, cli, config_verbs
from rpo_megatron.config_io import dump
from rpo_megatron.errors import UserError
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the configs that verbs would run with, instead of running them."""
    configs: list[Any] = []
    monkeypatch.setattr(cli, "_resolve", lambda path: configs.append)
    return configs


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether another process of a job has spoken already is not the matter here."""
    monkeypatch.setattr("rpo_megatron.distributed.first_to_fail", lambda: True)


@pytest.mark.parametrize("words", [[], ["help"], ["-h"], ["--help"]])
def test_help_lists_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A verb that the help does not name is not found."""
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and verb.summary in shown for name, verb in cli.VERBS.items())


@pytest.mark.parametrize("name", cli.VERBS)
def test_verbs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A row that points at a function that was renamed or moved fails only when somebody uses it."""
    verb = cli.VERBS[name]
    knobs = {spec.name for spec in dataclasses.fields(verb.config)}
    module, function = verb.run.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert verb.positional is None or verb.positional in knobs
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: rpo {name}" in shown
    assert all(f"  {knob}" in shown for knob in knobs)
    assert all(f"[{option} WORD]" in shown and f"  {key}: " in shown for option, key in verb.options.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plan", "plan [RUN.yaml] ["),
        ("methods", "methods [NAME] ["),
        ("inspect", "inspect PREFIX ["),
        ("train", "train [F"),
    ],
)
def test_usage(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a main argument that looks as if it had to be given, and one that looks as if it had not."""
    assert cli.main([name, "--help"]) == 0
    assert f"usage: rpo {words}" in capsys.readouterr().out


def test_libraries_do_not_bury_the_run(tmp_path: Path) -> None:
    """Catches tens of lines of megatron's and torch's warnings before a run says a word of its own."""
    (tmp_path / "run.yaml").write_text(dump(tiny.run_config(tmp_path, "train.steps=1")))
    command = ["-m", "rpo_megatron", "train", str(tmp_path / "run.yaml")]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("asked", [[], ["default"]])
def test_warnings_can_be_asked_for(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a filter that -W and PYTHONWARNINGS do not take away, and one that hides our own warnings."""
    monkeypatch.setattr(sys, "warnoptions", asked)
    monkeypatch.setattr(cli, "leave", lambda code: None)
    monkeypatch.setattr(cli, "main", lambda: 0)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        cli.entry()
        for module in ("megatron.core.optimizer", "torch", "torchless", "rpo_megatron.cli"):
            warnings.warn_explicit(module, UserWarning, "file.py", 1, module=module)
    quiet = [] if asked else ["megatron.core.optimizer", "torch"]
    assert [str(one.message) for one in shown] == [
        name for name in ("megatron.core.optimizer", "torch", "torchless", "rpo_megatron.cli") if name not in quiet
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug reports start with it."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_file_and_overrides(tmp_path: Path, ran: list[Any]) -> None:
    """The command line wins over the file, wherever the file stands among the words."""
    file = tmp_path / "c.yaml"
    file.write_text("load: a\nsave: b\ntensor: 2\n")
    assert cli.main(["export", "tensor=4", str(file), "pipeline=2"]) == 0
    assert ran == [config_verbs.ExportConfig(load="a", save="b", tensor=4, pipeline=2)]


def test_a_bare_word_is_the_main_argument(ran: list[Any]) -> None:
    """`rpo inspect data/train` must not need `prefix=`."""
    assert cli.main(["inspect", "data/train", "examples=1"]) == 0
    assert ran == [config_verbs.InspectConfig(prefix="data/train", examples=1)]


@pytest.mark.parametrize("option", [["--with", "value"], ["--with=value"], ["score.what=value"]])
def test_options_are_other_names_of_keys(tmp_path: Path, ran: list[Any], option: list[str]) -> None:
    """`rpo score run.yaml --with value` must not be read as a key, a file or a bare word, wherever it stands."""
    file = tmp_path / "c.yaml"
    file.write_text(
        "run_dir: r\nmodel: {path: m}\ndata: {train: t}\nobjective: {method: dpo}\noptimizer: {lr: 1e-4}\n"
        "score: {what: logp}\n"
    )
    for words in (["score", str(file), *option, "seed=7"], ["score", *option, "seed=7", str(file)]):
        assert cli.main(words) == 0
    assert ran[0] == ran[1]
    assert (ran[0].score.what, ran[0].seed) == ("value", 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], r"rpo trian: error: there is no verb 'trian'; did you mean 'train'\? \(verbs: prepare, "),
        (["--train"], "there is no verb '--train'; did you mean 'train'"),
        (["train", "a.yaml", "b.yml"], r"two config files: 'a\.yaml' and 'b\.yml'"),
        (["train", "--lr=1"], r"cannot read '--lr=1': expected FILE\.yaml or key\.path=value"),
        (["train", "run"], "cannot read 'run'"),
        (["inspect", "--prefix"], "cannot read '--prefix'"),
        (["train", "nowhere.yaml"], r"config file 'nowhere\.yaml' does not exist"),
        (["export", "a"], "'save' must be given"),
        (["export", "a", "save=b", "tensr=2"], "unknown key 'tensr'; did you mean 'tensor'"),
        (["methods", "dpoo"], "did you mean 'dpo'"),
        (["score", "a.yaml", "--with"], "--with needs a word after it; it sets score.what"),
        (["score", "--with="], "--with needs a word after it"),
        (["train", "--with", "value"], "cannot read '--with'"),
        (["score", "--width=value"], "cannot read '--width=value'"),
        (["plan", "a.yaml", "gpu=H100", "parallel.tensor=4"], "'parallel.tensor' belongs to the run: change it in the"),
        (["plan", "a.yaml", "gpu=H100", "parallell=4"], "unknown key 'parallell'"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one message on stderr that says what to do, no traceback."""
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(shown.err)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError of ours is not the user's fault and must not be dressed as such."""

    def bug(_: Any) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(cli, "_resolve", lambda path: bug)
    with pytest.raises(ValueError, match="ours"):
        cli.main(["inspect", "x"])


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (UserError("yours"), 2)])
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    """Schedulers and shell scripts decide by them."""

    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_resolve", lambda path: fail)
    assert cli.main(["inspect", "x"]) == code


def test_as_a_program() -> None:
    """`python -m rpo_megatron` must hand main's exit code on: torchrun and CI see nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "rpo_megatron", "trian"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "did you mean 'train'" in done.stderr


@pytest.mark.parametrize("words", [["--version"], ["train", "--help"], ["methods"]])
def test_a_reader_that_leaves_early(words: list[str]) -> None:
    """`rpo inspect x | head` must not end in a complaint, nor fail a script that runs under pipefail."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "rpo_megatron", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_one_process_speaks_and_the_others_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun kills all when the first one ends: a silent process that ended before the message was printed would
    take it along."""
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli, "sys", type("", (), {"modules": {}, "stderr": sys.stderr, "stdout": sys.stdout}))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for local_rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert cli.main(["trian"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines
        assert len(waited) == int(local_rank)


def test_the_installed_command() -> None:
    """The console script of setup.py names a function as text."""
    assert '"rpo = rpo_megatron.cli:entry"' in (ROOT / "setup.py").read_text()
    assert callable(cli.entry)


def door(name: str) -> ModuleType:
    """A script of tools/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--loader hf --saver mcore --load-dir a --save-dir b --target-tensor-parallel-size 2",
            config_verbs.ImportConfig(load="a", save="b", tensor=2),
        ),
        (
            "--loader=mcore --saver=hf --load-dir=a --save-dir=b --max-shard-gb 0.5 --target-pipeline-parallel-size 3",
            config_verbs.ExportConfig(load="a", save="b", max_shard_gb=0.5, pipeline=3),
        ),
    ],
)
def test_convert_checkpoint(flags: str, expected: Any, ran: list[Any]) -> None:
    """Megatron's flags must end in the right direction and in the knobs that they mean."""
    assert door("convert_checkpoint").main(flags.split()) == 0
    assert ran == [expected]


@pytest.mark.parametrize("flags", ["--loader hf --saver hf", "--loader mcore", "", "--saver hf --loader llama_mistral"])
def test_convert_checkpoint_refuses(flags: str, ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """No direction may be guessed."""
    assert door("convert_checkpoint").main(flags.split()) == 2
    assert "--loader hf --saver mcore" in capsys.readouterr().err
    assert ran == []


@pytest.mark.parametrize("name", ["convert_checkpoint", "preprocess_data"])
def test_doors_explain_themselves(name: str) -> None:
    """Run as a script from any directory, as people do with Megatron's tools."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100
