"""The quickstart's data and judge. The quickstart itself runs as `make quickstart`."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rpo_megatron.config import RunConfig
from rpo_megatron.config_io import load
from rpo_megatron.config_verbs import ColumnsConfig
from rpo_megatron.data.layouts import parse_row
from rpo_megatron.data.tokenizer import Tokenizer
from rpo_megatron.model.layout import check_layout
from rpo_megatron.model.shape import read_shape
from rpo_megatron.training.checks import check_config

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
PATHS = ["run_dir=run", "model.path=model", "data.train=train", "data.valid=valid"]
PROMPT = "Mia asks: Where does the frog live?"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(QUICKSTART)
    return importlib.import_module("judge")


@pytest.fixture
def make_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(QUICKSTART)
    return importlib.import_module("make_data")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Mia, the frog lives in a pond.", 1.0),
        ("The frog lives in a pond.", 0.8),
        ("Mia, the frog lives in a pond. I like animals very much.", 0.8),
        ("The frog lives in a pond. I like animals very much.", 0.6),
        ("Tom, the frog lives in a pond.", 0.8),  # polite to somebody else
        ("Sorry, Mia, I do not know that.", 0.2),
        ("Mia, the frog lives in a barn.", 0.0),
        ("Mia, the frog lives in a barn. I do not know.", 0.0),  # an honest wrong answer is still wrong
        ("The frog lives in a pond. The frog lives in a barn.", 0.0),  # every fact cannot be right
        ("Mia, the crab lives in a pond.", 0.0),  # of another animal
        ("Mia, the frog is green.", 0.0),  # an answer to another question
        ("Mia, the frog lives in a pond", 0.0),  # a sentence that was not finished
        ("", 0.0),
    ],
)
def test_rewards_by_hand(judge: ModuleType, response: str, expected: float) -> None:
    """Catches a judge that pays for a wrong answer, for naming all facts, or for the wrong child's name."""
    assert judge.reward(PROMPT, response) == expected


def test_an_unknown_prompt_is_an_error(judge: ModuleType) -> None:
    """Catches prompts decoded with rests of the chat template, whose answers would score 0 and pass for bad ones."""
    with pytest.raises(KeyError):
        judge.reward(f"<s>{PROMPT}", "Mia, the frog lives in a pond.")


def test_every_reward_is_the_judges(judge: ModuleType, make_data: ModuleType) -> None:
    """Catches data whose rewards and judge have come apart, so that training would aim at something else than is
    measured; and data without differences to learn from."""
    groups = [group for part in make_data.make_groups(seed=0) for group in part]
    rewards = [response["reward"] for group in groups for response in group["responses"]]
    again = [judge.reward(group["prompt"], response["text"]) for group in groups for response in group["responses"]]
    assert rewards == again
    assert set(rewards) == {0.0, 0.2, 0.6, 0.8, 1.0}
    assert 0.35 < sum(rewards) / len(rewards) < 0.55


def test_the_styles_are_worth_what_they_should(judge: ModuleType, make_data: ModuleType) -> None:
    """Catches a style whose sentences the judge does not read as they are meant, for any animal, topic or name."""
    worth = {
        make_data.perfect: {1.0},
        make_data.impolite: {0.8},
        make_data.rambling: {0.6, 0.8},
        make_data.wrong: {0.0},
        make_data.ignorant: {0.2},
    }
    assert worth.keys() == make_data.STYLES.keys()
    rng = make_data.random.Random(0)
    for style, allowed in worth.items():
        assert {judge.reward(q.text, style(q, rng)) for q in judge.all_questions()} == allowed


def test_groups_are_valid_and_parts_disjoint(make_data: ModuleType) -> None:
    """Catches held-out prompts that were trained on, repeated answers, and rows that `rpo prepare` does not know."""
    train, valid = make_data.make_groups(seed=0)
    prompts = [group["prompt"] for group in train + valid]
    assert len(set(prompts)) == len(prompts)
    assert len(valid) == make_data.NUM_VALID
    for group in train + valid:
        raw = parse_row(group, where="here", columns=ColumnsConfig())
        assert raw.rewards is not None
        assert 3 <= len(raw.responses) == len(set(raw.responses)) <= 5


def test_data_are_a_function_of_the_seed(make_data: ModuleType) -> None:
    """Catches data that change from run to run, and with them the numbers that the quickstart shows."""
    assert make_data.make_groups(seed=3) == make_data.make_groups(seed=3)
    assert make_data.make_groups(seed=3) != make_data.make_groups(seed=4)


def test_blank_model_can_be_read(make_data: ModuleType, tmp_path: Path) -> None:
    """Catches a model that does not match its tokenizer, cannot be split over two processes, or whose tokenizer does
    not give a text back."""
    groups: list[dict[str, Any]] = make_data.make_groups(seed=0)[1]
    make_data.write_blank_model(tmp_path, groups)
    tokenizer, shape = Tokenizer(str(tmp_path)), read_shape(tmp_path)
    check_layout(shape, tensor=2, pipeline=1)
    assert shape.vocab_size == tokenizer.vocab_size < 700
    assert tokenizer.decode(tokenizer.encode([PROMPT])[0]) == PROMPT
    assert tokenizer.chat_template is not None


@pytest.mark.parametrize("name", ["sft", "rpo", "own"])
def test_configs_load(name: str) -> None:
    """Catches a yaml file with a key that was renamed, or with a knob that its method does not use."""
    check_config(load(RunConfig, QUICKSTART / f"{name}.yaml", PATHS))
