"""A graph in pieces: the functions of a stage that a pipeline runs at different times."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch.fx import Graph, GraphModule, Node


def needed(ends: list[Node]) -> set[Node]:
    """Nodes of a graph, and all that they are made of."""
    found, todo = set(), list(ends)
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo += n.all_input_nodes
    return found


@dataclass
class Piece:
    """Some of the nodes of a graph as a function of a list of tensors."""

    call: Callable
    needs: list[Any]  # (0, parameter), (1, what flows in), (2, of the batch), (3, gradient of what flows out), a Node
    gives: list[Any]  # ("out", what flows out), ("in", gradient), ("params", gradient), or a Node for a later piece


def cut(graph: GraphModule, inputs: dict[Node, tuple], results: list[dict], early: set[Node]) -> list[Piece]:
    """A graph as one function for each dict of results. Each computes what it gives and none before it did, the first
    also the nodes of early; what later ones read of that, it gives besides. What is made of parameters alone (casts,
    what a mesh gathers) is made again instead, so that no micro-batch under way has its own copy."""
    wanted = [list(r.values()) for r in results]
    again = _again(graph, inputs)
    owner = dict.fromkeys(early & needed(sum(wanted, [])), 0)
    for k, ends in enumerate(wanted):
        owner = dict.fromkeys(needed(ends), k) | owner
    nodes = [n for n in graph.graph.nodes if n in owner and n not in inputs and n not in again]
    for n in nodes:
        if n.target is getitem:  # tuples do not go from one piece to another
            owner[n] = owner[n.args[0]]
    pieces = []
    for k, ends in enumerate(wanted):
        own = {n for n in nodes if owner[n] == k}
        own |= again & needed([n for m in own for n in m.all_input_nodes if n in again] + [*again.intersection(ends)])
        own = dict.fromkeys(n for n in graph.graph.nodes if n in own)
        later = {n for m in nodes if owner[m] > k for n in m.all_input_nodes}.union(*wanted[k + 1 :])
        saved = [n for n in own if n in later and n not in again]
        needs = [n for n in dict.fromkeys([m for n in own for m in n.all_input_nodes] + ends) if n not in own]
        pieces.append(Piece(_function(graph, own, needs, ends + saved), [inputs.get(n, n) for n in needs],
                            [*results[k], *saved]))
    return pieces


def _again(graph: GraphModule, inputs: dict[Node, tuple]) -> set[Node]:
    """The nodes that are made of parameters and constants alone."""
    found: set[Node] = set()
    for n in graph.graph.nodes:
        made = all(m in found or inputs.get(m, (1,))[0] == 0 for m in n.all_input_nodes)
        if made and n.op in ("call_function", "get_attr"):
            found.add(n)
    return found


def _function(graph: GraphModule, own: Iterable[Node], needs: list[Node], gives: list[Node]) -> GraphModule:
    new = Graph()
    env = {n: new.placeholder(n.name) for n in needs}
    for n in own:
        env[n] = new.node_copy(n, env.__getitem__)
        env[n].meta = {}  # marks of passes that have been done
    new.output([env[n] for n in gives])
    return GraphModule(graph, new)
