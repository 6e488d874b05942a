"""Two optimizer steps of one mode of training: predicted bytes per term, measured bytes, and the process's peak."""

import json
import sys
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts
from hf_eff.engines.tensor_facts import with_details
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.numerics.memory_terms import forecast, largest_gradient_params

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def smollm2(layers=30):
    """SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def keep(model):
    return model


def block(index):
    """Train one layer only."""

    def change(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f".layers.{index}." in name)
        return model

    return change


def lora(top=0, frozen=False, **options):
    """Adapters of rank 8 on all matrices, or as ``options`` say; ``top`` layers only; the first matrices frozen."""

    def change(model):
        import peft

        if top:
            layers = model.config.num_hidden_layers
            options["layers_to_transform"] = list(range(layers - top, layers))
        chosen = {"r": 8, "target_modules": MATRICES, "task_type": "CAUSAL_LM", **options}
        model = peft.get_peft_model(model, peft.LoraConfig(**chosen))
        for name, parameter in model.named_parameters():
            if frozen and "lora_A" in name:
                parameter.requires_grad_(False)
        return model

    return change


def checkpointed(every=1):
    def change(model):
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is None:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            enable({"use_reentrant": False}, every_n_layers=every)
        return model

    return change


def halved(model):
    return model.to(torch.bfloat16)


MODES = {
    "full": (keep, {}),
    **{f"block {index}": (block(index), {}) for index in (0, 7, 15, 22, 29)},
    "lora": (lora(), {}),
    "lora q,v": (lora(target_modules=["q_proj", "v_proj"]), {}),
    "lora top 10": (lora(top=10), {}),
    "lora dropout": (lora(lora_dropout=0.05), {}),
    "lora frozen A": (lora(frozen=True), {}),
    "checkpointing": (checkpointed(), {"checkpointing": True}),
    "checkpointing every 2": (checkpointed(2), {"checkpointing": True, "checkpoint_every": 2}),
    "row chunks": (keep, {"row_chunks": 2}),
    "chunked loss": (keep, {"loss_tokens": 128}),
    "fused": (keep, {}),
    "forward only": (keep, {}),
    "bf16": (halved, {}),
    "autocast": (keep, {"compute_bytes": 2.0, "bf16": True}),
}


def facts_of(model, run, rows=2, length=256):
    """Facts as a plan has them."""
    return Facts(
        model=with_details(model_facts(model), model),
        pool=PoolFacts(num_rows=None, mean_tokens=0, max_tokens=0),
        run=RunFacts(batch_size=rows, length=length, **run),
    )


def predict(mode, facts):
    """Forecast of a mode's step."""
    if mode == "fused":
        return forecast(facts, gradient_params=largest_gradient_params(facts), optimizer_bytes=0.0)
    if mode == "forward only":
        return forecast(facts, gradient_params=0, optimizer_params=0, saves_activations=False)
    return forecast(facts)


class Step:
    """Runs a mode's step; ``gradients`` is the largest that a fused backward held."""

    def __init__(self, mode, model, meter, run):
        self.mode, self.model, self.meter, self.run, self.gradients = mode, model, meter, run, 0
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        stateless = mode in ("fused", "forward only")
        self.optimizer = None if stateless else torch.optim.AdamW(self.trained, lr=1e-4, foreach=False)
        if mode == "fused":
            for parameter in self.trained:
                parameter.register_post_accumulate_grad_hook(self._apply)

    def _apply(self, parameter):
        self.gradients = max(self.gradients, parameter.grad.untyped_storage().nbytes())
        parameter.data.add_(parameter.grad, alpha=-1e-3)
        parameter.grad = None

    def loss(self, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mode == "autocast"):
            if self.mode != "chunked loss":
                return self.model(**batch).loss
            from hf_eff.engines.loss_in_chunks import _SummedCrossEntropy

            states = self.model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1]
            labels, head = batch["labels"][:, 1:].flatten(), self.model.lm_head.weight
            total = _SummedCrossEntropy.apply(states.flatten(0, 1), head, None, labels, self.run["loss_tokens"], True)
            return total / labels.numel()

    def __call__(self, batch):
        if self.mode == "forward only":
            with torch.no_grad():
                self.loss(batch)
            return
        for part in range(self.run.get("row_chunks", 1)):
            rows = batch["input_ids"].shape[0] // self.run.get("row_chunks", 1)
            some = {key: value[part * rows : (part + 1) * rows] for key, value in batch.items()}
            with self.meter.forward_backward():
                self.loss(some).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.meter.observe(self.optimizer)
            self.optimizer.zero_grad()


def tokens(rows, length, vocab):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def measure(mode, model, run, batch):
    """Bytes per term over two steps, and the peak of the process less what it held beside the model."""
    meter = MemoryMeter(model)
    step = Step(mode, model, meter, run)
    for _ in range(2):
        step(batch)
    terms = meter.peak_bytes()
    if mode == "fused":
        terms["gradients"] = float(step.gradients)
    return terms, meter.total_bytes()


def main(mode):
    warnings.simplefilter("ignore")
    change, run = MODES[mode]
    model = change(smollm2())
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    predicted = predict(mode, facts_of(model, run))
    terms, total = measure(mode, model, run, tokens(2, 256, 49152))
    row = {"mode": mode, "predicted": predicted.terms, "forecast": predicted.peak, "measured": terms, "total": total}
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
