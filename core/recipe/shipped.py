"""The recipes and sweeps that come with the package, by their names."""

from pathlib import Path

from core.contracts.errors import UserError, nearest

SWEEPS = "sweeps/"


def find_recipe(path: str | Path) -> Path:
    """Returns the file of a recipe that is given by its path or by its shipped name."""
    file = Path(path)
    if file.is_file():
        return file
    given = str(path)
    return shipped_file(given, f"{given or repr('')}: ")


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with the package, by name (`dsv3_small`, `baselines/dense`)."""
    return {name: file for name, file in _shipped_files().items() if not name.startswith(SWEEPS)}


def shipped_sweeps() -> dict[str, Path]:
    """Returns the sweep files that come with the package, by name (`routing`)."""
    sweeps: dict[str, Path] = {}
    for name, file in _shipped_files().items():
        if name.startswith(SWEEPS):
            sweeps[name.removeprefix(SWEEPS)] = file
    return sweeps


def _shipped_files() -> dict[str, Path]:
    """The files under `recipes/`, in a checkout or in the installed package, by path without the ending."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "recipes", package / "recipes"):
        if folder.is_dir():
            files = sorted(folder.rglob("*.yaml"))
            return {str(file.relative_to(folder).with_suffix("")): file for file in files}
    return {}


def shipped_file(path: str, prefix: str) -> Path:
    """The file of a shipped recipe; `prefix` begins the error message if there is none."""
    shipped = shipped_recipes()
    name = path.removesuffix(".yaml").removeprefix("recipes/")
    if name in shipped:
        return shipped[name]
    why = "no such recipe"
    if path and Path(path).is_dir():
        why = "a folder, not a recipe"
    raise UserError(f"{prefix}{why}; {nearest(name, shipped)}")


def is_shipped(file: Path) -> bool:
    """Whether a file is one of the recipes that come with the package."""
    return file.resolve() in {shipped.resolve() for shipped in _shipped_files().values()}
