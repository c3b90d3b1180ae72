"""Context-free grammars as terms: what the texts of a grammar are.

Grammars are read in the spelling of EBNF, of llama.cpp (GBNF), or of Lark; ``grammar_reader`` and ``lark`` describe
them.
"""

from __future__ import annotations

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.grammar_reader import EbnfReader, reject
from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.rules import Alternative, Item, Name, lengths, without_left_recursion
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms


def term_of_grammar(grammar: str, terms: Terms) -> Term:
    """Return the texts of a grammar as a term over bytes.

    Raises ``DgemmaError`` (exit code 2), which gives the line, when the grammar is malformed, and when a rule has no
    text at all.
    """
    from dgemma_mlx.constrain.lark import LarkReader, is_lark

    reader = LarkReader(terms) if is_lark(grammar) else EbnfReader(terms)
    start = reader.read(grammar)
    for name, line in reader.lines.items():
        if name not in reader.rules:
            reject(line, f"rule {shown(name)} does not exist")
    shortest = lengths(reader.rules, terms)
    for name, line in reader.lines.items():
        if shortest[name] >= UNBOUNDED:
            reject(line, f"rule {name} has no text, because each of its alternatives needs a rule without text",
                   "Add an alternative that ends.")
    nullable = {name for name, length in shortest.items() if length == 0}
    rules = without_left_recursion(reader.rules, start, nullable, terms)
    shortest = lengths(rules, terms)

    def of_rule(name: Name) -> Term:
        return terms.rule(
            lambda: terms.either(map(of_alternative, rules[name])), ("rule", name), shortest[name] == 0,
            weigh=lambda _: shortest[name],
        )

    def of_alternative(alternative: Alternative) -> Term:
        return terms.sequence(*map(of_item, alternative))

    def of_item(item: Item) -> Term:
        atom = item.atom if isinstance(item.atom, Term) else of_rule(item.atom)
        return terms.repeat(atom, item.least, item.most)

    if reader.ignored is not None and _goes_on(of_rule(reader.ignored), terms):
        reject(reader.lines[reader.ignored], "what is ignored could go on in a way that is not ignored itself",
               "Let it include its end, as in /#[^\\n]*\\n/.")
    return of_rule(start)


def _goes_on(ignored: Term, terms: Terms) -> bool:
    """Return whether an ignored text can become a longer one, of which the rest is not a sequence of ignored texts.

    Lark ignores the longest text that it can. Otherwise each text that it could ignore is as good.
    """
    states, sequence = [ignored], terms.repeat(ignored, 0)
    for state in states:  # grows
        check_time()
        states += [after for _, after in terms.row(state) if after not in states]
    pairs = [(state, sequence) for state in states if state.nullable]  # a rest, and what may be ignored there
    for rest, allowed in pairs:  # grows
        check_time()
        if rest.nullable and not allowed.nullable:
            return True
        for mask, after in terms.row(rest):
            left = mask
            for other, following in terms.row(allowed):
                if mask & other and (after, following) not in pairs:
                    pairs.append((after, following))
                left &= ~other
            if left:
                return True
    return False
