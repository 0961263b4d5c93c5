"""Encodes seeded random strings with the Python `tokenizers` package: one {"text", "ids"} a line.

usage: tokenizer-oracle.py tokenizer.json out.jsonl
"""

import json
import os
import random
import sys

from tokenizers import Tokenizer

COUNT = 10_000
LENGTH_MAX = 200

WORDS = (
    "the of and DeepSeek MoE don't we'll I'M it’s naïve café Straße résumé hello world 2024-10-01 3.14159 "
    "mixture-of-experts https://example.org/?q=1&r=2 user@example.org C++ #1 50% $9.99 (a) [b] {c} e.g. U.S.A."
).split(" ")
CODE = (
    "def f(x):|return x**2|#include <stdio.h>|int main(void) {|}|for (;;)|=>|->|::|!=|&&|||\"\"\"|'|\\n|\\|/* */|//|"
    "let mut v: Vec<u8>|<div class=\"a\">|</think>|<think>|{\"a\": [1, null]}|SELECT * FROM t;|0x1F|1e-9|@property|$x|`ls`"
).split("|")
SPACES = [" ", " ", " ", "\n", "\n", "\t", "\r\n", "\r", "\u00a0", "\u3000", "\u2003", "\u200b", "\u2028", "\u0085", "\v", "\f"]
FAMILIES = ["👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪", "❤️", "👩🏿‍🚀", "1️⃣", "🧑‍🤝‍🧑", "😀", "🫠"]


def between(r, *ranges):
    low, high = r.choice(ranges)
    return chr(r.randint(low, high))


def scripts_of(r):
    """Kinds of short pieces; a string mixes some of them."""
    return {
        "ascii": lambda: chr(r.randint(0x20, 0x7E)),
        "words": lambda: r.choice(WORDS) + r.choice(["", " ", " ", " ", ", ", ".\n"]),
        "code": lambda: r.choice(CODE) + r.choice(["", " ", "\n", "\n    ", "\n\t", ";\n"]),
        "spaces": lambda: r.choice(SPACES) * r.randint(1, 12),
        "newlines": lambda: "".join(r.choice(" \n\r\t") for _ in range(r.randint(1, 8))),
        "digits": lambda: "".join(r.choice("0123456789") for _ in range(r.randint(1, 12))) + r.choice(["", ".", " ", ","]),
        "other digits": lambda: between(r, (0x660, 0x669), (0x966, 0x96F), (0xFF10, 0xFF19), (0x2150, 0x2188), (0x2460, 0x249B)),
        "cjk": lambda: between(r, (0x4E00, 0x9FFF), (0x4E00, 0x9FFF), (0x3040, 0x30FF), (0x3000, 0x303F), (0xFF00, 0xFFEF)),
        "rare cjk": lambda: between(r, (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0xF900, 0xFAFF)),
        "hangul": lambda: between(r, (0xAC00, 0xD7A3), (0xAC00, 0xD7A3), (0x1100, 0x11FF)),
        "cyrillic": lambda: between(r, (0x400, 0x4FF)) + r.choice(["", "", "", " "]),
        "arabic": lambda: between(r, (0x600, 0x6FF)) + r.choice(["", "", "", " "]),
        "indic": lambda: between(r, (0x900, 0x97F), (0xE00, 0xE7F), (0xB80, 0xBFF)),
        "latin": lambda: between(r, (0xA0, 0x24F), (0x1E00, 0x1EFF)),
        "combining": lambda: r.choice("aeiouAEIOU नक") + "".join(between(r, (0x300, 0x36F)) for _ in range(r.randint(1, 4))),
        "emoji": lambda: r.choice(FAMILIES),
        "emoji parts": lambda: between(r, (0x1F300, 0x1FAFF), (0x1F1E6, 0x1F1FF), (0x200D, 0x200D), (0xFE0E, 0xFE0F), (0x1F3FB, 0x1F3FF)),
        "symbols": lambda: between(r, (0x2000, 0x2BFF), (0x2500, 0x257F)),
        "controls": lambda: between(r, (0x00, 0x1F), (0x7F, 0x9F), (0x200B, 0x200F), (0x202A, 0x202E), (0xFEFF, 0xFEFF)),
        "anything": lambda: between(r, (0x00, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x10FFFF)),
    }


def text(r, added):
    kinds = list(scripts_of(r).values())
    chosen = r.sample(kinds, r.choice([1, 1, 2, 2, 3, 5, len(kinds)]))
    length = r.choice([r.randint(0, 8), r.randint(0, 40), r.randint(0, LENGTH_MAX)])
    with_added = r.random() < 0.4
    out = ""
    while len(out) < length:
        if with_added and r.random() < 0.25:
            token = r.choice(added)
            # Sometimes a token that lacks its end.
            out += token if r.random() < 0.85 else token[: r.randint(1, len(token) - 1)]
        out += "".join(r.choice(chosen)() for _ in range(r.randint(1, 6)))
    return out[:length]


def main():
    source, target = sys.argv[1:]
    tokenizer = Tokenizer.from_file(source)
    content = [t["content"] for t in json.load(open(source, encoding="utf-8"))["added_tokens"]]
    # Most of them are placeholders; the others shall come as often.
    added = [c for c in content if "place▁holder" not in c] * 8 + content[::40]
    r = random.Random(20241226)
    with open(target + ".part", "w", encoding="utf-8") as out:
        seen = set()
        while len(seen) < COUNT:
            t = text(r, added)
            if t in seen:
                continue
            seen.add(t)
            ids = tokenizer.encode(t, add_special_tokens=False).ids
            out.write(json.dumps({"text": t, "ids": ids}, separators=(",", ":")) + "\n")
    os.replace(target + ".part", target)


main()
