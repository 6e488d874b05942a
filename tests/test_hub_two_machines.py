"""Two processes that share nothing but a Hub: one selects and publishes, the other trains on it, to the same bits."""

import json
from pathlib import Path

import pytest

from tests.local_hub import LocalHub

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "workers" / "hub_machines.py"
CLIENTS = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from datasets import Dataset
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_tokenizer, tokenised
import tempfile
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder, max_steps=1, report_to="none", use_cpu=True, push_to_hub=True, hub_model_id="alice/model",
        save_strategy="no", disable_tqdm=True,
    )
    rows = tokenised(tiny_pool(4))
    trainer = Trainer(tiny_model(layers=1), args, train_dataset=rows, data_collator=collator())
    trainer.train()
    trainer.push_to_hub()
get_peft_model(tiny_model(layers=1), LoraConfig(target_modules=["q_proj"])).push_to_hub("alice/adapter")
print(AutoModelForCausalLM.from_pretrained("alice/model").config.num_hidden_layers)
"""


def results(done):
    return json.loads(done.stdout.rpartition("RESULTS ")[2])


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as server:
        rows = [{"prompt": f"What is {i} + 1?", "completion": f" {i + 1}"} for i in range(24)]
        server.add("dataset", "alice/pool", {"train.jsonl": "\n".join(map(json.dumps, rows)).encode()})
        yield server


def test_another_machine_gets_the_same_rows_and_the_same_weights(hub, tmp_path):
    here = results(hub.command([WORKER, "select"], tmp_path / "here"))
    there = results(hub.command([WORKER, "train"], tmp_path / "there"))
    assert len(here["rows"]) == 6
    assert there["rows"] == here["rows"]
    assert sorted(there["chosen"]) == sorted(here["rows"])
    assert there["digest"] == there["published"] == here["digest"]
    assert there["weights"] == here["weights"]
    assert sorted(hub.files("dataset", "alice/chosen")) == [
        ".gitattributes", "README.md", "selections/six/manifest.json", "selections/six/train.parquet",
    ]  # fmt: skip


def test_the_server_speaks_to_the_stock_clients(hub, tmp_path):
    done = hub.python(CLIENTS, tmp_path / "home")
    assert done.stdout.split()[-1] == "1"
    assert {"model.safetensors", "config.json", "README.md"} <= set(hub.files("model", "alice/model"))
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(hub.files("model", "alice/adapter"))
