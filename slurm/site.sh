# shellcheck shell=bash
# What your cluster needs, in one place: every script of this folder reads it, on the first node of the job. Variables
# in the environment of the submission win.

# module load cuda/12.8
# module load openmpi    # for prepare_shards.sh: the MPI library that mpi4py is to load

PYTHON=${PYTHON:-.venv/bin/python} # on a disk that all nodes share
# PYTHON=${PYTHON:-apptainer exec --nv --bind /data,/scratch diffmoe.sif python} # or in a container

INTERFACE=${INTERFACE:-}     # the network between the nodes, such as ib0; empty: left to the libraries
LAUNCHER=${LAUNCHER:-mpirun} # of that MPI library; or srun --mpi=pmix, where Slurm speaks to it
