"""What a plan gains: load of each GPU, balancedness, the time of a prefill step, and how long a plan stays good.

The model of time is one sentence: the experts of a layer take as long as those of its most loaded GPU. It holds where
products bound a step, as in prefill with full batches, and where GPUs wait for each other in every layer. It knows
nothing of the time of exchanges, nor of their overlap with other work.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from core.deployment.loads import RecordedLoads
from core.deployment.plan import PlacementPlan

LoadByLayer = Mapping[str, Sequence[float]]
"""The load of each expert, by the path of the layer's block."""

TIME_MODEL = (
    "the experts of a layer take the time of its most loaded GPU; copies share the load of their expert equally; "
    "experts_share of a balanced step is the time of routed experts, and everything else takes the same time; "
    "exchanges between GPUs are not in the model"
)


def balancedness(load_G: Sequence[float]) -> float:
    """Mean over maximum of the GPUs' loads: 1 if they are even, 1 / GPUs if one has all; 1 without any load."""
    largest = max(load_G)
    return sum(load_G) / len(load_G) / largest if largest else 1.0


def in_order(load_E: Sequence[float], gpus: int) -> list[float]:
    """The load of each GPU if experts are divided in the order of their numbers, without replicas."""
    load_G = [0.0] * gpus
    for expert, load in enumerate(load_E):
        load_G[expert * gpus // len(load_E)] += load
    return load_G


def by_plan(plan: PlacementPlan, loads: LoadByLayer) -> dict[str, list[float]]:
    """The load of each GPU in every layer under a plan."""
    found = {}
    for path, placement in plan.layers.items():
        found[path] = placement.load_of_gpus(loads[path], plan.gpus)
    return found


def all_in_order(loads: LoadByLayer, gpus: int) -> dict[str, list[float]]:
    """The load of each GPU in every layer without a plan."""
    return {path: in_order(load_E, gpus) for path, load_E in loads.items()}


def over_layers(gpus: Mapping[str, Sequence[float]]) -> float:
    """The balancedness of a step: the mean load over the maximum, each added up over layers.

    Layers follow each other, so their slowest GPUs add up.
    """
    mean = sum(sum(load_G) / len(load_G) for load_G in gpus.values())
    largest = sum(max(load_G) for load_G in gpus.values())
    return mean / largest if largest else 1.0


def step_gain(before: float, after: float, share: float) -> float:
    """How much faster a step is, 0.25 for 25%.

    Args:
        before: balancedness over layers without the plan.
        after: the same with it.
        share: part of a balanced step that is the time of routed experts.
    """
    return (1 - share + share / before) / (1 - share + share / after) - 1


@dataclass(frozen=True)
class AtLag:
    """Plans of one stretch, measured some stretches later.

    Args:
        lag: how many stretches later.
        pairs: how many pairs of stretches are that far apart.
        balancedness: the mean over the pairs.
        lowest: the lowest of the pairs.
        in_order: the mean without a plan, over the same later stretches.
    """

    lag: int
    pairs: int
    balancedness: float
    lowest: float
    in_order: float

    @property
    def gain(self) -> float:
        """What the plan adds to balancedness."""
        return self.balancedness - self.in_order


def by_lag(
    loads: RecordedLoads, stretches: int, plan_of: Callable[[LoadByLayer], PlacementPlan]
) -> list[AtLag]:
    """Plans on each stretch, and measures every plan on its own stretch and on all later ones.

    Args:
        loads: recorded loads.
        stretches: into how many stretches they are divided at most.
        plan_of: makes a plan from the load of one.
    """
    parts = [loads.between(*ends) for ends in loads.stretches(stretches)]
    plans = [plan_of(part) for part in parts]
    unplanned = [over_layers(all_in_order(part, plans[0].gpus)) for part in parts]
    found = []
    for lag in range(len(parts)):
        values = []
        for first, plan in enumerate(plans[: len(parts) - lag]):
            values.append(over_layers(by_plan(plan, parts[first + lag])))
        mean = sum(values) / len(values)
        before = sum(unplanned[lag:]) / len(values)
        found.append(AtLag(lag, len(values), mean, min(values), before))
    return found


def good_for(lags: Sequence[AtLag], least: float = 0.5) -> int | None:
    """The last lag up to which plans keep a share of what they gain on their own stretch.

    None if they gain nothing there, or if there is no later stretch.

    Args:
        lags: all lags, the first of them 0.
        least: the share.
    """
    if len(lags) < 2 or lags[0].gain <= 0:
        return None
    last = 0
    for one in lags[1:]:
        if one.gain < least * lags[0].gain:
            break
        last = one.lag
    return last
