"""TFDS datasets: the synthetic world, and any JSON-lines file of contract rows.

Both store ArrayRecord files and read back without TensorFlow:

  from csrm_jax.data import tfds_builders
  tfds_builders.ContractRows(
    config=tfds_builders.files(train="rows.jsonl.gz"), data_dir="~/tfds"
  ).download_and_prepare()
  source = tfds.data_source("contract_rows", split="train", ...)

An example holds the columns of `COLUMNS`; `row_of(example)` gives the contract
row back, whole.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from csrm_jax.data import contract, sources, synthetic
from csrm_jax.spec import Spec

VERSION = "1.0.0"
COLUMNS = {
  "id": "id of the row",
  "kind": "label, pair, spec_pair or ladder",
  "family": "rows of a family stay together in any split",
  "source": "name of the set",
  "messages": "JSON list of messages; [] for pairs and ladders",
  "spec": "rendered spec; empty for spec pairs and ladders",
  "label": "probability of compliance; NaN without a label",
  "weight": "examples that the row stands for",
  "row": "JSON of the whole contract row",
}


@dataclasses.dataclass(eq=False, kw_only=True)
class FilesConfig(tfds.core.BuilderConfig):
  """JSON-lines files by split."""

  paths: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(eq=False, kw_only=True)
class WorldConfig(tfds.core.BuilderConfig):
  """Size of the synthetic set."""

  families: int = 2000  # groups of the training split
  suite_rows: int = 400  # rows of each evaluation split
  seed: int = 0
  max_rules: int = 3


def files(**paths: str | Path) -> FilesConfig:
  """A config for `ContractRows`: split names and their files.

  It is named after the content of the files, so that changed files never meet
  the records of the old ones.

  Raises:
    ValueError: no file, or a file is missing.
  """
  if not paths:
    raise ValueError("files(): no split given; write files(train=PATH)")
  digest = hashlib.sha256()
  for split, path in sorted(paths.items()):
    found = sources.fingerprint("jsonl", path=path)
    digest.update(f"{split}={found};".encode())
  return FilesConfig(
    name="rows_" + digest.hexdigest()[:12],
    version=VERSION,
    description="Contract rows of " + ", ".join(sorted(paths)),
    paths=tuple((s, str(Path(p).resolve())) for s, p in sorted(paths.items())),
  )


class ContractRows(tfds.core.GeneratorBasedBuilder):
  """Any rows of the data contract, from JSON-lines files."""

  VERSION = tfds.core.Version(VERSION)

  def __init__(
    self, *, config: Any = None, file_format: Any = "array_record", **kwargs
  ):
    super().__init__(config=config, file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return _info(self, "Contract rows: spec, conversation, compliance label.")

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    paths = getattr(self.builder_config, "paths", ())
    if not paths:
      raise ValueError(
        "contract_rows: no files; pass config=tfds_builders.files(train=PATH)"
      )
    return {
      split: self._generate_examples(contract.read_rows(path))
      for split, path in paths
    }

  def _generate_examples(
    self, rows: Iterable[contract.Row]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in rows:
      yield row["id"], example_of(row)


class SyntheticWorld(tfds.core.GeneratorBasedBuilder):
  """The synthetic world: training rows, and both evaluation suites."""

  VERSION = tfds.core.Version(VERSION)
  BUILDER_CONFIGS = [  # noqa: RUF012 (the name that TFDS looks for)
    WorldConfig(name="default", description="2000 groups of rows."),
    WorldConfig(
      name="tiny", description="For tests.", families=8, suite_rows=40
    ),
  ]

  def __init__(
    self, *, config: Any = None, file_format: Any = "array_record", **kwargs
  ):
    super().__init__(config=config, file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return _info(self, "Configurable-safety rows with true labels.")

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    size: Any = self.builder_config
    train = synthetic.rows(
      split="train",
      families=size.families,
      seed=size.seed,
      max_rules=size.max_rules,
    )
    suites = {
      name: synthetic.suite(name, size=size.suite_rows, seed=size.seed)
      for name in ("synthetic_seen", "synthetic_unseen")
    }
    return {
      "train": self._generate_examples(train),
      **{name: self._generate_examples(rows) for name, rows in suites.items()},
    }

  def _generate_examples(
    self, rows: Iterable[contract.Row]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in rows:
      yield row["id"], example_of(row)


def example_of(row: Mapping[str, Any]) -> dict[str, Any]:
  """The columns of a contract row."""
  spec = row.get("spec")
  return {
    "id": row["id"],
    "kind": contract.kind_of(row),
    "family": contract.family_of(row),
    "source": row.get("source", ""),
    "messages": json.dumps(row.get("messages", []), ensure_ascii=False),
    "spec": "" if spec is None else Spec.parse(spec).render(),
    "label": np.float32(row.get("label", np.nan)),
    "weight": np.float32(row.get("weight", 1.0)),
    "row": json.dumps(dict(row), ensure_ascii=False),
  }


def row_of(example: Mapping[str, Any]) -> contract.Row:
  """The contract row behind an example; TFDS gives text back as bytes."""
  return json.loads(example["row"])


def _info(builder: Any, description: str) -> tfds.core.DatasetInfo:
  numbers = ("label", "weight")
  features = {
    name: tfds.features.Scalar(np.float32, doc=doc)
    if name in numbers
    else tfds.features.Text(doc=doc)
    for name, doc in COLUMNS.items()
  }
  return tfds.core.DatasetInfo(
    builder=builder,
    description=description,
    features=tfds.features.FeaturesDict(features),
  )
