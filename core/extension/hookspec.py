"""The whole extension surface: one hook, and the registrar that it receives.

A plugin is a light module with

    from core.extension.hookspec import hookimpl

    CONTRACTS = "2.0"

    @hookimpl
    def register(registry):
        registry.router("my_router", "my_package.router:MyRouter")

The target is a dotted module and a class; it is imported only when a recipe names it. `CONTRACTS` is the version of
the contracts that the plugin was built for (`core.contracts.VERSION` at the time).
"""

import pluggy

GROUP = "moeloom.plugins"
"""The entry-point group that plugins are installed under; its first half is pluggy's project name."""

hookspec = pluggy.HookspecMarker("moeloom")
hookimpl = pluggy.HookimplMarker("moeloom")


class Registrar:
    """The argument of a plugin's `register(registry)`: it has one method for each slot.

    `registry.router("name", "module:Class")` offers the class at that target as a router of that name; the target is
    imported only when a recipe uses the name.
    """

    def add(self, slot: str, name: str, target: str) -> None:
        """Offers the class at `target` ("module:Class") as `name` in `slot`; the methods of the slots call it.

        Raises:
            PluginError: the slot does not exist, the name or target has another form, or the plugin has already offered
                the name.
        """
        raise NotImplementedError

    def attention(self, name: str, target: str) -> None:
        """Offers an attention, a subclass of `core.contracts.attention.Attention`."""
        self.add("attention", name, target)

    def ffn(self, name: str, target: str) -> None:
        """Offers a feed-forward layer, a subclass of `core.contracts.ffn.FeedForward`."""
        self.add("ffn", name, target)

    def residual(self, name: str, target: str) -> None:
        """Offers a residual stream, a subclass of `core.contracts.residual.Residual`."""
        self.add("residual", name, target)

    def router(self, name: str, target: str) -> None:
        """Offers a router, a subclass of `core.contracts.router.Router`."""
        self.add("router", name, target)

    def balancer(self, name: str, target: str) -> None:
        """Offers a balancer, a subclass of `core.contracts.balancer.Balancer`."""
        self.add("balancer", name, target)

    def loss_head(self, name: str, target: str) -> None:
        """Offers a loss head, a subclass of `core.contracts.loss_head.LossHead`."""
        self.add("loss_head", name, target)

    def precision(self, name: str, target: str) -> None:
        """Offers a precision, a subclass of `core.contracts.precision.Precision`."""
        self.add("precision", name, target)

    def dispatcher(self, name: str, target: str) -> None:
        """Offers a dispatcher, a subclass of `core.contracts.dispatcher.Dispatcher`."""
        self.add("dispatcher", name, target)

    def checkpoint_format(self, name: str, target: str) -> None:
        """Offers a checkpoint format, a subclass of `core.contracts.checkpoint_format.CheckpointFormat`."""
        self.add("checkpoint_format", name, target)

    def optimizer(self, name: str, target: str) -> None:
        """Offers an optimizer, a subclass of `core.contracts.training.OptimizerFactory`."""
        self.add("optimizer", name, target)

    def corpus(self, name: str, target: str) -> None:
        """Offers a corpus, a subclass of `core.contracts.corpus.Corpus`."""
        self.add("corpus", name, target)

    def strategy(self, name: str, target: str) -> None:
        """Offers a strategy, a subclass of `core.contracts.strategy.StrategyFactory`."""
        self.add("strategy", name, target)

    def callback(self, name: str, target: str) -> None:
        """Offers a callback, a subclass of `core.contracts.training.CallbackFactory`."""
        self.add("callback", name, target)

    def logger(self, name: str, target: str) -> None:
        """Offers a logger, a subclass of `core.contracts.training.LoggerFactory`."""
        self.add("logger", name, target)


class Hooks:
    """The hooks that a plugin may implement."""

    @hookspec
    def register(self, registry: Registrar) -> None:
        """Offers components: one call `registry.<slot>(name, "module:Class")` for each. Import nothing heavy here.

        Args:
            registry: collects the offers of this plugin.
        """
