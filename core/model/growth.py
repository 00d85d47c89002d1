"""Arithmetic with which the weights of a larger model are made from those of a smaller one.

Sparse upcycling (arXiv 2212.05055) copies the network of a dense layer into every expert. Fine-grained experts are
parts of its inner width (DeepSeekMoE, arXiv 2401.06066; "virtual groups" of arXiv 2410.07524). With W(x) the source's
network and W_j(x) its part j of g, W(x) = sum over j of W_j(x), because the down-projection adds up inner units.
Expert (i m + c) g + j is part j of copy c of source expert i, with m copies of each. The parts of a dense layer's copy
have equal router rows, and so has all that comes from one expert of the source. A token therefore chooses either all
experts of such a group or none, if their number divides top_k.

Let the gates of a token add up to S. The g parts of a chosen copy share its gate equally, so a layer computes S / g of
what its source would with gates that add up to 1. Down-projections are multiplied by g S' / S, where S' is the sum of
the source's gates, 1 for a dense layer: then the output is the source's.
"""

from torch import Tensor


def parts_of_width(
    gate_up_GXD: Tensor, down_GDH: Tensor, parts: int, *, first: int = 0, width: int
) -> tuple[Tensor, Tensor]:
    """Divides the inner width of networks.

    Args:
        gate_up_GXD: X = 2H; the rows of all gates, then those of all ups.
        down_GDH: the second matrices.
        parts: how many parts are taken of each network.
        first: the first inner unit of the first part.
        width: I, the inner units of a part.

    Returns:
        [G parts, 2I, D] and [G parts, D, I], the parts of the first network before those of the second.
    """
    groups, twice, dim = gate_up_GXD.shape
    halves = gate_up_GXD.reshape(groups, 2, twice // 2, dim)[:, :, first : first + parts * width]
    halves = halves.reshape(groups, 2, parts, width, dim).transpose(1, 2)
    inner = down_GDH[:, :, first : first + parts * width].reshape(groups, dim, parts, width)
    gate_up = halves.reshape(groups * parts, 2 * width, dim)
    return gate_up, inner.transpose(1, 2).reshape(groups * parts, dim, width)


def copies_of_groups(stack: Tensor, group: int, copies: int) -> Tensor:
    """Repeats every group of `group` neighbours `copies` times, the copies beside each other."""
    if copies == 1:
        return stack
    grouped = stack.reshape(-1, 1, group, *stack.shape[1:])
    repeated = grouped.expand(-1, copies, *[-1] * (grouped.ndim - 2))
    return repeated.reshape(-1, *stack.shape[1:])


def with_noise(rows: Tensor, drawn: Tensor, noise: float, each: int) -> Tensor:
    """Adds `noise` times drawn rows to all rows but the first of every `each` neighbours."""
    added = noise * drawn.to(rows.dtype)
    added[::each] = 0
    return rows + added


def equal_rows(drawn: Tensor, each: int) -> Tensor:
    """Rows of which every `each` neighbours are equal to the first of them."""
    return drawn[::each].repeat_interleave(each, dim=0)


def longer(rows_VD: Tensor, drawn: Tensor, *, mean: bool) -> Tensor:
    """The rows of a longer vocabulary: the source's, then drawn ones or their mean."""
    whole = drawn.to(rows_VD.dtype).clone()
    known = len(rows_VD)
    whole[:known] = rows_VD
    if mean:
        whole[known:] = rows_VD.double().mean(dim=0).to(rows_VD.dtype)
    return whole
