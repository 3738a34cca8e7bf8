"""Encoders of a few kilobytes and a sample that they learn in seconds, as sealed artifacts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

from ml.artifacts import ArtifactRef, artifact_key, write_manifest
from ml.runner import StageSpec, run_stage
from ml.taxonomy import Category, Taxonomy

WORDS_OF = {
    "kettles": ["kettle", "boil", "spout"],
    "toasters": ["toaster", "slot", "crumb"],
    "novels": ["novel", "paperback", "chapter"],
    "atlases": ["atlas", "map", "globe"],
}
TREE = {"home": ["kettles", "toasters"], "books": ["novels", "atlases"]}
FILLER = ["new", "red", "blue", "best", "offer", "cheap", "large", "small"]
TINY_TEACHER = {
    "epochs": 3,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-2,
    "max_tokens": 16,
    "seed": 5,
}


def tiny_encoder(folder: Path, *, kind: str = "bert", layers: int = 4) -> Path:
    """An untrained encoder in transformers format that knows the words above."""
    torch.manual_seed(0)
    special = ["<s>", "<pad>", "</s>", "<unk>"] if kind == "xlm-r" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    first, last, unknown = ("<s>", "</s>", "<unk>") if kind == "xlm-r" else ("[CLS]", "[SEP]", "[UNK]")
    words = special + FILLER + [word for words in WORDS_OF.values() for word in words] + [*WORDS_OF, *TREE]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])]
    )
    tokenizer.enable_padding(length=20)  # as published tokenizers do; must not leak into batches
    sizes: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
    }
    if kind == "xlm-r":
        model = XLMRobertaModel(XLMRobertaConfig(**sizes, pad_token_id=1, type_vocab_size=1))
    else:
        model = BertModel(BertConfig(**sizes, pad_token_id=0))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_taxonomy() -> Taxonomy:
    """Two roots with two categories each."""
    return Taxonomy(
        [Category(root, None, root) for root in TREE]
        + [Category(leaf, root, leaf) for root, leaves in TREE.items() for leaf in leaves]
    )


def offer_rows(count: int, seed: int, prefix: str) -> list[dict[str, Any]]:
    """Offers whose text names their category by one of its words, among filler."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        category = list(WORDS_OF)[number % len(WORDS_OF)]
        words = [*rng.choices(WORDS_OF[category], k=2), *rng.choices(FILLER, k=rng.randint(1, 6))]
        rng.shuffle(words)
        rows.append({"offer_id": f"{prefix}{number}", "category_id": category, "text": " ".join(words)})
    return rows


def tiny_inputs(
    folder: Path, *, train: int = 48, validation: int = 16, unlabelled: int = 24
) -> dict[str, Path]:
    """Sealed ``catalog_taxonomy`` and ``training_sample``; the path of each."""
    taxonomy, sample = folder / "taxonomy", folder / "sample"
    taxonomy.mkdir(parents=True)
    sample.mkdir()
    tiny_taxonomy().write(taxonomy / "taxonomy.parquet")
    labelled = [row | {"split": "train"} for row in offer_rows(train, 1, "t")]
    labelled += [row | {"split": "validation"} for row in offer_rows(validation, 2, "v")]
    write_labelled(sample, labelled)
    rows = [{"offer_id": row["offer_id"], "text": row["text"]} for row in offer_rows(unlabelled, 3, "u")]
    schema = pa.schema([("offer_id", pa.string()), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), sample / "unlabelled.parquet")
    seal(taxonomy, "catalog_taxonomy")
    seal(sample, "training_sample")
    return {"catalog_taxonomy": taxonomy, "training_sample": sample}


def write_labelled(sample: Path, rows: list[dict[str, Any]]) -> None:
    """``labelled.parquet`` with the columns that training reads."""
    schema = pa.schema([(name, pa.string()) for name in ("offer_id", "category_id", "text", "split")])
    pq.write_table(pa.Table.from_pylist(rows, schema), sample / "labelled.parquet")


def seal(folder: Path, kind: str) -> None:
    """Give a folder the manifest that makes it an artifact."""
    write_manifest(
        folder,
        kind=kind,
        key=artifact_key(kind, "1", {}, {}),
        inputs={},
        code_version="1",
        code_revision=None,
        parameters={},
        metrics={},
        seconds=0.0,
    )


def stage_spec(
    stage: str, inputs: Mapping[str, Path], parameters: Mapping[str, Any], output: Path
) -> StageSpec:
    """A spec whose workspace lies beside the output."""
    return StageSpec(
        stage=stage,
        inputs={name: str(path) for name, path in inputs.items()},
        parameters=dict(parameters),
        output=str(output),
        workspace=str(output.with_name(output.name + ".work")),
    )


def make(
    stage: str, inputs: Mapping[str, Path], parameters: Mapping[str, Any], output: Path
) -> tuple[Path, ArtifactRef]:
    """Run a stage for real; the artifact's folder and reference."""
    reference = run_stage(stage_spec(stage, inputs, parameters, output))
    return Path(reference.uri), reference


def distillation_inputs(folder: Path) -> dict[str, Path]:
    """All that student and fast model need: sample, taxonomy, a trained teacher and its labels."""
    inputs = tiny_inputs(folder)
    encoder = tiny_encoder(folder / "encoder")
    teacher, _ = make(
        "teacher_checkpoint", inputs, TINY_TEACHER | {"encoder": str(encoder)}, folder / "teacher"
    )
    labels, _ = make(
        "teacher_labels",
        {"teacher_checkpoint": teacher, "training_sample": inputs["training_sample"]},
        {"top_k": 2, "shard_offers": 20},
        folder / "labels",
    )
    return inputs | {"teacher_checkpoint": teacher, "teacher_labels": labels}
