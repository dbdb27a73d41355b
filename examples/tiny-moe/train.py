"""Train a small Mixture-of-Experts language model on the Python standard library, on a CPU.

An OLMoE of 8 layers x 32 experts, top-4, over raw bytes. It exists so that the traces in this folder are the
routing of a trained model; it is not meant to write good code. Run: `python train.py --out checkpoint`.
"""

from __future__ import annotations

import argparse
import copy
import math
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

SEQUENCE_LENGTH = 256
SEQUENCES = 8  # a step is 2,048 tokens
PEAK_LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
DOCUMENT_END = b"\x00"


def model_config() -> OlmoeConfig:
    """The architecture, 39 million parameters of which a token uses 6."""
    return OlmoeConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=6,
        max_position_embeddings=1024,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
        pad_token_id=None,
        eos_token_id=0,
    )


def held_out(path: Path, root: Path) -> bool:
    """Whether a file is kept from training: about one in twenty, by its name alone."""
    return zlib.crc32(path.relative_to(root).as_posix().encode()) % 20 == 0


def source_files() -> tuple[list[Path], list[Path]]:
    """Files of the standard library: (for training, held out).

    Left out of both: installed packages, the library's own tests, and pydoc_data, whose English is the prose
    workload.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "pydoc_data"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    return [p for p in files if not held_out(p, root)], [p for p in files if held_out(p, root)]


def read_bytes(files: list[Path]) -> torch.Tensor:
    """All files behind one another, each ended by a zero byte: int64 [bytes]."""
    text = b"".join(path.read_bytes() + DOCUMENT_END for path in files)
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))


def batches(data: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Random windows without end: int64 [SEQUENCES, SEQUENCE_LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(SEQUENCE_LENGTH)
    while True:
        starts = torch.randint(0, len(data) - SEQUENCE_LENGTH, (SEQUENCES, 1), generator=generator)
        yield data[starts + offsets]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmup * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def losses(model: OlmoeForCausalLM, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(next-byte loss in nats, load-balance term, top_k where every layer is balanced) of one batch.

    The balance term is computed layer by layer: the model's own loss pools the layers, which is content when
    each layer leaves all work to four experts as long as they are four others.
    """
    # weights stay fp32: in bf16, experts included, a step was measured 2.7 times as long on a CPU
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=batch, output_router_logits=True)
    text = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten()
    )
    experts, k = model.config.num_experts, model.config.num_experts_per_tok
    balance = [load_balancing_loss_func((layer.float(),), experts, k) for layer in output.router_logits]
    return text, torch.stack(balance).mean()


@torch.no_grad()
def held_out_loss(model: OlmoeForCausalLM, data: torch.Tensor) -> float:
    """Mean next-byte loss in nats, without the balance term, on evenly spaced windows of unseen files."""
    model.eval()
    starts = torch.linspace(0, len(data) - SEQUENCE_LENGTH - 1, 64).long()[:, None]
    windows = data[starts + torch.arange(SEQUENCE_LENGTH)]
    mean = torch.stack([losses(model, batch)[0] for batch in windows.split(SEQUENCES)]).mean()
    model.train()
    return float(mean)


def train(steps: int, out: Path, seed: int, compiled: bool) -> None:
    """Train for `steps` steps; writes the checkpoint, in bf16, to `out` every 250 steps and at the end."""
    torch.manual_seed(seed)
    model = OlmoeForCausalLM(model_config()).train()
    if compiled:
        model.compile(backend="moecc")
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    training, evaluation = map(read_bytes, source_files())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(training):,} bytes to train on,")
    print(f"{len(evaluation):,} bytes held out")
    start = time.perf_counter()
    for step, batch in zip(range(steps), batches(training, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        text_loss, balance = losses(model, batch)
        (text_loss + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % 10 == 0:
            seconds = time.perf_counter() - start
            rate, left = done * batch.numel() / seconds, seconds / done * (steps - done)
            print(
                f"step {done}/{steps}: loss {text_loss.item():.3f}, balance {balance.item():.2f}, "
                f"{rate:.0f} tokens/s, {left:.0f} s left",
                flush=True,
            )
        if done % 250 == 0 or done == steps:
            copy.deepcopy(model).bfloat16().save_pretrained(out)  # as such models are served
            print(f"step {done}: held-out loss {held_out_loss(model, evaluation):.3f} nats/byte", flush=True)
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="with torch.compile and moecc's kernels")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.out, arguments.seed, arguments.compile)


if __name__ == "__main__":
    main()
