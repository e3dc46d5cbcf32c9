"""Where a text may be tokenized in parts that together give the tokens of the whole.

All responses of a group continue one prompt. Tokenizing it anew before each of them costs more than the responses do
where prompts are long; so only its end, from a safe place on, is tokenized with each response.

A place is safe between a visible ASCII character and a space, if the tokenizer cuts texts into words by one of PATTERNS
and tokenizes each word for itself:

1. In a word that any of these patterns matches, a space stands first, or behind other white space. So none holds both
   characters, and a space always starts a word (`\\s+` at the least).
2. A word depends on what stands before it only by where that ends: no pattern looks back.
3. It depends on what comes behind it by one character at most, `(?!\\S)`, which takes a space for the end of the text.
4. No added token holds a space, or takes in the white space beside it. NFC changes nothing across a space.
"""

from rpo_megatron.data.words import GPT2, Definition

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = frozenset({GPT2, LLAMA_3, QWEN_2})


def has_safe_places(definition: str | bytes | None) -> bool:
    """Of a tokenizer.json (text); other tokenizers have none."""
    if not isinstance(definition, str):
        return False
    kind = Definition.read(definition)
    keeps_spaces = kind.normalizer in (None, {"type": "NFC"}) and not any(" " in t.content for t in kind.added_tokens)
    return kind.is_plain_bpe and keeps_spaces and kind.source in PATTERNS


def last_safe_place(text: str) -> int:
    """Where the last part of a text starts; 0 if it is all one."""
    at = text.rfind(" ")
    while at > 0 and not "!" <= text[at - 1] <= "~":
        at = text.rfind(" ", 0, at)
    return max(at, 0)


def first_safe_place(text: str) -> int:
    """Where the first part of a text ends; its length if it is all one."""
    at = text.find(" ", 1)
    while at > 0 and not "!" <= text[at - 1] <= "~":
        at = text.find(" ", at + 1)
    return at if at > 0 else len(text)
