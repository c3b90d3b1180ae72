"""Prompts in other scripts than the Latin alphabet of the other tasks, for the task "unknown"."""

from __future__ import annotations

import random

from dgemma_mlx.train.sudoku import Split
from dgemma_mlx.train.tasks.base import split_of

HELDOUT_SHARE = 0.15

# Ranges of code points from which letters are drawn: common letters and pictures of each script.
RANGES = {
    "Han": (0x4E00, 0x9FA5), "Hiragana": (0x3042, 0x3093), "Katakana": (0x30A2, 0x30F3), "Hangul": (0xAC00, 0xD7A3),
    "Cyrillic": (0x0430, 0x044F), "Greek": (0x03B1, 0x03C9), "Arabic": (0x0627, 0x064A), "Hebrew": (0x05D0, 0x05EA),
    "Devanagari": (0x0905, 0x0939), "Thai": (0x0E01, 0x0E2E), "accents": (0x00E0, 0x00F6),
    "emoji": (0x1F600, 0x1F64F), "pictures": (0x1F300, 0x1F5FF),
}  # fmt: skip
PHRASES = (
    "你好", "你好吗？", "你是谁？", "今天天气怎么样？", "请写一首诗。", "什么是猫？", "告诉我一个笑话",
    "こんにちは", "何ですか？", "お元気ですか", "あなたは誰ですか？", "日本の首都はどこ？", "詩を書いてください。",
    "안녕하세요", "이름이 뭐예요?", "오늘 날씨 어때요?", "한국의 수도는 어디입니까?", "시를 써 주세요.",
    "Привет", "Привет, как дела?", "Кто ты?", "Что такое кошка?", "Напиши стихотворение.", "Какая сегодня погода?",
    "Γεια σου", "Τι κάνεις;", "مرحبا", "كيف حالك؟", "ما هي عاصمة مصر؟", "שלום", "מה שלומך?", "नमस्ते", "आप कैसे हैं?",
    "สวัสดี", "สบายดีไหม", "¿Qué tal?", "¿Dónde está Perú?", "Où est la gare ?", "Wie heißt du?", "Größe?", "Çok güzel",
    "👋", "🎉🎉", "😀", "❤️", "🐶🐱?", "👍🏽", "What is 猫?", "Translate кот.", "Say こんにちは.", "What does 🎉 mean?",
)  # fmt: skip


def foreign_prompt(rng: random.Random, split: Split) -> str:
    """Draw a prompt that belongs to a split: a phrase, or a few words of random letters of one script."""
    while True:
        prompt = rng.choice(PHRASES) if rng.random() < 0.5 else _letters(rng)
        if split_of(f"unknown foreign: {prompt}", HELDOUT_SHARE) == split:
            return prompt


def _letters(rng: random.Random) -> str:
    """Return one to three words of random letters of one script, and perhaps a question mark."""
    first, last = RANGES[rng.choice(list(RANGES))]
    words = ("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 3)))
    return " ".join(words) + rng.choice(("", "", "?", "."))
