"""Record which experts a transformers model chooses on text: the traces that placement is solved on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecc.errors import InputError
from moecc.integrations.batches import Batch, batch_of
from moecc.solvers.routing import Routing

if TYPE_CHECKING:
    import torch

Encoder = Callable[[str], list[int]]

SEQUENCES_PER_BATCH = 8
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "vocab.json")


def record(
    checkpoint: Path, inputs: Sequence[Path], *, tokens: int, sequence_length: int, name: str
) -> Routing:
    """Run a checkpoint folder over text files and return the experts it chose, one workload.

    tokens: how many to record, rounded down to whole sequences of `sequence_length`. Folders among `inputs` are
    walked. Nothing is downloaded and no code of the checkpoint is run. Raises InputError for a folder that is
    no checkpoint, a model without experts, and inputs that hold too little text.
    """
    auto = _transformers_for(checkpoint)
    # the text first: weights take minutes to load, a wrong path is found at once
    config = _from_folder(auto.AutoConfig, checkpoint)
    encode = text_encoder(checkpoint, config.get_text_config().vocab_size)
    windows = read_text_workload(inputs, encode, length=sequence_length, limit=tokens)
    model = _from_folder(auto.AutoModelForCausalLM, checkpoint)
    starts = range(0, len(windows), SEQUENCES_PER_BATCH)
    return record_routing(model, (windows[i : i + SEQUENCES_PER_BATCH] for i in starts), name)


def _transformers_for(checkpoint: Path) -> Any:
    """The transformers package; InputError where it is missing or the folder is no checkpoint."""
    if not (checkpoint / "config.json").is_file():
        raise InputError(
            "no config.json in this folder",
            where=str(checkpoint),
            hint="give the folder of a local Hugging Face checkpoint; nothing is downloaded",
        )
    try:
        import transformers
    except ImportError as error:
        raise InputError("recording needs transformers 5", hint="pip install 'moecc[trace]'") from error
    return transformers


def _from_folder(auto_class: Any, checkpoint: Path) -> Any:
    """What an Auto class of transformers loads from a local folder."""
    try:
        return auto_class.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"transformers cannot load it: {error}",
            where=str(checkpoint),
            hint="the folder needs a config.json and weights of a model that transformers 5 knows",
        ) from error


def text_encoder(checkpoint: Path, vocab_size: int) -> Encoder:
    """The checkpoint's tokenizer without special tokens, or UTF-8 bytes for a model of at most 258 tokens."""
    if any((checkpoint / file).is_file() for file in TOKENIZER_FILES):
        tokenizer = _from_folder(_transformers_for(checkpoint).AutoTokenizer, checkpoint)
        return partial(tokenizer.encode, add_special_tokens=False)
    if not 256 <= vocab_size <= 258:
        raise InputError(
            f"no tokenizer, and a vocabulary of {vocab_size} tokens is not one of bytes",
            where=str(checkpoint),
            hint=f"copy the model's tokenizer into the folder ({TOKENIZER_FILES[0]})",
        )
    return lambda text: list(text.encode())


def read_text_workload(paths: Sequence[Path], encode: Encoder, *, length: int, limit: int) -> torch.Tensor:
    """Text as token windows: int64 [limit // length, length], evenly spaced over all the text.

    Files are cut into windows one by one, so no window spans two files and a remainder shorter than `length` is
    left out. Bytes that are not UTF-8 are replaced. Raises InputError where the text is too short.
    """
    import torch

    wanted = limit // length
    if wanted < 1:
        raise InputError(
            f"{limit} tokens are less than one sequence of {length}",
            hint="ask for more tokens or shorter sequences",
        )
    windows: list[list[int]] = []
    for path in text_files(paths):
        tokens = encode(path.read_text("utf-8", errors="replace"))
        windows += [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    if len(windows) < wanted:
        raise InputError(
            f"the inputs hold {len(windows)} sequences of {length} tokens, {wanted} are asked for",
            where=", ".join(map(str, paths)),
            hint=f"add text, or ask for at most {len(windows) * length} tokens",
        )
    spaced = [index * len(windows) // wanted for index in range(wanted)]
    return torch.tensor([windows[index] for index in spaced])


def text_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files themselves, and of folders every visible file that is text (no zero byte), in sorted order."""
    for path in paths:
        if path.is_file():
            yield path
        elif path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.is_file())
            visible = (p for p in inside if not any(part[0] == "." for part in p.relative_to(path).parts))
            yield from (p for p in visible if not _is_binary(p))
        else:
            raise InputError("no such file or folder", where=str(path), hint="name files or folders of text")


def _is_binary(path: Path) -> bool:
    """A zero byte in the first 8 KB, which is also git's criterion."""
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def trace(
    model: Any, dataloader: Iterable[Any], *, tokens: int | None = None, name: str = "trace"
) -> Routing:
    """The experts that a transformers 5 model chooses for the tokens of a data loader: `moecc.trace`.

    dataloader: any iterable of batches as `batch_of` takes them; positions that their attention_mask leaves out are
    padding and are not recorded. tokens: the most to record, all where it is None; the data loader is read no
    further. name: that of the workload. `moecc.save_trace(path, routing)` writes what was recorded.
    Raises InputError for batches of another form, and where `record_routing` does.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"{tokens} is out of range", where="tokens", hint="record at least one token")
    return record_routing(model, dataloader, name, limit=tokens)


def record_routing(model: Any, batches: Iterable[Any], name: str, *, limit: int | None = None) -> Routing:
    """The experts that `model` chooses for every token of `batches`, up to `limit` tokens; forms as in `batch_of`.

    `model` is a transformers 5 model whose experts modules follow its experts interface; they are called with
    (hidden [tokens, H], expert ids [tokens, k], weights). Layers stand in the order of the modules; ids stay in
    the router's order. The model runs in evaluation mode and is left as it was. Raises InputError for a model
    without such modules, and for one of which a layer did not see each token exactly once.
    """
    import torch

    layers = experts_modules(model)
    num_experts = _one_value({layer.num_experts for layer in layers.values()}, "numbers of experts")
    recorded: list[torch.Tensor] = []
    lengths: list[int] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _captured_ids(layers) as captured:
            for number, item in enumerate(batches):
                batch = batch_of(item, number)
                _run(model, batch)
                ids = _stack_layers(captured, tokens=batch.input_ids.numel())
                recorded.append(ids[batch.kept.flatten()])
                lengths += batch.kept.sum(1).tolist()
                if limit is not None and sum(lengths) >= limit:
                    break
    finally:
        model.train(was_training)
    if not sum(lengths):
        raise InputError("no text to record", hint="give at least one batch of tokens")
    ids = torch.cat(recorded)[:limit]
    if int(ids.max()) >= num_experts:
        raise InputError(
            f"expert id {int(ids.max())} in a model of {num_experts} experts",
            hint="record without expert parallelism: its ids mark experts of other ranks",
        )
    return Routing(
        name=name,
        topk_ids=ids.numpy().astype(np.int16),
        num_experts=num_experts,
        sequence_ids=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:limit],
    )


def _run(model: Any, batch: Batch) -> None:
    """Through the base model: the logits are not needed, and are large."""
    mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask.to(model.device)}
    model.base_model(input_ids=batch.input_ids.to(model.device), **mask, use_cache=False)


def experts_modules(model: Any) -> dict[str, Any]:
    """The experts modules of a model in layer order, by name: those that transformers' decorator marked."""
    marks = ("has_gate", "is_concatenated", "is_transposed", "num_experts")
    found = {
        name: module for name, module in model.named_modules() if all(hasattr(module, mark) for mark in marks)
    }
    if not found:
        raise InputError(
            "no experts module to record",
            where=type(model).__name__,
            hint="a Mixture-of-Experts model of transformers 5 is needed; Llama4, DBRX, JetMoE, Switch, NLLB, "
            "LongCat-Flash and Step3p7 do not dispatch through its experts interface",
        )
    return found


@contextmanager
def _captured_ids(layers: dict[str, Any]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collects the ids of every call of every layer for as long as the context lasts."""
    captured: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # the second argument, whose name differs between the families
        ids = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())[1]
        captured[name].append(ids.detach().cpu())

    handles = [
        module.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
        for name, module in layers.items()
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _stack_layers(captured: dict[str, list[torch.Tensor]], *, tokens: int) -> torch.Tensor:
    """Empties what was captured into [tokens, layers, k]."""
    import torch

    for name, calls in captured.items():
        seen = sum(ids.shape[0] for ids in calls)
        if seen != tokens:
            raise InputError(
                f"the layer saw {seen} tokens of {tokens}",
                where=name,
                hint="only models whose every MoE layer routes each token once can be recorded",
            )
    _one_value({calls[0].shape[1] for calls in captured.values()}, "values of top_k")
    stacked = torch.stack([torch.cat(calls) for calls in captured.values()], dim=1)
    for calls in captured.values():
        calls.clear()
    return stacked


def _one_value(values: set[int], what: str) -> int:
    if len(values) != 1:
        raise InputError(
            f"the layers have different {what}: {', '.join(map(str, sorted(values)))}",
            hint="a trace holds layers of one shape",
        )
    return values.pop()
