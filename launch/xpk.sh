#!/usr/bin/env bash
# Trains on GKE through xpk, which writes and submits the JobSet.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/xpk.sh --cluster=NAME --workload=NAME --tpu-type=TYPE --image=IMAGE
    [options] -- FLAGS OF launch/train.py

IMAGE holds this clone at /csrm_jax with its packages (docs/multihost.md). The
workdir must be on storage that all pods mount.

  --cluster=NAME   made before by xpk cluster create
  --workload=NAME  of this run; the same name again needs xpk workload delete
  --tpu-type=TYPE  for example v5litepod-16
  --image=IMAGE    for example REGION-docker.pkg.dev/PROJECT/REPO/csrm_jax
  --slices=N       default 1
  --restarts=N     how often lost pods are replaced, default 20
  --zone=ZONE, --project=ID   default: those of gcloud

The FLAGS need --config=... and --workdir=..., for example
  launch/xpk.sh --cluster=tpus --workload=first --tpu-type=v5litepod-16 \
    --image=IMAGE -- --config=configs/csrm_smollm2.py \
    --config.data.path=/mnt/csrm/data --workdir=/mnt/csrm/runs/first
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

cluster="" workload="" type="" image="" slices=1 restarts=20
where=()
while (($#)); do
  case "$1" in
    --cluster=*) cluster="${1#*=}" ;;
    --workload=*) workload="${1#*=}" ;;
    --tpu-type=*) type="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --zone=* | --project=*) where+=("$1") ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "$1: no such option; see --help (flags of train.py come after --)" ;;
  esac
  shift
done
[[ -n "$cluster" ]] || fail "--cluster is missing; see --help"
[[ -n "$workload" ]] || fail "--workload is missing; see --help"
[[ -n "$type" ]] || fail "--tpu-type is missing; see --help"
[[ -n "$image" ]] || fail "--image is missing; see --help"
(($#)) || fail "flags of launch/train.py are missing after --; see --help"

printf -v flags '%q ' "$@"
xpk workload create --cluster="$cluster" --workload="$workload" \
  --tpu-type="$type" --num-slices="$slices" --max-restarts="$restarts" \
  --docker-image="$image" "${where[@]}" \
  --command="cd /csrm_jax && python launch/train.py $flags"
