"""``hf-eff recipes``: list, show, pull and push recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.errors import OptionError
from hf_eff.recipe import FOLDER, Recipe, list_recipes
from hf_eff.recipe.text import dump_yaml
from hf_eff.report.markdown import table


def run(argv: Sequence[str]) -> int:
    """Do one of the four."""
    options = _parser().parse_args(list(argv))
    if options.action == "list":
        _list(options)
    elif options.action == "show":
        recipe = Recipe.from_pretrained(options.source)
        print(json.dumps(recipe.to_dict(), indent=2) if options.json else dump_yaml(recipe.to_dict()).rstrip("\n"))
        recipe.resolve()
    elif options.action == "pull":
        print(_pull(options.source, options.to))
    else:
        _push(options)
    return 0


def _parser() -> SentenceErrors:
    parser = SentenceErrors(prog="hf-eff recipes", description=COMMANDS["recipes"], allow_abbrev=False)
    actions: Any = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    named = "file, folder, or user/repo[/name][@revision]"
    listing = actions.add_parser("list", help="recipes of a repository or a folder")
    listing.add_argument("source", help="folder, or user/repo[@revision]")
    listing.add_argument("--json", action="store_true", help="print JSON")
    show = actions.add_parser("show", help="print one recipe, after checking it")
    show.add_argument("source", help=named)
    show.add_argument("--json", action="store_true", help="print JSON")
    pull = actions.add_parser("pull", help="copy one recipe here")
    pull.add_argument("source", help=named)
    pull.add_argument("--to", type=Path, default=Path(), help="folder or .yaml file; default: this folder")
    push = actions.add_parser("push", help="publish recipe files")
    push.add_argument("source", type=Path, help="recipe file, or folder with 'recipes/', such as one of a run")
    push.add_argument("repo_id", help="model repository; created, private, when needed")
    push.add_argument("--public", action="store_true", help="make a repository that is created public")
    for each in (parser, *actions.choices.values()):
        each.allow_abbrev = False
    return parser


def _list(options: Any) -> None:
    recipes = list_recipes(options.source)
    if options.json:
        print(json.dumps([recipe.to_dict() for recipe in recipes], indent=2))
        return
    if not recipes:
        raise OptionError(f"{options.source!r} holds no recipe: no {FOLDER}/<name>.yaml.")
    rows = [(each.name, each.version, each.run.get("model", "any model"), each.summary) for each in recipes]
    print(table(["Recipe", "Version", "Model", "For"], rows))


def _pull(source: str, to: Path) -> Path:
    """Write a recipe as a file that was not there before.

    Raises:
        OptionError: There is such a file already.
    """
    recipe = Recipe.from_pretrained(source)
    target = to if to.suffix in (".yaml", ".yml") else to / f"{recipe.name}.yaml"
    if target.exists():
        raise OptionError(f"{str(target)!r} is there already; remove it or name another file with --to.")
    return recipe.save(target)


def _push(options: Any) -> None:
    folder = options.source.is_dir()
    recipes = list_recipes(options.source) if folder else [Recipe.from_file(options.source)]
    if not recipes:
        raise OptionError(f"{str(options.source)!r} holds no recipe.")
    for recipe in recipes:
        commit = recipe.push_to_hub(options.repo_id, private=not options.public)
        print(f"{recipe.name} {recipe.version} is in {options.repo_id} (commit {commit[:12]}).")
