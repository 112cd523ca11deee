"""Writes a trained model as a Hugging Face folder, and verifies it.

python launch/export.py --model=runs/demo --output=runs/demo/export
"""

import argparse

from csrm_jax import errors
from csrm_jax.export import huggingface


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--model", help="a workdir of launch/train.py")
  parser.add_argument("--output", help="folder to write")
  parser.add_argument("--head", choices=huggingface.HEADS, default="compliance")
  flags = parser.parse_args()
  for name, example in (
    ("model", "--model=runs/demo"),
    ("output", "--output=runs/demo/export"),
  ):
    if not getattr(flags, name):
      parser.error(f"--{name} is missing; give {example}")
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


if __name__ == "__main__":
  main()
