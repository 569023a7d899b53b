"""The weighted loss of a Trainer is that of our trainer, and of a loop that is written out here."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("trl", minversion="1.16")

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from distrust import ConfigError, DataError, DistrustTrainer, ResumeRefused, TrainConfig
from distrust.engines.torch.engine import TorchEngine
from distrust.integrations.transformers import DistrustCheckpoints, weighted
from distrust.testing.models import make_model
from distrust.weighting import example_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*num_workers.*|.*pin_memory.*|.*deprecated.*|.*fork.*",
)
RATE, MAX_NORM = 0.01, 0.5
#: Adam's. With the usual one, the rounding of a gradient near 0 moves a weight by the whole rate.
EPSILON = 1e-3
ROWS = 11  # with an accumulation of 4, the last step of an epoch is short


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def provenance(count: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(1)
    return {
        "authority_weight": rng.uniform(0, 0.99, count).tolist(),
        "provenance_entropy": rng.uniform(0, 3, count).tolist(),
    }


def token_data(count: int = ROWS) -> Dataset:
    """Sequences of 3 to 20 tokens, of which some are trained."""
    rng = np.random.default_rng(2)
    ids = [rng.integers(3, 250, 3 + 7 * i % 18).tolist() for i in range(count)]
    labels = [[-100 if j < i % 3 else token for j, token in enumerate(row)] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, **provenance(count)})


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "adam_epsilon": EPSILON,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_NORM,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def in_order(trainer: Any) -> Any:
    """The trainer, which then takes the rows in their order."""
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    return trainer


def plain_trainer(folder: Path, data: Any = None, collate: Any = None, **changes: Any) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = Trainer(
        model_of(folder),
        TrainingArguments(**options(folder, **changes)),
        train_dataset=token_data() if data is None else data,
        data_collator=collate or DataCollatorForSeq2Seq(tokenizer),
    )
    return in_order(trainer)


def sft_trainer(folder: Path, data: Any, **changes: Any) -> SFTTrainer:
    settings = {"bf16": False, "max_length": 24, **changes}
    trainer = SFTTrainer(
        model_of(folder),
        SFTConfig(**options(folder, **settings)),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    return in_order(trainer)


def state(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


Sequence = tuple[list[int], list[int], list[float]]  # tokens, labels, weight of each token


def train_by_hand(folder: Path, rows: list[list[Sequence]], *, batch: int, accumulation: int):
    """An epoch of AdamW over rows of independent sequences, one sequence at a time."""
    model = model_of(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    losses = []
    size = batch * accumulation
    for start in range(0, len(rows), size):
        sequences = [sequence for row in rows[start : start + size] for sequence in row]
        tokens = sum(trained_tokens(labels) for _, labels, _ in sequences)
        total, weight_sum = torch.zeros(()), 0.0
        for ids, labels, weights in filter(lambda sequence: trained_tokens(sequence[1]), sequences):
            log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            pairs = enumerate(zip(labels[1:], weights[1:], strict=True))
            positions, targets, factors = zip(*[(i, y, w) for i, (y, w) in pairs if y != -100], strict=True)
            total = total - (torch.tensor(factors) * log_probs[positions, targets]).sum() / tokens
            weight_sum += sum(factors)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM * weight_sum / tokens)
        optimizer.step()
        losses.append(total.item())
    return model.state_dict(), losses


def divide_by_mean(u: Any, tokens: list[int]) -> list[float]:
    mean = sum(a * b for a, b in zip(u, tokens, strict=True)) / sum(tokens)
    return [float(a / mean) for a in u]


def trained_tokens(labels: list[int]) -> int:
    return sum(label != -100 for label in labels[1:])


def sequences_of(data: Dataset, **settings: Any) -> list[Sequence]:
    """The rows of tokenized data with their weights."""
    u = example_weights(data["authority_weight"], data["provenance_entropy"], **settings)
    weights = divide_by_mean(u, [trained_tokens(labels) for labels in data["labels"]])
    pairs = zip(data["input_ids"], data["labels"], weights, strict=True)
    return [(ids, labels, [weight] * len(ids)) for ids, labels, weight in pairs]


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def require_close(trained: Any, expected: Any) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            trained[name], tensor, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def require_equal_training(trainer: Any, expected: tuple[Any, list[float]]) -> None:
    trainer.train()
    assert losses_of(trainer) == pytest.approx(expected[1], rel=1e-5)
    require_close(state(trainer), expected[0])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_weighted_trainer_is_the_loop_written_by_hand(folder, accumulation):
    data = token_data()
    trainer = plain_trainer(folder, gradient_accumulation_steps=accumulation)
    assert weighted(trainer, alpha=2.4, lambda_=0.9) is trainer
    rows = [[sequence] for sequence in sequences_of(data, alpha=2.4, lambda_=0.9)]
    expected = train_by_hand(folder, rows, batch=2, accumulation=accumulation)
    require_equal_training(trainer, expected)
    plain = plain_trainer(folder, gradient_accumulation_steps=accumulation)
    plain.train()
    assert losses_of(plain) != pytest.approx(losses_of(trainer), rel=0.01)


class Recorder(TorchEngine):
    """Keeps the batches that it is given."""

    def micro_step(self, batch, *, tokens):
        vars(self).setdefault("batches", []).append(batch)
        return super().micro_step(batch, tokens=tokens)


@pytest.mark.parametrize(("kind", "accumulation"), [(Trainer, 1), (SFTTrainer, 3)])
def test_a_weighted_trainer_is_our_trainer(folder, tmp_path, accumulation, kind):
    count = 12  # whole steps: our trainer's last step of an epoch goes on in the next one
    texts = ["ore and salt " * (1 + i % 4) + str(i) for i in range(count)]
    columns = provenance(count)
    weight = [0.5 + i % 3 for i in range(count)]
    keys = [*columns, "weight", "prompt", "completion"]
    values = zip(*columns.values(), weight, texts, texts[::-1], strict=True)
    records = [dict(zip(keys, row, strict=True)) for row in values]
    config = TrainConfig(
        model=str(folder),
        out=str(tmp_path / "run"),
        lora_rank=0,
        learning_rate=RATE,
        adam_epsilon=EPSILON,
        max_grad_norm=MAX_NORM,
        schedule="constant",
        warmup_steps=0,
        batch_size=2,
        gradient_accumulation=accumulation,
        max_steps=count // (2 * accumulation),
        threads=1,
    )
    engine = Recorder(config)
    DistrustTrainer(config, engine=engine, examples=records, observers=()).train()
    rows = []
    for batch in engine.batches:
        for i, number in enumerate(batch.examples):
            tokens = {
                name: getattr(batch, name)[batch.sequences == i].tolist() for name in ("input_ids", "labels")
            }
            rows.append({**tokens, **{key: records[number][key] for key in (*columns, "weight")}})
    data = Dataset.from_list(rows)
    make = plain_trainer if kind is Trainer else sft_trainer
    changes = {} if kind is Trainer else {"max_length": 128}
    trainer = weighted(make(folder, data, gradient_accumulation_steps=accumulation, **changes))
    trainer.train()
    require_close(state(trainer), engine.state().model)


def documents(count: int = ROWS) -> Dataset:
    texts = [f"{i}:" + "".join("ab c"[(i + j) % 4] for j in range(3 + 5 * i % 19)) for i in range(count)]
    return Dataset.from_dict({"text": texts, **provenance(count)})


def conversations(count: int = ROWS) -> Dataset:
    messages = [
        [
            {"role": "user", "content": "q" * (1 + i % 4)},
            {"role": "assistant", "content": "a" * (1 + i % 6) + str(i)},
        ]
        for i in range(count)
    ]
    return Dataset.from_dict({"messages": messages, **provenance(count)})


def completions(count: int = ROWS) -> Dataset:
    prompts = ["q" * (1 + i % 5) for i in range(count)]
    return Dataset.from_dict(
        {
            "prompt": prompts,
            "completion": ["a" * (1 + i % 6) + str(i) for i in range(count)],
            **provenance(count),
        }
    )


TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<eos>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chat_folder(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = tokenizer.chat_template
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    yield folder
    tokenizer.chat_template = original
    (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("data", "settings", "accumulation"),
    [
        (documents(), {}, 1),
        (documents(), {"padding_free": True, "max_length": None}, 4),
        (completions(), {"completion_only_loss": True}, 4),
        (conversations(), {"assistant_only_loss": True}, 4),
        (documents(), {"shuffle_dataset": True, "max_length": 10}, 4),
    ],
    ids=["plain", "padding-free", "completions", "assistant", "shuffled and cut"],
)
def test_a_weighted_sft_trainer_is_the_loop_written_by_hand(chat_folder, data, settings, accumulation):
    trainer = sft_trainer(chat_folder, data, gradient_accumulation_steps=accumulation, **settings)
    rows = [[sequence] for sequence in sequences_of(trainer.train_dataset)]
    expected = train_by_hand(chat_folder, rows, batch=2, accumulation=accumulation)
    require_equal_training(weighted(trainer), expected)


def packed_rows(trainer: SFTTrainer, data: Dataset) -> list[list[Sequence]]:
    """What an SFTTrainer made of documents, with the weights that their tokens should have."""
    strategy, size = trainer.args.packing_strategy, trainer.args.max_length
    tokenizer = trainer.processing_class
    examples = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in data["text"]]
    if strategy == "bfd":
        examples = [ids[:size] for ids in examples]
        number = {tuple(ids): i for i, ids in enumerate(examples)}
    else:
        flat = [(token, i) for i, ids in enumerate(examples) for token in ids]
    rows = []
    for start, row in enumerate(trainer.train_dataset):
        ids = row["input_ids"]
        if strategy == "bfd":
            ends = np.cumsum(row["seq_lengths"]).tolist()
            parts = [ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            rows.append([(part, [number[tuple(part)]] * len(part)) for part in parts])
        else:
            piece = flat[start * size : (start + 1) * size]
            assert ids == [token for token, _ in piece]
            rows.append([(ids, [i for _, i in piece])])
    counts = np.zeros(len(data), int)
    for row in rows:
        for _, numbers in row:
            np.add.at(counts, numbers[1:], 1)
    u = example_weights(data["authority_weight"], data["provenance_entropy"])
    weights = divide_by_mean(u, counts.tolist())
    return [[(ids, ids, [weights[i] for i in numbers]) for ids, numbers in row] for row in rows]


@pytest.mark.parametrize(
    ("strategy", "shuffle", "accumulation"), [("bfd", False, 1), ("bfd", True, 4), ("wrapped", False, 4)]
)
def test_weights_are_packed_with_their_tokens(folder, strategy, shuffle, accumulation):
    data = documents(17)
    settings: dict[str, Any] = {"packing": True, "packing_strategy": strategy, "max_length": 15}
    settings |= {"shuffle_dataset": shuffle, "gradient_accumulation_steps": accumulation}
    trainer = sft_trainer(folder, data, **settings)
    expected = train_by_hand(folder, packed_rows(trainer, data), batch=2, accumulation=accumulation)
    require_equal_training(weighted(trainer, data), expected)


@pytest.mark.parametrize("kind", ["padded on the left", "labels made by the collator", "flattened"])
def test_weights_follow_the_tokens_through_a_collator(folder, kind):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = labelled = token_data()
    if kind == "flattened":
        collate: Any = DataCollatorWithFlattening()
    elif kind == "padded on the left":
        tokenizer.padding_side = "left"
        collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
        # The Trainer would train the first token of a shorter row, after padding.
        data = labelled = data.map(lambda row: {"labels": [-100, *row["labels"][1:]]})
    else:
        collate, data = DataCollatorForLanguageModeling(tokenizer, mlm=False), data.remove_columns("labels")
        labelled = data.map(lambda row: {"labels": row["input_ids"]})
    trainer = weighted(plain_trainer(folder, data, collate))
    rows = [[sequence] for sequence in sequences_of(labelled)]
    require_equal_training(trainer, train_by_hand(folder, rows, batch=2, accumulation=1))


def test_workers_change_no_bit(folder):
    states = []
    for workers in (0, 2):
        trainer = plain_trainer(folder, dataloader_num_workers=workers, gradient_accumulation_steps=4)
        weighted(trainer).train()
        states.append(state(trainer))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_an_adapter_is_trained_alike_by_both_trainers(folder):
    states = []
    for make in (plain_trainer, sft_trainer):
        trainer = make(folder, token_data())
        torch.manual_seed(0)
        model = get_peft_model(model_of(folder), LoraConfig(r=2, target_modules=["q_proj"]))
        trainer = type(trainer)(
            model,
            trainer.args,
            train_dataset=token_data(),
            data_collator=trainer.data_collator,
            processing_class=trainer.processing_class,
        )
        weighted(trainer).train()
        states.append(state(trainer))
    require_close(*states)
    assert any("lora_B" in name and tensor.any() for name, tensor in states[0].items())


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer", "packed"])
def test_equal_weights_change_no_bit(folder, kind):
    states = []
    equal = {"authority_weight": [0.25] * ROWS, "provenance_entropy": [1.5] * ROWS}
    for wrap in (False, True):
        documents_ = documents()
        for name, values in equal.items():
            documents_ = documents_.remove_columns(name).add_column(name, values)
        if kind == "Trainer":
            trainer: Any = plain_trainer(folder, Dataset.from_dict({**token_data().to_dict(), **equal}))
        else:
            trainer = sft_trainer(folder, documents_, packing=kind == "packed")
        if wrap:
            weighted(trainer, *([documents_] if kind == "packed" else []))
        trainer.train()
        states.append((state(trainer), losses_of(trainer), torch.get_rng_state()))
    assert states[0][1] == states[1][1]
    assert torch.equal(states[0][2], states[1][2])
    assert all(torch.equal(tensor, states[1][0][name]) for name, tensor in states[0][0].items())


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
def test_evaluation_stays_unweighted_even_on_the_training_data(folder, kind):
    make = plain_trainer if kind is Trainer else sft_trainer
    trainer, plain = weighted(make(folder, token_data())), make(folder, token_data())
    expected = plain.evaluate(token_data())["eval_loss"]
    assert trainer.evaluate(token_data())["eval_loss"] == expected
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == expected
    trainer.train()
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate(token_data())["eval_loss"] == plain.evaluate(token_data())["eval_loss"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"authority_weight": [0.1, 0.2, 1.5]}, "authority_weight of example 2 is outside [0, 0.99]: 1.5"),
        ({"authority_weight": [0.1, None, 0.3]}, "authority_weight of example 1 is outside [0, 0.99]: nan"),
        ({"provenance_entropy": [1.0, 1.0, -1.0]}, "provenance_entropy of example 2 is not"),
        (
            {"authority_weight": ["a", "b", "c"]},
            "column authority_weight of the training data must have numbers",
        ),
        (
            {"authority_weight": [[0.1], [0.2], [0.3]]},
            "column authority_weight of the training data must have",
        ),
        ({"authority_weight": None}, "the data needs authority_weight and provenance_entropy, or weight"),
        ({"authority_weight": None, "provenance_entropy": None}, "the data needs authority_weight and"),
        (
            {"authority_weight": None, "provenance_entropy": None, "weight": [1, 0, 1]},
            "weight of example 1 is not",
        ),
        ({"weight": [1.0, float("nan"), 1.0]}, "weight of example 1 is not a positive number: nan"),
    ],
)
def test_bad_columns_are_named_with_the_example(folder, columns, message):
    values = {**token_data(3).to_dict(), **columns}
    data = Dataset.from_dict({name: column for name, column in values.items() if column is not None})
    trainer = plain_trainer(folder, data)
    with pytest.raises(DataError) as error:
        weighted(trainer)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert trainer.train_dataset is data


class OtherLoss(Trainer):
    def compute_loss(self, *args, **options):
        return super().compute_loss(*args, **options)


def make_unsupported(folder: Path, kind: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind in ("DPOTrainer", "RewardTrainer"):
        pairs = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
        config, make = (DPOConfig, DPOTrainer) if kind == "DPOTrainer" else (RewardConfig, RewardTrainer)
        model = model_of(folder)
        if kind == "RewardTrainer":
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        return make(
            model=model,
            args=config(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, max_length=32),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
    if kind == "loss_type":
        return sft_trainer(folder, documents(), loss_type="dft")
    if kind == "packed":
        return sft_trainer(folder, documents(), packing=True)
    if kind == "prompt":
        model = get_peft_model(
            model_of(folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
        return Trainer(model, TrainingArguments(**options(folder)), train_dataset=token_data())
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1)
        )
        return Trainer(model, TrainingArguments(**options(folder)), train_dataset=token_data(3))
    settings: dict[str, Any] = {"label_smoothing_factor": 0.1} if kind == "smoothing" else {}
    if kind == "liger":
        settings = {"use_liger_kernel": True}
    trainer = plain_trainer(folder, token_data(3), **settings)
    if kind == "iterable":
        trainer.train_dataset = token_data(3).to_iterable_dataset()
    elif kind == "list":
        trainer.train_dataset = token_data(3).to_list()
    elif kind == "transform":
        trainer.train_dataset.set_transform(lambda rows: rows)
    elif kind == "subclass":
        trainer = OtherLoss(trainer.model, trainer.args, train_dataset=token_data(3))
    elif kind == "loss":
        trainer.compute_loss_func = lambda *_, **__: 0
    elif kind == "twice":
        weighted(trainer)
    return trainer


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("DPOTrainer", "no DPOTrainer that computes its own loss"),
        ("RewardTrainer", "no RewardTrainer that computes its own loss"),
        ("subclass", "no OtherLoss that computes its own loss"),
        ("twice", "no Trainer that computes its own loss"),
        ("iterable", "trains on a IterableDataset, no plain datasets.Dataset"),
        ("list", "trains on a list, no plain datasets.Dataset"),
        ("transform", "trains on a Dataset, no plain datasets.Dataset"),
        ("smoothing", "has label smoothing or"),
        ("loss", "compute_loss_func"),
        ("loss_type", "another loss_type than nll"),
        ("liger", "liger kernel"),
        ("prompt", "trains a prompt"),
        ("gpt2", "counts other tokens than a causal language model trains"),
        ("packed", "needs the dataset if the trainer packs"),
    ],
)
def test_what_cannot_be_weighted_is_refused_in_one_line(folder, kind, message):
    trainer = make_unsupported(folder, kind)
    with pytest.raises(ConfigError) as error:
        weighted(trainer)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_dataset_of_a_packed_trainer_must_be_the_one_it_was_built_with(folder):
    trainer = sft_trainer(folder, documents(), packing=True)
    with pytest.raises(ConfigError, match="not the one that the trainer was built with"):
        weighted(trainer, documents(ROWS + 1))
    with pytest.raises(ConfigError, match="and only then"):
        weighted(plain_trainer(folder), token_data())


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **options):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("weighted_first", [True, False])
def test_weights_and_checkpoints_go_together(folder, tmp_path, weighted_first):
    def make(**changes: Any) -> Any:
        settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, **changes}
        workers = 2 if weighted_first else 0
        return plain_trainer(folder, dataloader_num_workers=workers, **settings)

    expected = weighted(make())
    expected.train()
    for callbacks in ([Interrupt()], []):
        trainer = make(save_strategy="steps", save_steps=3)
        attach = DistrustCheckpoints(tmp_path / "checkpoints").attach
        attach(weighted(trainer)) if weighted_first else weighted(attach(trainer))
        for callback in callbacks:
            trainer.add_callback(callback)
        with pytest.raises(KeyboardInterrupt) if callbacks else nullcontext():
            trainer.train()
    assert losses_of(trainer) == losses_of(expected)
    assert all(torch.equal(tensor, state(trainer)[name]) for name, tensor in state(expected).items())
    differently_weighted = DistrustCheckpoints(tmp_path / "checkpoints").attach(weighted(make(), alpha=2.4))
    with pytest.raises(ResumeRefused, match=r"weights of the examples was '.* to .*' and is now '"):
        differently_weighted.train()
    with pytest.raises(ResumeRefused, match="and is now None"):
        DistrustCheckpoints(tmp_path / "checkpoints").attach(make()).train()
