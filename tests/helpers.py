"""Small helpers of several folders, which import neither torch nor the code under test."""


def flip_bit(whole: bytes, bit: int) -> bytes:
    """The same bytes with one bit changed, counted from the lowest bit of the first byte."""
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def srun_task(task: int, job: str = "7") -> dict[str, str]:
    """The variables of one of two tasks that `srun` has started on one machine."""
    return {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": "train",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
        "SLURM_NODEID": "0",
        "SLURM_NNODES": "1",
    }
