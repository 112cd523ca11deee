"""Preparation as an Apache Beam pipeline, for more machines than this one.

The same functions as in `local.py`, on elements in any order: what depends on
order (a family, a bucket, a file) is sorted by key where it comes together.
Workers leave their results in files; this process only merges those.
"""

import functools
import itertools
import json
import pickle
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam import pvalue  # pyright: ignore[reportMissingImports]
from apache_beam.io.filesystems import (  # pyright: ignore[reportMissingImports]
  FileSystems,
)
from apache_beam.options import (  # pyright: ignore[reportMissingImports]
  pipeline_options,
)

from csrm_jax.data import (
  augment,
  balance,
  families,
  found,
  pieces,
  sources,
  spill,
  stages,
)
from csrm_jax.data.annotated import Annotated
from csrm_jax.data.contract import Key, Row
from csrm_jax.data.families import Bucket
from csrm_jax.data.found import Found, Records
from csrm_jax.data.pieces import Piece, Recipe

Keyed = tuple[Key, Row]
# Outputs of a step besides its main one, all of them (field, item):
#   count    (name, n), added up;
#   fatal    (key, message) of an error, of which the first is raised;
#   found    what `found.sift` yields, and bad rows.
_SIDE = ("count", "fatal", "found")


def run(
  recipe: Recipe,
  reading: sources.Reading,
  parts: Sequence[sources.Part],
  wanted: list[stages.Stage],
  work: Path,
  *,
  shuffle: bool,
  options: str,
) -> Found:
  """Reads, tokenises and packs; what it finds equals that of `local.run`.

  Args:
    recipe: what decides the records.
    reading: how the parts are read.
    parts: of `sources.parts`; a synthetic source may be in many.
    wanted: of `stages.parse_stages`.
    work: folder of this process. Files of the workers go there too, unless the
      options have a temp_location.
    shuffle: whether training rows exchange their specs.
    options: of Beam, as on a command line.

  Raises:
    ValueError: a row is bad, or cannot be packed.
  """
  settings = pipeline_options.PipelineOptions(shlex.split(options))
  # Beam would read our annotations, which speak of files, not of elements.
  settings.view_as(pipeline_options.TypeOptions).pipeline_type_check = False
  cloud = settings.view_as(pipeline_options.GoogleCloudOptions)
  shared = FileSystems.join(cloud.temp_location or str(work), "beam")
  FileSystems.mkdirs(shared)
  place = FileSystems.join(shared, "recipe")
  with FileSystems.create(place) as out:
    out.write(pickle.dumps(recipe))
  with beam.Pipeline(options=settings) as pipeline:
    steps = _Steps(pipeline)
    rows = [
      steps.flat(
        "read",
        pipeline
        | "parts" >> beam.Create([p for p in parts if not _is_augmented(p)])
        | "spread parts" >> beam.Reshuffle(),
        _read,
        reading,
      )
    ]
    for name in dict.fromkeys(p.name for p in parts if _is_augmented(p)):
      mine = [p for p in parts if p.name == name]
      rows.append(_augmented(steps, reading, mine))
    training = steps.flat(
      "sift", tuple(rows) | "all rows" >> beam.Flatten(), _sift, place
    )
    if shuffle:
      training = _shuffled(steps, training, place)
    _packed(steps, training, place, wanted)
    steps.write(FileSystems.join(shared, "found"))
  return _collected(shared, work)


class _Steps:
  """A pipeline under construction, with the side outputs of its steps."""

  def __init__(self, pipeline: Any) -> None:
    self.pipeline = pipeline
    self.sides: dict[str, list[Any]] = {name: [] for name in _SIDE}

  def flat(self, name: str, elements: Any, function: Any, *args: Any) -> Any:
    """Main output of a function that yields elements and tagged outputs."""
    step = beam.FlatMap(function, *args)
    made = elements | name >> step.with_outputs(*_SIDE, main="main")
    for side in _SIDE:
      self.sides[side].append(made[side])
    return made["main"]

  def single(self, name: str, function: Any, *args: Any) -> Any:
    """One value out of side inputs, itself a side input."""
    start = self.pipeline | f"start {name}" >> beam.Create([None])
    return pvalue.AsSingleton(self.flat(name, start, function, *args))

  def write(self, prefix: str) -> None:
    """Every side output as lines of JSON: [field, item]."""
    counts = (
      tuple(self.sides["count"])
      | "counts" >> beam.Flatten()
      | "add counts" >> beam.CombinePerKey(sum)
      | "name counts" >> beam.Map(lambda item: ("count", item))
    )
    rest = [*self.sides["fatal"], *self.sides["found"]]
    _ = (
      (counts, *rest)
      | "sides" >> beam.Flatten()
      | "lines" >> beam.Map(json.dumps)
      | "write" >> beam.io.WriteToText(prefix, file_name_suffix=".jsonl")
    )


def _is_augmented(part: sources.Part) -> bool:
  return part.name in sources.AUGMENTED


@functools.cache
def _recipe(place: str) -> Recipe:
  with FileSystems.open(place) as file:
    return pickle.loads(file.read())


def _counted(counts: dict[str, int]) -> Iterator[Any]:
  for item in counts.items():
    yield pvalue.TaggedOutput("count", item)


def _fatal(key: Key, error: ValueError | str) -> Any:
  return pvalue.TaggedOutput("fatal", ("fatal", (key, str(error))))


def _aside(key: Key, row: Any, reason: str) -> Any:
  line = found.line({"reason": reason, "row": row})
  return pvalue.TaggedOutput("found", ("bad", (key, line)))


# -- Rows -----------------------------------------------------------------


def _read(part: sources.Part, reading: sources.Reading) -> Iterator[Any]:
  counts: dict[str, int] = {}
  bad: list[tuple[Key, Any, str]] = []
  after: Key = (part.number, "", part.first << 24)
  try:
    for key, row in sources.read(
      part, reading, bad=lambda *one: bad.append(one), counts=counts
    ):
      yield key, row
      after = (*key[:2], key[2] + 1)
      while bad:
        yield _aside(*bad.pop())
  except ValueError as error:  # of the row after the last one
    yield _fatal(after, error)
  for one in bad:
    yield _aside(*one)
  yield from _counted(counts)


def _sift(keyed: Keyed, place: str) -> Iterator[Any]:
  key, row = keyed
  training = True
  for field, item in found.sift(_recipe(place), key, row):
    if field == "facts":
      yield pvalue.TaggedOutput("count", (json.dumps(item), 1))
    else:
      yield pvalue.TaggedOutput("found", (field, item))
    training = training and field != "heldout"
  if training:
    yield key, row


def _shuffled(steps: _Steps, rows: Any, place: str) -> Any:
  number = pvalue.AsSingleton(rows | "rows" >> beam.combiners.Count.Globally())
  together = (
    rows
    | "to shuffle" >> beam.Map(_shuffle_bucket_of, number)
    | "together" >> beam.GroupByKey()
  )
  return steps.flat("shuffle", together, _shuffle, place)


def _shuffle_bucket_of(keyed: Keyed, number: int) -> tuple[int, Keyed]:
  buckets = families.buckets(number, families.BUCKET_ROWS)
  return spill.bucket(spill.place(keyed[1]["family"]), buckets), keyed


def _shuffle(bucket: tuple[int, Iterable[Keyed]], place: str) -> Iterator[Any]:
  rows = list(bucket[1])
  try:
    made, counts = families.shuffle_bucket(_recipe(place), rows)
  except ValueError as error:
    yield _fatal(min(key for key, _ in rows), error)
    return
  yield from made
  yield from _counted(counts)


# -- Augmented sources ----------------------------------------------------


def _augmented(
  steps: _Steps, reading: sources.Reading, parts: list[sources.Part]
) -> Any:
  """(key, row) of an augmented source: as `sources.read`, step by step."""
  name, whole = parts[0].name, parts[0]
  taxonomy, options, bounds = sources.augmenting(name, reading)
  conversations = steps.flat(
    f"{name} conversations",
    steps.pipeline
    | f"{name} parts" >> beam.Create(parts)
    | f"{name} spread" >> beam.Reshuffle(),
    _conversations,
    reading,
  )
  broken = conversations | f"{name} broken" >> beam.Map(
    lambda row: (row.id, augment.broken(row, taxonomy))
  )
  plan = steps.single(
    f"{name} plan",
    _plan,
    whole.number,
    taxonomy,
    options,
    pvalue.AsList(broken),
  )
  prompts = (
    conversations
    | f"{name} prompt" >> beam.Map(lambda row: (augment.prompt_of(row), row))
    | f"{name} prompts" >> beam.GroupByKey()
  )
  made = steps.flat(f"{name} rows", prompts, _rows_of, name, plan)
  tally = pvalue.AsSingleton(
    made
    | f"{name} tally" >> beam.MapTuple(lambda _, rows: balance.tally(rows))
    | f"{name} tallies" >> beam.CombineGlobally(_tallies)
  )
  cuts = steps.single(f"{name} cuts", _cuts, name, bounds, tally)
  rows = steps.flat(f"{name} thin", made, _thin, whole, cuts)
  if whole.limit and not whole.groups:
    kept = (
      rows
      | f"{name} families" >> beam.Map(lambda keyed: keyed[1]["family"])
      | f"{name} least" >> beam.CombineGlobally(_least, whole.limit)
    )
    rows = steps.flat(
      f"{name} limit",
      rows,
      _limited,
      name,
      pvalue.AsSingleton(kept),
    )
  return steps.flat(f"{name} made", rows, _made, name)


def _conversations(
  part: sources.Part, reading: sources.Reading
) -> Iterator[Any]:
  try:
    yield from sources.conversations(part, reading)
  except ValueError as error:
    yield _fatal((part.number, "", 0), error)


def _plan(
  nothing: None,
  number: int,
  taxonomy: Any,
  options: dict[str, Any],
  broken: list[tuple[str, tuple[int, ...]]],
) -> Iterator[Any]:
  broken = sorted(broken)
  for (one, _), (two, _) in itertools.pairwise(broken):
    if one == two:
      yield _fatal((number, one, 0), augment.used_twice(one))
  yield augment.plan(taxonomy, (rules for _, rules in broken), **options)


def _rows_of(
  prompt: tuple[bytes, Iterable[Annotated]],
  name: str,
  plan: augment.Plan,
) -> Iterator[Any]:
  together = sorted(prompt[1], key=lambda row: row.id)
  counts: dict[str, int] = {}
  yield together[0].id, list(augment.rows_of(together, plan, counts))
  yield from _counted({f"{name}_{key}": n for key, n in counts.items()})


def _tallies(parts: Iterable[balance.Tally]) -> balance.Tally:
  total: balance.Tally = {}
  for part in parts:
    balance.add(total, part)
  return total


def _cuts(
  nothing: None, name: str, bounds: dict[str, Any], tally: balance.Tally
) -> Iterator[Any]:
  cuts, counts = balance.decide(tally, **bounds)
  yield cuts
  counts["balance_bases_lost"] = 0
  yield from _counted({f"{name}_{key}": n for key, n in counts.items()})


def _thin(
  prompt: tuple[str, list[Row]], part: sources.Part, cuts: balance.Cuts
) -> Iterator[Any]:
  rows, lost = balance.thin(prompt[1], cuts)
  yield from sources.keyed(part, prompt[0], rows)
  yield from _counted({f"{part.name}_{key}": n for key, n in lost.items()})


def _least(names: Iterable[Any], limit: int) -> list[str]:
  # Names, or what this function made of others.
  flat: list[str] = []
  for one in names:
    flat += [one] if isinstance(one, str) else one
  return sources.least(flat, limit)


def _limited(keyed: Keyed, name: str, kept: list[str]) -> Iterator[Any]:
  if keyed[1]["family"] in kept:
    yield keyed
  else:
    yield from _counted({f"{name}_beyond_limit": 1})


def _made(keyed: Keyed, name: str) -> Iterator[Any]:
  yield keyed
  yield from _counted({f"{name}_made": 1})


# -- Tokens and records ---------------------------------------------------


def _packed(
  steps: _Steps, rows: Any, place: str, wanted: list[stages.Stage]
) -> None:
  together = (
    steps.flat(
      "encode", rows | "batches" >> beam.BatchElements(64, 128), _encode, place
    )
    | "family of" >> beam.Map(lambda piece: (piece.family, piece))
    | "families" >> beam.GroupByKey()
    | "in order" >> beam.MapTuple(lambda name, found: (name, sorted(found)))
  )
  candidates = together | "candidates" >> beam.MapTuple(stages.candidate)
  tokens = candidates | "tokens" >> beam.Map(lambda one: one.tokens)
  first = candidates | "earliest" >> beam.CombineGlobally(_earliest, wanted)
  layout = steps.single(
    "layout",
    _layout,
    wanted,
    pvalue.AsSingleton(first),
    pvalue.AsSingleton(tokens | "all tokens" >> beam.CombineGlobally(sum)),
  )
  buckets = (
    together
    | "bucket of" >> beam.Map(_bucket_of, layout)
    | "buckets" >> beam.GroupByKey()
  )
  steps.flat("pack", buckets, _pack, place)


def _encode(rows: list[Keyed], place: str) -> Iterator[Any]:
  recipe = _recipe(place)
  made = pieces.encode(recipe._replace(quarantine=True), rows)
  yield from made.pieces
  for key, row, reason in made.bad:
    if recipe.quarantine:
      yield _aside(key, row, reason)
      yield from _counted({"quarantined": 1})
    else:
      yield _fatal(key, f"row {row.get('id')!r}: {reason}")
  yield from _counted(made.counts)


def _earliest(
  some: Iterable[Any], wanted: list[stages.Stage]
) -> list[stages.Candidate]:
  # Candidates, or what this function made of others.
  flat: list[stages.Candidate] = []
  for one in some:
    flat += [one] if isinstance(one, stages.Candidate) else one
  return stages.earliest(flat, wanted)


def _layout(
  nothing: None,
  wanted: list[stages.Stage],
  first: list[stages.Candidate],
  tokens: int,
) -> Iterator[Any]:
  taken = stages.staged(first, wanted)
  yield taken, families.stage_buckets(taken, len(wanted), tokens)


def _bucket_of(family: tuple[str, list[Piece]], layout: Any) -> Any:
  name, together = family
  taken, numbers = layout
  stage = taken[name][0] if name in taken else len(numbers) - 1
  bucket = spill.bucket(together[0].place, numbers[stage])
  rows = [(piece.key, piece.encoded) for piece in together]
  return (stage, bucket), (name, rows)


def _pack(
  bucket: tuple[tuple[int, int], Iterable[Any]], place: str
) -> Iterator[Any]:
  (stage, number), members = bucket
  path = f"{place}-records-{stage}-{number}"
  members = list(members)
  try:
    with FileSystems.create(path) as out:
      sums = families.pack_bucket(_recipe(place), members, out.write)
  except ValueError as error:
    first = min(min(rows)[0] for _, rows in members)
    yield _fatal(first, error)
    return
  yield pvalue.TaggedOutput("found", ("records", (stage, number, path, sums)))


# -- This process ---------------------------------------------------------


def _collected(shared: str, work: Path) -> Found:
  """What the workers wrote, sorted."""
  made = found.empty(work)
  fatal: list[tuple[Any, str]] = []
  for field, item in _lines(FileSystems.join(shared, "found")):
    if field == "fatal":
      fatal.append((item[0], item[1]))
    elif field == "count":
      name, n = item
      if name.startswith("["):
        made.facts[tuple(json.loads(name))] += n
      else:
        pieces.add(made.counts, {name: n})
    elif field == "records":
      stage, number, path, sums = item
      here = path
      if not Path(path).is_file():  # in a bucket of a cloud
        here = str(work / f"records-{stage}-{number}")
        with FileSystems.open(path) as far, open(here, "wb") as near:
          while block := far.read(1 << 20):
            near.write(block)
      made.records.append(Records(stage, number, here, Bucket(*sums)))
    else:
      found.put(made, field, _hashable(item))
  if fatal:
    raise ValueError(min(fatal)[1])
  return made


def _hashable(item: list[Any]) -> tuple[Any, ...]:
  return tuple(tuple(x) if isinstance(x, list) else x for x in item)


def _lines(prefix: str) -> Iterator[Any]:
  (match,) = FileSystems.match([f"{prefix}-*.jsonl"])
  for file in match.metadata_list:
    with FileSystems.open(file.path) as lines:
      for line in lines:
        yield json.loads(line)
