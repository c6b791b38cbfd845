"""Rewrites a parsed template so that everything in it that can grow pays first; refuses syntax chat templates lack.

Jinja's own sandbox sees calls, attributes and arithmetic. What it does not see is sent through helpers of the
environment, which templates cannot name: loops (each round pays for its body), macro bodies, `~`, slices, comparisons.
"""

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from finetune.chat.budget import MAX_NUMBER, STEP, UnsafeTemplateError

_NODES = (
    "Template Output TemplateData For If Macro CallBlock FilterBlock With Assign AssignBlock Break Continue Scope "
    "Name NSRef Const Tuple List Dict Pair Keyword CondExpr Filter Test Call Getitem Getattr Slice Concat Compare "
    "Operand BinExpr UnaryExpr"
)
_ALLOWED: tuple[type[nodes.Node], ...] = tuple(getattr(nodes, name) for name in _NODES.split())
"""The kinds of syntax nodes that chat templates need."""


def meter_tree(tree: nodes.Template) -> nodes.Template:
    """The same template, paying for its work through `environment.counted`, `step`, `concatenated`, `sliced`, `looked`.

    Raises:
        UnsafeTemplateError: it uses syntax that is not for chat templates, with the line.
    """
    for node in tree.find_all(nodes.Node):
        if not isinstance(node, _ALLOWED):
            problem = f"it uses the tag or expression {type(node).__name__}, which is not for chat templates"
        elif getattr(node, "dyn_args", None) is not None or getattr(node, "dyn_kwargs", None) is not None:
            problem = "it calls something with * or **"
        elif isinstance(node, nodes.Const) and isinstance(node.value, int) and node.value > MAX_NUMBER:
            problem = "it has a number of more than 64 bits"
        else:
            continue
        raise UnsafeTemplateError(f"line {node.lineno}: {problem}")
    metered = _Meterer().visit(tree)
    assert isinstance(metered, nodes.Template)
    return metered


class _Meterer(NodeTransformer):
    """Sends what Jinja's sandbox does not see through helpers of the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        """Each round pays for the loop's body."""
        cost = _cost([*node.body, *([node.test] if node.test else [])])
        self.generic_visit(node)
        node.iter = _helper("counted", node, node.iter, nodes.Const(cost))
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:  # noqa: N802
        """Each call of a macro, and each `caller()`, pays for its body."""
        cost = _cost([*node.body, *node.defaults])
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_helper("step", node, nodes.Const(cost))).set_lineno(node.lineno))
        return node

    visit_CallBlock = visit_Macro  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """`a ~ b` pays for the text it makes."""
        self.generic_visit(node)
        return _helper("concatenated", node, *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """`a[1:]` pays for the part it copies."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return _helper("sliced", node, node.node, *bounds)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        """A key is looked at before it is hashed."""
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _helper("looked", node, node.key, nodes.Const(1))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """A comparison pays for its right side, which bounds it; not where a side is written out in the template."""
        self.generic_visit(node)
        left: nodes.Expr = node.expr
        for operand in node.ops:
            right, searches = operand.expr, operand.op in ("in", "notin")
            if searches and left is node.expr and not _is_short(left):
                node.expr = _looked(left, 1)  # a dict hashes what it is asked for
            if not _is_short(right) and (searches or not _is_short(left)):
                # To search for a text takes longer, the longer it is: at worst by a character in eight.
                operand.expr = _looked(right, 8 if searches and not _is_short(left) else 1)
            left = right
        return node


def _looked(node: nodes.Expr, times: int) -> nodes.Expr:
    return _helper("looked", node, node, nodes.Const(times))


def _is_short(node: nodes.Expr) -> bool:
    written = node.items if isinstance(node, nodes.List | nodes.Tuple) else [node]
    return all(isinstance(item, nodes.Const) for item in written)


def _helper(name: str, near: nodes.Node, *args: object) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)
    call.set_lineno(near.lineno)
    return call


def _cost(body: list[nodes.Node]) -> int:
    """What one run of these nodes costs: their number, and the text that is written out in them."""
    total = STEP
    for part in body:
        for node in (part, *part.find_all(nodes.Node)):
            text = getattr(node, "data", None) or getattr(node, "value", None)
            total += STEP + (len(text) if isinstance(text, str) else 0)
    return total
