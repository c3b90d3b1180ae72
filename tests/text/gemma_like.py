"""Small tokenizers like Gemma's and a chat template like Gemma 4's, for the tests of ``dgemma_mlx.text``."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 123 times in 2026.",
    "call thought turn user model system tool response declaration name channel image",
    "def add(a, b):\n    return a + b  # <table> and <b>bold</b> and a < b > c | d",
    "Café, naïve, Zürich; 北京 and 東京 and emoji 🙂 in text.",
    '<| |> <|x |x> {"city": "Paris", "n": [1, 2]}',
] * 3

SPECIAL = {
    "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48,
    "<tool_call|>": 49, "<|tool_response>": 50, "<tool_response|>": 51, '<|"|>': 52, "<|think|>": 98,
    "<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106, "<|image|>": 110,
}  # fmt: skip
UNMARKED = {"<|turn>", '<|"|>', "<|channel>", "<mask>"}  # control tokens that the file marks "special": false
ORDINARY = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "<table>", "<b>", "</b>"]  # added tokens that are ordinary text

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": {"__type": "AddedToken", "content": "<eos>", "special": True},
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "think_token": "<|think|>",
    "clean_up_tokenization_spaces": False,
}

TEMPLATE = r"""
{%- macro literal(value) -%}
    {%- if value is string -%}{{- '<|"|>' + value + '<|"|>' -}}
    {%- elif value is boolean -%}{{- 'true' if value else 'false' -}}
    {%- elif value is mapping -%}
        {{- '{' -}}
        {%- for key, item in value | dictsort -%}
            {{- key + ':' + literal(item) -}}{%- if not loop.last -%},{%- endif -%}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif value is sequence -%}
        {{- '[' -}}
        {%- for item in value -%}{{- literal(item) -}}{%- if not loop.last -%},{%- endif -%}{%- endfor -%}
        {{- ']' -}}
    {%- else -%}{{- value -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro without_thoughts(text) -%}
    {%- set kept = namespace(text='') -%}
    {%- for piece in text.split('<channel|>') -%}
        {%- set kept.text = kept.text + (piece.split('<|channel>')[0] if '<|channel>' in piece else piece) -%}
    {%- endfor -%}
    {{- kept.text | trim -}}
{%- endmacro -%}
{%- macro words(content) -%}
    {%- if content is string -%}{{- content | trim -}}
    {%- else -%}
        {%- for item in content or [] -%}
            {%- if item.type == 'image' -%}{{- '<|image|>' -}}{%- continue -%}{%- endif -%}
            {{- item.text | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set chat = namespace(first=0, last_user=-1) -%}
{%- if messages[0].role in ['system', 'developer'] or tools or enable_thinking -%}
    {{- '<|turn>system\n' -}}
    {%- if enable_thinking is defined and enable_thinking -%}{{- '<|think|>\n' -}}{%- endif -%}
    {%- if messages[0].role in ['system', 'developer'] -%}
        {{- words(messages[0].content) -}}
        {%- set chat.first = 1 -%}
    {%- endif -%}
    {%- for tool in tools or [] -%}
        {{- '<|tool>declaration:' + tool.function.name + literal(tool.function.parameters) -}}
        {{- tool.function.description | tojson(ensure_ascii=true) + '<tool|>' -}}
    {%- endfor -%}
    {%- if date is defined -%}{{- ' Today is ' + strftime_now('%d %B %Y') + '.' -}}{%- endif -%}
    {{- '<turn|>\n' -}}
{%- endif -%}
{%- for message in messages[chat.first:] -%}
    {%- if message.role == 'user' -%}{%- set chat.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{% for message in messages[chat.first:] %}
    {%- if message.role not in ['user', 'assistant', 'model', 'tool'] -%}
        {{- raise_exception('unknown role ' + message.role) -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|tool_response>response:' + message.name + '{value:' + literal(message.content) + '}' -}}
        {{- '<tool_response|>' -}}
        {%- continue -%}
    {%- endif -%}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' -}}
    {%- if message.reasoning_content and loop.index0 > chat.last_user -%}
        {{- '<|channel>thought\n' + message.reasoning_content + '\n<channel|>' -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}{{- words(message.content) -}}
    {%- else -%}
        {%- generation -%}{{- without_thoughts(words(message.content)) -}}{%- endgeneration -%}
        {%- for call in message.tool_calls or [] -%}
            {{- '<|tool_call>call:' + call.function.name -}}
            {{- literal(call.function.arguments) + '<tool_call|>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\n' -}}
{% endfor %}
{%- if add_generation_prompt -%}{{- '<|turn>model\n' -}}{%- endif -%}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather of a "city" in °C',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["city"],
            },
        },
    }
]

CONVERSATIONS: list[list[dict[str, object]]] = [
    [{"role": "user", "content": "Hello there"}],
    [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "  What is <b>2 + 2</b>?\n\n\n"},
    ],
    [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look: "},
                {"type": "text", "text": "🙂"},
            ],
        },
        {
            "role": "assistant",
            "content": "<|channel>thought\nHm.\n<channel|>A face in 北京.",
            "thinking": "not shown",
        },
        {"role": "user", "content": "a < b and c[0] > d | e, <table>"},
    ],
    [
        {"role": "user", "content": "Weather in Zürich?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "I need\nthe tool.",
            "tool_calls": [
                {
                    "function": {
                        "name": "get_weather",
                        "arguments": {"city": "Zürich", "days": 7, "x": None, "ok": True, "at": [1.5, "two"]},
                    }
                }
            ],
        },
        {"role": "tool", "name": "get_weather", "content": {"celsius": 21, "sky": "<clear>"}},
    ],
]


def write_tokenizer_json(folder: Path) -> None:
    """Train a byte-fallback BPE tokenizer on ``CORPUS`` and write it with Gemma 4's control tokens at their ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def untrained(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return tokenizer

    trained = untrained(models.BPE())
    alphabet = [chr(code) for code in range(32, 127)] + ["▁", "é", "ü"]
    trained.train_from_iterator(
        [text.replace("\n", " ") for text in CORPUS],
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, limit_alphabet=98, show_progress=False
        ),
    )
    learned = json.loads(trained.to_str())["model"]
    known = {*SPECIAL, *ORDINARY}
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ORDINARY
    pieces += [piece for piece in sorted(learned["vocab"], key=learned["vocab"].get) if piece not in known]
    free_ids = iter(sorted(set(range(len(SPECIAL) + len(pieces))) - set(SPECIAL.values())))
    vocab = {**SPECIAL, **{piece: next(free_ids) for piece in pieces}}
    merges = [tuple(pair) for pair in learned["merges"] if "".join(pair) not in known]
    tokenizer = untrained(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    for text in [*SPECIAL, *ORDINARY]:
        special = text in SPECIAL and text not in UNMARKED
        token = AddedToken(text, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def write_tokenizer_model(folder: Path) -> None:
    """Train a sentencepiece model on ``CORPUS`` with Gemma's settings and write it."""
    import sentencepiece

    control = [token for token in SPECIAL if token not in ("<pad>", "<eos>", "<bos>", "<unk>")]
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=560,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[*control, "\n", "\n\n", "<table>", "<b>", "</b>"],
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.vocab").unlink()


def random_text(rng: random.Random, extra: Sequence[str] = ()) -> str:
    """Return a random text of up to 11 awkward pieces; the strings in ``extra`` are further pieces."""
    pieces = [
        "a",
        "the quick ",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "🙂",
        "👩‍👩‍👧",
        "e\u0301",
        "東京",
        "ß",
        "<",
        ">",
        "|",
        "<|",
        "|>",
        "<b>",
        "</b>",
        "<table>",
        "\u00a0",
        "\x00",
        "\ufffd",
        "İ",
        "0",
        "12",
        "{",
        "}",
        '"',
        "\\",
        "[",
        "]",
        *extra,
    ]
    return "".join(rng.choices(pieces, k=rng.randrange(12)))


def random_value(rng: random.Random, depth: int) -> Any:
    """Return a random JSON value: a text, number, boolean or null, or up to ``depth`` levels of lists and objects."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {f"k{n}": random_value(rng, depth - 1) for n in range(rng.randrange(4))}
    return [random_text(rng), rng.randrange(-9, 9), rng.random() * 1e9, True, False, None][kind]
