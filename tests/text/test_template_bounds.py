"""Tests of the bounds on chat templates: what explodes is stopped with one line, and what is usual still works."""

from __future__ import annotations

import time

import pytest

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.budget import Budget, TooMuch
from dgemma_mlx.text.chat import ChatTemplate

_GROW = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = "
EXPLOSIONS = [
    "{{ 'x' * 10**9 }}", "{{ 10**9 * 'x' }}", "{{ [1] * 10**9 }}", "{{ 10 ** (10 ** 9) % 7 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    f"{_GROW}ns.x ~ ns.x %}}{{% endfor %}}", f"{_GROW}ns.x + ns.x %}}{{% endfor %}}",
    f"{_GROW}[ns.x, ns.x] %}}{{% endfor %}}{{{{ ns.x }}}}", f"{_GROW}{{'a': ns.x, 'b': ns.x}} %}}{{% endfor %}}",
    f"{_GROW}(ns.x, ns.x) %}}{{% endfor %}}{{{{ ns.x | tojson }}}}", f"{_GROW}dict(a=ns.x, b=ns.x) %}}{{% endfor %}}",
    f"{_GROW}namespace(a=ns.x, b=ns.x) %}}{{% endfor %}}{{{{ ns.x }}}}",
    f"{_GROW}ns.x.replace('a', ns.x) %}}{{% endfor %}}", f"{_GROW}'{{}}{{}}'.format(ns.x, ns.x) %}}{{% endfor %}}",
    f"{_GROW}'%s%s' % (ns.x, ns.x) %}}{{% endfor %}}", f"{_GROW}ns.x.join(['a', 'b', 'c', ns.x]) %}}{{% endfor %}}",
    f"{_GROW}'a' ~ ns.x %}}{{% set y %}}{{{{ ns.x }}}}{{{{ ns.x }}}}{{% endset %}}{{% set ns.x = y %}}{{% endfor %}}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{{ 'x' | center(10**9) }}", "{{ 'x'.center(10**9) }}", "{{ 'x'.ljust(10**9) }}", "{{ 'x'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}", "{{ 'a\nb' | indent(10**9) }}", "{{ [[1]] | tojson(indent=10**9) }}",
    "{{ '%999999999d' % 1 }}", "{{ '%*d' % (999999999, 1) }}", "{{ '%.999999999f' % 1 }}",
    "{{ '{:999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 999999999) }}", "{{ '%999999999d' | format(1) }}",
    "{{ [1] | slice(10**9) | list | length }}", "{{ [1] | batch(10**9, 0) | list }}",
    "{{ range(99999) | map('center', 99999) | join }}",
    "{{ range(99999) | map('string') | map('replace', '1', 'x' * 9999) | list }}",
    "{{ (['x' * 99999] * 9999) | join }}", "{{ 'x'.join(range(99999) | map('string')) | replace('', 'x' * 99999) }}",
    "{{ ([[1]] * 9999) | sum(start=[]) }}",
    "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + [('x' * 999999)[1:]] %}{% endfor %}",
    "{% set x = ('a' * 2000000) %}{{ x.rfind('b' + 'a' * 1000000) }}",
]  # fmt: skip


@pytest.mark.parametrize("text", EXPLOSIONS)
def test_a_template_that_explodes_is_stopped(text: str) -> None:
    template = ChatTemplate({"default": text}, {}, "chat_template.jinja")
    with pytest.raises(DgemmaError, match=r"was stopped|rejected the conversation: maximum recursion") as caught:
        template.render([{"role": "user", "content": "Hi"}])
    assert "\n" not in caught.value.message and len(caught.value.message) < 200


@pytest.mark.parametrize(
    "text", ["{% break %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "9" * 5000 + " }}", "x" * 2_000_000,
             "{% if x %}" * 150 + "{% endif %}" * 150, "{{ lipsum(10**6) }}", "{{ 'a' | nothing }}",
             "{{ raise_exception('a\\n' * 9999) }}", "{% include 'x' %}", "{% extends 5 %}"],
)  # fmt: skip
def test_a_template_that_python_or_jinja_refuses_is_one_error(text: str) -> None:
    template = ChatTemplate({"default": text}, {}, "chat_template.jinja")
    with pytest.raises(DgemmaError, match="chat template") as caught:
        template.render([{"role": "user", "content": "Hi"}])
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("{{ 1 + 2 }}|{{ 3 * 'ab' }}|{{ 2 ** 10 }}|{{ 7 % 4 }}|{{ '%s-%03d' % ('a', 7) }}", "3|ababab|1024|3|a-007"),
        ("{{ 'a' ~ 1 ~ none ~ [2] }}", "a1None[2]"),
        ("{% for x in [1, 2, 3] if x > 1 %}{{ loop.index }}/{{ loop.length }}:{{ x }} {% endfor %}", "1/2:2 2/2:3 "),
        ("{% for x in [] %}a{% else %}b{% endfor %}", "b"),
        ("{{ messages[1:] | map(attribute='content') | join(', ') }}", "b, c"),
        ("{{ [1, 2, 3, 4] | batch(2) | list }}{{ 'x' | center(5) }}", "[[1, 2], [3, 4]]  x  "),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{% macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}{% call f(2) %}c{% endcall %}",
         "<1><2c>"),
        ("{{ '{}: {:>4}'.format('a', 7) }}{{ '%d%%' | format(5) }}", "a:    75%"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ [1, 2] | sum }}", "a13"),
        ("{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "12"),
    ],
)
def test_what_templates_usually_do_stays_as_it_is(text: str, rendered: str) -> None:
    messages = [{"role": "user", "content": content} for content in "abc"]
    assert ChatTemplate({"default": text}, {}, "").render(messages) == rendered


def test_long_conversations_are_within_the_bounds() -> None:
    text = (
        "{% set ns = namespace(out='') %}{% for m in messages %}{% set ns.out = ns.out ~ m.role ~ m.content %}"
        "{{ m.content | replace('<', '&lt;') | trim }}{% endfor %}{{ ns.out | length }}"
    )
    messages = [{"role": "user", "content": "long <text> " * 20}] * 1000
    assert ChatTemplate({"default": text}, {}, "").render(messages).endswith("244000")


def test_only_the_time_of_the_processor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is suspended while a template is rendered, or that gets no processor, goes on afterwards."""
    monkeypatch.setattr("dgemma_mlx.text.budget._MOST_SECONDS", 0.05)
    budget = Budget()
    time.sleep(0.1)
    budget.step()
    end = time.thread_time() + 0.05
    while time.thread_time() <= end:
        pass
    with pytest.raises(TooMuch, match="of the processor"):
        budget.step()
