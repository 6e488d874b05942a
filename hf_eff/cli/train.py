"""``hf-eff train``: select, train under the budget, report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli.columns import tokenise
from hf_eff.cli.output import print_json, stdout_reserved
from hf_eff.cli.plan import load_data, preview
from hf_eff.cli.run_flags import RunFlags, parse_run
from hf_eff.cli.sources import load_model
from hf_eff.errors import DataError
from hf_eff.files import require_writable

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def run(argv: Sequence[str]) -> int:
    """Train; print where the results lie. Ctrl-C says how to go on and gives 130."""
    flags, args = parse_run(argv, "train")
    folder = require_writable(str(args.output_dir))
    try:
        with stdout_reserved(flags.json):
            trainer = build_trainer(flags, args)
            trainer.train(resume_from_checkpoint=_checkpoint(args.resume_from_checkpoint))
            trainer.save_model()
            if args.push_to_hub:
                trainer.push_to_hub()
    except KeyboardInterrupt:
        print(f"\nhf-eff: interrupted; {_how_to_resume(argv, folder)}", file=sys.stderr)
        return 130
    if trainer.is_world_process_zero():
        _print_summary(trainer, as_json=flags.json)
    return 0


def build_trainer(flags: RunFlags, args: TrainingArguments) -> Trainer:
    """Read data, plan, load the model and make the trainer, in the order of what can fail cheaply.

    Raises:
        DataError: Rows or target are missing or unreadable.
        PlanError: The combination cannot work.
    """
    pool, target = load_data(flags)
    if target is None and args.eval_strategy != "no":
        raise DataError("eval_strategy needs rows to evaluate on; give --eval_dataset or --eval_split.")
    plan = preview(flags, args, pool, target)
    if args.process_index == 0:
        print(plan)
    model, tokenizer = load_model(flags.model, flags.dtype, flags.cache_dir)
    if flags.task == "sft":
        from hf_eff.sft import BudgetedSFTTrainer

        return BudgetedSFTTrainer(
            model=model, args=args, train_dataset=pool, eval_dataset=target, processing_class=tokenizer
        )
    from transformers import DataCollatorForSeq2Seq

    from hf_eff.trainer import BudgetedTrainer

    seq2seq = bool(model.config.is_encoder_decoder)
    return BudgetedTrainer(
        model=model,
        args=args,
        train_dataset=tokenise(pool, tokenizer, flags.max_tokens, seq2seq=seq2seq),
        eval_dataset=None if target is None else tokenise(target, tokenizer, flags.max_tokens, seq2seq=seq2seq),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model if seq2seq else None),
    )


def _checkpoint(given: str | None) -> str | bool | None:
    """``true`` and ``last`` mean the newest checkpoint of the output folder."""
    return True if str(given).lower() in ("true", "last") else given


def _how_to_resume(argv: Sequence[str], folder: Path) -> str:
    if not any(folder.glob("checkpoint-*")):
        return "no checkpoint was written yet (--save_steps), so run the same command again."
    words = ["hf-eff", "train", *argv]
    if not any(word.startswith("--resume_from_checkpoint") for word in argv):
        words += ["--resume_from_checkpoint", "last"]
    return f"go on with: {shlex.join(words)}"


def _print_summary(trainer: Any, *, as_json: bool) -> None:
    folder, report = Path(trainer.args.output_dir), getattr(trainer, "report", None)
    if as_json:
        print_json({"output_dir": str(folder), "steps": trainer.state.global_step, "report": report})
        return
    if report is None:
        print(f"Trained {trainer.state.global_step} steps without a method or a budget; the model is in {folder}.")
        return
    from hf_eff.report.run_report import binding_sentence

    print(f"{binding_sentence(report)}\nModel, manifest and report.md are in {folder}.")
