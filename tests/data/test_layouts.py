"""Every layout that is promised, and an error with place and column for everything else."""

from typing import Any

import pytest

from rpo_megatron.config_verbs import ColumnsConfig
from rpo_megatron.data.layouts import RawGroup, check_columns, parse_row, transcript_messages
from rpo_megatron.errors import UserError

USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def parse(row: dict[str, Any], **columns: str) -> RawGroup:
    return parse_row(row, where="f.jsonl:7", columns=ColumnsConfig(**columns))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "responses": [{"text": "a", "reward": 1}, {"text": "b", "reward": 0.5}]},
        {"prompt": "p", "responses": ["a", "b"], "rewards": [1, 0.5]},
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_reward": 1, "rejected_reward": 0.5},
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 0.5, "source": "x"},
    ],
)
def test_layouts_with_text(row: dict[str, Any]) -> None:
    """Rewards must stay with their responses in each of them."""
    group = parse(row)
    assert (group.prompt, group.responses, group.rewards) == ("p", ["a", "b"], [1.0, 0.5])
    assert group.reward_source == "given"
    assert not group.transcript


def test_pairs_without_rewards() -> None:
    """Chosen counts 1 and rejected 0, and the group says that these are no measured rewards."""
    group = parse({"prompt": "p", "chosen": "a", "rejected": "b"})
    assert (group.rewards, group.reward_source) == ([1.0, 0.0], "preference")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "responses": ["a", "b"]},
        {"prompt": "p", "responses": [{"text": "a", "reward": 1}, {"text": "b", "reward": None}]},
        {"prompt": "p", "responses": [{"text": "a", "reward": 1}, {"text": "b"}]},
        {"prompt": "p", "responses": ["a", "b"], "rewards": [None, 1]},
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_reward": 1.0},
    ],
)
def test_a_missing_reward_leaves_the_group_without(row: dict[str, Any]) -> None:
    """It must not become 0, nor a preference."""
    group = parse(row)
    assert (group.rewards, group.reward_source) == (None, None)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "responses": [[YES], [NO]], "rewards": [1, 0]},
        {"responses": [{"text": [USER, YES], "reward": 1}, {"text": [USER, NO], "reward": 0}]},
    ],
)
def test_layouts_with_messages(row: dict[str, Any]) -> None:
    """Leading messages that the responses share are the prompt, whether or not a prompt column repeats them."""
    group = parse(row)
    assert (group.prompt, group.responses, group.rewards) == ([USER], ["yes", "no"], [1.0, 0.0])


def test_equal_conversations_keep_their_answers() -> None:
    """Identical responses share all messages; the last one is still a response, not part of the prompt."""
    group = parse({"chosen": [USER, YES], "rejected": [USER, YES]})
    assert (group.prompt, group.responses) == ([USER], ["yes", "yes"])


def test_system_message_belongs_to_the_prompt() -> None:
    """Only the last message is the response."""
    system = {"role": "system", "content": "be kind"}
    group = parse({"prompt": "hi", "chosen": [system, USER, YES], "rejected": [system, USER, NO]})
    assert group.prompt == [system, USER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [USER, YES, USER, YES], "rejected": [USER, NO, USER, NO]}, "one has: assistant, user, assistant"),
        ({"chosen": [USER], "rejected": [YES]}, "behind the 0 messages"),
        ({"prompt": "other", "chosen": [USER, YES], "rejected": [USER, NO]}, "'prompt': contradicts"),
        ({"chosen": [YES], "rejected": [NO]}, "'prompt': missing"),
        ({"chosen": [{"from": "human", "value": "x"}], "rejected": [NO]}, "'chosen': expected messages"),
        ({"prompt": "p", "chosen": "a", "rejected": [NO]}, "'rejected': expected text"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt': expected text or a list"),
    ],
)
def test_conversations_that_do_not_fit(row: dict[str, Any], message: str) -> None:
    """A user's words inside a response would be trained on; a prompt column must not be ignored in silence."""
    with pytest.raises(UserError, match=rf"^f\.jsonl:7: .*{message}"):
        parse(row)


HH = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: {}\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (HH.format("one") + " Sure, yes", HH.format("one") + " Sure, no", HH.format("one")),
        (HH.format("one") + " same", HH.format("one") + " same", HH.format("one")),
        ("Q: hi there A: yes", "Q: hi there A: no", "Q: hi there A:"),
        ("Q: hi\nyes", "Q: hi\nyellow", "Q: hi\n"),
        ("ask\n  one", "ask\n  two", "ask\n"),
    ],
)
def test_prompt_of_full_transcripts(chosen: str, rejected: str, prompt: str) -> None:
    """What the answers have in common by chance ("Sure, ", "ye") is no part of the prompt; a space before the answer
    goes with it, as tokenizers have it."""
    group = parse({"chosen": chosen, "rejected": rejected})
    assert group.prompt == prompt
    assert group.responses == [chosen[len(prompt) :], rejected[len(prompt) :]]
    assert group.transcript


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "yes", "rejected": "no"}, "do not start alike"),
        ({"chosen": "The cat", "rejected": "The dog", "question": "which?"}, "columns.prompt=question"),
    ],
)
def test_transcripts_without_a_prompt(row: dict[str, Any], message: str) -> None:
    """Answers that happen to begin alike, with the prompt in a column of another name, are not transcripts."""
    with pytest.raises(UserError, match=message):
        parse(row)


def test_transcript_as_messages() -> None:
    """Through a chat template the markers must become turns."""
    assert transcript_messages(HH.format("one")) == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "one"},
    ]
    assert transcript_messages("Q: hi A:") is None


def test_mapped_ultrafeedback() -> None:
    """instruction, completions: [{response, overall_score}]."""
    row = {
        "instruction": "p",
        "models": ["m", "n"],
        "completions": [
            {"response": "a", "overall_score": 7.5, "annotations": {}},
            {"response": "b", "overall_score": 3},
        ],
    }
    names = {"prompt": "instruction", "responses": "completions", "text": "response", "reward": "overall_score"}
    group = parse(row, **names)
    assert (group.prompt, group.responses, group.rewards) == ("p", ["a", "b"], [7.5, 3.0])


def test_mapped_helpsteer_pair_with_dots() -> None:
    """Two columns of any name make a pair; dots reach into objects; a name that itself has a dot wins."""
    row = {"context": "p", "response_1": "a", "response_2": "b", "scores": {"one": 4, "two": 2}, "two.x": 1}
    columns = {"prompt": "context", "chosen": "response_1", "rejected": "response_2"}
    group = parse(row, **columns, chosen_reward="scores.one", rejected_reward="scores.two")
    assert (group.prompt, group.responses, group.rewards) == ("p", ["a", "b"], [4.0, 2.0])
    assert parse(row, **columns, chosen_reward="scores.one", rejected_reward="two.x").rewards == [4.0, 1.0]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "3", True, [1], 10**400, 1e39])
def test_rewards_that_are_no_numbers(reward: Any) -> None:
    """NaN in one reward of a million makes the loss NaN days later."""
    with pytest.raises(UserError, match=r"f\.jsonl:7: column 'responses\[1\]\.reward': expected a finite number"):
        parse({"prompt": "p", "responses": [{"text": "a", "reward": 1}, {"text": "b", "reward": reward}]})
    with pytest.raises(UserError, match=r"column 'rewards\[0\]'"):
        parse({"prompt": "p", "responses": ["a", "b"], "rewards": [reward, 1]})
    with pytest.raises(UserError, match="column 'score_rejected'"):
        parse({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": reward})


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"question": "p", "answer": "a"}, {}, r"no known layout in columns question, answer\. Known: prompt \+"),
        ({"responses": ["a", "b"]}, {}, "column 'prompt': missing"),
        ({"prompt": "p", "responses": []}, {}, "column 'responses': expected a list"),
        ({"prompt": "p", "responses": "a"}, {}, "column 'responses': expected a list"),
        ({"prompt": "p", "responses": [{"response": "a"}]}, {}, r"'responses\[0\]': no 'text' in it"),
        ({"prompt": "p", "responses": ["a", 3]}, {}, "column 'responses': expected text"),
        ({"prompt": "p", "responses": ["a", "b"], "rewards": [1]}, {}, "expected 2 rewards"),
        ({"prompts": "p", "responses": ["a"]}, {"prompt": "promt"}, "'promt': missing .*did you mean 'prompts'"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, {"prompt": "prompt"}, "'prompt': is null"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"chosen_reward": "s"}, "column 's': missing"),
        ({"prompt": "p", "responses": [{"text": "a", "reward": 1}]}, {"reward": "scor"}, "column 'scor': missing"),
    ],
)
def test_errors_name_place_and_column(row: dict[str, Any], columns: dict[str, str], message: str) -> None:
    """Each of these would otherwise be a KeyError, or data that is silently not used."""
    with pytest.raises(UserError, match=rf"^f\.jsonl:7: .*{message}"):
        parse(row, **columns)


def test_contradicting_mappings() -> None:
    """One of two mapped layouts would be ignored without a word."""
    with pytest.raises(UserError, match=r"columns\.responses and columns\.chosen"):
        check_columns(ColumnsConfig(responses="r", chosen="c"))
    with pytest.raises(UserError, match="exclude each other"):
        check_columns(ColumnsConfig(reward="r", rewards="c"))
    check_columns(ColumnsConfig(prompt="p", responses="r", text="t", reward="s"))
