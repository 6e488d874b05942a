"""Narrowing a trainer's pool before its loop starts, once a run, on the first rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.errors import CheckpointError, EffError, ManifestError
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.row_hash import row_hashes
from hf_eff.report.selection_report import write_selection_report
from hf_eff.scoring_rows import reference_rows, scoring_collator, scoring_rows
from hf_eff.selection import RowFormat, Selection, describe_dataset, describe_scorer, make_pool, run_selection
from hf_eff.stages.choice import choice_of
from hf_eff.stages.proxy import load_proxy

if TYPE_CHECKING:
    from hf_eff.options import ResolvedOptions
    from hf_eff.run import BudgetedRun

ROW_COLUMN = "hf_eff_row"
"""Number of a row in the dataset the user passed, carried through the trainer's preparation."""
STORE = "_selection_store"
"""Resumable intermediate results; transformers leaves names that start with ``_`` out of pushes."""


class SelectionStage:
    """The pool of one trainer, before and after selection.

    Attributes:
        selection: What was chosen, or None.
        unpacked_reference: Target rows by set name, where the trainer packs its evaluation sets.
        finish: Turns the subset into what is trained on (packing).
    """

    def __init__(self, resolved: ResolvedOptions) -> None:
        self._resolved = resolved
        self.selection: Selection | None = None
        self.unpacked_reference: dict[str, Any] = {}
        self.finish: Callable[[Any], Any] = lambda subset: subset
        self._raw: Dataset | None = None
        self._raw_hashes: Sequence[str] | None = None
        self._pool: Any = None
        self._subset: Any = None

    @property
    def needs_reference(self) -> bool:
        """Whether a method of the run scores the target."""
        return any(chosen.spec.traits.needs_reference_set for chosen in self._resolved.methods)

    @property
    def selects(self) -> bool:
        """Whether the pool will be narrowed."""
        return self._resolved.selects

    def keep_raw(self, dataset: Dataset) -> None:
        """Remember the rows as the user passed them: a selection names those."""
        self._raw = dataset

    def narrow(self, trainer: Any, run: BudgetedRun) -> None:
        """Choose rows, or read the choice of the run that is resumed; then train on those only.

        Raises:
            DataError: The pool or the target cannot be scored.
            ManifestError: The pool changed since the rows were chosen.
            BudgetExceededError: Scoring would pass a limit.
        """
        if not self.selects:
            return
        if trainer.train_dataset is not self._subset:
            self._pool = trainer.train_dataset
        pool = self._as_pool(trainer, self._pool)
        with run.ledger.clock("select"):
            outcome: Any = run.ranks.broadcast(self._attempt(trainer, run, pool))
        if isinstance(outcome, EffError):
            raise outcome
        selection, ledger = outcome
        if not run.ranks.is_first:
            run.ledger.load_state_dict(ledger)
        run.selection_digest = selection.digest
        self._apply(trainer, pool, selection)

    def _attempt(self, trainer: Any, run: BudgetedRun, pool: Pool) -> Any:
        """The selection and the ledger after it, or the error that every rank should raise.

        Ranks share the scoring; what is read and written is the first rank's.
        """
        try:
            saved = run.ranks.broadcast(self._reload(run)) if run.selection_digest is not None else None
            if isinstance(saved, EffError):
                return saved
            selection = saved or self._select(trainer, run, pool)
            if saved is None and run.ranks.is_first:
                selection.save(run.directory.selection)
                write_selection_report(selection, pool, run.directory.path, _tokenizer(trainer))
        except EffError as error:
            return error
        return selection, run.ledger.state_dict()

    def _reload(self, run: BudgetedRun) -> Selection | EffError | None:
        """The choice that the checkpoint was trained on, on the first rank."""
        if not run.ranks.is_first:
            return None
        try:
            selection = Selection.load(run.directory.selection)
        except EffError as error:
            return error
        if selection.digest != run.selection_digest:
            return CheckpointError(
                f"the selection in {str(run.directory.selection)!r} is not the one the checkpoint was trained on; "
                "put the original manifest back or start anew."
            )
        return selection

    def _select(self, trainer: Any, run: BudgetedRun, pool: Pool) -> Selection:
        choice = choice_of(run.plan.resolved, run.plan.step_flops * (run.plan.steps or 0))
        traits = [chosen.spec.traits for chosen in choice.stages]
        reference = self._reference(trainer) if any(trait.needs_reference_set for trait in traits) else None
        tokenizer = _tokenizer(trainer)
        context = SelectionContext(
            pool=pool,
            reference=reference,
            model=trainer.accelerator.unwrap_model(trainer.model) if any(t.needs_model for t in traits) else None,
            collate=scoring_collator(trainer),
            generator=torch.Generator().manual_seed(trainer.args.seed),
            seed=trainer.args.seed,
            device=trainer.args.device,
            store_dir=run.directory.path / run.ranks.folder(STORE),
            spend=_spender(run),
            forward_flops=lambda rows, length: forward_flops(run.model, BatchShape(rows, length)),
            progress=_progress(disable=trainer.args.disable_tqdm),
            learning_rate=trainer.args.learning_rate,
            is_causal_lm=run.model.is_causal_lm,
            tokenizer=tokenizer,
            processes=run.ranks,
            proxy=load_proxy(choice.options.proxy_model, tokenizer, trainer.args.device),
        )
        raw = self._raw_rows()
        return run_selection(
            choice,
            context,
            dataset_facts=describe_dataset(raw, replace(pool, row_hash=self._raw_hashes)),
            scorer=describe_scorer(context.model, trainer.processing_class, getattr(trainer.args, "max_length", None)),
        )

    def _as_pool(self, trainer: Any, prepared: Any) -> Pool:
        """The trainer's rows with the identity of the user's rows."""
        pool = make_pool(_without(prepared, ROW_COLUMN), row_format=self._whole(trainer))
        pool = replace(pool, rows=scoring_rows(trainer, prepared))
        self._raw_hashes = pool.row_hash
        if self._raw is None:
            return pool
        index = np.asarray(prepared[ROW_COLUMN][:], dtype=np.int64)
        hashes = self._raw_hashes = row_hashes(self._raw)
        sources = [str(name) for name in self._raw["source"]] if "source" in self._raw.column_names else None
        return replace(
            pool,
            index=index,
            row_hash=[hashes[position] for position in index],
            examples=self._raw.select(index),
            sources=None if sources is None else [sources[position] for position in index],
        )

    def _whole(self, trainer: Any) -> RowFormat:
        """Rows as the trainer left them: nothing more is cut."""
        return RowFormat(max_length=None, is_causal_lm=trainer.plan.facts.model.is_causal_lm)

    def _raw_rows(self) -> Any:
        return self._pool if self._raw is None else self._raw

    def _reference(self, trainer: Any) -> Pool:
        rows, groups = reference_rows(trainer, self.unpacked_reference)
        reference = make_pool(rows, row_format=self._whole(trainer))
        return replace(reference, rows=rows, groups=groups or reference.groups)

    def _apply(self, trainer: Any, pool: Pool, selection: Selection) -> None:
        """Put the chosen rows, in pool order, where the loop will find them."""
        wanted = set(selection.indices.tolist())
        positions = [place for place, index in enumerate(pool.index.tolist()) if index in wanted]
        if len(positions) != len(wanted):
            raise ManifestError(
                f"{len(wanted) - len(positions)} of the {len(wanted)} selected rows are not in the pool; it changed "
                "since they were chosen."
            )
        selection.verify(self._raw_rows())
        self.selection = selection
        subset = self._pool.select(positions) if isinstance(self._pool, Dataset) else _subset(self._pool, positions)
        self._subset = trainer.train_dataset = self.finish(_without(subset, ROW_COLUMN))


def _tokenizer(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _subset(rows: Any, positions: list[int]) -> Any:
    return torch.utils.data.Subset(rows, positions)


def _without(rows: Any, column: str) -> Any:
    if isinstance(rows, Dataset) and column in rows.column_names:
        return rows.remove_columns(column)
    return rows


def _spender(run: BudgetedRun) -> Callable[[float, float], None]:
    """Charge scoring before it happens, within every limit."""

    def spend(flops: float, tokens: float) -> None:
        run.ledger.require({"flops": flops, "tokens": tokens}, "selection")
        run.ledger.charge("select", flops=flops, tokens=tokens)

    return spend


def _progress(*, disable: bool) -> Callable[..., Iterable[Any]]:
    def progress(iterable: Iterable[Any], total: int | None = None, description: str = "") -> Iterable[Any]:
        return tqdm(iterable, total=total, desc=description, disable=disable)

    return progress
