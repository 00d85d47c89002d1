"""What the program keeps on a disk beside runs: records of what this user's machine has made."""
