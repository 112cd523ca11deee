"""Writes a trained model for others to run, and verifies it.

python launch/export.py --model=runs/demo --output=runs/demo/export

--format=full (default): a Hugging Face folder with all weights.
--format=adapter: what LoRA trained alone, in the layout of PEFT.
"""

import argparse

from csrm_jax import errors
from csrm_jax.export import adapter, huggingface


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--model", help="a workdir of launch/train.py")
  parser.add_argument("--output", help="folder to write")
  parser.add_argument("--head", choices=huggingface.HEADS, default="compliance")
  parser.add_argument("--format", choices=("full", "adapter"), default="full")
  parser.add_argument(
    "--max_mib",
    type=float,
    default=adapter.MAX_MIB,
    help="largest weights file of an adapter, MiB",
  )
  flags = parser.parse_args()
  for name, example in (
    ("model", "--model=runs/demo"),
    ("output", "--output=runs/demo/export"),
  ):
    if not getattr(flags, name):
      parser.error(f"--{name} is missing; give {example}")
  if flags.format == "adapter":
    _export_adapter(flags)
    return
  with errors.told():
    done = huggingface.export(flags.model, flags.output, head=flags.head)
  print(
    f"{done['output']}: {done['head']} head; {done['rows']} fixed rows read"
    f" back by {done['reader']} differ by at most {done['difference']:.1e}"
  )
  if done["reader"] != "transformers":
    print(
      "torch is not installed: the folder was read back into our own model,"
      ' not by transformers (pip install "csrm_jax[export]" for that check)'
    )


def _export_adapter(flags: argparse.Namespace) -> None:
  with errors.told():
    done = adapter.export(
      flags.model, flags.output, head=flags.head, max_mib=flags.max_mib
    )
  print(
    f"{done['output']}: adapter of {done['mib']:.1f} MiB, {done['head']} head;"
    f" merged into its base, {done['rows']} fixed rows differ by at most"
    f" {done['difference']:.1e}; rounding it to bfloat16 moved them by at most"
    f" {done['rounding']:.1e} log-odds"
  )


if __name__ == "__main__":
  main()
