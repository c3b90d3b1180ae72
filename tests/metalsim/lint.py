"""Detection of source that Apple's Metal compiler refuses and that Clang's C++ for OpenCL accepts.

A kernel is checked twice: its tokens, for faults that the translation to OpenCL hides, and Clang's syntax tree, for
faults that depend on types. The rules are those of the Metal Shading Language as MLX's sources show them. Nothing here
was compared with Apple's compiler.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.metalsim.toolchain import KERNEL_FILE

ADDRESS_SPACES = frozenset({"device", "constant", "threadgroup", "thread"})

_TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:[^\n\\]|\\.)*|\s+)
      | \[\[.*?\]\] | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'
      | [A-Za-z_]\w* | \d(?:[eE][+-]|[\w.])* | :: | -> | && | \|\| | \+\+ | -- | [-+*/%&|^=!<>]= | .""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


class Finding(NamedTuple):
    """A fault in a kernel's source.

    Attributes:
        line: Line of the kernel's text.
        message: Description of the fault.
    """

    line: int
    message: str


class _Token(NamedTuple):
    text: str
    line: int


def lint(source: str, tree: str) -> list[Finding]:
    """Return the faults that either check finds, sorted by line.

    ``source`` is the Metal source as MLX passes it to the compiler. ``tree`` is Clang's AST dump of its translation, in
    which ``#line`` directives give the lines of ``source`` the file name ``KERNEL_FILE``.
    """
    return sorted({*lint_text(source), *lint_tree(tree)})


def lint_text(source: str) -> list[Finding]:
    """Return the faults that can be found without types.

    These are ``goto``, pointer and reference parameters without an address space, and threadgroup variables outside a
    kernel.
    """
    tokens = _tokens(source)
    findings = [Finding(token.line, "Metal has no goto") for token in tokens if token.text == "goto"]
    for head, body in _functions(tokens):
        findings += _parameters_without_space(head)
        findings += _constant_references(body)
        if not any(re.match(r"(\[\[)?kernel\b", token.text) for token in head):
            findings += _threadgroup_variables(body)
    return sorted(set(findings))


def _tokens(source: str) -> list[_Token]:
    """Return the tokens of ``source`` without comments and preprocessor lines."""
    found, line = [], 1
    for match in _TOKEN.finditer(source):
        if not match["skip"]:
            found.append(_Token(match[0], line))
        line += match[0].count("\n")
    return found


def _functions(tokens: list[_Token]) -> Iterator[tuple[list[_Token], list[_Token]]]:
    """Yield the head and the body of each function definition, also in namespaces and classes.

    The head does not include ``template <...>``.
    """
    start = i = 0
    while i < len(tokens):
        text = tokens[i].text
        if text in ";}" or (text == ":" and tokens[i - 1].text in ("public", "private", "protected")):
            start = i + 1
        elif text == "template" and tokens[i + 1].text == "<":
            i = _closing(tokens, i + 1)
            start = i + 1
        elif text in "([":
            i = _closing(tokens, i)
        elif text == "{":
            head, end = tokens[start:i], _closing(tokens, i)
            words = _words(head)
            if "(" in words and ("=" not in words or "operator" in words):
                yield head, tokens[i:end]
                i = end
            elif not {"namespace", "struct", "class", "union", "extern"} & set(words):  # an enum or an initializer
                i = end
            start = i + 1
        i += 1


def _closing(tokens: list[_Token], i: int) -> int:
    """Return the index of the bracket that closes the bracket at ``i``. A ``<`` counts only outside of parentheses."""
    stack: list[str] = []
    for j in range(i, len(tokens)):
        text = tokens[j].text
        if text in "([{" or (text == "<" and stack[-1:] in ([], [">"])):
            stack.append(_CLOSING[text])
        elif stack and text == stack[-1]:
            stack.pop()
        if not stack:
            return j
    return len(tokens) - 1


def _words(tokens: list[_Token]) -> list[str]:
    """Return the text of the tokens, without those inside brackets."""
    words, i = [], 0
    while i < len(tokens):
        words.append(tokens[i].text)
        i = _closing(tokens, i) + 1 if words[-1] in _CLOSING else i + 1
    return words


def _parameters_without_space(head: list[_Token]) -> Iterator[Finding]:
    i = 1
    while i < len(head) and (head[i].text != "(" or head[i - 1].text in ("operator", "alignas", "__attribute__")):
        i = _closing(head, i) + 1 if head[i].text in _CLOSING else i + 1
    end = _closing(head, i) if i < len(head) else 0
    while (i := i + 1) < end:
        words, line = [], head[i].line
        while i < end and head[i].text != ",":
            words.append(head[i].text)
            i = _closing(head, i) + 1 if head[i].text in _CLOSING else i + 1
        words = words[: words.index("=")] if "=" in words else words
        kind = "pointer" if "*" in words else "reference" if {"&", "&&"} & set(words) else ""
        if kind and not ADDRESS_SPACES & set(words):
            yield Finding(line, f"{kind} without an address space: {words[-1]}")


def _threadgroup_variables(body: list[_Token]) -> Iterator[Finding]:
    for i, token in enumerate(body):
        if token.text == "threadgroup" and _starts_statement(body, i):
            end = next(j for j in range(i, len(body) + 1) if j == len(body) or body[j].text in ";=[,{(")
            if not {"*", "&"} & {part.text for part in body[i:end]}:
                yield Finding(token.line, f"threadgroup variable outside a kernel: {body[end - 1].text}")


def _constant_references(body: list[_Token]) -> Iterator[Finding]:
    """Yield a finding for each ``const T& x = ...``.

    The syntax tree cannot show these, because the translation removes the address space of ``const thread T& x``.
    """
    for i, token in enumerate(body):
        if token.text == "const" and body[i - 1].text in "(;{}":
            words = [part.text for part in body[i : i + 24]]
            end = next((j for j, word in enumerate(words) if word in ("&", "=", ";", "(", "{", ")")), 0)
            if words[end : end + 1] == ["&"] and not ADDRESS_SPACES & set(words[:end]):
                yield Finding(token.line, f"reference without an address space: {words[end + 1]}")


def _starts_statement(body: list[_Token], i: int) -> bool:
    while body[i - 1].text in ("const", "volatile", "static"):
        i -= 1
    return body[i - 1].text in ";{}"


_NODE = re.compile(r"([|` -]*)(\w+) (0x[0-9a-f]+)(.*)")
_PLACE = re.compile(r"(?:line|(?P<file>[^\s<>,']+|<[^<>]*>)):(?P<row>\d+):\d+|col:\d+")
_DECLARATIONS = frozenset({"VarDecl", "ParmVarDecl", "FieldDecl", "TypedefDecl", "TypeAliasDecl"})
_CASTS = frozenset({"CStyleCastExpr", "CXXStaticCastExpr", "CXXReinterpretCastExpr", "CXXFunctionalCastExpr"})
_FUNCTIONS = frozenset({"FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl", "CXXConversionDecl"})
_POINTS_ANYWHERE = re.compile(r"[^*&]*__generic\b[^*&]*\*")
_COMPARES_VECTORS = re.compile(r"ext_vector_type\(\d+\)\)\)' '([<>]=?|[!=]=)'")
_HANDS_ON = re.compile(r"ParenExpr|ImplicitCastExpr|UnaryOperator .* '[!~]'|BinaryOperator .*'(&&?|\|\|?|\^|[!=]=)'")
_METAL = {"__global": "device", "__local": "threadgroup", "__constant": "constant"}


@dataclass(frozen=True)
class _Node:
    """A line of Clang's AST dump.

    An example is ``|-VarDecl 0x7f54 <line:3:1, col:9> col:7 used x '__private float' cinit``.

    Attributes:
        kind: Kind of the node, for example ``VarDecl``.
        address: Address of the node, which identifies it.
        text: The rest of the line.
        line: Line of the Metal source; 0 for a node from elsewhere, or one that was not written.
        parent: Parent node.
    """

    kind: str
    address: str
    text: str
    line: int
    parent: _Node | None

    @property
    def type(self) -> str:
        """The node's type, with aliases resolved."""
        quoted = re.search(r"'([^']*)'(?::'([^']*)')?", self.text)
        return (quoted[2] or quoted[1]) if quoted else ""

    @property
    def name(self) -> str:
        return self.text.partition(" '")[0].split()[-1]

    def ancestors(self) -> Iterator[_Node]:
        node = self.parent
        while node:
            yield node
            node = node.parent


def lint_tree(tree: str) -> list[Finding]:
    """Return the faults that can be found only with types.

    These are pointers without an address space, globals and statics that are not constant, lambdas, recursion,
    ``double``, implicit conversions from ``float`` to ``bfloat``, methods without an address space on objects that have
    one, and results of vector comparisons that are stored.
    """
    nodes = [node for node in _nodes(tree) if node.line]
    findings = [Finding(node.line, message) for node in nodes for message in _flaws(node)]
    return sorted({*findings, *_recursion(nodes)})


def _nodes(tree: str) -> Iterator[_Node]:
    path: list[_Node] = []
    here, row = "", 0  # the dump shows a file and a line only where they change
    for text in tree.splitlines():
        if not (match := _NODE.match(text)):
            continue
        indent, kind, address, rest = match.groups()
        del path[len(indent) // 2 :]
        rows = []
        for place in _PLACE.finditer(rest.partition("'")[0]):
            here, row = place["file"] or here, int(place["row"] or row)
            rows += [row] if here == KERNEL_FILE else []
        parent = path[-1] if path else None
        within = parent is None or parent.kind == "TranslationUnitDecl" or parent.line
        implicit = kind in _FUNCTIONS and " implicit " in rest
        line = rows[0] if rows else parent.line if parent else 0  # a node without a line comes from a macro of the shim
        path.append(_Node(kind, address, rest, line if within and not implicit else 0, parent))
        yield path[-1]


def _flaws(node: _Node) -> Iterator[str]:
    if node.kind == "LambdaExpr":
        yield "a lambda: older versions of Metal have none"
    if node.kind == "VarDecl" and re.match("__generic [^*]*&", node.type):
        yield f"reference without an address space: {node.name}"
    if node.kind in _DECLARATIONS and _POINTS_ANYWHERE.match(node.type):
        yield f"pointer without an address space: {node.name}"
    if node.kind in _FUNCTIONS and _POINTS_ANYWHERE.match(node.type.partition("(")[0]):
        yield f"pointer without an address space: what {node.name} returns"
    if node.kind in _CASTS and _POINTS_ANYWHERE.match(node.type):
        yield "pointer without an address space: in a cast"
    if node.kind == "VarDecl" and "__global" in re.split("[*&]", node.type)[-1]:
        yield f"{node.name} is global or static: it must be constant"
    if "__bf16" in node.type and (
        (node.kind == "ImplicitCastExpr" and re.search("<FloatingCast>(?! part_of_explicit_cast)", node.text))
        or (node.kind == "CompoundAssignOperator" and "ComputeResultTy='float'" in node.text)
    ):
        yield "float becomes bfloat without a cast"
    if node.kind.endswith("Operator") and (node.type == "double" or "ComputeResultTy='double'" in node.text):
        yield "double: Metal has none; write the literal with f"
    if node.kind == "BinaryOperator" and _COMPARES_VECTORS.search(node.text):
        user = next(node for node in node.ancestors() if not _HANDS_ON.match(f"{node.kind} {node.text}"))
        if user.kind != "CallExpr":
            yield "comparing vectors gives boolN in Metal, intN here: hand it to any, all or select at once"
    yield from _method_without_space(node)


def _method_without_space(node: _Node) -> Iterator[str]:
    up = [*node.ancestors()][:2]
    if len(up) == 2 and "<AddressSpaceConversion>" in up[0].text and "<bound member function type>" in up[1].text:
        for space in _METAL.keys() & set(re.findall(r"__\w+", node.type)):
            yield f"a method without an address space, called on an object in {_METAL[space]} memory"


def _recursion(nodes: list[_Node]) -> Iterator[Finding]:
    """Yield a finding for each function that calls itself, directly or through other functions."""
    first = {node.address: node for node in nodes if node.kind in _FUNCTIONS}
    for address, node in first.items():
        if previous := re.match(r" (?:parent \w+ )?prev (0x[0-9a-f]+)", node.text):
            first[address] = first.get(previous[1], node)
    calls: dict[str, set[str]] = {node.address: set() for node in first.values()}
    for node in nodes:
        if called := re.search(r"(?:Function|CXXMethod|(?:\.|->)\w+) (0x[0-9a-f]+)", node.text):
            caller = next((up for up in node.ancestors() if up.kind in _FUNCTIONS), None)
            if caller and called[1] in first:
                calls[first[caller.address].address].add(first[called[1]].address)
    for address in calls:
        reached: set[str] = set()
        waiting = [address]
        while waiting:
            new = calls[waiting.pop()] - reached
            reached |= new
            waiting += new
        if address in reached:
            yield Finding(first[address].line, f"recursion: {first[address].name}")
