"""`--config FILE` and `--config recipe:NAME`: the file with a run's options."""

from pathlib import Path

from topd.errors import TOPDError

PREFIX = "recipe:"
FOLDER = Path(__file__).parents[1] / "recipes"


def recipes() -> dict[str, Path]:
    """The package's recipes by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def config_file(name: str) -> Path:
    """The file that `--config` names. For `recipe:` alone, prints the recipes and exits.

    Raises `TOPDError` if there is no such file or recipe.
    """
    known, file = recipes(), Path(name)
    if name == PREFIX:
        print("Recipes of the package:")
        for recipe, path in known.items():
            comment = path.read_text(encoding="utf-8").partition("\n")[0].strip("# ")
            print(f"  {PREFIX}{recipe:{max(map(len, known))}}  {comment}")
        print(f"The files are in {FOLDER}.")
        raise SystemExit(0)
    if name.startswith(PREFIX):
        recipe = name.removeprefix(PREFIX)
        if recipe not in known:
            raise TOPDError(f"--config {name:.80}: no such recipe. Available: {', '.join(known)}.")
        return known[recipe]
    if not file.is_file():
        hint = f" Did you mean --config {PREFIX}{file.stem}?" if file.stem in known else ""
        raise TOPDError(f"--config {name:.200}: no such file.{hint} --config {PREFIX} lists the recipes.")
    return file
