"""f(x; w) → f(x; node(w)): one identity node between a weight and all that uses it, the place to add a gradient."""

from collections.abc import Callable, Iterable, Sequence

from torch import fx

from ggpass.errors import WeightError
from ggpass.graph.program import Program
from ggpass.graph.weights import Weight

#: Given the program, the node that reads a weight and the weight itself: the node that the uses will read instead.
MakeNode = Callable[[Program, fx.Node, Weight], fx.Node]


def insert_on_weight_edges(program: Program, names: Iterable[str], make_node: MakeNode) -> list[fx.Node]:
    """f(x; w) → f(x; make_node(w)) for each named weight, at all its uses.

    1. A weight gets one node, whatever the number of its uses and names: what the node adds to the gradient is added
       once, and tied weights stay tied.
    2. `make_node` is called with the insertion point behind the weight's first read, and ahead of every use.
    3. The nodes keep the weight's shape and dtype: they are identities forward.
    4. Call it once for each kind of node: nodes of several calls follow one another on the edge.

    Args:
        program: edited in place.
        names: of the weights; any one of a tied weight's names selects it.
        make_node: makes the node (and the reads of its buffers) from the node that reads the weight.

    Returns:
        The new nodes, in the order of the graph.

    Raises:
        WeightError: a name that the graph does not read.
    """
    weights = program.tensors()
    names = set(names)
    unknown = names.difference(*(weight.names for weight in weights))
    if unknown:
        some = ", ".join(w.name for w in weights[:5]) + (", …" if len(weights) > 5 else "")
        raise WeightError(f"the graph reads no weight named {min(unknown)!r}; it reads {some}")
    return [_insert(program, weight, make_node) for weight in weights if names.intersection(weight.names)]


def _insert(program: Program, weight: Weight, make_node: MakeNode) -> fx.Node:
    sources = [n for n in program.reads() if n.users and program.weight(str(n.target)) is weight.tensor]
    return insert_behind(sources, sources[0].next, lambda: make_node(program, sources[0], weight))


def insert_behind(sources: Sequence[fx.Node], before: fx.Node, make: Callable[[], fx.Node]) -> fx.Node:
    """uses(source) → uses(node(source)): one new node takes the place of the sources at all that uses them.

    Args:
        sources: reads of one tensor, the first of which the new node reads.
        before: the place of the node in the graph: behind the first source, ahead of all uses.
        make: makes the node, and reads of what else it takes.

    Returns:
        The new node.
    """
    uses = [(source, user) for source in sources for user in list(source.users)]
    with sources[0].graph.inserting_before(before):
        node = make()
    if "val" in sources[0].meta:
        node.meta.setdefault("val", sources[0].meta["val"])
    for source, user in uses:
        user.replace_input_with(source, node)
    return node
