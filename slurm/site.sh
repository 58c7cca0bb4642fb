# shellcheck shell=bash
# What your cluster needs, in one place: every script of this folder reads it, on the first node of the job. Variables
# in the environment of the submission win.

# --- modules and environment
# module load cuda/12.8
# module load openmpi    # for prepare_shards.sh and encode.sh: the MPI library that mpi4py is to load

# --- Python, on a disk that all nodes share, or of a container
PYTHON=${PYTHON:-.venv/bin/python}
# PYTHON=${PYTHON:-apptainer exec --nv --bind /data,/scratch diffmoe.sif python}

# --- a container that Slurm starts (pyxis): options of srun, with PYTHON=python and LAUNCHER="srun --mpi=pmix"; paths
# keep their names in it
CONTAINER=${CONTAINER:-}
# CONTAINER=${CONTAINER:---container-image=/images/diffmoe.sqsh --container-mounts=$PWD,/data --container-workdir=$PWD}

# --- network and MPI
INTERFACE=${INTERFACE:-}     # the network between the nodes, such as ib0; empty: left to the libraries
LAUNCHER=${LAUNCHER:-mpirun} # of that MPI library; or srun --mpi=pmix, where Slurm speaks to it
