"""The two ends of a run around the stock loop: plan, resume, selection, governor; then the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.drift_probe import DriftProbe
from hf_eff.engines.facts import model_facts
from hf_eff.engines.gain_probe import GainProbe
from hf_eff.engines.held_out import held_out_of
from hf_eff.engines.packed_weights import refuse_packed
from hf_eff.files import write_text
from hf_eff.governor import GovernorLog
from hf_eff.memory import MemoryStack
from hf_eff.numerics.flops import forward_flops
from hf_eff.plan_reallocation import chosen_actions
from hf_eff.publish.bundle import figures
from hf_eff.publish.evaluation import evaluation_of
from hf_eff.reallocation import Reallocation
from hf_eff.report import build_report, render_run_card
from hf_eff.report.run_card import add_to_card
from hf_eff.report.secrets import publishable
from hf_eff.report.selection_report import FOLDER as SELECTION_REPORT
from hf_eff.run import BudgetedRun
from hf_eff.run_directory import CARD, RunDirectory, environment
from hf_eff.scoring_rows import reference_rows, scoring_collator
from hf_eff.supervisor import Supervisor

if TYPE_CHECKING:
    from torch import nn

    from hf_eff.manifest import Selection
    from hf_eff.plan import Plan


def start_run(trainer: Any, plan: Plan, checkpoint: Path | None) -> BudgetedRun:
    """Open a run on a trainer that carries ``BudgetedTrainerMixin``.

    Args:
        trainer: The trainer; its ``train_dataset`` becomes the selected subset.
        plan: Its plan.
        checkpoint: A complete checkpoint to resume from, or None.

    Raises:
        CheckpointError: The checkpoint belongs to another run.
        PlanError: Gradients do not pass through the model.
        ManifestError: The dataset changed since the checkpoint was written.
        BudgetExceededError: Selection would pass a limit.
    """
    if trainer.budgeted_run is not None:
        _forget(trainer, plan)
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    if any(chosen.spec.traits.needs_backward for chosen in plan.resolved.memory):
        refuse_packed(unwrapped)
    model = model_facts(unwrapped)
    directory = RunDirectory(trainer.args.output_dir)
    trained = _trained_names(unwrapped)
    run = BudgetedRun(plan, trainer.memory_stack, model, directory, trainer._objective, trained)  # noqa: SLF001
    if checkpoint is not None:
        run.restore(checkpoint)
    if run.ranks.is_first:
        run.directory.write_plan(plan)
    trainer.selection_stage.narrow(trainer, run)
    run.supervisor = _supervisor(trainer, run)
    _connect_actions(trainer, run)
    if checkpoint is None and run.supervisor.log is not None and run.ranks.is_first:
        run.supervisor.log.start({**plan.to_dict(), "energy": run.ledger.energy_source})
    run.open()
    return run


def _trained_names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _connect_actions(trainer: Any, run: BudgetedRun) -> None:
    """Let the governor see what else the run could do, and do it."""
    supervisor, stage = run.supervisor, trainer.selection_stage
    assert supervisor is not None  # noqa: S101 - the caller just made it
    supervisor.situation = lambda: {
        "phase": "cooldown" if run.cooling else "main",
        "data_phase": stage.phases.number if stage.phases is not None else 0,
    }
    actions = chosen_actions(run.plan.resolved.governor.config)
    if not actions:
        return
    run.reallocation = Reallocation(actions, trainer, run)
    supervisor.offers = run.reallocation.offers
    if "refresh" in actions and supervisor.probe is not None:
        supervisor.drift = _drift(trainer, run)


def _forget(trainer: Any, plan: Plan) -> None:
    """A second ``train()`` is a new run: method state and the optimizer that it made start anew."""
    trainer.memory_stack = MemoryStack(plan.resolved.memory)
    if not plan.facts.run.custom_optimizer:
        trainer.optimizer = trainer.lr_scheduler = None


def _supervisor(trainer: Any, run: BudgetedRun) -> Supervisor:
    plan = run.plan
    chosen = plan.resolved.governor
    probe = _probe(trainer, run) if chosen.spec.traits.needs_reference_set else None
    return Supervisor(
        chosen.build(),
        run.ledger,
        run.ranks,
        compute_limit=_expected_flops(plan),
        max_steps=plan.steps or 0,
        probe=probe,
        log=GovernorLog(run.directory.governor_log) if probe is not None else None,
    )


def _expected_flops(plan: Plan) -> float:
    """FLOPs up to the step at which plan or budget end the run."""
    steps = plan.stop_step if plan.stop_step is not None else plan.steps or 0
    return plan.flops["select"] + plan.flops["probe"] + plan.step_flops * steps


def _probe(trainer: Any, run: BudgetedRun) -> GainProbe:
    facts, config = run.model, run.plan.resolved.governor.config
    allowance = getattr(config, "probe_allowance", None)
    rows, _ = reference_rows(trainer, trainer.selection_stage.unpacked_reference)
    quantity = held_out_of(
        trainer._governor_objective,  # noqa: SLF001
        is_causal_lm=facts.is_causal_lm,
        rows=rows,
        trainer=trainer,
        tokenizer=trainer.processing_class,
    )
    return GainProbe(
        rows,
        scoring_collator(trainer),
        is_causal_lm=facts.is_causal_lm,
        num_examples=getattr(config, "num_examples", 128),
        max_flops=allowance(_expected_flops(run.plan)) if allowance is not None else float("inf"),
        seed=trainer.args.seed,
        forward_flops=lambda batch, length: quantity.flops(facts, BatchShape(batch, length)),
        rank=run.ranks.rank,
        world_size=run.ranks.size,
        gather=run.ranks.gather,
        quantity=quantity,
    )


def _drift(trainer: Any, run: BudgetedRun) -> DriftProbe:
    """A sample of the pool to rank again."""
    facts, stage = run.model, trainer.selection_stage
    return DriftProbe(
        stage.scored_rows,
        scoring_collator(trainer),
        is_causal_lm=facts.is_causal_lm,
        num_examples=getattr(run.plan.resolved.governor.config, "drift_examples", 64),
        seed=trainer.args.seed,
        forward_flops=lambda batch, length: forward_flops(facts, BatchShape(batch, length)),
        rank=run.ranks.rank,
        world_size=run.ranks.size,
        gather=run.ranks.gather,
    )


def finish_run(trainer: Any, run: BudgetedRun) -> dict[str, Any]:
    """Predicted beside measured: returned on every rank, written by the first."""
    selection = trainer.selection_stage.selection
    stopped_by = None
    if run.stop.action == "stop":
        stopped_by = run.stop.details.get("currency", "governor")
    report = build_report(
        run.plan.to_dict(),
        {"spent": run.ledger.spent(), "by_purpose": run.ledger.by_purpose()},
        {
            **run.memory_measured,
            "steps": run.steps_done,
            "stopped_by": stopped_by,
            "out_of_memory": run.rescue.events,
        },
        _chosen_rows(selection) if selection is not None else None,
        _governor_facts(run, ended=stopped_by is not None),
        {**environment(_base_model(trainer), _datasets(trainer)), "energy": run.ledger.energy_source},
    )
    report["plan"] = publishable(str(run.plan).splitlines())
    report["evaluation"] = evaluation_of(trainer.state.log_history, trainer.data_origins)
    if run.best is not None and (stopped_by is not None or run.steps_done >= (run.plan.steps or 0)):
        run.best.remove()  # a run that somebody else ended may be resumed
    if run.ranks.is_first:
        if run.supervisor is not None and run.supervisor.log is not None:
            run.supervisor.log.finish(
                {"steps": run.steps_done, "ended": run.stop.reason, "by_purpose": run.ledger.by_purpose()}
            )
        run.directory.write_report(report)
        if run.replay_log is not None:
            run.write_log(run.directory.path, trainer.accelerator.unwrap_model(trainer.model))
    return report


def _governor_facts(run: BudgetedRun, *, ended: bool) -> dict[str, Any] | None:
    """How the run ended and what was changed on the way; None for a run that nobody touched."""
    facts: dict[str, Any] = {"ended": run.stop.reason} if ended else {}
    if run.cooldown is not None and run.cooldown.active:
        facts["learning rate lowered from step"] = run.cooldown.begun_at
    if run.weights_of_step is not None:
        facts["weights of step"] = run.weights_of_step
    if run.reallocation is not None and run.reallocation.events:
        facts["changes"] = [dict(event) for event in run.reallocation.events]
    return facts or None


def _base_model(trainer: Any) -> str | None:
    return getattr(getattr(trainer.model, "config", None), "_name_or_path", None) or None


def _datasets(trainer: Any) -> list[str]:
    """Hub datasets of the run, as ids."""
    found = [trainer.data_origins.get("train"), *trainer.data_origins.get("eval", {}).values()]
    return list(dict.fromkeys(origin["repo_id"] for origin in found if origin is not None))


def _chosen_rows(selection: Selection) -> dict[str, Any]:
    """What people ask of a selection first."""
    about, scores = selection.manifest["selection"], selection.manifest["scores"]
    return {
        "method": about["method"],
        "rows": about["num_selected"],
        "of": selection.manifest["dataset"]["num_rows"],
        "tokens": about["num_tokens"],
        "invalid rows": about["num_invalid"],
        "mean score of all rows": scores["mean"],
        "digest": selection.digest,
        "rows to read": f"{SELECTION_REPORT}/report.md",
        **about["notes"],
    }


def extend_card(report: dict[str, Any], folder: str | Path) -> None:
    """Add the run's own card to the one that transformers or TRL wrote."""
    path = Path(folder) / CARD
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    card = render_run_card(report, figures(Path(folder)))
    write_text(path, add_to_card(before, card) if before else card)
