"""The assumptions of a prediction, as sentences that are printed with it."""

from core.cluster.cluster_file import Cluster, Efficiencies


def assumptions(cluster: Cluster) -> list[str]:
    """Everything that a prediction takes for granted, for the layout that it is about."""
    layout, strategy = cluster.layout, cluster.layout.strategy
    lines = [
        "efficiencies are one set for every cluster: measured on one H100 (records/gpu), those of links published "
        "(DeepEP); docs/cluster.md derives each",
        "every expert has the mean load"
        if layout.imbalance == 1
        else f"the fullest expert rank has {layout.imbalance:g} times the mean load and decides",
        f"products are computed in {layout.precision}; heads and attention in bf16, routers in fp32; activations "
        "have the recipe's formats",
        f"recompute {layout.recompute}; a third of the passes over memory are the forward's; gradients of weights are "
        "products alone",
        "passes over memory are as many as moeloom's compiled kernels make; more fused ones make fewer",
        "stages hold blocks in order, as evenly as possible; the output and the heads are in the last one",
        "states and gradients between stages are bf16, and arrive after their time on the link between nodes (inside "
        "one if all GPUs are in a node)",
    ]
    if strategy.inner.expert_ranks > 1:
        formats = "FP8 out and bf16 back" if layout.precision == "fp8" else "bf16 out and back"
        lines.append(
            f"tokens travel as {formats}, once to each node, for uniform choice; links inside and between nodes work "
            "at the same time"
        )
    if layout.overlap:
        lines.append(
            f"in an overlapped forward and backward the exchange runs beside both and takes "
            f"{layout.communication_multiprocessors} of {cluster.device.multiprocessors} multiprocessors from products "
            "and attention; sums of gradients run beside the last backward"
        )
    else:
        lines.append("nothing is sent while something is computed")
    if strategy.tensor > 1:
        lines.append(
            f"{strategy.tensor} tensor ranks share a micro-batch's tokens and gather and sum them twice in each block; "
            "their memory is counted with whole weights, an upper bound"
        )
    if strategy.inner.name in ("fsdp", "expert_parallel"):
        lines.append(
            "weights are gathered for every forward and backward; memory is counted without gathered ones"
        )
    if cluster.efficiencies != Efficiencies():
        lines.append(f"the efficiencies of {cluster.source} are not the measured ones")
    return lines
