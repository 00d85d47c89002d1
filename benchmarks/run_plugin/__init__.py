"""A plugin of the benchmarks' runs: a corpus of token ids in one file, and a clock for every step of every rank."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers both."""
    registry.corpus("token_file", "benchmarks.run_plugin.token_file:TokenFile")
    registry.callback("step_clock", "benchmarks.run_plugin.step_clock:StepClock")
