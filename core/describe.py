"""python -m core.describe RECIPE|CONFIG [KEY=VALUE ...] [--compare ...]: describe a model without building it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.command import print_json, run_command, trust_argument
from core.contracts.errors import UserError

if TYPE_CHECKING:
    from core.analysis.options import DescribeOptions
    from core.cluster.cluster_file import Cluster
    from core.recipe.compose import Recipe


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.describe", description="What a recipe would build."
    )
    p.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a recipe file, the name of a shipped one, or a Hugging Face config.json",
    )
    p.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides, which hold for every recipe"
    )
    compare = "a table of these recipes, measured against the first of all"
    p.add_argument("--compare", nargs="+", default=[], metavar="RECIPE", help=compare)
    add = p.add_argument_group("one GPU's memory, and the exchange of tokens").add_argument
    add(
        "--layout",
        metavar="AXIS=N,...",
        help="data, expert and pipeline: data=128,expert=64,pipeline=16",
    )
    add(
        "--microbatch",
        type=int,
        metavar="N",
        help="sequences a GPU takes at once (default: 1 in a pipeline)",
    )
    add("--schedule", choices=("1f1b", "dualpipe"), help="schedule of the pipeline (default: 1f1b)")
    add(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="expert ranks that are one node (default: the strategy's, or 8)",
    )
    add = p.add_argument_group("GPU-hours").add_argument
    add(
        "--mfu",
        type=float,
        metavar="PART",
        help="utilisation of the peak, by Megatron-LM's count (default: DeepSeek-V3's 0.3894)",
    )
    add(
        "--gpu-peak",
        type=float,
        metavar="TFLOPS",
        help="a GPU's dense peak (default: an H800's 989 in bf16)",
    )
    add = p.add_argument_group("a cluster on paper").add_argument
    add(
        "--cluster",
        metavar="FILE",
        help="a cluster file, or the name of a shipped one: predicts a step of the recipe on its layout",
    )
    add("--draw", metavar="PAGE", help="write the plan of the step, ranks x time, as one HTML file")
    add("--search", action="store_true", help="print the ten fastest layouts on as many GPUs")
    add(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="what a GPU may need under --search (default: the device's memory)",
    )
    p.add_argument(
        "--json", action="store_true", help="print one JSON document; a list of them with --compare"
    )
    trust_argument(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    """Describes one model, or several side by side; the overrides hold for all."""
    files, overrides = recipes_and_overrides(arguments)
    options = _options(arguments)
    cluster = _cluster(arguments)
    recipes = [_read(path, overrides, trust=arguments.trust) for path in files]
    if cluster is not None:
        show_cluster(recipes[0], cluster, arguments)
    elif arguments.compare:
        show_comparison(recipes, as_json=arguments.json)
    else:
        show(recipes[0], as_json=arguments.json, options=options)


def _read(path: str, overrides: list[str], *, trust: bool) -> "Recipe":
    """Returns the recipe of a recipe file or of a Hugging Face configuration.

    Raises:
        UserError: it cannot be read, or gives no model that can be built here.
    """
    from core.interop.translation import is_configuration, recipe_of_config
    from core.recipe.compose import compose

    if is_configuration(path):
        return recipe_of_config(path, overrides)
    return compose(path, overrides, trust=trust)


def _options(arguments: argparse.Namespace) -> "DescribeOptions":
    """The options beyond the recipe.

    Raises:
        UserError: a value is not allowed, or an option cannot be combined with the other arguments.
    """
    from core.analysis.options import DescribeOptions
    from core.analysis.parallel_layout import parse

    of_layout = {
        "--layout": arguments.layout,
        "--microbatch": arguments.microbatch,
        "--schedule": arguments.schedule,
    }
    of_one = {
        "--gpus-per-node": arguments.gpus_per_node,
        "--mfu": arguments.mfu,
        "--gpu-peak": arguments.gpu_peak,
    }
    for option, value in (of_layout | of_one).items():
        if value is None:
            continue
        if arguments.compare:
            raise UserError(f"{option} describes one recipe: leave out --compare")
        if option in of_layout and arguments.layout is None:
            hint = "give --layout data=N,expert=N,pipeline=N"
            raise UserError(f"{option} needs a layout: {hint}")
    layout = None if arguments.layout is None else parse(arguments.layout)
    return DescribeOptions(
        layout=layout,
        sequences=arguments.microbatch,
        schedule=arguments.schedule or "1f1b",
        gpus_per_node=arguments.gpus_per_node,
        mfu=arguments.mfu,
        tflops=arguments.gpu_peak,
    )


def _cluster(arguments: argparse.Namespace) -> "Cluster | None":
    """The cluster that the arguments name, if any.

    Raises:
        UserError: the file has a mistake, or the options do not belong together.
    """
    if arguments.cluster is None:
        for option in ("draw", "search", "memory_limit"):
            if getattr(arguments, option) not in (None, False):
                raise UserError(
                    f"--{option.replace('_', '-')} needs a cluster: give --cluster FILE"
                )
        return None
    for option in ("compare", "layout", "mfu", "gpu_peak", "gpus_per_node"):
        if getattr(arguments, option):
            raise UserError(
                f"--{option.replace('_', '-')} does not go with --cluster, whose file says what is laid out"
            )
    if arguments.search and arguments.draw is not None:
        raise UserError("--draw draws one layout: leave out --search")
    limit = arguments.memory_limit
    if limit is not None and not arguments.search:
        raise UserError("--memory-limit limits a search: give --search")
    if limit is not None and not 0 < limit < float("inf"):
        raise UserError(f"--memory-limit: {limit:g} must be a number of gigabytes above 0")
    from core.cluster.cluster_file import read_cluster

    return read_cluster(arguments.cluster)


def show_cluster(recipe: "Recipe", cluster: "Cluster", arguments: argparse.Namespace) -> None:
    """Predicts a step on a cluster, or searches for layouts, and prints what was found."""
    from core.cluster import drawing, text
    from core.cluster.predict import predict
    from core.cluster.search import search
    from core.cluster.subject import subject_of

    subject = subject_of(recipe)
    if arguments.search:
        limit = None if arguments.memory_limit is None else arguments.memory_limit * 1e9
        found = search(subject, cluster, limit)
        if arguments.json:
            print_json(found)
        else:
            text.print_search(found)
        return
    prediction = predict(subject, cluster)
    if arguments.draw is not None:
        drawing.write(prediction, Path(arguments.draw))
    if arguments.json:
        print_json(prediction.document)
        return
    text.print_prediction(prediction.document)
    if arguments.draw is not None:
        print(f"plan: {arguments.draw}")


def recipes_and_overrides(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Separates recipes from overrides, which may be mixed with the recipes after --compare.

    Raises:
        UserError: no recipe is given.
    """
    if arguments.recipe and not arguments.compare:
        return [arguments.recipe], arguments.overrides
    files: list[str] = []
    overrides = list(arguments.overrides)
    first = [arguments.recipe] if arguments.recipe else []
    for text in [*first, *arguments.compare]:
        if _is_override(text):
            overrides.append(text)
        else:
            files.append(text)
    if not files:
        raise UserError("RECIPE is missing: give a recipe file, or the name of a shipped one")
    return files, overrides


def _is_override(text: str) -> bool:
    key, equals, _ = text.partition("=")
    return bool(equals) and "/" not in key and not Path(text).is_file()


def show_comparison(recipes: list["Recipe"], *, as_json: bool) -> None:
    """Prints several descriptions: one list of documents, or one table with its legend."""
    from core.analysis.compare_recipes import LEGEND, names, table, unequal
    from core.analysis.description_text import print_lines

    documents = [document_of(recipe) for recipe in recipes]
    if as_json:
        print_json(documents)
        return
    print("\n".join(table(recipes, documents)), end="\n\n")
    lines = [LEGEND, documents[0]["flops_convention"]]
    lines += [f"not equal: {line}" for line in unequal(recipes, documents)]
    owners_of: dict[str, list[str]] = {}
    for name, document in zip(names(recipes), documents, strict=True):
        for notice in document["notices"]:
            owners_of.setdefault(notice, []).append(name)
    lines += [f"note on {', '.join(owners)}: {notice}" for notice, owners in owners_of.items()]
    print_lines(lines)


def document_of(recipe: "Recipe", options: "DescribeOptions | None" = None) -> dict[str, Any]:
    """Returns the document that `--json` prints for a recipe."""
    from core.analysis import describe

    return describe.document_of(recipe, options)


def show(recipe: "Recipe", *, as_json: bool, options: "DescribeOptions | None" = None) -> None:
    """Prints one description."""
    document = document_of(recipe, options)
    if as_json:
        print_json(document)
        return
    from core.analysis.description_text import print_description

    print_description(document)


if __name__ == "__main__":
    run_command(main, parser())
