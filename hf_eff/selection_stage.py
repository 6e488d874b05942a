"""Narrowing a trainer's pool before its loop starts, once a run, on the first rank."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.row_phases import RowOrder, RowPhase, RowPhases
from hf_eff.engines.window_sampler import WindowSampler
from hf_eff.errors import CheckpointError, EffError, ManifestError
from hf_eff.files import write_json
from hf_eff.manifest.lineage import refresh_selection
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.ranking import rank
from hf_eff.numerics.row_hash import row_hashes
from hf_eff.reallocation import PHASES, check_digests
from hf_eff.report.selection_report import write_selection_report
from hf_eff.run_directory import SELECTION
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
        phases: Which rows are trained on when, or None in a run whose rows do not change.
        refresh_cost: FLOPs, tokens and seconds of the first choice: what another one is expected to take.
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
        self.phases: RowPhases | None = None
        self.refresh_cost: Mapping[str, float] = {"flops": 0.0, "tokens": 0.0}
        self._order: RowOrder | None = None
        self._candidates: Pool | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether a method of the run scores the target."""
        return any(chosen.spec.traits.needs_reference_set for chosen in self._resolved.methods)

    @property
    def selects(self) -> bool:
        """Whether the pool will be narrowed."""
        return self._resolved.selects

    @property
    def scored_rows(self) -> Any:
        """Rows of the pool as they are scored, in a run whose rows may change."""
        assert self._candidates is not None  # noqa: S101 - callers know the run
        valid = np.flatnonzero(self._candidates.loss_lengths > 0)
        return self._candidates.take(valid).rows

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
        chosen, ledger = outcome
        if not run.ranks.is_first:
            run.ledger.load_state_dict(ledger)
        run.selection_digest = chosen[0].digest
        if run.plan.window_steps is None:
            if run.ranks.is_first:
                (run.directory.path / PHASES).unlink(missing_ok=True)  # of an earlier run in this folder
            self._apply(trainer, pool, chosen[0])
        else:
            self._open_phases(trainer, run, pool, chosen)

    def _attempt(self, trainer: Any, run: BudgetedRun, pool: Pool) -> Any:
        """The selections of all data phases and the ledger after them, or the error that every rank should raise.

        Ranks share the scoring; what is read and written is the first rank's.
        """
        try:
            saved = run.ranks.broadcast(self._reload(run)) if run.selection_digest is not None else None
            if isinstance(saved, EffError):
                return saved
            chosen = saved or [self._select(trainer, run, pool)]
            if saved is None and run.ranks.is_first:
                chosen[0].save(run.directory.selection)
                write_selection_report(chosen[0], pool, run.directory.path, _tokenizer(trainer))
        except EffError as error:
            return error
        return chosen, run.ledger.state_dict()

    def _reload(self, run: BudgetedRun) -> list[Selection] | EffError | None:
        """The choices that the checkpoint was trained on, on the first rank."""
        if not run.ranks.is_first:
            return None
        record = run.saved_rows["phases"] if run.saved_rows is not None else {"phases": []}
        try:
            selection = Selection.load(run.directory.selection)
            later = [Selection.load(run.directory.path / entry["manifest"]) for entry in record["phases"][1:]]
            check_digests({"phases": record["phases"][1:]}, later)
        except EffError as error:
            return error
        if selection.digest != run.selection_digest:
            return CheckpointError(
                f"the selection in {str(run.directory.selection)!r} is not the one the checkpoint was trained on; "
                "put the original manifest back or start anew."
            )
        return [selection, *later]

    def _select(self, trainer: Any, run: BudgetedRun, pool: Pool, phase: int = 0) -> Selection:
        """Choose rows; a later phase draws anew and finds no results of an earlier one."""
        choice = choice_of(run.plan.resolved, run.plan.step_flops * (run.plan.steps or 0))
        traits = [chosen.spec.traits for chosen in choice.stages]
        reference = self._reference(trainer) if any(trait.needs_reference_set for trait in traits) else None
        tokenizer = _tokenizer(trainer)
        context = SelectionContext(
            pool=pool,
            reference=reference,
            model=trainer.accelerator.unwrap_model(trainer.model) if any(t.needs_model for t in traits) else None,
            collate=scoring_collator(trainer),
            generator=torch.Generator().manual_seed(trainer.args.seed + phase),
            seed=trainer.args.seed + phase,
            device=trainer.args.device,
            store_dir=_store(run, phase),
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
        positions = self._checked(pool, selection)
        self.selection, self.phases = selection, None
        subset = self._pool.select(positions) if isinstance(self._pool, Dataset) else _subset(self._pool, positions)
        self._subset = trainer.train_dataset = self.finish(_without(subset, ROW_COLUMN))

    def _checked(self, pool: Pool, selection: Selection) -> list[int]:
        """Positions in the pool of the chosen rows, in pool order, once they are known to be the same rows.

        Raises:
            ManifestError: The pool changed since they were chosen.
        """
        wanted = set(selection.indices.tolist())
        positions = [place for place, index in enumerate(pool.index.tolist()) if index in wanted]
        if len(positions) != len(wanted):
            raise ManifestError(
                f"{len(wanted) - len(positions)} of the {len(wanted)} selected rows are not in the pool; it changed "
                "since they were chosen."
            )
        selection.verify(self._raw_rows())
        return positions

    # Rows that change during the run

    def _open_phases(self, trainer: Any, run: BudgetedRun, pool: Pool, chosen: Sequence[Selection]) -> None:
        """Train on the whole pool, through a sampler that knows the rows in use."""
        for selection in chosen:
            self._checked(pool, selection)
        args, saved = trainer.args, run.saved_rows
        split = getattr(args.accelerator_config, "split_batches", False)
        rows = trainer._train_batch_size * args.gradient_accumulation_steps * (1 if split else args.world_size)  # noqa: SLF001
        seed = args.seed if args.data_seed is None else args.data_seed
        fresh = RowPhases(seed, rows, run.plan.window_steps or 1)
        if saved is None:
            first = chosen[0]
            fresh.begin(RowPhase(0, "selection", first.indices, first.digest, SELECTION))
            self._order = _best_first(first, pool)
        else:
            fresh = _same_windows(fresh, RowPhases.from_record(saved["phases"], [each.indices for each in chosen]))
            self._order = None if saved["order"] is None else RowOrder.from_state(saved["order"])
        cost = chosen[0].manifest["cost"]
        self.refresh_cost = {name: float(cost[name]) for name in ("flops", "tokens", "seconds")}
        self.phases, self.selection, self._candidates = fresh, chosen[-1], pool
        self._subset = trainer.train_dataset = self.finish(_without(self._pool, ROW_COLUMN))
        self._write_phases(run)

    def sampler(self, step: Callable[[], int]) -> WindowSampler:
        """The order of the rows of a run whose rows may change.

        Args:
            step: Optimizer steps done.
        """
        assert self.phases is not None  # noqa: S101 - callers hold it
        assert self._candidates is not None  # noqa: S101 - made together
        index = self._candidates.index
        places = np.full(int(index.max()) + 1, -1, dtype=np.int64)
        places[index] = np.arange(len(index))
        return WindowSampler(self.phases, places, step)

    @contextmanager
    def counted_steps(self, trainer: Any) -> Iterator[None]:
        """Let the loop end after the plan's steps where its epochs are windows."""
        before = trainer.args.max_steps
        if self.phases is not None:
            trainer.args.max_steps = trainer.plan.steps
        try:
            yield
        finally:
            trainer.args.max_steps = before

    def why_not(self, action: str) -> str:
        """Why a change of rows has nothing to do, else empty."""
        if action == "refresh":
            return ""
        if self._order is None:
            return "the selection keeps no score of every row"
        stretch = self._order.band if action == "next_band" else self._order.wider
        return "" if stretch is not None else "too few rows are left"

    def change(self, trainer: Any, run: BudgetedRun, action: str, step: int) -> EffError | None:
        """Begin a data phase on every rank.

        Returns:
            The error that kept the rows as they are, or None.
        """
        assert self.phases is not None  # noqa: S101 - callers hold it
        selection = self._rescored(trainer, run) if action == "refresh" else self._moved(action)
        if isinstance(selection, EffError):
            return selection
        new = refresh_selection(self._current, selection, step)
        folder = f"{SELECTION}/phase-{self.phases.number + 1}"
        if run.ranks.is_first:
            new.save(run.directory.path / folder)
        self.phases.begin(RowPhase(step, action, new.indices, new.digest, folder))
        self.selection = new
        self._write_phases(run)
        return None

    @property
    def _current(self) -> Selection:
        assert self.selection is not None  # noqa: S101 - a phase has one
        return self.selection

    def _rescored(self, trainer: Any, run: BudgetedRun) -> Selection | EffError:
        """The choice that the method makes with the present model."""
        assert self.phases is not None  # noqa: S101 - callers hold it
        assert self._candidates is not None  # noqa: S101 - made together
        number, model = self.phases.number + 1, trainer.accelerator.unwrap_model(trainer.model)
        shutil.rmtree(_store(run, number), ignore_errors=True)
        with run.ledger.clock("select"), _all_trainable(model, run.trained_names):
            outcome: Any = self._chosen_again(trainer, run, number)
            outcome = run.ranks.broadcast((outcome, run.ledger.state_dict()))
        shutil.rmtree(_store(run, number), ignore_errors=True)
        selection, ledger = outcome
        if not run.ranks.is_first:
            run.ledger.load_state_dict(ledger)
        if not isinstance(selection, EffError):
            self._order = _best_first(selection, self._candidates)
        return selection

    def _chosen_again(self, trainer: Any, run: BudgetedRun, phase: int) -> Selection | EffError:
        assert self._candidates is not None  # noqa: S101 - callers hold it
        try:
            return self._select(trainer, run, self._candidates, phase)
        except EffError as error:
            return error

    def _moved(self, action: str) -> Selection:
        """The next band, or a wider one, of the rows by the scores that are there."""
        order, pool, old = self._order, self._candidates, self._current
        assert order is not None  # noqa: S101 - offered only with one
        assert pool is not None  # noqa: S101 - made together
        order.start, order.stop = (order.band if action == "next_band" else order.wider) or (order.start, order.stop)
        rows = order.rows[order.start : order.stop]
        places = np.searchsorted(pool.index, rows, sorter=np.argsort(pool.index, kind="stable"))
        places = np.argsort(pool.index, kind="stable")[places]
        manifest = copy.deepcopy(dict(old.manifest))
        manifest["selection"] |= {
            "num_selected": len(rows),
            "num_tokens": int(pool.lengths[places].sum()),
            "notes": {**manifest["selection"]["notes"], "rows_by_score": [order.start, order.stop]},
        }
        manifest["cost"] |= {"flops": 0.0, "tokens": 0.0, "seconds": 0.0}
        manifest["provenance"] |= {"parents": []}
        return replace(
            old,
            indices=rows,
            manifest=manifest,
            scores=order.scores[order.start : order.stop],
            row_hashes=None if pool.row_hash is None else [pool.row_hash[place] for place in places.tolist()],
            weights=None,
            reasons=(),
            row_ids=None,
            all_scores=None,
        )

    def _write_phases(self, run: BudgetedRun) -> None:
        if run.ranks.is_first and self.phases is not None:
            write_json(run.directory.path / PHASES, self.phases.record())

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run needs to go on with its rows; None where they do not change."""
        if self.phases is None:
            return None
        return {"phases": self.phases.record(), "order": None if self._order is None else self._order.state_dict()}


def _store(run: BudgetedRun, phase: int) -> Any:
    """Folder of the intermediate results of a choice."""
    return run.directory.path / run.ranks.folder(STORE if phase == 0 else f"{STORE}-{phase}")


def _best_first(selection: Selection, pool: Pool) -> RowOrder | None:
    """The chosen rows, then all others by score; None where the method does not score every row."""
    scores = selection.all_scores
    if scores is None:
        return None
    values = np.where(pool.loss_lengths > 0, np.asarray(scores, dtype=np.float64), np.nan)
    descending = bool(selection.manifest["scores"]["higher_is_better"])
    ranked = rank(values, descending=descending, ties=pool.row_hash)
    rows, ordered = np.asarray(pool.index)[ranked], values[ranked]
    rest = ~np.isin(rows, selection.indices)
    chosen = selection.scores if selection.scores is not None else np.full(len(selection), np.nan)
    return RowOrder(
        np.concatenate([selection.indices, rows[rest]]).astype(np.int64),
        np.concatenate([chosen, ordered[rest]]).astype(np.float32),
        0,
        len(selection),
    )


def _same_windows(planned: RowPhases, saved: RowPhases) -> RowPhases:
    """The saved phases, whose steps are as long as those of this run.

    Raises:
        CheckpointError: They are not.
    """
    for name in ("seed", "rows_per_step", "window_steps"):
        if getattr(planned, name) != getattr(saved, name):
            raise CheckpointError(
                f"the checkpoint's rows were ordered with {name}={getattr(saved, name)} and this run has "
                f"{getattr(planned, name)}; resume with the same seed, batch size, accumulation, processes and steps."
            )
    return saved


@contextmanager
def _all_trainable(model: Any, names: Iterable[str]) -> Iterator[None]:
    """What a run trains, all of it, although a method may let blocks rest in turn."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = frozenset(names)
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


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
        run.ledger.require(run.with_reserve({"flops": flops, "tokens": tokens}), "selection")
        run.ledger.charge("select", flops=flops, tokens=tokens)

    return spend


def _progress(*, disable: bool) -> Callable[..., Iterable[Any]]:
    def progress(iterable: Iterable[Any], total: int | None = None, description: str = "") -> Iterable[Any]:
        return tqdm(iterable, total=total, desc=description, disable=disable)

    return progress
