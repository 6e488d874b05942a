"""What a trainer does about the Hub: name the repository, send checkpoints in the background, send the run.

A Hub that cannot be reached never ends a run and never costs it a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_eff import hub
from hf_eff.engines.log_checkpoint import REPLAY_LOG
from hf_eff.errors import EffError, EffWarning
from hf_eff.hub import HubError
from hf_eff.publish import Pushed, PushRecord, later, push_folder_of_run
from hf_eff.publish.bundle import require_no_token
from hf_eff.publish.evaluation import evaluation_of, write_eval_results
from hf_eff.recipe import Recipe
from hf_eff.run_directory import GOVERNOR_LOG, PLAN, RunDirectory

logger = logging.getLogger(__name__)
_STAGING = "_push"
_RECIPE = "run"
_WEIGHTS_AND_NAMES = (".safetensors", ".json", ".jsonl", ".txt", ".model", ".jinja")
_OF_THE_RUN = (PLAN, GOVERNOR_LOG, REPLAY_LOG)
_OWN_STATE = ("trainer_state.json", "hf_eff_state.json", "hf_eff_state.safetensors")
_NEVER = ("training_args.bin",)


def find_repository(trainer: Any, token: str | None = None, private: bool | None = None) -> None:
    """Create the repository of a run. Where that cannot be done now, say so and go on: the push comes later."""
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    trainer.push_in_progress = None
    trainer.hub_model_id = args.hub_model_id or Path(args.output_dir).absolute().name
    record = _record(trainer, private=private)
    try:
        trainer.hub_model_id = hub.create(
            trainer.hub_model_id, "model", token or args.hub_token, private=record.private
        )
    except HubError as error:
        folder = Path(args.output_dir)
        record = replace(record, problem=str(error))
        text = f"The run will not be on the Hub by itself ({error}). {later(folder, record)}"
        warnings.warn(text, EffWarning, stacklevel=2)
    replace(record, repo_id=trainer.hub_model_id).write(Path(args.output_dir))


def push_run(
    trainer: Any,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card: Any,
) -> Pushed | Future[Pushed] | None:
    """Save the model, complete the run's folder and send it.

    Args:
        trainer: A trainer that carries ``BudgetedTrainerMixin``.
        commit_message: Title of the commit.
        blocking: Whether to wait until the Hub holds everything.
        token: Access token; None for ``hub_token`` or the one that is logged in.
        revision: Branch to commit to.
        private: Visibility of a repository that is created; None for ``hub_private_repo``, and private without.
        card: ``selection_repo`` (dataset repository to which the selection is sent, too), ``collection`` (title of a
            collection that links them), and what ``create_model_card`` takes.

    Returns:
        What arrived; its future with ``blocking=False``; None on other ranks, and offline.

    Raises:
        HubError: The push failed. The run's folder is whole, and ``hf-eff push`` sends it later.
    """
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    places = {name: card.pop(name) for name in ("selection_repo", "collection") if name in card}
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    folder, token = Path(trainer.args.output_dir), token or trainer.args.hub_token
    record = _record(trainer, private=private, message=commit_message or "End of training", **places)
    record = replace(record, branch=revision or trainer.args.hub_revision)
    _complete(trainer, folder, card)
    trainer._finish_current_push()  # noqa: SLF001 - the parent waits here, too
    if hub.is_offline():
        record.write(folder)
        logger.warning("HF_HUB_OFFLINE is set. %s", later(folder, record))
        return None
    if blocking:
        return _push_now(trainer, folder, record, token)
    return _in_background(trainer, lambda: _push_now(trainer, folder, record, token))


def _push_now(trainer: Any, folder: Path, record: PushRecord, token: str | None) -> Pushed:
    pushed = push_folder_of_run(folder, record, token)
    trainer.hub_model_id = pushed.repo_id
    return pushed


def _record(trainer: Any, *, private: bool | None, **more: Any) -> PushRecord:
    chosen = private if private is not None else trainer.args.hub_private_repo
    name = trainer.hub_model_id or trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name
    return PushRecord(repo_id=name, private=True if chosen is None else chosen, **more)


def _complete(trainer: Any, folder: Path, card: dict[str, Any]) -> None:
    """Write everything that describes the run: evaluation, recipe, card."""
    evaluation = evaluation_of(trainer.state.log_history, trainer.data_origins)
    write_eval_results(folder, evaluation)
    if trainer.report is not None:
        trainer.report["evaluation"] = evaluation
        RunDirectory(folder).update_report(trainer.report)
    _write_recipe(trainer, folder)
    if "model_name" not in card:
        card["model_name"] = str(trainer.hub_model_id or trainer.args.hub_model_id or folder.absolute().name)
        card["model_name"] = card["model_name"].rpartition("/")[2]
    tags = getattr(trainer.model, "model_tags", None) or []
    given = card.get("tags") or []
    card["tags"] = list(dict.fromkeys([*([given] if isinstance(given, str) else given), *tags])) or None
    try:
        # The parents look the base model up; without an answer the run's own card stands alone.
        with hub.translated("writing the card", trainer.args.hub_token):
            trainer.create_model_card(**card)
    except HubError as error:
        logger.warning("The card lacks what the trainer adds to it: %s", error)


def _write_recipe(trainer: Any, folder: Path) -> None:
    """The run as a recipe, so that ``hf-eff train --recipe <this repository>`` does it again."""
    origin = trainer.data_origins.get("train") or {}
    base = getattr(getattr(trainer.model, "config", None), "_name_or_path", None)
    run = {
        "task": trainer.trainer_kind,
        "model": base,
        "dataset": origin.get("repo_id"),
        "dataset_config": origin.get("config"),
        "split": origin.get("split"),
    }
    try:
        Recipe.of_arguments(_RECIPE, trainer.args, run=run, summary="The settings of this run.").save(folder)
    except EffError as error:
        logger.info("No recipe is written: %s", error)


def push_checkpoint(trainer: Any, checkpoint: str) -> None:
    """Send the state of a run under way in one commit, in the background, and read it back.

    The files are linked aside first, so that neither the next step nor the rotation of checkpoints touches them. A
    failure is logged and the run goes on; the next push sends everything anew.
    """
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == "end":
        return
    running = getattr(trainer, "push_in_progress", None)
    if not args.hub_always_push and running is not None and not running.is_done():
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    staged = Path(args.output_dir) / _STAGING / Path(checkpoint).name
    files = _staged(Path(checkpoint), Path(args.output_dir), staged, str(getattr(args.hub_strategy, "value", "")))
    record = _record(trainer, private=None, message=f"Training in progress, step {trainer.state.global_step}")
    _in_background(trainer, lambda: _send_checkpoint(staged, files, record, args))


def _send_checkpoint(staged: Path, files: dict[str, Path], record: PushRecord, args: Any) -> str | None:
    try:
        require_no_token(files)
        repo_id = hub.create(str(record.repo_id), "model", args.hub_token, private=record.private)
        options = {"private": record.private, "branch": args.hub_revision}
        return hub.push_files(files, repo_id, "model", record.message, args.hub_token, **options)
    except HubError as error:
        logger.warning("A checkpoint is not on the Hub, and training goes on: %s", error)
        return None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(OSError):
            staged.parent.rmdir()


def _staged(checkpoint: Path, folder: Path, staged: Path, strategy: str) -> dict[str, Path]:
    """Links to a checkpoint's files by their path in the repository: the model at the top, as users load it."""
    shutil.rmtree(staged, ignore_errors=True)
    top = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and path.suffix in _WEIGHTS_AND_NAMES]
    wanted = {path.name: path for path in top if path.name not in _OWN_STATE}
    if strategy in ("checkpoint", "all_checkpoints"):
        inside = "last-checkpoint" if strategy == "checkpoint" else checkpoint.name
        every = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in _NEVER]
        wanted |= {f"{inside}/{path.relative_to(checkpoint).as_posix()}": path for path in every}
    for name, path in wanted.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        _link(path, staged / name)
    for name in _OF_THE_RUN:  # these grow, so that a link would change under the upload
        if name not in wanted and (folder / name).is_file():
            shutil.copyfile(folder / name, staged / name)
            wanted[name] = folder / name
    return {name: staged / name for name in wanted}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


class _Jobs:
    """Pushes under way, with the questions that transformers asks of them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hf_eff-push")
        self._futures: list[Future[Any]] = []

    def add(self, job: Any) -> Future[Any]:
        self._futures.append(self._pool.submit(job))
        return self._futures[-1]

    def is_done(self) -> bool:
        return all(future.done() for future in self._futures)

    def wait_until_done(self) -> None:
        wait(self._futures)

    def cancel(self) -> None:
        for future in self._futures:
            future.cancel()


def _in_background(trainer: Any, job: Any) -> Future[Any]:
    """One push at a time: the next waits for the one before, so that no two commits compete."""
    if not isinstance(getattr(trainer, "push_in_progress", None), _Jobs):
        trainer.push_in_progress = _Jobs()
    return trainer.push_in_progress.add(job)


@contextlib.contextmanager
def without_token(args: Any) -> Iterator[None]:
    """Take the access token out of the arguments while they are written to disk as they are."""
    token, args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        args.hub_token = token
