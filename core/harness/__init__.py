"""A trained model under the tasks of EleutherAI's lm-evaluation-harness."""
