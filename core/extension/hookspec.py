"""The whole extension surface: one hook.

A plugin is a light module with

    from core.extension.hookspec import hookimpl

    CONTRACTS = "1.0"

    @hookimpl
    def register(registry):
        registry.router("my_router", "my_package.router:MyRouter")

The target is a dotted module and a class; it is imported only when a recipe names it. `CONTRACTS` is the version of
the contracts that the plugin was built for (`core.contracts.VERSION` at the time).
"""

import pluggy

GROUP = "moeloom.plugins"
"""The entry-point group that plugins are installed under, and pluggy's project name is its first half."""

hookspec = pluggy.HookspecMarker("moeloom")
hookimpl = pluggy.HookimplMarker("moeloom")


class Hooks:
    """Every hook that a plugin may implement."""

    @hookspec
    def register(self, registry: "object") -> None:
        """Offer components: `registry.<slot>(name, "module:Class")` for each. Import nothing heavy here.

        Args:
            registry: a `core.extension.registry.Registrar`.
        """
