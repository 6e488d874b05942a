"""Two machines in turn: ``select`` chooses, trains and publishes its choice; ``train`` trains on what was published.

Prints one JSON object: the rows, the choice's digest and a hash of the trained weights.
"""

import hashlib
import json
import sys
import tempfile

from datasets import load_dataset

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments, Selection, load_selected
from hf_eff.testing.tiny import collator, tiny_model, tiny_tokenizer, tokenised


def trained(folder, **selection):
    """A tiny model after three steps on the chosen rows of the pool."""
    pool = tokenised(load_dataset("alice/pool", split="train"), tiny_tokenizer())
    args = BudgetedTrainingArguments(
        output_dir=folder, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, **selection,
    )  # fmt: skip
    model = tiny_model(layers=2)
    trainer = BudgetedTrainer(
        model=model, args=args, train_dataset=pool, data_collator=collator(), processing_class=tiny_tokenizer()
    )
    trainer.train()
    return trainer


def facts(trainer):
    weights = hashlib.sha256()
    for _, tensor in sorted(trainer.model.state_dict().items()):
        weights.update(tensor.float().numpy().tobytes())
    rows = [list(row) for row in trainer.train_dataset["input_ids"]]
    return {"rows": rows, "digest": trainer.selection.digest, "weights": weights.hexdigest()}


def select(folder):
    trainer = trained(folder, selection="random", selection_kwargs={"num_examples": 6})
    trainer.selection.push_to_hub("alice/chosen", "six")
    return facts(trainer)


def train(folder):
    address = "hub:alice/chosen/six"
    found = facts(trained(folder, selection=address))
    published = Selection.from_pretrained(address)
    pool = tokenised(load_dataset("alice/pool", split="train"), tiny_tokenizer())
    published.verify(pool, "full")
    chosen = [list(row) for row in load_selected(pool, "alice/chosen")["input_ids"]]
    return {**found, "published": published.digest, "chosen": chosen}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result = {"select": select, "train": train}[sys.argv[1]](folder)
    sys.stdout.write(f"RESULTS {json.dumps(result)}\n")
