"""The strict loader: what reaches the program is what was meant, or an error that names the key."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rpo_megatron.config import RunConfig
from rpo_megatron.config_io import dump, load, write
from rpo_megatron.config_verbs import ExportConfig, PrepareConfig
from rpo_megatron.errors import UserError

MINIMAL = """
run_dir: runs/a
model: {path: m}
data: {train: d}
objective: {method: rpo_bwd, beta: 0.2}
optimizer: {lr: 1e-6}
"""


def minimal(tmp_path: Path, extra: str = "") -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + extra)
    return path


def test_precedence(tmp_path: Path) -> None:
    """Defaults < file < command line; a section that the command line touches must keep what the file says of it."""
    file = minimal(tmp_path, "parallel: {tensor: 2}\n")
    config = load(RunConfig, file, ["objective.eta=3", "parallel.pipeline=4", "seed=7", "seed=8"])
    assert (config.objective.beta, config.objective.eta) == (0.2, 3.0)
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence) == (2, 4, False)
    assert config.seed == 8
    assert load(RunConfig, file, ["objective.beta=0.5"]).objective.beta == 0.5


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", "+1e-6", "1.e-6"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 1e-6 as a string: a learning rate of the wrong type, or worse, one compared as text."""
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL.replace("1e-6", text))
    assert load(RunConfig, file, []).optimizer.lr == 1e-6
    assert load(RunConfig, minimal(tmp_path), [f"optimizer.lr={text}"]).optimizer.lr == 1e-6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objektive.beta=1", r"unknown key 'objektive'; did you mean 'objective'"),
        ("objective.bata=1", r"unknown key 'objective\.bata'; did you mean 'objective\.beta'"),
        ("zzz=1", r"unknown key 'zzz' \(known: .*run_dir"),
        ("seed=abc", r"'seed': expected `int`, got `str`"),
        ("seed=1.5", r"'seed': expected `int`"),
        ("seed=true", r"'seed': expected `int`, got `bool`"),
        ("optimizer.lr=fast", r"'optimizer\.lr': expected `float`"),
        ("data.packing=1", r"'data\.packing': expected `bool`"),
        ("precision=fp64", r"'precision': invalid enum value 'fp64'"),
        ("parallel=2", r"'parallel' is a section of keys, found 2"),
        ("seed.x=2", r"'seed'"),
        ("data.train=", None),
        ("optimizer.lr=[1", r"override 'optimizer\.lr=\[1': the value is not valid yaml"),
    ],
)
def test_bad_values(tmp_path: Path, override: str, message: str | None) -> None:
    """A misspelt or mistyped knob that is ignored costs a run; a message without the key costs an hour."""
    if message is None:
        assert load(RunConfig, minimal(tmp_path), [override]).data.train == ""
        return
    with pytest.raises(UserError, match=message):
        load(RunConfig, minimal(tmp_path), [override])


@pytest.mark.parametrize("key", ["run_dir", "model.path", "objective.method", "optimizer.lr"])
def test_mandatory_keys(key: str) -> None:
    """A default for these would be a guess. The key is named with its section even if the whole section is absent."""
    given_keys = {"run_dir": "r", "model.path": "m", "data.train": "d", "objective.method": "dpo", "optimizer.lr": "1"}
    with pytest.raises(UserError, match=f"'{key}' must be given"):
        load(RunConfig, None, [f"{name}={value}" for name, value in given_keys.items() if name != key])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid yaml"),
        ("- 1\n- 2\n", "must hold `key: value` lines, found a list"),
        ("just words", "found a str"),
        (b"load: \xff", "not valid yaml"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str | bytes, message: str) -> None:
    """The message names the file: with overrides and a file there are two places to look."""
    file = tmp_path / "x.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"x\\.yaml: .*{message}"):
        load(ExportConfig, file, [])


def test_missing_and_empty_files(tmp_path: Path) -> None:
    """No file is an error; an empty one is a config without keys."""
    with pytest.raises(UserError, match=r"config file '.*nowhere\.yaml' does not exist"):
        load(ExportConfig, tmp_path / "nowhere.yaml", [])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load(ExportConfig, tmp_path / "empty.yaml", ["load=a", "save=b"]).load == "a"


@pytest.mark.parametrize(
    "name", ["007", "yes", "1_000", "0x1f", "2020-01-01", "a b", "1e5", "*.jsonl", "[ab].gz", "{a", "a: b"]
)
def test_paths_stay_text(name: str) -> None:
    """A directory named like a number, a date or a truth value must not become one."""
    assert load(ExportConfig, None, [f"load={name}", "save=x"]).load == name


def test_null_clears_a_value(tmp_path: Path) -> None:
    """There must be a way to take back on the command line what the file sets."""
    file = minimal(tmp_path, "reference: {path: ref}\n")
    assert load(RunConfig, file, ["reference.path=null", "objective.beta=null"]).reference.path is None


def test_dump_names_every_knob(tmp_path: Path) -> None:
    """The config saved beside a run must not depend on the defaults of the version that reads it."""
    config = load(RunConfig, minimal(tmp_path), [])
    text = dump(config)
    for spec in dataclasses.fields(config.checkpoint):
        assert f"  {spec.name}: " in text


def test_write_and_load(tmp_path: Path) -> None:
    """What a run saves must start the same run."""
    config = load(RunConfig, minimal(tmp_path), ["optimizer.eps=1e-12", "train.epochs=0.5", "data.valid=v", "seed=-1"])
    write(config, tmp_path / "again.yaml")
    assert load(RunConfig, tmp_path / "again.yaml", []) == config


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)


@settings(deadline=None)
@example(source="1e5", target="12e4567", gb=1e-6, tensor=0)
@given(source=TEXTS, target=TEXTS, gb=st.floats(allow_nan=False), tensor=st.integers(-(2**62), 2**62))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, source: str, target: str, gb: float, tensor: int) -> None:
    """Quoting, special floats and paths that are not ASCII, or look like numbers, in the saved config."""
    config = ExportConfig(load=source, save=target, max_shard_gb=gb, tensor=tensor)
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    write(config, file)
    assert load(ExportConfig, file, []) == config


def test_mappings_and_lists_on_the_command_line(tmp_path: Path) -> None:
    """A named column or a list of columns that can be given in a file only, or does not survive a dump."""
    words = [
        "input=a",
        "output_prefix=b",
        "tokenizer=c",
        "columns.extra.helpful=notes.helpful",
        "columns.extra.year=2024",
    ]
    prepare = load(PrepareConfig, None, words)
    assert prepare.columns.extra == {"helpful": "notes.helpful", "year": "2024"}
    config = load(RunConfig, minimal(tmp_path), ["rewards.columns=[helpful, reward]", "rewards.clip=2"])
    assert config.rewards.columns == ("helpful", "reward")
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "again.yaml", []) == config
    with pytest.raises(UserError, match=r"'rewards.columns'"):
        load(RunConfig, minimal(tmp_path), ["rewards.columns=helpful"])


def test_wrong_word_lists_the_right_ones(tmp_path: Path) -> None:
    """An error that says a word is wrong and leaves the user to look for those that are not."""
    with pytest.raises(UserError, match=r"'score.what': .*'vlaue' \(one of reference, value, implicit"):
        load(RunConfig, minimal(tmp_path), ["score.what=vlaue"])
    with pytest.raises(UserError, match=r"'objective.pair': .*\(one of best_random, best_worst, all_pairs\)"):
        load(RunConfig, minimal(tmp_path), ["objective.pair=worst"])
