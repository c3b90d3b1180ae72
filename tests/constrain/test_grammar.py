"""Tests of grammars: the texts they accept in each spelling, and error messages that give the line."""

from __future__ import annotations

import json
import random
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_mlx import Constraint, DgemmaError, generate, load
from dgemma_mlx.constrain.languages import of_grammar
from dgemma_mlx.constrain.lark import COMMON
from dgemma_mlx.train.tasks.sudoku import all_grids, format_grid
from tests.constrain.naive import Grammar, Recogniser, grammars, rules_without_text, written
from tests.constrain.small import text_of

POLITE = r"""
answer ::= greeting " " name+ ("!" | ".")?   # the first rule
greeting ::= "Hello" | 'Good ' [a-z]{3,8}
    | "\"\x41\u00e9\n"                       # continues the rule on a second line
name = [A-Z] [a-z]*; unused : .
"""

# The grammar of JSON that llama.cpp comes with.
LLAMA_JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"""

# The calculator of Lark's tutorial.
LARK_CALCULATOR = """
?start: sum
      | NAME "=" sum    -> assign_var
?sum: product
    | sum "+" product   -> add
    | sum "-" product   -> sub
?product: atom
    | product "*" atom  -> mul
    | product "/" atom  -> div
?atom: NUMBER           -> number
     | "-" atom         -> neg
     | NAME             -> var
     | "(" sum ")"
%import common.CNAME -> NAME
%import common.NUMBER
%import common.WS_INLINE
%ignore WS_INLINE
"""

TABLE = r"""
table ::= row rule row+
row   ::= "|" (" " cell " |"){2,6} "\n"
rule  ::= "|" (" " ":"? "-"{3,} ":"? " |"){2,6} "\n"
cell  ::= [^|\n \t] ([^|\n]{0,38} [^|\n \t])?
"""


@pytest.mark.parametrize(
    ("grammar", "texts", "others"),
    [
        (POLITE, ["Hello Ann", "Good morning Ann!", "Hello AnnBob.", '"Aé\n X'],
         ["Hello", "Hello ann", "Good mo Ann", "Hello Ann!."]),
        ('e ::= e "+" e | e "*" e | "(" e ")" | [0-9]+', ["7", "1+2*(3+44)", "((5))", "+".join("1" * 300)],
         ["", "1+", "(1", "1++2", "()"]),
        ('s ::= "" | s s | "(" s ")" | "[" s "]"', ["", "()[]", "([()])()" * 30], ["(", "([)]", "x"]),
        ('a ::= b "x" | "p"\nb ::= c "y" | "q"\nc ::= a "z" | b "w" | "r"', ["p", "pzyx", "ryx", "qwyx", "pzywyx"],
         ["r", "pz", "pzy", "qxx"]),
        ('s ::= opt s "x" | "y"   opt ::= "a"?', ["y", "aayxx", "yxxx"], ["", "ay", "ax", "aaayxx"]),
        ('a ::= [\\w-] [^\\d] . [\\]\\[^"-]', ["é-x]", "-\n ^", "_a\"-"], ["-1x]", "--\n]", "é-x\\"]),
        ('word-list ::= item-1 ("," item-1)*\nitem-1 ::= [!--] [+\\x2d\\U0001F600]',
         ["!+,-😀", ",-"], ["a+", "!a"]),
        ('first ::= "x"\nroot ::= "(" first ")"', ["(x)"], ["x"]),
        (LARK_CALCULATOR, ["1", " 1 + 2.5e3*( x -y) ", "a = - -3", "x"],
         ["", "1 +", "1 2", "x==1", "a = b = 1"]),
        ('start: A ["," start] ";"~2..3 B?  // c\nA: "ab"i | "0".."9" | /x[^\\/]\\/y+/s\nB: ("é" | "\\u0041"){,2}',
         ["ab;;", "aB,7;;;A;;éA", "x\n/yy;;;é"], ["ab;", "ab ;;", "x/y;;", "a;;"]),
        ("start: WORD (_sep WORD)*\n_sep: \",\"\n%import common (WORD, WS)\n%ignore WS\n%ignore /#[^\\n]*\\n/",
         ["a,b", "  a , b#x,\n,c #\n"], ["a b", "a,", "#a", "#\n"]),
        ("start: /a b|c # a comment/xi", ["AB", "c"], ["a b", "ac"]),
        (TABLE, ["| a | b |\n| --- | :---: |\n| 1 | 2 3 |\n"], ["| a | b |\n| -- | --- |\n| 1 | 2 |\n", "| a |\n"]),
    ],
)  # fmt: skip
def test_texts_that_a_grammar_accepts_and_rejects(grammar: str, texts: list[str], others: list[str]) -> None:
    constraint = Constraint.grammar(grammar)
    assert [text for text in texts if not constraint.matches(text)] == []
    assert [text for text in others if constraint.matches(text)] == []


TEXTS = ["".join(letters) for length in range(5) for letters in product("ab", repeat=length)] + ["é", "aéb", "éé"]


@settings(max_examples=40)
@given(grammars(), st.booleans())
def test_random_grammars_accept_what_trying_everything_finds(grammar: Grammar, lark: bool) -> None:
    used = {"root"} | {name for name in grammar if f"@{name}" in repr(grammar)}
    if rules_without_text(grammar) & used:
        with pytest.raises(DgemmaError, match="has no text"):
            of_grammar(written(grammar, lark))
        return
    machine = of_grammar(written(grammar, lark))
    found = [text for text in TEXTS if Recogniser(grammar, text).matches()]
    assert [text for text in TEXTS if machine.matches(text.encode())] == found
    shortest, state = b"", machine.start
    while not state.nullable:
        byte, state = machine.step(state)
        shortest += bytes([byte])
    assert len(shortest) == machine.terms.least(machine.start)
    assert len(shortest) <= min((len(text.encode()) for text in found), default=99)
    assert Recogniser(grammar, shortest.decode()).matches()


def random_json(rng: random.Random, depth: int) -> object:
    if depth and rng.random() < 0.6:
        values = [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
        names = [rng.choice(["", 'a"\\', "é\n"]) + str(number) for number in range(len(values))]
        return values if rng.random() < 0.5 else dict(zip(names, values, strict=True))
    return rng.choice([True, None, 12, -0.5, 1e16, "", "\x01/😀", "x"])


def test_llama_cpps_grammar_of_json_nests_without_a_limit() -> None:
    constraint, rng = Constraint.grammar(LLAMA_JSON), random.Random(0)
    for _ in range(40):
        text = json.dumps({"a": random_json(rng, 5)}, ensure_ascii=rng.random() < 0.5)
        assert constraint.matches(text)
        assert not constraint.matches(text[:-1]) and not constraint.matches(text.replace(":", "=", 1))
    assert constraint.matches('{"a":' + "[" * 1000 + "]" * 1000 + "}")
    numbers = np.random.default_rng(0)
    for _ in range(30):
        assert isinstance(json.loads(text_of(constraint.machine, numbers)), dict)


def test_the_rows_of_a_sudoku() -> None:
    rows = " | ".join('"' + " ".join(row) + '"' for row in permutations("1234"))
    constraint = Constraint.grammar(f'grid ::= row ("\\n" row){{3}}\nrow ::= {rows}')
    texts = [format_grid(grid) for grid in all_grids()]
    assert all(constraint.matches(text) for text in texts)
    assert not any(constraint.matches(text.replace("1", "2")) for text in texts)


@pytest.mark.slow
def test_an_answer_nests_as_its_grammar_does() -> None:
    constraint = Constraint.grammar('start: "[" item ("," item)+ "]"\nitem: start | /[0-9]/')
    answer = generate(load("demo"), "Write a list.", constraint=constraint, max_tokens=40, seed=0)
    assert constraint.matches(answer.text) and isinstance(json.loads(answer.text), list)


@pytest.mark.parametrize("name", COMMON)
def test_a_terminal_of_larks_common(name: str) -> None:
    texts = {
        "DIGIT": "7", "HEXDIGIT": "c", "INT": "07", "SIGNED_INT": "-7", "DECIMAL": ".5", "FLOAT": "1e-3",
        "SIGNED_FLOAT": "+1.e5", "NUMBER": "12", "SIGNED_NUMBER": "-.5E+1", "ESCAPED_STRING": r'"a\"\\"',
        "LCASE_LETTER": "q", "UCASE_LETTER": "Q", "LETTER": "q", "WORD": "abC", "CNAME": "_a1", "WS_INLINE": "\t ",
        "WS": "\r\n \f", "CR": "\r", "LF": "\n", "NEWLINE": "\n\r\n", "SH_COMMENT": "# x", "CPP_COMMENT": "//",
        "C_COMMENT": "/* **\n */", "SQL_COMMENT": "-- x",
    }  # fmt: skip
    constraint = Constraint.grammar(f"start: X\n%import common.{name} -> X")
    assert constraint.matches(texts[name])
    for other in ("", "1.e", '"\\"', "a-b", "/* */ */", "\n\r", texts[name] + "\n*"):
        assert not constraint.matches(other) or (name, other) in {("WS", "\n\r")}


@pytest.mark.parametrize(
    ("grammar", "says"),
    [("a ::= a", "line 1: rule a has no text"), ("a ::= b 'y'\nb ::= 'x' a", "line 1: rule b has no text"),
     ("a ::= 'x'\nb ::= c\nc ::= b", "has no text"),
     ("a ::= (", r"\( is not closed"), ("a ::= ?", "no item before"), ("", "no rule"),
     ("a ::= b", "'b' does not exist"),
     ("x", "outside any rule"), ("a ::= 'x' )", r"unexpected \)"), ("\na ::= 'abc", "line 2: .*not valid syntax"),
     ("a ::= 'x'; 'y'", "outside any rule"), ("a ::= ('x' |\n b)", "line 2: .*does not exist"),
     ("a ::= 'x'\na ::= 'y'", "defined twice"), (r"a ::= '\q'", "not a valid escape"),
     ("a ::= []", "class is empty"), ("a ::= [^]", "class is empty"), ("a ::= [z-a]", "ends before it begins"),
     (r"a ::= [\d-z]", "cannot begin a range"), (r"a ::= [\p{Nothing}]", "not a set"), (r"a ::= [\ud800]", "Unicode"),
     (r"a ::= [^\x00-\U0010FFFF]", "matches no character"), (r"a ::= [a-\d]", "not a valid escape"),
     (r"a ::= '\ud800'", "Unicode"), (r"a ::= '\UFFFFFFFF'", "Unicode"), (3, "text"),
     ("a ::= 'x'{9999999999}", "too large"), ("a ::= 'x'{3,2}", "ends before it begins"),
     ("a ::= root\nroot ::= 'x'", "line 1: the rule root is used"), ("root ::= <think>", "tokens are not supported"),
     ("%import common.INT", "no rule start"), ('start: a\na.2: "x"', "line 2: priorities"),
     ("start: s{A}\nA: /a/", "templates"), ('start: s\ns{x}: x "y"', "templates"),
     ('start: "x"\ns[lazy]: /a/', "attributes"),
     ("start: X\n%import common.NOTHING -> X", "'common.NOTHING' cannot be imported"),
     ("start: X\n%import .other.X", "cannot be imported"),
     ("start: X\n%declare X", "line 2: %declare is not supported"),
     ("start: %json {}", "%json is not supported"), ("start: <|end|>", "tokens"), ("start: A & A\nA: /a/", "operators"),
     ('start: A\nA: b\nb: "x"', "line 2: 'b' is a rule"), ("start: /(?<=a)b/", "cannot be compiled"),
     ("start: /^a/", "anchor"), ("start: /a(b|$)*/", "anchor"), ('start: "ab".."c"', "not a range"),
     ("start: @other", "grammars"),
     ("start: (/a/]", r"unexpected \]"), ('start: X\nX: "a"\n%import common.INT -> X', "defined twice"),
     ("start: [a-z]", "'a-z' does not exist"), ("start: INT", "'INT' does not exist"),
     ('start: "a"\n%ignore " "\n%ignore /#.*/', "line 2: what is ignored could go on"),
     ('%ignore " "\n%ignore ("a"\nstart: "b"', "closed")],
)  # fmt: skip
def test_an_error_gives_the_line_and_the_problem(grammar: str, says: str) -> None:
    with pytest.raises(DgemmaError, match=says) as caught:
        Constraint.grammar(grammar)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ("a ::= " + "(" * 5000 + '"x"' + ")" * 5000, "x"),
        ("\n".join(f'r{n} ::= "a" r{n + 1}' for n in range(3000)) + '\nr3000 ::= "x"', "a" * 3000 + "x"),
        ("a ::= " + '("a" ' * 3000 + '"x"' + ")?" * 3000, "a" * 3000 + "x"),
        ("\n".join(f'r{n} ::= r{(n + 1) % 60} "a" | r{n * 7 % 60} "b" | "x"' for n in range(60)), "xa"),
        ('a ::= "a" a "a" | "b"', "a" * 1000 + "b" + "a" * 1000),
        ("\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(11)) + "\nr11 ::= 'x'", "x" * 2048),
        ('s ::= "a" s "b" | "a" s "c" | "x"', "a" * 200 + "x" + "bc" * 100),
    ],
    ids=["groups", "rules", "options", "left recursion", "nesting", "doubling", "ambiguous"],
)
def test_a_large_grammar_costs_what_is_visited(grammar: str, text: str) -> None:
    assert Constraint.grammar(grammar).matches(text)
