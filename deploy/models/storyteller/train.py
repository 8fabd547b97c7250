"""Train the storyteller from nothing: corpus, tokenizer, model. Writes a folder in Hugging Face format.

    python deploy/models/storyteller/train.py --out deploy/models/storyteller

Needs PyTorch, tokenizers, safetensors and rich; two CPU cores are enough.
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import rich.progress
import safetensors.torch
import tokenizers
import torch
from corpus import documents
from examine import reading_accuracy
from network import Architecture, Llama
from packing import Batch, batches
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from vocabulary import bos_and_eos, save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; every figure that is not the model's own."""

    steps: int = 1800
    seed: int = 0
    threads: int = 2
    tokens_per_batch: int = 4096
    row_lengths: tuple[int, int] = (384, 1024)
    peak_learning_rate: float = 3e-3
    warmup_steps: int = 150
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    tokenizer_documents: int = 8000
    held_out_batches: int = 40
    examined_readings: int = 1000

    def learning_rate(self, step: int) -> float:
        """Linear warmup, then a cosine down to nearly nothing."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.peak_learning_rate * warmup * (0.51 + 0.49 * math.cos(math.pi * step / self.steps))


def token_batches(tokenizer: Tokenizer, seed: int, recipe: Recipe) -> Iterator[Batch]:
    """The endless training (or held-out) data of one seed."""
    encoded = (
        tokenizer.encode(document.render(), add_special_tokens=False).ids for document in documents(seed)
    )
    return batches(
        encoded,
        row_lengths=recipe.row_lengths,
        tokens_per_batch=recipe.tokens_per_batch,
        padding_id=bos_and_eos(tokenizer)[1],
    )


def loss_of(model: Llama, batch: Batch) -> Tensor:
    """Mean cross entropy in nats per token. Matrix products run in bfloat16, the loss in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.inputs)
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


def train(model: Llama, data: Iterator[Batch], recipe: Recipe) -> tuple[float, int]:
    """Train in place. Returns the mean loss of the last hundred steps, and the number of tokens."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    num_tokens = 0
    columns = (
        *rich.progress.Progress.get_default_columns(),
        rich.progress.TextColumn("loss {task.fields[loss]:.3f}"),
        rich.progress.TextColumn("{task.fields[rate]:,.0f} tokens/s"),
    )
    with rich.progress.Progress(*columns) as progress:
        task = progress.add_task("training", total=recipe.steps, loss=math.nan, rate=0.0)
        started = time.perf_counter()
        for step, batch in enumerate(itertools.islice(data, recipe.steps)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            loss = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            num_tokens += int((batch.targets >= 0).sum())
            recent = losses[-100:]
            rate = num_tokens / (time.perf_counter() - started)
            progress.update(task, advance=1, loss=sum(recent) / len(recent), rate=rate)
            if (step + 1) % 200 == 0:
                progress.console.print(f"step {step + 1}: loss {sum(recent) / len(recent):.4f}")
    return sum(losses[-100:]) / len(losses[-100:]), num_tokens


@torch.no_grad()
def evaluate(model: Llama, data: Iterator[Batch], num_batches: int) -> float:
    """Mean loss per token over the first batches of ``data``."""
    total, count = 0.0, 0
    for batch in itertools.islice(data, num_batches):
        tokens = int((batch.targets >= 0).sum())
        total += loss_of(model, batch).item() * tokens
        count += tokens
    return total / count


def save(folder: Path, model: Llama, arch: Architecture, tokenizer: Tokenizer, report: object) -> None:
    """Write all files beside the old ones first and then move each into place, whole."""
    bos, eos = bos_and_eos(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        staging = Path(name)
        generation = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, "max_new_tokens": 400}
        for file_name, content in (
            ("config.json", arch.config_json(bos, eos)),
            ("generation_config.json", generation),
            ("training.json", report),
        ):
            (staging / file_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(tokenizer, staging, arch.max_position_embeddings)
        weights = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
        safetensors.torch.save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "model.safetensors").chmod(0o644)
        for file in sorted(staging.iterdir()):
            os.replace(file, folder / file.name)


def main() -> None:
    """Parse the options, train, save, and print what was reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps, seed=options.seed, threads=options.threads)
    arch = Architecture()

    started = time.perf_counter()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    # Three streams of documents. No story comes twice; a sum or a greeting may.
    train_seed, tokenizer_seed, held_out_seed = random.Random(recipe.seed).sample(range(10**9), 3)
    sample = itertools.islice(documents(tokenizer_seed), recipe.tokenizer_documents)
    tokenizer = train_tokenizer((document.render() for document in sample), arch.vocab_size)
    model = Llama(arch)
    train_loss, num_tokens = train(model, token_batches(tokenizer, train_seed, recipe), recipe)
    training_seconds = time.perf_counter() - started
    model.eval()
    held_out = evaluate(model, token_batches(tokenizer, held_out_seed, recipe), recipe.held_out_batches)
    accuracy = reading_accuracy(model, tokenizer, seed=held_out_seed, count=recipe.examined_readings)
    report = {
        **asdict(recipe),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_tokens": num_tokens,
        "train_loss": round(train_loss, 4),
        "held_out_loss": round(held_out, 4),
        "reading_accuracy": round(accuracy, 3),
        "training_seconds": round(training_seconds, 1),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    save(options.out, model, arch, tokenizer, report)
    rich.print(report)


if __name__ == "__main__":
    main()
