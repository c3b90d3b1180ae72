"""The tokenizer of the demo model: Gemma's pipeline and control tokens, with a vocabulary of 768 ids.

``python -m dgemma_mlx.train.demo_tokenizer FOLDER`` writes tokenizer.json, tokenizer_config.json and
chat_template.jinja. It writes the same bytes every time.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dgemma_mlx.train.tasks import TASKS
from dgemma_mlx.train.tasks.sentence import WORDS
from dgemma_mlx.train.tasks.words import NAMES, NOUNS, listed

VOCAB_SIZE = 768
SPACE = "\u2581"  # the character that stands for a space in Gemma's tokens
# The ids of Gemma 4. No training of the text network has the three image tokens: see train.demo_vision.
SPECIAL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|image|>": 102,
    "<|image>": 103,
    "<image|>": 104,
    "<|turn>": 105,
    "<turn|>": 106,
}
NEWLINE_ID = 107
# Bytes of valid UTF-8 text that no character token covers: control characters, continuation bytes and lead bytes.
BYTES = (*(byte for byte in range(0x20) if byte != 0x0A), 0x7F, *range(0x80, 0xC0), *range(0xC2, 0xF5))
CHARACTERS = (SPACE, *(chr(code) for code in range(0x21, 0x7F)))
# Text is split into these pieces before merges are applied. Every digit is a token of its own. A space is merged into
# the piece after it, but not into a capital letter: a name then has the same tokens after a space, after a quotation
# mark and at the start of a line, so that the model can copy it. Punctuation marks are single tokens, except for
# pairs that JSON uses, so that a filled object fits into one canvas.
PIECES = "|".join(
    (
        r'\{"|"[:,}]',
        f"{SPACE}?[0-9]",
        f"{SPACE}?[a-z]+",
        "[A-Z][a-z]*",
        r"\n",
        rf"{SPACE}?[^{SPACE}A-Za-z0-9\n]",
        SPACE,
    )
)
EXAMPLES_PER_TASK = 1500
COMMON_WORDS = listed(
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by "
    "word but not what all were we when your can said there use an each which she do how their if will up "
    "other about out many then them these so some her would make like him into time has look two more write "
    "go see number no way could people my than first water been call who oil its now find long down day did "
    "get come made may part over new sound take only little work know place year live me back give most very "
    "after thing our just name good sentence man think say great where help through much before line right "
    "too mean old any same tell boy follow came want show also around form three small set put end does "
    "another well large must big even such because turn here why ask went men read need land different home "
    "us move try kind hand picture again change off play spell air away animal house point page letter "
    "mother answer found study still learn should world"
)
PROTOCOL_WORDS = ("user", "model", "system", "thought")

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{ content }}
    {%- else -%}
        {%- for part in content or [] -%}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] if part['type'] == 'text' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro without_thinking(text) -%}
    {%- for part in text.split('<channel|>') -%}{{ part.split('<|channel>')[0] }}{%- endfor -%}
{%- endmacro -%}
{%- macro literal(value) -%}
    {%- if value is string -%}{{- '<|"|>' + value + '<|"|>' -}}
    {%- elif value is boolean -%}{{- 'true' if value else 'false' -}}
    {%- elif value is mapping -%}{{- '{' -}}{{- members(value) -}}{{- '}' -}}
    {%- elif value is sequence -%}
        {{- '[' -}}
        {%- for item in value -%}{{- literal(item) -}}{{- ',' if not loop.last -}}{%- endfor -%}
        {{- ']' -}}
    {%- else -%}{{- value -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro members(object) -%}
    {%- for key, value in object | dictsort -%}
        {{- key + ':' -}}{{- literal(value) -}}{{- ',' if not loop.last -}}
    {%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set has_system = messages and messages[0]['role'] in ['system', 'developer'] -%}
{%- if has_system or enable_thinking or tools -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
    {%- if has_system -%}{{- text_of(messages[0]['content']) | trim -}}{%- endif -%}
    {%- for tool in tools or [] -%}
        {{- '<|tool>declaration:' + tool['function']['name'] + (tool['function'] | tojson) + '<tool|>' -}}
    {%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{#- A model's turn stays open from a call to the answer after its results. -#}
{%- set turn = namespace(is_open=false) -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- set role = 'model' if message['role'] in ['assistant', 'tool'] else message['role'] -%}
    {%- if not turn.is_open or role != 'model' -%}
        {{- '<turn|>\\n' if turn.is_open -}}
        {{- '<|turn>' + role + '\\n' -}}
    {%- endif -%}
    {%- if message['role'] == 'tool' -%}
        {%- set result = message['content'] -%}
        {%- if result is sequence and result is not string and result is not mapping -%}
            {%- set result = text_of(result) -%}
        {%- endif -%}
        {{- '<|tool_response>response:' + (message['name'] or 'unknown') + '{' -}}
        {{- members(result if result is mapping else {'value': result}) + '}<tool_response|>' -}}
        {%- set turn.is_open = true -%}
    {%- else -%}
        {%- set text = text_of(message['content']) -%}
        {{- (without_thinking(text) if message['role'] == 'assistant' else text) | trim -}}
        {%- for call in message['tool_calls'] or [] -%}
            {{- '<|tool_call>call:' + call['function']['name'] + '{' -}}
            {{- members(call['function']['arguments']) + '}<tool_call|>' -}}
        {%- endfor -%}
        {%- set turn.is_open = true if message['tool_calls'] else false -%}
        {{- '<turn|>\\n' if not turn.is_open -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not turn.is_open -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def build(folder: Path, seed: int = 0) -> None:
    """Train the tokenizer on the training split of the tasks and write its three files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(seed)
    tokenizer = new_tokenizer(number_tokens(merges), merges)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def new_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Return a byte-pair tokenizer with Gemma's normalizer, splitting and decoder."""
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def learn_merges(seed: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges, most frequent first, until every free id has a token."""
    learner = new_tokenizer({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(BYTES) - 1 + 1,  # the newline has an id; <unk> counts here
        special_tokens=["<unk>"],
        initial_alphabet=list(CHARACTERS),
        limit_alphabet=len(CHARACTERS),
        show_progress=False,
    )
    learner.train_from_iterator(corpus(seed), trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def corpus(seed: int) -> Iterator[str]:
    """Yield the tokenizer's training text: lines of training conversations of every task, then single words."""
    rng = random.Random(seed)
    for task in TASKS.values():
        for _ in range(EXAMPLES_PER_TASK):
            example = task.sample(rng, "train")
            yield from (line for message in example.messages for line in message["content"].split("\n"))
            yield from example.answer.split("\n")
    for word in COMMON_WORDS:
        yield from [f"x {word}"] * 10
    for word in (*NAMES, *NOUNS):
        yield from [f"x {word}"] * 4
    for word in WORDS:
        yield from [f"x {word}"] * 250
    for word in PROTOCOL_WORDS:
        yield from [word] * 2000


def number_tokens(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Return the id of every token.

    Gemma's control tokens keep their ids. Bytes, then characters, then merges take the free ids in ascending order.
    """
    vocab = {**SPECIAL_TOKENS, "\n": NEWLINE_ID}
    others = [*(f"<0x{byte:02X}>" for byte in BYTES), *CHARACTERS, *(left + right for left, right in merges)]
    taken = set(vocab.values())
    free = [token_id for token_id in range(VOCAB_SIZE) if token_id not in taken]
    return vocab | dict(zip(others, free, strict=True))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dgemma_mlx.train.demo_tokenizer FOLDER")
    build(Path(sys.argv[1]))
