"""Writes packed rows and their manifest into WORKDIR/data.

python launch/prepare.py --config=configs/csrm_smollm2.py \
  --config.data.source=beavertails --config.data.path=DATA --workdir=DIR

Of several processes the first prepares and the others wait.
"""

import json
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from csrm_jax import errors, hosts, peers, storage

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Rows go to its folder data/")
_HOSTS = {
  name: (flags.DEFINE_string if kind is str else flags.DEFINE_integer)(
    name, None, meaning
  )
  for name, (kind, meaning) in hosts.FLAGS.items()
}


def write_rows() -> None:
  from csrm_jax.data.prepare import prepare
  from csrm_jax.train.loop import load_tokenizer

  config = _CONFIG.value
  folder = storage.path(str(_WORKDIR.value)) / "data"
  local = storage.here(folder)  # ArrayRecord files are written here
  with storage.naming(folder):
    meta = prepare(config, local, load_tokenizer(config))
  if storage.is_remote(folder):
    storage.remove(folder)
    storage.put(local, folder, last="meta.json")
  print(json.dumps(meta, indent=2))
  counts = meta["counts"]
  shared = counts["tokens_alone"] / max(counts["tokens_in_tries"], 1)
  print(
    f"{meta['rows']} rows in {folder}; shared prefixes save {shared:.1f} x "
    f"tokens; {counts.get('quarantined', 0)} rows quarantined"
  )


def main(_):
  place: dict[str, Any] = {name: flag.value for name, flag in _HOSTS.items()}
  with errors.told(), peers.joined(**place), errors.told():
    peers.first("preparation", write_rows)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=errors.parsed)
