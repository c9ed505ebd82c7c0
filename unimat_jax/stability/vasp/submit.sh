#!/usr/bin/env bash
# Example for SLURM; adapt it to your cluster. From this directory:
#   sbatch --array=1-$(wc -l < folders.txt)%20 submit.sh
# Structures that are done are passed over, and those that were killed go on: submit the same again.
#SBATCH --job-name=vasp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=32
#SBATCH --time=24:00:00
set -euo pipefail
# module load vasp; source YOUR_ENVIRONMENT_WITH_CUSTODIAN/bin/activate
export OMP_NUM_THREADS=1
python run_vasp.py "$(sed -n "${SLURM_ARRAY_TASK_ID}p" folders.txt)" --vasp_cmd="${VASP_CMD:-srun vasp_std}" --gzip
