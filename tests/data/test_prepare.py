"""`rpo prepare`: every policy is counted, the store does not depend on the workers, an error leaves nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpo_megatron.config_verbs import ColumnsConfig, PrepareConfig
from rpo_megatron.data import workers
from rpo_megatron.data.prepare import prepare
from rpo_megatron.data.store import Store
from rpo_megatron.errors import UserError

Writer = Callable[..., str]
FILES = ("bin", "idx", "reward.bin", "reward.idx", "json")


def listed(prompt: str, *responses: tuple[str, float | None]) -> dict[str, Any]:
    return {"prompt": prompt, "responses": [{"text": text, "reward": reward} for text, reward in responses]}


GOOD = listed("name a colour", ("blue", 1.0), ("red", 0.5))


@pytest.fixture
def run(tmp_path: Path, sentencepiece_model: str, write_rows: Writer) -> Callable[..., Store]:
    """Writes the rows, prepares them with one worker, opens the store."""

    def prepare_rows(rows: list[Any], **knobs: Any) -> Store:
        config = PrepareConfig(
            **{
                "input": write_rows(rows),
                "output_prefix": str(tmp_path / "out" / "store"),
                "tokenizer": sentencepiece_model,
                "workers": 1,
                **knobs,
            }
        )
        prepare(config)
        return Store.open(config.output_prefix, verify=True)

    return prepare_rows


def decode(store: Store, tokenizer: Any, i: int) -> list[str]:
    group = store.group(i)
    return [tokenizer.decode(ids.tolist()) for ids in (group.prompt, *group.responses)]


def test_rows_become_groups_in_order(run: Callable[..., Store], sentencepiece_tokenizer: Any) -> None:
    """Order, rewards and texts, end to end."""
    rows = [listed(f"{i} {i}", ("one", i), ("two", -i), ("three", 0.25)) for i in range(130)]  # more than two chunks
    store = run(rows)
    assert len(store) == 130
    assert decode(store, sentencepiece_tokenizer, 77) == ["<s>77 77", "one</s>", "two</s>", "three</s>"]
    for i in range(130):
        reward = store.group(i).reward
        assert reward is not None
        assert reward.tolist() == [i, -i, 0.25]
    assert store.manifest.dropped == {}
    assert store.manifest.reward is not None
    assert store.manifest.reward.source == "given"
    assert store.manifest.template.source == "none"
    assert store.manifest.tokenizer == sentencepiece_tokenizer.info


def test_limit(run: Callable[..., Store]) -> None:
    """Only the first rows are read: a malformed one behind them is not seen."""
    assert len(run([GOOD, GOOD, {"bad": 1}], limit=2)) == 2


TRIPLE = listed("hello", ("one", 3.0), ("", 2.0), ("two", 1.0))
REPEATED = listed("hello", ("one", 3.0), ("one", 2.0), ("two", 1.0))
LONG = listed("hello", ("one", 3.0), ("two " * 50, 2.0), ("three", 1.0))


@pytest.mark.parametrize(
    ("row", "knobs", "rewards", "dropped"),
    [
        (TRIPLE, {}, [3.0, 1.0], {"response_empty": 1}),
        (listed("hello", ("one", 3.0), (" \n", 2.0), ("two", 1.0)), {}, [3.0, 1.0], {"response_empty": 1}),
        (TRIPLE, {"empty_response": "drop_group"}, None, {"group_empty": 1}),
        (REPEATED, {}, [3.0, 1.0], {"response_duplicate": 1}),
        (REPEATED, {"duplicate": "keep"}, [3.0, 2.0, 1.0], {}),
        (LONG, {"max_length": 100}, [3.0, 1.0], {"response_too_long": 1}),
        (LONG, {"max_length": 100, "too_long": "drop_group"}, None, {"group_too_long": 1}),
        (LONG, {}, [3.0, 2.0, 1.0], {}),
        (listed("hello", ("one", 1.0)), {}, None, {"group_single_response": 1}),
        (
            listed("hello", ("one", 1.0), ("", 1.0)),
            {},
            None,
            {"group_single_response": 1, "response_empty": 1},
        ),
    ],
)
def test_policies_on_responses(
    run: Callable[..., Store],
    row: dict[str, Any],
    knobs: dict[str, Any],
    rewards: list[float] | None,
    dropped: dict[str, int],
) -> None:
    """Dropping a response must drop its reward and not its neighbour's, and must be counted."""
    store = run([GOOD, row, GOOD], **knobs)
    assert store.manifest.dropped == dropped
    assert len(store) == (2 if rewards is None else 3)
    if rewards is not None:
        reward = store.group(1).reward
        assert reward is not None
        assert reward.tolist() == rewards
    in_groups = sum(count for reason, count in dropped.items() if reason.startswith("group_"))
    assert len(store) + in_groups == 3


def test_max_length_is_inclusive(run: Callable[..., Store]) -> None:
    """Prompt + response + BOS + EOS may be max_length tokens long, not one less."""
    longest = run([GOOD]).manifest.max_length
    assert run([GOOD], max_length=longest).manifest.dropped == {}
    with pytest.raises(UserError, match=r"no group is left to store; dropped: \{'group_single_response': 1"):
        run([GOOD], max_length=longest - 1)


@pytest.mark.parametrize(
    ("row", "knob", "message"),
    [
        (TRIPLE, "empty_response", r"rows\.jsonl:2: response 1 is empty"),
        (LONG, "too_long", r"rows\.jsonl:2: response 1 has \d+ tokens with its prompt, max_length is 40"),
        (listed("hello", ("one", 1.0)), "single_response", r"rows\.jsonl:2: 1 of 1 responses left"),
    ],
)
def test_policy_error_names_the_row(
    run: Callable[..., Store], tmp_path: Path, row: dict[str, Any], knob: str, message: str
) -> None:
    """And leaves nothing behind."""
    with pytest.raises(UserError, match=message):
        run([GOOD, row], max_length=40, **{knob: "error"})
    assert list((tmp_path / "out").iterdir()) == []


BARE = {"prompt": "hello", "responses": ["one", "two"]}
PAIR = {"prompt": "hello", "chosen": "one", "rejected": "two"}


def test_missing_rewards(run: Callable[..., Store]) -> None:
    """Default: stop, naming both rows. Otherwise drop the group, or all rewards, whichever row comes first."""
    partly = listed("hello", ("one", 1.0), ("two", None))
    for rows in ([GOOD, partly], [GOOD, BARE], [BARE, GOOD]):
        with pytest.raises(UserError, match=r"rows\.jsonl:2: .*rows\.jsonl:1: .*missing_reward="):
            run(rows)
    for rows in ([GOOD, partly, GOOD], [partly, GOOD, GOOD]):
        store = run(rows, missing_reward="drop_group")
        assert (len(store), store.has_reward) == (2, True)
        assert store.manifest.dropped == {"group_missing_reward": 1}
        store = run(rows, missing_reward="no_rewards")
        assert (len(store), store.has_reward) == (3, False)
        assert store.manifest.dropped == {}
    store = run([BARE, BARE])
    assert not store.has_reward
    with pytest.raises(UserError, match="'group_missing_reward': 2"):
        run([BARE, BARE], missing_reward="drop_group")


def test_preferences_and_rewards_do_not_mix(run: Callable[..., Store]) -> None:
    """1 and 0 for chosen and rejected are not on the scale of measured rewards."""
    store = run([PAIR, PAIR])
    assert store.manifest.reward is not None
    assert (store.manifest.reward.source, store.manifest.reward.mean) == ("preference", 0.5)
    with pytest.raises(UserError, match="only chosen over rejected"):
        run([PAIR, GOOD])
    with pytest.raises(UserError, match="only chosen over rejected"):
        run([PAIR, GOOD], missing_reward="drop_group")
    assert len(run([GOOD, PAIR], missing_reward="drop_group")) == 1
    assert not run([PAIR, GOOD], missing_reward="no_rewards").has_reward


def test_mapped_columns(run: Callable[..., Store], sentencepiece_tokenizer: Any) -> None:
    """The mapping of the config reaches the workers."""
    rows = [{"instruction": "hello", "completions": [{"response": "one", "s": 2}, {"response": "two", "s": 1}]}]
    columns = ColumnsConfig(prompt="instruction", responses="completions", text="response", reward="s")
    assert decode(run(rows, columns=columns), sentencepiece_tokenizer, 0) == ["<s>hello", "one</s>", "two</s>"]
    with pytest.raises(UserError, match="different layouts"):
        run(rows, columns=ColumnsConfig(responses="completions", chosen="x"))


def test_boundary_merges_are_counted(run: Callable[..., Store]) -> None:
    """Prompts that end in a space are the usual reason; the count tells the user to look."""
    store = run([listed("what is ", ("one", 1.0), ("two", 0.0)), GOOD])
    assert store.manifest.boundary_merges == 2


def test_two_workers_write_the_same_bytes(
    run: Callable[..., Store],
    tmp_path: Path,
    chat_directory: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks that come back out of order, or a template that only one process has, would change the store. Then the
    same two processes meet a bad row: the message is the one that a single process gives, nothing stays behind."""
    monkeypatch.setattr(workers, "FEW_CHUNKS", 0)
    rows = [listed(f"{i} {i}", ("one", i), ("two", -i), ("", 0), ("two", 1)) for i in range(300)]
    knobs = {"tokenizer": chat_directory, "duplicate": "keep"}
    one = run(rows, **knobs, output_prefix=str(tmp_path / "one" / "s"))
    two = run(rows, **knobs, output_prefix=str(tmp_path / "two" / "s"), workers=2)
    assert one.fingerprint == two.fingerprint
    for name in FILES:
        assert Path(f"{one.prefix}.{name}").read_bytes() == Path(f"{two.prefix}.{name}").read_bytes()
    assert one.manifest.template.source == "tokenizer"
    assert "100%" in capfd.readouterr().err  # the progress line

    bad = [*rows[:150], listed("x", ("one", float("nan")), ("two", 1)), *rows[150:]]
    with pytest.raises(UserError, match=r"rows\.jsonl:151: column 'responses\[0\]\.reward'"):
        run(bad, **knobs, output_prefix=str(tmp_path / "bad" / "s"), workers=2)
    assert list((tmp_path / "bad").iterdir()) == []


def test_failure_keeps_the_older_store(run: Callable[..., Store]) -> None:
    """A typo in a second run must not cost the first one's store."""
    fingerprint = run([GOOD, GOOD]).fingerprint
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        run([GOOD, {"prompt": 3}])
    with pytest.raises(UserError, match="no group is left"):
        run([])
    assert Store.open(run([GOOD, GOOD]).prefix).fingerprint == fingerprint


def test_report(run: Callable[..., Store], capsys: pytest.CaptureFixture[str]) -> None:
    """What was dropped is said, not only stored."""
    run([TRIPLE, REPEATED])
    out = capsys.readouterr().out
    assert "2 groups, 4 responses" in out
    assert "1  dropped: response_duplicate" in out
    assert "1  dropped: response_empty" in out


def test_door_with_flags(tmp_path: Path, sentencepiece_model: str, write_rows: Writer) -> None:
    """tools/preprocess_data.py passes flags on to the config; an unknown one is the config loader's error."""
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    prefix = str(tmp_path / "s")

    def call(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tool), "--input", write_rows([{"q": "p", "chosen": "a", "rejected": "b"}])]
        command += ["--output-prefix", prefix, f"--tokenizer-model={sentencepiece_model}", "--workers", "1", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    done = call("--columns.prompt", "q")
    assert done.returncode == 0, done.stderr
    assert len(Store.open(prefix)) == 1
    wrong = call("--max-lenght", "12")
    assert wrong.returncode == 2
    assert "max_length" in wrong.stderr
    shown = call("--help")
    assert shown.returncode == 0
    assert "output_prefix" in shown.stdout


def test_real_data(run: Callable[..., Store], shared: Path) -> None:
    """94 real prompts with 7 or 8 responses each; a Llama directory and its bare sentencepiece model give one store."""
    knobs = {"input": str(shared / "data" / "alpaca_eval_multi.valid.jsonl.gz"), "max_length": 3000}
    model = shared / "models" / "stories260K"
    from_directory = run([], **knobs, tokenizer=str(model))
    from_model = run([], **knobs, tokenizer=str(model / "tokenizer.model"))
    assert from_directory.fingerprint == from_model.fingerprint
    manifest = from_directory.manifest
    groups = sum(count for reason, count in manifest.dropped.items() if reason.startswith("group_"))
    assert len(from_directory) + groups == 94
    assert manifest.dropped["response_too_long"] > 0
    assert manifest.max_length <= 3000
    assert manifest.tokens == int(from_directory.prompt_length_D.sum()) + sum(
        int(from_directory.response_lengths(i).sum()) for i in range(len(from_directory))
    )
    rewards = np.concatenate([from_directory.group(i).reward for i in range(len(from_directory))])
    assert manifest.reward is not None
    assert manifest.reward.mean == pytest.approx(rewards.mean(dtype=np.float64))
    assert 0 <= rewards.min() <= rewards.max() <= 1


def extra(**columns: str) -> ColumnsConfig:
    return ColumnsConfig(extra=columns)


def test_extra_columns_of_objects(run: Callable[..., Store]) -> None:
    """Numbers that stay with the wrong response when another is dropped; dots that do not reach into objects; true and
    false refused, or stored as something else than 1 and 0."""
    row = {
        "prompt": "name a colour",
        "responses": [
            {"text": "blue", "reward": 1.0, "notes": {"helpful": 3}, "foreign": False},
            {"text": "blue", "reward": 1.0, "notes": {"helpful": 9}, "foreign": False},  # a duplicate: dropped
            {"text": "red", "reward": 0.5, "notes": {"helpful": -2.5}, "foreign": True},
        ],
    }
    store = run([row], columns=extra(helpful="notes.helpful", foreign="foreign"))
    numbers = store.numbers(0)
    assert {name: values.tolist() for name, values in numbers.items()} == {
        "reward": [1.0, 0.5],
        "helpful": [3.0, -2.5],
        "foreign": [0.0, 1.0],
    }


def test_extra_columns_of_lists_and_pairs(run: Callable[..., Store]) -> None:
    """A parallel list or the two columns of a pair read in the wrong order."""
    lists = {"prompt": "name a colour", "responses": ["blue", "red"], "rewards": [1, 0], "brief": [7, 8]}
    assert run([lists], columns=extra(brief="brief")).numbers(0)["brief"].tolist() == [7, 8]
    pair = {"prompt": "name a colour", "chosen": "blue", "rejected": "red", "chosen_brief": 7, "rejected_brief": 8}
    assert run([pair], columns=extra(brief="brief")).numbers(0)["brief"].tolist() == [7, 8]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"rows.jsonl:2: column 'responses\[1\].helpful': expected a finite number, true or false; found null"),
        ("3", r"found str '3'"),
        (1e39, r"found float 1e\+39"),
        (..., r"rows.jsonl:2: column 'helpful': missing \(columns.extra.helpful names it\)"),
    ],
)
def test_bad_extra_values_are_named(run: Callable[..., Store], value: object, message: str) -> None:
    """A missing or broken number that becomes 0 in silence."""
    good = [{"text": text, "reward": 1.0, "helpful": 1} for text in ("blue", "red")]
    bad = [dict(item) for item in good]
    bad[1] |= {} if value is ... else {"helpful": value}
    if value is ...:
        del bad[1]["helpful"]
    rows = [{"prompt": "name a colour", "responses": good}, {"prompt": "another", "responses": bad}]
    with pytest.raises(UserError, match=message):
        run(rows, columns=extra(helpful="helpful"))


@pytest.mark.parametrize("name", ["reward", "a.b", "two words"])
def test_bad_extra_names_are_refused(run: Callable[..., Store], name: str) -> None:
    """A column that would hide the reward, or become another file."""
    with pytest.raises(UserError, match=r"columns.extra\."):
        run([GOOD], columns=extra(**{name: "reward"}))
