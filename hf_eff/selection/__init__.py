"""Which rows to train on: the driver that runs one method over a pool and records what it chose.

The methods are the files of this folder; they are found by name through the registry.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from hf_eff import hub, manifest
from hf_eff.contracts.budget import Budget
from hf_eff.contracts.selection import SelectionContext
from hf_eff.contracts.spec import MethodSpec
from hf_eff.engines.facts import model_facts
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.pooling import PadRows, RowFormat, make_pool
from hf_eff.engines.ranks import Ranks
from hf_eff.engines.spool import spooled
from hf_eff.errors import DataError, NoEffectWarning, OptionError, PlanError
from hf_eff.hardware.ledger import Ledger
from hf_eff.manifest import MANIFEST, Level, OnMismatch, read_manifest
from hf_eff.manifest.card import FOLDER, dataset_card
from hf_eff.manifest.provenance import check_picks, describe_dataset, describe_scorer, selection_fields
from hf_eff.registry import require, resolve
from hf_eff.report.selection_report import write_selection_report
from hf_eff.stages import published
from hf_eff.stages.choice import PoolChoice, choose_pool
from hf_eff.stages.proxy import load_proxy, scorer_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "PadRows",
    "RowFormat",
    "Selection",
    "choose_pool",
    "describe_dataset",
    "describe_scorer",
    "load_selected",
    "make_pool",
    "run_selection",
    "select_dataset",
]

_ATTEMPTS = 5
"""Pushes that are tried while somebody else keeps pushing to the same repository."""
_DRIVER_OPTIONS = (
    "batch_tokens",
    "max_length",
    "columns",
    "id_column",
    "learning_rate",
    "train_epochs",
)


class Selection(manifest.Selection):
    """Chosen rows of one dataset, with a home on the Hub. See ``hf_eff.manifest.Selection``."""

    def push_to_hub(
        self, repo_id: str, name: str | None = None, *, private: bool = True, token: str | None = None
    ) -> str:
        """Publish indices, hashes, scores and provenance in one commit; never the rows.

        Other selections in the repository stay, also those that somebody else pushes meanwhile. Afterwards plain
        ``datasets`` reads it: ``load_dataset(repo_id, name, split="train")``.

        Args:
            repo_id: Dataset repository, such as ``"user/pool-less-5pct"``; created when needed.
            name: Name of this selection in it; the manifest's own name without.
            private: Visibility of a repository that is created.
            token: Access token; None for the one that is logged in.

        Returns:
            The commit's hash.

        Raises:
            HubError: The Hub cannot be reached or refuses, or holds something else afterwards.
        """
        name = published.plain_name(name or self.manifest["selection"]["name"])
        repo_id = hub.create(repo_id, "dataset", token, private=private)
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(hub.HubConflictError):
                return self._push(repo_id, name, token)
        return self._push(repo_id, name, token)

    def _push(self, repo_id: str, name: str, token: str | None) -> str:
        """Add this selection to what the repository holds now; refused if that changes meanwhile."""
        with tempfile.TemporaryDirectory() as folder:
            held, sent = Path(folder) / "held", Path(folder) / "sent"
            parent = hub.head(repo_id, "dataset", token=token)
            manifests = _published(repo_id, held, parent, token)
            manifests[name] = read_manifest(self.save(sent / FOLDER / name) / MANIFEST)
            (sent / "README.md").write_text(dataset_card(manifests, repo_id), encoding="utf-8")
            return hub.push_folder(sent, repo_id, "dataset", f"Add selection {name}", token, parent=parent)

    @classmethod
    def from_pretrained(
        cls, repo_id: str | Path, name: str | None = None, *, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Read a selection from the Hub, or from a local folder.

        Args:
            repo_id: Dataset repository, an address (``"hub:user/repo/name@revision"``), or a folder: one that ``save``
                wrote, that of a run, or a copy of a repository.
            name: Which selection of the repository; may be left out when it holds one.
            revision: Branch, tag or commit.
            token: Access token; None for the one that is logged in.

        Raises:
            ManifestError: There is no such selection, or it is not intact.
            HubError: The Hub cannot be reached or refuses.
        """
        address = published.Address(str(repo_id))
        if str(repo_id).startswith(published.SCHEME):
            address = published.Address.parse(str(repo_id))
        address = replace(address, name=name or address.name, revision=revision or address.revision)
        return published.read_published(cls, address, token)


def select_dataset(
    pool: Any,
    method: str = "less",
    *,
    target: Any = None,
    model: Any = None,
    processing_class: Any = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    budget: str | Budget | None = None,
    **options: Any,
) -> Selection:
    """Choose the rows of ``pool`` worth training on.

    Args:
        pool: Candidates: ``datasets.Dataset``, ``IterableDataset`` (written to disk first) or a sequence of
            mappings, see ``make_pool``.
        method: Name of a selection method, such as ``"less"`` or ``"random"``.
        target: Rows that stand for the task, for methods that need them.
        model: Model that scores, left exactly as found.
        processing_class: Tokenizer; not needed for tokenised rows.
        seed: Equal seeds give equal selections, in any process.
        output_dir: Where to save the selection, and intermediate results to resume from.
        budget: Limit of what selecting may spend, such as ``"1e15flop, 10min"``.
        **options: Options of the method, such as ``fraction=0.1``; those of ``PoolOptions``, such as
            ``pipeline=["quality_filter"]`` or ``proxy_model=`` (a folder, a Hub id or a model); and
            ``max_length`` (1024), ``batch_tokens`` (16384), ``columns`` that identify a row,
            ``id_column`` to record, ``learning_rate`` and ``train_epochs`` (3) of the run to come.

    Returns:
        The selection; ``selection.apply(pool)`` gives the rows.

    Raises:
        DataError: The pool or the target is empty or unreadable, smaller than asked for, or the
            method needs something that is not given.
    """
    driver = {name: options.pop(name) for name in _DRIVER_OPTIONS if name in options and not _owned(method, name)}
    choice, proxy = _choice(method, options, model, target)
    ledger = Ledger(Budget.parse(budget))
    rows = spooled(pool, limit=choice.options.stream_rows)
    columns, id_column = driver.pop("columns", None), driver.pop("id_column", None)
    epochs, scoring = driver.pop("train_epochs", 3.0), _scoring_fields(model)
    row_format = RowFormat(max_length=driver.pop("max_length", 1024), is_causal_lm=scoring.get("is_causal_lm", True))
    make = functools.partial(make_pool, processing_class=processing_class, row_format=row_format)
    context = SelectionContext(
        pool=make(rows, columns=columns, source_column=choice.column("source_column") or "source"),
        reference=None if target is None else make(target, group_column=choice.column("group_column")),
        collate=PadRows.of(processing_class),
        generator=torch.Generator().manual_seed(seed),
        seed=seed,
        spend=_spend(ledger),
        store_dir=None if output_dir is None else Path(output_dir) / Ranks().folder("store"),
        **_surroundings(processing_class, proxy, scoring),
        **driver,
    )
    about: dict[str, Any] = {
        "dataset_facts": describe_dataset(rows, context.pool, columns, id_column),
        "scorer": describe_scorer(model, processing_class, row_format.max_length),
        "row_ids": _row_ids(rows, id_column),
    }
    with ledger.clock("select"):
        priced = replace(choice, training_flops=_training_flops(context, choice, epochs))
        selection = Ranks().broadcast(run_selection(priced, context, **about))
    return _saved(selection, context, output_dir)


def _choice(method: str, options: Mapping[str, Any], model: Any, target: Any) -> tuple[PoolChoice, Any]:
    """The methods with their options, and the proxy, which is a model or the name of one."""
    proxy = options.get("proxy_model")
    choice = choose_pool(method, options if proxy is None else {**options, "proxy_model": _name_of(proxy)})
    for chosen in choice.stages:
        _check_given(chosen.spec, model, target)
    return choice, proxy


def _surroundings(processing_class: Any, proxy: Any, scoring: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the context that say who scores, with whom, and how it shows."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return {
        **scoring,
        "tokenizer": tokenizer,
        "proxy": load_proxy(proxy, tokenizer, scoring.get("device", "cpu")),
        "processes": Ranks(),
        "progress": _progress,
    }


def _saved(selection: Selection, context: SelectionContext, output_dir: str | Path | None) -> Selection:
    """The selection, once the first process has written it."""
    if output_dir is not None and Ranks().is_first:
        write_selection_report(selection, context.pool, selection.save(output_dir), context.tokenizer)
    return selection


def _name_of(model: Any) -> str:
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _owned(method: str, name: str) -> bool:
    """Whether an option of the driver's name belongs to a method itself."""
    return any(name in spec.config.__dataclass_fields__ for spec in resolve("selection", method))


def _training_flops(context: SelectionContext, choice: PoolChoice, epochs: float) -> float | None:
    """FLOPs of training the model that scores on the rows to keep; None without a model."""
    config = choice.stages[-1].config
    if context.model is None or not isinstance(config, SizedConfig):
        return None
    pool = context.pool
    kept = config.limit(pool) / max(1, int(config.units(pool)[pool.loss_lengths > 0].sum()))
    # A backward through every weight is two more forwards.
    return 3.0 * epochs * kept * context.forward_flops(len(pool), max(1, round(float(pool.lengths.mean()))))


def run_selection(
    choice: PoolChoice,
    context: SelectionContext,
    *,
    dataset_facts: Mapping[str, Any],
    scorer: Mapping[str, Any] | None = None,
    row_ids: Sequence[str] | None = None,
) -> Selection:
    """Run the stages of a choice and record what they kept.

    Args:
        choice: The methods with their options.
        context: Pool, target, model, limits.
        dataset_facts: See ``describe_dataset``.
        scorer: See ``describe_scorer``.
        row_ids: [N] the dataset's own ids, by index.

    Returns:
        The selection, its manifest complete but for the file's hash, which ``save`` adds.

    Raises:
        DataError: Something a method needs is missing or empty.
        PlanError: A method does not work with this kind of model.
    """
    for chosen in choice.stages:
        _check_needs(chosen.spec, context)
    spent = {"flops": 0.0, "tokens": 0.0}

    def spend(flops: float, tokens: float) -> None:
        context.spend(flops, tokens)
        spent["flops"] += flops
        spent["tokens"] += tokens

    started = time.perf_counter()
    picks = choice.select(replace(context, spend=spend))
    cost = {**spent, "seconds": time.perf_counter() - started, "device": str(context.device)}
    chosen = choice.recorded(picks, context)
    check_picks(picks, context.pool, chosen.spec.address)
    if len(picks.positions) == len(context.pool) and picks.weights is None and not chosen.spec.traits.baseline:
        warnings.warn(
            NoEffectWarning(f"{chosen.spec.address} kept all {len(context.pool)} rows; training on them equals 'all'."),
            stacklevel=2,
        )
    return Selection(
        **selection_fields(
            chosen,
            context,
            picks,
            dataset=dataset_facts,
            cost=cost,
            scorer=scorer,
            row_ids=row_ids,
            params=choice.params(picks, context),
        )
    )


def load_selected(
    dataset: Any,
    selection: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    on_mismatch: OnMismatch = "error",
    level: Level = "rows",
    streaming: bool = False,
) -> Any:
    """The chosen rows of a dataset, verified.

    Args:
        dataset: A dataset, or the Hub id or folder of one; None for the one the manifest names.
        selection: A ``Selection``, a folder that ``save`` wrote, a Hub dataset repository, or an address such as
            ``"hub:user/repo/name@revision"``.
        name: Which selection of a Hub repository.
        revision: Branch, tag or commit of that repository.
        token: Access token; None for the one that is logged in.
        on_mismatch: What to do where the dataset differs, see ``Selection.apply``.
        level: How much to verify, see ``Selection.verify``.
        streaming: Whether a dataset given by id is read as a stream, whose rows are matched by content.

    Raises:
        OptionError: No dataset is given and the manifest names none.
    """
    if not isinstance(selection, manifest.Selection):
        selection = Selection.from_pretrained(selection, name, revision=revision, token=token)
    about = selection.manifest["dataset"]
    if dataset is None:
        dataset = about["repo_id"]
        if dataset is None:
            raise OptionError("the manifest names no Hub dataset; pass the dataset it was made from.")
    if isinstance(dataset, (str, Path)):
        place: dict[str, Any] = {name: about[name] for name in ("config", "split")}
        place["revision"] = about["revision"] if str(dataset) == about["repo_id"] else None
        dataset = hub.fetch_split(str(dataset), **place, token=token, streaming=streaming)
    return selection.apply(dataset, on_mismatch=on_mismatch, level=level)


def _check_given(spec: MethodSpec, model: Any, target: Any) -> None:
    """What a method cannot do without, before any row is read."""
    if spec.traits.needs_model and model is None:
        raise DataError(f"{spec.address} scores with a model; pass model=.")
    if spec.traits.needs_reference_set and target is None:
        raise DataError(f"{spec.address} needs target rows that stand for the task; pass target= (or eval_dataset).")


def _check_needs(spec: MethodSpec, context: SelectionContext) -> None:
    require(spec)
    _check_given(spec, context.model, context.reference)
    if not len(context.pool):
        raise DataError("the pool is empty: there are 0 rows to choose from.")
    if not (context.pool.loss_lengths > 0).any():
        raise DataError(
            f"none of the {len(context.pool)} rows of the pool has a token that carries loss; "
            "check max_length and the labels."
        )
    if spec.traits.needs_causal_lm and not context.is_causal_lm:
        raise PlanError(f"{spec.address} works on decoder-only language models only.")
    if context.reference is not None and not (context.reference.loss_lengths > 0).any():
        raise DataError(f"none of the {len(context.reference)} target rows has a token that carries loss.")


def _scoring_fields(model: Any) -> dict[str, Any]:
    """Fields of the context that say who scores."""
    return {} if model is None else {**vars(scorer_of(model)), "is_causal_lm": model_facts(model).is_causal_lm}


def _row_ids(pool: Any, column: str | None) -> list[str] | None:
    if column is None:
        return None
    names = getattr(pool, "column_names", None) if len(pool) else [column]
    if column not in (names or list(pool[0])):
        raise DataError(f"id_column={column!r} is not a column of the pool: {names or list(pool[0])}.")
    return [str(value) for value in (pool[column] if names else (row[column] for row in pool))]


def _spend(ledger: Ledger) -> Callable[[float, float], None]:
    def spend(flops: float, tokens: float) -> None:
        ledger.require({"flops": flops, "tokens": tokens}, "the next scoring batch")
        ledger.charge("select", flops=flops, tokens=tokens)

    return spend


def _progress(iterable: Iterable[Any], total: int | None = None, description: str = "") -> Iterable[Any]:
    # disable=None: silent where nobody watches.
    return tqdm(iterable, total=total, desc=description, disable=None)


def _published(repo_id: str, folder: Path, revision: str | None, token: str | None) -> dict[str, Mapping[str, Any]]:
    """Manifests that the repository holds at a commit, by name."""
    held = hub.list_files(repo_id, "dataset", revision=revision, token=token)
    if not any(path.startswith(f"{FOLDER}/") and path.endswith(f"/{MANIFEST}") for path in held):
        return {}
    hub.pull_folder(repo_id, folder, patterns=[f"{FOLDER}/*/{MANIFEST}"], revision=revision, token=token)
    return {path.parent.name: read_manifest(path) for path in folder.glob(f"{FOLDER}/*/{MANIFEST}")}
