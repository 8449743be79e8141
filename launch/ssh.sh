#!/usr/bin/env bash
# Train on several hosts over plain ssh. What follows the hosts are settings:
#
#     launch/ssh.sh node1 node2 -- PRESET=legal_ttt RUN_ID=c1
#
# The first host is rank 0's: it keeps the run, nothing is written on the others. Quantize and evaluate there:
#
#     ssh node1 'cd FOLDER && torchrun --standalone --nproc-per-node 8 quantize.py runs/c1'
#
# Every host needs the repository, Python and the data under the same paths, logins without a password, and the first one's MASTER_PORT open.
# Ctrl-C hangs up: all ranks get SIGHUP, save a checkpoint and leave; RESUME=1 RUN_ID=c1 goes on. When a host fails, the others, which have lost
# touch with it, get GRACE seconds to say so and end. All of it by environment, with these defaults:
set -euo pipefail
FOLDER=${FOLDER:-$PWD} PYTHON=${PYTHON:-python3} GPUS=${GPUS:-8} MASTER_PORT=${MASTER_PORT:-29500} GRACE=${GRACE:-30}

hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  hosts+=("$1")
  shift
done
if [ ${#hosts[@]} = 0 ] || [ $# = 0 ]; then
  echo "usage: launch/ssh.sh HOST... -- SETTING=VALUE..." >&2
  exit 2
fi
shift

ranks=()
trap 'kill "${ranks[@]}" 2>/dev/null || true; wait' EXIT
for rank in "${!hosts[@]}"; do
  command=(env "$@" "$PYTHON" -m torch.distributed.run --nnodes "${#hosts[@]}" --node-rank "$rank" --nproc-per-node "$GPUS"
    --master-addr "${hosts[0]#*@}" --master-port "$MASTER_PORT" train_gpt.py)
  # A terminal there (-tt) is what hangs up when the connection ends.
  ssh -tt -o BatchMode=yes "${hosts[rank]}" "cd $(printf %q "$FOLDER") && exec$(printf ' %q' "${command[@]}")" </dev/null &
  ranks+=($!)
done

status=0
for _ in "${ranks[@]}"; do
  wait -n || status=$?
  [ "$status" = 0 ] || break
done
if [ "$status" != 0 ]; then
  for rank in "${ranks[@]}"; do timeout "$GRACE" tail --pid="$rank" -f /dev/null || true; done
fi
exit "$status"
