"""Texts that two tokenizers which are not the same most likely cut differently."""

from collections.abc import Iterable

PROBES = (
    "",
    " ",
    "\n",
    "\t",
    "  ",
    " \n ",
    "\n\n\n",
    "\r\n\r\n",
    "a  b   c    d        e",
    "  leading and trailing  ",
    "line one\n  line two\n\n\tline three \n",
    "\u00a0no-break\u2003em\u3000ideographic\u200bzero width\ufeff",
    "I'm you're he'll we've they'd it's DON'T I'M 'tis rock'n'roll ’s",
    "0 12 123 1234 12345 3.14159 1,000,000 1e-9 0x1F 2024-01-31 ١٢٣ ²³ Ⅷ ½",
    "!?.,;:'\"()[]{}<>@#$%^&*_+-=/\\|~`",
    "...... ---- ==== ////  !!!???  <|not_special|> <s </s <0x0A>",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment\n\n\nclass A:\n\tpass",
    "Ünïcödé naïve façade Straße İstanbul ǅ ﬁne",
    "Cafe\u0301 e\u0301 n\u0303 A\u030a caf\u00e9 \u00e9 \u00f1 \u00c5 \u212b \uac00 \u1100\u1161",
    "日本語のテキスト。中文文本，没有空格。한국어 텍스트 ภาษาไทย",
    "Привет мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇫🇷 ❤️ 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "\x00\x01\x7f\x85\u2028\u2029\ufffd\U0010ffff",
    "▁ ▁▁ Ġ Ċ ĉ Â",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 8,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis xqzjkvwpy",
    "https://example.org/path?query=1&other=%20#fragment user@example.org",
)


def probe_texts(special: Iterable[str]) -> list[str]:
    """Unicode, white space, numbers, code, and the tokenizer's special tokens written out between other text."""
    around = ("{}", "a{}b", " {} ", "\n{}\n", "{}{}", "x {}y", "one\n\n{}  two")
    written = [frame.replace("{}", token) for token in special for frame in around]
    return [*PROBES, *written]
