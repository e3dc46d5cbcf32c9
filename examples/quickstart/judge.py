"""The judge of the quickstart: an exact reward in [0, 1] for an answer to a child's question about an animal.

prompt    Mia asks: Where does the frog live?
1.0       Mia, the frog lives in a pond.                         right, polite, brief
0.8       The frog lives in a pond.                              right, brief
0.6       The frog lives in a pond. Animals are a big topic.     right
0.2       Sorry, Mia, I do not know that.                        honest
0.0       Mia, the frog lives in a barn.                         wrong, or no answer at all
"""

import re
from dataclasses import dataclass

CHILDREN = """
    Ada Amy Anna Ben Bill Cleo Dan Dora Emma Eric Eva Finn Fred Gina Greg Hana Hugo Ida Ivan Jack
    Jane Jon Kim Lara Leo Lucy Max Mia Nina Noah Olga Oscar Paul Rosa Ruth Sam Sara Tina Tom Uma
"""
NAMES = tuple(CHILDREN.split())

TOPICS: dict[str, tuple[str, str]] = {
    "color": ("What color is the {animal}?", "the {animal} is {fact}."),
    "home": ("Where does the {animal} live?", "the {animal} lives in a {fact}."),
    "food": ("What does the {animal} eat?", "the {animal} eats {fact}."),
}
"""Topic -> the question, and the sentence that answers it."""

FACTS: dict[str, dict[str, str]] = {
    animal: dict(zip(TOPICS, facts.split(), strict=True))
    for animal, facts in {
        "bat": "black cave moths",
        "bear": "brown forest berries",
        "camel": "tan desert thorns",
        "canary": "yellow cage seeds",
        "cow": "spotted barn grass",
        "crab": "red bay algae",
        "deer": "brown meadow leaves",
        "flamingo": "pink lagoon shrimp",
        "fox": "red den mice",
        "frog": "green pond flies",
        "monkey": "brown jungle bananas",
        "mole": "black tunnel worms",
        "parrot": "green jungle nuts",
        "pig": "pink sty corn",
        "rabbit": "gray burrow carrots",
        "swan": "white lake reeds",
        "tiger": "striped jungle meat",
        "whale": "blue sea plankton",
    }.items()
}
"""Animal -> topic -> the one right fact."""

IGNORANCE = "I do not know"
MOST_WORDS = 8
"""Of a brief answer: enough for a name and any of the sentences."""
WHO_ASKS = re.compile(r"(\w+) asks: (.*)")


@dataclass(frozen=True, kw_only=True)
class Question:
    name: str
    """Of the child that asks."""
    animal: str
    topic: str

    @property
    def text(self) -> str:
        return f"{self.name} asks: {TOPICS[self.topic][0].format(animal=self.animal)}"

    @property
    def fact(self) -> str:
        return FACTS[self.animal][self.topic]

    def claim(self, fact: str) -> str:
        """The sentence, without its capital letter, that gives `fact` as the answer."""
        return TOPICS[self.topic][1].format(animal=self.animal, fact=fact)


def all_questions() -> list[Question]:
    return [Question(name=n, animal=a, topic=t) for n in NAMES for a in FACTS for t in TOPICS]


def all_facts(topic: str) -> list[str]:
    """Every fact that is the right answer for some animal."""
    return sorted({facts[topic] for facts in FACTS.values()})


def reward(prompt: str, response: str) -> float:
    """Of any text as the answer to one of `all_questions`: 0.6 if it is right, and then 0.2 more if it begins with the
    name of who asks, and 0.2 more if it is brief.

    Right means that it claims the right fact and no other; without any claim, an honest "I do not know" is worth 0.2.
    Raises KeyError for a prompt that is not one of them.
    """
    question = _QUESTIONS[prompt]
    text = response.strip().lower()
    claimed = {fact for fact in all_facts(question.topic) if question.claim(fact) in text}
    if not claimed:
        return 0.2 if IGNORANCE.lower() in text else 0.0
    if claimed != {question.fact}:
        return 0.0
    polite = response.startswith(f"{question.name}, ")
    brief = len(text.split()) <= MOST_WORDS
    return (6 + 2 * polite + 2 * brief) / 10


_QUESTIONS = {question.text: question for question in all_questions()}
