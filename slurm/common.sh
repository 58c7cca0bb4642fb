# shellcheck shell=bash
# What the sbatch scripts of this folder share. Nothing here is to be edited: settings stand in the scripts and site.sh.

# A mistake of the user's: one line, and the exit code of the commands for it.
refuse() {
    echo "error: $*" >&2
    exit 2
}

if [[ -z ${SLURMD_NODENAME:-} ]]; then refuse "no Slurm job runs this script; submit it: sbatch slurm/${0##*/}"; fi

set +u # many a site's modules and environments use variables that are not set
# shellcheck source=slurm/site.sh
source slurm/site.sh
set -u
unset SLURM_EXPORT_ENV # sbatch --export=NONE would reach srun too, and its tasks would start without a PATH
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it over from sbatch (since Slurm 22.05)
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}    # threads of two processes on one core would spin against each other
export PYTHONUNBUFFERED=1
attempt=${SLURM_RESTART_COUNT:-0} # Slurm leaves it unset in a job's first run
read -ra interpreter <<<"$PYTHON"
read -ra container <<<"$CONTAINER"
read -ra launcher <<<"$LAUNCHER"
export HWLOC_COMPONENTS=-gl # else mpirun asks ports 6000 to 6009 for X displays, where a TensorBoard never answers

say() {
    printf '%(%F %T)T %s, job %s, attempt %s: %s\n' -1 "$SLURMD_NODENAME" "$SLURM_JOB_ID" "$attempt" "$*"
}

gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
gpus=${gpus##*:} # of h100:8
processes=${SLURM_NTASKS_PER_NODE:-$((gpus ? gpus : 1))} # of a node
part=()                                                  # options of srun that say which nodes take part; else all do

# Run a command as the job's tasks, one for each GPU, and return its exit code. Signals reach it through $step.
launch() {
    # A rank that leaves must not have the others killed: they are about to leave too, with an exit code that counts.
    srun --export=ALL --kill-on-bad-exit=0 --wait=60 --label "${part[@]}" "${container[@]}" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true # a trapped signal ends it early
    done
    wait "$step"
}

# Run Python on the first node, once.
python_once() {
    if ((${#container[@]} == 0)); then
        "${interpreter[@]}" "$@"
    else
        srun --export=ALL --nodes=1 --ntasks=1 "${container[@]}" "${interpreter[@]}" "$@"
    fi
}

# Run a command of data_tools on all MPI ranks of the job. A rank that dies takes the others with it: what is finished
# stays, and the next attempt goes on from there.
on_all_ranks() {
    if [[ -n $CONTAINER && ${launcher[0]} != srun ]]; then
        refuse "LAUNCHER=$LAUNCHER: starts processes outside of CONTAINER; use srun --mpi=pmix"
    fi
    "${launcher[@]}" "${container[@]}" "${interpreter[@]}" -m mpi4py -m data_tools "$@"
}

# Where the processes meet, and over which network they talk.
connect() {
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if ! getent hosts "$MASTER_ADDR" >/dev/null; then # a node's name need not be one of the network
        MASTER_ADDR=$(scontrol show node --oneliner "$MASTER_ADDR" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    fi
    # Another port for each attempt, so that a process left over from the last one meets nobody; below the range from
    # which Linux gives out ports by itself.
    MASTER_PORT=$((12000 + (SLURM_JOB_ID * 31 + attempt * 7) % 20000))
    export MASTER_ADDR MASTER_PORT
    if [[ -n ${INTERFACE:-} ]]; then
        # On nodes with several networks NCCL may choose a slow one (docker0), and gloo the one of the host's name.
        export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
    fi
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # a failing link or card names itself in the log; silent otherwise
}

# Train until the run is done; called by train.sh with the overrides. Does not return.
train() {
    local code=0 found nodes experts precision override reason
    connect
    mkdir -p "$RUN_DIR/logs"
    rm -f "$RUN_DIR/STOP"
    stopping=
    trap on_time_limit USR1
    trap 'stopping=yes; say "told to end"' TERM # Slurm tells the tasks itself
    # Of a collective that hangs, torch keeps a record for each rank; by default on the node's own disk.
    export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_DUMP_TEMP_FILE=$RUN_DIR/logs/nccl-rank-
    export DIFFMOE_ATTEMPT=$SLURM_JOB_ID.$attempt # a process left over from an older one publishes no checkpoint
    say "nodes $SLURM_JOB_NODELIST, newest checkpoint: $(newest_checkpoint)"
    settle
    found=$(read_config "${settings[@]}" "$@") || leave $?
    { read -r nodes experts precision override; read -r reason || true; } <<<"$found"
    if ((nodes < SLURM_NNODES)); then say "$nodes of $SLURM_NNODES nodes take part: $reason"; fi
    part=(
        --nodes="$nodes" --ntasks="$((nodes * processes))" --ntasks-per-node="$processes"
        --nodelist="$(first_nodes "$nodes")"
    )
    say "precision $precision, $experts GPUs share one set of experts"
    if [[ -n $LOCAL_SCRATCH ]]; then
        stage SHARDS
        if [[ -n $LATENTS ]]; then stage LATENTS; fi
        settle
    fi
    # Either signal would kill a process that has yet to install its handlers.
    launch bash -c 'trap "" USR1 TERM; exec "$@"' _ "${interpreter[@]}" -m diffmoe_dist.train --config "$CONFIG" \
        "${settings[@]}" ${override:+"$override"} "$@" || code=$?
    rm -f "$RUN_DIR/STOP"
    leave "$code"
}

# Of the job's nodes the first ones, separated by commas.
first_nodes() {
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n "1,$1p" | paste -sd ,
}

# The settings that the variables of the scripts stand for.
settle() {
    settings=(
        device="$DEVICE" run_dir="$RUN_DIR" data.shards="$SHARDS" ${LATENTS:+data.latents="$LATENTS"}
        ${PRECISION:+precision="$PRECISION"}
    )
}

on_time_limit() {
    stopping=yes
    say "time is nearly up: save and leave"
    touch "$RUN_DIR/STOP" # for a process that is too young to hear the signal
    if [[ -n ${step:-} ]]; then kill -USR1 "$step" 2>/dev/null || true; fi
}

# End this attempt: for good, or to be started again.
leave() {
    local code=$1 job
    if ((code == 0)) && [[ -e $RUN_DIR/DONE ]]; then
        say "done"
        exit 0
    fi
    code=$((code ? code : 1)) # srun may return 0 although a node died
    job=$(ask_slurm)
    # A job that was cancelled or that Slurm itself requeues is no longer RUNNING: to requeue it would raise a cancelled
    # job from the dead. A node that was cut off may find a newer attempt running.
    if [[ $job != *" JobState=RUNNING "* || $job != *" Restarts=$attempt "* ]]; then
        say "left with exit code $code; this attempt no longer runs"
        exit "$code"
    fi
    if ((code == 2)); then
        say "a mistake in the settings: not requeued"
        exit "$code"
    fi
    if ! may_try_again "$code"; then
        say "no progress since $(newest_checkpoint), exit code $code: not requeued"
        exit "$code"
    fi
    say "requeued after exit code $code, newest checkpoint: $(newest_checkpoint)"
    scontrol requeue "$SLURM_JOB_ID" || exit "$code"
    exit 0
}

# Count the endings of this job at its newest checkpoint, and refuse a second crash or a tenth early stop there.
may_try_again() {
    local code=$1 newest job='' checkpoint='' crashes=0 stops=0
    newest=$(newest_checkpoint)
    if [[ -r $RUN_DIR/endings ]]; then read -r job checkpoint crashes stops <"$RUN_DIR/endings"; fi
    if [[ "$job $checkpoint" != "$SLURM_JOB_ID $newest" ]]; then crashes=0 stops=0; fi
    if [[ -n $stopping ]] || ((code == 75)); then
        stops=$((stops + 1))
    elif ! sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --format=%T | grep -Eq 'down|drain|fail|\*'; then
        crashes=$((crashes + 1)) # and no node is to blame
    fi
    echo "$SLURM_JOB_ID $newest $crashes $stops" >"$RUN_DIR/endings"
    ((crashes < 2 && stops < 10))
}

newest_checkpoint() {
    local newest=none state
    for state in "$RUN_DIR"/checkpoints/step-*/state.json; do
        if [[ -e $state ]]; then newest=$(basename "$(dirname "$state")"); fi
    done
    echo "$newest"
}

# What Slurm says of this job; patient, for its controller may be restarting.
ask_slurm() {
    for _ in {1..20}; do
        if scontrol show job --oneliner "$SLURM_JOB_ID"; then return; fi
        sleep 15
    done
}

# What the settings make of the configuration on the nodes there are, and in a second line why some are left out.
#   How many nodes take part: the most that the batch, and the token pools of the run so far, divide over.
#   How many processes share one set of experts, and the setting for it where the command line has none: as many as the
#   configuration says, or that can share them out evenly. Gradients of experts that several groups hold travel between
#   nodes, every step and whole.
#   The precision.
read_config() {
    python_once -c '
import sys
from pathlib import Path
from diffmoe_dist.command import run_command
from diffmoe_dist.config import for_nodes, is_given, load_config
from diffmoe_dist.engine.progress import earlier_ranks

def main():
    file, nodes, gpus, *overrides = sys.argv[1:]
    config = load_config(file, overrides)
    name = "parallel.expert"
    ordered = is_given(name, overrides)
    expert = "order" if ordered else "wish" if is_given(name, (), file) else "any"
    earlier = earlier_ranks(Path(config.run_dir))
    count, fitted, reason = for_nodes(config, int(nodes), int(gpus), expert, earlier)
    precision = fitted.precision + "+tf32" * fitted.tf32
    override = "" if ordered else f" {name}={fitted.parallel.expert}"
    sys.stdout.write(f"{count} {fitted.parallel.expert} {precision}{override}\n{reason}\n")

run_command(main)' "$CONFIG" "$SLURM_NNODES" "$processes" "$@"
}

# Copy the folder of shards that a variable names to each node's own disk; a folder that has its name is complete.
stage() {
    local -n folder=$1
    local copy
    copy=$LOCAL_SCRATCH/shards-$(sha256sum <"$folder/index.json" | cut -c 1-16)
    say "$1 on each node: $copy"
    # shellcheck disable=SC2016
    srun --export=ALL "${part[@]}" --ntasks="$nodes" --ntasks-per-node=1 bash -euc '
        if [[ ! -d $2 ]]; then
            rm -rf "$2.part"
            cp -rL "$1" "$2.part"
            mv "$2.part" "$2"
        fi' _ "$folder" "$copy"
    folder=$copy
}
